//! Scouter's tables that are archived without a section in the settings.

use tokio_postgres::Client;

use super::columns::{UNSEEN, columns};
use crate::config::{Changes, Config, TableSettings};
use crate::error::{Error, Result};
use crate::tables::{ENTITY_TABLE, EntityKey, EntityTable, OWN_COLUMNS, SCOUTER_TABLES, ScouterTable};

/// The columns that name a model, if the entity table has them.
const ENTITY_COLUMNS: [&str; 4] = ["space", "name", "version", "uid"];

/// The sections that nobody had to write: of the tables that are archived already, or, for `setup`, of all that there are. None, where
/// the settings have sections of their own.
///
/// # Errors
///
/// A query failed.
pub(super) async fn sections(config: &Config, client: &Client, is_setup: bool) -> Result<Vec<TableSettings>> {
    let mut found = Vec::new();
    if !config.tables.is_empty() {
        return Ok(found);
    }
    let names = |table: &str| format!("{}.{table}", config.schema);
    for table in SCOUTER_TABLES {
        let source = names(table.name);
        let is_wanted = match archived_as(client, &source).await? {
            // It was archived under an older name, and is so still.
            Some(name) => name == source,
            None => is_setup,
        };
        let has: Vec<String> = if is_wanted {
            columns(client, &source).await?.into_iter().map(|column| column.name).collect()
        } else {
            Vec::new()
        };
        if !has.is_empty() {
            let entities = columns(client, &names(ENTITY_TABLE)).await?;
            let entities: Vec<&str> = entities.iter().map(|column| column.name.as_str()).collect();
            found.extend(section(table, source, &has, &entities));
        }
    }
    Ok(found)
}

/// `None` if the table is not the one that we know.
fn section(table: ScouterTable, source: String, has: &[String], entities: &[&str]) -> Option<TableSettings> {
    let has = |name: &str| has.iter().any(|other| other == name);
    let entity_columns: Vec<String> =
        ENTITY_COLUMNS.into_iter().filter(|name| entities.contains(name)).map(str::to_owned).collect();
    let is_known = has("created_at") && has(table.sort);
    if !is_known || (table.has_entity && !(has("entity_id") && entity_columns.len() >= 3)) {
        return None;
    }
    let lookup =
        EntityTable { id: "entity_id".to_owned(), table: ENTITY_TABLE.to_owned(), key: "id".to_owned() };
    Some(TableSettings {
        source,
        folder: table.name.to_owned(),
        time: "created_at".to_owned(),
        entity: table.has_entity.then_some(EntityKey { columns: entity_columns, lookup: Some(lookup) }),
        sort: vec![table.sort.to_owned()],
        exclude: OWN_COLUMNS.into_iter().filter(|name| has(name)).map(str::to_owned).collect(),
        retention_days: None,
        changes: Changes::Inserts,
    })
}

/// The name under which a table is archived.
async fn archived_as(client: &Client, table: &str) -> Result<Option<String>> {
    let query = "select w.source_table from highwater.watermark w
                 where w.source_table = $1
                    or w.table_oid = (select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
                                      where n.nspname || '.' || c.relname = $1)
                 order by w.source_table <> $1 limit 1";
    let failed = || Error::sql("reading which tables are archived");
    match client.query_opt(query, &[&table]).await {
        Ok(row) => row.map(|row| row.try_get(0)).transpose().map_err(failed()),
        // Before `setup`, there is none, or none that this role may see.
        Err(error) => match error.code() {
            Some(code) if UNSEEN.contains(&code.code()) => Ok(None),
            _ => Err(failed()(error)),
        },
    }
}
