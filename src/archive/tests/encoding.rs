//! What is written into a file, and read back from it.

use arrow::array::{AsArray as _, Float64Array};
use arrow::datatypes::Float64Type;
use parquet::basic::Encoding;

use super::*;

fn row_group_sizes(bytes: bytes::Bytes) -> Vec<i64> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap();
    reader.metadata().row_groups().iter().map(|group| group.num_rows()).collect()
}

#[test]
fn values_come_back_as_they_were() {
    let long = "ä".repeat(5000);
    let values = [Some(f64::NAN), Some(-0.0), Some(f64::INFINITY), Some(f64::NEG_INFINITY), None, Some(1.5)];
    let count = values.len();
    let times = TimestampMicrosecondArray::from_iter_values((0..count as i64).map(|row| row - 2));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(times.with_timezone("UTC")),
        Arc::new(StringArray::from(vec!["雪\u{10FFFF}"; count])),
        Arc::new(StringArray::from(vec![long.as_str(); count])),
        Arc::new(StringArray::from(vec!["1"; count])),
        Arc::new(StringArray::from(vec![None, Some("a"), Some("b"), Some(""), Some("c"), Some("d")])),
        Arc::new(Float64Array::from(values.to_vec())),
    ];
    let batch = RecordBatch::try_new(Kind::Spc.schema(), columns).unwrap();
    let file = encode(Kind::Spc, [batch.clone()]).unwrap().unwrap();
    assert_eq!((file.stats.row_count, file.stats.min_time, file.stats.max_time), (6, -2, 3));
    let back = read(file.bytes);
    assert_eq!(back[0].schema().fields(), batch.schema().fields());
    for (column, (was, is)) in batch.columns().iter().zip(back[0].columns()).enumerate() {
        if column == 5 {
            let bits = |array: &ArrayRef| {
                let values = array.as_primitive::<Float64Type>();
                values.iter().map(|value| value.map(f64::to_bits)).collect::<Vec<_>>()
            };
            assert_eq!(bits(was), bits(is));
        } else {
            assert_eq!(was, is);
        }
    }
}

#[test]
fn dictionaries_become_plain_strings_and_encodings_are_the_chosen_ones() {
    let file = encode(Kind::Psi, [rows(1000)]).unwrap().unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file.bytes.clone()).unwrap();
    assert_eq!(reader.schema().fields(), Kind::Psi.schema().fields());
    let group = reader.metadata().row_group(0).clone();
    for (column, encoding) in [
        (0, Encoding::DELTA_BINARY_PACKED),
        (5, Encoding::BYTE_STREAM_SPLIT),
        (6, Encoding::BYTE_STREAM_SPLIT),
    ] {
        assert!(group.column(column).encodings().any(|used| used == encoding), "{column}");
        assert!(group.column(column).dictionary_page_offset().is_none());
    }
    assert!(
        group.column(0).column_index_offset().is_some() && group.column(0).offset_index_offset().is_some()
    );
    assert!(encode(Kind::Psi, [rows(0)]).unwrap().is_none());
}

#[test]
fn row_groups_end_where_entities_end() {
    let entity = |name: &'static str, count: usize| psi(&vec![(NOON, name, 1); count]);
    // a and b fit together, c would not, d is larger than a group, e follows its tail.
    let batches = [("a", 60_000), ("b", 60_000), ("c", 20_000), ("d", 300_000), ("e", 10)];
    let file = encode(Kind::Psi, batches.map(|(name, count)| entity(name, count))).unwrap().unwrap();
    assert_eq!(row_group_sizes(file.bytes), [120_000, 20_000, 131_072, 131_072, 37_866]);
    let mixed = psi(&[(NOON, "a", 1), (NOON + 1, "a", 1), (NOON, "b", 1)]);
    let file = encode(Kind::Psi, [mixed.clone(), entity("b", 1), entity("c", 200_000)]).unwrap().unwrap();
    assert_eq!(row_group_sizes(file.bytes), [4, 131_072, 68_928]);
    assert_eq!(file.stats.entity_range.unwrap()[1], ("a".to_owned(), "c".to_owned()));
    assert!(matches!(encode(Kind::Psi, [entity("b", 1), mixed]), Err(Error::Internal(_))));
}
