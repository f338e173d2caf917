//! pg_partman, which may drop partitions that are not archived.

use tokio_postgres::{Client, Row};

use super::server::Server;
use super::tables::Table;
use super::{Report, identifier, literal, qualified};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::tables::{ENTITY_TABLE, SCOUTER_TABLES};

// Extensions live in whatever schema they were created in.
const PART_CONFIG: &str = "
    select n.nspname::text, has_schema_privilege(n.oid, 'usage') and bool_and(has_table_privilege(c.oid, 'select'))
      from pg_extension e
      join pg_namespace n on n.oid = e.extnamespace
      join pg_class c on c.relnamespace = n.oid and c.relname in ('part_config', 'part_config_sub')
     where e.extname = 'pg_partman'
     group by n.oid, n.nspname";

const CONTEXT: &str = "reading pg_partman's configuration";

pub(super) async fn check(
    client: &Client,
    config: &Config,
    server: &Server,
    tables: &[Table],
    report: &mut Report,
) -> Result<()> {
    let Some(row) = client.query_opt(PART_CONFIG, &[]).await.map_err(Error::sql(CONTEXT))? else {
        report.ok("partman", "pg_partman", "is not installed here");
        return Ok(());
    };
    let schema: String = row.try_get(0).map_err(Error::sql(CONTEXT))?;
    let part_config = qualified(&schema, "part_config");
    let role = identifier(&server.role);
    if !row.try_get::<_, bool>(1).map_err(Error::sql(CONTEXT))? {
        let message = "can't be read, so it may drop partitions that are not archived";
        let remedy = format!(
            "grant usage on schema {} to {role}; grant select on {part_config}, {} to {role};",
            identifier(&schema),
            qualified(&schema, "part_config_sub")
        );
        report.warning("partman", part_config, message, remedy);
        return Ok(());
    }
    // Without sections those of Scouter's tables that exist are archived, too.
    let by_default = SCOUTER_TABLES.iter().filter(|_| config.tables.is_empty());
    let by_default = by_default.map(|table| format!("{}.{}", config.schema, table.name));
    let names: Vec<_> = tables
        .iter()
        .filter(|table| table.name != ENTITY_TABLE)
        .map(|table| format!("{}.{}", config.schema, table.name))
        .chain(config.tables.iter().map(|table| table.qualified(&config.schema)))
        .chain(by_default)
        .collect();
    // pg_partman keeps the parent's name unquoted. Casts, because its column types change. Sub-partitioned sets have a
    // retention each.
    let query = format!(
        "with recursive tree as (
             select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname || '.' || c.relname = any ($1::text[])
             union all select i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid)
         select parent_table::text, retention::text, retention_keep_table::text
           from {part_config} where retention is not null and parent_table::text in (
                select n.nspname || '.' || c.relname from tree join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace)
          order by parent_table"
    );
    let rows = client.query(&query, &[&names]).await.map_err(Error::sql(CONTEXT))?;
    if rows.is_empty() {
        report.ok("partman", "pg_partman", "drops no partition of an archived table");
    }
    for row in rows {
        report_retention(&row, &part_config, report)?;
    }
    report_gone(client, &part_config, report).await?;
    report_failed_run(client, report).await
}

/// A set whose table is gone makes each run of its maintenance fail.
async fn report_gone(client: &Client, part_config: &str, report: &mut Report) -> Result<()> {
    let query = format!(
        "select parent_table::text from {part_config} p where not exists (
             select from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname || '.' || c.relname = p.parent_table::text) order by 1"
    );
    for row in client.query(&query, &[]).await.map_err(Error::sql(CONTEXT))? {
        let parent: String = row.try_get(0).map_err(Error::sql(CONTEXT))?;
        let remedy = format!("delete from {part_config} where parent_table = {};", literal(&parent));
        let message =
            "is in pg_partman's configuration, and there is no such table: its maintenance fails on it";
        report.warning("partman-table", parent, message, remedy);
    }
    Ok(())
}

/// Whether pg_cron's last run of the maintenance has failed, as far as this role can see: then nobody makes partitions.
async fn report_failed_run(client: &Client, report: &mut Report) -> Result<()> {
    let readable = "select coalesce(has_schema_privilege(to_regnamespace('cron'), 'usage')
                                    and has_table_privilege(to_regclass('cron.job_run_details'), 'select'), false)";
    let row = client.query_one(readable, &[]).await;
    if !row.and_then(|row| row.try_get(0)).map_err(Error::sql(CONTEXT))? {
        return Ok(());
    }
    let last = "select j.jobid, d.status, d.return_message from cron.job j, lateral (
                    select r.status, r.return_message from cron.job_run_details r
                    where r.jobid = j.jobid and r.status in ('failed', 'succeeded') order by r.runid desc limit 1) d
                where j.command ilike '%run_maintenance%' and j.database = current_database() and d.status = 'failed'";
    for row in client.query(last, &[]).await.map_err(Error::sql(CONTEXT))? {
        let id: i64 = row.try_get(0).map_err(Error::sql(CONTEXT))?;
        let answer: Option<String> = row.try_get(2).map_err(Error::sql(CONTEXT))?;
        let message = format!(
            "pg_partman's maintenance has failed when it last ran, so partitions may not be made: {}",
            answer.unwrap_or_default().trim()
        );
        report.warning("partman-run", format!("pg_cron's job {id}"), message, "see the reason, and mend it");
    }
    Ok(())
}

fn report_retention(row: &Row, part_config: &str, report: &mut Report) -> Result<()> {
    let parent: String = row.try_get(0).map_err(Error::sql(CONTEXT))?;
    let retention: String = row.try_get(1).map_err(Error::sql(CONTEXT))?;
    let keeps_table: Option<String> = row.try_get(2).map_err(Error::sql(CONTEXT))?;
    let does = match keeps_table.as_deref() {
        Some("true") => "detaches (retention_keep_table is on)",
        _ => "DROPS (retention_keep_table is off)",
    };
    let message =
        format!("pg_partman {does} partitions of {parent} after {retention} by itself, archived or not");
    let remedy = format!(
        "run `highwater setup`, or: update {part_config} set retention = null where parent_table = {};",
        literal(&parent)
    );
    report.error("partman-retention", parent, message, remedy);
    Ok(())
}
