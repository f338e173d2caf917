//! Making a table if there is none, and opening one only if it is as we write it.

use chrono::Utc;
use deltalake_core::logstore::{LogStoreRef, StorageConfig, default_logstore};
use deltalake_core::{DeltaTable, DeltaTableError};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use super::log::{self, entry_path, schema_text};
use super::name::ObjectName;
use super::{Storage, unusable};
use crate::record::Kind;
use crate::{Error, Result};

/// The library's handle of a table, loaded at the end of its log. It is not used to commit.
pub(super) async fn open_delta(storage: &Storage, kind: Kind) -> Result<DeltaTable> {
    let url = storage.table_url(kind);
    let log_store: LogStoreRef =
        default_logstore(storage.table_store(kind), storage.root_store(), &url, &StorageConfig::default());
    let mut delta = DeltaTable::new(log_store);
    delta.load().await.map_err(Error::delta(kind, format!("opening {url}")))?;
    Ok(delta)
}

/// The same, of a table whose protocol and columns are the ones that we write.
pub(super) async fn open_checked(storage: &Storage, kind: Kind) -> Result<DeltaTable> {
    let delta = open_delta(storage, kind).await?;
    let failed = || Error::delta(kind, "reading the log");
    let state = delta.snapshot().map_err(failed())?;
    check_protocol(kind, state.protocol().min_reader_version(), state.protocol().min_writer_version())?;
    let schema = serde_json::to_value(state.schema().as_ref()).map_err(|source| {
        failed()(DeltaTableError::InvalidJsonLog {
            json_err: source,
            line: String::new(),
            version: state.version(),
        })
    })?;
    check_columns(kind, &schema_text(&schema))?;
    Ok(delta)
}

pub(super) async fn create_if_absent(storage: &Storage, kind: Kind) -> Result<()> {
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
    let entry = log::to_bytes(&log::creation(kind, Utc::now().timestamp_millis()));
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

pub(super) fn check_protocol(kind: Kind, reader: i32, writer: i32) -> Result<()> {
    if reader <= 1 && writer <= 2 {
        return Ok(());
    }
    let detail =
        format!("it asks for reader {reader} and writer {writer}; reader 1 and writer 2 are supported");
    Err(unusable(kind, "checking its protocol", &detail))
}

pub(super) fn check_columns(kind: Kind, found: &str) -> Result<()> {
    let wanted = schema_text(&log::schema(kind));
    if found == wanted {
        return Ok(());
    }
    Err(unusable(kind, "checking its columns", &format!("it has ({found}), but must have ({wanted})")))
}
