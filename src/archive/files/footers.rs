use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::ParquetFileReaderFactory;
use datafusion::datasource::physical_plan::parquet::{CachedParquetFileReaderFactory, CachedParquetMetaData};
use datafusion::error::Result;
use datafusion::execution::cache::cache_manager::{CachedFileMetadataEntry, FileMetadataCache};
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use futures::future::BoxFuture;
use object_store::{ObjectMeta, ObjectStore};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ParquetMetaData;

use super::footer;

/// Readers that fetch a file's page index with its footer, look at both before they are decoded, and keep them. DataFusion's own
/// keeps the footer, and fetches the index by another request in every query.
#[derive(Debug)]
pub(in crate::archive) struct Footers {
    readers: CachedParquetFileReaderFactory,
    cache: Arc<FileMetadataCache>,
}

impl Footers {
    pub(in crate::archive) fn new(store: Arc<dyn ObjectStore>, cache: Arc<FileMetadataCache>) -> Self {
        Self { readers: CachedParquetFileReaderFactory::new(store, Arc::clone(&cache)), cache }
    }
}

impl ParquetFileReaderFactory for Footers {
    fn create_reader(
        &self,
        partition: usize,
        file: PartitionedFile,
        size_hint: Option<usize>,
        metrics: &ExecutionPlanMetricsSet,
    ) -> Result<Box<dyn AsyncFileReader + Send>> {
        let object = file.object_meta.clone();
        let reader = self.readers.create_reader(partition, file, size_hint, metrics)?;
        Ok(Box::new(WithIndex { reader, object, cache: Arc::clone(&self.cache) }))
    }
}

struct WithIndex {
    reader: Box<dyn AsyncFileReader + Send>,
    object: ObjectMeta,
    cache: Arc<FileMetadataCache>,
}

impl WithIndex {
    fn cached(&self) -> Option<Arc<ParquetMetaData>> {
        let entry = self.cache.get(&self.object.location).filter(|entry| entry.is_valid_for(&self.object))?;
        let cached = entry.file_metadata.as_any().downcast_ref::<CachedParquetMetaData>()?;
        Some(Arc::clone(cached.parquet_metadata()))
    }
}

impl AsyncFileReader for WithIndex {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        Box::pin(async move {
            let bytes = self.reader.get_bytes(range).await?;
            footer::check_pages(&bytes).map(|()| bytes)
        })
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, ParquetResult<Vec<Bytes>>> {
        Box::pin(async move {
            let pieces = self.reader.get_byte_ranges(ranges).await?;
            pieces.iter().try_for_each(|bytes| footer::check_pages(bytes))?;
            Ok(pieces)
        })
    }

    fn get_metadata<'a>(
        &'a mut self,
        _options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        Box::pin(async move {
            if let Some(metadata) = self.cached() {
                return Ok(metadata);
            }
            let metadata = footer::load(self.reader.as_mut(), self.object.size, true).await;
            let location = &self.object.location;
            let named = |error| match error {
                error @ ParquetError::External(_) => error,
                error => ParquetError::General(format!("{location}: {error}")),
            };
            let metadata = Arc::new(metadata.map_err(named)?);
            let cached = Arc::new(CachedParquetMetaData::new(Arc::clone(&metadata)));
            self.cache.put(location, CachedFileMetadataEntry::new(self.object.clone(), cached));
            Ok(metadata)
        })
    }
}
