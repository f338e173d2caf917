//! Failures of the archive, told by what they were met with.

use std::error::Error as StdError;

use deltalake_core::DeltaTableError;
use parquet::errors::ParquetError;

use crate::Error;
use crate::tables::Kind;

pub(super) fn encode_error<E: StdError + Send + Sync + 'static>(
    context: impl Into<String>,
) -> impl FnOnce(E) -> Error {
    let context = context.into();
    move |source| Error::Encode { context, source: Box::new(source) }
}

/// Wraps a failure of reading or writing Parquet; what storage caused is a storage failure, worth a retry.
pub(super) fn parquet_error(context: impl Into<String>) -> impl FnOnce(ParquetError) -> Error {
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
    pub(super) fn delta(kind: Kind, context: impl Into<String>) -> impl FnOnce(DeltaTableError) -> Self {
        let context = context.into();
        move |source| Self::Delta { table: kind.name().to_owned(), context, source: Box::new(source) }
    }
}

/// Says of a file that is not what it should be that its table is not: others can go on without that.
pub(super) fn unreadable(kind: Kind) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Encode { context, source } => {
            Error::delta(kind, context)(DeltaTableError::GenericError { source })
        }
        other => other,
    }
}

/// What we ourselves find wrong with a table, as an error of the library.
pub(super) fn unusable(kind: Kind, context: &str, detail: &str) -> Error {
    Error::delta(kind, context)(DeltaTableError::Generic(detail.to_owned()))
}
