//! The interface of Scouter's data archive.

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::datatypes::{Float32Type, Float64Type, TimestampNanosecondType, UInt64Type};
use chrono::{DateTime, Duration, Utc};
use highwater::Archive;
use highwater::config::ObjectStorageSettings;
use highwater::reader::scouter::{
    CustomMetricServerRecord, ParquetDataFrame, PsiServerRecord, RecordType, ServerRecord, ServerRecords,
    SpcServerRecord,
};

use crate::support::archive::assert_portable;

fn start() -> DateTime<Utc> {
    "2026-11-01T00:00:00Z".parse().unwrap()
}

fn custom(minute: i64, metric: &str, value: f64) -> ServerRecord {
    let (space, name, version) = ("s".to_owned(), "n".to_owned(), "1".to_owned());
    let (created_at, metric) = (start() + Duration::minutes(minute), metric.to_owned());
    ServerRecord::Custom(CustomMetricServerRecord { created_at, space, name, version, metric, value })
}

fn psi(minute: i64, bin_id: usize, bin_count: usize) -> ServerRecord {
    let (space, name, version) = ("s".to_owned(), "n".to_owned(), "1".to_owned());
    let (created_at, feature) = (start() + Duration::minutes(minute), "age".to_owned());
    ServerRecord::Psi(PsiServerRecord { created_at, space, name, version, feature, bin_id, bin_count })
}

fn spc(minute: i64, value: f64) -> ServerRecord {
    let (space, name, version) = ("s".to_owned(), "n".to_owned(), "1".to_owned());
    let (created_at, feature) = (start() + Duration::minutes(minute), "age".to_owned());
    ServerRecord::Spc(SpcServerRecord { created_at, space, name, version, feature, value })
}

async fn binned(frame: &ParquetDataFrame, minutes: f64) -> Vec<RecordBatch> {
    let end = start() + Duration::days(1);
    let frame = frame.get_binned_metrics("s/n/1/any", &minutes, &start(), &end, "s", "n", "1").await.unwrap();
    frame.collect().await.unwrap()
}

async fn rows(settings: &ObjectStorageSettings, table: &str) -> usize {
    let archive = Archive::open(settings).await.unwrap();
    archive.sql(&format!("select * from {table}")).await.unwrap().count().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_once_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ObjectStorageSettings::new(folder.path().join("archive").to_str().unwrap(), "").unwrap();
    let frame = ParquetDataFrame::new(&settings, &RecordType::Custom).unwrap();
    let path = "s/n/1/custom";
    let first = ServerRecords::new(vec![
        custom(0, "a", 1.0),
        custom(1, "a", 3.0),
        custom(1, "b", 5.0),
        custom(61, "a", 7.0),
    ]);
    frame.write_parquet(path, first.clone()).await.unwrap();
    // The same once more, in another order, changes nothing.
    let mut again = first.clone();
    again.records.reverse();
    frame.write_parquet(path, again).await.unwrap();
    assert_eq!(rows(&settings, "custom").await, 4);
    // Other records under the same path, as Scouter's server writes them hour after hour, are added; equal ones, too.
    frame
        .write_parquet(path, ServerRecords::new(vec![custom(62, "a", 9.0), custom(62, "a", 9.0)]))
        .await
        .unwrap();
    assert_eq!(rows(&settings, "custom").await, 6);
    // So are the same records under another path.
    frame.write_parquet("other", first).await.unwrap();
    assert_eq!(rows(&settings, "custom").await, 10);
    assert_portable(&folder.path().join("archive/custom"));
    frame.write_parquet("nothing", ServerRecords::default()).await.unwrap();

    let batches = binned(&frame, 60.0).await;
    let names: Vec<&str> = batches.iter().map(|batch| batch["metric"].as_string_view().value(0)).collect();
    assert_eq!(names, ["a", "b"], "a batch for each metric");
    let times = batches[0]["created_at"].as_list::<i32>().value(0);
    let hour = 3_600_000_000_000;
    let first = start().timestamp_nanos_opt().unwrap();
    assert_eq!(times.as_primitive::<TimestampNanosecondType>().values()[..], [first, first + hour]);
    let stats = batches[0]["stats"].as_list::<i32>().value(0);
    let of =
        |name: &str| stats.as_struct().column_by_name(name).unwrap().as_primitive::<Float64Type>().value(0);
    let s = (4.0_f64 / 3.0).sqrt();
    assert_eq!((of("avg"), of("lower_bound"), of("upper_bound")), (2.0, 2.0 - s, 2.0 + s));
}

#[tokio::test(flavor = "multi_thread")]
async fn psi_and_spc_have_the_columns_that_scouter_decodes() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ObjectStorageSettings::new(folder.path().to_str().unwrap(), "").unwrap();
    let frame = ParquetDataFrame::new(&settings, &RecordType::Psi).unwrap();
    let records = vec![psi(0, 0, 1), psi(0, 1, 3), psi(60, 0, 4)];
    frame.write_parquet("s/n/1/psi", ServerRecords::new(records)).await.unwrap();
    let batches = binned(&frame, 60.0).await;
    assert_eq!(batches.len(), 1);
    let bins = batches[0]["bin_proportions"].as_list::<i32>().value(0);
    let bins = bins.as_struct();
    let ids = |row: usize| {
        bins.column(0).as_list::<i32>().value(row).as_primitive::<UInt64Type>().values().to_vec()
    };
    let parts = |row: usize| {
        bins.column(1).as_list::<i32>().value(row).as_primitive::<Float32Type>().values().to_vec()
    };
    assert_eq!((bins.len(), ids(0), parts(0)), (2, vec![0, 1], vec![0.25, 0.75]));
    assert_eq!((ids(1), parts(1)), (vec![0], vec![1.0]));
    let overall = batches[0]["overall_proportions"].as_struct();
    let overall = overall.column_by_name("proportion").unwrap().as_list::<i32>().value(0);
    assert_eq!(overall.as_primitive::<Float32Type>().values()[..], [0.625, 0.375]);

    let frame = ParquetDataFrame::new(&settings, &RecordType::Spc).unwrap();
    // There is an archive, but not of this kind: an answer without rows.
    assert_eq!(binned(&frame, 0.01).await.iter().map(RecordBatch::num_rows).sum::<usize>(), 0);
    frame.write_parquet("s/n/1/spc", ServerRecords::new(vec![spc(0, 1.0), spc(0, 2.0)])).await.unwrap();
    ["psi", "spc"].iter().for_each(|table| assert_portable(&folder.path().join(table)));
    let batches = binned(&frame, 0.01).await;
    assert_eq!(
        batches[0]["values"].as_list::<i32>().value(0).as_primitive::<Float64Type>().values()[..],
        [1.5]
    );

    let wrong = frame.write_parquet("x", ServerRecords::new(vec![psi(0, 0, 1)])).await.unwrap_err();
    assert_eq!(wrong.to_string(), "a record is of kind psi, but the frame of kind spc");
    let end = start() - Duration::days(1);
    for (bin, told) in [(60.0, "must end after"), (0.0, "the bin is 0 minutes")] {
        let frame = frame.get_binned_metrics("", &bin, &start(), &end, "s", "n", "1").await;
        let error = frame.map(drop).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}

/// Several processes that load the same at the same time, and others that load something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_loads_of_the_same_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ObjectStorageSettings::new(folder.path().to_str().unwrap(), "").unwrap();
    let load = |number: usize| {
        let settings = settings.clone();
        tokio::spawn(async move {
            let frame = ParquetDataFrame::new(&settings, &RecordType::Spc).unwrap();
            let value = if number < 4 { 0.0 } else { number as f64 };
            let records = ServerRecords::new(vec![spc(0, value), spc(1, value)]);
            // As a caller does that was told of an error.
            for _ in 0..50 {
                match frame.write_parquet("path", records.clone()).await {
                    Ok(()) => return,
                    Err(highwater::Error::Fenced { .. } | highwater::Error::Delta { .. }) => {}
                    Err(error) => panic!("{}", error.chain()),
                }
            }
            panic!("it never succeeded");
        })
    };
    for loading in (0..8).map(load).collect::<Vec<_>>() {
        loading.await.unwrap();
    }
    assert_eq!(rows(&settings, "spc").await, 2 + 4 * 2);
}
