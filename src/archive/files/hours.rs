//! Counts and checksums of the archive's rows, hour by hour, to be compared with those of the source.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::Column;
use datafusion::error::{DataFusionError, Result as QueryResult};
use datafusion::functions_aggregate::expr_fn::{count, sum};
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, lit,
};
use futures::TryStreamExt;

use super::columns::times;
use super::digest::digests;
use super::latest::{is_before, is_within, latest};
use super::object_reader::each_batch_within;
use super::scan::{MEMORY_BYTES, Scan, runtime, session};
use super::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::lsn::Lsn;
use crate::tables::{Kind, MICROS_PER_HOUR, MICROS_PER_MINUTE};
use crate::{Error, Result};

/// How many rows there are, and the sum of their digests' first 64 bits, modulo 2^64: rows in any order have the same, and
/// rows that differ in a bit have another, but for one case in 2^64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowSum {
    /// Rows.
    pub rows: u64,
    /// Sum of digests.
    pub sum: u64,
}

impl AddAssign for RowSum {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.sum = self.sum.wrapping_add(other.sum);
    }
}

/// Rows by hour of `created_at`: hours since the epoch.
pub type HourSums = BTreeMap<i64, RowSum>;

/// Adds up the rows of these files (of one version of a table) whose time is `start` or later and before `end`, in microseconds since
/// the epoch. Of a table that keeps versions that is the newest one before `before` of each row, if this was not deleted.
///
/// # Errors
///
/// [`Error::Storage`] or [`Error::Encode`] if a file can't be read.
pub async fn hour_sums(
    storage: &Storage,
    kind: Kind,
    files: &[&TableFile],
    (start, end): (i64, i64),
    before: Lsn,
) -> Result<HourSums> {
    if files.is_empty() {
        return Ok(HourSums::new());
    }
    let failed = || Error::query(format!("adding up the rows of {}", storage.table_url(kind)));
    let session = session(runtime(storage, MEMORY_BYTES).map_err(failed())?, MEMORY_BYTES);
    let scan = Scan::new(kind, files.iter().copied()).map_err(failed())?;
    let columns: Vec<Expr> = kind
        .columns()
        .iter()
        .map(|column| Expr::Column(Column::new_unqualified(column.name.as_str())))
        .collect();
    let hour = ScalarUDF::from(PerRow::new(kind, Of::Hour)).call(columns.clone());
    let digest = ScalarUDF::from(PerRow::new(kind, Of::Digest)).call(columns);
    let wanted = is_within(kind, &[(start, end)]);
    let wanted = if kind.keeps_versions() { wanted.and(is_before(before)) } else { wanted };
    let rows = session
        .read_table(Arc::new(scan))
        .and_then(|rows| rows.filter(wanted))
        .and_then(|rows| latest(kind, rows))
        .and_then(|rows| rows.aggregate(vec![hour], vec![count(lit(1)), sum(digest)]))
        .map_err(failed())?;
    let mut stream = rows.execute_stream().await.map_err(failed())?;
    let mut sums = HourSums::new();
    while let Some(batch) = stream.try_next().await.map_err(failed())? {
        let column = |index: usize| batch.columns().get(index)?.as_primitive_opt::<Int64Type>();
        let (Some(hours), Some(rows), Some(digests)) = (column(0), column(1), column(2)) else {
            return Err(Error::Internal("sums of hours have other columns than they should".to_owned()));
        };
        for ((hour, rows), sum) in hours.values().iter().zip(rows.values()).zip(digests.values()) {
            *sums.entry(*hour).or_default() +=
                RowSum { rows: rows.cast_unsigned(), sum: sum.cast_unsigned() };
        }
    }
    Ok(sums)
}

/// Rows by minute of `created_at`: minutes since the epoch.
pub type MinuteCounts = BTreeMap<i64, u64>;

/// Counts the rows of these files (of one version of a table) whose `created_at` lies in one of the ranges (microseconds since
/// the epoch), and some of other minutes.
///
/// # Errors
///
/// [`Error::Storage`] or [`Error::Encode`] if a file can't be read.
pub async fn minute_counts(
    storage: &Storage,
    kind: Kind,
    files: &[&TableFile],
    ranges: &[(i64, i64)],
) -> Result<MinuteCounts> {
    let mut counts = MinuteCounts::new();
    each_batch_within(storage, kind, files, ranges, Some(&[kind.time_column()]), |batch| {
        // Rows of an entity are in the order of their times.
        for run in
            times(kind, batch)?.values().chunk_by(|before, after| minute_of(*before) == minute_of(*after))
        {
            let minute = run.first().copied().map(minute_of).unwrap_or_default();
            *counts.entry(minute).or_default() += run.len() as u64;
        }
        Ok(())
    })
    .await?;
    Ok(counts)
}

const fn minute_of(micros: i64) -> i64 {
    micros.div_euclid(MICROS_PER_MINUTE)
}

/// Adds up rows that are given by their times and digests.
pub fn sums_of(rows: impl Iterator<Item = (i64, u128)>) -> HourSums {
    let mut sums = HourSums::new();
    for (time, digest) in rows {
        *sums.entry(time.div_euclid(MICROS_PER_HOUR)).or_default() += RowSum { rows: 1, sum: head(digest) };
    }
    sums
}

/// The first 64 bits.
fn head(digest: u128) -> u64 {
    u64::try_from(digest >> 64).unwrap_or_default()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Of {
    Hour,
    Digest,
}

/// A number of each row, computed from all its columns.
#[derive(Debug, PartialEq, Eq, Hash)]
struct PerRow {
    kind: Kind,
    of: Of,
    signature: Signature,
}

impl PerRow {
    fn new(kind: Kind, of: Of) -> Self {
        Self { kind, of, signature: Signature::any(kind.columns().len(), Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for PerRow {
    fn name(&self) -> &str {
        match self.of {
            Of::Hour => "row_hour",
            Of::Digest => "row_digest",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> QueryResult<DataType> {
        Ok(DataType::Int64)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> QueryResult<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let columns = self.kind.columns().iter().zip(arrays);
        let batch = RecordBatch::try_from_iter(columns.map(|(column, array)| (column.name.as_str(), array)))?;
        let failed = |error: Error| DataFusionError::External(Box::new(error));
        let numbers: Int64Array = match self.of {
            Of::Hour => {
                let times = times(self.kind, &batch).map_err(failed)?;
                times.values().iter().map(|time| time.div_euclid(MICROS_PER_HOUR)).collect()
            }
            Of::Digest => {
                let mut numbers = Vec::with_capacity(batch.num_rows());
                digests(self.kind, &batch, |_, digest| numbers.push(head(digest).cast_signed()))
                    .map_err(failed)?;
                numbers.into()
            }
        };
        Ok(ColumnarValue::Array(Arc::new(numbers) as ArrayRef))
    }
}
