//! A database and an archive that an earlier build has made go on working.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::support::archive::{archived_rows, files};
use crate::support::cluster::Cluster;
use crate::support::sidecar::Launch;
use crate::support::stage::archived;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// The server, its archive's folder, and how to start the sidecar on both.
fn unpacked(fixture: &str) -> (Cluster, TempDir, Launch) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::Builder::new().prefix("highwater-earlier-").tempdir().unwrap();
    // Whoever has no `xz` has Python.
    let python = root.join("target/reader/bin/python");
    assert!(python.exists(), "{} is missing: run `scripts/setup reader`", python.display());
    let archive = root.join("tests/fixtures").join(fixture);
    let status =
        Command::new(python).args(["-m", "tarfile", "-e"]).arg(archive).arg(folder.path()).status().unwrap();
    assert!(status.success());
    let cluster = Cluster::of_data(&folder.path().join("data"));
    let storage = folder.path().join("archive");
    let launch = Launch::new(&cluster.uri_unix("old"), &storage, "old", &folder.path().join("log"))
        .with("HIGHWATER_MAX_LAG", "1s")
        .with("HIGHWATER_VERIFY_HOURS", "none");
    (cluster, folder, launch)
}

fn rows(storage: &Path) -> [usize; 4] {
    ["custom", "psi", "spc", "quarantine"].map(|folder| archived_rows(&storage.join(folder)).len())
}

fn verified(launch: &Launch) -> Value {
    let output = launch.output(&["verify", "--format", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    report
}

async fn is_gone(client: &Client, table: &str) -> bool {
    client.query_one("select to_regclass($1) is null", &[&table]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_archived_when_the_schema_had_version_9_is_not_archived_again() {
    let (cluster, folder, launch) = unpacked("schema_9.tar.xz");
    let client = cluster.connect("old").await;
    let storage = folder.path().join("archive");
    assert_eq!(rows(&storage), [350, 300, 200, 1]);
    let before = files(&storage.join("psi")).unwrap();

    let refused = launch.output(&["run"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("run `highwater setup`"), "{said}");
    let done = launch.must(&["setup"]);
    assert!(done.contains("migrated schema highwater: V10__time_column"), "{done}");
    assert!(!done.contains("gap") && !done.contains("made the watermark"), "{done}");

    let mut sidecar = launch.start();
    archived(&client).await;
    assert_eq!(rows(&storage), [351, 370, 200, 1]);
    for file in before {
        assert!(files(&storage.join("psi")).unwrap().contains(&file), "{} was written anew", file.display());
    }
    assert!(!sidecar.log().contains("making the archive complete"), "{}", sidecar.log());
    verified(&launch);

    // What is new works on it, too.
    client
        .batch_execute(
            "alter table scouter.spc_drift add column note text;
             insert into scouter.spc_drift (feature, value, entity_id, note) values ('f1', 1, 1, 'new')",
        )
        .await
        .unwrap();
    archived(&client).await;
    let answer =
        launch.must(&["sql", "select count(*) as n from spc where note = 'new'", "--format", "json"]);
    assert!(answer.contains("1"), "{answer}");
    verified(&launch);
    until("the old partition to be purged", DEADLINE, async || {
        drop(launch.output(&["purge"]));
        is_gone(&client, "scouter.custom_drift_202405").await.then_some(())
    })
    .await;
    assert_eq!(rows(&storage), [351, 370, 201, 1]);
    verified(&launch);
    sidecar.kill();
}
