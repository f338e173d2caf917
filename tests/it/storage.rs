//! Storage that fails for a while: the stream waits, the connection lives, memory stays bounded.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(120);

/// Several times the `wal_sender_timeout` of the test, so that unanswered keepalives would be noticed.
const OUTAGE: Duration = Duration::from_secs(25);

const RESIDENT_MAX: u64 = 400 << 20;

/// A small file system of one's own; unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: &Path, size: &str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(path));
        Self(path.to_owned())
    }

    fn remount(&self, option: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(&self.0));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a sidecar may still have files open.
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Breaks the storage, watches the sidecar through the outage, mends it, compares all rows.
async fn outage(stage: &Stage, storage: &Path, break_it: impl FnOnce(), mend_it: impl FnOnce()) {
    let launch = stage
        .launch()
        .with("SCOUTER_STORAGE_URI", &storage.display().to_string())
        .with("HIGHWATER_MEMORY", "32MiB");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let load = Load::start(&stage.cluster().uri_tcp(&stage.name), stage.shape);
    let more = async || (load.committed() > 5_000).then_some(());
    until("the load goes on", DEADLINE, more).await;

    let client = stage.connect().await;
    break_it();
    // What was on its way when the storage broke is over after a moment; from then on one session holds.
    let holder = until("a sidecar holds the slot", DEADLINE, async || stage.holder(&client).await).await;
    throughout("the same connection, little memory", OUTAGE, async || {
        assert!(sidecar.ended().is_none(), "the sidecar ended\n{}", sidecar.log());
        assert!(sidecar.resident_bytes() < RESIDENT_MAX, "{} bytes", sidecar.resident_bytes());
        stage.holder(&client).await == Some(holder)
    })
    .await;
    load.stop().await;
    mend_it();
    let target = stage.insert_one(&client, "last", None).await;
    let acknowledged = async || (stage.confirmed(&client).await > target).then_some(());
    until("everything is acknowledged", DEADLINE, acknowledged).await;
    crate::support::archive::assert_same(&client, storage, stage.shape).await;
}

const SETTINGS: [(&str, &str); 1] = [("wal_sender_timeout", "5s")];

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_read_only_for_a_while() {
    let stage = Stage::private(Shape::Named, &SETTINGS).await;
    let storage = stage.folder().join("fragile");
    if is_root() {
        let tmpfs = Tmpfs::mount(&storage, "512m");
        outage(&stage, &storage, || tmpfs.remount("ro"), || tmpfs.remount("rw")).await;
        return;
    }
    // Rights don't bind root, and a plain user can't mount: each gets the failure it can have.
    std::fs::create_dir_all(&storage).unwrap();
    let chmod = |mode: &str| run(Command::new("chmod").args(["-R", mode]).arg(&storage));
    outage(&stage, &storage, || chmod("a-w"), || chmod("u+w")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_full_for_a_while() {
    if !is_root() {
        eprintln!("a full disk needs a mount, and that root; the read-only test covers the waiting");
        return;
    }
    let stage = Stage::private(Shape::Named, &SETTINGS).await;
    let storage = stage.folder().join("fragile");
    let tmpfs = Tmpfs::mount(&storage, "64m");
    let filler = storage.join("filler");
    let fill = || {
        // dd ends with an error when the disk is full, as it is meant to.
        let dd = format!("dd if=/dev/zero of={} bs=64k 2>/dev/null || true", filler.display());
        run(Command::new("sh").args(["-c", &dd]));
    };
    let free = || {
        std::fs::remove_file(&filler).unwrap();
        tmpfs.remount("size=512m");
    };
    outage(&stage, &storage, fill, free).await;
}
