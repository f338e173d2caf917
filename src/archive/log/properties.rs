//! What a table's metadata says of it beside its columns' names and types.

use serde_json::{Map, Value, json};

use crate::tables::{ColumnSpec, EntityTable, Kind};

/// The key in a column's metadata of the type that its source column had when it was added, as SQL writes it.
pub(super) const SOURCE_TYPE: &str = "highwater.source_type";

/// ... of the table's oid and the number of the column in it then (`pg_attribute.attnum`).
pub(super) const ATTRIBUTE: &str = "highwater.attribute";

/// ... that it came after rows had been archived.
pub(super) const ADDED: &str = "highwater.added";

/// ... of what rows from before the column have in Postgres, as digests of rows have it, in hexadecimal digits.
pub(super) const FILLED: &str = "highwater.filled";

// Keys of the table's properties (Delta protocol, "Metadata", `configuration`).
pub(super) const SOURCE: &str = "highwater.source";
pub(super) const ENTITY: &str = "highwater.entity";
pub(super) const ENTITY_LOOKUP: &str = "highwater.entityTable";
pub(super) const SORT: &str = "highwater.sort";
pub(super) const EXCLUDE: &str = "highwater.exclude";
/// The source's primary key, where each version of a row is archived.
pub(super) const ROW_KEY: &str = "highwater.rowKey";

/// A column's metadata.
pub(super) fn metadata(column: &ColumnSpec) -> Map<String, Value> {
    let mut found = Map::new();
    let hex = |bytes: &Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let texts = [
        (SOURCE_TYPE, column.source_type.clone()),
        (ATTRIBUTE, column.attribute.clone()),
        (ADDED, column.added.then(|| "true".to_owned())),
        (FILLED, column.filled.as_ref().map(hex)),
    ];
    for (key, text) in texts {
        found.extend(text.map(|text| (key.to_owned(), Value::String(text))));
    }
    found
}

/// Bytes that are written in hexadecimal digits.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.chars().map(|c| u8::try_from(c.to_digit(16)?).ok()).collect::<Option<_>>()?;
    let pairs = digits.chunks(2).map(|pair| match pair {
        [high, low] => Some(high << 4 | low),
        _ => None,
    });
    pairs.collect()
}

/// The properties that describe a table beside its columns. Those that come with the program need none.
pub(super) fn properties(kind: Kind) -> Map<String, Value> {
    let mut found = Map::new();
    let mut put = |key: &str, text: String| drop(found.insert(key.to_owned(), Value::String(text)));
    let description = kind.description();
    let Some(source) = description.source.as_ref().filter(|_| !kind.is_built_in()) else { return found };
    put(SOURCE, source.clone());
    if let Some(entity) = &description.entity {
        put(ENTITY, json!(entity.columns).to_string());
        if let Some(EntityTable { id, table, key }) = &entity.lookup {
            put(ENTITY_LOOKUP, json!({"id": id, "table": table, "key": key}).to_string());
        }
    }
    let lists =
        [(SORT, &description.sort), (EXCLUDE, &description.left_out), (ROW_KEY, &description.row_key)];
    for (key, columns) in lists {
        if !columns.is_empty() {
            put(key, json!(columns).to_string());
        }
    }
    found
}
