//! Whether anybody deletes what is archived: pg_cron's job, and what the purge has logged.

use tokio_postgres::{Client, Row};

use super::{Report, human_bytes, identifier, literal};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::purge;
use crate::setup::{PURGE_COMMAND, PURGE_JOB};

const CONTEXT: &str = "looking at the purge";

/// A purge that has not run for so long is not scheduled, or fails; a partition that has been blocked for so long needs somebody.
const LATE: &str = "interval '1 day'";

/// Share of a table, in per cent, that is past retention and still there.
const SHARE_MAX: i64 = 20;

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
    check_cron(client, config, report).await?;
    let flag = async |query: &str| {
        let row = client.query_one(query, &[]).await;
        row.and_then(|row| row.try_get::<_, bool>(0)).map_err(Error::sql(CONTEXT))
    };
    // What is not set up yet, or can't be used, is a finding of its own.
    if !flag("select coalesce(has_schema_privilege(to_regnamespace('highwater'), 'usage'), false)").await?
        || flag("select to_regclass('highwater.watermark') is null").await?
    {
        return Ok(());
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
    check_runs(client, config, report).await
}

async fn check_cron(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql(CONTEXT);
    let schedule = "run `highwater setup --schedule-purge`";
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
        let remedy = "grant usage on schema cron to the role; then `highwater setup --schedule-purge`";
        report.warning("pg-cron", "pg_cron", "may not be used by the role", remedy);
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
        let remedy = format!("grant {} to {};", identifier(&owner), identifier(role));
        report.warning("purge-owner", table, message, remedy);
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
                (select coalesce(sum(pg_total_relation_size(t.relid)), 0)::bigint from pg_partition_tree(w.table_oid) t)
         from highwater.retention r join highwater.watermark w using (source_table)
         left join lateral (
             select l.partition_name, l.reason, l.at from highwater.purge_log l
             where l.source_table = r.source_table and l.action = 'blocked' and l.at < now() - {LATE}
               and l.last_at >= r.purged_at - interval '1 hour'
               and not exists (select from highwater.purge_log n where n.source_table = l.source_table and n.at > l.last_at
                                 and n.partition_name = l.partition_name and n.action = 'dropped')
             order by l.at limit 1) b on true
         where w.slot_name = $1 order by 1"
    );
    let findings = purge::explain(client, None, false).await?;
    for row in client.query(&query, &[&config.slot]).await.map_err(failed())? {
        let table: String = row.try_get(0).map_err(failed())?;
        let is_recent: Option<bool> = row.try_get(1).map_err(failed())?;
        let ago: Option<String> = row.try_get(2).map_err(failed())?;
        let retention: String = row.try_get(3).map_err(failed())?;
        let blocked: Option<String> = row.try_get(5).map_err(failed())?;
        let size: i64 = row.try_get(7).map_err(failed())?;
        let own = || findings.iter().filter(|finding| finding.source_table == table);
        let rows: i64 = own().filter_map(|finding| finding.row_count).sum();
        if let Some(unseen) =
            own().find(|finding| finding.row_count.is_none() && finding.blocked_by.is_some())
        {
            let what = unseen.partition.as_ref().unwrap_or(&table);
            let message = unseen.blocked_by.clone().unwrap_or_default();
            let remedy = "have the owner of the table run the purge, and this check";
            report.warning(
                "purge-rights",
                what,
                format!("what is past retention can't be seen: {message}"),
                remedy,
            );
        }
        let bytes: i64 = own().filter_map(|finding| finding.byte_count).sum();
        if let Some(reason) = blocked {
            let partition: Option<String> = row.try_get(4).map_err(failed())?;
            let since: Option<String> = row.try_get(6).map_err(failed())?;
            let what = partition.unwrap_or_else(|| "all of it".to_owned());
            let message = format!("{what} can't be purged since {}: {reason}", since.unwrap_or_default());
            report.warning(
                "purge-blocked",
                &table,
                message,
                "`highwater purge --dry-run` tells all that is blocked",
            );
        }
        if bytes * 100 > size * SHARE_MAX {
            let message = format!(
                "{} of {} are partitions past their retention of {retention}",
                human_bytes(bytes),
                human_bytes(size)
            );
            report.warning(
                "purge-share",
                &table,
                message,
                "`highwater purge --dry-run` tells what is blocked, `highwater purge` deletes the rest",
            );
        }
        match (is_recent, rows) {
            (Some(true), _) => {
                report.ok("purge", &table, format!("last ran {}", ago.unwrap_or_default()));
            }
            (_, 0) => report.ok("purge", &table, format!("nothing is past its retention of {retention}")),
            (_, rows) => {
                let last = ago.map_or_else(|| "has never run".to_owned(), |ago| format!("last ran {ago}"));
                let message =
                    format!("{last}, and about {rows} rows are past their retention of {retention}");
                let remedy = format!(
                    "run `highwater setup --schedule-purge`, or: call highwater.purge({}, {});",
                    literal(&table),
                    literal(&retention)
                );
                report.warning("purge", &table, message, remedy);
            }
        }
    }
    Ok(())
}
