//! Opening an archive: the newest version of each table's log, or of one.

use std::sync::{Arc, RwLock};

use super::version::{Found, Tables, all_of, find};
use super::{Archive, Shared};
use crate::archive::{self, Storage};
use crate::config::ObjectStorageSettings;
use crate::tables::Kind;
use crate::{Error, Result};

impl Archive {
    /// Opens the archive at a storage URI at its newest version. Nothing is written.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if there is no archive, [`Error::Storage`] and [`Error::Delta`] if it can't be read.
    pub async fn open(settings: &ObjectStorageSettings) -> Result<Self> {
        Self::open_within(settings, archive::MEMORY_BYTES).await
    }

    /// The same with so many bytes of memory for what all queries of it sort, group and join; what doesn't fit goes to disk,
    /// or ends the query.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`].
    pub async fn open_within(settings: &ObjectStorageSettings, memory_bytes: usize) -> Result<Self> {
        Self::new(Storage::open_existing(settings)?, memory_bytes).await
    }

    /// The same for queries of one table: only its log is read, which saves the requests for those of all others. A table that the archive
    /// does not have is missed by the first query.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`].
    pub async fn open_table(
        settings: &ObjectStorageSettings,
        table: &str,
        memory_bytes: usize,
    ) -> Result<Self> {
        Self::of_table(Storage::open_existing(settings)?, table, memory_bytes).await
    }

    pub(super) async fn of_table(storage: Storage, table: &str, memory_bytes: usize) -> Result<Self> {
        let built_in = Kind::built_in().iter().find(|kind| kind.name() == table).copied();
        let kind = match built_in {
            Some(kind) => Some(kind),
            None => archive::described(&storage, table).await?,
        };
        if let Some(kind) = kind {
            let found = find(&storage, kind).await?;
            if found.as_ref().is_ok_and(|view| view.version().is_some()) {
                return Self::of(storage, vec![found], memory_bytes);
            }
        }
        // Whoever asks is told what there is.
        Self::new(storage, memory_bytes).await
    }

    /// The same in a storage that is open already: over a store of your own, say, that counts, caches or limits requests.
    ///
    /// # Errors
    ///
    /// As [`Archive::open`].
    pub async fn open_in(storage: Storage) -> Result<Self> {
        Self::new(storage, archive::MEMORY_BYTES).await
    }

    /// The same with so many bytes of memory for its queries.
    pub(crate) async fn open_in_within(storage: Storage, memory_bytes: usize) -> Result<Self> {
        Self::new(storage, memory_bytes).await
    }

    async fn new(storage: Storage, memory_bytes: usize) -> Result<Self> {
        let mut kinds = Kind::built_in().to_vec();
        for found in archive::described_tables(&storage).await? {
            match found {
                Ok(kind) => kinds.push(kind),
                Err(error) => tracing::warn!("{}; the other tables can be read", error.chain()),
            }
        }
        let views = all_of(kinds.into_iter().map(|kind| find(&storage, kind))).await?;
        if views.iter().all(|view| view.as_ref().is_ok_and(|view| view.version().is_none())) {
            return Err(archive::nothing_in(storage.url()));
        }
        Self::of(storage, views, memory_bytes)
    }

    fn of(storage: Storage, views: Vec<Found>, memory_bytes: usize) -> Result<Self> {
        let runtime = archive::runtime(&storage, memory_bytes).map_err(Error::query("preparing to read"))?;
        let tables = RwLock::new(Arc::new(Tables::new(views, &runtime, memory_bytes)?));
        let refreshing = tokio::sync::Mutex::new(());
        let shared = Shared { storage, runtime, memory_bytes, tables, refreshing };
        Ok(Self { shared: Arc::new(shared), database: None })
    }
}
