//! The schema `highwater`, where the watermarks are: whether the role may write them, and whether it is the owner's, and as the
//! migrations made it.

use tokio_postgres::Client;

use super::server::Server;
use super::{Report, identifier};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::setup;
use crate::tables::DRIFT_TABLES;

const STATE_SCHEMA: &str = "
    select n.oid is not null,
           coalesce(has_schema_privilege(n.oid, 'usage'), false),
           to_regclass('highwater.watermark') is not null,
           array(select distinct c.relname::text
                 from unnest($3::text[], $4::text[]) as needed (name, privilege) join pg_class c on c.relname = needed.name
                 where c.relnamespace = n.oid and not has_table_privilege(c.oid, needed.privilege) order by 1),
           coalesce((select bool_and(pg_has_role(c.relowner, 'usage')) from pg_class c
                     where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relname = any ($2)), false)
      from (select 1) as one
      left join pg_namespace n on n.nspname = 'highwater'";

/// What of the schema belongs to others than these roles and superusers; and who else may put code into it.
const STRANGERS: &str = "
    allowed as (select oid from pg_roles where rolname = any ($1) or rolsuper)
    select format('%s%s belongs to %s', case kind when 'schema' then 'schema ' end, name, pg_get_userbyid(owner)) from object
    where owner not in (select oid from allowed)
    union all
    select format('%s may %s %s', case when grantee = 0 then 'everybody' else pg_get_userbyid(grantee)::text end,
                  case kind when 'schema' then 'create objects in schema' else 'make triggers on' end, name) from granted
    where grantee not in (select oid from allowed) and privileges && array['CREATE', 'TRIGGER']";

pub(super) async fn check(
    client: &Client,
    config: &Config,
    server: &Server,
    report: &mut Report,
) -> Result<()> {
    let context = "reading the rights on the schema highwater";
    let (tables, rights): (Vec<&str>, Vec<&str>) = setup::state_rights().unzip();
    let row = client
        .query_one(STATE_SCHEMA, &[&config.schema, &drift_tables(), &tables, &rights])
        .await
        .map_err(Error::sql(context))?;
    let flag = |column: usize| row.try_get::<_, bool>(column).map_err(Error::sql(context));
    let (exists, usage, has_tables, is_owner) = (flag(0)?, flag(1)?, flag(2)?, flag(4)?);
    let read_only: Vec<String> = row.try_get(3).map_err(Error::sql(context))?;
    let id = "state-schema";
    let role = identifier(&server.role);
    let as_owner =
        format!("as the owner of the drift tables: `highwater setup --as-owner --sidecar-role {role}`");
    let make = if is_owner { "run `highwater setup`".to_owned() } else { as_owner.clone() };
    if !exists {
        report.error(id, "highwater", "does not exist", make);
    } else if !usage {
        report.error(id, "highwater", "exists, but the role may not use it", as_owner);
    } else if !has_tables {
        report.error(id, "highwater", "has no watermark tables", make);
    } else if let [first, ..] = read_only.as_slice() {
        report.error(id, format!("highwater.{first}"), "can't be written by the role", as_owner);
    } else {
        report.ok(id, "highwater", "can be written");
    }
    if exists && usage && has_tables { check_owner(client, config, &role, report).await } else { Ok(()) }
}

fn drift_tables() -> Vec<&'static str> {
    DRIFT_TABLES.to_vec()
}

/// The purge runs what is in the schema with the rights of the drift tables' owner.
async fn check_owner(client: &Client, config: &Config, role: &str, report: &mut Report) -> Result<()> {
    let failed = || Error::sql("reading who owns schema highwater");
    let owners = "select array(select distinct pg_get_userbyid(c.relowner)::text from pg_class c
                               where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relname = any ($2) order by 1)";
    let row = client.query_one(owners, &[&config.schema, &drift_tables()]).await.map_err(failed())?;
    let owners: Vec<String> = row.try_get(0).map_err(failed())?;
    // That there are no drift tables is told by what looks for them.
    if owners.is_empty() {
        return Ok(());
    }
    check_names(client, config, report).await?;
    let strangers = strangers(client, &owners).await?;
    let owner = owners.join(" or ");
    if let Some(message) = in_short(&strangers) {
        let message = format!(
            "{message}; so others could do what {owner} may, who owns the drift tables and purges them"
        );
        let remedy = format!(
            "as {owner} or a superuser: `highwater setup --as-owner --sidecar-role {role}`; revoke what else is granted"
        );
        report.error("schema-owner", "highwater", message, remedy);
    } else {
        report.ok("schema-owner", "highwater", format!("belongs to {owner}"));
    }
    let version = "select coalesce(max(version), 0)::bigint from highwater.migration";
    let version: i64 =
        client.query_one(version, &[]).await.and_then(|row| row.try_get(0)).map_err(failed())?;
    let newest = setup::newest_version();
    if version < newest {
        let message = format!("is of version {version}, and this release needs {newest}");
        let remedy = format!("as {owner}: `highwater setup --as-owner --sidecar-role {role}`");
        report.error("schema-version", "highwater", message, remedy);
    }
    let differences = setup::differences(client, version).await?;
    if let Some(message) = in_short(&differences) {
        let remedy = "see who did that, and don't purge before it is put right; move into another schema what is yours";
        report.error(
            "schema-objects",
            "highwater",
            format!("is not as its migrations made it: {message}"),
            remedy,
        );
    } else {
        report.ok("schema-objects", "highwater", format!("is as its migrations made it (version {version})"));
    }
    Ok(())
}

/// A table is archived by its oid, whatever it is called.
async fn check_names(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let failed = || Error::sql("comparing names with the watermarks");
    let query = "select w.source_table, coalesce(w.table_oid::regclass::text, w.table_oid::text)
                 from highwater.watermark w join pg_class c on c.oid <> w.table_oid and c.relkind in ('r', 'p')
                 join pg_namespace n on n.oid = c.relnamespace
                 where w.slot_name = $1 and n.nspname || '.' || c.relname = w.source_table order by 1";
    for row in client.query(query, &[&config.slot]).await.map_err(failed())? {
        let (table, other): (String, String) =
            (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        let message = format!(
            "is another table than the archived one, which is {other} now: its rows are not archived"
        );
        report.error("table-name", table, message, "run `highwater setup`, which has this one archived");
    }
    Ok(())
}

/// What of the schema belongs to others than these roles and superusers, and who else may put code into it: a sentence each.
pub(super) async fn strangers(client: &Client, owners: &[String]) -> Result<Vec<String>> {
    let failed = || Error::sql("reading who owns schema highwater");
    let query = format!("with {}, {STRANGERS}", setup::HOLDINGS);
    let rows = client.query(&query, &[&owners]).await.map_err(failed())?;
    rows.iter().map(|row| row.try_get(0).map_err(failed())).collect()
}

/// The first few of many.
pub(super) fn in_short(all: &[String]) -> Option<String> {
    const SHOWN: usize = 3;
    let shown = all.get(..SHOWN).unwrap_or(all).join(", ");
    match all.len() {
        0 => None,
        1..=SHOWN => Some(shown),
        more => Some(format!("{shown}, and {} more", more - SHOWN)),
    }
}
