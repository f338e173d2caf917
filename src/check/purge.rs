//! Whether anybody deletes what is archived: pg_cron's job, and what the purge has logged.

use tokio_postgres::{Client, Row};

use super::database::{in_short, strangers};
use super::{Report, human_bytes, identifier, literal};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::purge::{self, Finding};
use crate::setup::{PURGE_COMMAND, PURGE_JOB};

const CONTEXT: &str = "looking at the purge";

/// A purge that has not run for so long is not scheduled, or fails; a partition that has been blocked for so long needs somebody.
const LATE: &str = "interval '1 day'";

/// Share of a table, in per cent, that is past retention and still there.
const SHARE_MAX: i64 = 20;

/// By how much, in per cent of the table, it may have grown in a week. The oldest partition is always a little late.
const GROWTH_MAX: i64 = 5;

/// What is compared with the time before it, to see whether that share grows.
const WEEK: &str = "interval '7 days'";

const CRON: &str = "
    select extversion, coalesce(has_schema_privilege(to_regnamespace('cron'), 'usage'), false)
    from pg_extension where extname = 'pg_cron'";

// A role sees its own jobs only, a superuser all.
const JOB: &str = "
    select j.jobid, j.schedule, j.active, d.status, d.return_message, j.username::text
    from cron.job j left join lateral (
        select r.status, r.return_message from cron.job_run_details r
        where r.jobid = j.jobid and r.status in ('failed', 'succeeded') order by r.runid desc limit 1) d on true
    where j.command ilike '%highwater.purge%' and j.database = current_database()
    order by j.active desc, j.jobid limit 1";

pub(super) async fn check(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let flag = async |query: &str| {
        let row = client.query_one(query, &[]).await;
        row.and_then(|row| row.try_get::<_, bool>(0)).map_err(Error::sql(CONTEXT))
    };
    // What is not set up yet, or can't be used, is a finding of its own.
    if !flag("select coalesce(has_schema_privilege(to_regnamespace('highwater'), 'usage'), false)").await?
        || flag("select to_regclass('highwater.watermark') is null").await?
    {
        return check_cron(client, config, report).await;
    }
    if !flag("select coalesce(has_table_privilege(to_regclass('highwater.purge_log'), 'select'), false)")
        .await?
    {
        report.warning(
            "purge",
            "highwater",
            "the purge is not installed, or can't be read",
            "run `highwater setup`",
        );
        return Ok(());
    }
    let query = format!(
        "select coalesce(bool_and(purged_at > now() - {LATE}), false) from highwater.retention where purged_at is not null"
    );
    if flag(&query).await? {
        // By whatever scheduler, in whatever database.
        report.ok("pg-cron", "highwater.retention", "somebody purges");
    } else {
        check_cron(client, config, report).await?;
    }
    check_default_partitions(client, config, report).await?;
    check_next_partitions(client, config, report).await?;
    check_archive_logs(client, report).await?;
    check_runs(client, config, report).await
}

/// What others took out of the archive, and whether anybody looks.
async fn check_archive_logs(client: &Client, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let query = "
        select l.kind, highwater.ago(l.looked_at), l.looked_at < now() - l.purge_trust,
               case when l.removal_at > now() - interval '7 days' then l.removal_note end, highwater.ago(l.removal_at),
               (select (array_agg(p.partition_name order by p.partition_name))[1]
                       || case when count(*) > 1 then format(' and %s more', count(*) - 1) else '' end
                from highwater.covered_partition p join highwater.watermark w using (source_table)
                where p.lacks_reason is not null and (w.kind = l.kind or l.kind = 'quarantine')),
               l.damage_note
        from highwater.archive_log l order by 1";
    for row in client.query(query, &[]).await.map_err(failed())? {
        let kind: String = row.try_get(0).map_err(failed())?;
        let object = format!("archive table {kind}");
        let ago: String = row.try_get(1).map_err(failed())?;
        let note: Option<String> = row.try_get(3).map_err(failed())?;
        let lacking: Option<String> = row.try_get(5).map_err(failed())?;
        if let Some(damage) = row.try_get::<_, Option<String>>(6).map_err(failed())? {
            report.error(
                "archive-files",
                &object,
                damage,
                "bring them back, as it says; then `highwater verify`",
            );
        }
        if let Some(note) = note {
            let noticed: String = row.try_get(4).map_err(failed())?;
            let blocked = lacking
                .map_or_else(String::new, |lacking| format!("; until that is mended, not purged: {lacking}"));
            let message = format!("{note} (noticed {noticed}){blocked}");
            let remedy = "go back as it says, if that was not on purpose; this is shown for a week, for as long as older versions \
                          are kept";
            report.warning("archive-log", object, message, remedy);
        } else if row.try_get::<_, bool>(2).map_err(failed())? {
            let message = format!(
                "its log was last looked at {ago}: nothing of it is purged until the sidecar has looked again"
            );
            report.warning("archive-log", object, message, "start `highwater run`");
        } else {
            report.ok("archive-log", object, format!("its log and files were looked at {ago}"));
        }
    }
    Ok(())
}

/// A late row for a day whose partition is gone needs a place.
async fn check_default_partitions(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let query = "
        select c.oid::regclass::text, quote_ident(c.relname || '_default') from highwater.watermark w
        join pg_class c on c.oid = w.table_oid join pg_partitioned_table p on p.partrelid = c.oid
        where w.slot_name = $1 and p.partstrat = 'r' and p.partdefid = 0 order by 1";
    for row in client.query(query, &[&config.slot]).await.map_err(failed())? {
        let (table, name): (String, String) =
            (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        let remedy =
            format!("create table {}.{name} partition of {table} default;", identifier(&config.schema));
        let message = "has no default partition: a late row for a day that was purged can't be inserted";
        report.warning("purge-default", &table, message, remedy);
    }
    Ok(())
}

/// Rows of tomorrow need a place, too, and one of their own.
async fn check_next_partitions(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let query = "
        select c.oid::regclass::text, nullif(p.partdefid, 0)::regclass::text,
               has_table_privilege(nullif(p.partdefid, 0), 'select') is true,
               (select max(u.range_end) from highwater.purge_units(c.oid) u where u.is_attached) <= now() + interval '1 day',
               quote_ident(coalesce(to_jsonb(w)->>'time_column', 'created_at'))
        from highwater.watermark w join pg_class c on c.oid = w.table_oid join pg_partitioned_table p on p.partrelid = c.oid
        where w.slot_name = $1 and p.partstrat = 'r' order by 1";
    for row in client.query(query, &[&config.slot]).await.map_err(failed())? {
        let table: String = row.try_get(0).map_err(failed())?;
        let default: Option<String> = row.try_get(1).map_err(failed())?;
        if row.try_get::<_, Option<bool>>(3).map_err(failed())? == Some(true) {
            let then = if default.is_some() {
                "its rows go to the default partition, and are then in the way of one of their own"
            } else {
                "its rows are refused"
            };
            let remedy = "make it; with pg_partman: call its run_maintenance_proc(), and see why nobody does";
            report.warning(
                "next-partition",
                &table,
                format!("has no partition for tomorrow: {then}"),
                remedy,
            );
        }
        let Some(default) = default.filter(|_| row.try_get(2).unwrap_or(false)) else { continue };
        let time: String = row.try_get(4).map_err(failed())?;
        let fills = format!("select exists (select from {default} where {time} > now() - interval '1 day')");
        if client.query_one(&fills, &[]).await.and_then(|row| row.try_get(0)).map_err(failed())? {
            let message = format!(
                "rows of today go to its default partition {default}: none was made for them in time"
            );
            let remedy = "move them, with pg_partman by its partition_data_proc(); what is archived twice by that is removed again";
            report.warning("default-partition", &table, message, remedy);
        }
    }
    Ok(())
}

async fn check_cron(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let schedule = "as the owner of the drift tables: `highwater setup --as-owner --schedule-purge`";
    let Some(row) = client.query_opt(CRON, &[]).await.map_err(failed())? else {
        report.warning(
            "pg-cron",
            "pg_cron",
            "is not installed in this database: nothing in it can run a purge by itself",
            "run `highwater setup --schedule-purge`, which prints what to run in the database that has pg_cron; or call \
             `highwater purge` from another scheduler",
        );
        return Ok(());
    };
    let version: String = row.try_get(0).map_err(failed())?;
    if !row.try_get::<_, bool>(1).map_err(failed())? {
        let remedy = "have the owner of the drift tables look: `highwater check`, or `highwater setup --as-owner --schedule-purge`, as \
                      that one";
        report.warning("pg-cron", "pg_cron", "may not be looked into by this role", remedy);
        return Ok(());
    }
    let Some(job) = client.query_opt(JOB, &[]).await.map_err(failed())? else {
        let message = format!(
            "{version} has no job that calls the purge, as far as this role can see: nothing is ever deleted"
        );
        report.warning("pg-cron", "pg_cron", message, schedule);
        return Ok(());
    };
    let (id, at, active, status, answer, role) = job_of(&job).map_err(failed())?;
    let object = format!("pg_cron's job {id}");
    if !active {
        let remedy = format!("{schedule}, or as a superuser: select cron.alter_job({id}, active := true);");
        report.warning("pg-cron", object, "is inactive: nothing is deleted", remedy);
    } else if status.as_deref() == Some("failed") {
        let answer = answer.unwrap_or_default();
        let message = format!("has failed when it last ran: {}", answer.trim());
        let remedy = format!(
            "see the reason; `{PURGE_COMMAND}` shows it again (a job named {PURGE_JOB} is made by {schedule})"
        );
        report.warning("pg-cron", object, message, remedy);
    } else {
        report.ok("pg-cron", object, format!("purges at {at:?}"));
    }
    check_owner(client, config, &role, report).await
}

/// Only its owner may drop a partition.
async fn check_owner(client: &Client, config: &Config, role: &str, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let others = "
        select c.oid::regclass::text, pg_get_userbyid(c.relowner)::text from pg_class c
        where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relname in ('custom_drift', 'psi_drift', 'spc_drift')
          and not pg_has_role($2::text::name, c.relowner, 'usage') order by 1";
    for row in client.query(others, &[&config.schema, &role]).await.map_err(failed())? {
        let (table, owner): (String, String) =
            (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        let message = format!("pg_cron purges as {role}, which may not drop partitions of {owner}");
        let remedy =
            format!("as {owner}: `highwater setup --as-owner --schedule-purge`, and take the other job away");
        report.warning("purge-owner", table, message, remedy);
    }
    if let Some(message) = in_short(&strangers(client, &[role.to_owned()]).await?) {
        let message = format!("pg_cron purges as {role}, and {message}: so others could do what {role} may");
        let remedy = "have the purge run by the owner of the drift tables, who owns the schema: `highwater setup --as-owner --schedule-purge`";
        report.error("purge-owner", "highwater", message, remedy);
    }
    Ok(())
}

type Job = (i64, String, bool, Option<String>, Option<String>, String);

fn job_of(row: &Row) -> Result<Job, tokio_postgres::Error> {
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?, row.try_get(5)?))
}

/// What the purge says of itself.
async fn check_runs(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let query = format!(
        "select r.source_table, r.purged_at > now() - {LATE}, highwater.ago(r.purged_at), r.retention::text,
                b.partition_name, b.reason, highwater.ago(b.at),
                (select coalesce(sum(highwater.disk_size(t.relid)), 0)::bigint from pg_partition_tree(w.table_oid) t),
                s.late, s.week_late, s.week_new
         from highwater.retention r join highwater.watermark w using (source_table)
         left join lateral (
             select l.partition_name, l.reason, l.at from highwater.purge_log l
             where l.source_table = r.source_table and l.action = 'blocked' and l.at < now() - {LATE}
               and l.last_at >= r.purged_at - interval '1 hour'
               and not exists (select from highwater.purge_log n where n.source_table = l.source_table and n.at > l.last_at
                                 and n.partition_name = l.partition_name and n.action = 'dropped')
             order by l.at limit 1) b on true,
         lateral (
             select coalesce(sum(size) filter (where range_end <= highwater.cutoff(r.retention)), 0)::bigint as late,
                    coalesce(sum(size) filter (where range_end <= highwater.cutoff(r.retention) - {WEEK}), 0)::bigint as week_late,
                    coalesce(sum(size) filter (where range_end > now() - {WEEK}), 0)::bigint as week_new
             from (select u.range_end, highwater.disk_size(u.partition_oid) as size from highwater.purge_units(w.table_oid) u) u) s
         where w.slot_name = $1 order by 1"
    );
    let findings = purge::explain(client, None, false).await?;
    for row in client.query(&query, &[&config.slot]).await.map_err(failed())? {
        let run = Run::of(&row).map_err(failed())?;
        let own: Vec<&Finding> =
            findings.iter().filter(|finding| finding.source_table == run.table).collect();
        run.report_blocked(&own, report);
        run.report_share(&own, report);
        run.report_last(&own, report);
    }
    Ok(())
}

/// Something that this role may not look into.
fn unseen<'a>(own: &[&'a Finding]) -> Option<&'a Finding> {
    own.iter().find(|finding| finding.row_count.is_none() && finding.blocked_by.is_some()).copied()
}

/// What the purge says of a table.
struct Run {
    table: String,
    is_recent: bool,
    ago: Option<String>,
    retention: String,
    /// The partition (`None` for all of the table) that has been blocked for long, why, and since when.
    blocked: Option<(Option<String>, String, String)>,
    byte_count: i64,
    /// Bytes of its partitions that are past retention, that were a week ago, and that have begun since, or will.
    late: (i64, i64, i64),
}

impl Run {
    fn of(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let reason: Option<String> = row.try_get(5)?;
        let since = row.try_get::<_, Option<String>>(6)?.unwrap_or_default();
        let partition = row.try_get(4)?;
        Ok(Self {
            table: row.try_get(0)?,
            is_recent: row.try_get::<_, Option<bool>>(1)?.unwrap_or_default(),
            ago: row.try_get(2)?,
            retention: row.try_get(3)?,
            blocked: reason.map(|reason| (partition, reason, since)),
            byte_count: row.try_get(7)?,
            late: (row.try_get(8)?, row.try_get(9)?, row.try_get(10)?),
        })
    }

    fn report_blocked(&self, own: &[&Finding], report: &mut Report) {
        // The owner's purge sees it, and has told what it could not drop.
        if let Some(unseen) = unseen(own)
            && !self.is_recent
        {
            let what = unseen.partition.as_ref().unwrap_or(&self.table);
            let why = unseen.blocked_by.as_deref().unwrap_or_default();
            let remedy = "have the owner of the table run the purge, and this check";
            report.warning(
                "purge-rights",
                what,
                format!("what is past retention can't be seen: {why}"),
                remedy,
            );
        }
        if let Some((partition, reason, since)) = &self.blocked {
            let what = partition.as_deref().unwrap_or("all of it");
            let message = format!("{what} can't be purged since {since}: {reason}");
            let remedy = "`highwater purge --dry-run` tells all that is blocked";
            report.warning("purge-blocked", &self.table, message, remedy);
        }
    }

    /// The share that is past retention: if it is large, or grows. The partitions that there are tell how large it was a week
    /// ago, if nothing was dropped since; where something was, it was larger.
    fn report_share(&self, own: &[&Finding], report: &mut Report) {
        let full = own.iter().filter(|finding| finding.row_count.is_some_and(|rows| rows > 0));
        let bytes: i64 = full.filter_map(|finding| finding.byte_count).sum();
        let (late, week_late, week_new) = self.late;
        let share = |part: i64, all: i64| part.saturating_mul(100) / all.max(1);
        let growth =
            share(late, self.byte_count) - share(week_late, self.byte_count.saturating_sub(week_new));
        let is_large = share(bytes, self.byte_count) > SHARE_MAX;
        if bytes == 0 || (!is_large && growth <= GROWTH_MAX) {
            return;
        }
        let (part, all) = (human_bytes(bytes), human_bytes(self.byte_count));
        let grown =
            if growth > 0 { format!(", {growth} % more of it than a week ago") } else { String::new() };
        let message =
            format!("{part} of {all} are partitions past their retention of {}{grown}", self.retention);
        let remedy = "`highwater purge --dry-run` tells what is blocked, `highwater purge` deletes the rest";
        report.warning("purge-share", &self.table, message, remedy);
    }

    fn report_last(&self, own: &[&Finding], report: &mut Report) {
        let Self { table, retention, ago, .. } = self;
        let rows: i64 = own.iter().filter_map(|finding| finding.row_count).sum();
        if self.is_recent {
            report.ok("purge", table, format!("last ran {}", ago.as_deref().unwrap_or_default()));
        } else if rows == 0 {
            // What can't be seen was told.
            if unseen(own).is_none() {
                report.ok("purge", table, format!("nothing is past its retention of {retention}"));
            }
        } else {
            let last =
                ago.as_ref().map_or_else(|| "has never run".to_owned(), |ago| format!("last ran {ago}"));
            let message = format!("{last}, and about {rows} rows are past their retention of {retention}");
            let remedy = format!(
                "run `highwater setup --schedule-purge`, or: call highwater.purge({}, {});",
                literal(table),
                literal(retention)
            );
            report.warning("purge", table, message, remedy);
        }
    }
}
