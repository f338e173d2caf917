//! Rows that the archive has more often than the source, and what removes the copies too many.
//!
//! A row that is moved in the source, by delete and insert, comes by the stream once more. Files are never changed: those
//! that hold surplus copies are written anew without them, and one log entry replaces them. Which copy of a row goes makes no
//! difference, since they are equal in every column, but some have to stay; so an entry is void if any file that has copies is
//! no longer active by then, and the log itself counts what was removed, which tells an entry that has landed from one that has not.

use std::collections::{BTreeMap, HashMap, HashSet};

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::{filter_record_batch, max, max_string, min, min_string};
use chrono::Utc;
use foldhash::fast::RandomState;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use parquet::arrow::AsyncArrowWriter;
use parquet::file::metadata::RowGroupMetaData;
use serde_json::json;

use crate::archive::error::{encode_error, parquet_error, unreadable};
use crate::archive::files::columns::{EntityColumns, times};
use crate::archive::files::digest::{Copies, digests};
use crate::archive::files::encode::writer_options;
use crate::archive::files::name::Namer;
use crate::archive::files::object_reader::{aligned, each_batch_of, group_times, open};
use crate::archive::files::stats::FileStats;
use crate::archive::files::table_file::TableFile;
use crate::archive::files::upload::DataFile;
use crate::archive::log::table::Table;
use crate::tables::{Entity, Kind};
use crate::{Error, Result, failpoint};

/// Rows of which the archive has copies too many, by digest.
#[derive(Debug)]
pub struct Doubles {
    /// How the rows are compared.
    kind: Kind,
    /// How many copies are too many (`left`), and how many have to stay (`taken`).
    copies: HashMap<u128, Copies, RandomState>,
    surplus: u64,
    all: u64,
    /// The times that the rows are of, ascending: a first microsecond since the epoch, and the one after the last.
    ranges: Vec<(i64, i64)>,
}

impl Doubles {
    /// None yet, of a kind that says which columns are compared.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, copies: HashMap::default(), surplus: 0, all: 0, ranges: Vec::new() }
    }

    /// Takes in the doubles of a time that is later than those before.
    pub fn extend(&mut self, range: (i64, i64), doubles: impl IntoIterator<Item = (u128, Copies)>) {
        let before = self.surplus;
        for (digest, copies) in doubles {
            self.surplus += u64::from(copies.left);
            self.all += u64::from(copies.left) + u64::from(copies.taken);
            self.copies.insert(digest, copies);
        }
        if self.surplus == before {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.1 >= range.0 => last.1 = last.1.max(range.1),
            _ => self.ranges.push(range),
        }
    }

    /// Gives them, and begins anew.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new(self.kind))
    }

    /// How many copies are too many.
    #[must_use]
    pub const fn surplus(&self) -> u64 {
        self.surplus
    }

    /// All copies, those that have to stay among them: each takes memory while they are looked for.
    #[must_use]
    pub const fn copies(&self) -> u64 {
        self.all
    }

    fn touches(&self, low: i64, high: i64) -> bool {
        self.ranges.iter().any(|(start, end)| low < *end && *start <= high)
    }
}

/// Files without the surplus copies, uploaded, for [`Table::commit_removal`].
#[derive(Debug, Default)]
pub struct Removal {
    /// Paths of the files that they replace.
    inputs: Vec<String>,
    /// Paths of all files that have copies of these rows.
    holders: Vec<String>,
    outputs: Vec<DataFile>,
    /// How many copies they lack, by entity.
    pub entities: BTreeMap<Entity, u64>,
    /// How many that are.
    pub row_count: u64,
    /// What the log will have counted then.
    pub total: u64,
}

/// A copy of a double: which row of its file it is, and its digest.
type Copy = (u64, u128);

impl Table {
    /// Writes the files that hold surplus copies anew, without them; `None` if there are none any more. Of no row fewer copies are
    /// left than have to stay.
    ///
    /// # Errors
    ///
    /// [`Error::Storage`] or [`Error::Encode`] if a file can't be read or written.
    pub async fn write_without(&self, namer: &Namer, doubles: &Doubles) -> Result<Option<Removal>> {
        let mut files: Vec<&TableFile> = self
            .files()
            .filter(|file| doubles.ranges.iter().any(|(start, end)| file.may_hold(*start, *end)))
            .collect();
        // The less is written anew the better; and the rows of a move are in small files, for a while.
        files.sort_by_key(|file| (file.size, &file.path));
        let mut holders: Vec<(&TableFile, Vec<Copy>)> = Vec::new();
        let mut found: HashMap<u128, u32, RandomState> = HashMap::default();
        for file in files {
            let copies = self.copies_in(file, doubles).await?;
            for (_, digest) in &copies {
                *found.entry(*digest).or_default() += 1;
            }
            if !copies.is_empty() {
                holders.push((file, copies));
            }
        }
        for (digest, count) in &mut found {
            let copies = doubles.copies.get(digest).copied().unwrap_or_default();
            *count = copies.left.min(count.saturating_sub(copies.taken));
        }
        let mut removal = Removal::default();
        for (file, copies) in &holders {
            let mut is_surplus = |digest: &u128| match found.get_mut(digest) {
                Some(count) if *count > 0 => {
                    *count -= 1;
                    true
                }
                _ => false,
            };
            let dropped: HashSet<u64> =
                copies.iter().filter(|(_, digest)| is_surplus(digest)).map(|(row, _)| *row).collect();
            if !dropped.is_empty() {
                removal.row_count += dropped.len() as u64;
                removal.inputs.push(file.path.clone());
                let output = self.rewrite(namer, file, &dropped, &mut removal.entities).await?;
                removal.outputs.extend(output);
            }
        }
        removal.holders = holders.into_iter().map(|(file, _)| file.path.clone()).collect();
        removal.total = self.totals().doubles_removed + removal.row_count;
        Ok((removal.row_count > 0).then_some(removal))
    }

    /// Replaces files by those that lack the surplus copies, in one log entry. `Ok(false)`: a file that has copies of these rows
    /// is no longer active, nothing was done, the outputs are orphans.
    ///
    /// # Errors
    ///
    /// As [`Table::commit_copy`]: it may be repeated, and is void if somebody has compared or added rows since the claim, who may
    /// have relied on a surplus copy.
    pub async fn commit_removal(&mut self, removal: &Removal) -> Result<bool> {
        // Nobody else counts: another repair would have fenced this one. So an earlier try has landed.
        if self.totals().doubles_removed >= removal.total {
            return Ok(true);
        }
        let mut change = self.change("DELETE", self.lsn());
        change.is_copy = true;
        change.adds = removal.outputs.iter().map(|file| file.to_table_file(self.kind())).collect();
        change.removes.clone_from(&removal.inputs);
        change.keeps.clone_from(&removal.holders);
        change.doubles_removed = Some(removal.total);
        change.note.insert("doublesRemoved".to_owned(), json!(removal.row_count));
        self.land(change).await
    }

    /// The copies of doubles in a file.
    async fn copies_in(&self, file: &TableFile, doubles: &Doubles) -> Result<Vec<Copy>> {
        let kind = self.kind();
        let context = format!("reading {}{}", self.storage().table_url(kind), file.path);
        let open = open(&self.store(), &file.path, &context).await.map_err(unreadable(kind))?;
        let (mut wanted, mut rows, mut start) = (Vec::new(), Vec::new(), 0);
        for (number, group) in open.metadata().row_groups().iter().enumerate() {
            let end = start + row_count(group);
            if group_times(kind, group).is_none_or(|(low, high)| doubles.touches(low, high)) {
                wanted.push(number);
                rows.push(start..end);
            }
            start = end;
        }
        let mut copies = Vec::new();
        if wanted.is_empty() {
            return Ok(copies);
        }
        let mut rows = rows.into_iter().flatten();
        each_batch_of(open.with_row_groups(wanted), None, &context, |batch| {
            digests(doubles.kind, batch, |_, digest| {
                let row = rows.next().unwrap_or(u64::MAX);
                if doubles.copies.contains_key(&digest) {
                    copies.push((row, digest));
                }
            })
        })
        .await?;
        Ok(copies)
    }

    /// Writes a file anew without some of its rows, which it counts; nothing, if no row is left. Order and row groups stay.
    async fn rewrite(
        &self,
        namer: &Namer,
        file: &TableFile,
        dropped: &HashSet<u64>,
        entities: &mut BTreeMap<Entity, u64>,
    ) -> Result<Option<DataFile>> {
        let kind = self.kind();
        let context = format!("writing {} anew without surplus copies", file.path);
        let open = open(&self.store(), &file.path, &context).await?;
        let groups = open.metadata().row_groups().iter();
        let mut end = 0;
        let ends: HashSet<u64> = groups
            .map(|group| {
                end += row_count(group);
                end
            })
            .collect();
        let mut output = Output::new(self, namer, file)?;
        let mut batches = open.build().map_err(parquet_error(context.clone()))?;
        let mut read = 0;
        while let Some(batch) = batches.try_next().await.map_err(parquet_error(context.clone()))? {
            let batch = aligned(kind, batch).map_err(encode_error(context.clone()))?;
            let stays: BooleanArray =
                (read..).take(batch.num_rows()).map(|row| Some(!dropped.contains(&row))).collect();
            read += batch.num_rows() as u64;
            let columns = EntityColumns::of(kind, &batch)?;
            for (row, _) in stays.values().iter().enumerate().filter(|(_, stays)| !stays) {
                if let Some(names) = columns.as_ref().and_then(|columns| columns.get(row)) {
                    *entities.entry(Entity::of_names(names)).or_default() += 1;
                }
            }
            let rows = filter_record_batch(&batch, &stays).map_err(encode_error(context.clone()))?;
            output.write(&rows, ends.contains(&read)).await?;
        }
        let stays = read - dropped.len() as u64;
        if file.row_count.is_some_and(|count| count != read) || output.row_count() != stays {
            let written = output.row_count();
            return Err(Error::Internal(format!("{context}: {written} rows of {stays}, {read} were read")));
        }
        output.finish(self).await
    }
}

fn row_count(group: &RowGroupMetaData) -> u64 {
    u64::try_from(group.num_rows()).unwrap_or_default()
}

/// A file that takes the place of another.
struct Output {
    kind: Kind,
    path: String,
    writer: AsyncArrowWriter<BufWriter>,
    stats: Option<FileStats>,
}

impl Output {
    fn new(table: &Table, namer: &Namer, file: &TableFile) -> Result<Self> {
        let kind = table.kind();
        let path = match &file.name {
            // The same position: by it, `recover` knows the files that a watermark lacks.
            Some(name) => namer.name_in(&name.window, name.lsn),
            // Under a name of ours it would be merged, for which it would have to be sorted.
            None => {
                let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
                format!("{folder}/part-{:032x}.parquet", rand::random::<u128>()).trim_matches('/').to_owned()
            }
        };
        let sink = BufWriter::new(table.store(), Path::from(path.as_str()));
        let writer = AsyncArrowWriter::try_new_with_options(sink, kind.schema(), writer_options(kind));
        let writer = writer.map_err(parquet_error(format!("writing {path}")))?;
        Ok(Self { kind, path, writer, stats: None })
    }

    /// Appends rows, which need not be sorted, and ends the row group if that is said.
    async fn write(&mut self, rows: &RecordBatch, group_ends: bool) -> Result<()> {
        let failed = || parquet_error(format!("writing {}", self.path));
        if rows.num_rows() > 0 {
            self.stats = Some(joined(self.stats.take(), stats_of(self.kind, rows)?));
            self.writer.write(rows).await.map_err(failed())?;
        }
        if group_ends {
            self.writer.flush().await.map_err(failed())?;
        }
        Ok(())
    }

    fn row_count(&self) -> u64 {
        self.stats.as_ref().map_or(0, |stats| stats.row_count)
    }

    /// Durable on return; nothing is there if no row was written.
    async fn finish(self, table: &Table) -> Result<Option<DataFile>> {
        let Some(stats) = self.stats else { return Ok(None) };
        let path = self.path;
        self.writer.close().await.map_err(parquet_error(format!("writing {path}")))?;
        let meta = table.store().head(&Path::from(path.as_str())).await;
        let size = meta.map_err(Error::storage(format!("looking up {path}")))?.size;
        failpoint::hit("after-upload");
        Ok(Some(DataFile { path, size, modified_millis: Utc::now().timestamp_millis(), stats }))
    }
}

/// What rows in any order are within.
fn stats_of(kind: Kind, rows: &RecordBatch) -> Result<FileStats> {
    let unfit = || Error::Internal(format!("a batch of {} lacks a time or an entity", kind.name()));
    let times = times(kind, rows)?;
    let (min_time, max_time) = min(times).zip(max(times)).ok_or_else(unfit)?;
    let range = |name: &String| {
        let texts =
            rows.column_by_name(name)?.as_string_opt::<i32>().filter(|texts| texts.null_count() == 0)?;
        Some((min_string(texts)?.to_owned(), max_string(texts)?.to_owned()))
    };
    let ranges = kind.entity_columns().iter().map(|name| range(name).ok_or_else(unfit));
    let entity_range = ranges.collect::<Result<_>>()?;
    Ok(FileStats { row_count: rows.num_rows() as u64, min_time, max_time, entity_range })
}

fn joined(before: Option<FileStats>, more: FileStats) -> FileStats {
    let Some(before) = before else { return more };
    let join = |(a, b): ((String, String), (String, String))| (a.0.min(b.0), a.1.max(b.1));
    let ranges = before.entity_range.into_iter().zip(more.entity_range).map(join).collect();
    FileStats {
        row_count: before.row_count + more.row_count,
        min_time: before.min_time.min(more.min_time),
        max_time: before.max_time.max(more.max_time),
        entity_range: ranges,
    }
}
