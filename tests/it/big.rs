//! One transaction many times larger than memory.

use std::time::Duration;

use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const ROWS: u32 = 3_000_000;

const RESIDENT_MAX: u64 = 400 << 20;

const DEADLINE: Duration = Duration::from_secs(420);

#[tokio::test(flavor = "multi_thread")]
async fn three_million_rows_in_one_transaction_keep_to_the_memory() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MEMORY", "64MiB");
    launch.must(&["setup"]);
    let client = stage.connect().await;
    let sql = format!(
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select now() - n % 7200 * interval '1 second' + n * interval '1 microsecond', 'big', 'model ' || n % 20,
                '1.0.0', 'feature ' || n % 11, n % 10, n % 977
           from generate_series(1, {ROWS}) n"
    );
    client.batch_execute(&sql).await.expect("insert");

    // Killed half-way: once pieces of the transaction are uploaded, and none is named in a log.
    let mut sidecar = launch.start();
    let has_pieces = async || (parquet_files(&stage.storage().join("psi")) > 2).then_some(());
    until("pieces of the transaction are uploaded", DEADLINE, has_pieces).await;
    assert!(sidecar.resident_bytes_max() < RESIDENT_MAX, "{} bytes", sidecar.resident_bytes_max());
    sidecar.kill();

    let mut sidecar = launch.start();
    stage.assert_archived(DEADLINE).await;
    let most = sidecar.resident_bytes_max();
    eprintln!("most resident memory: {} MB", most >> 20);
    assert!(most < RESIDENT_MAX, "{most} bytes");
    assert!(sidecar.terminate(Duration::from_secs(30)).await.success());
}

fn parquet_files(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let count = |entry: std::fs::DirEntry| match entry.path() {
        path if path.ends_with("_delta_log") => 0,
        path if path.is_dir() => parquet_files(&path),
        path => usize::from(path.extension().is_some_and(|extension| extension == "parquet")),
    };
    entries.map(count).sum()
}
