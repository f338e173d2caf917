//! Opening a table for writing: whoever claims it last is the one who can commit.

use super::entry;
use super::open::{create_if_absent, open_checked, to_lsn};
use super::snapshot::table_files;
use super::table::{ATTEMPTS_MAX, Table, Totals};
use crate::archive::error::unusable;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Lsn, Result};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

impl Table {
    /// Opens the kind's table, creating it if there is none, and claims it for this session: from here on
    /// no older session of the same application id can commit. `session_id` must never be used twice.
    ///
    /// `start` becomes the table's position if it has none for this application id.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] and [`Error::Delta`]; claiming may be repeated. [`Error::Delta`] also if the table
    /// has other columns than its kind, or needs a newer protocol.
    pub async fn claim(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
        start: Lsn,
    ) -> Result<Self> {
        // Before anything is written: of a store that overwrites, not even a table's first entry is safe.
        storage.prove_once().await?;
        create_if_absent(storage, kind).await?;
        Self::claim_as(storage, kind, app_id, session_id, start).await
    }

    async fn claim_as(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
        start: Lsn,
    ) -> Result<Self> {
        for _ in 0..ATTEMPTS_MAX {
            let mut table = Self::load(storage, kind, app_id, session_id, start).await?;
            let claim = table.change("HIGHWATER CLAIM", table.lsn);
            match table.put_entry(table.entry_bytes(&claim)?).await {
                Ok(()) => {
                    table.take_over(claim);
                    return Ok(table);
                }
                Err(object_store::Error::AlreadyExists { .. }) => {}
                Err(error) => {
                    return Err(Error::storage(format!("claiming {}", storage.table_url(kind)))(error));
                }
            }
        }
        Err(unusable(kind, "claiming", "other writers were faster every time"))
    }

    /// Opens and claims the kind's table for a repair: beside the session that has claimed it for `app_id`, which goes on. What
    /// it adds by [`Table::commit_copy`] is void if another repair, or a copy of that session's, adds rows from now on.
    ///
    /// # Errors
    ///
    /// As [`Table::claim`]; also if there is no table.
    pub async fn claim_for_repair(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
    ) -> Result<Self> {
        storage.prove_once().await?;
        Self::claim_as(storage, kind, &entry::repair_id(app_id), session_id, Lsn::ZERO).await
    }

    async fn load(storage: &Storage, kind: Kind, app_id: &str, session_id: &str, start: Lsn) -> Result<Self> {
        let delta = open_checked(storage, kind).await?;
        let failed = || Error::delta(kind, "reading the log");
        let state = delta.snapshot().map_err(failed())?;
        let log_store = delta.log_store();
        let txn = async |id: &str| state.transaction_version(log_store.as_ref(), id).await.map_err(failed());
        let timeline_id = entry::timeline_id(app_id);
        let (position, timeline, doubles) =
            futures::try_join!(txn(app_id), txn(&timeline_id), txn(entry::DOUBLES_REMOVED))?;
        let doubles_removed = doubles.and_then(|count| u64::try_from(count).ok()).unwrap_or_default();
        let mut table = Self {
            storage: storage.clone(),
            store: storage.table_store(kind),
            kind,
            app_id: app_id.to_owned(),
            session_id: session_id.to_owned(),
            version: state.version(),
            commit_number: 0,
            lsn: position.map_or(Ok(start), |version| to_lsn(kind, version))?,
            timeline: timeline.and_then(|timeline| i32::try_from(timeline).ok()),
            files: BTreeMap::new(),
            totals: Totals { doubles_removed, ..Totals::default() },
            foreign_copy: None,
            removals: Vec::new(),
            damaged: BTreeSet::new(),
            history_kept_until: None,
            checkpoint_version: 0,
            looked_at: SystemTime::now(),
        };
        for file in table_files(kind, state) {
            table.add(file);
        }
        table.checkpoint_version = table.read_checkpoint_version().await?;
        Ok(table)
    }

    async fn read_checkpoint_version(&self) -> Result<u64> {
        let path = Path::from("_delta_log/_last_checkpoint");
        match async { self.store.get(&path).await?.bytes().await }.await {
            Ok(bytes) => {
                let hint: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                Ok(hint.get("version").and_then(Value::as_u64).unwrap_or_default())
            }
            Err(object_store::Error::NotFound { .. }) => Ok(0),
            Err(error) => Err(Error::storage(format!("reading {path} of {}", self.kind.name()))(error)),
        }
    }
}
