//! Small files into large ones: those of a window that has ended, windows into days, days into months. And files of the first
//! builds, whose encodings few engines read, into ones that all read.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use arrow::compute::interleave_record_batch;
use arrow::row::{RowConverter, Rows, SortField};
use chrono::Utc;
use futures::TryStreamExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::AsyncArrowWriter;
use parquet::arrow::async_reader::{ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};

use crate::archive::error::{encode_error, parquet_error};
use crate::archive::files::encode::{Packer, Step, writer_options};
use crate::archive::files::footer;
use crate::archive::files::name::Namer;
use crate::archive::files::name::{ObjectName, Span};
use crate::archive::files::object_reader::{ObjectReader, aligned};
use crate::archive::files::stats::StatsBuilder;
use crate::archive::files::table_file::TableFile;
use crate::archive::files::upload::DataFile;
use crate::archive::log::table::Merged;
use crate::archive::log::table::Table;
use crate::archive::store::storage::Storage;
use crate::tables::{Kind, MICROS_PER_DAY, MICROS_PER_HOUR, WindowWidth};
use crate::{Error, Lsn, Result, failpoint};

/// A merge ends a file past this size, at the next entity.
const TARGET_BYTES: u64 = 128 << 20;

/// Files below this size are worth a merge.
const SMALL_BYTES: u64 = TARGET_BYTES / 2;

/// With so many small files a window is merged even while late rows keep coming.
const SMALL_FILES_MAX: usize = 16;

/// Each input holds a row group in memory while it is merged.
const INPUTS_MAX: usize = 64;

/// How many bytes are written anew, at most, for each that a few small files add: else a late row would cost a month.
const REWRITE_MAX: u64 = 8;

/// Bytes of all inputs: a merge is done in minutes, and one that is cut off has not done much in vain.
const INPUT_BYTES_MAX: u64 = 2 << 30;

/// How long after its end a day, or a month, waits for late rows.
const LATE: [(Span, i64); 2] = [(Span::Month, MICROS_PER_DAY), (Span::Day, MICROS_PER_HOUR)];

/// Files of one window, day or month to be made into fewer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergePlan {
    /// The table's kind.
    pub kind: Kind,
    /// The window, day or month, as the outputs' names will have it.
    pub window: String,
    /// The files, at most 64.
    pub inputs: Vec<TableFile>,
    /// Whether all that is to be gained are encodings that every engine reads. Other merges go first.
    pub is_rewrite: bool,
}

impl Table {
    /// What is worth a merge: windows, days and months that have ended, with two or more files that are small (below half of
    /// 128 MiB) or of shorter spans, and either no new file for `quiet`, and enough in them, or 16 small files. A file goes into the longest span
    /// that has ended. Files with encodings that few engines read are written anew, even one alone. `width` is the length of windows within a day.
    #[must_use]
    pub fn merge_candidates(&self, now_micros: i64, quiet: Duration, width: WindowWidth) -> Vec<MergePlan> {
        let mut targets: BTreeMap<String, Vec<(&TableFile, &ObjectName)>> = BTreeMap::new();
        for file in self.files() {
            let Some(name) = file.name.as_ref().filter(|_| file.row_count.is_some()) else { continue };
            let Some((target, span)) = merge_target(name, now_micros, width) else { continue };
            if file.size < SMALL_BYTES || name.span < span || !name.is_portable {
                targets.entry(target).or_default().push((file, name));
            }
        }
        let quiet_since =
            now_micros.saturating_sub(i64::try_from(quiet.as_micros()).unwrap_or(i64::MAX)) / 1000;
        let plan = |(window, mut files): (String, Vec<(&TableFile, &ObjectName)>)| {
            let is_rewrite = !is_worth(&files, quiet_since);
            if is_rewrite
                && !(is_quiet(&files, quiet_since) && files.iter().any(|(_, name)| !name.is_portable))
            {
                return None;
            }
            files.sort_by_key(|(file, name)| (name.window_start, &file.path));
            let mut bytes = 0;
            let fits = |(index, (file, _)): &(usize, (&TableFile, _))| {
                bytes += file.size;
                *index < 2 || (*index < INPUTS_MAX && bytes <= INPUT_BYTES_MAX)
            };
            let inputs = files.into_iter().enumerate().take_while(fits).map(|(_, (file, _))| file.clone());
            Some(MergePlan { kind: self.kind(), window, inputs: inputs.collect(), is_rewrite })
        };
        targets.into_iter().filter_map(plan).collect()
    }

    /// How many files have encodings that few engines read; merges make them fewer.
    #[must_use]
    pub fn unportable_file_count(&self) -> usize {
        self.files().filter(|file| file.name.as_ref().is_some_and(|name| !name.is_portable)).count()
    }
}

/// Whether fewer files are worth writing these anew.
fn is_worth(files: &[(&TableFile, &ObjectName)], quiet_since: i64) -> bool {
    let small = files.iter().filter(|(file, _)| file.size < SMALL_BYTES).count();
    let largest = files.iter().map(|(file, _)| file.size).max().unwrap_or_default();
    let others = files.iter().map(|(file, _)| file.size).sum::<u64>() - largest;
    let is_enough = others >= largest / REWRITE_MAX && is_quiet(files, quiet_since);
    files.len() >= 2 && (is_enough || small >= SMALL_FILES_MAX)
}

fn is_quiet(files: &[(&TableFile, &ObjectName)], quiet_since: i64) -> bool {
    files.iter().all(|(file, _)| file.modified_millis < quiet_since)
}

/// The longest span that has ended around a file's window, by name; `None` if the window itself has not.
fn merge_target(name: &ObjectName, now_micros: i64, width: WindowWidth) -> Option<(String, Span)> {
    for (span, late) in LATE {
        let around = name.around(span);
        if let Some((target, _)) = around.filter(|(_, end)| end.saturating_add(late) < now_micros) {
            return Some((target, span));
        }
    }
    let length = match name.span {
        Span::Window => width.micros(),
        Span::Day => MICROS_PER_DAY,
        Span::Month => return None,
    };
    let has_ended = name.window_start.saturating_add(length) < now_micros;
    has_ended.then(|| (name.window.clone(), name.span))
}

/// First and longest pause before a window whose merge failed is tried again.
const FAILED_PAUSE: (Duration, Duration) = (Duration::from_mins(10), Duration::from_hours(6));

/// Whose turn it is to be merged: one window that can't be must not keep the others waiting.
#[derive(Debug, Default)]
pub struct MergeTurns {
    running: Option<(Kind, String)>,
    /// When a window that failed may be tried again, and after which pause.
    pub(in crate::archive) failed: BTreeMap<(Kind, String), (Instant, Duration)>,
}

impl MergeTurns {
    /// Takes the first plan whose window has not failed lately, rewrites last. Its end is to be told with
    /// [`MergeTurns::succeeded`] or [`MergeTurns::failed`].
    pub fn choose(&mut self, plans: impl IntoIterator<Item = MergePlan>, now: Instant) -> Option<MergePlan> {
        // The window is no longer there, or would have been tried since.
        self.failed.retain(|_, (again_at, _)| now < *again_at + FAILED_PAUSE.1);
        let window = |plan: &MergePlan| (plan.kind, plan.window.clone());
        let is_due =
            |plan: &MergePlan| self.failed.get(&window(plan)).is_none_or(|(again_at, _)| *again_at <= now);
        let plan = plans.into_iter().filter(is_due).min_by_key(|plan| plan.is_rewrite)?;
        self.running = Some(window(&plan));
        Some(plan)
    }

    /// The chosen window was merged, or needs it no more.
    pub fn succeeded(&mut self) {
        if let Some(window) = self.running.take() {
            self.failed.remove(&window);
        }
    }

    /// The chosen window could not be merged. Returns the window, and how long it has to wait.
    pub fn failed(&mut self, now: Instant) -> Option<(String, Duration)> {
        let window = self.running.take()?;
        let name = window.1.clone();
        let pause = match self.failed.get(&window) {
            Some((_, pause)) => (*pause * 2).min(FAILED_PAUSE.1),
            None => FAILED_PAUSE.0,
        };
        self.failed.insert(window, (now + pause, pause));
        Some((name, pause))
    }
}

/// Merges the plan's files and uploads the result, row group by row group. Reads and writes data files
/// only, so it may run beside commits.
///
/// # Errors
///
/// [`Error::Encode`] if a file can't be read or written, [`Error::Internal`] if rows went missing.
pub async fn merge(storage: &Storage, namer: &Namer, plan: &MergePlan) -> Result<Merged> {
    let expected: u64 = plan.inputs.iter().filter_map(|file| file.row_count).sum();
    let mut output = Output::new(storage, namer, plan);
    let mut sources = Sources::open(storage, plan).await?;
    while let Some(rows) = sources.next_batch().await? {
        output.push(rows).await?;
    }
    let outputs = output.finish().await?;
    let row_count: u64 = outputs.iter().map(|file| file.stats.row_count).sum();
    if row_count != expected {
        let detail =
            format!("merging {} of {}: {row_count} rows of {expected}", plan.window, plan.kind.name());
        return Err(Error::Internal(detail));
    }
    let inputs = plan.inputs.iter().map(|file| file.path.clone()).collect();
    Ok(Merged { window: plan.window.clone(), inputs, outputs })
}

/// A place in one input.
#[derive(Debug)]
struct Cursor {
    rows: Arc<Rows>,
    row: usize,
    /// Position in `Sources::streams`.
    source: usize,
    /// Position in `Sources::pool`.
    batch: usize,
}

impl Ord for Cursor {
    fn cmp(&self, other: &Self) -> Ordering {
        let order = self.rows.row(self.row).cmp(&other.rows.row(other.row));
        order.then(self.source.cmp(&other.source))
    }
}

impl PartialOrd for Cursor {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Cursor {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Cursor {}

/// The inputs as one sorted sequence.
struct Sources {
    kind: Kind,
    context: String,
    /// Of the inputs.
    paths: Vec<String>,
    converter: RowConverter,
    streams: Vec<ParquetRecordBatchStream<ObjectReader>>,
    heap: BinaryHeap<Reverse<Cursor>>,
    /// Batches that cursors, or rows not yet handed out, are in.
    pool: Vec<RecordBatch>,
}

impl Sources {
    async fn open(storage: &Storage, plan: &MergePlan) -> Result<Self> {
        let kind = plan.kind;
        let context = format!("merging {} of {}", plan.window, kind.name());
        let schema = kind.schema();
        let fields = kind.sort_columns().iter().map(|name| schema.field_with_name(name));
        let fields = fields
            .map(|field| field.map(|field| SortField::new(field.data_type().clone())))
            .collect::<Result<Vec<_>, _>>()
            .map_err(encode_error(context.clone()))?;
        let converter = RowConverter::new(fields).map_err(encode_error(context.clone()))?;
        let (streams, heap, pool) = (Vec::new(), BinaryHeap::new(), Vec::new());
        let paths = plan.inputs.iter().map(|file| file.path.clone()).collect();
        let mut sources = Self { kind, context, paths, converter, streams, heap, pool };
        let store = storage.table_store(kind);
        for (source, file) in plan.inputs.iter().enumerate() {
            let reader = ObjectReader::new(Arc::clone(&store), &file.path, Some(file.size));
            let builder = footer::guarded_async(ParquetRecordBatchStreamBuilder::new(reader)).await;
            let builder = builder.map_err(parquet_error(format!("reading {}", file.path)))?;
            let stream = builder.with_batch_size(sources.batch_rows()).build();
            sources.streams.push(stream.map_err(parquet_error(format!("reading {}", file.path)))?);
            sources.advance(source).await?;
        }
        Ok(sources)
    }

    /// Rows of a batch. A quarantined row, or one of a table with columns of its own, may be megabytes of text, and a column holds 2 GiB.
    fn batch_rows(&self) -> usize {
        let is_short = Kind::drift().contains(&self.kind);
        if is_short { 8192 } else { 256 }
    }

    /// Reads the source's next batch, if it has one.
    async fn advance(&mut self, source: usize) -> Result<()> {
        let Some((stream, path)) = self.streams.get_mut(source).zip(self.paths.get(source)) else {
            return Ok(());
        };
        let failed = || parquet_error(format!("reading {path}"));
        while let Some(batch) = footer::guarded_async(stream.try_next()).await.map_err(failed())? {
            if batch.num_rows() == 0 {
                continue;
            }
            let batch = aligned(self.kind, batch).map_err(encode_error(self.context.clone()))?;
            let columns =
                self.kind.sort_columns().iter().filter_map(|name| batch.column_by_name(name).cloned());
            let rows = self.converter.convert_columns(&columns.collect::<Vec<_>>());
            let rows = Arc::new(rows.map_err(encode_error(self.context.clone()))?);
            self.heap.push(Reverse(Cursor { rows, row: 0, source, batch: self.pool.len() }));
            self.pool.push(batch);
            break;
        }
        Ok(())
    }

    async fn next_batch(&mut self) -> Result<Option<RecordBatch>> {
        let limit = self.batch_rows();
        let mut indices = Vec::with_capacity(limit);
        while indices.len() < limit {
            let Some(mut least) = self.heap.peek_mut() else { break };
            indices.push((least.0.batch, least.0.row));
            if least.0.row + 1 < least.0.rows.num_rows() {
                least.0.row += 1;
            } else {
                let source = std::collections::binary_heap::PeekMut::pop(least).0.source;
                self.advance(source).await?;
            }
        }
        if indices.is_empty() {
            return Ok(None);
        }
        let batches: Vec<&RecordBatch> = self.pool.iter().collect();
        let rows = interleave_record_batch(&batches, &indices).map_err(encode_error(self.context.clone()))?;
        self.shrink_pool();
        Ok(Some(rows))
    }

    /// Drops the batches that no cursor is in.
    fn shrink_pool(&mut self) {
        let mut cursors = std::mem::take(&mut self.heap).into_vec();
        let mut kept = Vec::with_capacity(cursors.len());
        for Reverse(cursor) in &mut cursors {
            if let Some(batch) = self.pool.get(cursor.batch) {
                cursor.batch = kept.len();
                kept.push(batch.clone());
            }
        }
        self.pool = kept;
        self.heap = cursors.into();
    }
}

/// The files that a merge writes, one after the other.
struct Output<'a> {
    storage: &'a Storage,
    namer: &'a Namer,
    plan: &'a MergePlan,
    lsn: Lsn,
    packer: Packer,
    open: Option<OpenFile>,
    done: Vec<DataFile>,
}

struct OpenFile {
    path: String,
    writer: AsyncArrowWriter<BufWriter>,
    stats: StatsBuilder,
}

impl<'a> Output<'a> {
    fn new(storage: &'a Storage, namer: &'a Namer, plan: &'a MergePlan) -> Self {
        let lsns = plan.inputs.iter().filter_map(|file| file.name.as_ref()).map(|name| name.lsn);
        let lsn = lsns.max().unwrap_or_default();
        Self { storage, namer, plan, lsn, packer: Packer::new(plan.kind), open: None, done: Vec::new() }
    }

    async fn push(&mut self, rows: RecordBatch) -> Result<()> {
        let mut steps = Vec::new();
        self.packer.push(rows, &mut steps)?;
        self.write(steps).await
    }

    async fn finish(mut self) -> Result<Vec<DataFile>> {
        let mut steps = Vec::new();
        self.packer.finish(&mut steps);
        self.write(steps).await?;
        self.close_file().await?;
        Ok(self.done)
    }

    async fn write(&mut self, steps: Vec<Step>) -> Result<()> {
        let failed = |path: &str| parquet_error(format!("writing {path}"));
        for step in steps {
            match step {
                Step::Write(rows) => {
                    let file = match &mut self.open {
                        Some(file) => file,
                        None => {
                            self.open.insert(OpenFile::create(self.storage, self.namer, self.plan, self.lsn)?)
                        }
                    };
                    file.stats.update(&rows)?;
                    file.writer.write(&rows).await.map_err(failed(&file.path))?;
                }
                Step::Close { entity_ends } => {
                    let Some(file) = &mut self.open else { continue };
                    file.writer.flush().await.map_err(failed(&file.path))?;
                    // One entity may be larger than the target: twice that much ends a file anyway.
                    let limit = if entity_ends { TARGET_BYTES } else { 2 * TARGET_BYTES };
                    if file.writer.bytes_written() as u64 >= limit {
                        self.close_file().await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn close_file(&mut self) -> Result<()> {
        let Some(file) = self.open.take() else { return Ok(()) };
        let path = file.path;
        file.writer.close().await.map_err(parquet_error(format!("writing {path}")))?;
        let store = self.storage.table_store(self.plan.kind);
        let meta = store.head(&Path::from(path.as_str())).await;
        let size = meta.map_err(Error::storage(format!("looking up {path}")))?.size;
        failpoint::hit("after-upload");
        let stats = file.stats.finish();
        let stats = stats.ok_or_else(|| Error::Internal(format!("{path} was written without rows")))?;
        self.done.push(DataFile { path, size, modified_millis: Utc::now().timestamp_millis(), stats });
        Ok(())
    }
}

impl OpenFile {
    fn create(storage: &Storage, namer: &Namer, plan: &MergePlan, lsn: Lsn) -> Result<Self> {
        let path = namer.name_in(&plan.window, lsn);
        let store: Arc<dyn ObjectStore> = storage.table_store(plan.kind);
        let sink = BufWriter::new(store, Path::from(path.as_str()));
        let writer =
            AsyncArrowWriter::try_new_with_options(sink, plan.kind.schema(), writer_options(plan.kind));
        let writer = writer.map_err(parquet_error(format!("writing {path}")))?;
        Ok(Self { path, writer, stats: StatsBuilder::new(plan.kind) })
    }
}
