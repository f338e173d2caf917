//! A local folder as an object store whose objects survive a power cut.
//!
//! `object_store`'s own does not sync: after a power cut an acknowledged log entry could be empty or
//! gone. Here bytes are on disk before their name is, and the name is before the put returns.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use crate::config::LocalAccess;
use crate::error::{Policy, Verdict};

/// Name of the folder that holds a table's log.
const LOG_FOLDER: &str = "_delta_log";

/// The file systems of this machine, written durably, as long as the archive's folder is the one that
/// was there at first.
#[derive(Debug)]
pub(in crate::archive) struct SyncedLocal {
    inner: Arc<LocalFileSystem>,
    root: Root,
}

impl SyncedLocal {
    /// A store for what is in `folder`, which must exist. Paths are those of the whole file system.
    pub(in crate::archive) fn open(folder: &FilePath, access: LocalAccess) -> io::Result<Self> {
        Ok(Self { inner: Arc::new(LocalFileSystem::new()), root: Root::open(folder, access)? })
    }

    /// What tells the folder from another that comes to have its path.
    pub(in crate::archive) fn identity(&self) -> String {
        let (device, inode) = self.root.identity;
        format!("device {device}, inode {inode}")
    }
}

/// Removes files of a folder, by their names and ages.
pub(in crate::archive) fn remove_leftovers(
    folder: &FilePath,
    is_leftover: &dyn Fn(&str) -> bool,
    is_old: &dyn Fn(Option<Duration>) -> bool,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_leftover) {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if is_old(modified.ok().and_then(|modified| modified.elapsed().ok())) {
                match fs::remove_file(entry.path()) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// The archive's folder. Where a volume was unmounted, or the folder moved, its path may still be there,
/// or come to be there: what is written to it then is not part of the archive.
#[derive(Clone, Debug)]
struct Root {
    folder: Arc<FilePath>,
    /// Device and inode. Some file systems have another device number after they are mounted anew; then
    /// it takes a restart to go on.
    identity: (u64, u64),
    access: LocalAccess,
}

impl Root {
    fn open(folder: &FilePath, access: LocalAccess) -> io::Result<Self> {
        Ok(Self { folder: folder.into(), identity: identity(folder)?, access })
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
                create_one(&folder, self.access)?;
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
    let detail = format!("{}: {source}", path.display());
    if is_unsupported(&source) {
        let advice = "put the archive on a file system that has hard links (or renames that replace nothing) and can sync \
                      folders, such as ext4, XFS, Btrfs, ZFS or NFS, or into an object store";
        let source = Verdict { detail, policy: Policy::Stop { advice } };
        return Error::NotSupported { source: Box::new(source) };
    }
    Error::Generic { store: "local", source: Box::new(io::Error::new(source.kind(), detail)) }
}

/// Whether a file system lacks what it was asked for: EINVAL, ENOSYS, ENOTSUP.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|source| Error::JoinError { source })?
}

/// Makes a folder and its missing ancestors; each new name is synced into its parent.
pub(in crate::archive) fn create_folder(folder: &FilePath, access: LocalAccess) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        create_folder(parent, access)?;
    }
    create_one(folder, access)
}

fn create_one(folder: &FilePath, access: LocalAccess) -> io::Result<()> {
    match DirBuilder::new().mode(access.folder_mode()).create(folder) {
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
    let Some(parent) = path.parent() else { return Ok(()) };
    let folder = File::open(parent)?;
    match sync_folder(&folder, parent) {
        // SMB and some mounts can't sync a folder, but all that they hold.
        Err(error) if is_unsupported(&error) => sync_file_system(&folder, parent).map_err(|_| {
            let detail =
                format!("the folder {} can't be synced, nor its file system ({error})", parent.display());
            io::Error::new(io::ErrorKind::Unsupported, detail)
        }),
        result => result,
    }
}

fn sync_folder(folder: &File, _path: &FilePath) -> io::Result<()> {
    #[cfg(test)]
    tests::fail_if_lacking(tests::Ability::SyncFolder, _path)?;
    folder.sync_all()
}

/// Syncs the whole file system of a folder.
#[cfg(target_os = "linux")]
fn sync_file_system(folder: &File, _path: &FilePath) -> io::Result<()> {
    #[cfg(test)]
    tests::fail_if_lacking(tests::Ability::SyncFileSystem, _path)?;
    Ok(rustix::fs::syncfs(folder)?)
}

/// Gives a file a name that nobody has, or fails with [`io::ErrorKind::AlreadyExists`].
fn rename_new(staging: &FilePath, target: &FilePath) -> io::Result<()> {
    match link(staging, target) {
        Ok(()) => {
            // Left behind at worst: nothing reads it.
            let _ = fs::remove_file(staging);
            Ok(())
        }
        // SMB, FAT and some FUSE and container mounts have no hard links (link(2): EPERM).
        Err(error) if is_unsupported(&error) || error.kind() == io::ErrorKind::PermissionDenied => {
            rename_noreplace(staging, target).map_err(|second| match second.kind() {
                io::ErrorKind::AlreadyExists => second,
                kind => {
                    let kind = if is_unsupported(&second) { io::ErrorKind::Unsupported } else { kind };
                    let detail = format!(
                        "a name can't be given just once: no hard link ({error}), nor a rename ({second})"
                    );
                    io::Error::new(kind, detail)
                }
            })
        }
        Err(error) => Err(error),
    }
}

fn link(staging: &FilePath, target: &FilePath) -> io::Result<()> {
    #[cfg(test)]
    tests::fail_if_lacking(tests::Ability::Link, target)?;
    fs::hard_link(staging, target)
}

#[cfg(target_os = "linux")]
fn rename_noreplace(staging: &FilePath, target: &FilePath) -> io::Result<()> {
    #[cfg(test)]
    tests::fail_if_lacking(tests::Ability::RenameNew, target)?;
    use rustix::fs::{CWD, RenameFlags, renameat_with, statfs};
    // Linux asks an SMB server for a rename that replaces: another machine's name would be lost (fs/smb/client).
    const SMB: [i64; 3] = [0xFF53_4D42, 0xFE53_4D42, 0x517B];
    let folder = target.parent().unwrap_or(target);
    if SMB.contains(&statfs(folder)?.f_type) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(renameat_with(CWD, staging, CWD, target, RenameFlags::NOREPLACE)?)
}

#[cfg(not(target_os = "linux"))]
fn sync_file_system(_: &File, _: &FilePath) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(not(target_os = "linux"))]
fn rename_noreplace(_: &FilePath, _: &FilePath) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

fn write_synced(staging: &FilePath, payload: &PutPayload, access: LocalAccess) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(access.file_mode()).open(staging)?;
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
    let named = write_synced(&staging, payload, root.access)
        .and_then(|()| root.check())
        .and_then(|()| if create { rename_new(&staging, target) } else { fs::rename(&staging, target) });
    if named.is_err() {
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
            let sync = |file: File| {
                // `object_store` made it as the umask says.
                if root.access == LocalAccess::Owner {
                    file.set_permissions(Permissions::from_mode(root.access.file_mode()))?;
                }
                file.sync_all()
            };
            let synced = File::open(&target).and_then(sync).and_then(|()| sync_parent(&target));
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
pub(in crate::archive) mod tests;
