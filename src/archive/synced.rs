//! A local folder as an object store whose objects survive a power cut.
//!
//! `object_store`'s own does not sync: after a power cut an acknowledged log entry could be empty or
//! gone. Here bytes are on disk before their name is, and the name is before the put returns.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// The file systems of this machine, written durably.
#[derive(Debug)]
pub(super) struct SyncedLocal {
    inner: Arc<LocalFileSystem>,
}

impl SyncedLocal {
    pub(super) fn new() -> Self {
        Self { inner: Arc::new(LocalFileSystem::new()) }
    }
}

impl std::fmt::Display for SyncedLocal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SyncedLocal")
    }
}

fn generic(source: io::Error, path: &FilePath) -> Error {
    let source = Box::new(io::Error::new(source.kind(), format!("{}: {source}", path.display())));
    Error::Generic { store: "local", source }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::JoinError { source })?
}

/// Makes a folder and its missing ancestors; each new name is synced into its parent.
pub(super) fn create_folder(folder: &FilePath) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        create_folder(parent)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    sync_parent(folder)
}

fn sync_parent(path: &FilePath) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn write_synced(staging: &FilePath, payload: &PutPayload) -> io::Result<()> {
    let mut file = File::create_new(staging)?;
    for part in payload {
        file.write_all(part)?;
    }
    file.sync_all()
}

/// Writes the bytes beside the target, syncs them, and gives them their name in one step: a reader sees
/// all of them or none.
fn put_synced(target: &FilePath, payload: &PutPayload, create: bool) -> io::Result<()> {
    if let Some(folder) = target.parent() {
        create_folder(folder)?;
    }
    // Names that end in # and digits are not listed by `LocalFileSystem`.
    let staging = PathBuf::from(format!("{}#{}", target.display(), rand::random::<u64>()));
    let named = write_synced(&staging, payload)
        .and_then(|()| if create { fs::hard_link(&staging, target) } else { fs::rename(&staging, target) });
    if create || named.is_err() {
        // Left behind at worst: nothing reads it.
        let _ = fs::remove_file(&staging);
    }
    named.and_then(|()| sync_parent(target))
}

#[async_trait]
impl ObjectStore for SyncedLocal {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let create = match options.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => {
                return Err(Error::NotImplemented {
                    operation: "`put_opts` with mode `PutMode::Update`".to_owned(),
                    implementer: self.to_string(),
                });
            }
        };
        let target = self.inner.path_to_filesystem(location)?;
        let name = location.to_string();
        blocking(move || match put_synced(&target, &payload, create) {
            Ok(()) => Ok(PutResult { e_tag: None, version: None }),
            Err(source) if create && source.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::AlreadyExists { path: name, source: Box::new(source) })
            }
            Err(source) => Err(generic(source, &target)),
        })
        .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let target = self.inner.path_to_filesystem(location)?;
        let folder = target.parent().map(FilePath::to_path_buf);
        if let Some(folder) = folder {
            blocking(move || create_folder(&folder).map_err(|source| generic(source, &folder))).await?;
        }
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(SyncedUpload { inner, target }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct SyncedUpload {
    inner: Box<dyn MultipartUpload>,
    target: PathBuf,
}

#[async_trait]
impl MultipartUpload for SyncedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        let target = self.target.clone();
        // Only log entries make a file count, so its name may come before its bytes.
        let sync = move || {
            let synced =
                File::open(&target).and_then(|file| file.sync_all()).and_then(|()| sync_parent(&target));
            synced.map_err(|source| generic(source, &target))
        };
        blocking(sync).await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
