//! The archive against real stores: a local disk, and S3 as `moto_server` plays it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arrow::array::{
    Array, ArrayRef, AsArray, DictionaryArray, Float64Array, Int32Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{Float64Type, Int32Type, TimestampMicrosecondType};
use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Encoding;

use super::log::entry_path;
use super::*;
use crate::config::ObjectStorageSettings;
use crate::record::{Kind, MICROS_PER_DAY, Window, WindowWidth};
use crate::{Error, Lsn};

const APP: &str = "highwater/7/slot";
const NOON: i64 = 1_700_000_000_000_000 / MICROS_PER_DAY * MICROS_PER_DAY + MICROS_PER_DAY / 2;

/// Counts requests, and can answer a put that landed with an error.
#[derive(Debug)]
struct Observed {
    inner: Arc<dyn ObjectStore>,
    requests: AtomicU64,
    lose_next_answer: AtomicBool,
}

impl std::fmt::Display for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observed")
    }
}

impl Observed {
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
        self.inner.get_opts(at, how).await
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
        let inner: Arc<dyn ObjectStore> = Arc::new(synced::SyncedLocal::open(folder.path()).unwrap());
        let (requests, lose_next_answer) = (AtomicU64::new(0), AtomicBool::new(false));
        let observed = Arc::new(Observed { inner, requests, lose_next_answer });
        let url = format!("file://{}/", folder.path().display());
        let root = Arc::clone(&observed) as Arc<dyn ObjectStore>;
        Self { storage: Storage::from_store(root, &url).unwrap(), folder, observed, namer: Namer::new() }
    }

    async fn claim(&self, session: &str) -> Table {
        Table::claim(&self.storage, Kind::Psi, APP, session, Lsn(100)).await.unwrap()
    }

    async fn file(&self, batch: RecordBatch, lsn: u64) -> DataFile {
        self.file_with(&self.namer, batch, lsn).await
    }

    async fn file_with(&self, namer: &Namer, batch: RecordBatch, lsn: u64) -> DataFile {
        let file = encode(Kind::Psi, [batch]).unwrap().unwrap();
        let window = Window::of(file.stats.min_time, WindowWidth::DAY);
        upload(&self.storage, Kind::Psi, namer.name(window, Lsn(lsn)), file).await.unwrap()
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
    let schema = Kind::Psi.schema();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_upload_and_commit_leaves_the_position() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    assert_eq!(table.lsn(), Lsn(100));
    for (lsn, count) in [(200, 10), (300, 5)] {
        let file = place.file(rows(count), lsn).await;
        table.commit(&[file], Lsn(lsn), &note()).await.unwrap();
    }
    table.commit(&[], Lsn(350), &note()).await.unwrap();
    let orphan = place.file(rows(3), 400).await;
    let before = table.totals();
    drop(table);
    let table = place.claim("two").await;
    assert_eq!(table.lsn(), Lsn(350));
    assert_eq!((table.totals().row_count, table.totals().file_count), (15, 2));
    assert_eq!(table.totals().byte_count, before.byte_count);
    assert_eq!(before.max_created_at, Some(NOON + 9));
    assert_eq!(table.totals().max_created_at, Some(NOON + 1000), "rounded up to a millisecond");
    assert!(table.files().all(|file| file.path != orphan.path && file.name.is_some()));
    let paths: Vec<String> = table.files().map(|file| file.path.clone()).collect();
    let stats = entity_stats(&place.storage, Kind::Psi, &paths).await.unwrap();
    assert_eq!(stats.len(), 1);
    assert_eq!((stats[0].min_created_at, stats[0].max_created_at, stats[0].row_count), (NOON, NOON + 9, 15));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_successor_fences_even_before_it_writes() {
    let place = Place::new();
    let mut old = place.claim("old").await;
    let mut new = place.claim("new").await;
    let file = place.file(rows(1), 200).await;
    let error = old.commit(std::slice::from_ref(&file), Lsn(200), &note()).await.unwrap_err();
    assert!(matches!(error, Error::Fenced { .. }), "{error}");
    assert!(matches!(old.vacuum(&place.namer, Duration::ZERO).await, Err(Error::Fenced { .. })));
    new.commit(&[file], Lsn(200), &note()).await.unwrap();
    assert_eq!(new.totals().row_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeper_does_not_trust_a_trimmed_log() {
    let place = Place::new();
    let mut old = place.claim("old").await;
    let mut new = place.claim("new").await;
    for number in 1..=210 {
        new.commit(&[], Lsn(100 + number), &note()).await.unwrap();
        if number % 100 == 0 {
            place.age(Duration::from_hours(2));
        }
        new.maintain().await;
    }
    let next = place.folder.path().join("psi").join(entry_path(old.version() + 1).as_ref());
    assert!(!next.exists(), "the claim itself is trimmed");
    old.looked_at -= Duration::from_mins(90);
    for _ in 0..2 {
        let error = old.commit(&[], Lsn(200), &note()).await.unwrap_err();
        assert!(matches!(error, Error::Fenced { .. }), "{error}");
    }
    assert_eq!(place.claim("third").await.lsn(), Lsn(310), "what it wrote is not in the table");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_was_given_up_may_still_land() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    for lsn in [200, 300] {
        table.commit(&[place.file(rows(5), lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    // It lands through another handle's eyes: put the very entry, but tell this handle nothing.
    let version = table.version();
    let entry = table.entry_of_merge(&merged).unwrap();
    place.storage.table_store(Kind::Psi).put(&entry_path(version + 1), entry.into()).await.unwrap();
    table.commit(&[place.file(rows(3), 400).await], Lsn(400), &note()).await.unwrap();
    assert_eq!(table.version(), version + 2);
    assert_eq!((table.totals().row_count, table.totals().file_count), (13, 2));
    assert!(!table.commit_merge(&merged).await.unwrap());
    let again = place.claim("two").await;
    assert_eq!((again.totals().row_count, again.totals().file_count, again.lsn()), (13, 2, Lsn(400)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_recognised() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let file = place.file(rows(4), 200).await;
    place.observed.lose_next_answer.store(true, Ordering::Relaxed);
    table.commit(&[file], Lsn(200), &note()).await.unwrap();
    let file = place.file(rows(2), 300).await;
    table.commit(&[file], Lsn(300), &note()).await.unwrap();
    assert_eq!((table.totals().row_count, table.totals().file_count), (6, 2));
    drop(table);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.lsn()), (6, Lsn(300)));
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_entries_are_passed_over_and_foreign_columns_are_not() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let store = place.storage.table_store(Kind::Psi);
    let foreign = r#"{"commitInfo":{"operation":"OPTIMIZE"}}
{"txn":{"appId":"somebody else","version":9}}"#;
    store.put(&entry_path(table.version() + 1), foreign.into()).await.unwrap();
    let file = place.file(rows(4), 200).await;
    table.commit(&[file], Lsn(200), &note()).await.unwrap();
    assert_eq!((table.version(), table.lsn()), (3, Lsn(200)));
    let changed = r#"{"metaData":{"schemaString":"{\"type\":\"struct\",\"fields\":[{\"name\":\"x\",\"type\":\"long\",\"nullable\":true,\"metadata\":{}}]}"}}"#;
    store.put(&entry_path(table.version() + 1), changed.into()).await.unwrap();
    let error = table.commit(&[], Lsn(300), &note()).await.unwrap_err();
    assert!(error.chain().contains("it has (x long)"), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_stays_short_and_opening_cheap() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    for number in 1..=300 {
        table.commit(&[place.file(rows(1), 100 + number).await], Lsn(100 + number), &note()).await.unwrap();
        if number % 100 == 0 {
            place.age(Duration::from_hours(2));
        }
        table.maintain().await;
    }
    let log = std::fs::read_dir(place.folder.path().join("psi/_delta_log")).unwrap().count();
    assert!(log < 110, "{log} files in the log");
    place.observed.requests.store(0, Ordering::Relaxed);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.lsn()), (300, Lsn(400)));
    let requests = place.observed.requests.load(Ordering::Relaxed);
    assert!(requests < 20, "{requests} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_keeps_every_row_and_changes_none() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let mut wanted = Vec::new();
    for number in 0..60_u64 {
        let base = NOON + (number as i64 * 7919) % 60;
        let mut part: Vec<(i64, &str, i32)> = Vec::new();
        for name in ["a", "b", "c"] {
            part.extend((0..500).map(|row| (base + row * 60, name, number as i32)));
        }
        wanted.extend(part.iter().map(|row| (row.1.to_owned(), row.0, row.2)));
        table
            .commit(&[place.file(psi(&part), 200 + number).await], Lsn(200 + number), &note())
            .await
            .unwrap();
    }
    let before = table.totals();
    assert!(table.merge_candidates(NOON, Duration::ZERO, WindowWidth::DAY).is_empty(), "the day is not over");
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    assert_eq!((plans.len(), plans[0].inputs.len()), (1, 60));
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    assert!(!table.commit_merge(&merged).await.unwrap(), "its inputs are gone");
    assert_eq!((table.totals().row_count, table.totals().file_count), (before.row_count, 1));
    assert_eq!(table.lsn(), Lsn(259));
    let file = table.files().next().unwrap().clone();
    assert_eq!(file.name.as_ref().unwrap().lsn, Lsn(259));
    let store = place.storage.table_store(Kind::Psi);
    let mut found = Vec::new();
    for batch in read(store.get(&Path::from(file.path.as_str())).await.unwrap().bytes().await.unwrap()) {
        let times = batch.column(0).as_primitive::<TimestampMicrosecondType>();
        let (names, counts) =
            (batch.column(2).as_string::<i32>(), batch.column(6).as_primitive::<Int32Type>());
        let all = (0..batch.num_rows())
            .map(|row| (names.value(row).to_owned(), times.value(row), counts.value(row)));
        found.extend(all);
    }
    assert!(found.is_sorted_by_key(|row| (row.0.clone(), row.1)));
    found.sort();
    wanted.sort();
    assert_eq!(found, wanted);
    let entry = store.get(&entry_path(table.version())).await.unwrap().bytes().await.unwrap();
    let entry = String::from_utf8(entry.to_vec()).unwrap();
    assert_eq!(entry.matches(r#""dataChange":false"#).count(), 61);
    assert!(!entry.contains(r#""dataChange":true"#));

    table.commit(&[place.file(rows(10), 300).await], Lsn(300), &note()).await.unwrap();
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    drop(table);
    let table = place.claim("two").await;
    assert_eq!((table.totals().row_count, table.totals().file_count), (before.row_count + 10, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_spares_what_may_still_be_needed() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let earlier = Namer::new();
    for lsn in [200, 300] {
        table.commit(&[place.file_with(&earlier, rows(5), lsn).await], Lsn(lsn), &note()).await.unwrap();
    }
    let old_orphan = place.file_with(&earlier, rows(5), 400).await;
    let own_orphan = place.file(rows(5), 400).await;
    place.age(Duration::from_hours(48));
    let young_orphan = place.file_with(&earlier, rows(5), 500).await;
    let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let inputs: Vec<String> = plans[0].inputs.iter().map(|file| file.path.clone()).collect();
    let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
    assert!(table.commit_merge(&merged).await.unwrap());
    let day = Duration::from_hours(24);
    assert_eq!(table.vacuum(&place.namer, day).await.unwrap(), 1);
    let exists = |path: &str| place.folder.path().join("psi").join(path).exists();
    assert!(!exists(&old_orphan.path) && exists(&own_orphan.path) && exists(&young_orphan.path));
    assert!(inputs.iter().all(|path| exists(path)), "removed a moment ago: a query may be reading them");
    tokio::time::sleep(Duration::from_millis(5)).await;
    // With no patience at all they go, and the young orphan with them.
    assert_eq!(table.vacuum(&place.namer, Duration::ZERO).await.unwrap(), 3);
    assert!(merged.outputs.iter().all(|file| exists(&file.path)));
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_leaves_alone_what_is_not_ours() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let ours = place.file_with(&Namer::new(), rows(1), 200).await.path;
    let store = place.storage.table_store(Kind::Psi);
    let foreign = ["custom/mymodel/x.parquet", "README", "_mine/x.parquet", ".mine/x.parquet"];
    // What was a file of the table goes; in a folder that readers don't look at it stays.
    let (dropped, hidden) = ("part-0.parquet", "_change_data/part-0.parquet");
    let nested = format!("_backup/{ours}");
    let all = foreign.iter().copied().chain([dropped, hidden, nested.as_str()]);
    for path in all.clone() {
        store.put(&Path::from(path), "x".into()).await.unwrap();
    }
    let remove = |path| {
        format!(
            r#"{{"remove":{{"path":"{path}","deletionTimestamp":1,"dataChange":true,"partitionValues":{{}},"size":1}}}}"#
        )
    };
    let entry = format!("{}\n{}", remove(dropped), remove(hidden));
    store.put(&entry_path(table.version() + 1), entry.into()).await.unwrap();
    place.age(Duration::from_hours(48));
    assert_eq!(table.vacuum(&place.namer, Duration::from_hours(24)).await.unwrap(), 2);
    let exists = |path: &str| place.folder.path().join("psi").join(path).exists();
    assert!(!exists(&ours) && !exists(dropped));
    assert!(all.filter(|path| *path != dropped).all(exists));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_row_counts_that_went_to_another_folder() {
    let base = tempfile::tempdir().unwrap();
    let (folder, away) = (base.path().join("archive"), base.path().join("away"));
    let settings = ObjectStorageSettings::new(folder.to_str().unwrap(), "").unwrap();
    let storage = Storage::open(&settings).unwrap();
    let mut table = Table::claim(&storage, Kind::Psi, APP, "one", Lsn(100)).await.unwrap();
    let file = |lsn| {
        let file = encode(Kind::Psi, [rows(5)]).unwrap().unwrap();
        upload(&storage, Kind::Psi, Namer::new().name(Window::of(NOON, WindowWidth::DAY), Lsn(lsn)), file)
    };
    let uploaded = file(200).await.unwrap();
    std::fs::rename(&folder, &away).unwrap();
    let vanished = |error: Error| {
        let text = error.chain();
        assert!(text.contains("replaced or unmounted"), "{text}");
        assert!(matches!(error, Error::Storage { .. }) && error.is_transient(), "{text}");
    };
    vanished(table.commit(std::slice::from_ref(&uploaded), Lsn(200), &note()).await.unwrap_err());
    vanished(file(300).await.unwrap_err());
    assert!(!folder.exists(), "the path was made anew");
    // The mount point without its volume, even with a log that could go on.
    std::fs::create_dir_all(folder.join("psi/_delta_log")).unwrap();
    vanished(table.commit(std::slice::from_ref(&uploaded), Lsn(200), &note()).await.unwrap_err());
    assert_eq!(std::fs::read_dir(folder.join("psi/_delta_log")).unwrap().count(), 0);
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(&away, &folder).unwrap();
    table.commit(&[uploaded], Lsn(200), &note()).await.unwrap();
    assert_eq!((table.totals().row_count, table.lsn()), (5, Lsn(200)));
    // Only the table's part of it is gone.
    std::fs::rename(folder.join("psi"), &away).unwrap();
    let error = table.commit(&[], Lsn(300), &note()).await.unwrap_err();
    assert!(error.is_transient() && error.chain().contains("has vanished"), "{}", error.chain());
    assert!(!folder.join("psi").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_counts_once_its_name_is_synced() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let file = place.file(rows(5), 200).await;
    let log = place.folder.path().join("psi/_delta_log");
    synced::tests::fail_syncs(&log, 3);
    for _ in 0..4 {
        let landed = table.commit(std::slice::from_ref(&file), Lsn(200), &note()).await.is_ok();
        assert!(log.join("00000000000000000002.json").exists(), "the entry can be read");
        assert_eq!(landed, synced::tests::failures_left(&log) == 0);
        if landed {
            break;
        }
    }
    assert_eq!((table.totals().row_count, table.version()), (5, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_unreadable_file_does_not_stop_other_merges() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let mut broken = String::new();
    for day in [0, 1] {
        for lsn in 200..202 {
            let file = place.file(psi(&[(NOON + day * MICROS_PER_DAY, "a", 1)]), lsn).await;
            if day == 0 {
                broken.clone_from(&file.path);
            }
            table.commit(&[file], Lsn(201), &note()).await.unwrap();
        }
    }
    std::fs::write(place.folder.path().join("psi").join(&broken), "broken").unwrap();
    let plans = || table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let mut turns = MergeTurns::default();
    let mut now = std::time::Instant::now();
    let first = turns.choose(plans(), now).unwrap();
    let error = merge(&place.storage, &place.namer, &first).await.unwrap_err();
    assert!(error.chain().contains(&broken), "{}", error.chain());
    assert_eq!(turns.failed(now), Some((first.window.clone(), Duration::from_mins(10))));
    let second = turns.choose(plans(), now).unwrap();
    assert_ne!(second.window, first.window);
    merge(&place.storage, &place.namer, &second).await.unwrap();
    turns.succeeded();
    // The failed one comes back, less and less often.
    for minutes in [20, 40, 80, 160, 320, 360, 360] {
        let pause = turns.failed.values().map(|(again_at, _)| *again_at - now).next().unwrap();
        assert_eq!(turns.choose(plans().into_iter().take(1), now + pause / 2), None);
        now += pause;
        assert_eq!(turns.choose(plans(), now).map(|plan| plan.window), Some(first.window.clone()));
        assert_eq!(turns.failed(now).unwrap().1, Duration::from_mins(minutes));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_table_is_made_around_the_files_of_others() {
    let place = Place::new();
    let orphan = place.file(rows(1), 200).await;
    let store = place.storage.table_store(Kind::Psi);
    let foreign = Path::from("models/x.parquet");
    store.put(&foreign, "x".into()).await.unwrap();
    let claim = || Table::claim(&place.storage, Kind::Psi, APP, "one", Lsn(100));
    let error = claim().await.unwrap_err();
    assert!(!error.is_transient());
    let folder = place.storage.table_url(Kind::Psi).to_string();
    assert!(error.chain().contains(&folder) && error.chain().contains(foreign.as_ref()), "{}", error.chain());
    assert!(!place.folder.path().join("psi/_delta_log").exists());
    store.delete(&foreign).await.unwrap();
    claim().await.unwrap();
    assert!(place.folder.path().join("psi").join(orphan.path).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn vacuum_removes_what_a_killed_put_left() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let ours = place.file(rows(1), 200).await.path;
    let folder = place.folder.path().join("psi");
    let left = |name: String| {
        let path = folder.join(name);
        std::fs::write(&path, "x").unwrap();
        path
    };
    let old = left(format!("{ours}#17"));
    let foreign = [left("x.parquet#17".to_owned()), left(format!("{ours}#x"))];
    place.age(Duration::from_hours(48));
    let young = left(format!("{ours}#18"));
    assert_eq!(table.vacuum(&place.namer, Duration::from_hours(24)).await.unwrap(), 1);
    assert!(!old.exists() && young.exists() && foreign.iter().all(|path| path.exists()));
}

/// `moto_server` on a free port; ends with the value.
struct Moto {
    server: std::process::Child,
    port: u16,
}

impl Moto {
    async fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = std::process::Command::new("moto_server")
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let moto = Self { server, port };
        for _ in 0..600 {
            let created = std::process::Command::new("curl")
                .args(["-sf", "-X", "PUT", &format!("http://127.0.0.1:{port}/bucket")])
                .output()
                .unwrap();
            if created.status.success() {
                return moto;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("moto_server did not start");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_holds_on_s3() {
    let moto = Moto::start().await;
    let store = object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://127.0.0.1:{}", moto.port))
        .with_allow_http(true)
        .with_bucket_name("bucket")
        .with_region("us-east-1")
        .with_access_key_id("test")
        .with_secret_access_key("test")
        .build()
        .unwrap();
    let storage = Storage::from_store(Arc::new(store), "s3://bucket/some/prefix/").unwrap();
    storage.probe().await.unwrap();
    let namer = Namer::new();
    let mut old = Table::claim(&storage, Kind::Psi, APP, "old", Lsn(1)).await.unwrap();
    for lsn in 2..=4 {
        let file = encode(Kind::Psi, [rows(1000)]).unwrap().unwrap();
        let path = namer.name(Window::of(NOON, WindowWidth::DAY), Lsn(lsn));
        let file = upload(&storage, Kind::Psi, path, file).await.unwrap();
        old.commit(&[file], Lsn(lsn), &note()).await.unwrap();
    }
    let mut new = Table::claim(&storage, Kind::Psi, APP, "new", Lsn(1)).await.unwrap();
    assert_eq!(
        (new.lsn(), new.totals()),
        (Lsn(4), Totals { max_created_at: Some(NOON + 1000), ..old.totals() })
    );
    assert!(matches!(old.commit(&[], Lsn(5), &note()).await, Err(Error::Fenced { .. })));
    let plans = new.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&storage, &namer, &plans[0]).await.unwrap();
    assert!(new.commit_merge(&merged).await.unwrap());
    let paths: Vec<String> = new.files().map(|file| file.path.clone()).collect();
    assert_eq!(entity_stats(&storage, Kind::Psi, &paths).await.unwrap()[0].row_count, 3000);
}

#[test]
fn local_settings_open_a_storage() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ObjectStorageSettings::new(&format!("file://{}/x", folder.path().display()), "").unwrap();
    let storage = Storage::open(&settings).unwrap();
    assert!(storage.table_url(Kind::Psi).as_str().ends_with("/x/psi/"));
}

/// The futures run on other threads of the runtime.
#[allow(dead_code, reason = "it need only compile")]
fn futures_can_be_spawned(storage: &Storage, namer: &Namer, plan: &MergePlan, table: &'static mut Table) {
    const fn spawnable<T: Send>(_: &T) {}
    spawnable(&merge(storage, namer, plan));
    spawnable(&entity_stats(storage, Kind::Psi, &[]));
    spawnable(&async move {
        table.maintain().await;
        table.commit(&[], Lsn(1), &note()).await?;
        table.vacuum(&Namer::new(), Duration::ZERO).await
    });
    spawnable(&Table::claim(storage, Kind::Psi, APP, "", Lsn(1)));
}
