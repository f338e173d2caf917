//! Making a table if there is none, and opening one only if it is as we write it.

use chrono::Utc;
use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use deltalake_core::{DeltaTable, DeltaTableError};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use super::entry::{self, Entry, Protocol, entry_path, schema_columns};
use crate::archive::error::unusable;
use crate::archive::files::name::ObjectName;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Lsn, Result};

/// The library's handle of a table, loaded at the end of its log. It is not used to commit.
pub(in crate::archive) async fn open_delta(storage: &Storage, kind: Kind) -> Result<DeltaTable> {
    open_at(storage, kind, None).await
}

/// The same, at an older version; which fails if the log was trimmed past that.
pub(in crate::archive) async fn open_at(
    storage: &Storage,
    kind: Kind,
    version: Option<u64>,
) -> Result<DeltaTable> {
    let url = storage.table_url(kind);
    let log_store: LogStoreRef =
        default_logstore(storage.table_store(kind), storage.root_store(), &url, &StorageConfig::default());
    let mut delta = DeltaTable::new(log_store);
    let loaded = match version {
        Some(version) => delta.load_version(version).await,
        None => delta.load().await,
    };
    loaded.map_err(Error::delta(kind, format!("opening {url}")))?;
    Ok(delta)
}

/// The same, of a table whose protocol and columns are the ones that we write.
pub(in crate::archive) async fn open_checked(storage: &Storage, kind: Kind) -> Result<DeltaTable> {
    let delta = open_delta(storage, kind).await?;
    let failed = || Error::delta(kind, "reading the log");
    let state = delta.snapshot().map_err(failed())?;
    let unreadable = |source| {
        let (line, version) = (String::new(), state.version());
        failed()(DeltaTableError::InvalidJsonLog { json_err: source, line, version })
    };
    let protocol = serde_json::to_value(state.protocol()).map_err(unreadable)?;
    check_protocol(kind, &Protocol::parse(&protocol))?;
    let schema = serde_json::to_value(state.schema().as_ref()).map_err(unreadable)?;
    check_columns(kind, &schema_columns(&schema))?;
    Ok(delta)
}

pub(in crate::archive) async fn create_if_absent(storage: &Storage, kind: Kind) -> Result<()> {
    let store = storage.table_store(kind);
    let failed = || Error::storage(format!("creating the table {}", storage.table_url(kind)));
    // Version 0 may have been trimmed away: only an empty log means that there is no table.
    let mut log = store.list(Some(&Path::from("_delta_log")));
    if log.try_next().await.map_err(failed())?.is_some() {
        return Ok(());
    }
    // Files of ours without a log are orphans, and harmless. Anything else is somebody's, who would find a
    // table around it.
    let mut objects = store.list(None);
    while let Some(object) = objects.try_next().await.map_err(failed())? {
        if object.location.prefix_matches(&Path::from("_delta_log")) {
            // Somebody else has made the table meanwhile.
            return Ok(());
        }
        if ObjectName::parse(object.location.as_ref()).is_none() {
            return Err(Error::Setting {
                setting: "storage".to_owned(),
                value: storage.table_url(kind).to_string(),
                accepted: format!(
                    "an empty folder or a table of Highwater: it has no _delta_log, but {}",
                    object.location
                ),
            });
        }
    }
    let entry = entry::to_bytes(&entry::creation(kind, Utc::now().timestamp_millis()));
    match store.put_opts(&entry_path(0), entry.into(), PutMode::Create.into()).await {
        Ok(_) => Ok(()),
        // The object may also be one that is only being written by somebody, who may yet fail (409 of S3): then
        // there is no table.
        Err(object_store::Error::AlreadyExists { .. }) => {
            store.head(&entry_path(0)).await.map(drop).map_err(failed())
        }
        Err(error) => Err(failed()(error)),
    }
}

/// Features that ask nothing of a writer of ours: it removes no row, and the constraints that somebody adds are about what
/// they write; a row that Postgres has is archived in any case.
const FEATURES_KEPT: [&str; 3] = ["appendOnly", "invariants", "checkConstraints"];

fn check_protocol(kind: Kind, asked: &Protocol) -> Result<()> {
    let is_known = asked.features.iter().all(|feature| FEATURES_KEPT.contains(&feature.as_str()));
    if matches!(asked.reader, 0 | 1 | 3) && matches!(asked.writer, 0..=3 | 7) && is_known {
        return Ok(());
    }
    let features = if asked.features.is_empty() {
        String::new()
    } else {
        format!(" with {}", asked.features.join(", "))
    };
    let detail = format!(
        "it asks for reader {} and writer {}{features}; reader 1 and writer 3, without features, are supported",
        asked.reader, asked.writer
    );
    Err(unusable(kind, "checking its protocol", &detail))
}

/// Columns that somebody has added may stay, if they may be null: our files don't have them. So may ours lose their `not null`.
fn check_columns(kind: Kind, found: &[String]) -> Result<()> {
    let wanted = schema_columns(&entry::schema(kind));
    let is_there = |column: &String| {
        let nullable = column.strip_suffix(entry::NOT_NULL);
        found.iter().any(|other| other == column || Some(other.as_str()) == nullable)
    };
    let is_harmless = |column: &String| wanted.contains(column) || !column.ends_with(entry::NOT_NULL);
    if wanted.iter().all(is_there) && found.iter().all(is_harmless) {
        return Ok(());
    }
    let (found, wanted) = (found.join(", "), wanted.join(", "));
    Err(unusable(kind, "checking its columns", &format!("it has ({found}), but must have ({wanted})")))
}

/// Makes sure that a table is still as we write it after an entry.
pub(in crate::archive) fn check_entry(kind: Kind, entry: &Entry) -> Result<()> {
    if let Some(protocol) = &entry.protocol {
        check_protocol(kind, protocol)?;
    }
    if let Some(columns) = &entry.columns {
        check_columns(kind, columns)?;
    }
    match entry.has_unknown_rows {
        true => Err(unusable(kind, "reading a log entry", "it has deletion vectors, or partitions")),
        false => Ok(()),
    }
}

/// The position that a `txn` action has as its version (Delta protocol, "Transaction Identifiers").
pub(in crate::archive) fn to_lsn(kind: Kind, version: i64) -> Result<Lsn> {
    u64::try_from(version)
        .map(Lsn)
        .map_err(|_| unusable(kind, "reading its position", &format!("txn version {version} is negative")))
}
