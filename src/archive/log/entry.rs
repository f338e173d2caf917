//! Entries of a Delta log: built, and read back as far as we care. Pure.
//!
//! Entries are built here rather than by the library, because one entry's fate decides whether a row is
//! durable: it is made against a version that we chose, put once, and never moved to another version by
//! code that does not know our rules.

use serde_json::{Map, Value, json};

use super::properties::{metadata, properties};
use crate::archive::files::table_file::TableFile;
use crate::tables::{ColumnSpec, ColumnType, Kind};

/// Log entries between two checkpoints of a log; a reader opens at most this many beside the checkpoint.
pub(in crate::archive) const CHECKPOINT_INTERVAL: u64 = 100;

/// The `txn` action (Delta protocol, "Transaction Identifiers").
pub(in crate::archive) fn txn(app_id: &str, version: i64, now_millis: i64) -> Value {
    json!({"txn": {"appId": app_id, "version": version, "lastUpdated": now_millis}})
}

/// The application id under which a repair writes into the tables of a sidecar.
pub(in crate::archive) fn repair_id(app_id: &str) -> String {
    format!("{app_id}{REPAIR}")
}

/// The application id of the sidecar that archives a server through a slot: of the `txn` of each of its entries.
#[must_use]
pub fn app_id(system_identifier: &str, slot: &str) -> String {
    format!("highwater/{system_identifier}/{slot}")
}

/// The application id of the sidecar that a repair, or the sidecar itself, writes beside.
fn sidecar_of(app_id: &str) -> &str {
    app_id.strip_suffix(REPAIR).unwrap_or(app_id)
}

const REPAIR: &str = "/repair";

/// The id of the `txn` whose version is the server's timeline that the sidecar's positions are of.
pub(in crate::archive) fn timeline_id(app_id: &str) -> String {
    format!("{app_id}{TIMELINE}")
}

const TIMELINE: &str = "/timeline";

/// The id of the `txn` whose version is how many surplus copies were ever removed from the table. No application's: it goes on
/// whichever slot feeds the table.
pub(in crate::archive) const DOUBLES_REMOVED: &str = "highwater/doubles-removed";

/// Which commit of which session an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::archive) struct CommitId {
    pub(in crate::archive) session: String,
    pub(in crate::archive) number: u64,
}

/// The `commitInfo` action; `note` is for people.
pub(in crate::archive) fn commit_info(
    id: &CommitId,
    operation: &str,
    now_millis: i64,
    note: Map<String, Value>,
) -> Value {
    json!({"commitInfo": {
        "timestamp": now_millis,
        "operation": operation,
        "operationParameters": {},
        "isBlindAppend": operation == "WRITE",
        "engineInfo": concat!("highwater/", env!("CARGO_PKG_VERSION")),
        "highwater": {"session": id.session, "commit": id.number, "note": note},
    }})
}

/// The first entry of a table: protocol reader 1, writer 2, and its metadata.
pub(in crate::archive) fn creation(kind: Kind, now_millis: i64) -> Vec<Value> {
    let entity = kind.entity_columns().iter().map(String::as_str);
    let time_and_entity = std::iter::once(kind.time_column()).chain(entity).collect::<Vec<_>>().join(",");
    let table_id = format!("{:032x}", rand::random::<u128>());
    let mut configuration = properties(kind);
    for (key, value) in [
        ("delta.checkpointInterval", CHECKPOINT_INTERVAL.to_string()),
        ("delta.dataSkippingStatsColumns", time_and_entity),
        // Long enough for a reader that has just listed the log.
        ("delta.logRetentionDuration", "interval 1 hours".to_owned()),
        ("delta.deletedFileRetentionDuration", "interval 1 days".to_owned()),
    ] {
        configuration.insert(key.to_owned(), Value::String(value));
    }
    vec![
        json!({"commitInfo": {
            "timestamp": now_millis,
            "operation": "CREATE TABLE",
            "operationParameters": {},
            "engineInfo": concat!("highwater/", env!("CARGO_PKG_VERSION")),
        }}),
        json!({"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}),
        json!({"metaData": {
            "id": table_id,
            "name": kind.name(),
            "format": {"provider": "parquet", "options": {}},
            "schemaString": schema(kind).to_string(),
            "partitionColumns": [],
            "configuration": configuration,
            "createdTime": now_millis,
        }}),
    ]
}

/// A kind's schema in Delta's form (Delta protocol, "Schema Serialization Format").
pub(in crate::archive) fn schema(kind: Kind) -> Value {
    let fields: Vec<Value> = kind.columns().iter().map(field).collect();
    json!({"type": "struct", "fields": fields})
}

/// A column in that form.
pub(in crate::archive) fn field(column: &ColumnSpec) -> Value {
    let delta_type = match column.column_type {
        ColumnType::Timestamp => "timestamp".to_owned(),
        ColumnType::String => "string".to_owned(),
        ColumnType::Double => "double".to_owned(),
        ColumnType::Int => "integer".to_owned(),
        ColumnType::Long => "long".to_owned(),
        ColumnType::Boolean => "boolean".to_owned(),
        ColumnType::Date => "date".to_owned(),
        ColumnType::Binary => "binary".to_owned(),
        ColumnType::Decimal { precision, scale } => format!("decimal({precision},{scale})"),
    };
    json!({"name": column.name, "type": delta_type, "nullable": column.nullable, "metadata": metadata(column)})
}

/// What ends the text of a column that must have a value.
pub(in crate::archive) const NOT_NULL: &str = " not null";

/// Columns as text, to be compared and shown: `created_at timestamp not null`.
pub(in crate::archive) fn schema_columns(schema: &Value) -> Vec<String> {
    let text = |field: &Value| {
        let name = field.get("name").and_then(Value::as_str).unwrap_or("?").to_owned();
        let delta_type = field.get("type").cloned().unwrap_or_default();
        let delta_type = delta_type.as_str().map_or_else(|| delta_type.to_string(), str::to_owned);
        let nullable = field.get("nullable").and_then(Value::as_bool).unwrap_or(true);
        format!("{name} {delta_type}{}", if nullable { "" } else { NOT_NULL })
    };
    let fields = schema.get("fields").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    fields.iter().map(text).collect()
}

/// The bytes of a log entry: one action a line.
pub(in crate::archive) fn to_bytes(actions: &[Value]) -> bytes::Bytes {
    actions.iter().map(Value::to_string).collect::<Vec<_>>().join("\n").into()
}

/// Path of a log entry, relative to the table.
pub(in crate::archive) fn entry_path(version: u64) -> object_store::path::Path {
    object_store::path::Path::from(format!("_delta_log/{version:020}.json"))
}

/// What a table asks of whoever reads or writes it (Delta protocol, "Protocol Evolution").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::archive) struct Protocol {
    pub(in crate::archive) reader: u64,
    pub(in crate::archive) writer: u64,
    /// Features of both kinds, of a table that lists them.
    pub(in crate::archive) features: Vec<String>,
}

impl Protocol {
    /// Reads a `protocol` action's value.
    pub(in crate::archive) fn parse(action: &Value) -> Self {
        let version = |key| action.get(key).and_then(Value::as_u64).unwrap_or(u64::MAX);
        let features = ["readerFeatures", "writerFeatures"].into_iter().filter_map(|key| action.get(key));
        let features = features.filter_map(Value::as_array).flatten().filter_map(Value::as_str);
        Self {
            reader: version("minReaderVersion"),
            writer: version("minWriterVersion"),
            features: features.map(str::to_owned).collect(),
        }
    }
}

/// What an entry did, as far as we care.
#[derive(Clone, Debug, Default)]
pub(in crate::archive) struct Entry {
    pub(in crate::archive) commit: Option<CommitId>,
    pub(in crate::archive) adds: Vec<TableFile>,
    pub(in crate::archive) removes: Vec<String>,
    /// Version of the `txn` of the application that was asked for.
    pub(in crate::archive) txn_version: Option<i64>,
    /// Whether it has a `txn` of a repair, which may be no more than its claim.
    is_repair: bool,
    /// Whether it has a mark of a copy: a `txn` whose id begins with that of the sidecar and a slash.
    has_mark: bool,
    /// How many surplus copies were removed by then, if it removed any.
    pub(in crate::archive) doubles_removed: Option<u64>,
    /// Whether it has a `txn` of the sidecar, or of a copy or a repair: the entry of anybody else is foreign.
    pub(in crate::archive) is_ours: bool,
    /// What it says that it does.
    pub(in crate::archive) operation: Option<String>,
    /// Whether a `remove` takes rows away (`dataChange`), and does not only have them in other files.
    pub(in crate::archive) removes_rows: bool,
    /// Columns, if the entry sets them.
    pub(in crate::archive) columns: Option<Vec<String>>,
    /// What it asks of readers and writers, if the entry sets that.
    pub(in crate::archive) protocol: Option<Protocol>,
    /// Whether an `add` carries a deletion vector or a partition, which we can't merge.
    pub(in crate::archive) has_unknown_rows: bool,
}

impl Entry {
    /// Whether it is of a copy that has compared rows, or of a repair that has changed some.
    pub(in crate::archive) const fn is_copy(&self) -> bool {
        self.has_mark || (self.is_repair && !(self.adds.is_empty() && self.removes.is_empty()))
    }

    /// Parses an entry; the text says what is wrong with one that is not.
    pub(in crate::archive) fn parse(kind: Kind, app_id: &str, bytes: &[u8]) -> Result<Self, String> {
        let mut entry = Self::default();
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            let action: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
            entry.apply(kind, app_id, &action)?;
        }
        Ok(entry)
    }

    fn apply(&mut self, kind: Kind, app_id: &str, action: &Value) -> Result<(), String> {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let path = |value: &Value| {
            let raw = text(value, "path").ok_or("an action lacks its path")?;
            // Paths in the log are percent-encoded; ours have nothing to encode.
            let decoded = object_store::path::Path::from_url_path(&raw).map_err(|error| error.to_string())?;
            Ok::<_, String>(decoded.to_string())
        };
        let number = |value: &Value, key: &str| value.get(key).and_then(Value::as_u64);
        if let Some(add) = action.get("add").filter(|add| !add.is_null()) {
            let modified = add.get("modificationTime").and_then(Value::as_i64).unwrap_or_default();
            let size = number(add, "size").unwrap_or_default();
            self.has_unknown_rows |= add.get("deletionVector").is_some_and(|vector| !vector.is_null());
            self.adds.push(TableFile::new(kind, path(add)?, size, modified, text(add, "stats")));
        } else if let Some(remove) = action.get("remove").filter(|remove| !remove.is_null()) {
            self.removes_rows |= remove.get("dataChange").and_then(Value::as_bool).unwrap_or(true);
            self.removes.push(path(remove)?);
        } else if let Some(txn) = action.get("txn").filter(|txn| !txn.is_null()) {
            let id = text(txn, "appId").unwrap_or_default();
            match id.strip_prefix(sidecar_of(app_id)) {
                Some("") => self.is_ours = true,
                Some(REPAIR) => self.is_repair = true,
                // Says nothing of rows.
                Some(TIMELINE) => self.is_ours = true,
                Some(rest) => self.has_mark |= rest.starts_with('/'),
                None => {}
            }
            self.is_ours |= self.is_repair || self.has_mark;
            if id == app_id {
                self.txn_version =
                    Some(txn.get("version").and_then(Value::as_i64).ok_or("txn lacks its version")?);
            }
            if id == DOUBLES_REMOVED {
                self.doubles_removed = number(txn, "version");
            }
        } else if let Some(info) = action.get("commitInfo").filter(|info| !info.is_null()) {
            self.operation = text(info, "operation");
            self.commit = info.get("highwater").and_then(|own| {
                let (session, number) = text(own, "session").zip(number(own, "commit"))?;
                Some(CommitId { session, number })
            });
        } else if let Some(metadata) = action.get("metaData").filter(|metadata| !metadata.is_null()) {
            let schema = text(metadata, "schemaString").unwrap_or_default();
            let schema: Value = serde_json::from_str(&schema).map_err(|error| error.to_string())?;
            self.columns = Some(schema_columns(&schema));
        } else if let Some(protocol) = action.get("protocol").filter(|protocol| !protocol.is_null()) {
            self.protocol = Some(Protocol::parse(protocol));
        }
        Ok(())
    }
}
