//! What a table remembers of others: what they took away, and files that are gone.

use super::entry::Entry;
use super::foreign::{ANY_TIME, ForeignRemoval, restoring};
use super::open::open_at;
use super::snapshot::table_files;
use super::table::Table;
use crate::archive::error::unusable;
use crate::archive::files::table_file::TableFile;
use crate::{Error, Result};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Requests about files under way at once.
const REQUESTS_MAX: usize = 16;

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

    /// What somebody took away of the table, and how to go back, for people.
    #[must_use]
    pub fn describe(&self, removal: &ForeignRemoval) -> String {
        if removal.is_return() {
            return format!(
                "version {} of the log of {} ({}, not by Highwater) has brought archived rows back; what was archived since may be \
                 missing: `highwater verify --repair` adds what Postgres still has",
                removal.version,
                self.kind().name(),
                removal.operation,
            );
        }
        let what = match removal.row_count {
            Some(count) if count > 0 => format!("has removed {count} archived rows"),
            Some(_) => "has changed archived rows".to_owned(),
            None => "may have removed archived rows".to_owned(),
        };
        let before = removal.version.saturating_sub(1);
        format!(
            "version {} of the log of {} ({}, not by Highwater) {what}; version {before} has them: `{}` brings them back (Python's \
             deltalake), then `highwater verify --repair` adds what was archived since; or that alone, which adds the rows that \
             Postgres still has",
            removal.version,
            self.kind().name(),
            removal.operation,
            restoring(self.storage(), self.kind(), before),
        )
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
