use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;

use super::described::as_logged;
use super::entry::Entry;
use super::foreign::read_entry;
use super::open::{check_entry, open_checked};
use super::snapshot::table_files;
use crate::archive::error::unusable;
use crate::archive::files::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Result};

/// A view that is older is read anew instead of entry by entry: there may be many entries by then, and once there are so
/// old ones that the log was trimmed past the view's version, the missing one would look like the end of the log.
const FOLLOW_MAX: Duration = Duration::from_mins(1);

/// One version of a table, to be read without writing, and moved forward by one request if nothing has changed.
#[derive(Clone, Debug)]
pub struct View {
    storage: Storage,
    kind: Kind,
    /// `None` if there is no table.
    version: Option<u64>,
    files: Arc<BTreeMap<String, TableFile>>,
    looked_at: Instant,
}

impl View {
    /// Reads the newest version. A table that was never made is one without files.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] and [`Error::Delta`] if the log can't be read, [`Error::Delta`] also if the table has other
    /// columns than its kind, or needs a newer protocol.
    pub async fn read(storage: &Storage, kind: Kind) -> Result<Self> {
        let looked_at = Instant::now();
        let mut view =
            Self { storage: storage.clone(), kind, version: None, files: Arc::default(), looked_at };
        let failed = Error::storage(format!("listing the log of {}", storage.table_url(kind)));
        let store = storage.table_store(kind);
        let mut log = store.list(Some(&Path::from("_delta_log")));
        if log.try_next().await.map_err(failed)?.is_some() {
            let delta = open_checked(storage, kind).await?;
            let state = delta.snapshot().map_err(Error::delta(kind, "reading the log"))?;
            view.kind = as_logged(kind, state)?;
            view.version = Some(state.version());
            view.replace(&[], table_files(kind, state));
        }
        Ok(view)
    }

    /// The newest version, which may be this one.
    ///
    /// # Errors
    ///
    /// As [`View::read`].
    pub async fn newer(&self) -> Result<Self> {
        let Some(version) = self.version.filter(|_| self.looked_at.elapsed() < FOLLOW_MAX) else {
            return Self::read(&self.storage, self.kind).await;
        };
        let mut newer = Self { looked_at: Instant::now(), ..self.clone() };
        for next in version + 1.. {
            let Some(entry) = self.entry(next).await? else { break };
            if entry.columns.is_some() {
                return Self::read(&self.storage, self.kind).await;
            }
            newer.replace(&entry.removes, entry.adds);
            newer.version = Some(next);
        }
        Ok(newer)
    }

    /// The version; `None` if there is no table.
    #[must_use]
    pub const fn version(&self) -> Option<u64> {
        self.version
    }

    /// The kind of the table's rows, with the columns that it has got by that version.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The active files, by path.
    pub fn files(&self) -> impl Iterator<Item = &TableFile> {
        self.files.values()
    }

    async fn entry(&self, version: u64) -> Result<Option<Entry>> {
        let kind = self.kind;
        let store = self.storage.table_store(kind);
        let Some(bytes) = read_entry(store.as_ref(), kind, version).await? else { return Ok(None) };
        let wrong =
            |detail: &str| unusable(kind, "reading a log entry", &format!("version {version}: {detail}"));
        let entry = Entry::parse(kind, "", &bytes).map_err(|detail| wrong(&detail))?;
        check_entry(kind, &entry)?;
        Ok(Some(entry))
    }

    fn replace(&mut self, removes: &[String], adds: Vec<TableFile>) {
        let files = Arc::make_mut(&mut self.files);
        for path in removes {
            files.remove(path);
        }
        files.extend(adds.into_iter().map(|file| (file.path.clone(), file)));
    }
}
