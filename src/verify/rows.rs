use std::sync::{Arc, Mutex, PoisonError};

use super::RepairMode;
use super::table::{Table, changed};
use super::tail::Tail;
use crate::archive::{self, CommitNote, DataFile, Doubles, Multiset, Namer, Snapshot, Storage, TableFile};
use crate::batch::Batches;
use crate::config::Config;
use crate::decode::{self, Decoder, Settled};
use crate::error::Result;
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::committer::{self, COPY_PATIENCE, StorageRetry};
use crate::sidecar::recovery;
use crate::source::lookup::Lookup;
use crate::source::{self, Copier, Fate, Partition, Slice, Source};
use crate::tables::{Kind, MICROS_PER_HOUR};
use crate::watermark::{self, Watermark};

/// Memory that one digest takes in a comparison, with its share of an unfilled table.
const DIGEST_BYTES: u64 = 64;

/// How often a removal of surplus copies begins anew, because a merge has replaced one of its files. The sidecar merges a
/// file a few times in its life.
const REMOVALS_MAX: usize = 8;

/// The tables of the archive as a repair may write them.
///
/// It does so under an application id of its own, so that it doesn't take the tables from the sidecar, and by entries that are
/// void if another repair, or a copy of the sidecar's, has changed or compared rows since the claim: these may be the same rows.
#[derive(Debug, Default)]
pub(super) struct Repair {
    tables: Vec<archive::Table>,
    mode: RepairMode,
    namer: Option<Arc<Namer>>,
}

impl Repair {
    /// Claims the tables of these watermarks, and the quarantine.
    pub(super) async fn claim(
        config: &Config,
        storage: &Storage,
        rows: &[Watermark],
        app_id: &str,
        mode: RepairMode,
    ) -> Result<Self> {
        let session = format!("{:032x}", rand::random::<u128>());
        let mut tables = Vec::new();
        for kind in config.all_kinds() {
            if kind.is_quarantine() || rows.iter().any(|row| row.kind == kind.name()) {
                tables.push(archive::Table::claim_for_repair(storage, kind, app_id, &session).await?);
            }
        }
        Ok(Self { tables, mode, namer: Some(Arc::new(Namer::new())) })
    }

    /// Whether it may write.
    pub(super) fn is_on(&self) -> bool {
        self.mode != RepairMode::Report
    }

    /// Takes over what others have written since the claim; to be called again and again, since a comparison may take hours.
    pub(super) async fn look(&mut self) -> Result<()> {
        for table in &mut self.tables {
            table.look().await?;
        }
        Ok(())
    }

    /// Adds files to a kind's table.
    async fn commit(&mut self, kind: Kind, files: &[DataFile], lsn: Lsn) -> Result<()> {
        let Some(table) = self.tables.iter_mut().find(|table| table.kind() == kind) else { return Ok(()) };
        let row_count = files.iter().map(|file| file.stats.row_count).sum();
        let note = CommitNote { last_lsn: lsn, row_count, ..CommitNote::default() };
        let what = format!("adding {row_count} rows to {}", kind.name());
        let mut retry = StorageRetry::new(&what);
        while let Err(error) = table.commit_copy(files, &[], &note).await {
            retry.wait(error).await?;
        }
        Ok(())
    }

    /// Removes surplus copies from the archive of a table; how many.
    async fn remove(&mut self, table: &Table<'_>, doubles: &Doubles, sql: &mut Session) -> Result<u64> {
        let Some(namer) = self.namer.clone() else { return Ok(0) };
        let of_kind = |archive: &&mut archive::Table| archive.kind() == table.kind;
        let Some(archive) = self.tables.iter_mut().find(of_kind) else { return Ok(0) };
        let name = table.row.source_table.as_str();
        let what = format!("removing {} surplus copies from {}", doubles.surplus(), table.kind.name());
        for _ in 0..REMOVALS_MAX {
            archive.look().await?;
            let Some(removal) = archive.write_without(&namer, doubles).await? else { return Ok(0) };
            failpoint::hit("before-removal");
            let mut retry = StorageRetry::new(&what);
            let has_landed = loop {
                match archive.commit_removal(&removal).await {
                    Ok(has_landed) => break has_landed,
                    Err(error) => retry.wait(error).await?,
                }
            };
            if has_landed {
                failpoint::hit("after-removal");
                let (total, entities) = (removal.total, &removal.entities);
                // Should we fail before this, the next session of the sidecar does it.
                sql.run(async |client| watermark::count_removed(client, name, total, entities).await).await?;
                tracing::info!(
                    table = name,
                    rows = removal.row_count,
                    "removed surplus copies from the archive"
                );
                return Ok(removal.row_count);
            }
        }
        tracing::warn!(table = name, "merges were faster than {what}; the next verification tries again");
        Ok(0)
    }
}

/// What a comparison row by row has found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Rows that the archive lacks.
    pub(super) missing: u64,
    /// Rows that it has too much, and Postgres has not.
    pub(super) surplus: u64,
    /// Copies that it has too many of rows that Postgres has.
    pub(super) doubles: u64,
    /// Rows that the archive can have in its quarantine alone, and there without their long values.
    pub(super) cut: u64,
    /// Files of missing rows, uploaded and not yet named in a log; only in a repair.
    pub(super) repairable: Vec<(Kind, DataFile)>,
    /// Digests of rows of the part under way that are in the quarantine, and would fit by now.
    settled: Vec<u128>,
}

/// Compares hours of a table row by row.
pub(super) struct Comparison<'a> {
    table: &'a Table<'a>,
    source: &'a Source,
    leaves: &'a [Partition],
    decoder: Decoder,
    /// For rows that are in the quarantine: they may be in the archive, too.
    plain: Decoder,
    entities: Lookup,
    tail: &'a Tail,
    /// Names the files of missing rows, if these are to be added.
    namer: Option<Arc<Namer>>,
    copier: Copier,
    /// Doubles that were found, and are to be removed.
    doubles: Option<Doubles>,
    removed: u64,
}

impl<'a> Comparison<'a> {
    pub(super) async fn new(
        table: &'a Table<'a>,
        source: &'a Source,
        leaves: &'a [Partition],
        tail: &'a Tail,
        repair: &Repair,
    ) -> Result<Self> {
        let config = table.config;
        let decoder = |settled| {
            let (mut decoder, _) = source.decoder(&config.schema, table.kind);
            decoder.begin_copy(table.point.lsn, chrono::Utc::now().timestamp_micros(), settled);
            decoder
        };
        let quarantine = Snapshot::read(table.storage, Kind::quarantine(), "").await?;
        let settled = recovery::quarantined(
            table.storage,
            &quarantine.files,
            (&source.name, table.compared),
            source.is_fit(table.compared),
        )
        .await?;
        // Rows that are equal but for a column that the source has no more are not copies of each other.
        let can_remove = repair.is_on() && table.compared == table.kind && !table.kind.keeps_versions();
        Ok(Self {
            table,
            source,
            leaves,
            decoder: decoder(settled),
            plain: decoder(Settled::default()),
            entities: Lookup::new(Session::new(config.source.clone()), &config.schema),
            tail,
            namer: repair.namer.clone().filter(|_| repair.mode != RepairMode::RemoveDoubles),
            copier: Copier::open(config, &table.point.client).await?,
            doubles: can_remove.then(|| Doubles::new(table.compared)),
            removed: 0,
        })
    }

    /// Compares an hour, of which both sides together have about `rows` rows. What the archive has too much counts if Postgres
    /// must still have the hour whole (`is_held`).
    pub(super) async fn hour(
        &mut self,
        hour: i64,
        rows: u64,
        is_held: bool,
        (repair, sql): (&mut Repair, &mut Session),
    ) -> Result<Found> {
        let memory = self.table.config.memory_bytes as u64;
        // The digests of the archive's rows are held, those of Postgres's are not.
        let parts = i64::try_from(rows * DIGEST_BYTES / (memory / 3).max(1)).unwrap_or(i64::MAX);
        let parts = parts.clamp(1, MICROS_PER_HOUR / 1_000_000);
        // Whole milliseconds, which is what other writers' statistics have.
        let (start, width) = (hour * MICROS_PER_HOUR, (MICROS_PER_HOUR / parts / 1_000 + 1) * 1_000);
        let mut found = Found::default();
        for part in 0..parts {
            let low = start + part * width;
            let range = (low, (low + width).min(start + MICROS_PER_HOUR));
            if range.0 >= range.1 {
                break;
            }
            self.part(range, is_held, &mut found).await?;
            if self.doubles.as_ref().is_some_and(|doubles| doubles.copies() * DIGEST_BYTES > memory / 3) {
                self.remove(repair, sql).await?;
            }
        }
        Ok(found)
    }

    async fn part(&mut self, range: (i64, i64), is_held: bool, found: &mut Found) -> Result<()> {
        let table = self.table;
        let files: Vec<&TableFile> = table.files.iter().collect();
        let mut present = Multiset::new(table.compared).before(table.point.lsn);
        present.read(table.storage, &files, &[range]).await?;
        // What was committed after the snapshot can't be read from it; a later repair finds it.
        found.missing += self.tail.missing(table.kind, range, &mut present);
        let present = Arc::new(Mutex::new(present));
        let slice = self.source.time.slice(vec![range]);
        for leaf in self.leaves {
            let (low, high) = leaf.bounds.unwrap_or((i64::MIN, i64::MAX));
            if low < range.1 && range.0 < high {
                self.read(leaf, &slice, Some(&present), found).await?;
            }
        }
        let settled = std::mem::take(&mut found.settled);
        if is_held {
            let mut present = present.lock().unwrap_or_else(PoisonError::into_inner);
            // Only now: a row that is not in the quarantine comes first.
            for digest in settled {
                present.take(digest);
            }
            let doubles: u64 = present.doubles().map(|(_, copies)| u64::from(copies.left)).sum();
            found.doubles += doubles;
            found.surplus += present.row_count() - doubles;
            if let Some(all) = &mut self.doubles {
                all.extend(range, present.doubles());
            }
        }
        Ok(())
    }

    /// Removes the doubles of the hours since the last time, in one log entry.
    async fn remove(&mut self, repair: &mut Repair, sql: &mut Session) -> Result<()> {
        let Some(doubles) = self.doubles.as_mut().map(Doubles::take) else { return Ok(()) };
        if doubles.surplus() > 0 {
            self.removed += repair.remove(self.table, &doubles, sql).await?;
        }
        Ok(())
    }

    /// Removes what there still is to remove; how many copies were, in all.
    pub(super) async fn removed(&mut self, repair: &mut Repair, sql: &mut Session) -> Result<u64> {
        self.remove(repair, sql).await?;
        Ok(self.removed)
    }

    /// The rows without a usable time: each must be in the quarantine.
    pub(super) async fn timeless(&mut self) -> Result<Found> {
        let slice = self.source.time.unfit();
        let mut found = Found::default();
        for leaf in self.leaves {
            self.read(leaf, &slice, None, &mut found).await?;
        }
        Ok(found)
    }

    async fn read(
        &mut self,
        leaf: &Partition,
        slice: &Slice,
        present: Option<&Arc<Mutex<Multiset>>>,
        found: &mut Found,
    ) -> Result<()> {
        let (source, table) = (self.source, self.table);
        let mut rows = source.read(&mut self.copier, leaf, slice).await?;
        let new_batches = || Batches::new(table.config.window, chrono::Utc::now().timestamp_micros());
        let (mut batches, mut settled) = (new_batches(), new_batches());
        while let Some(row) = rows.next().await? {
            let before = batches.byte_count();
            source::insert(&mut self.decoder, row, &mut batches, &mut self.entities).await?;
            if batches.byte_count() == before {
                source::insert(&mut self.plain, row, &mut settled, &mut self.entities).await?;
            }
            if batches.byte_count() >= table.config.batch_bytes_max() {
                let full = std::mem::replace(&mut batches, new_batches());
                found.cut += cut(&full);
                take(table, self.namer.as_ref(), full, present, found).await?;
            }
        }
        if self.copier.end(leaf).await? != Fate::Unchanged {
            return Err(changed(table.config, leaf));
        }
        for rows in settled.files().iter().filter(|rows| rows.kind() == table.kind) {
            for batch in rows.record_batches() {
                archive::each_digest(table.compared, &batch?, |_, digest| found.settled.push(digest))?;
            }
        }
        found.cut += cut(&settled) + cut(&batches);
        take(table, self.namer.as_ref(), batches, present, found).await
    }

    /// Adds the missing rows that a comparison has found, if they are to be; returns how many.
    pub(super) async fn add(&self, found: Found, repair: &mut Repair, sql: &mut Session) -> Result<u64> {
        // A newer version is added beside the older one, which it makes obsolete.
        let is_version = self.table.kind.keeps_versions();
        if repair.mode != RepairMode::AddChanged && found.surplus > 0 && !is_version {
            return Ok(0);
        }
        let lsn = self.table.point.lsn;
        let added = found.repairable.iter().map(|(_, file)| file.stats.row_count).sum();
        let (quarantined, own): (Vec<_>, Vec<_>) =
            found.repairable.into_iter().partition(|(kind, _)| kind.is_quarantine());
        let files =
            |files: Vec<(Kind, DataFile)>| files.into_iter().map(|(_, file)| file).collect::<Vec<_>>();
        let (quarantined, own) = (files(quarantined), files(own));
        // The quarantine first: what it holds is recognised when the rest is repeated.
        if !quarantined.is_empty() {
            repair.commit(Kind::quarantine(), &quarantined, lsn).await?;
        }
        if !own.is_empty() {
            repair.commit(self.table.kind, &own, lsn).await?;
            let paths: Vec<String> = own.iter().map(|file| file.path.clone()).collect();
            let name = &self.table.row.source_table;
            let spans = recovery::spans(self.table.storage, self.table.kind, name, &paths).await?;
            // Should we fail before this, the next session of the sidecar counts anew.
            sql.run(async |client| watermark::add_entities(client, &spans).await).await?;
        }
        Ok(added)
    }
}

/// Rows whose long values were left out.
fn cut(batches: &Batches) -> u64 {
    batches.quarantined().filter(|row| decode::is_about_length(&row.reason)).count() as u64
}

/// Counts the rows that the archive lacks, and uploads them in a repair.
async fn take(
    table: &Table<'_>,
    namer: Option<&Arc<Namer>>,
    batches: Batches,
    present: Option<&Arc<Mutex<Multiset>>>,
    found: &mut Found,
) -> Result<()> {
    if let Some(namer) = namer {
        // Named with the point's position, which the watermark has passed: it is not a file that a watermark lacks.
        let lsn = table.point.lsn;
        let present = present.cloned();
        let (storage, batches) = (table.storage, Box::new(batches));
        let files =
            committer::write_files(storage, namer, batches, lsn, present, Some(COPY_PATIENCE)).await?;
        found.missing += files.iter().map(|(_, file)| file.stats.row_count).sum::<u64>();
        found.repairable.extend(files);
        return Ok(());
    }
    for rows in batches.files() {
        let kind = rows.kind();
        match present.filter(|_| !kind.is_quarantine()) {
            Some(present) => {
                for batch in rows.record_batches() {
                    let mut present = present.lock().unwrap_or_else(PoisonError::into_inner);
                    found.missing += present.missing(&batch?)?.num_rows() as u64;
                }
            }
            None => found.missing += rows.row_count(),
        }
    }
    Ok(())
}
