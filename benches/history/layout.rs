//! The same rows in two layouts, on disk.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray, TimestampNanosecondArray, UInt64Array};
use chrono::{DateTime, Datelike as _, Timelike as _, Utc};
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::basic::{Compression, ZstdLevel};
use datafusion::parquet::file::properties::WriterProperties;
use highwater::Lsn;
use highwater::archive::{CommitNote, Namer, Storage, Table, View, encode, upload};
use highwater::batch::{Batches, Cell};
use highwater::config::ObjectStorageSettings;
use highwater::tables::{Entity, Kind, WindowWidth};

use crate::rows::{DAY, DAYS, HOUR, Row, Rows, START};

/// Where the rows are.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) archive: PathBuf,
    /// The archive's files, by day.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) scouter: PathBuf,
    sizes: [(usize, u64); 2],
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [archive, scouter] =
            self.sizes.map(|(files, bytes)| format!("{files} files, {} MB", bytes / 1_000_000));
        write!(f, "archive: {archive}; Scouter's layout: {scouter}")
    }
}

impl Layout {
    /// Writes the rows, unless an earlier run has done so.
    pub(crate) async fn of(rows: &Rows) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/history-{}", rows.count()));
        let (archive, scouter, done) = (folder.join("archive"), folder.join("scouter"), folder.join("done"));
        if !done.exists() {
            _ = std::fs::remove_dir_all(&folder);
            write_archive(rows, &archive).await;
            write_scouter(rows, &scouter);
            std::fs::write(done, "").expect("a mark");
        }
        let settings = ObjectStorageSettings::new(archive.to_str().expect("UTF-8"), "").expect("settings");
        let view =
            View::read(&Storage::open(&settings).expect("storage"), Kind::psi()).await.expect("the log");
        let files: Vec<_> = view.files().map(|file| archive.join("psi").join(&file.path)).collect();
        assert_eq!(files.len(), usize::try_from(DAYS).expect("days"), "a file a day");
        let sizes = [(files.len(), view.files().map(|file| file.size).sum()), size_of(&scouter)];
        Self { archive, files, scouter, sizes }
    }

    /// A model's folder in Scouter's layout.
    pub(crate) fn scouter_folder(&self, entity: &Entity) -> PathBuf {
        self.scouter.join(&entity.name).join("psi")
    }
}

/// One commit with a file for each day, through the same columns and the same encoder as the sidecar's.
async fn write_archive(rows: &Rows, folder: &Path) {
    let settings = ObjectStorageSettings::new(folder.to_str().expect("UTF-8"), "").expect("settings");
    let storage = Storage::open(&settings).expect("storage");
    let mut table =
        Table::claim(&storage, Kind::psi(), "highwater/1/bench", "bench", Lsn(1)).await.expect("a claim");
    let namer = Namer::new();
    let mut files = Vec::new();
    for day in 0..DAYS {
        let mut batches = Batches::new(WindowWidth::DAY, 0);
        let features: Vec<_> =
            Rows::features().map(|name| batches.text(name.as_bytes()).expect("UTF-8")).collect();
        for number in 0..rows.entities {
            let Entity { space, name, version } = rows.entity(number);
            let entity =
                batches.entity(&[space.as_bytes(), name.as_bytes(), version.as_bytes()]).expect("UTF-8");
            for row in (day * 24..(day + 1) * 24).flat_map(|hour| rows.of_hour(number, hour)) {
                batches.push(
                    Kind::psi(),
                    entity,
                    row.created_at,
                    &[Cell::Text(features[row.feature]), Cell::Int(row.bin_id), Cell::Int(row.bin_count)],
                );
            }
        }
        for rows in batches.files() {
            let sorted = rows.record_batches().map(|batch| batch.expect("a batch"));
            let file = encode(Kind::psi(), sorted).expect("a file").expect("rows");
            let name = namer.name(rows.window(), Lsn(2));
            files.push(upload(&storage, Kind::psi(), name, file).await.expect("an upload"));
        }
        eprintln!("archive: day {} of {DAYS}", day + 1);
    }
    assert!(files.iter().all(|file| file.stats.max_time - file.stats.min_time < DAY), "a file a day");
    let note = CommitNote { row_count: rows.count(), ..CommitNote::default() };
    table.commit(&files, Lsn(2), &note).await.expect("a commit");
}

/// A folder for each model, in it one for each hour, with a file: the columns, types, names and compression that Scouter's
/// server writes.
fn write_scouter(rows: &Rows, folder: &Path) {
    let features: Vec<_> = Rows::features().collect();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3).expect("a level")))
        .build();
    for number in 0..rows.entities {
        let entity = rows.entity(number);
        for hour in 0..DAYS * 24 {
            let batch = scouter_batch(&entity, &features, &rows.of_hour(number, hour).collect::<Vec<_>>());
            let time = DateTime::<Utc>::from_timestamp_micros(START + hour * HOUR).expect("a time");
            let folder = folder.join(&entity.name).join("psi").join(format!(
                "year={}/month={}/day={}/hour={}",
                time.year(),
                time.month(),
                time.day(),
                time.hour()
            ));
            std::fs::create_dir_all(&folder).expect("a folder");
            let file = std::fs::File::create(folder.join("part-0.parquet")).expect("a file");
            let mut writer =
                ArrowWriter::try_new(file, batch.schema(), Some(properties.clone())).expect("a writer");
            writer.write(&batch).expect("rows");
            writer.close().expect("a footer");
        }
        eprintln!("Scouter's layout: model {} of {}", number + 1, rows.entities);
    }
}

fn scouter_batch(entity: &Entity, features: &[String], rows: &[Row]) -> RecordBatch {
    let same = |text: &str| Arc::new(StringArray::from_iter_values(rows.iter().map(|_| text))) as ArrayRef;
    let named = StringArray::from_iter_values(rows.iter().map(|row| &features[row.feature]));
    let number = |of: fn(&Row) -> i32| {
        let numbers = rows.iter().map(|row| u64::try_from(of(row)).expect("not negative"));
        Arc::new(UInt64Array::from_iter_values(numbers)) as ArrayRef
    };
    let times = TimestampNanosecondArray::from_iter_values(rows.iter().map(|row| row.created_at * 1000));
    RecordBatch::try_from_iter([
        ("created_at", Arc::new(times) as ArrayRef),
        ("name", same(&entity.name)),
        ("space", same(&entity.space)),
        ("version", same(&entity.version)),
        ("feature", Arc::new(named)),
        ("bin_id", number(|row| row.bin_id)),
        ("bin_count", number(|row| row.bin_count)),
    ])
    .expect("a batch")
}

/// Files under a folder, and their bytes.
fn size_of(folder: &Path) -> (usize, u64) {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.fold((0, 0), |(files, bytes), entry| {
        let metadata = entry.metadata().expect("metadata");
        let (more, size) = if metadata.is_dir() { size_of(&entry.path()) } else { (1, metadata.len()) };
        (files + more, bytes + size)
    })
}
