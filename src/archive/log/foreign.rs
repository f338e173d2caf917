//! What somebody else does to a table: entries that take rows away, files that are gone.
//!
//! Delta lets anybody write. What an entry of ours has archived may be purged from Postgres, so whoever takes rows out of
//! the table again must be noticed, while we run and afterwards ([`Table::look_back`]). Entries with a `txn` of the sidecar,
//! a copy or a repair are ours; those that only add rows take nothing away.

use std::collections::BTreeMap;

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt};

use super::entry::{Entry, entry_path};
use super::open::check_entry;
use crate::archive::error::unusable;
use crate::archive::files::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Result};

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
pub(super) const ANY_TIME: (i64, i64) = (i64::MIN, i64::MAX);

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

    /// Whether it may concern rows with `start <= time < end`.
    #[must_use]
    pub fn may_concern(&self, start: i64, end: i64) -> bool {
        self.times.iter().any(|(low, high)| *high >= start && *low < end)
    }
}

/// What takes a table back to a version, with Python's `deltalake`.
pub(super) fn restoring(storage: &Storage, kind: Kind, version: u64) -> String {
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
        let file = |path: &str, rows| TableFile::new(Kind::psi(), path.to_owned(), 10, 0, stats(rows));
        [file("a", 3), file("b", 4)].into_iter().map(|file| (file.path.clone(), file)).collect()
    }

    fn removal(actions: &str) -> Option<ForeignRemoval> {
        ForeignRemoval::of(&Entry::parse(Kind::psi(), APP, actions.as_bytes()).unwrap(), 9, &files())
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
