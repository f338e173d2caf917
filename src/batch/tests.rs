use arrow::array::{Array, AsArray};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{Float64Type, Int32Type, TimestampMicrosecondType};
use arrow::record_batch::RecordBatch;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::lsn::Lsn;

/// 2026-11-22T13:30:00Z
const NOW: i64 = 1_795_354_200_000_000;
const HOUR: i64 = 3_600_000_000;

fn batches() -> Batches {
    Batches::new(WindowWidth::new(Duration::from_secs(3600)).unwrap(), NOW)
}

/// A file's rows as one batch of the archive's own types.
fn plain(file: &FileRows<'_>) -> RecordBatch {
    let schema = file.kind().schema();
    let batches: Vec<RecordBatch> = file
        .record_batches()
        .map(|batch| {
            let batch = batch.unwrap();
            let columns = batch.columns().iter().zip(schema.fields());
            let columns = columns.map(|(column, field)| cast(column, field.data_type()).unwrap());
            RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap()
        })
        .collect();
    concat_batches(&schema, &batches).unwrap()
}

#[test]
fn a_file_is_sorted_by_entity_time_series_and_bin() {
    let mut batches = batches();
    let late = batches.entity(&[b"b", b"m", b"1"]).unwrap();
    let early = batches.entity(&[b"a", b"m", b"2"]).unwrap();
    let (zeta, alpha) = (batches.text(b"zeta").unwrap(), batches.text(b"alpha").unwrap());
    for entity in [late, early] {
        for (offset, series, bin) in [(5, alpha, 0), (1, zeta, 1), (1, zeta, 0), (1, alpha, 9)] {
            batches.push(
                Kind::psi(),
                entity,
                NOW + offset,
                &[Cell::Text(series), Cell::Int(bin), Cell::Int(7)],
            );
        }
    }
    let files = batches.files();
    assert_eq!(files.len(), 1);
    assert_eq!((files[0].row_count(), files[0].window().to_string().as_str()), (8, "2026/11/22/13"));
    let rows = plain(&files[0]);
    let space: Vec<_> = rows.column(1).as_string::<i32>().iter().flatten().collect();
    assert_eq!(space, ["a", "a", "a", "a", "b", "b", "b", "b"]);
    let feature: Vec<_> = rows.column(4).as_string::<i32>().iter().flatten().take(4).collect();
    assert_eq!(feature, ["alpha", "zeta", "zeta", "alpha"]);
    assert_eq!(&rows.column(5).as_primitive::<Int32Type>().values()[..4], &[9, 0, 1, 0]);
    assert_eq!(rows.column(0).as_primitive::<TimestampMicrosecondType>().value(3), NOW + 5);
}

#[test]
fn nulls_and_odd_doubles_survive() {
    let mut batches = batches();
    let entity = batches.entity(&[b"", b"", b""]).unwrap();
    let feature = batches.text(b"f").unwrap();
    let values = [None, Some(f64::NAN), Some(-0.0), Some(f64::INFINITY), Some(5e-324)];
    for (offset, value) in (0..).zip(values) {
        let feature = (offset != 2).then_some(feature);
        batches.push(Kind::spc(), entity, NOW + offset, &[feature.into(), value.into()]);
    }
    let rows = plain(&batches.files()[0]);
    assert!(rows.column(4).is_null(2) && rows.column(4).null_count() == 1);
    let read: Vec<Option<u64>> =
        rows.column(5).as_primitive::<Float64Type>().iter().map(|value| value.map(f64::to_bits)).collect();
    assert_eq!(read, values.map(|value| value.map(f64::to_bits)));
}

#[test]
fn recent_rows_go_to_windows_and_others_to_days() {
    let mut batches = batches();
    let entity = batches.entity(&[b"s", b"n", b"v"]).unwrap();
    let metric = batches.text(b"m").unwrap();
    for hours in [0, 1, -24 * 60, -24 * 60 - 1, 24 * 400] {
        batches.push(
            Kind::custom(),
            entity,
            NOW + hours * HOUR,
            &[Cell::Text(metric), Cell::from(Some(1.0))],
        );
    }
    let names: Vec<String> = batches.files().iter().map(|file| file.window().to_string()).collect();
    assert_eq!(names, ["2026/09/23", "2026/11/22/13", "2026/11/22/14", "2027/12/27"]);
    let spans = batches.entity_spans();
    assert_eq!(spans.len(), 1);
    assert_eq!((spans[0].row_count, spans[0].max_created_at), (5, NOW + 24 * 400 * HOUR));
}

#[test]
fn a_large_entity_is_split_into_record_batches_that_keep_the_order() {
    let mut batches = batches();
    let metric = batches.text(b"m").unwrap();
    for name in [b"a", b"b"] {
        let entity = batches.entity(&[b"s", name, b"v"]).unwrap();
        for offset in (0..50_000).rev() {
            batches.push(
                Kind::custom(),
                entity,
                NOW + offset,
                &[Cell::Text(metric), Cell::from(Some(offset as f64))],
            );
        }
    }
    let files = batches.files();
    let lengths: Vec<usize> = files[0].record_batches().map(|batch| batch.unwrap().num_rows()).collect();
    assert_eq!(lengths, [32_768, 32_768, 32_768, 1_696]);
    let rows = plain(&files[0]);
    let times = rows.column(0).as_primitive::<TimestampMicrosecondType>().values();
    assert!(times[..50_000].is_sorted() && times[50_000..].is_sorted());
    assert!(batches.byte_count() > 100_000 * 20);
}

#[test]
fn what_is_not_utf8_has_no_number() {
    let mut batches = batches();
    assert_eq!(batches.entity(&[b"s", b"\xff", b"v"]), None);
    assert_eq!(batches.text(b"\xc3"), None);
    assert!(batches.is_empty());
}

#[test]
fn the_quarantine_keeps_texts_and_comes_first() {
    let mut batches = batches();
    let entity = batches.entity(&[b"s", b"n", b"v"]).unwrap();
    let metric = batches.text(b"m").unwrap();
    batches.push(Kind::custom(), entity, NOW, &[Cell::Text(metric), Cell::Null]);
    batches.push_quarantine(QuarantinedRow {
        quarantined_at: NOW,
        source_table: "scouter.psi_drift".into(),
        reason: "created_at is infinity".into(),
        row: "{}".into(),
        lsn: Lsn(0x1_0000_0002),
    });
    let files = batches.files();
    assert_eq!(files.iter().map(FileRows::kind).collect::<Vec<_>>(), [Kind::quarantine(), Kind::custom()]);
    let rows = plain(&files[0]);
    assert_eq!(rows.column(4).as_string::<i32>().value(0), "1/2");
    assert_eq!(batches.row_count(), 2);
}
