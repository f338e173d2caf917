//! What somebody else does to a table: entries that take rows away, files that are gone.
//!
//! Delta lets anybody write. What an entry of ours has archived may be purged from Postgres, so whoever takes rows out of
//! the table again must be noticed, while we run and afterwards ([`Table::look_back`]). Entries with a `txn` of the sidecar,
//! a copy or a repair are ours; those that only add rows take nothing away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::entry::{Entry, entry_path};
use super::open::{check_entry, open_at};
use super::snapshot::table_files;
use super::table::Table;
use crate::archive::error::unusable;
use crate::archive::files::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Result};

/// Requests about files under way at once.
const REQUESTS_MAX: usize = 16;

/// Rows that are no longer where they were archived, and not by our doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignRemoval {
    /// The version of the table's log whose entry it was; of files that are gone, the version that names them.
    pub version: u64,
    /// What it was, for people: `DELETE`, say.
    pub operation: String,
    /// How many rows the table has fewer, as far as is known; negative if it has more.
    pub row_count: Option<i64>,
    /// Rows are gone, or were changed, or are back. If not, they are said to be in other files, which nobody has read back yet.
    pub is_loss: bool,
    /// The times that the rows were of, first and last microsecond since the epoch.
    pub times: Vec<(i64, i64)>,
}

/// What Delta's libraries call it when a table is taken back to an earlier version.
const RESTORE: &str = "RESTORE";

/// Any time.
const ANY_TIME: (i64, i64) = (i64::MIN, i64::MAX);

impl ForeignRemoval {
    /// What a foreign entry took away of a table with these files; `None` if nothing.
    pub(in crate::archive) fn of(
        entry: &Entry,
        version: u64,
        files: &BTreeMap<String, TableFile>,
    ) -> Option<Self> {
        let removed: Vec<&TableFile> = entry.removes.iter().filter_map(|path| files.get(path)).collect();
        let is_restored = entry.operation.as_deref() == Some(RESTORE) && !entry.adds.is_empty();
        if entry.is_ours || (removed.is_empty() && !is_restored) {
            return None;
        }
        let rows = |files: &mut dyn Iterator<Item = &TableFile>| {
            let counts = files.map(|file| file.row_count.and_then(|count| i64::try_from(count).ok()));
            counts.sum::<Option<i64>>()
        };
        let row_count = rows(&mut removed.iter().copied())
            .zip(rows(&mut entry.adds.iter()))
            .map(|(removed, added)| removed.saturating_sub(added));
        Some(Self {
            version,
            operation: entry.operation.clone().unwrap_or_else(|| "an operation without a name".to_owned()),
            row_count,
            is_loss: entry.removes_rows || is_restored || row_count.is_some_and(|count| count > 0),
            times: removed.into_iter().chain(&entry.adds).map(TableFile::times).collect(),
        })
    }

    /// Whether it has brought rows back, or at least taken none: somebody went back, as he was told.
    #[must_use]
    pub fn is_return(&self) -> bool {
        match self.row_count {
            Some(0) => self.operation == RESTORE,
            count => count.is_some_and(|count| count < 0),
        }
    }

    /// What happened, and how to go back, for people.
    #[must_use]
    pub fn describe(&self, table: &Table) -> String {
        if self.is_return() {
            return format!(
                "version {} of the log of {} ({}, not by Highwater) has brought archived rows back; what was archived since may be \
                 missing: `highwater verify --repair` adds what Postgres still has",
                self.version,
                table.kind().name(),
                self.operation,
            );
        }
        let what = match self.row_count {
            Some(count) if count > 0 => format!("has removed {count} archived rows"),
            Some(_) => "has changed archived rows".to_owned(),
            None => "may have removed archived rows".to_owned(),
        };
        let before = self.version.saturating_sub(1);
        format!(
            "version {} of the log of {} ({}, not by Highwater) {what}; version {before} has them: `{}` brings them back (Python's \
             deltalake), then `highwater verify --repair` adds what was archived since; or that alone, which adds the rows that \
             Postgres still has",
            self.version,
            table.kind().name(),
            self.operation,
            restoring(table.storage(), table.kind(), before),
        )
    }

    /// Whether it may concern rows with `start <= time < end`.
    #[must_use]
    pub fn may_concern(&self, start: i64, end: i64) -> bool {
        self.times.iter().any(|(low, high)| *high >= start && *low < end)
    }
}

/// What takes a table back to a version, with Python's `deltalake`.
fn restoring(storage: &Storage, kind: Kind, version: u64) -> String {
    format!(
        "DeltaTable({:?}).restore({version}, protocol_downgrade_allowed=True)",
        storage.table_url(kind).as_str()
    )
}

/// Of a table that can't be used any more: the error that names the entry since version `looked` which made it so, and how
/// to take that back; `None` if there is no such entry.
///
/// # Errors
///
/// [`Error::Storage`].
pub async fn broken_since(storage: &Storage, kind: Kind, looked: u64) -> Result<Option<Error>> {
    let store = storage.table_store(kind);
    for version in looked + 1.. {
        let Some(bytes) = read_entry(store.as_ref(), kind, version).await? else { break };
        let checked = match Entry::parse(kind, "", &bytes) {
            Ok(entry) => check_entry(kind, &entry).map_err(|error| (entry, error)),
            Err(detail) => Err((Entry::default(), unusable(kind, "reading a log entry", &detail))),
        };
        if let Err((entry, error)) = checked {
            return Ok(Some(broken_by(storage, kind, version, &entry, &error)));
        }
    }
    Ok(None)
}

/// The error of a table that an entry of somebody else has made unusable.
pub(in crate::archive) fn broken_by(
    storage: &Storage,
    kind: Kind,
    version: u64,
    entry: &Entry,
    error: &Error,
) -> Error {
    let detail = format!(
        "version {version} of its log{} has made it unusable for Highwater: {}; `{}` takes that back (Python's deltalake), and \
         then what was written meanwhile is added",
        entry
            .operation
            .as_ref()
            .map(|operation| format!(" ({operation}, by somebody else)"))
            .unwrap_or_default(),
        error.chain(),
        restoring(storage, kind, version.saturating_sub(1)),
    );
    unusable(kind, "following its log", &detail)
}

/// Whether an entry after version `looked` removes files and is not of the sidecar `app_id`. Nothing if there is no log.
///
/// # Errors
///
/// [`Error::Storage`] if it can't be read, [`Error::Delta`] if an entry is none.
pub async fn removes_since(storage: &Storage, kind: Kind, app_id: &str, looked: u64) -> Result<bool> {
    let store = storage.table_store(kind);
    for version in looked + 1.. {
        let Some(bytes) = read_entry(store.as_ref(), kind, version).await? else { break };
        let entry = Entry::parse(kind, app_id, &bytes).map_err(|detail| {
            unusable(kind, "reading a log entry", &format!("version {version}: {detail}"))
        })?;
        if !entry.is_ours && !entry.removes.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(in crate::archive) async fn read_entry(
    store: &dyn ObjectStore,
    kind: Kind,
    version: u64,
) -> Result<Option<Bytes>> {
    let path = entry_path(version);
    match async { store.get(&path).await?.bytes().await }.await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(Error::storage(format!("reading {path} of {}", kind.name()))(error)),
    }
}

/// A file that the log names and storage does not have as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// The file, as the log has it.
    pub file: TableFile,
    /// Its bytes in storage; `None` if it is not there.
    pub found: Option<u64>,
}

impl Table {
    /// Looks for what others took away since `looked`, the version that the last session of ours has looked at: nobody may
    /// have run for long. To be called right after the claim.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if the log ends before that version: it is not the one that was looked at. [`Error::Storage`] if it
    /// can't be read.
    pub async fn look_back(&mut self, looked: u64) -> Result<()> {
        if looked > self.version() {
            return Err(Error::Setting {
                setting: "storage".to_owned(),
                value: self.storage().url().to_owned(),
                accepted: format!(
                    "the archive that the watermarks speak of: the log of {} was at version {looked}, and ends at {} here (an \
                     older copy, or another archive)",
                    self.kind().name(),
                    self.version()
                ),
            });
        }
        match self.replay(looked).await {
            Ok(removals) => self.removals.extend(removals),
            Err(error @ Error::Storage { .. }) => return Err(error),
            Err(error) => {
                tracing::debug!(table = self.kind().name(), error = error.chain(), "its log was trimmed");
                self.removals.push(ForeignRemoval {
                    version: self.version(),
                    operation: format!("a log that was trimmed past version {looked}"),
                    row_count: None,
                    is_loss: true,
                    times: vec![ANY_TIME],
                });
            }
        }
        Ok(())
    }

    async fn replay(&self, looked: u64) -> Result<Vec<ForeignRemoval>> {
        let kind = self.kind();
        let wrong = |version, detail: &str| {
            unusable(kind, "reading a log entry", &format!("version {version}: {detail}"))
        };
        let mut entries = Vec::new();
        for version in looked + 1..=self.version() {
            let bytes = self.read_entry(version).await?.ok_or_else(|| wrong(version, "it is gone"))?;
            let entry =
                Entry::parse(kind, self.app_id(), &bytes).map_err(|detail| wrong(version, &detail))?;
            entries.push((version, entry));
        }
        if entries.iter().all(|(_, entry)| entry.is_ours || entry.removes.is_empty()) {
            return Ok(Vec::new());
        }
        let delta = open_at(self.storage(), kind, Some(looked)).await?;
        let state = delta.snapshot().map_err(Error::delta(kind, "reading the log"))?;
        let known = table_files(kind, state).into_iter();
        let mut files: BTreeMap<String, TableFile> = known.map(|file| (file.path.clone(), file)).collect();
        let mut removals = Vec::new();
        for (version, entry) in entries {
            removals.extend(ForeignRemoval::of(&entry, version, &files));
            for path in &entry.removes {
                files.remove(path);
            }
            files.extend(entry.adds.into_iter().map(|file| (file.path.clone(), file)));
        }
        Ok(removals)
    }

    /// What others took away, and nobody has been told of yet.
    #[must_use]
    pub fn removals(&self) -> &[ForeignRemoval] {
        &self.removals
    }

    /// Forgets the first `count` of [`Table::removals`]: they are on record.
    pub fn forget_removals(&mut self, count: usize) {
        self.removals.drain(..count.min(self.removals.len()));
    }

    /// Takes note of the files that are damaged now; whether others were before.
    pub fn set_damaged(&mut self, damaged: &[Damaged]) -> bool {
        let paths: BTreeSet<String> = damaged.iter().map(|one| one.file.path.clone()).collect();
        let is_new = !paths.is_subset(&self.damaged);
        self.damaged = paths;
        is_new
    }

    /// What takes the table back to how it is now, with Python's `deltalake`.
    #[must_use]
    pub fn restoring(&self) -> String {
        format!("`{}`", restoring(self.storage(), self.kind(), self.version()))
    }

    /// The active files that storage does not have, or not with their size. Lists the table.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`].
    pub async fn damaged(&self) -> Result<Vec<Damaged>> {
        let store = self.store();
        let failed = || Error::storage(format!("listing {}", self.storage().table_url(self.kind())));
        let mut sizes = HashMap::new();
        let mut objects = store.list(None);
        while let Some(object) = objects.try_next().await.map_err(failed())? {
            sizes.insert(object.location, object.size);
        }
        let is_suspect = |file: &&TableFile| {
            sizes.get(&Path::from(file.path.as_str())) != Some(&file.size) && !is_elsewhere(file)
        };
        self.check_files(self.files().filter(is_suspect).cloned().collect()).await
    }

    /// Those of some files that storage does not have, or not with their size.
    async fn check_files(&self, files: Vec<TableFile>) -> Result<Vec<Damaged>> {
        let heads: Vec<_> = files.into_iter().map(|file| check_file(self.store(), file)).collect();
        let found: Vec<Option<Damaged>> =
            stream::iter(heads).buffer_unordered(REQUESTS_MAX).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Makes sure that files are there before an entry names them: whoever vacuums without retention removes what no entry
    /// names yet.
    pub(in crate::archive) async fn check_uploaded(&self, files: &[TableFile]) -> Result<()> {
        let damaged = self.check_files(files.to_vec()).await?;
        match damaged.first() {
            None => Ok(()),
            Some(first) => Err(Error::Vanished {
                table: self.kind().name().to_owned(),
                detail: format!(
                    "{} of {} files, {} one of them",
                    damaged.len(),
                    files.len(),
                    first.file.path
                ),
            }),
        }
    }
}

async fn check_file(store: Arc<dyn ObjectStore>, file: TableFile) -> Result<Option<Damaged>> {
    let found = match store.head(&Path::from(file.path.as_str())).await {
        Ok(meta) => Some(meta.size),
        Err(object_store::Error::NotFound { .. }) => None,
        Err(error) => return Err(Error::storage(format!("looking up {}", file.path))(error)),
    };
    Ok((found != Some(file.size)).then_some(Damaged { file, found }))
}

/// Whether a file lies outside of the table's folder, as Delta's shallow clones have them.
fn is_elsewhere(file: &TableFile) -> bool {
    file.path.contains("://")
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: &str = "highwater/7/slot";

    fn files() -> BTreeMap<String, TableFile> {
        let stats = |rows: u64| {
            Some(format!(
                r#"{{"numRecords":{rows},"minValues":{{"created_at":"1970-01-01T00:00:01Z"}},"maxValues":{{"created_at":"1970-01-01T00:00:02Z"}}}}"#
            ))
        };
        let file = |path: &str, rows| TableFile::new(Kind::Psi, path.to_owned(), 10, 0, stats(rows));
        [file("a", 3), file("b", 4)].into_iter().map(|file| (file.path.clone(), file)).collect()
    }

    fn removal(actions: &str) -> Option<ForeignRemoval> {
        ForeignRemoval::of(&Entry::parse(Kind::Psi, APP, actions.as_bytes()).unwrap(), 9, &files())
    }

    fn add(path: &str, rows: u64, change: bool) -> String {
        let stats = format!(r#"{{\"numRecords\":{rows}}}"#);
        format!(
            r#"{{"add":{{"path":"{path}","size":1,"modificationTime":0,"dataChange":{change},"stats":"{stats}"}}}}"#
        )
    }

    fn remove(path: &str, change: bool) -> String {
        format!(r#"{{"remove":{{"path":"{path}","dataChange":{change}}}}}"#)
    }

    #[test]
    fn a_foreign_entry_that_takes_rows_away_is_a_loss() {
        let info = r#"{"commitInfo":{"operation":"DELETE"}}"#;
        let found = removal(&[info, &remove("a", true), &remove("gone", true)].map(str::to_owned).join("\n"))
            .unwrap();
        assert_eq!((found.version, found.operation.as_str()), (9, "DELETE"));
        assert_eq!((found.row_count, found.is_loss), (Some(3), true));
        assert!(found.may_concern(2_000_000, 2_000_001) && found.may_concern(0, 1_000_001));
        assert!(!found.may_concern(0, 1_000_000) && !found.may_concern(2_000_001, i64::MAX));
        // As many rows, but other ones.
        let found = removal(&[remove("a", true), add("c", 3, true)].join("\n")).unwrap();
        assert_eq!((found.row_count, found.is_loss), (Some(0), true));
        // It says that it only moved them, and has fewer.
        let found =
            removal(&[remove("a", false), remove("b", false), add("c", 6, false)].join("\n")).unwrap();
        assert_eq!((found.row_count, found.is_loss), (Some(1), true));
        let found =
            removal(&[remove("a", false), remove("b", false), add("c", 7, false)].join("\n")).unwrap();
        assert!(!found.is_loss);
    }

    #[test]
    fn what_only_adds_and_what_is_ours_takes_nothing_away() {
        assert_eq!(removal(&add("c", 7, true)), None);
        for app in [APP.to_owned(), format!("{APP}/repair")] {
            let txn = format!(r#"{{"txn":{{"appId":"{app}","version":1}}}}"#);
            assert_eq!(removal(&[txn, remove("a", true)].join("\n")), None, "{app}");
        }
        let other = format!(r#"{{"txn":{{"appId":"{APP}2","version":1}}}}"#);
        assert!(removal(&[other, remove("a", true)].join("\n")).is_some());
    }
}
