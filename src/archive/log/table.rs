use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use chrono::Utc;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, PutMode};
use serde_json::{Map, Value, json};

use super::entry::{self, CommitId, Entry, entry_path};
use super::foreign::{self, ForeignRemoval};
use super::open::{check_entry, to_lsn};
use crate::archive::error::unusable;
use crate::archive::files::table_file::TableFile;
use crate::archive::files::upload::DataFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Lsn, Result, failpoint};

/// How often a claim, or a commit, starts again because another writer was faster. Writers other than us
/// are people; they don't write hundreds of entries a second.
pub(super) const ATTEMPTS_MAX: usize = 32;

/// After this long without a look at the log, an entry that landed is checked against the end of the log.
/// Must be well below the log's retention: what a successor trimmed could be created once more, far behind
/// its end.
const TRUST_WINDOW: Duration = Duration::from_mins(10);

/// What a table holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rows.
    pub row_count: u64,
    /// Files.
    pub file_count: u64,
    /// Bytes of the files.
    pub byte_count: u64,
    /// Upper bound of `created_at` (`quarantined_at`), microseconds since the epoch: exact for rows of this
    /// session, else up to a millisecond above. `None` for an empty table.
    pub max_created_at: Option<i64>,
    /// Surplus copies that were ever removed.
    pub doubles_removed: u64,
}

/// What a commit says of itself to people who read the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitNote {
    /// Where the checkpoint begins.
    pub first_lsn: Lsn,
    /// Where it ends.
    pub last_lsn: Lsn,
    /// Time of its first commit in the source, microseconds since the epoch.
    pub first_committed_at: Option<i64>,
    /// Time of its last commit in the source, microseconds since the epoch.
    pub last_committed_at: Option<i64>,
    /// Rows that it adds to this table.
    pub row_count: u64,
}

/// One Delta table, claimed by this session.
///
/// The handle knows the state of the log at the version that it last wrote or read. Every entry is put at
/// exactly the next version, by a request that fails if the version is taken; then the entries since are
/// read, and one of the same application id means that another session has taken over ([`Error::Fenced`]).
pub struct Table {
    pub(super) storage: Storage,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) kind: Kind,
    pub(super) app_id: String,
    pub(super) session_id: String,
    pub(super) version: u64,
    /// See [`Table::timeline`].
    pub(in crate::archive) timeline: Option<i32>,
    pub(super) commit_number: u64,
    pub(super) lsn: Lsn,
    pub(super) files: BTreeMap<String, TableFile>,
    pub(super) totals: Totals,
    /// The last entry since the claim in which somebody else has added rows that did not come by the stream.
    pub(super) foreign_copy: Option<u64>,
    /// What others took away, and nobody was told of yet.
    pub(in crate::archive) removals: Vec<ForeignRemoval>,
    /// Files that were found to be gone, by path.
    pub(in crate::archive) damaged: BTreeSet<String>,
    /// Until when older versions, and the files that are not active any more, are kept: somebody may want to go back.
    pub(in crate::archive) history_kept_until: Option<SystemTime>,
    pub(in crate::archive) checkpoint_version: u64,
    /// When the version was last known to be at the end of the log.
    pub(in crate::archive) looked_at: SystemTime,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("kind", &self.kind)
            .field("version", &self.version)
            .field("lsn", &self.lsn)
            .field("totals", &self.totals)
            .finish_non_exhaustive()
    }
}

/// A change of a table that is one log entry.
#[derive(Debug, Default)]
pub(in crate::archive) struct Change {
    pub(super) operation: &'static str,
    pub(in crate::archive) adds: Vec<TableFile>,
    /// Paths that the change replaces, and ones that it relies on; it is void if one of them is no longer active.
    pub(in crate::archive) removes: Vec<String>,
    pub(in crate::archive) keeps: Vec<String>,
    lsn: Lsn,
    /// More `txn` actions: application id and version.
    pub(in crate::archive) marks: Vec<(String, i64)>,
    /// The rows did not come by the stream: nobody else may add such rows meanwhile.
    pub(in crate::archive) is_copy: bool,
    /// It replaces files by others of the same rows.
    is_merge: bool,
    /// [`Totals::doubles_removed`] after it, if it removes some.
    pub(in crate::archive) doubles_removed: Option<u64>,
    pub(in crate::archive) note: Map<String, Value>,
    /// The table's metadata from then on (Delta protocol, "Change Metadata"), if it changes.
    pub(super) metadata: Option<Value>,
}

/// What the entries after our version were.
#[derive(Debug, PartialEq, Eq)]
enum Since {
    /// There are none.
    Nothing,
    /// Entries of others, or late ones of ours; they are taken over.
    Moved,
    /// The change itself is among them.
    Landed,
}

/// A merge whose outputs are uploaded, for [`Table::commit_merge`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The window.
    pub window: String,
    /// Paths of the files that the outputs replace.
    pub inputs: Vec<String>,
    /// The new files.
    pub outputs: Vec<DataFile>,
}
impl Table {
    /// Position up to which the table is complete.
    #[must_use]
    pub const fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// The kind of the table's rows.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The version of the log that this handle is at.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// What the table holds.
    #[must_use]
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// The active files, by path.
    pub fn files(&self) -> impl Iterator<Item = &TableFile> {
        self.files.values()
    }

    pub(in crate::archive) fn app_id(&self) -> &str {
        &self.app_id
    }

    pub(in crate::archive) const fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(in crate::archive) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.store)
    }

    /// Adds files and moves the position, in one log entry. On return the rows are archived. No files at
    /// all is a mark that there is nothing before `lsn`.
    ///
    /// After an error other than [`Error::Fenced`] the outcome may be unknown: call again with the same
    /// files and position, which recognises an entry that has landed, or drop the handle.
    ///
    /// # Errors
    ///
    /// [`Error::Fenced`] if another session has claimed the table, [`Error::Storage`] if the log can't be
    /// written or read, [`Error::Delta`] if a foreign entry made the table unusable.
    pub async fn commit(&mut self, files: &[DataFile], lsn: Lsn, note: &CommitNote) -> Result<()> {
        if lsn < self.lsn {
            let detail = format!("{}: commit at {lsn}, behind {}", self.kind.name(), self.lsn);
            return Err(Error::Internal(detail));
        }
        let mut change = self.change("WRITE", lsn);
        change.adds = files.iter().map(|file| file.to_table_file(self.kind)).collect();
        change.note = note.to_json();
        match self.land(change).await? {
            true => Ok(()),
            false => Err(Error::Internal("a commit that removes nothing was abandoned".to_owned())),
        }
    }

    /// Sets the position, even back: for a slot of another history, whose positions have nothing to do with the ones so
    /// far.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`].
    pub async fn rebase(&mut self, lsn: Lsn) -> Result<()> {
        self.land(self.change("HIGHWATER REBASE", lsn)).await.map(drop)
    }

    /// Replaces a merge's inputs by its outputs in one log entry that changes no row. `Ok(false)`: an
    /// input is no longer active, nothing was done, the outputs are orphans.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`]; after one the merge may be dropped.
    pub async fn commit_merge(&mut self, merged: &Merged) -> Result<bool> {
        self.land(self.merge_change(merged)).await
    }

    fn merge_change(&self, merged: &Merged) -> Change {
        let mut change = self.change("OPTIMIZE", self.lsn);
        change.adds = merged.outputs.iter().map(|file| file.to_table_file(self.kind)).collect();
        change.removes.clone_from(&merged.inputs);
        change.is_merge = true;
        change.note.insert("window".to_owned(), json!(merged.window));
        change
    }

    #[cfg(test)]
    pub(in crate::archive) fn entry_of_merge(&self, merged: &Merged) -> Result<Bytes> {
        self.entry_bytes(&self.merge_change(merged))
    }

    /// Takes files out of the table that storage does not have any more: their rows can be added again only then.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`].
    pub async fn drop_files(&mut self, paths: Vec<String>) -> Result<()> {
        let mut change = self.change("HIGHWATER DROP", self.lsn);
        change.removes = paths;
        self.land(change).await.map(drop)
    }

    pub(in crate::archive) fn change(&self, operation: &'static str, lsn: Lsn) -> Change {
        Change { operation, lsn, ..Change::default() }
    }

    pub(in crate::archive) async fn land(&mut self, change: Change) -> Result<bool> {
        let mut retried = false;
        self.check_uploaded(&change.adds).await?;
        for _ in 0..ATTEMPTS_MAX {
            if let (true, Some(version)) = (change.is_copy, self.foreign_copy) {
                let detail = format!("version {version} of its log");
                return Err(Error::Conflict { table: self.kind.name().to_owned(), detail });
            }
            if !change.removes.iter().chain(&change.keeps).all(|path| self.files.contains_key(path)) {
                return Ok(false);
            }
            let Err(error) = self.put_entry(self.entry_bytes(&change)?).await else {
                failpoint::hit("after-delta-commit");
                self.check_end(self.version + 1).await?;
                self.take_over(change);
                return Ok(true);
            };
            let failed =
                Error::storage(format!("committing version {} of {}", self.version + 1, self.kind.name()));
            // That an entry can be read does not make it durable (see `SyncedLocal`). A put that succeeds, or
            // meets it, does: so only after one of these is an entry looked for.
            if !matches!(error, object_store::Error::AlreadyExists { .. }) {
                if std::mem::replace(&mut retried, true) {
                    return Err(failed(error));
                }
                continue;
            }
            match self.catch_up(Some(&change)).await {
                Ok(Since::Landed) => {
                    self.check_end(self.version).await?;
                    self.looked_at = SystemTime::now();
                    return Ok(true);
                }
                Ok(Since::Moved) => {}
                Err(fatal @ (Error::Fenced { .. } | Error::Delta { .. })) => return Err(fatal),
                Ok(Since::Nothing) | Err(_) => return Err(failed(error)),
            }
        }
        Err(unusable(self.kind, "committing", "other writers were faster every time"))
    }

    /// Reads the entries after our version and takes them over.
    async fn catch_up(&mut self, mine: Option<&Change>) -> Result<Since> {
        let mut since = Since::Nothing;
        while let Some(bytes) = self.read_entry(self.version + 1).await? {
            let version = self.version + 1;
            let entry = Entry::parse(self.kind, &self.app_id, &bytes).map_err(|detail| {
                unusable(self.kind, "reading a log entry", &format!("version {version}: {detail}"))
            })?;
            let ours = entry.commit.as_ref().filter(|commit| commit.session == self.session_id);
            if ours.is_none() && entry.txn_version.is_some() {
                let detail = format!("version {version} of its log is by another session of {}", self.app_id);
                return Err(Error::Fenced { table: self.kind.name().to_owned(), detail });
            }
            check_entry(self.kind, &entry)
                .map_err(|error| foreign::broken_by(&self.storage, self.kind, version, &entry, &error))?;
            self.removals.extend(ForeignRemoval::of(&entry, version, &self.files).filter(|_| ours.is_none()));
            if ours.is_none() && entry.is_copy() {
                self.foreign_copy = Some(version);
            }
            let number = ours.map(|commit| commit.number);
            let paths = |files: &[TableFile]| files.iter().map(|file| file.path.clone()).collect::<Vec<_>>();
            let landed = mine.is_some_and(|mine| {
                number == Some(self.commit_number + 1)
                    && to_txn(mine.lsn).ok() == entry.txn_version
                    && paths(&mine.adds) == paths(&entry.adds)
            });
            // A late entry of ours: a merge that was given up after an error, say. It counts.
            self.lsn =
                self.lsn.max(entry.txn_version.map_or(Ok(self.lsn), |version| to_lsn(self.kind, version))?);
            self.commit_number = self.commit_number.max(number.unwrap_or_default());
            self.version = version;
            let doubles = entry.doubles_removed.unwrap_or_default();
            self.totals.doubles_removed = self.totals.doubles_removed.max(doubles);
            self.replace(&entry.removes, entry.adds);
            if landed {
                return Ok(Since::Landed);
            }
            since = Since::Moved;
        }
        Ok(since)
    }

    /// Takes over what others have written, and makes sure that no other session has claimed the table, as far as the log says
    /// now. What others took away is then among [`Table::removals`]. A handle that is used after hours must have looked: by
    /// then the log may be trimmed past its version.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`].
    pub async fn look(&mut self) -> Result<()> {
        // A process that sleeps meanwhile must not take this for a fresh look.
        let begun = SystemTime::now();
        self.catch_up(None).await?;
        self.check_end(self.version).await?;
        self.looked_at = begun;
        Ok(())
    }

    pub(in crate::archive) async fn read_entry(&self, version: u64) -> Result<Option<Bytes>> {
        foreign::read_entry(self.store.as_ref(), self.kind, version).await
    }

    pub(super) fn entry_bytes(&self, change: &Change) -> Result<Bytes> {
        let now = Utc::now().timestamp_millis();
        let id = CommitId { session: self.session_id.clone(), number: self.commit_number + 1 };
        let mut actions = vec![entry::commit_info(&id, change.operation, now, change.note.clone())];
        actions.push(entry::txn(&self.app_id, to_txn(change.lsn)?, now));
        actions.extend(change.marks.iter().map(|(app_id, version)| entry::txn(app_id, *version, now)));
        let doubles = change.doubles_removed.and_then(|count| i64::try_from(count).ok());
        actions.extend(doubles.map(|count| entry::txn(entry::DOUBLES_REMOVED, count, now)));
        actions.extend(change.metadata.iter().map(|metadata| json!({"metaData": metadata})));
        let removed = change.removes.iter().filter_map(|path| self.files.get(path));
        actions.extend(removed.map(|file| file.remove(now, !change.is_merge)));
        actions.extend(change.adds.iter().map(|file| file.add(!change.is_merge)));
        Ok(entry::to_bytes(&actions))
    }

    /// Puts an entry at the next version, if that is not taken.
    pub(super) async fn put_entry(&self, bytes: Bytes) -> object_store::Result<()> {
        let target = entry_path(self.version + 1);
        self.store.put_opts(&target, bytes.into(), PutMode::Create.into()).await?;
        Ok(())
    }

    /// Makes sure that an entry at `version` is at the end of the log, if it is long since we looked there. A
    /// session that slept may create anew a version that its successor has trimmed: the put succeeds, but
    /// no reader starts before the successor's checkpoint.
    async fn check_end(&self, version: u64) -> Result<()> {
        // Also if the clock was set back: better one request too many.
        if self.looked_at.elapsed().is_ok_and(|age| age < TRUST_WINDOW) {
            return Ok(());
        }
        let failed = || Error::storage(format!("listing the log of {}", self.kind.name()));
        let folder = Path::from("_delta_log");
        let mut later = self.store.list_with_offset(Some(&folder), &entry_path(version));
        while let Some(object) = later.try_next().await.map_err(failed())? {
            let name = object.location.filename().unwrap_or_default();
            // `_last_checkpoint` sorts after every version.
            if name.contains(".checkpoint.") {
                let detail = format!("its log was trimmed past version {version}, up to {name}");
                return Err(Error::Fenced { table: self.kind.name().to_owned(), detail });
            }
        }
        Ok(())
    }

    pub(super) fn take_over(&mut self, change: Change) {
        self.version += 1;
        self.commit_number += 1;
        self.lsn = change.lsn;
        self.looked_at = SystemTime::now();
        self.totals.doubles_removed = change.doubles_removed.unwrap_or(self.totals.doubles_removed);
        self.replace(&change.removes, change.adds);
    }

    fn replace(&mut self, removes: &[String], adds: Vec<TableFile>) {
        for path in removes {
            if let Some(file) = self.files.remove(path) {
                self.discount(&file);
            }
        }
        for file in adds {
            self.add(file);
        }
    }

    pub(super) fn add(&mut self, file: TableFile) {
        self.totals.file_count += 1;
        self.totals.byte_count = self.totals.byte_count.saturating_add(file.size);
        self.totals.row_count = self.totals.row_count.saturating_add(file.row_count.unwrap_or_default());
        self.totals.max_created_at = self.totals.max_created_at.max(file.max_time);
        // An action for a known path replaces it (Delta protocol, "Add File and Remove File").
        if let Some(old) = self.files.insert(file.path.clone(), file) {
            self.discount(&old);
        }
    }

    fn discount(&mut self, file: &TableFile) {
        self.totals.file_count = self.totals.file_count.saturating_sub(1);
        self.totals.byte_count = self.totals.byte_count.saturating_sub(file.size);
        self.totals.row_count = self.totals.row_count.saturating_sub(file.row_count.unwrap_or_default());
    }
}

impl CommitNote {
    pub(in crate::archive) fn to_json(self) -> Map<String, Value> {
        let time = |micros: Option<i64>| micros.and_then(chrono::DateTime::<Utc>::from_timestamp_micros);
        let mut note = Map::new();
        note.insert("firstLsn".to_owned(), json!(self.first_lsn.to_string()));
        note.insert("lastLsn".to_owned(), json!(self.last_lsn.to_string()));
        note.insert("firstCommittedAt".to_owned(), json!(time(self.first_committed_at)));
        note.insert("lastCommittedAt".to_owned(), json!(time(self.last_committed_at)));
        note.insert("rowCount".to_owned(), json!(self.row_count));
        note
    }
}

fn to_txn(lsn: Lsn) -> Result<i64> {
    i64::try_from(lsn.0).map_err(|_| Error::Internal(format!("position {lsn} is past what a log holds")))
}
