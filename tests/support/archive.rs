//! Reads the archive without a line of the writer's code, and compares it with the source, row by row.
//!
//! A row becomes a canonical text: time in microseconds, doubles by their bits, texts quoted. Counting
//! 128-bit hashes of such texts keeps millions of rows in memory; only upon a difference are the
//! texts of the first few rows fetched again.

use std::collections::{BTreeSet, HashMap};
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::hash::BuildHasher as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use arrow::array::{
    Array, ArrayRef, AsArray as _, Float64Array, Int32Array, RecordBatch, StringArray, StringViewArray,
    StructArray, TimestampMicrosecondArray,
};
use arrow::util::display::array_value_to_string;
use foldhash::quality::FixedState;
use futures::TryStreamExt as _;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Encoding, Type as PhysicalType};
use parquet::file::metadata::RowGroupMetaData;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::schema::{KINDS, Shape, Source};

/// The rows of a table, each with how often it is there.
#[derive(Debug, Default)]
pub struct Multiset {
    counts: HashMap<u128, u64>,
    rows: u64,
}

fn key(row: &str) -> u128 {
    let half = |seed| u128::from(FixedState::with_seed(seed).hash_one(row));
    (half(1) << 64) | half(2)
}

impl Multiset {
    /// Adds a row.
    pub fn add(&mut self, row: &str) {
        *self.counts.entry(key(row)).or_default() += 1;
        self.rows += 1;
    }

    /// How many rows, duplicates included.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// How often a row is there, by its key.
    pub fn count(&self, key: u128) -> u64 {
        self.counts.get(&key).copied().unwrap_or_default()
    }

    /// The rows that are here more often than there.
    pub fn surplus(&self, other: &Self) -> HashMap<u128, u64> {
        let more = |(key, count): (&u128, &u64)| {
            let surplus = count.saturating_sub(other.counts.get(key).copied().unwrap_or_default());
            (surplus > 0).then_some((*key, surplus))
        };
        self.counts.iter().filter_map(more).collect()
    }
}

impl<T: AsRef<str>> FromIterator<T> for Multiset {
    fn from_iter<I: IntoIterator<Item = T>>(rows: I) -> Self {
        let mut all = Self::default();
        rows.into_iter().for_each(|row| all.add(row.as_ref()));
        all
    }
}

/// How an archived table differs from its source.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Rows in the source, in the archive.
    pub rows: (u64, u64),
    /// Rows that the archive lacks.
    pub missing: u64,
    /// Rows that the archive has too often.
    pub extra: u64,
    /// A few of the missing rows.
    pub missing_rows: Vec<String>,
    /// A few of the extra rows.
    pub extra_rows: Vec<String>,
}

/// How many rows a [`Difference`] shows of each sort.
const SHOWN_MAX: usize = 5;

impl Difference {
    /// Compares; the texts are left to be filled in by [`show`].
    fn between(source: &Multiset, archive: &Multiset) -> (Self, HashMap<u128, u64>, HashMap<u128, u64>) {
        let (missing, extra) = (source.surplus(archive), archive.surplus(source));
        let difference = Self {
            rows: (source.rows, archive.rows),
            missing: missing.values().sum(),
            extra: extra.values().sum(),
            ..Self::default()
        };
        (difference, missing, extra)
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.missing == 0 && self.extra == 0
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows in the source, {} in the archive; ", self.rows.0, self.rows.1)?;
        write!(f, "{} missing, {} extra", self.missing, self.extra)?;
        self.missing_rows.iter().try_for_each(|row| write!(f, "\n  - {row}"))?;
        self.extra_rows.iter().try_for_each(|row| write!(f, "\n  + {row}"))
    }
}

/// Collects the texts of the first few rows whose keys are wanted.
fn show(row: &str, wanted: &HashMap<u128, u64>, shown: &mut Vec<String>) {
    if shown.len() < SHOWN_MAX && wanted.contains_key(&key(row)) && !shown.iter().any(|known| known == row) {
        shown.push(row.to_owned());
    }
}

/// Compares two lists of canonical rows.
pub fn compare_rows(source: &[String], archive: &[String]) -> Difference {
    let (mut difference, missing, extra) =
        Difference::between(&source.iter().collect(), &archive.iter().collect());
    source.iter().for_each(|row| show(row, &missing, &mut difference.missing_rows));
    archive.iter().for_each(|row| show(row, &extra, &mut difference.extra_rows));
    difference
}

/// Compares a drift table with its archive. Rows that the archive can't hold (times out of the
/// calendar, entities that don't exist) are left out of the source; they belong to the quarantine.
pub async fn compare(client: &Client, storage: &Path, shape: Shape, kind: Source) -> Difference {
    let (mut source, mut archive) = (Multiset::default(), Multiset::default());
    // The archive first: what is committed in between may be missing there, never too much.
    let folder = storage.join(kind.folder());
    each_archived_row(&folder, |row| archive.add(row)).unwrap_or_else(|error| panic!("{error}"));
    each_source_row(client, shape, kind, |row| source.add(row)).await;
    let (mut difference, missing, extra) = Difference::between(&source, &archive);
    if !difference.is_none() {
        each_source_row(client, shape, kind, |row| show(row, &missing, &mut difference.missing_rows)).await;
        each_archived_row(&folder, |row| show(row, &extra, &mut difference.extra_rows)).ok();
    }
    difference
}

/// Compares all drift tables with their archives.
///
/// # Panics
///
/// When they differ.
pub async fn assert_same(client: &Client, storage: &Path, shape: Shape) {
    for kind in KINDS {
        let difference = compare(client, storage, shape, kind).await;
        assert!(difference.is_none(), "{}: {difference}", kind.table());
        assert_portable(&storage.join(kind.folder()));
    }
}

/// Makes sure that every engine can read a table's files: they have only encodings that readers of 2022 know.
///
/// # Panics
///
/// When one has others.
pub fn assert_portable(table: &Path) {
    for path in files(table).unwrap_or_else(|error| panic!("{error}")) {
        let file = File::open(&path).expect("a file that the log names");
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).expect("a Parquet file");
        for column in reader.metadata().row_groups().iter().flat_map(RowGroupMetaData::columns) {
            let is_integer = matches!(column.column_type(), PhysicalType::INT32 | PhysicalType::INT64);
            for encoding in column.encodings() {
                let is_known = match encoding {
                    Encoding::PLAIN | Encoding::RLE | Encoding::RLE_DICTIONARY => true,
                    Encoding::DELTA_BINARY_PACKED => is_integer,
                    _ => false,
                };
                assert!(is_known, "{}: {encoding} in {}", path.display(), column.column_path());
            }
        }
    }
}

/// The rows of a drift table as canonical texts.
pub async fn each_source_row(client: &Client, shape: Shape, kind: Source, row_seen: impl FnMut(&str)) {
    each_row_of(client, "scouter", shape, kind, row_seen).await;
}

/// The rows of a table like a drift table in another schema.
pub async fn each_row_of(
    client: &Client,
    schema: &str,
    shape: Shape,
    kind: Source,
    mut row_seen: impl FnMut(&str),
) {
    let entity = match shape {
        Shape::Named => "d.space, d.name, d.version",
        Shape::Entity => "e.space, e.name, e.version",
    };
    let join = match shape {
        Shape::Named => "",
        Shape::Entity => "join scouter.drift_entities e on e.id = d.entity_id",
    };
    // `extract` gives a numeric for a timestamp, so nothing is rounded.
    let sql = format!(
        "select (extract(epoch from d.created_at) * 1000000)::bigint, {entity}, d.{columns}
           from {schema}.{table} d {join}
          where isfinite(d.created_at)
            and d.created_at >= '0001-01-01 00:00:00+00' and d.created_at < '10000-01-01 00:00:00+00'",
        columns = kind.value_columns().join(", d."),
        table = kind.table(),
    );
    let rows = client.query_raw(&sql, Vec::<i32>::new()).await.expect("source rows");
    let mut rows = std::pin::pin!(rows);
    let mut text = String::new();
    while let Some(row) = rows.try_next().await.expect("source rows") {
        text.clear();
        for (index, column) in row.columns().iter().enumerate() {
            match *column.type_() {
                Type::INT8 => push(&mut text, row.get::<_, Option<i64>>(index).map(Cell::Integer)),
                Type::INT4 => {
                    push(&mut text, row.get::<_, Option<i32>>(index).map(|n| Cell::Integer(n.into())))
                }
                Type::FLOAT8 => push(&mut text, row.get::<_, Option<f64>>(index).map(Cell::Double)),
                _ => push(&mut text, row.get::<_, Option<&str>>(index).map(Cell::Text)),
            }
        }
        row_seen(&text);
    }
}

/// One value on its way to the canonical text.
#[derive(Debug)]
pub enum Cell<'a> {
    /// A number, or a time in microseconds.
    Integer(i64),
    /// By its bits.
    Double(f64),
    /// Quoted.
    Text(&'a str),
}

fn push(row: &mut String, cell: Option<Cell<'_>>) {
    if !row.is_empty() {
        row.push('|');
    }
    let written = match cell {
        None => write!(row, "null"),
        Some(Cell::Integer(value)) => write!(row, "{value}"),
        // By bits: -0 is not 0, and a NaN equals itself.
        Some(Cell::Double(value)) => write!(row, "{value}#{:016x}", value.to_bits()),
        Some(Cell::Text(value)) => write!(row, "{value:?}"),
    };
    written.expect("writing to a string");
}

/// The rows of an archived table as canonical texts, also while it is written: a file that was merged into
/// another stays for a day, so the list of files cannot go stale under us.
pub fn each_archived_row(table: &Path, mut row_seen: impl FnMut(&str)) -> Result<(), String> {
    let mut text = String::new();
    for path in files(table)? {
        let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        for batch in batches(file, &path)? {
            let batch = batch?;
            for row in 0..batch.num_rows() {
                text.clear();
                batch.columns().iter().for_each(|column| push_cell(&mut text, column, row));
                row_seen(&text);
            }
        }
    }
    Ok(())
}

/// A row of any record batch with the archive's types as a canonical text.
pub fn row_text(batch: &RecordBatch, row: usize) -> String {
    let mut text = String::new();
    batch.columns().iter().for_each(|column| push_cell(&mut text, column, row));
    text
}

/// The canonical text of cells that come from elsewhere.
pub fn cells_text<'a>(cells: impl IntoIterator<Item = Option<Cell<'a>>>) -> String {
    let mut text = String::new();
    cells.into_iter().for_each(|cell| push(&mut text, cell));
    text
}

fn push_cell(text: &mut String, column: &ArrayRef, row: usize) {
    if column.is_null(row) {
        return push(text, None);
    }
    let any = column.as_any();
    let cell = if let Some(times) = any.downcast_ref::<TimestampMicrosecondArray>() {
        Cell::Integer(times.value(row))
    } else if let Some(numbers) = any.downcast_ref::<Int32Array>() {
        Cell::Integer(numbers.value(row).into())
    } else if let Some(numbers) = any.downcast_ref::<Float64Array>() {
        Cell::Double(numbers.value(row))
    } else if let Some(texts) = any.downcast_ref::<StringArray>() {
        Cell::Text(texts.value(row))
    } else if let Some(texts) = any.downcast_ref::<StringViewArray>() {
        // Not ours: somebody else's file.
        Cell::Text(texts.value(row))
    } else {
        // Of a described table.
        let value = array_value_to_string(column, row).expect("a type with a text");
        return push(text, Some(Cell::Text(&value)));
    };
    push(text, Some(cell));
}

/// All rows of an archived table.
pub fn archived_rows(table: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    each_archived_row(table, |row| rows.push(row.to_owned())).unwrap_or_else(|error| panic!("{error}"));
    rows
}

fn batches(file: File, path: &Path) -> Result<impl Iterator<Item = Result<RecordBatch, String>>, String> {
    let name = path.display().to_string();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(ParquetRecordBatchReaderBuilder::build)
        .map_err(|error| format!("{name}: {error}"))?;
    Ok(reader.map(move |batch| batch.map_err(|error| format!("{name}: {error}"))))
}

/// The files that a Delta table consists of now: its newest checkpoint, then every later entry of its
/// log. A table without a log is empty.
pub fn files(table: &Path) -> Result<Vec<PathBuf>, String> {
    let log = table.join("_delta_log");
    let mut versions: Vec<(u64, bool)> = Vec::new();
    for entry in fs::read_dir(&log).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(version) = name.strip_suffix(".json") {
            versions.extend(version.parse().ok().map(|version| (version, false)));
        } else if let Some(version) = name.strip_suffix(".checkpoint.parquet") {
            versions.extend(version.parse().ok().map(|version| (version, true)));
        }
    }
    versions.sort_unstable();
    let checkpoint =
        versions.iter().rev().find(|(_, is_checkpoint)| *is_checkpoint).map(|(version, _)| *version);
    let mut live: BTreeSet<String> = BTreeSet::new();
    if let Some(version) = checkpoint {
        checkpoint_files(&log.join(format!("{version:020}.checkpoint.parquet")), &mut live)?;
    }
    let first = checkpoint.map_or(0, |version| version + 1);
    let later = versions.iter().filter(|(version, is_checkpoint)| !is_checkpoint && *version >= first);
    for (next, (version, _)) in (first..).zip(later) {
        if *version != next {
            return Err(format!("{}: version {next} is missing before {version}", log.display()));
        }
        apply_entry(&log.join(format!("{version:020}.json")), &mut live)?;
    }
    Ok(live.iter().map(|path| table.join(percent_decoded(path))).collect())
}

fn checkpoint_files(path: &Path, live: &mut BTreeSet<String>) -> Result<(), String> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    for batch in batches(file, path)? {
        let batch = batch?;
        let adds: &StructArray = batch.column_by_name("add").ok_or("a checkpoint without `add`")?.as_struct();
        let paths = adds.column_by_name("path").ok_or("a checkpoint without `add.path`")?.as_string::<i32>();
        let named = (0..adds.len()).filter(|row| !adds.is_null(*row) && !paths.is_null(*row));
        live.extend(named.map(|row| paths.value(row).to_owned()));
    }
    Ok(())
}

fn apply_entry(path: &Path, live: &mut BTreeSet<String>) -> Result<(), String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    for line in text.lines() {
        let action: serde_json::Value =
            serde_json::from_str(line).map_err(|error| format!("{}: {error}", path.display()))?;
        if let Some(added) = action["add"]["path"].as_str() {
            if !live.insert(added.to_owned()) {
                return Err(format!("{}: {added} is added twice", path.display()));
            }
        } else if let Some(removed) = action["remove"]["path"].as_str() {
            live.remove(removed);
        }
    }
    Ok(())
}

/// The paths in a Delta log are URL-encoded.
fn percent_decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'%').then(|| tail.get(..2)).flatten();
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).expect("a path in UTF-8")
}

/// Damages an archived table as a person might, by Python's `deltalake`: the one row of a metric is deleted (`delete`), written
/// once more (`double`), or gets the next greater double (`change`).
pub fn damage(table: &Path, action: &str, metric: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/reader/bin/python");
    assert!(python.exists(), "{} is missing: run `scripts/setup reader`", python.display());
    let output = Command::new(python)
        .arg(root.join("tests/it/damage.py"))
        .arg(table)
        .args([action, metric])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
