//! The files of a window that has ended become one, and nobody who reads notices anything but speed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::{archived_rows, compare_rows, files};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

/// Housekeeping comes every ten seconds, and takes one window after the other.
const DEADLINE: Duration = Duration::from_secs(90);

/// Windows of the past hour, in minutes before now: each has ended long ago.
const WINDOWS: [i32; 3] = [60, 50, 40];

/// One row in each window, one metric in a window at a time; a checkpoint of its own.
async fn insert_and_wait(stage: &Stage, client: &Client, round: i32) {
    let sql = "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
               select date_trunc('minute', now()) - minutes * interval '1 minute'
                          + $1::int * interval '1 millisecond',
                      's', 'n' || $1::int % 3, '1', 'm', $1::int
                 from unnest($2::int[]) minutes";
    client.execute(sql, &[&round, &WINDOWS.to_vec()]).await.unwrap();
    let target = stage.insert_one(client, "now", Some(f64::from(round))).await;
    stage.acknowledged(client, target, DEADLINE).await;
}

/// How many files each window has, by the front of their names, which says the window.
fn files_by_window(table: &Path) -> BTreeMap<String, usize> {
    let mut windows = BTreeMap::new();
    for file in files(table).unwrap() {
        let name = file.strip_prefix(table).unwrap().display().to_string();
        let window = name.split(['-', '_']).next().unwrap_or_default().to_owned();
        *windows.entry(window).or_default() += 1;
    }
    windows
}

fn entries(table: &Path) -> usize {
    std::fs::read_dir(table.join("_delta_log")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_window_that_has_ended_become_one() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_WINDOW", "1m").with("HIGHWATER_MAX_LAG", "400ms");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    let table = stage.storage().join("custom");
    for round in 0..8 {
        insert_and_wait(&stage, &client, round).await;
    }
    let before = archived_rows(&table);
    assert_eq!(before.len(), 8 * (WINDOWS.len() + 1));
    let merged = async || files_by_window(&table).values().all(|count| *count == 1).then_some(());
    until("every window has one file", DEADLINE, merged).await;
    assert!(sidecar.log().contains("merged a window"), "{}", sidecar.log());
    let difference = compare_rows(&before, &archived_rows(&table));
    assert!(difference.is_none(), "{difference}");

    // Late rows make new files, which are merged later; also after a kill in between.
    insert_and_wait(&stage, &client, 100).await;
    sidecar.kill();
    let mut sidecar = launch.start();
    insert_and_wait(&stage, &client, 101).await;
    let late = archived_rows(&table);
    assert_eq!(late.len(), 10 * (WINDOWS.len() + 1));
    until("the late files are merged, too", DEADLINE, merged).await;
    let difference = compare_rows(&late, &archived_rows(&table));
    assert!(difference.is_none(), "{difference}");

    // The watermark counts what there is now.
    let counted = async || {
        let row = client
            .query_one(
                "select row_count, file_count from highwater.watermark
                  where source_table = 'scouter.custom_drift'",
                &[],
            )
            .await
            .unwrap();
        let count = (row.get::<_, i64>(0), row.get::<_, i64>(1));
        (count == (late.len() as i64, files(&table).unwrap().len() as i64)).then_some(())
    };
    until("the watermark knows the number of files", DEADLINE, counted).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    stage.assert_same().await;
}

/// Many checkpoints: the number of files stays that of the windows, and the log is cut off behind its
/// checkpoints.
#[tokio::test(flavor = "multi_thread")]
async fn files_and_log_entries_stay_bounded() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_WINDOW", "1m").with("HIGHWATER_MAX_LAG", "100ms");
    launch.must(&["setup"]);
    let sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    let table = stage.storage().join("custom");
    let mut files_max = 0;
    const ROUNDS: i32 = 150;
    let files_without_merging = ROUNDS as usize * (WINDOWS.len() + 1);
    for round in 0..ROUNDS {
        insert_and_wait(&stage, &client, round).await;
        files_max = files_max.max(files(&table).unwrap().len());
    }
    // A window's files are merged when there are many, even while more come.
    eprintln!("{ROUNDS} checkpoints: at most {files_max} files, {} log entries", entries(&table));
    let quiet = async || files_by_window(&table).values().all(|count| *count == 1).then_some(());
    until("every window has one file", DEADLINE, quiet).await;
    let checkpoint = async || {
        let mut names = std::fs::read_dir(table.join("_delta_log")).unwrap().flatten();
        names.any(|name| name.file_name().to_string_lossy().ends_with(".checkpoint.parquet")).then_some(())
    };
    until("the log has a checkpoint", DEADLINE, checkpoint).await;
    assert!(files_max < files_without_merging * 3 / 4, "{files_max} files\n{}", sidecar.log());
    stage.assert_same().await;
}
