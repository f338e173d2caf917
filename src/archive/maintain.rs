//! What keeps a table fast to open and free of waste: log checkpoints, trimming, vacuum.

use std::collections::HashSet;
use std::time::Duration;

use chrono::Utc;
use deltalake_core::checkpoints::{cleanup_metadata, create_checkpoint};
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;

use super::log::CHECKPOINT_INTERVAL;
use super::name::ObjectName;
use super::table::open_delta;
use super::{Namer, Table};
use crate::{Error, Result};

/// Versions to wait before a log checkpoint that failed is tried again.
const RETRY_AFTER: u64 = 10;

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
        let trimmed = cleanup_metadata(&delta, None).await.map_err(failed())?;
        let version = delta.version().unwrap_or_default();
        tracing::debug!(table = self.kind().name(), version, trimmed, "checkpointed the log");
        Ok(version)
    }

    /// Deletes the objects that no reader can need: older than `older_than`, not active, and not removed from
    /// the table within `older_than`. Only what has a name of ours, or was a file of the table, is deleted, and
    /// nothing in a folder whose name starts with `_` or a dot. Files that `namer`'s session uploaded stay, since a commit of that
    /// session may still name them. Returns how many were deleted.
    ///
    /// # Errors
    ///
    /// [`Error::Fenced`] if another session has claimed the table; [`Error::Storage`] and [`Error::Delta`]
    /// if the table can't be read or an object not deleted; it may be repeated.
    pub async fn vacuum(&mut self, namer: &Namer, older_than: Duration) -> Result<u64> {
        self.check_claim().await?;
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
            if doomed(&object) {
                paths.push(Ok(object.location));
            }
        }
        let deletions = store.delete_stream(futures::stream::iter(paths).boxed());
        let deleted = deletions.try_fold(0, async |count, _| Ok(count + 1)).await;
        deleted.map_err(failed())
    }
}

/// Whether a folder of the path is one that Delta readers and writers leave alone.
fn is_hidden(path: &str) -> bool {
    let folders = path.rsplit_once('/').map_or("", |(folders, _)| folders);
    folders.split('/').any(|folder| folder.starts_with(['_', '.']))
}
