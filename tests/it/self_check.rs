//! The support of the tests must itself be right: a comparison that finds nothing proves nothing.

use std::time::Duration;

use crate::support::archive::{Multiset, archived_rows, compare_rows, each_source_row};
use crate::support::cluster::{Cluster, Stop};
use crate::support::load::{Load, create_entities};
use crate::support::schema::{KINDS, Shape};
use crate::support::stage::Stage;
use crate::support::wait::until;

fn rows(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn the_comparison_finds_missing_doubled_and_changed_rows() {
    let source = rows(&["a", "b", "b", "c"]);
    assert!(compare_rows(&source, &rows(&["b", "c", "a", "b"])).is_none());

    let missing = compare_rows(&source, &rows(&["a", "b", "c"]));
    assert_eq!((missing.missing, missing.extra, &missing.missing_rows), (1, 0, &rows(&["b"])));

    let doubled = compare_rows(&source, &rows(&["a", "b", "b", "c", "c"]));
    assert_eq!((doubled.missing, doubled.extra, &doubled.extra_rows), (0, 1, &rows(&["c"])));

    let changed = compare_rows(&source, &rows(&["a", "b", "b", "C"]));
    assert_eq!((changed.missing, changed.extra), (1, 1));
    assert_eq!(
        changed.to_string(),
        "4 rows in the source, 4 in the archive; 1 missing, 1 extra\n  - c\n  + C"
    );
}

#[tokio::test]
async fn two_clusters_live_side_by_side_and_leave_nothing() {
    let (first, second) = (Cluster::start_new(&[]), Cluster::start_new(&[("work_mem", "7MB")]));
    first.connect("postgres").await.batch_execute("create extension pg_cron").await.unwrap();
    let memory: String =
        second.connect("postgres").await.query_one("show work_mem", &[]).await.unwrap().get(0);
    assert_eq!(memory, "7MB");
    first.restart(Stop::Immediate);
    first.ready(Duration::from_secs(10)).await;
    let folder = first.socket_folder().to_owned();
    assert!(folder.exists());
    drop(first);
    assert!(!folder.exists(), "{} is left", folder.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_writes_every_kind_and_survives_a_restart() {
    for shape in [Shape::Named, Shape::Entity] {
        let stage = Stage::private(shape, &[]).await;
        let client = stage.connect().await;
        if shape == Shape::Entity {
            create_entities(&client).await;
        }
        let load = Load::start(&stage.cluster().uri_tcp(&stage.name), shape);
        until("rows are written", Duration::from_secs(20), async || (load.committed() > 2_000).then_some(()))
            .await;
        stage.cluster().restart(Stop::Fast);
        let before = load.committed();
        let more = async || (load.committed() > before + 2_000).then_some(());
        until("rows are written after the restart", Duration::from_secs(20), more).await;
        let committed = load.stop().await;

        let client = stage.connect().await;
        let mut total = 0;
        for kind in KINDS {
            let mut all = Multiset::default();
            each_source_row(&client, shape, kind, |row| all.add(row)).await;
            assert!(all.rows() > 20, "{} has {} rows", kind.table(), all.rows());
            total += all.rows();
        }
        assert!(total >= committed, "{total} rows in the tables, {committed} committed");
    }
}

#[tokio::test]
async fn partman_makes_partitions_and_late_rows_fall_into_the_default() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "insert into scouter.psi_drift (created_at, name, space, version, feature, bin_id, bin_count)
             values (now(), 'n', 's', '1', 'f', 1, 2), (now() - interval '400 days', 'n', 's', '1', 'f', 1, 2)",
        )
        .await
        .unwrap();
    let sql = "select count(*) filter (where tableoid = 'scouter.psi_drift_default'::regclass), count(*)
                 from scouter.psi_drift";
    let row = client.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1, 2));
}

#[test]
fn the_reader_of_the_archive_follows_a_log_with_a_removal() {
    use arrow::array::{Float64Array, Int32Array, StringArray, TimestampMicrosecondArray};
    use std::sync::Arc;

    let table = tempfile::tempdir().unwrap();
    std::fs::create_dir(table.path().join("_delta_log")).unwrap();
    let batch = arrow::array::RecordBatch::try_from_iter([
        ("created_at", Arc::new(TimestampMicrosecondArray::from(vec![-1]).with_timezone("UTC")) as _),
        ("space", Arc::new(StringArray::from(vec!["a|\"b\""])) as _),
        ("bin_id", Arc::new(Int32Array::from(vec![None])) as _),
        ("value", Arc::new(Float64Array::from(vec![-0.0])) as _),
    ])
    .unwrap();
    for name in ["old.parquet", "new file.parquet"] {
        let file = std::fs::File::create(table.path().join(name)).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
    let entry = |version: u64, text: &str| {
        std::fs::write(table.path().join(format!("_delta_log/{version:020}.json")), text).unwrap();
    };
    entry(0, r#"{"add":{"path":"old.parquet"}}"#);
    entry(1, "{\"remove\":{\"path\":\"old.parquet\"}}\n{\"add\":{\"path\":\"new%20file.parquet\"}}");
    assert_eq!(archived_rows(table.path()), ["-1|\"a|\\\"b\\\"\"|null|-0#8000000000000000"]);
    entry(3, r#"{"add":{"path":"old.parquet"}}"#);
    assert!(crate::support::archive::files(table.path()).is_err(), "a hole in the log is no table");
}
