//! What a table's metadata says of it beside its columns' names and types.

use serde_json::{Map, Value, json};

use crate::tables::{EntityTable, Kind};

/// The key in a column's metadata of the type that its source column had when it was added, as SQL writes it.
pub(super) const SOURCE_TYPE: &str = "highwater.source_type";

// Keys of the table's properties (Delta protocol, "Metadata", `configuration`).
pub(super) const SOURCE: &str = "highwater.source";
pub(super) const ENTITY: &str = "highwater.entity";
pub(super) const ENTITY_LOOKUP: &str = "highwater.entityTable";
pub(super) const SORT: &str = "highwater.sort";

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
    if !description.sort.is_empty() {
        put(SORT, json!(description.sort).to_string());
    }
    found
}
