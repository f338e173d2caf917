//! The archive: Parquet files in one Delta table per kind, and the log entries that make them count.
//!
//! What no log entry names does not exist. So uploading is harmless and may be repeated; [`Table::commit`] is
//! the one step that archives rows, and [`Table::claim`] is what makes this process the only one that can
//! take it. Must not know Postgres.

mod columns;
mod digest;
mod doubles;
mod encode;
mod entities;
mod footer;
mod footers;
mod foreign;
mod hours;
mod log;
mod maintain;
mod marks;
mod merge;
mod name;
mod object_reader;
mod open;
mod probe;
mod s3;
mod scan;
mod snapshot;
mod stats;
mod storage;
mod synced;
mod table;
mod upload;
mod view;

#[cfg(test)]
pub(crate) mod tests;

use std::error::Error as StdError;

use deltalake_core::DeltaTableError;
use parquet::errors::ParquetError;

pub use digest::{Copies, Multiset, each_digest};
pub use doubles::{Doubles, Removal};
pub use encode::{EncodedFile, encode};
pub use entities::{EntityStats, QuarantinedText, each_quarantined, entity_stats};
pub use foreign::{Damaged, ForeignRemoval, broken_since, removes_since};
pub use hours::{HourSums, MinuteCounts, RowSum, hour_sums, minute_counts, sums_of};
pub use log::{TableFile, app_id};
pub use merge::{MergePlan, MergeTurns, Merged, merge};
pub use name::{Namer, ObjectName};
pub use object_reader::{check_footers, read_through};
pub(crate) use scan::{MEMORY_BYTES, Scan, runtime, session};
pub use snapshot::Snapshot;
pub use stats::FileStats;
pub use storage::Storage;
pub(crate) use storage::nothing_in;
pub use table::{CommitNote, Table, Totals};
pub use upload::{DataFile, upload};
pub use view::View;

use crate::Error;
use crate::record::Kind;

fn encode_error<E: StdError + Send + Sync + 'static>(context: impl Into<String>) -> impl FnOnce(E) -> Error {
    let context = context.into();
    move |source| Error::Encode { context, source: Box::new(source) }
}

/// Wraps a failure of reading or writing Parquet; what storage caused is a storage failure, worth a retry.
fn parquet_error(context: impl Into<String>) -> impl FnOnce(ParquetError) -> Error {
    let context = context.into();
    move |error| match error {
        ParquetError::External(source) => match source.downcast::<object_store::Error>() {
            Ok(source) => Error::Storage { context, source: *source },
            Err(source) => match source.downcast::<std::io::Error>() {
                Ok(source) => Error::Io { context, source: *source },
                Err(source) => Error::Encode { context, source },
            },
        },
        error => Error::Encode { context, source: Box::new(error) },
    }
}

impl Error {
    /// Wraps a failure of the Delta library.
    fn delta(kind: Kind, context: impl Into<String>) -> impl FnOnce(DeltaTableError) -> Self {
        let context = context.into();
        move |source| Self::Delta { table: kind.name().to_owned(), context, source: Box::new(source) }
    }
}

/// Says of a file that is not what it should be that its table is not: others can go on without that.
fn unreadable(kind: Kind) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Encode { context, source } => {
            Error::delta(kind, context)(DeltaTableError::GenericError { source })
        }
        other => other,
    }
}

/// What we ourselves find wrong with a table, as an error of the library.
fn unusable(kind: Kind, context: &str, detail: &str) -> Error {
    Error::delta(kind, context)(DeltaTableError::Generic(detail.to_owned()))
}
