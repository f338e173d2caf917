//! The schema `highwater`, where the watermarks are.

use tokio_postgres::Client;

use super::server::Server;
use super::{Report, identifier};
use crate::error::{Error, Result};

const STATE_SCHEMA: &str = "
    select n.oid is not null,
           coalesce(has_schema_privilege(n.oid, 'usage'), false),
           coalesce(has_schema_privilege(n.oid, 'create'), false),
           has_database_privilege(current_database(), 'create'),
           coalesce((select count(*) from pg_class c
                      where c.relnamespace = n.oid and c.relname in ('watermark', 'entity_watermark')), 0),
           array(select c.relname::text from pg_class c
                  where c.relnamespace = n.oid and c.relname in ('watermark', 'entity_watermark')
                    and not (has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert')
                             and has_table_privilege(c.oid, 'update')))
      from (select 1) as one
      left join pg_namespace n on n.nspname = 'highwater'";

pub(super) async fn check(client: &Client, server: &Server, report: &mut Report) -> Result<()> {
    let context = "reading the rights on the schema highwater";
    let row = client.query_one(STATE_SCHEMA, &[]).await.map_err(Error::sql(context))?;
    let flag = |column: usize| row.try_get::<_, bool>(column).map_err(Error::sql(context));
    let (exists, usage, create, create_in_database) = (flag(0)?, flag(1)?, flag(2)?, flag(3)?);
    let table_count: i64 = row.try_get(4).map_err(Error::sql(context))?;
    let read_only: Vec<String> = row.try_get(5).map_err(Error::sql(context))?;
    let role = identifier(&server.role);
    let id = "state-schema";
    if !exists && create_in_database {
        report.error(id, "highwater", "does not exist", "run `highwater setup`");
    } else if !exists {
        let remedy = format!(
            "create schema highwater authorization {role}; -- or: grant create on database {} to {role}; then run \
             `highwater setup`",
            identifier(&server.database)
        );
        report.error(id, "highwater", "is not there, and the role may not make it", remedy);
    } else if !usage {
        let remedy = format!("grant usage on schema highwater to {role};");
        report.error(id, "highwater", "exists, but the role may not use it", remedy);
    } else if table_count < 2 && !create {
        let remedy = format!("grant create on schema highwater to {role}; -- then run `highwater setup`");
        report.error(id, "highwater", "has no watermark tables, and the role may not make them", remedy);
    } else if table_count < 2 {
        report.error(id, "highwater", "has no watermark tables", "run `highwater setup`");
    } else if let [first, ..] = read_only.as_slice() {
        let remedy =
            format!("grant select, insert, update, delete on all tables in schema highwater to {role};");
        report.error(id, format!("highwater.{first}"), "can't be written by the role", remedy);
    } else {
        report.ok(id, "highwater", "can be written");
    }
    Ok(())
}
