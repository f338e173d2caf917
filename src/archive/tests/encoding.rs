//! What is written into a file, and read back from it.

use arrow::array::{AsArray as _, Float64Array};
use arrow::datatypes::Float64Type;
use parquet::basic::Encoding;
use parquet::file::properties::WriterPropertiesBuilder;
use parquet::schema::types::ColumnPath;

use super::*;
use crate::archive::files::encode::{encode_with, writer_properties};
use crate::batch::{Batches, Cell};
use crate::tables::{ColumnSpec, ColumnType};

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
    let batch = RecordBatch::try_new(Kind::spc().schema(), columns).unwrap();
    let file = encode(Kind::spc(), [batch.clone()]).unwrap().unwrap();
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
    let mut batches = Batches::new(WindowWidth::DAY, NOON);
    let entity = batches.entity(&[b"space", b"name", b"1"]).unwrap();
    let series = batches.text(b"feature").unwrap();
    for row in 0..10_000 {
        batches.push(
            Kind::psi(),
            entity,
            NOON + row,
            &[Cell::Text(series), Cell::Int(row as i32 % 10), Cell::Int(i32::MAX)],
        );
        batches.push(
            Kind::spc(),
            entity,
            NOON + row,
            &[Cell::Text(series), Cell::from((row % 2 == 0).then_some(0.5))],
        );
        // Too many different ones for a dictionary.
        batches.push(Kind::custom(), entity, NOON + row, &[Cell::Text(series), Cell::from(Some(row as f64))]);
    }
    for rows in batches.files() {
        let kind = rows.kind();
        let file = encode(kind, rows.record_batches().map(Result::unwrap)).unwrap().unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(file.bytes.clone()).unwrap();
        assert_eq!(reader.schema().fields(), kind.schema().fields());
        let file_metadata = reader.metadata().file_metadata();
        assert_eq!(file_metadata.version(), 1);
        assert!(file_metadata.created_by().unwrap().starts_with("highwater version "));
        for (column, spec) in reader.metadata().row_group(0).columns().iter().zip(kind.columns()) {
            // Levels are always RLE.
            let used: Vec<Encoding> = column.encodings().filter(|used| *used != Encoding::RLE).collect();
            let chosen = match spec.column_type {
                ColumnType::Timestamp => vec![Encoding::DELTA_BINARY_PACKED],
                // PLAIN is also the dictionary.
                _ => vec![Encoding::PLAIN, Encoding::RLE_DICTIONARY],
            };
            assert_eq!(used, chosen, "{}", spec.name);
            assert!(column.column_index_offset().is_some() && column.offset_index_offset().is_some());
        }
    }
    assert!(encode(Kind::psi(), [rows(0)]).unwrap().is_none());
}

/// A number's dictionary is given up soon: what follows has the encoding of its type.
#[test]
fn numbers_without_a_dictionary_are_small() {
    let counts: Vec<(i64, &str, i32)> = (0..100_000).map(|row| (NOON, "model", row)).collect();
    let file = encode(Kind::psi(), [psi(&counts)]).unwrap().unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file.bytes).unwrap();
    let column = reader.metadata().row_group(0).column(6).clone();
    assert!(column.encodings().any(|used| used == Encoding::DELTA_BINARY_PACKED));
    assert!(column.compressed_size() < 30_000, "{} bytes", column.compressed_size());
}

/// SplitMix64: the same numbers in every run.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// A day of 100 models, every 15 minutes: 20 features of 10 bins (a bell with noise), or 20 series of doubles.
fn day(kind: Kind, value: impl Fn(u64) -> f64) -> Batches {
    let mut batches = Batches::new(WindowWidth::DAY, NOON);
    for model in 0..100 {
        let name = format!("model-{model:03}");
        let entity = batches.entity(&[b"space", name.as_bytes(), b"1.0.0"]).unwrap();
        let offset = i64::try_from(mixed(model) % 60_000_000).unwrap();
        for round in 0..96 {
            let time = Window::of(NOON, WindowWidth::DAY).start() + round * 900_000_000 + offset;
            for feature in 0..20 {
                let series = batches.text(format!("feature_{feature:02}").as_bytes()).unwrap();
                let seed = mixed(time.unsigned_abs() ^ (feature << 52) ^ model);
                if kind != Kind::psi() {
                    batches.push(kind, entity, time, &[Cell::Text(series), Cell::Double(value(seed))]);
                    continue;
                }
                for bin in 0..10_u64 {
                    let count = value(mixed(seed ^ bin)) as i32 + (1000 >> bin.abs_diff(5).min(4));
                    batches.push(
                        Kind::psi(),
                        entity,
                        time,
                        &[Cell::Text(series), Cell::Int(bin as i32), Cell::Int(count)],
                    );
                }
            }
        }
    }
    batches
}

/// Bytes per row and column by encoding, for `benches/README.md`.
#[test]
#[ignore = "a measurement"]
#[expect(clippy::print_stderr, reason = "the figures are what it is for")]
fn bytes_per_row() {
    let unit = |seed: u64| (seed >> 11) as f64 / (1_u64 << 53) as f64;
    let days = [
        ("counts, noise below 200", day(Kind::psi(), |seed| (seed % 200) as f64)),
        ("counts, noise below 5,000", day(Kind::psi(), |seed| (seed % 5_000) as f64)),
        ("counts, noise below 100,000", day(Kind::psi(), |seed| (seed % 100_000) as f64)),
        ("counts, noise below 10", day(Kind::psi(), |seed| (seed % 10) as f64)),
        ("doubles, all digits", day(Kind::spc(), |seed| 0.87 + unit(seed) * 0.02)),
        ("doubles, four decimals", day(Kind::custom(), |seed| (unit(seed) * 1e4).round() / 1e4)),
        ("doubles, whole numbers below 500", day(Kind::custom(), |seed| (seed % 500) as f64)),
        (
            "doubles, one in ten is not 0",
            day(Kind::custom(), |seed| if seed % 10 == 0 { unit(seed) } else { 0.0 }),
        ),
    ];
    for (label, batches) in &days {
        let rows = batches.files().remove(0);
        let kind = rows.kind();
        let sizes =
            |change: &dyn Fn(ColumnPath, &ColumnSpec, WriterPropertiesBuilder) -> WriterPropertiesBuilder| {
                let mut properties = WriterPropertiesBuilder::from(writer_properties(kind));
                for spec in kind.columns() {
                    properties = change(ColumnPath::from(spec.name.as_str()), spec, properties);
                }
                let record_batches = rows.record_batches().map(Result::unwrap);
                let file = encode_with(kind, properties.build(), record_batches).unwrap().unwrap();
                let groups = ParquetRecordBatchReaderBuilder::try_new(file.bytes.clone())
                    .unwrap()
                    .metadata()
                    .row_groups()
                    .to_vec();
                let per_row = |bytes: i64| bytes as f64 / file.stats.row_count as f64;
                let columns = (0..kind.columns().len()).map(|column| {
                    let bytes = groups.iter().map(|group| group.column(column).compressed_size()).sum();
                    format!("{} {:.3}", kind.columns()[column].name, per_row(bytes))
                });
                let columns = columns.collect::<Vec<_>>().join(", ");
                format!("{:.3}: {columns}", per_row(file.bytes.len() as i64))
            };
        let numbers = |encoding: Encoding| {
            move |path: ColumnPath, spec: &ColumnSpec, properties: WriterPropertiesBuilder| match spec
                .column_type
            {
                ColumnType::Double if encoding == Encoding::DELTA_BINARY_PACKED => properties,
                ColumnType::Int | ColumnType::Double => properties
                    .set_column_dictionary_enabled(path.clone(), false)
                    .set_column_encoding(path, encoding),
                _ => properties,
            }
        };
        eprintln!("{label}\n  chosen {}", sizes(&|_, _, properties| properties));
        for encoding in [Encoding::PLAIN, Encoding::DELTA_BINARY_PACKED, Encoding::BYTE_STREAM_SPLIT] {
            eprintln!("  {encoding} {}", sizes(&numbers(encoding)));
        }
        for limit in [16, 32, 128, 1024] {
            let dictionary =
                |path, spec: &ColumnSpec, properties: WriterPropertiesBuilder| match spec.column_type {
                    ColumnType::Int | ColumnType::Double => {
                        properties.set_column_dictionary_page_size_limit(path, limit << 10)
                    }
                    _ => properties,
                };
            eprintln!("  dictionary up to {limit} KiB {}", sizes(&dictionary));
        }
    }
}

#[test]
fn row_groups_end_where_entities_end() {
    let entity = |name: &'static str, count: usize| psi(&vec![(NOON, name, 1); count]);
    // a and b fit together, c would not, d is larger than a group, e follows its tail.
    let batches = [("a", 60_000), ("b", 60_000), ("c", 20_000), ("d", 300_000), ("e", 10)];
    let file = encode(Kind::psi(), batches.map(|(name, count)| entity(name, count))).unwrap().unwrap();
    assert_eq!(row_group_sizes(file.bytes), [120_000, 20_000, 131_072, 131_072, 37_866]);
    let mixed = psi(&[(NOON, "a", 1), (NOON + 1, "a", 1), (NOON, "b", 1)]);
    let file = encode(Kind::psi(), [mixed.clone(), entity("b", 1), entity("c", 200_000)]).unwrap().unwrap();
    assert_eq!(row_group_sizes(file.bytes), [4, 131_072, 68_928]);
    assert_eq!(file.stats.entity_range[1], ("a".to_owned(), "c".to_owned()));
    assert!(matches!(encode(Kind::psi(), [entity("b", 1), mixed]), Err(Error::Internal(_))));
}
