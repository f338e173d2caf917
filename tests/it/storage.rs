//! Storage that fails for a while: the stream waits, the connection lives, memory stays bounded.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::tmpfs::{Tmpfs, run};
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(120);

/// Several times the `wal_sender_timeout` of the test, so that unanswered keepalives would be noticed.
const OUTAGE: Duration = Duration::from_secs(25);

const RESIDENT_MAX: u64 = 400 << 20;

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
    load.goes_on(5_000, DEADLINE).await;

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
    stage.acknowledged(&client, target, DEADLINE).await;
    crate::support::archive::assert_same(&client, storage, stage.shape).await;
}

const SETTINGS: [(&str, &str); 1] = [("wal_sender_timeout", "5s")];

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_read_only_for_a_while() {
    let stage = Stage::private(Shape::Named, &SETTINGS).await;
    let storage = stage.folder().join("fragile");
    let tmpfs = Tmpfs::mount(&storage, "512m");
    outage(&stage, &storage, || tmpfs.remount("ro"), || tmpfs.remount("rw")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_full_for_a_while() {
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

/// Who wants to stop must not have to wait for storage; what is not archived stays where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_an_outage_ends_and_loses_nothing() {
    let stage = Stage::private(Shape::Named, &SETTINGS).await;
    let storage = stage.folder().join("fragile");
    let tmpfs = Tmpfs::mount(&storage, "512m");
    let launch = stage.launch().with("SCOUTER_STORAGE_URI", &storage.display().to_string());
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let load = Load::start(&stage.cluster().uri_tcp(&stage.name), stage.shape);
    load.goes_on(5_000, DEADLINE).await;
    tmpfs.remount("ro");
    let failing = async || sidecar.log().contains("failed; rows wait").then_some(());
    until("the outage is noticed", DEADLINE, failing).await;

    let status = sidecar.terminate(Duration::from_secs(60)).await;
    assert!(!status.success(), "a stop that left rows behind says so: {status}");
    assert!(sidecar.log().contains("still in Postgres"), "{}", sidecar.log());

    load.stop().await;
    tmpfs.remount("rw");
    let successor = launch.start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "last", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    crate::support::archive::assert_same(&client, &storage, stage.shape).await;
    drop(successor);
}
