//! Opening a table for writing: whoever claims it last is the one who can commit.

use super::described::as_logged;
use super::entry;
use super::open::{create_if_absent, open_checked, to_lsn};
use super::snapshot::table_files;
use super::table::{ATTEMPTS_MAX, Table, Totals};
use crate::archive::error::unusable;
use crate::archive::store::storage::Storage;
use crate::tables::{ColumnSpec, Kind};
use crate::{Error, Lsn, Result, failpoint};
use deltalake_core::DeltaTable;
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
        Self::claim_with(storage, kind, app_id, session_id, start, &[]).await
    }

    /// As [`Table::claim`]; and of `columns`, which must be nullable, those that the table lacks are added by the entry that claims
    /// it. [`Table::kind`] has them then.
    ///
    /// # Errors
    ///
    /// As [`Table::claim`].
    pub async fn claim_with(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
        start: Lsn,
        columns: &[ColumnSpec],
    ) -> Result<Self> {
        // Before anything is written: of a store that overwrites, not even a table's first entry is safe.
        storage.prove_once().await?;
        create_if_absent(storage, kind).await?;
        Self::claim_as(storage, kind, app_id, session_id, start, columns).await
    }

    async fn claim_as(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
        start: Lsn,
        columns: &[ColumnSpec],
    ) -> Result<Self> {
        for _ in 0..ATTEMPTS_MAX {
            let delta = open_checked(storage, kind).await?;
            let mut table = Self::load(storage, kind, app_id, session_id, start, &delta).await?;
            let mut claim = table.change("HIGHWATER CLAIM", table.lsn);
            let grown = table.grown(&delta, columns)?;
            if let Some((_, metadata)) = &grown {
                claim.operation = "ADD COLUMNS";
                claim.metadata = Some(metadata.clone());
                failpoint::hit("before-columns");
            }
            match table.put_entry(table.entry_bytes(&claim)?).await {
                Ok(()) => {
                    table.take_over(claim);
                    if let Some((kind, _)) = grown {
                        failpoint::hit("after-columns");
                        tell_columns(table.kind, kind);
                        table.kind = kind;
                    }
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
        Self::claim_as(storage, kind, &entry::repair_id(app_id), session_id, Lsn::ZERO, &[]).await
    }

    /// The table with the columns that it lacks, and its metadata with them; `None` if it has all. A column that somebody else has
    /// added under that name stays his, and the source's is not archived.
    fn grown(&self, delta: &DeltaTable, columns: &[ColumnSpec]) -> Result<Option<(Kind, Value)>> {
        let kind = self.kind;
        let mut new: Vec<ColumnSpec> =
            columns.iter().filter(|column| kind.lacks(&column.name)).cloned().collect();
        if new.is_empty() {
            return Ok(None);
        }
        let failed = |what: &str| unusable(kind, "adding columns", what);
        let state = delta.snapshot().map_err(Error::delta(kind, "reading the log"))?;
        let mut metadata =
            serde_json::to_value(state.metadata()).map_err(|_| failed("its metadata can't be read"))?;
        let schema = metadata.get("schemaString").and_then(Value::as_str).unwrap_or_default();
        let mut schema: Value =
            serde_json::from_str(schema).map_err(|_| failed("its schema can't be read"))?;
        let fields = schema.get_mut("fields").and_then(Value::as_array_mut);
        let fields = fields.ok_or_else(|| failed("its schema has no fields"))?;
        // Nobody opens a table again whose columns differ in case alone, also not two that are new.
        let names = fields.iter().filter_map(|field| field.get("name").and_then(Value::as_str));
        let mut names: Vec<String> = names.map(str::to_lowercase).collect();
        new.retain(|column| {
            let name = column.name.to_lowercase();
            let is_taken = names.contains(&name);
            if is_taken {
                tracing::error!(
                    table = kind.name(),
                    "column {:?} is not archived: the archive has one of that name, or one that differs in case alone",
                    column.name
                );
            } else {
                names.push(name);
            }
            !is_taken
        });
        fields.extend(new.iter().map(entry::field));
        if let Some(text) = metadata.get_mut("schemaString") {
            *text = Value::String(schema.to_string());
        }
        let all = kind.columns().iter().cloned().chain(new.iter().cloned()).collect();
        let grown = kind.with(all, kind.description().left_out.clone());
        Ok((!new.is_empty()).then_some((grown, metadata)))
    }

    async fn load(
        storage: &Storage,
        kind: Kind,
        app_id: &str,
        session_id: &str,
        start: Lsn,
        delta: &DeltaTable,
    ) -> Result<Self> {
        let failed = || Error::delta(kind, "reading the log");
        let state = delta.snapshot().map_err(failed())?;
        let kind = as_logged(kind, state)?;
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

/// Says which columns a table has got.
fn tell_columns(before: Kind, now: Kind) {
    let has = |name: &str| before.columns().iter().any(|column| column.name == name);
    for column in now.columns().iter().filter(|column| !has(&column.name)) {
        let (name, own) = (&column.name, column.source_type.as_deref().unwrap_or_default());
        tracing::info!(
            table = now.name(),
            "column {name:?} ({own}) is archived from now on; older rows have nulls in it"
        );
    }
}
