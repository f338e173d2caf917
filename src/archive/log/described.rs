//! What a table's own log says of it: so a reader needs no settings, and an archive outlives them.

use std::collections::HashMap;

use deltalake_core::table::state::DeltaTableState;
use serde_json::Value;

use super::open::open_delta;
use super::properties::{
    ADDED, ATTRIBUTE, ENTITY, ENTITY_LOOKUP, EXCLUDE, FILLED, ROW_KEY, SORT, SOURCE, SOURCE_TYPE, unhex,
};
use crate::archive::error::unusable;
use crate::archive::store::storage::Storage;
use crate::tables::{
    ColumnSpec, ColumnType, Compared, Description, EntityKey, EntityTable, Kind, change_columns,
};
use crate::{Error, Result};

/// The tables of an archive that do not come with the program, by name. What is in a folder of somebody else's is none of ours.
///
/// # Errors
///
/// [`Error::Storage`] if the archive can't be listed.
pub async fn described_tables(storage: &Storage) -> Result<Vec<Result<Kind>>> {
    let mut found = Vec::new();
    for folder in storage.folders().await? {
        if Kind::built_in().iter().all(|kind| kind.name() != folder) {
            found.extend(described(storage, &folder).await.transpose());
        }
    }
    Ok(found)
}

/// What the log of a folder's table says of it; `None` if there is no table, or if it is none of ours.
///
/// # Errors
///
/// [`Error::Storage`] and [`Error::Delta`] if the log can't be read.
pub async fn described(storage: &Storage, folder: &str) -> Result<Option<Kind>> {
    let kind = Kind::named(folder);
    if !storage.has_log(kind).await? {
        return Ok(None);
    }
    let delta = open_delta(storage, kind).await?;
    let state = delta.snapshot().map_err(Error::delta(kind, "reading the log"))?;
    let is_ours = state.metadata().configuration().contains_key(SOURCE);
    if is_ours { as_logged(kind, state).map(Some) } else { Ok(None) }
}

/// A table as a version of its log has it: it may have got columns. What its source has and the archive leaves out stays as it was.
pub(in crate::archive) fn as_logged(kind: Kind, state: &DeltaTableState) -> Result<Kind> {
    let schema = serde_json::to_value(state.schema().as_ref()).unwrap_or_default();
    let fields = schema.get("fields").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let configuration = state.metadata().configuration();
    if kind.is_built_in() {
        let base = Kind::of_name(kind.name()).unwrap_or(kind);
        let has = |name: &str| base.columns().iter().any(|column| column.name == name);
        let added = columns(kind, fields.iter().filter(|field| source_type(field).is_some()))?;
        let added = added.into_iter().filter(|column| !has(&column.name));
        let all = base.columns().iter().cloned().chain(added).collect();
        return Ok(base.with(all, kind.description().left_out.clone()));
    }
    match configuration.get(SOURCE) {
        Some(source) => of_properties(kind, source, configuration, fields),
        None => Ok(kind),
    }
}

/// A table that says by its properties what it is.
fn of_properties(
    kind: Kind,
    source: &str,
    configuration: &HashMap<String, String>,
    fields: &[Value],
) -> Result<Kind> {
    let wrong = |what: &str| unusable(kind, "reading its description", what);
    let list = |key: &str| -> Result<Vec<String>> {
        let Some(text) = configuration.get(key) else { return Ok(Vec::new()) };
        serde_json::from_str(text).map_err(|_| wrong(&format!("its property {key} is no list of columns")))
    };
    let lookup = match configuration.get(ENTITY_LOOKUP) {
        Some(text) => {
            let parsed: Value = serde_json::from_str(text).unwrap_or_default();
            let part = |key: &str| parsed.get(key).and_then(Value::as_str).map(str::to_owned);
            let lookup = part("id").zip(part("table")).zip(part("key"));
            let ((id, table), key) =
                lookup.ok_or_else(|| wrong(&format!("its property {ENTITY_LOOKUP} names no table")))?;
            Some(EntityTable { id, table, key })
        }
        None => None,
    };
    let entity = list(ENTITY)?;
    let row_key = list(ROW_KEY)?;
    let of_changes = if row_key.is_empty() { Vec::new() } else { change_columns().to_vec() };
    let is_of_changes = |name: &str| of_changes.iter().any(|column| column.name == name);
    // What somebody else has added has no source type; only the time, the entity's columns and ours may lack one.
    let is_ours = |place: usize, field: &Value| {
        place <= entity.len()
            || source_type(field).is_some()
            || field.get("name").and_then(Value::as_str).is_some_and(is_of_changes)
    };
    let ours = fields.iter().enumerate().filter(|(place, field)| is_ours(*place, field));
    let columns = columns(kind, ours.map(|(_, field)| field))?;
    let described =
        |column: ColumnSpec| of_changes.iter().find(|own| own.name == column.name).cloned().unwrap_or(column);
    let columns: Vec<ColumnSpec> = columns.into_iter().map(described).collect();
    let lacks = |name: &str| !columns.iter().any(|column| column.name == name);
    if row_key.iter().map(String::as_str).chain(of_changes.iter().map(|own| own.name.as_str())).any(lacks) {
        return Err(wrong("its columns are not those of versions of rows"));
    }
    let is_placed = |(name, column): (&String, &ColumnSpec)| *name == column.name;
    let is_time = columns.first().is_some_and(|column| column.column_type == ColumnType::Timestamp);
    if !is_time || !entity.iter().zip(columns.iter().skip(1)).all(is_placed) || columns.len() <= entity.len()
    {
        return Err(wrong("its first columns are not a time and those of its entity"));
    }
    Ok(Kind::described(Description {
        name: kind.name().to_owned(),
        source: Some(source.to_owned()),
        entity: (!entity.is_empty()).then_some(EntityKey { columns: entity, lookup }),
        columns,
        sort: list(SORT)?,
        row_key,
        // What the settings say, if somebody has read them, counts over what they said when the table was made.
        left_out: match kind.description().source {
            Some(_) => kind.description().left_out.clone(),
            None => list(EXCLUDE)?,
        },
    }))
}

fn columns<'a>(kind: Kind, fields: impl Iterator<Item = &'a Value>) -> Result<Vec<ColumnSpec>> {
    let unknown = |field: &Value| {
        let detail = format!("its column {field} has a type that is not ours");
        unusable(kind, "reading its description", &detail)
    };
    fields.map(|field| column(field).ok_or_else(|| unknown(field))).collect()
}

fn source_type(field: &Value) -> Option<&str> {
    metadata(field, SOURCE_TYPE)
}

fn metadata<'a>(field: &'a Value, key: &str) -> Option<&'a str> {
    field.get("metadata")?.get(key)?.as_str()
}

fn column(field: &Value) -> Option<ColumnSpec> {
    let delta_type = field.get("type")?.as_str()?;
    let column_type = match delta_type {
        "timestamp" => ColumnType::Timestamp,
        "string" => ColumnType::String,
        "double" => ColumnType::Double,
        "integer" => ColumnType::Int,
        "long" => ColumnType::Long,
        "boolean" => ColumnType::Boolean,
        "date" => ColumnType::Date,
        "binary" => ColumnType::Binary,
        other => {
            let (precision, scale) = other.strip_prefix("decimal(")?.strip_suffix(')')?.split_once(',')?;
            ColumnType::Decimal {
                precision: precision.trim().parse().ok()?,
                scale: scale.trim().parse().ok()?,
            }
        }
    };
    Some(ColumnSpec {
        name: field.get("name")?.as_str()?.to_owned(),
        column_type,
        nullable: field.get("nullable").and_then(Value::as_bool).unwrap_or(true),
        source_type: source_type(field).map(str::to_owned),
        attribute: metadata(field, ATTRIBUTE).map(str::to_owned),
        added: metadata(field, ADDED).is_some(),
        filled: metadata(field, FILLED).and_then(unhex),
        compared: Compared::Plainly,
    })
}
