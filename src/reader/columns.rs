use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{ArrowPrimitiveType, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use futures::TryStreamExt;

use crate::{Error, Result};

/// Hands a query's batches to `seen`, in order.
pub(super) async fn each_batch(
    frame: DataFrame,
    context: &str,
    mut seen: impl FnMut(&RecordBatch) -> Result<()>,
) -> Result<()> {
    let mut batches = frame.execute_stream().await.map_err(Error::query(context))?;
    while let Some(batch) = batches.try_next().await.map_err(Error::query(context))? {
        seen(&batch)?;
    }
    Ok(())
}

/// The value of a row, all of which a column has.
pub(super) fn at<T: Copy + Default>(column: &[T], row: usize) -> T {
    column.get(row).copied().unwrap_or_default()
}

/// The columns of a query's batch, by name and type.
pub(super) struct Columns<'a>(&'a RecordBatch);

impl<'a> Columns<'a> {
    pub(super) const fn of(batch: &'a RecordBatch) -> Self {
        Self(batch)
    }

    pub(super) fn times(&self, name: &str) -> Result<impl Iterator<Item = DateTime<Utc>> + use<'a>> {
        let times = self.numbers::<TimestampMicrosecondType>(name)?;
        // Every time of the archive, and the start of every bin, is one.
        Ok(times.iter().map(|micros| DateTime::from_timestamp_micros(*micros).unwrap_or_default()))
    }

    pub(super) fn texts(&self, name: &str) -> Result<impl Iterator<Item = Option<&'a str>> + use<'a>> {
        let column = self.0.column_by_name(name);
        Ok(column.and_then(|column| column.as_string_opt::<i32>()).ok_or_else(|| self.lacks(name))?.iter())
    }

    pub(super) fn all_doubles<const N: usize>(&self, names: [&str; N]) -> Result<[&'a [f64]; N]> {
        let mut found = [[].as_slice(); N];
        for (column, name) in found.iter_mut().zip(names) {
            *column = self.doubles(name)?;
        }
        Ok(found)
    }

    pub(super) fn all_longs<const N: usize>(&self, names: [&str; N]) -> Result<[&'a [i64]; N]> {
        let mut found = [[].as_slice(); N];
        for (column, name) in found.iter_mut().zip(names) {
            *column = self.longs(name)?;
        }
        Ok(found)
    }

    pub(super) fn doubles(&self, name: &str) -> Result<&'a [f64]> {
        self.numbers::<Float64Type>(name)
    }

    pub(super) fn ints(&self, name: &str) -> Result<&'a [i32]> {
        self.numbers::<Int32Type>(name)
    }

    pub(super) fn longs(&self, name: &str) -> Result<&'a [i64]> {
        self.numbers::<Int64Type>(name)
    }

    fn numbers<T: ArrowPrimitiveType>(&self, name: &str) -> Result<&'a [T::Native]> {
        let column = self.0.column_by_name(name).and_then(|column| column.as_primitive_opt::<T>());
        let column = column.filter(|column| column.nulls().is_none_or(|nulls| nulls.null_count() == 0));
        Ok(column.ok_or_else(|| self.lacks(name))?.values())
    }

    fn lacks(&self, name: &str) -> Error {
        Error::Internal(format!("a query's result lacks {name}: {}", self.0.schema()))
    }
}
