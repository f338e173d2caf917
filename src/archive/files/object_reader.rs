use std::ops::Range;
use std::sync::Arc;

use arrow::array::{RecordBatch, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Schema, TimeUnit};
use arrow::error::ArrowError;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::{AsyncFileReader, ParquetRecordBatchStreamBuilder};
use parquet::basic::LogicalType;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use parquet::file::statistics::Statistics;

use super::footer;
use super::table_file::TableFile;
use crate::Error;
use crate::archive::error::{encode_error, parquet_error, unreadable};
use crate::archive::store::storage::Storage;
use crate::tables::Kind;

/// A Parquet file in object storage.
#[derive(Debug)]
pub(in crate::archive) struct ObjectReader {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: Option<u64>,
    /// What is read now is the footer, not pages.
    is_in_footer: bool,
}

impl ObjectReader {
    /// Reads a path of a store; without a size it is asked for.
    pub(in crate::archive) fn new(store: Arc<dyn ObjectStore>, path: &str, size: Option<u64>) -> Self {
        Self { store, path: Path::from(path), size, is_in_footer: false }
    }

    async fn size(&mut self) -> Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(*self.size.insert(self.store.head(&self.path).await.map_err(external)?.size)),
        }
    }
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        async move {
            let bytes = self.store.get_range(&self.path, range).await.map_err(external)?;
            if !self.is_in_footer {
                footer::check_pages(&bytes)?;
            }
            Ok(bytes)
        }
        .boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move {
            let pieces = self.store.get_ranges(&self.path, &ranges).await.map_err(external)?;
            pieces.iter().try_for_each(|bytes| footer::check_pages(bytes))?;
            Ok(pieces)
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        async move {
            let size = self.size().await?;
            self.is_in_footer = true;
            let metadata = footer::load(self, size, false).await;
            self.is_in_footer = false;
            metadata.map(Arc::new)
        }
        .boxed()
    }
}

/// A file whose footer has been read.
pub(in crate::archive) type OpenFile = ParquetRecordBatchStreamBuilder<ObjectReader>;

/// Reads a file's footer.
pub(in crate::archive) async fn open(
    store: &Arc<dyn ObjectStore>,
    path: &str,
    context: &str,
) -> crate::Result<OpenFile> {
    let reader = ObjectReader::new(Arc::clone(store), path, None);
    footer::guarded_async(ParquetRecordBatchStreamBuilder::new(reader)).await.map_err(parquet_error(context))
}

/// Hands the rows of a file to `seen`, batch by batch.
pub(in crate::archive) async fn each_batch(
    store: &Arc<dyn ObjectStore>,
    path: &str,
    context: &str,
    seen: impl FnMut(&RecordBatch) -> crate::Result<()>,
) -> crate::Result<()> {
    each_batch_of(open(store, path, context).await?, None, context, seen).await
}

/// The same of an open file: all columns, or the ones that are named.
pub(in crate::archive) async fn each_batch_of(
    mut file: OpenFile,
    columns: Option<&[&str]>,
    context: &str,
    mut seen: impl FnMut(&RecordBatch) -> crate::Result<()>,
) -> crate::Result<()> {
    if let Some(columns) = columns {
        let mask = ProjectionMask::columns(file.parquet_schema(), columns.iter().copied());
        file = file.with_projection(mask);
    }
    let mut rows = file.build().map_err(parquet_error(context))?;
    while let Some(batch) = footer::guarded_async(rows.try_next()).await.map_err(parquet_error(context))? {
        seen(&as_ours(batch).map_err(encode_error(context))?).map_err(|error| match error {
            // Whoever expects the columns that ours have does not know whose file it is.
            Error::Internal(detail) => Error::Encode { context: context.to_owned(), source: detail.into() },
            other => other,
        })?;
    }
    Ok(())
}

/// Hands rows of these files (of one version of a table) to `seen`, batch by batch: all columns, or the ones that are named, of
/// all rows whose time is in one of the ranges (microseconds since the epoch, the first and the one after the last). Other
/// rows of their row groups are among them.
pub(in crate::archive) async fn each_batch_within(
    storage: &Storage,
    kind: Kind,
    files: &[&TableFile],
    ranges: &[(i64, i64)],
    columns: Option<&[&str]>,
    mut seen: impl FnMut(&RecordBatch) -> crate::Result<()>,
) -> crate::Result<()> {
    let store = storage.table_store(kind);
    for file in files {
        if !ranges.iter().any(|(start, end)| file.may_hold(*start, *end)) {
            continue;
        }
        let context = format!("reading {}{}", storage.table_url(kind), file.path);
        let open = open(&store, &file.path, &context).await.map_err(unreadable(kind))?;
        let may_hold = |group: &RowGroupMetaData| {
            let times = group_times(kind, group);
            times.is_none_or(|(low, high)| ranges.iter().any(|(start, end)| low < *end && *start <= high))
        };
        let groups = open.metadata().row_groups().iter().enumerate();
        let groups: Vec<usize> =
            groups.filter(|(_, group)| may_hold(group)).map(|(number, _)| number).collect();
        if !groups.is_empty() {
            let read = each_batch_of(open.with_row_groups(groups), columns, &context, &mut seen).await;
            read.map_err(unreadable(kind))?;
        }
    }
    Ok(())
}

/// The first and the last time of a row group, if its statistics tell and none is missing.
pub(in crate::archive) fn group_times(kind: Kind, group: &RowGroupMetaData) -> Option<(i64, i64)> {
    let times = column(group, kind.time_column())?;
    // Others may write times in other units.
    let is_micros = matches!(
        times.column_descr().logical_type_ref(),
        Some(LogicalType::Timestamp(time)) if time.unit == parquet::basic::TimeUnit::MICROS
    );
    match times.statistics()? {
        Statistics::Int64(range) if is_micros && range.null_count_opt() == Some(0) => {
            Some((*range.min_opt()?, *range.max_opt()?))
        }
        _ => None,
    }
}

/// A column of a row group.
pub(in crate::archive) fn column<'a>(
    group: &'a RowGroupMetaData,
    name: &str,
) -> Option<&'a ColumnChunkMetaData> {
    group.columns().iter().find(|column| column.column_path().string() == name)
}

/// Makes sure that the footers of files can be read, those that were written last first.
///
/// # Errors
///
/// Of the first that can't be: [`Error::Storage`](crate::Error::Storage), [`Error::Delta`](crate::Error::Delta) if it is no
/// Parquet file.
pub async fn check_footers<'a>(
    storage: &Storage,
    kind: Kind,
    files: impl IntoIterator<Item = &'a TableFile>,
) -> crate::Result<()> {
    let mut files: Vec<&TableFile> = files.into_iter().collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.modified_millis));
    let store = storage.table_store(kind);
    for file in files {
        let context = format!("reading {}{}", storage.table_url(kind), file.path);
        open(&store, &file.path, &context).await.map_err(unreadable(kind))?;
    }
    Ok(())
}

/// Reads all of a file (its path relative to the table), and drops it.
///
/// # Errors
///
/// [`Error::Storage`](crate::Error::Storage) if it can't be had, [`Error::Delta`](crate::Error::Delta) if it is no whole
/// Parquet file.
pub async fn read_through(storage: &Storage, kind: Kind, path: &str) -> crate::Result<()> {
    let context = format!("reading {}{path}", storage.table_url(kind));
    each_batch(&storage.table_store(kind), path, &context, |_| Ok(())).await.map_err(unreadable(kind))
}

/// The rows with the columns of a kind, in its order and with our types. What a file is older than is null.
pub(in crate::archive) fn aligned(
    kind: Kind,
    batch: RecordBatch,
) -> std::result::Result<RecordBatch, ArrowError> {
    let batch = as_ours(batch)?;
    let schema = kind.schema();
    let rows = batch.num_rows();
    let column = |field: &FieldRef| match batch.column_by_name(field.name()) {
        Some(column) => Arc::clone(column),
        None => new_null_array(field.data_type(), rows),
    };
    let columns = schema.fields().iter().map(column).collect();
    RecordBatch::try_new(schema, columns)
}

/// The rows with the types that our own files have: whoever else writes into a table may have texts as views, or times in
/// other units.
pub(in crate::archive) fn as_ours(batch: RecordBatch) -> std::result::Result<RecordBatch, ArrowError> {
    let ours = |found: &DataType| match found {
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::Timestamp(..) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        found => found.clone(),
    };
    let schema = batch.schema();
    if schema.fields().iter().all(|field| ours(field.data_type()) == *field.data_type()) {
        return Ok(batch);
    }
    let fields = schema.fields().iter().map(|field| field.as_ref().clone());
    let fields = fields.map(|field| {
        let data_type = ours(field.data_type());
        field.with_data_type(data_type)
    });
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let columns = batch.columns().iter().zip(schema.fields());
    let columns = columns.map(|(column, field)| cast(column, field.data_type())).collect::<Result<_, _>>()?;
    RecordBatch::try_new(schema, columns)
}
