//! Rows as digests, so that two places can be compared as multisets without holding their rows.
//!
//! A row's digest is the MD5 of its values as PostgreSQL's send functions write them: microseconds and days since 2000,
//! numbers and the bits of a double big-endian, decimals as text; with their lengths before them, -1 for a null, but for the
//! row's time and 32-bit numbers that are never null. So SQL can compute the same one. 128 bits: among 10^12 different rows the odds of two that agree are below 10^-14.

use std::collections::HashMap;

use arrow::array::{
    Array, AsArray, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int32Array,
    Int64Array, RecordBatch, TimestampMicrosecondArray,
};
use arrow::compute::filter_record_batch;
use foldhash::fast::RandomState;
use md5::{Digest as _, Md5};

use super::columns::{Strings, times};
use super::latest::each_latest;
use super::object_reader::each_batch_within;
use super::table_file::TableFile;
use crate::archive::error::encode_error;
use crate::archive::store::storage::Storage;
use crate::lsn::Lsn;
use crate::pgoutput::POSTGRES_EPOCH_MICROS;
use crate::tables::{ColumnSpec, ColumnType, Compared, Kind};
use crate::{Error, Result};

/// Digests of rows, and how often each occurs.
#[derive(Debug)]
pub struct Multiset {
    /// How the rows are compared.
    kind: Kind,
    /// Versions that were committed later are not looked at.
    before: Option<Lsn>,
    counts: HashMap<u128, Copies, RandomState>,
}

/// How many rows of one digest there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Those that nobody has taken.
    pub left: u32,
    /// Those that were.
    pub taken: u32,
}

impl Multiset {
    /// No rows yet, of a kind that says which columns are compared.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, before: None, counts: HashMap::default() }
    }

    /// Of a table that keeps versions, read the rows as they were at this position of the log.
    #[must_use]
    pub fn before(self, lsn: Lsn) -> Self {
        Self { before: Some(lsn), ..self }
    }

    /// Takes in the rows of files (of one version of a table) whose time lies in one of the ranges: ascending pairs of a first
    /// microsecond since the epoch and the one after the last. Of a table that keeps versions that is the newest of each row, if this was
    /// not deleted.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] or [`Error::Encode`] if a file can't be read.
    pub async fn read(
        &mut self,
        storage: &Storage,
        files: &[&TableFile],
        ranges: &[(i64, i64)],
    ) -> Result<()> {
        let kind = self.kind;
        if kind.keeps_versions() {
            let before = self.before;
            return each_latest(storage, kind, files, ranges, before, |batch| {
                digests(kind, batch, |_, digest| self.add(digest))
            })
            .await;
        }
        let contains = |time: &i64| {
            let after = ranges.partition_point(|(start, _)| start <= time);
            after.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|(_, end)| time < end)
        };
        each_batch_within(storage, kind, files, ranges, None, |batch| {
            let is_within: Vec<bool> = times(kind, batch)?.values().iter().map(contains).collect();
            if !is_within.contains(&true) {
                return Ok(());
            }
            digests(kind, batch, |row, digest| {
                if is_within.get(row).copied().unwrap_or_default() {
                    self.add(digest);
                }
            })
        })
        .await
    }

    /// Takes in a row.
    pub fn add(&mut self, digest: u128) {
        self.counts.entry(digest).or_default().left += 1;
    }

    /// Whether a row of this digest is in it; then it is used up, once.
    pub fn take(&mut self, digest: u128) -> bool {
        match self.counts.get_mut(&digest) {
            Some(copies) if copies.left > 0 => {
                copies.left -= 1;
                copies.taken += 1;
                true
            }
            _ => false,
        }
    }

    /// How many rows are left.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        self.counts.values().map(|copies| u64::from(copies.left)).sum()
    }

    /// The rows that are left although equal ones were taken: where the takers are all that there are, these are copies too many.
    pub fn doubles(&self) -> impl Iterator<Item = (u128, Copies)> {
        let doubles = self.counts.iter().filter(|(_, copies)| copies.left > 0 && copies.taken > 0);
        doubles.map(|(digest, copies)| (*digest, *copies))
    }

    /// The rows of a batch that are not in it. Those that are have been used up, each once.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] if the batch has other columns than its kind.
    pub fn missing(&mut self, batch: &RecordBatch) -> Result<RecordBatch> {
        let kind = self.kind;
        let mut is_missing = Vec::with_capacity(batch.num_rows());
        digests(kind, batch, |_, digest| {
            is_missing.push(!self.take(digest));
        })?;
        // The archive may have it from before a column was added, in which the source has given it a value since; or two.
        let added: Vec<&ColumnSpec> = kind.columns().iter().filter(|column| column.added).collect();
        for since in (0..added.len()).rev() {
            if !is_missing.contains(&true) {
                break;
            }
            let later = added.get(since..).unwrap_or_default();
            // What has been renamed is there under its older name.
            let is_read =
                |column: &ColumnSpec| !later.contains(&column) || column.compared != Compared::Plainly;
            digests_of(kind, batch, is_read, |row, digest| {
                if let Some(is_missing) = is_missing.get_mut(row).filter(|is_missing| **is_missing) {
                    *is_missing = !self.take(digest);
                }
            })?;
        }
        filter_record_batch(batch, &BooleanArray::from(is_missing))
            .map_err(encode_error(format!("comparing rows of {}", kind.name())))
    }
}

/// Hands out the time and the digest of each row, in order.
///
/// # Errors
///
/// [`Error::Internal`] if the batch has other columns than its kind.
pub fn each_digest(kind: Kind, batch: &RecordBatch, mut take: impl FnMut(i64, u128)) -> Result<()> {
    let times = times(kind, batch)?;
    digests(kind, batch, |row, digest| take(times.value(row), digest))
}

/// Hands out the digest of each row, in order.
pub(in crate::archive) fn digests(
    kind: Kind,
    batch: &RecordBatch,
    take: impl FnMut(usize, u128),
) -> Result<()> {
    digests_of(kind, batch, |_| true, take)
}

/// The same, as if the rows had nulls in other columns than these.
fn digests_of(
    kind: Kind,
    batch: &RecordBatch,
    is_read: impl Fn(&ColumnSpec) -> bool,
    mut take: impl FnMut(usize, u128),
) -> Result<()> {
    let mut writers = Vec::with_capacity(kind.columns().len());
    for spec in kind.columns().iter().filter(|spec| spec.compared != Compared::Not) {
        if !is_read(spec) {
            writers.push((vec![Column::Absent], None));
            continue;
        }
        let mut values = vec![Column::of(kind, spec, &spec.name, batch)?];
        if let Compared::Or(formers) = &spec.compared {
            for former in formers {
                values.push(Column::of(kind, spec, former, batch)?);
            }
        }
        writers.push((values, spec.filled.as_deref()));
    }
    let mut bytes = Vec::new();
    for row in 0..batch.num_rows() {
        bytes.clear();
        for (values, filled) in &writers {
            let start = bytes.len();
            let is_there = |column: &&Column<'_>| values.len() == 1 || !column.is_null(row);
            if let Some(column) = values.iter().find(is_there).or(values.first()) {
                column.write(row, &mut bytes);
            }
            // Where the archive has a null, since it is older than the column.
            if filled.is_some() && bytes.get(start..) == *filled {
                bytes.truncate(start);
                put(&mut bytes, None);
            }
        }
        take(row, u128::from_be_bytes(Md5::digest(&bytes).into()));
    }
    Ok(())
}

/// A column that can be written row by row.
enum Column<'a> {
    /// The file is older than the column.
    Absent,
    /// Of the rows themselves: always there.
    RowTimes(&'a TimestampMicrosecondArray),
    Times(&'a TimestampMicrosecondArray),
    Strings(Strings<'a>),
    /// Always there.
    Ints(&'a Int32Array),
    NullableInts(&'a Int32Array),
    Longs(&'a Int64Array),
    Doubles(&'a Float64Array),
    Booleans(&'a BooleanArray),
    Dates(&'a Date32Array),
    Binaries(&'a BinaryArray),
    Decimals(&'a Decimal128Array),
}

impl<'a> Column<'a> {
    /// The column of that name, with values as the specification says.
    fn of(kind: Kind, spec: &ColumnSpec, name: &str, batch: &'a RecordBatch) -> Result<Self> {
        let column = batch.column_by_name(name);
        if column.is_none() && spec.source_type.is_some() {
            return Ok(Self::Absent);
        }
        let writer = column.and_then(|column| match spec.column_type {
            ColumnType::Timestamp if spec.name == kind.time_column() => {
                times(kind, batch).ok().map(Column::RowTimes)
            }
            ColumnType::Timestamp => column.as_primitive_opt().map(Column::Times),
            ColumnType::String => Strings::of(column).map(Column::Strings),
            ColumnType::Int if !spec.nullable => column.as_primitive_opt().map(Column::Ints),
            ColumnType::Int => column.as_primitive_opt().map(Column::NullableInts),
            ColumnType::Long => column.as_primitive_opt().map(Column::Longs),
            ColumnType::Double => column.as_primitive_opt().map(Column::Doubles),
            ColumnType::Boolean => column.as_boolean_opt().map(Column::Booleans),
            ColumnType::Date => column.as_primitive_opt().map(Column::Dates),
            ColumnType::Binary => column.as_binary_opt::<i32>().map(Column::Binaries),
            ColumnType::Decimal { .. } => column.as_primitive_opt().map(Column::Decimals),
        });
        writer.ok_or_else(|| {
            let found = column.map(|column| column.data_type().to_string());
            Error::Internal(format!("a batch of {} has {found:?} as its column {name}", kind.name()))
        })
    }

    fn is_null(&self, row: usize) -> bool {
        match self {
            Self::Absent => true,
            Self::Strings(strings) => strings.get(row).is_none(),
            Self::RowTimes(values) | Self::Times(values) => values.is_null(row),
            Self::Ints(values) | Self::NullableInts(values) => values.is_null(row),
            Self::Longs(values) => values.is_null(row),
            Self::Doubles(values) => values.is_null(row),
            Self::Booleans(values) => values.is_null(row),
            Self::Dates(values) => values.is_null(row),
            Self::Binaries(values) => values.is_null(row),
            Self::Decimals(values) => values.is_null(row),
        }
    }

    fn write(&self, row: usize, bytes: &mut Vec<u8>) {
        match self {
            Self::Absent => put(bytes, None),
            Self::RowTimes(times) => bytes.extend(postgres_micros(times.value(row))),
            Self::Ints(numbers) => bytes.extend(numbers.value(row).to_be_bytes()),
            Self::Strings(strings) => put(bytes, strings.get(row).map(str::as_bytes)),
            Self::Times(times) => put_some(bytes, times, row, |row| postgres_micros(times.value(row))),
            Self::NullableInts(numbers) => {
                put_some(bytes, numbers, row, |row| numbers.value(row).to_be_bytes())
            }
            Self::Longs(numbers) => put_some(bytes, numbers, row, |row| numbers.value(row).to_be_bytes()),
            Self::Doubles(numbers) => {
                put_some(bytes, numbers, row, |row| numbers.value(row).to_bits().to_be_bytes());
            }
            Self::Booleans(flags) => put_some(bytes, flags, row, |row| [u8::from(flags.value(row))]),
            Self::Dates(dates) => put_some(bytes, dates, row, |row| {
                dates.value(row).wrapping_sub(POSTGRES_EPOCH_DAYS).to_be_bytes()
            }),
            Self::Binaries(values) => put(bytes, values.is_valid(row).then(|| values.value(row))),
            // As text, with all decimals.
            Self::Decimals(numbers) => {
                put_some(bytes, numbers, row, |row| numbers.value_as_string(row).into_bytes());
            }
        }
    }
}

/// Days from 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH_DAYS: i32 = 10_957;

fn postgres_micros(micros: i64) -> [u8; 8] {
    micros.wrapping_sub(POSTGRES_EPOCH_MICROS).to_be_bytes()
}

/// A value behind its length, or -1 for a null.
fn put(bytes: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        Some(value) => {
            bytes.extend(u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(value);
        }
        None => bytes.extend((-1_i32).to_be_bytes()),
    }
}

fn put_some<T: AsRef<[u8]>>(
    bytes: &mut Vec<u8>,
    array: &dyn Array,
    row: usize,
    value: impl FnOnce(usize) -> T,
) {
    let value = array.is_valid(row).then(|| value(row));
    put(bytes, value.as_ref().map(AsRef::as_ref));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batches, Cell};
    use crate::tables::WindowWidth;

    fn spc(rows: &[(&str, i64, Option<f64>)]) -> RecordBatch {
        let mut batches = Batches::new(WindowWidth::DAY, 0);
        for (feature, time, value) in rows {
            let entity = batches.entity(&[b"s", b"n", b"v"]).unwrap();
            let feature = batches.text(feature.as_bytes()).unwrap();
            batches.push(Kind::spc(), entity, *time, &[Cell::Text(feature), Cell::from(*value)]);
        }
        let files = batches.files();
        files[0].record_batches().next().unwrap().unwrap()
    }

    fn all(batch: &RecordBatch) -> Vec<u128> {
        let mut found = Vec::new();
        digests(Kind::spc(), batch, |_, digest| found.push(digest)).unwrap();
        found
    }

    #[test]
    fn every_bit_counts() {
        let nan = f64::from_bits(f64::NAN.to_bits() | 1);
        let rows = spc(&[
            ("f", 1, Some(0.0)),
            ("f", 2, Some(0.0)),
            ("f", 3, Some(-0.0)),
            ("f", 4, Some(f64::from_bits(1))),
            ("f", 5, Some(f64::NAN)),
            ("f", 6, Some(nan)),
            ("f", 7, None),
            ("g", 8, None),
        ]);
        let mut found = all(&rows);
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), 8);
        // Whatever the encoding of the strings.
        let plain =
            arrow::compute::cast(rows.column_by_name("space").unwrap(), &arrow::datatypes::DataType::Utf8);
        assert_eq!(plain.unwrap().len(), 8);
    }

    #[test]
    fn what_is_there_is_used_up_once_each() {
        let mut present = Multiset::new(Kind::spc());
        let twice = spc(&[("f", 1, Some(1.0)), ("f", 1, Some(1.0)), ("f", 2, None)]);
        digests(Kind::spc(), &twice, |_, digest| present.add(digest)).unwrap();
        let thrice = spc(&[("f", 1, Some(1.0)), ("f", 1, Some(1.0)), ("f", 1, Some(1.0)), ("f", 3, None)]);
        let missing = present.missing(&thrice).unwrap();
        assert_eq!(missing.num_rows(), 2);
        assert_eq!(all(&missing), all(&spc(&[("f", 1, Some(1.0)), ("f", 3, None)])));
        assert_eq!(present.missing(&twice).unwrap().num_rows(), 2, "only the third is left");
        assert_eq!((present.row_count(), present.doubles().count()), (0, 0));
    }

    #[test]
    fn a_double_is_a_row_of_which_some_were_taken_and_some_are_left() {
        let mut present = Multiset::new(Kind::spc());
        let rows = spc(&[("f", 1, None), ("f", 1, None), ("f", 1, None), ("f", 2, None), ("f", 3, None)]);
        digests(Kind::spc(), &rows, |_, digest| present.add(digest)).unwrap();
        present.missing(&spc(&[("f", 1, None), ("f", 2, None)])).unwrap();
        let doubled = all(&spc(&[("f", 1, None)]))[0];
        let doubles: Vec<_> = present.doubles().collect();
        assert_eq!(doubles, [(doubled, Copies { left: 2, taken: 1 })], "not the one that nobody has taken");
        assert_eq!(present.row_count(), 3);
    }
}
