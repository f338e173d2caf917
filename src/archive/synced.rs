//! A local folder as an object store whose objects survive a power cut.
//!
//! `object_store`'s own does not sync: after a power cut an acknowledged log entry could be empty or
//! gone. Here bytes are on disk before their name is, and the name is before the put returns.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// Name of the folder that holds a table's log.
const LOG_FOLDER: &str = "_delta_log";

/// The file systems of this machine, written durably, as long as the archive's folder is the one that
/// was there at first.
#[derive(Debug)]
pub(super) struct SyncedLocal {
    inner: Arc<LocalFileSystem>,
    root: Root,
}

impl SyncedLocal {
    /// A store for what is in `folder`, which must exist. Paths are those of the whole file system.
    pub(super) fn open(folder: &FilePath) -> io::Result<Self> {
        Ok(Self { inner: Arc::new(LocalFileSystem::new()), root: Root::open(folder)? })
    }
}

/// The archive's folder. Where a volume was unmounted, or the folder moved, its path may still be there,
/// or come to be there: what is written to it then is not part of the archive.
#[derive(Clone, Debug)]
struct Root {
    folder: Arc<FilePath>,
    /// Device and inode. Some file systems have another device number after they are mounted anew; then
    /// it takes a restart to go on.
    identity: (u64, u64),
}

impl Root {
    fn open(folder: &FilePath) -> io::Result<Self> {
        Ok(Self { folder: folder.into(), identity: identity(folder)? })
    }

    /// Makes sure that the path still leads to the folder that was opened.
    fn check(&self) -> io::Result<()> {
        let found = match identity(&self.folder) {
            Ok(found) if found == self.identity => return Ok(()),
            Ok(found) => format!("device and inode were {:?} and are {found:?}", self.identity),
            Err(error) => error.to_string(),
        };
        let detail = format!(
            "the storage folder {} was replaced or unmounted ({found}); nothing is written until it is back",
            self.folder.display()
        );
        Err(io::Error::new(io::ErrorKind::NotFound, detail))
    }

    /// Makes the folder that `target` goes to. Neither the archive's own folder nor that of a log that has
    /// begun is ever made: where it is missing, what was in it is missing, too.
    fn create_folder_of(&self, target: &FilePath) -> io::Result<()> {
        self.check()?;
        let Some(folder) = target.parent().filter(|folder| !folder.is_dir()) else { return Ok(()) };
        let is_log = folder.file_name().is_some_and(|name| name == LOG_FOLDER);
        if is_log && target.file_name().is_none_or(|name| name != FIRST_ENTRY) {
            let detail = format!("the log {} has vanished", folder.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, detail));
        }
        let inside = folder.strip_prefix(&self.folder).map_err(io::Error::other)?;
        let mut folder = self.folder.to_path_buf();
        for name in inside {
            folder.push(name);
            if !folder.is_dir() {
                create_one(&folder)?;
            }
        }
        Ok(())
    }
}

/// Name of a log's first entry.
const FIRST_ENTRY: &str = "00000000000000000000.json";

fn identity(folder: &FilePath) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(folder)?;
    Ok((metadata.dev(), metadata.ino()))
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
    create_one(folder)
}

fn create_one(folder: &FilePath) -> io::Result<()> {
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    // A folder that stayed would be taken for synced by the next try.
    sync_parent(folder).inspect_err(|_| drop(fs::remove_dir(folder)))
}

fn sync_parent(path: &FilePath) -> io::Result<()> {
    #[cfg(test)]
    tests::fail_if_told(path)?;
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
fn put_synced(root: &Root, target: &FilePath, payload: &PutPayload, create: bool) -> io::Result<()> {
    root.create_folder_of(target)?;
    // Names that end in # and digits are not listed by `LocalFileSystem`.
    let staging = PathBuf::from(format!("{}#{}", target.display(), rand::random::<u64>()));
    let named = write_synced(&staging, payload)
        .and_then(|()| root.check())
        .and_then(|()| if create { fs::hard_link(&staging, target) } else { fs::rename(&staging, target) });
    if create || named.is_err() {
        // Left behind at worst: nothing reads it.
        let _ = fs::remove_file(&staging);
    }
    // A name that is there already may be of an earlier try, which failed to sync it: whoever takes it for
    // its own relies on it.
    let exists = |error: &io::Error| create && error.kind() == io::ErrorKind::AlreadyExists;
    if named.as_ref().err().is_none_or(exists) {
        sync_parent(target)?;
        root.check()?;
    }
    named
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
        let (name, root) = (location.to_string(), self.root.clone());
        blocking(move || match put_synced(&root, &target, &payload, create) {
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
        let (file, root) = (target.clone(), self.root.clone());
        blocking(move || root.create_folder_of(&file).map_err(|source| generic(source, &file))).await?;
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(SyncedUpload { inner, target, root: self.root.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        // An entry that is not in the archive's own log says nothing of what has landed there.
        let root = self.root.clone();
        blocking(move || root.check().map_err(|source| generic(source, &root.folder))).await?;
        self.inner.get_opts(location, options).await
    }

    /// One after the other, since a disk asks nothing for a request: what lies between them is not read.
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let root = self.root.clone();
        blocking(move || root.check().map_err(|source| generic(source, &root.folder))).await?;
        self.inner.get_ranges(location, ranges).await
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
    root: Root,
}

#[async_trait]
impl MultipartUpload for SyncedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        let (target, root) = (self.target.clone(), self.root.clone());
        // Only log entries make a file count, so its name may come before its bytes.
        let sync = move || {
            let synced =
                File::open(&target).and_then(|file| file.sync_all()).and_then(|()| sync_parent(&target));
            synced.and_then(|()| root.check()).map_err(|source| generic(source, &target))
        };
        blocking(sync).await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// How many of the next syncs of names below a folder fail.
    static FAILURES: Mutex<BTreeMap<PathBuf, u32>> = Mutex::new(BTreeMap::new());

    /// Lets the next syncs of names in the folder fail.
    pub(in crate::archive) fn fail_syncs(folder: &FilePath, count: u32) {
        FAILURES.lock().unwrap().insert(folder.to_owned(), count);
    }

    /// How many of the failures that were asked for are still to come.
    pub(in crate::archive) fn failures_left(folder: &FilePath) -> u32 {
        FAILURES.lock().unwrap().get(folder).copied().unwrap_or_default()
    }

    pub(super) fn fail_if_told(path: &FilePath) -> io::Result<()> {
        let mut failures = FAILURES.lock().unwrap();
        match path.parent().and_then(|folder| failures.get_mut(folder)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                Err(io::Error::other("told to fail"))
            }
            _ => Ok(()),
        }
    }
}
