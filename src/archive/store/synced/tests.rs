use std::collections::BTreeMap;
use std::sync::Mutex;

use object_store::ObjectStoreExt;

use super::*;
use crate::archive::Storage;
use crate::config::ObjectStorageSettings;
use crate::tables::Kind;

/// What a file system may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::archive) enum Ability {
    Link,
    RenameNew,
    SyncFolder,
    SyncFileSystem,
}

/// Folders below which something is lacking.
static LACKING: Mutex<Vec<(Ability, PathBuf)>> = Mutex::new(Vec::new());

/// As link(2), rename(2) and fsync(2) have it.
pub(in crate::archive) fn fail_if_lacking(ability: Ability, path: &FilePath) -> io::Result<()> {
    let lacking = LACKING.lock().unwrap();
    match lacking.iter().any(|(lacks, folder)| *lacks == ability && path.starts_with(folder)) {
        true => Err(io::Error::from_raw_os_error(if ability == Ability::Link { 1 } else { 22 })),
        false => Ok(()),
    }
}

/// An archive on a file system that lacks something, and what a first proof makes of it.
async fn proved_without(abilities: &[Ability]) -> (tempfile::TempDir, Storage, crate::Result<()>) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    LACKING.lock().unwrap().extend(abilities.iter().map(|ability| (*ability, root.clone())));
    let settings = ObjectStorageSettings::new(root.to_str().unwrap(), "").unwrap();
    let storage = Storage::open(&settings).unwrap();
    let proved = storage.prove_once().await;
    (folder, storage, proved)
}

fn names(folder: &FilePath) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    fs::read_dir(folder).unwrap().map(name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_file_system_lacks_has_another_way() {
    for lacking in [Ability::Link, Ability::SyncFolder] {
        let (folder, storage, proved) = proved_without(&[lacking]).await;
        proved.unwrap();
        assert_eq!(names(folder.path()), ["_highwater.json"], "without {lacking:?}");
        let store = storage.table_store(Kind::psi());
        let path = Path::from("_delta_log/00000000000000000000.json");
        let create = |text: &'static str| store.put_opts(&path, text.into(), PutMode::Create.into());
        create("first").await.unwrap();
        assert!(matches!(create("second").await, Err(Error::AlreadyExists { .. })));
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "first");
        assert_eq!(names(&folder.path().join("psi/_delta_log")).len(), 1, "without {lacking:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_lacks_both_ways_is_refused() {
    for (lacking, says) in [
        ([Ability::Link, Ability::RenameNew], "no hard link"),
        ([Ability::SyncFolder, Ability::SyncFileSystem], "can't be synced"),
    ] {
        let (folder, _, proved) = proved_without(&lacking).await;
        let error = proved.unwrap_err();
        assert!(error.chain().contains(says) && !error.is_transient(), "{}", error.chain());
        assert_eq!(names(folder.path()), [] as [&str; 0], "without {lacking:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_probe_left_is_removed_once_it_is_old() {
    let (folder, storage, _) = proved_without(&[]).await;
    let old = std::time::SystemTime::now() - Duration::from_mins(3);
    for name in ["_highwater-probe-1", "_highwater-probe-2#7", "highwater-probe-3", "_highwater.json#5"] {
        File::create(folder.path().join(name)).unwrap().set_modified(old).unwrap();
    }
    File::create(folder.path().join("_highwater-probe-young")).unwrap();
    File::create(folder.path().join("mine")).unwrap().set_modified(old).unwrap();
    storage.probe().await.unwrap();
    let mut left = names(folder.path());
    left.sort();
    assert_eq!(left, ["_highwater-probe-young", "_highwater.json", "mine"]);
}

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

pub(in crate::archive) fn fail_if_told(path: &FilePath) -> io::Result<()> {
    let mut failures = FAILURES.lock().unwrap();
    match path.parent().and_then(|folder| failures.get_mut(folder)) {
        Some(left) if *left > 0 => {
            *left -= 1;
            Err(io::Error::other("told to fail"))
        }
        _ => Ok(()),
    }
}
