//! What keeps a table fast to open and free of waste: log checkpoints, trimming, vacuum.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use chrono::Utc;
use deltalake_core::checkpoints::{cleanup_metadata, create_checkpoint};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;

use crate::archive::files::name::Namer;
use crate::archive::files::name::ObjectName;
use crate::archive::log::entry::CHECKPOINT_INTERVAL;
use crate::archive::log::open::open_delta;
use crate::archive::log::table::Table;
use crate::{Error, Result};

/// Versions to wait before a log checkpoint that failed is tried again.
const RETRY_AFTER: u64 = 10;

/// No put takes this long: what it wrote under another name first was left by a crash.
const STAGING_AGE: Duration = Duration::from_hours(24);

impl Table {
    /// Writes a checkpoint of the log when 100 versions have come since the last one, and removes what it
    /// makes superfluous once that is an hour old. A failure is logged, and tried again some versions
    /// later: nothing but speed depends on it. Wants a multi-threaded runtime.
    pub async fn maintain(&mut self) {
        if self.version().saturating_sub(self.checkpoint_version) < CHECKPOINT_INTERVAL {
            return;
        }
        match self.checkpoint().await {
            Ok(version) => self.checkpoint_version = version,
            Err(error) => {
                tracing::warn!(
                    table = self.kind().name(),
                    error = error.chain(),
                    "the log was not checkpointed"
                );
                self.checkpoint_version = (self.version() + RETRY_AFTER).saturating_sub(CHECKPOINT_INTERVAL);
            }
        }
    }

    async fn checkpoint(&self) -> Result<u64> {
        let delta = open_delta(self.storage(), self.kind()).await?;
        let failed = || Error::delta(self.kind(), "checkpointing the log");
        create_checkpoint(&delta, None).await.map_err(failed())?;
        let trimmed = match self.keeps_history() {
            true => 0,
            false => cleanup_metadata(&delta, None).await.map_err(failed())?,
        };
        let version = delta.version().unwrap_or_default();
        tracing::debug!(table = self.kind().name(), version, trimmed, "checkpointed the log");
        Ok(version)
    }

    /// Keeps every version, and the files that are not active any more, until then: somebody has taken rows out of the table,
    /// and may want to go back.
    pub fn keep_history(&mut self, until: SystemTime) {
        self.history_kept_until = self.history_kept_until.max(Some(until));
    }

    fn keeps_history(&self) -> bool {
        self.history_kept_until.is_some_and(|until| until > SystemTime::now())
    }

    /// Deletes the objects that no reader can need: older than `older_than`, not active, and not removed from
    /// the table within `older_than`. Only what has a name of ours, or was a file of the table, is deleted, and
    /// nothing in a folder whose name starts with `_` or a dot, or that a link leads to. Files that `namer`'s session uploaded stay, since a commit of that
    /// session may still name them. Returns how many were deleted.
    ///
    /// # Errors
    ///
    /// [`Error::Fenced`] if another session has claimed the table; [`Error::Storage`] and [`Error::Delta`]
    /// if the table can't be read or an object not deleted; it may be repeated.
    pub async fn vacuum(&mut self, namer: &Namer, older_than: Duration) -> Result<u64> {
        self.look().await?;
        if self.keeps_history() {
            return Ok(0);
        }
        let delta = open_delta(self.storage(), self.kind()).await?;
        let horizon =
            Utc::now().timestamp_millis() - i64::try_from(older_than.as_millis()).unwrap_or(i64::MAX);
        let failed = || Error::delta(self.kind(), "reading the log for vacuum");
        let state = delta.snapshot().map_err(failed())?;
        let mut kept: HashSet<String> =
            state.log_data().iter().map(|file| file.object_store_path().to_string()).collect();
        let mut removed = HashSet::new();
        let log_store = delta.log_store();
        let mut tombstones = state.all_tombstones(log_store.as_ref());
        while let Some(tombstone) = tombstones.try_next().await.map_err(failed())? {
            // A tombstone without a time could be of this minute.
            if tombstone.deletion_timestamp().is_none_or(|deleted| deleted > horizon) {
                kept.insert(tombstone.path().into_owned());
            } else {
                removed.insert(tombstone.path().into_owned());
            }
        }
        let store = self.store();
        let doomed = |object: &object_store::ObjectMeta| {
            let path = object.location.as_ref();
            let was_file = match ObjectName::parse(path) {
                Some(name) => !namer.is_ours(&name),
                None => removed.contains(path) && !is_hidden(path),
            };
            was_file && object.last_modified.timestamp_millis() < horizon && !kept.contains(path)
        };
        let failed = || Error::storage(format!("vacuuming {}", self.storage().table_url(self.kind())));
        let mut paths = Vec::new();
        let mut objects = store.list(None);
        while let Some(object) = objects.try_next().await.map_err(failed())? {
            if doomed(&object) && !self.is_linked(&object.location) {
                paths.push(Ok(object.location));
            }
        }
        let deletions = store.delete_stream(futures::stream::iter(paths).boxed());
        let deleted = deletions.try_fold(0, async |count, _| Ok(count + 1)).await;
        let deleted = deleted.map_err(failed())?;
        Ok(deleted + self.remove_staging().await)
    }
}

impl Table {
    /// Whether a link leads to an object of a local folder: it is in another place, which may have other owners.
    fn is_linked(&self, object: &object_store::path::Path) -> bool {
        let url = self.storage().table_url(self.kind());
        let Some(mut path) = (url.scheme() == "file").then(|| url.to_file_path().ok()).flatten() else {
            return false;
        };
        object.parts().any(|part| {
            path.push(part.as_ref());
            // What is not to be seen is left alone, too.
            fs::symlink_metadata(&path).map_or(true, |metadata| metadata.is_symlink())
        })
    }

    /// Removes what puts into a local folder left behind when their process was killed; other stores have
    /// nothing of the kind.
    async fn remove_staging(&self) -> u64 {
        let url = self.storage().table_url(self.kind());
        let Some(folder) = (url.scheme() == "file").then(|| url.to_file_path().ok()).flatten() else {
            return 0;
        };
        let remove = move || {
            let mut removed = 0;
            if let Err(error) = remove_staging(&folder, "", &mut removed) {
                tracing::debug!(%error, "{} was not cleared of staging files", folder.display());
            }
            removed
        };
        tokio::task::spawn_blocking(remove).await.unwrap_or_default()
    }
}

fn remove_staging(folder: &Path, prefix: &str, removed: &mut u64) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let path = format!("{prefix}{name}");
        let kind = entry.file_type()?;
        // Our files are in folders of digits, and nothing else is looked into.
        if kind.is_dir() && name.bytes().all(|byte| byte.is_ascii_digit()) {
            remove_staging(&entry.path(), &format!("{path}/"), removed)?;
        }
        let is_staging = path.rsplit_once('#').is_some_and(|(target, digits)| {
            digits.bytes().all(|byte| byte.is_ascii_digit()) && ObjectName::parse(target).is_some()
        });
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
        if kind.is_file() && is_staging && age > STAGING_AGE {
            fs::remove_file(entry.path())?;
            *removed += 1;
        }
    }
    Ok(())
}

/// Whether a folder of the path is one that Delta readers and writers leave alone.
fn is_hidden(path: &str) -> bool {
    let folders = path.rsplit_once('/').map_or("", |(folders, _)| folders);
    folders.split('/').any(|folder| folder.starts_with(['_', '.']))
}
