//! Who deletes: the retention of each table, pg_partman's own switched off, and the purge in pg_cron's hands.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::{Report, SourceTable, drift_oids};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::{quote_identifier, quote_literal, sql};

/// Name of the job in `cron.job`.
pub(crate) const PURGE_JOB: &str = "highwater-purge";

/// What the job does.
pub(crate) const PURGE_COMMAND: &str = "call highwater.purge_all()";

/// Writes a retention for each table that has none.
pub(super) async fn keep(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql("writing highwater.retention");
    let tables = "select source_table from highwater.watermark where slot_name = $1 order by 1";
    for row in client.query(tables, &[&config.slot]).await.map_err(failed())? {
        let table: String = row.try_get(0).map_err(failed())?;
        let days = i32::try_from(config.retention_days_of(&table)).unwrap_or(i32::MAX);
        let make = "insert into highwater.retention (source_table, retention) values ($1, make_interval(days => $2)) on conflict do nothing";
        if client.execute(make, &[&table, &days]).await.map_err(failed())? > 0 {
            report.done.push(format!("set the retention of {table} to {days} days (highwater.retention)"));
            continue;
        }
        let other = "select retention::text from highwater.retention where source_table = $1 and retention <> make_interval(days => $2)";
        if let Some(row) = client.query_opt(other, &[&table, &days]).await.map_err(failed())? {
            let kept: String = row.try_get(0).map_err(failed())?;
            report.left.push(format!(
                "retention of {table}: {kept}, where the setting says {days} days; to change it: update highwater.retention set \
                 retention = '{days} days' where source_table = {};",
                quote_literal(&table)
            ));
        }
    }
    Ok(())
}

/// pg_partman drops partitions by itself, archived or not, where its `retention` is set.
pub(super) async fn stop_partman(client: &Client, tables: &[SourceTable], report: &mut Report) -> Result<()> {
    let failed = || Error::sql("reading pg_partman's configuration");
    let schema = "select n.nspname::text from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_partman'";
    let Some(row) = client.query_opt(schema, &[]).await.map_err(failed())? else { return Ok(()) };
    let schema: String = row.try_get(0).map_err(failed())?;
    let part_config = format!("{}.part_config", quote_identifier(&schema));
    // pg_partman keeps the parent's name unquoted. Sets of sub-partitions have retentions of their own, and templates of them.
    let part_config_sub = format!("{}.part_config_sub", quote_identifier(&schema));
    let found = format!(
        "with recursive tree as (
             select unnest($1::oid[]) as oid
             union all select i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid),
         named as (select n.nspname || '.' || c.relname as name from tree join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace)
         select p.parent_table::text, p.retention::text, '{part_config}', 'retention', 'parent_table' from {part_config} p
         where p.retention is not null and p.parent_table::text in (select name from named)
         union all
         select s.sub_parent::text, s.sub_retention::text, '{part_config_sub}', 'sub_retention', 'sub_parent' from {part_config_sub} s
         where s.sub_retention is not null and s.sub_parent::text in (select name from named)
         order by 1"
    );
    let rows = match client.query(&found, &[&drift_oids(tables)]).await {
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            report.todo.push(format!(
                "pg_partman may drop partitions that are not archived, and this role may not look; as its owner: update \
                 {part_config} set retention = null where parent_table in (select source_table from highwater.watermark); (and \
                 sub_retention in {part_config_sub}, if there are sub-partitions)"
            ));
            return Ok(());
        }
        rows => rows.map_err(failed())?,
    };
    for row in rows {
        let table: String = row.try_get(0).map_err(failed())?;
        let kept: String = row.try_get(1).map_err(failed())?;
        let text = |column: usize| row.try_get::<_, String>(column).map_err(failed());
        let (place, column, key) = (text(2)?, text(3)?, text(4)?);
        let statement = format!("update {place} set {column} = null where {key} = {}", quote_literal(&table));
        match client.batch_execute(&statement).await {
            Ok(()) => report.done.push(format!(
                "turned off pg_partman's retention ({kept}) of {table}, which drops partitions that are not archived; it goes on \
                 making partitions, and the purge drops them, after what highwater.retention says"
            )),
            Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => report.todo.push(format!(
                "pg_partman drops partitions of {table} after {kept}, archived or not, and this role may not change that; as \
                 its owner: {statement};"
            )),
            Err(error) => return Err(Error::sql(format!("turning off pg_partman's retention of {table}"))(error)),
        }
    }
    Ok(())
}

/// Has pg_cron call the purge, at the times of `schedule`. What is scheduled like that already stays.
///
/// # Errors
///
/// pg_cron refused the schedule. Where it is missing, or may not be used, the report's `todo` says what to do.
pub async fn schedule_purge(config: &Config, schedule: &str) -> Result<Report> {
    let mut report = Report::default();
    let client = sql::connect(&config.source).await?;
    sql::see_own_rows(&client).await?;
    let failed = || Error::sql(format!("scheduling the purge with pg_cron as {schedule:?}"));
    let here = "select current_database()::text, current_user::text, exists (select from pg_extension where extname = 'pg_cron'),
                       coalesce(has_schema_privilege(to_regnamespace('cron'), 'usage'), false)";
    let row = client.query_one(here, &[]).await.map_err(failed())?;
    let (database, role): (String, String) =
        (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
    if !row.try_get::<_, bool>(2).map_err(failed())? {
        report.todo.push(format!(
            "pg_cron is not in this database. It lives in the one that its setting cron.database_name names (postgres, if it \
             names none); run this there, as a superuser: select cron.schedule_in_database({}, {}, {}, {}, {}); or call \
             `highwater purge` from another scheduler",
            quote_literal(&format!("{PURGE_JOB}-{database}")),
            quote_literal(schedule),
            quote_literal(PURGE_COMMAND),
            quote_literal(&database),
            quote_literal(&role),
        ));
        return Ok(report);
    }
    if !row.try_get::<_, bool>(3).map_err(failed())? {
        report.todo.push(format!(
            "pg_cron is here, but role {role} may not use it; as a superuser: grant usage on schema cron to {};",
            quote_identifier(&role)
        ));
        return Ok(report);
    }
    let found = "select jobid, schedule = $2 and command = $3 and active and database = current_database() from cron.job
                 where jobname = $1 and username = current_user";
    let found = client.query_opt(found, &[&PURGE_JOB, &schedule, &PURGE_COMMAND]).await.map_err(failed())?;
    let job = match found {
        None => None,
        Some(row) => {
            Some((row.try_get::<_, i64>(0).map_err(failed())?, row.try_get::<_, bool>(1).map_err(failed())?))
        }
    };
    if let Some((_, true)) = job {
        report.left.push(format!("pg_cron's job {PURGE_JOB} at {schedule:?}"));
        check_role(&client, config, &role, &mut report).await?;
        return Ok(report);
    }
    // Scheduling again would leave an inactive job inactive, and only a superuser may alter it.
    let unschedule = job.map(|(id, _)| format!("select cron.unschedule({id}); ")).unwrap_or_default();
    // Literals, because the types of its parameters differ between pg_cron's versions. Both in one transaction.
    let statement = format!(
        "{unschedule}select cron.schedule({}, {}, {})",
        quote_literal(PURGE_JOB),
        quote_literal(schedule),
        quote_literal(PURGE_COMMAND)
    );
    client.batch_execute(&statement).await.map_err(failed())?;
    report.done.push(format!("scheduled the purge with pg_cron: job {PURGE_JOB} at {schedule:?}"));
    check_role(&client, config, &role, &mut report).await?;
    Ok(report)
}

/// The job runs as the role that schedules it: only an owner may drop, and it must have the time.
async fn check_role(client: &Client, config: &Config, role: &str, report: &mut Report) -> Result<()> {
    let failed = || Error::sql("reading who owns the drift tables");
    let others = "
        select distinct pg_get_userbyid(c.relowner)::text from highwater.watermark w join pg_class c on c.oid = w.table_oid
        where w.slot_name = $1 and not pg_has_role(c.relowner, 'usage') order by 1";
    for row in client.query(others, &[&config.slot]).await.map_err(failed())? {
        let owner: String = row.try_get(0).map_err(failed())?;
        report.todo.push(format!(
            "the job runs as {role}, which may not drop partitions of {owner}: have it made by that one, with `highwater setup \
             --as-owner --schedule-purge` as {owner}, and take this one away: select cron.unschedule({});",
            quote_literal(PURGE_JOB)
        ));
    }
    let timeout = "select setting <> '0' from pg_settings where name = 'statement_timeout'";
    let is_limited = client.query_one(timeout, &[]).await.and_then(|row| row.try_get::<_, bool>(0));
    if is_limited.map_err(failed())? {
        report.todo.push(format!(
            "the job runs as {role}, whose statement_timeout would cancel a purge that has much to read: alter role {} set \
             statement_timeout = 0;",
            quote_identifier(role)
        ));
    }
    Ok(())
}
