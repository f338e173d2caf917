use chrono::Utc;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use super::encode::EncodedFile;
use super::stats::FileStats;
use super::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::tables::Kind;
use crate::{Error, Result, failpoint};

/// A file in storage that no log entry names yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Path relative to the table.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// When it was uploaded, milliseconds since the epoch.
    pub modified_millis: i64,
    /// What it holds.
    pub stats: FileStats,
}

impl DataFile {
    /// The file as an entry of the table's log has it.
    pub(in crate::archive) fn to_table_file(&self, kind: Kind) -> TableFile {
        let stats = Some(self.stats.to_delta_json(kind));
        let mut file = TableFile::new(kind, self.path.clone(), self.size, self.modified_millis, stats);
        file.max_time = Some(self.stats.max_time);
        file
    }
}

/// Uploads a file under a name from a [`Namer`](crate::archive::Namer). Durable on return; an orphan until a commit
/// names it.
///
/// # Errors
///
/// [`Error::Storage`]; the upload may be repeated with the same name.
pub async fn upload(storage: &Storage, kind: Kind, path: String, file: EncodedFile) -> Result<DataFile> {
    let store = storage.table_store(kind);
    let size = file.bytes.len() as u64;
    put(store.as_ref(), &Path::from(path.as_str()), file.bytes)
        .await
        .map_err(Error::storage(format!("uploading {}{path}", storage.table_url(kind))))?;
    failpoint::hit("after-upload");
    Ok(DataFile { path, size, modified_millis: Utc::now().timestamp_millis(), stats: file.stats })
}

async fn put(store: &dyn ObjectStore, path: &Path, bytes: bytes::Bytes) -> object_store::Result<()> {
    let size = bytes.len() as u64;
    match store.put_opts(path, bytes.clone().into(), PutMode::Create.into()).await {
        Ok(_) => Ok(()),
        // Nobody else has this name: an earlier try of this very upload has landed.
        Err(object_store::Error::AlreadyExists { .. }) if store.head(path).await?.size == size => Ok(()),
        Err(object_store::Error::AlreadyExists { .. } | object_store::Error::NotImplemented { .. }) => {
            store.put_opts(path, bytes.into(), PutMode::Overwrite.into()).await.map(drop)
        }
        Err(error) => Err(error),
    }
}
