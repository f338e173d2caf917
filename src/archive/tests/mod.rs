//! The archive against real stores: a local disk, and S3 as moto plays it.

mod columns;
mod commits;
mod doubles;
mod encoding;
mod hostile;
mod stores;
mod upkeep;
mod versions;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arrow::array::{
    ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::Int32Type;
use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::files::{footer, object_reader};
use super::log::entry;
use super::store::synced;
use super::*;
use crate::config::LocalAccess;
use crate::tables::{Kind, MICROS_PER_DAY, MICROS_PER_HOUR, Window, WindowWidth};
use crate::{Error, Lsn};

const APP: &str = "highwater/7/slot";
const NOON: i64 = 1_700_000_000_000_000 / MICROS_PER_DAY * MICROS_PER_DAY + MICROS_PER_DAY / 2;

/// Counts requests and the bytes that were read, and can answer a put that landed with an error.
#[derive(Debug)]
pub(crate) struct Observed {
    inner: Arc<dyn ObjectStore>,
    pub(crate) requests: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    lose_next_answer: AtomicBool,
}

impl std::fmt::Display for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observed")
    }
}

impl Observed {
    /// The archive's folder on disk, observed.
    pub(crate) fn folder(folder: &std::path::Path) -> (Arc<Self>, Storage) {
        let inner: Arc<dyn ObjectStore> =
            Arc::new(synced::SyncedLocal::open(folder, LocalAccess::Owner).unwrap());
        let observed = Arc::new(Self {
            inner,
            requests: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            lose_next_answer: AtomicBool::new(false),
        });
        let url = format!("file://{}/", folder.display());
        let storage = Storage::from_store(Arc::clone(&observed) as Arc<dyn ObjectStore>, &url).unwrap();
        (observed, storage)
    }

    fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

#[async_trait]
impl ObjectStore for Observed {
    async fn put_opts(
        &self,
        at: &Path,
        bytes: PutPayload,
        how: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.count();
        let result = self.inner.put_opts(at, bytes, how).await;
        if self.lose_next_answer.swap(false, Ordering::Relaxed) {
            return Err(object_store::Error::Generic { store: "test", source: "the answer was lost".into() });
        }
        result
    }
    async fn put_multipart_opts(
        &self,
        at: &Path,
        how: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, how).await
    }
    async fn get_opts(&self, at: &Path, how: GetOptions) -> object_store::Result<GetResult> {
        self.count();
        let result = self.inner.get_opts(at, how).await?;
        self.bytes_read.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
        Ok(result)
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.count();
        self.inner.list(prefix)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.count();
        self.inner.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.count();
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, how: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, how).await
    }
}

struct Place {
    folder: tempfile::TempDir,
    storage: Storage,
    observed: Arc<Observed>,
    namer: Namer,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (observed, storage) = Observed::folder(folder.path());
        Self { storage, folder, observed, namer: Namer::new() }
    }

    async fn claim(&self, session: &str) -> Table {
        Table::claim(&self.storage, Kind::psi(), APP, session, Lsn(100)).await.unwrap()
    }

    async fn file(&self, batch: RecordBatch, lsn: u64) -> DataFile {
        self.file_with(&self.namer, batch, lsn).await
    }

    async fn file_with(&self, namer: &Namer, batch: RecordBatch, lsn: u64) -> DataFile {
        let file = encode(Kind::psi(), [batch]).unwrap().unwrap();
        let window = Window::of(file.stats.min_time, WindowWidth::DAY);
        upload(&self.storage, Kind::psi(), namer.name(window, Lsn(lsn)), file).await.unwrap()
    }

    /// Makes everything in the table's folder look this old.
    fn age(&self, by: Duration) {
        fn visit(folder: &std::path::Path, time: std::time::SystemTime) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    visit(&path, time);
                } else {
                    std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
                }
            }
        }
        visit(&self.folder.path().join("psi"), std::time::SystemTime::now() - by);
    }
}

/// PSI rows: per row a time, a name, and a count; sorted by the caller.
fn psi(rows: &[(i64, &str, i32)]) -> RecordBatch {
    let times =
        TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.0)).with_timezone("UTC");
    let same = |text: &str| Arc::new(StringArray::from_iter_values(rows.iter().map(|_| text))) as ArrayRef;
    let names: DictionaryArray<Int32Type> = rows.iter().map(|row| row.1).collect();
    let counts = Int32Array::from_iter_values(rows.iter().map(|row| row.2));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(times),
        same("space"),
        Arc::new(names),
        same("1"),
        same("feature"),
        Arc::new(Int32Array::from(vec![7; rows.len()])),
        Arc::new(counts),
    ];
    let schema = Kind::psi().schema();
    let fields = schema.fields().iter().zip(&columns);
    let fields =
        fields.map(|(field, column)| field.as_ref().clone().with_data_type(column.data_type().clone()));
    let schema = arrow::datatypes::Schema::new(fields.collect::<Vec<_>>());
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

/// What commits `count` rows of one entity.
fn rows(count: usize) -> RecordBatch {
    psi(&(0..count).map(|row| (NOON + row as i64, "model", 1)).collect::<Vec<_>>())
}

fn read(bytes: bytes::Bytes) -> Vec<RecordBatch> {
    ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap().map(Result::unwrap).collect()
}

/// A moment after everything so far, long after the rows' day.
fn later() -> i64 {
    chrono::Utc::now().timestamp_micros() + 1_000_000
}

fn note() -> CommitNote {
    CommitNote { first_committed_at: Some(NOON), ..CommitNote::default() }
}

/// The futures run on other threads of the runtime.
#[allow(dead_code, reason = "it need only compile")]
fn futures_can_be_spawned(storage: &Storage, namer: &Namer, plan: &MergePlan, table: &'static mut Table) {
    const fn spawnable<T: Send>(_: &T) {}
    spawnable(&merge(storage, namer, plan));
    spawnable(&entity_stats(storage, Kind::psi(), &[]));
    spawnable(&async move {
        table.write_without(&Namer::new(), &Doubles::new(Kind::psi())).await?;
        table.maintain().await;
        table.commit(&[], Lsn(1), &note()).await?;
        table.vacuum(&Namer::new(), Duration::ZERO).await
    });
    spawnable(&Table::claim(storage, Kind::psi(), APP, "", Lsn(1)));
}
