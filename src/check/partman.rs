//! pg_partman, which may drop partitions that are not archived.

use tokio_postgres::{Client, Row};

use super::server::Server;
use super::tables::{ENTITY_TABLE, Table};
use super::{Report, identifier, literal, qualified};
use crate::config::Config;
use crate::error::{Error, Result};

// Extensions live in whatever schema they were created in.
const PART_CONFIG: &str = "
    select n.nspname::text, has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
      from pg_extension e
      join pg_namespace n on n.oid = e.extnamespace
      join pg_class c on c.relnamespace = n.oid and c.relname = 'part_config'
     where e.extname = 'pg_partman'";

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
            "grant usage on schema {} to {role}; grant select on {part_config} to {role};",
            identifier(&schema)
        );
        report.warning("partman", part_config, message, remedy);
        return Ok(());
    }
    let names: Vec<_> = tables
        .iter()
        .filter(|table| table.name != ENTITY_TABLE)
        .map(|table| format!("{}.{}", config.schema, table.name))
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
