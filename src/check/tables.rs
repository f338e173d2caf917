//! The drift tables: which exist, their shape, their columns' types, and the rights on them.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::server::Server;
use super::{Report, identifier, qualified};
use crate::config::{Changes, Config};
use crate::error::{Error, Result};
use crate::source::describe;
use crate::source::lookup::BINARY_FORM;
use crate::source::unarchived;
use crate::tables::{ColumnSpec, DRIFT_TABLES, ENTITY_TABLE, Kind};

const ENTITY_COLUMNS: [&str; 3] = ["space", "name", "version"];

/// A table that Highwater reads, as far as its catalogs tell.
#[derive(Debug)]
pub(super) struct Table {
    oid: u32,
    pub(super) name: String,
    relation_kind: String,
    persistence: String,
    may_select: bool,
    is_filtered: bool,
    pub(super) is_owner: bool,
    pub(super) columns: Vec<Column>,
    has_known_shape: bool,
    /// The columns that must be in the publication.
    pub(super) needed: Vec<&'static str>,
}

#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    /// The built-in type that has the same binary form, if there is one.
    type_oid: u32,
    type_name: String,
    pub(super) is_generated: bool,
}

/// What a column is used as.
#[derive(Clone, Copy)]
enum Use {
    Time,
    Text,
    Double,
    Integer,
}

impl Use {
    /// The types whose values the decoder takes.
    const fn types(self) -> &'static [Type] {
        match self {
            Self::Time => &[Type::TIMESTAMPTZ, Type::TIMESTAMP],
            Self::Text => &[Type::TEXT, Type::VARCHAR, Type::BPCHAR, Type::NAME],
            Self::Double => &[Type::FLOAT8, Type::FLOAT4],
            Self::Integer => &[Type::INT2, Type::INT4, Type::INT8],
        }
    }

    const fn sql(self) -> &'static str {
        match self {
            Self::Time => "timestamptz",
            Self::Text => "text",
            Self::Double => "double precision",
            Self::Integer => "integer",
        }
    }

    fn of_column(name: &str) -> Self {
        match name {
            "created_at" => Self::Time,
            "value" => Self::Double,
            "bin_id" | "bin_count" | "entity_id" | "id" => Self::Integer,
            _ => Self::Text,
        }
    }
}

const TABLES: &str = "
    select c.oid, c.relname::text, c.relkind::text, c.relpersistence::text,
           has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select'),
           c.relrowsecurity and row_security_active(c.oid),
           pg_has_role(c.relowner, 'usage')
      from pg_class c
      join pg_namespace n on n.oid = c.relnamespace
     where n.nspname = $1::text and c.relname = any ($2::text[]) and c.relkind not in ('i', 'I', 'c', 't')
     order by c.relname";

const CONTEXT: &str = "reading the drift tables";

/// Reports on the drift tables and gives those (and the entity table) that the publication must hold.
pub(super) async fn check(
    client: &Client,
    config: &Config,
    server: &Server,
    report: &mut Report,
) -> Result<Vec<Table>> {
    let mut names: Vec<_> = DRIFT_TABLES.to_vec();
    names.push(ENTITY_TABLE);
    let mut tables = read(client, &config.schema, &names).await.map_err(Error::sql(CONTEXT))?;
    let entities = tables.iter().position(|table| table.name == ENTITY_TABLE).map(|at| tables.remove(at));
    if tables.is_empty() && config.tables.is_empty() {
        report_none(client, config, report).await?;
    }
    report_described(client, config, server, report).await?;
    let mut needs_entities = false;
    for table in &mut tables {
        needs_entities |= report_shape(table, &config.schema, entities.is_some(), report);
    }
    if let Some(mut entities) = entities.filter(|_| needs_entities) {
        entities.needed = ["id"].into_iter().chain(ENTITY_COLUMNS).collect();
        tables.push(entities);
    }
    for table in &tables {
        report_table(table, config, server, report);
        let own = format!("{}.{}", config.schema, table.name);
        // What is wrong with the table itself was said.
        let is_drift = table.name != ENTITY_TABLE;
        let parts = if is_drift { unarchived::parts(client, table.oid).await? } else { Vec::new() };
        for part in parts.into_iter().filter(|part| part.part != own) {
            report.error("part", part.part, format!("{}: they are not archived", part.reason), part.remedy);
        }
    }
    Ok(tables)
}

async fn read(client: &Client, schema: &str, names: &[&str]) -> Result<Vec<Table>, tokio_postgres::Error> {
    let rows = client.query(TABLES, &[&schema, &names]).await?;
    let columns_query = format!(
        "select a.attname::text, coalesce({BINARY_FORM}, a.atttypid), format_type(a.atttypid, a.atttypmod), a.attgenerated <> ''
         from pg_attribute a join pg_type t on t.oid = a.atttypid
         where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped"
    );
    let mut tables = Vec::with_capacity(rows.len());
    for row in rows {
        let oid: u32 = row.try_get(0)?;
        let mut columns = Vec::new();
        for row in client.query(&columns_query, &[&oid]).await? {
            columns.push(Column {
                name: row.try_get(0)?,
                type_oid: row.try_get(1)?,
                type_name: row.try_get(2)?,
                is_generated: row.try_get(3)?,
            });
        }
        tables.push(Table {
            oid,
            name: row.try_get(1)?,
            relation_kind: row.try_get(2)?,
            persistence: row.try_get(3)?,
            may_select: row.try_get(4)?,
            is_filtered: row.try_get(5)?,
            is_owner: row.try_get(6)?,
            columns,
            has_known_shape: true,
            needed: Vec::new(),
        });
    }
    Ok(tables)
}

/// Reports on the tables of the settings: whether each can be archived as it is described, and what it still needs for that.
async fn report_described(
    client: &Client,
    config: &Config,
    server: &Server,
    report: &mut Report,
) -> Result<()> {
    for settings in &config.tables {
        let name = settings.qualified(&config.schema);
        let one = Config { tables: vec![settings.clone()], ..config.clone() };
        match describe::with_tables(&one, client, None).await {
            Ok(_) => {}
            Err(Error::Setting { setting, value, accepted }) => {
                let message = format!("can't be archived as it is described: {setting} is {value:?}");
                report.error("table", name, message, format!("it must be {accepted}"));
                continue;
            }
            Err(error) => return Err(error),
        }
        let query = "
            select c.oid, c.relpersistence::text, has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select'),
                   exists (select from pg_publication_tables t where t.pubname = $2 and t.schemaname = n.nspname and t.tablename = c.relname)
            from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname || '.' || c.relname = $1";
        let publication = match settings.changes {
            Changes::Inserts => config.publication.clone(),
            Changes::Versions => config.versions_publication(),
        };
        let Some(row) = client.query_opt(query, &[&name, &publication]).await.map_err(Error::sql(CONTEXT))?
        else {
            continue;
        };
        let (schema, table) = name.split_once('.').unwrap_or_default();
        let (object, role) = (qualified(schema, table), identifier(&server.role));
        let holds = |column: usize| row.try_get::<_, bool>(column).map_err(Error::sql(CONTEXT));
        if row.try_get::<_, String>(1).map_err(Error::sql(CONTEXT))? != "p" {
            let remedy = format!("alter table {object} set logged;");
            report.error("table-kind", &object, "is unlogged: its rows are not in the log", remedy);
        } else if !holds(2)? {
            let schema = identifier(schema);
            let remedy =
                format!("grant usage on schema {schema} to {role}; grant select on {object} to {role};");
            report.error("select", &object, format!("can't be read by {}", server.role), remedy);
        } else if !holds(3)? {
            report.error(
                "publication-table",
                &object,
                format!("is not in publication {publication}: its rows are missed"),
                "run `highwater setup`",
            );
        } else {
            report.ok("table", &object, "can be archived");
        }
        let parts = unarchived::parts(client, row.try_get(0).map_err(Error::sql(CONTEXT))?).await?;
        for part in parts.into_iter().filter(|part| part.part != name) {
            report.error("part", part.part, format!("{}: they are not archived", part.reason), part.remedy);
        }
    }
    Ok(())
}

async fn report_none(client: &Client, config: &Config, report: &mut Report) -> Result<()> {
    let query = "
        select array(select distinct n.nspname::text
                       from pg_class c join pg_namespace n on n.oid = c.relnamespace
                      where c.relname = any ($1::text[]) and c.relkind in ('r', 'p'))";
    let names: Vec<_> = DRIFT_TABLES.to_vec();
    let row = client.query_one(query, &[&names]).await.map_err(Error::sql(CONTEXT))?;
    let elsewhere: Vec<String> = row.try_get(0).map_err(Error::sql(CONTEXT))?;
    let remedy = match elsewhere.as_slice() {
        [] => "create the drift tables, or set DATABASE_URI to the database that has them".to_owned(),
        schemas => format!("set HIGHWATER_SCHEMA to the schema that has them: {}", schemas.join(" or ")),
    };
    let message = format!("has none of {}", names.join(", "));
    report.error("tables", &config.schema, message, remedy);
    Ok(())
}

/// Finds out which columns the table must have; gives whether it refers to the entity table.
fn report_shape(table: &mut Table, schema: &str, has_entities: bool, report: &mut Report) -> bool {
    let has = |name: &str| table.columns.iter().any(|column| column.name == name);
    let is_flat = ENTITY_COLUMNS.into_iter().all(has);
    let refers = !is_flat && has("entity_id");
    let object = qualified(schema, &table.name);
    let full = format!("{schema}.{}", table.name);
    let kind = Kind::drift().into_iter().find(|kind| kind.source_table(schema).as_ref() == Some(&full));
    let own: &'static [ColumnSpec] = kind.map_or(&[], Kind::columns);
    let own = own.iter().map(|column| column.name.as_str()).filter(|name| !ENTITY_COLUMNS.contains(name));
    if is_flat {
        table.needed = own.chain(ENTITY_COLUMNS).collect();
    } else {
        table.needed = own.chain(refers.then_some("entity_id")).collect();
    }
    table.has_known_shape = is_flat || (refers && has_entities);
    if refers && !has_entities {
        let message = format!("has entity_id, but there is no table {}", qualified(schema, ENTITY_TABLE));
        report.error("shape", object, message, "create the entity table as Scouter's migrations do");
    } else if !is_flat && !refers {
        let message = "has neither the columns space, name and version nor entity_id";
        report.error("shape", object, message, "bring the table to a shape that Scouter's migrations make");
    }
    refers
}

fn report_table(table: &Table, config: &Config, server: &Server, report: &mut Report) {
    let object = qualified(&config.schema, &table.name);
    let role = identifier(&server.role);
    if !["r", "p"].contains(&table.relation_kind.as_str()) {
        let remedy = "put a plain or partitioned table in its place";
        return report.error("table-kind", object, "is not a table: its rows are not in the log", remedy);
    }
    if table.persistence != "p" {
        let remedy = format!("alter table {object} set logged;");
        report.error("table-kind", &object, "is unlogged: its rows are not in the log", remedy);
    }
    if !table.may_select {
        let schema = identifier(&config.schema);
        let remedy = format!("grant usage on schema {schema} to {role}; grant select on {object} to {role};");
        report.error("select", &object, format!("can't be read by {}", server.role), remedy);
    }
    if table.is_filtered {
        let message = "has row security that applies to the role: the first copy would miss rows";
        report.error("row-security", &object, message, format!("alter role {role} bypassrls;"));
    }
    if report_columns(table, &object, report) && table.may_select && table.has_known_shape {
        report.ok("table", object, "can be archived");
    }
}

fn report_columns(table: &Table, object: &str, report: &mut Report) -> bool {
    let mut all_good = true;
    for name in &table.needed {
        let usage = Use::of_column(name);
        let remedy = format!("alter table {object} add column {} {};", identifier(name), usage.sql());
        let column = format!("{object}.{name}");
        let problem = match table.columns.iter().find(|column| column.name == *name) {
            None => Some(("is missing".to_owned(), remedy)),
            Some(column) if column.is_generated => Some((
                "is a generated column, which is not in the log".to_owned(),
                format!("alter table {object} alter column {} drop expression;", identifier(name)),
            )),
            Some(column) if !usage.types().iter().any(|good| good.oid() == column.type_oid) => {
                let good: Vec<_> = usage.types().iter().map(Type::name).collect();
                Some((
                    format!("has the type {}, but must have one of {}", column.type_name, good.join(", ")),
                    format!("alter table {object} alter column {} type {};", identifier(name), usage.sql()),
                ))
            }
            Some(_) => None,
        };
        if let Some((message, remedy)) = problem {
            all_good = false;
            report.error("column", column, message, remedy);
        }
    }
    all_good
}
