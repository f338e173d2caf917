//! One table on its way to being complete: what of each partition the archive may lack, read and written.

use super::progress::Progress;
use super::{Backfill, refused, table_of};
use crate::archive::{self, CommitNote, DataFile, MinuteCounts, Multiset, TableFile};
use crate::batch::Batches;
use crate::decode::{Decoder, Inserted};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::committer::{self, COPY_PATIENCE, StorageRetry};
use crate::sidecar::recovery;
use crate::source::lookup::Lookup;
use crate::source::{self, Copier, Days, Fate, Partition, Point, Rows, Slice, Source};
use crate::tables::{CALENDAR, Kind};
use crate::vitals::{OfOrigin, Origin};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use tokio::task::JoinSet;

/// Memory that one digest of a row takes in a comparison, with its share of an unfilled table.
const DIGEST_BYTES: usize = 64;

/// Most rows that are read between two looks at the clock.
const STRIDE_MAX: NonZeroU32 = NonZeroU32::new(256).unwrap();

/// One table on its way to being complete.
pub(super) struct Work<'a> {
    point: &'a Point,
    kind: Kind,
    /// How rows come into the archive that it lacks.
    origin: Origin,
    /// ... as its rows are compared.
    compared: Kind,
    pub(super) source: &'a Source,
    entities: Lookup,
    decoder: Decoder,
    /// The archive had no file of this kind, so that nothing need be compared.
    is_fresh: bool,
    limiter: Option<DefaultDirectRateLimiter>,
    /// Rows that are read between two looks at the clock.
    stride: u32,
    batch_bytes_max: usize,
    pub(super) progress: Progress,
    /// The partition that was read last; at most its last rows are on their way.
    unsettled: Option<Unsettled>,
}

/// The files of a part of the rows, written beside the reading of more. Dropping it ends that.
type Writing = JoinSet<Result<Vec<(Kind, DataFile)>>>;

/// What a partition adds. The next one is read while its last rows are written.
pub(super) struct Unsettled {
    name: String,
    mark: String,
    writing: Writing,
    files: Vec<(Kind, DataFile)>,
}

/// What of a partition the archive may lack.
pub(super) enum Touched {
    Nothing,
    /// All of it, and it holds nothing of that time.
    Whole,
    /// These days (`None`: all), which are compared; `ranges` are their times, in microseconds since the epoch.
    Days {
        days: Option<Days>,
        ranges: Vec<(i64, i64)>,
    },
}

impl<'a> Work<'a> {
    pub(super) async fn new(
        backfill: &mut Backfill<'_>,
        point: &'a Point,
        (kind, origin): (Kind, Origin),
        source: &'a Source,
        partitions: &[Partition],
    ) -> Result<Self> {
        let config = backfill.config;
        let (mut decoder, notices) = source.decoder(&config.schema, kind);
        for notice in notices {
            tracing::warn!("{notice}");
        }
        let new = decoder.new_columns(source.oid);
        if backfill.wants.columns(new) {
            let detail = format!("{} has got new columns; it is read once the archive has them", source.name);
            return Err(Error::Anew { detail });
        }
        let compared = source.compared(kind);
        let quarantine = table_of(backfill.tables, Kind::quarantine())?;
        let is_fit = source.is_fit(compared);
        let settled =
            recovery::quarantined(backfill.storage, quarantine.files(), (&source.name, compared), is_fit)
                .await?;
        decoder.begin_copy(point.lsn, chrono::Utc::now().timestamp_micros(), settled);
        let rate = config.backfill_rows_per_second;
        Ok(Self {
            point,
            kind,
            origin,
            compared,
            source,
            entities: Lookup::new(Session::new(config.source.clone()), &config.schema),
            decoder,
            is_fresh: table_of(backfill.tables, kind)?.files().next().is_none(),
            limiter: rate.map(limiter),
            stride: rate.map_or(STRIDE_MAX, |rate| rate.min(STRIDE_MAX)).get(),
            batch_bytes_max: config.batch_bytes_max(),
            progress: Progress::new(backfill.vitals, kind, &source.name, partitions),
            unsettled: None,
        })
    }

    /// Reads what the archive lacks of a partition, to be settled in one log entry; nothing, if it is not what the snapshot
    /// saw.
    pub(super) async fn complete(
        &mut self,
        backfill: &mut Backfill<'_>,
        copier: &mut Copier,
        partition: &Partition,
        horizon: Option<u64>,
    ) -> Result<Fate> {
        self.progress.begin(partition);
        // What waits for a lock of ours may keep others waiting: it is held for one part at a time.
        self.point.savepoint().await?;
        let touched = match self.touched(backfill, partition, horizon).await {
            Ok(touched) => touched,
            Err(error) => return self.refused(copier, partition, error).await,
        };
        let mut fate = self.point.end_part(partition).await?;
        let slices = match touched {
            _ if fate != Fate::Unchanged => return Ok(fate),
            Touched::Nothing => Vec::new(),
            Touched::Whole => vec![Slice::whole()],
            Touched::Days { days, ranges } => {
                let rows_max = (backfill.config.memory_bytes / 3 / DIGEST_BYTES) as u64;
                let archived = self.archived(backfill, &ranges, rows_max).await?;
                self.point.savepoint().await?;
                let (client, time) = (&self.point.client, &self.source.time);
                let slices = match partition.slices(client, time, days.as_ref(), &archived, rows_max).await {
                    Ok(slices) => slices,
                    Err(error) => return self.refused(copier, partition, error).await,
                };
                fate = self.point.end_part(partition).await?;
                slices
            }
        };
        let mut unsettled = Unsettled {
            name: partition.name.clone(),
            mark: backfill.mark(partition),
            writing: Writing::new(),
            files: Vec::new(),
        };
        let is_compared = slices.iter().any(|slice| !slice.ranges.is_empty());
        self.progress.step(if is_compared { "comparing" } else { "copying" });
        for slice in &slices {
            if fate != Fate::Unchanged {
                return Ok(fate);
            }
            let present = self.present(backfill, slice).await?;
            let rows = match self.source.read(copier, partition, slice).await {
                Ok(rows) => rows,
                Err(error) => return refused(copier, partition, error).await,
            };
            self.copy(backfill, rows, present, &mut unsettled).await?;
            fate = copier.end(partition).await?;
        }
        self.progress.end();
        if !slices.is_empty() && fate == Fate::Unchanged {
            self.unsettled = Some(unsettled);
        }
        Ok(fate)
    }

    /// Ends a part whose query was refused.
    pub(super) async fn refused(
        &self,
        copier: &mut Copier,
        partition: &Partition,
        error: Error,
    ) -> Result<Fate> {
        match self.point.rollback_to_savepoint().await {
            Ok(()) => refused(copier, partition, error).await,
            // The session is gone.
            Err(_) => Err(error),
        }
    }

    /// Commits the partition that was read last, if that is still to be done. Once its last rows are written nothing keeps it
    /// but the reading of the next one, which waits here.
    pub(super) async fn settle(&mut self, backfill: &mut Backfill<'_>) -> Result<()> {
        let Some(mut unsettled) = self.unsettled.take() else { return Ok(()) };
        unsettled.written().await?;
        let Unsettled { name, mark, files, .. } = unsettled;
        let (quarantined, own): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|(kind, _)| kind.is_quarantine());
        // The quarantine first: what it holds is recognised when the partition is copied again.
        let (at, copied_mark) = (self.point.lsn, backfill.copied_mark());
        // The next partition is locked meanwhile.
        let retry = |what| StorageRetry::new(what).patient_for(Some(COPY_PATIENCE));
        if !quarantined.is_empty() {
            let (files, note) = named(quarantined, at);
            let table = table_of(backfill.tables, Kind::quarantine())?;
            // Also a copy: a repair may be about to add the same rows.
            let marks = [(copied_mark.clone(), at.0)];
            let mut retry = retry("committing the quarantine");
            while let Err(error) = table.commit_copy(&files, &marks, &note).await {
                retry.wait(error).await?;
            }
            failpoint::hit("between-tables");
        }
        let (files, note) = named(own, at);
        let marks = [(mark, self.point.xmin), (copied_mark, at.0)];
        let table = table_of(backfill.tables, self.kind)?;
        let what = format!("committing {name}");
        let mut retry = retry(&what);
        while let Err(error) = table.commit_copy(&files, &marks, &note).await {
            retry.wait(error).await?;
        }
        self.progress.added += note.row_count;
        let of = OfOrigin { table: self.kind.name().to_owned(), origin: self.origin };
        backfill.vitals.counters.archived_rows.get_or_create(&of).inc_by(note.row_count);
        failpoint::hit("after-partition");
        Ok(())
    }

    /// What of a partition the archive may lack.
    pub(super) async fn touched(
        &self,
        backfill: &mut Backfill<'_>,
        partition: &Partition,
        horizon: Option<u64>,
    ) -> Result<Touched> {
        let (client, time) = (&self.point.client, &self.source.time);
        let (days, ranges) = match horizon {
            None if self.is_fresh => return Ok(Touched::Whole),
            None => {
                let range = partition.range(client, time).await?;
                let (low, high) = range.map_or((CALENDAR.start, CALENDAR.end), |(low, high)| (low, high + 1));
                let mut files = table_of(backfill.tables, self.kind)?.files();
                if range.is_some() && !files.any(|file| file.may_hold(low, high)) {
                    return Ok(Touched::Whole);
                }
                (None, vec![(low, high)])
            }
            Some(horizon) => {
                let days = partition.touched_days(client, time, horizon).await?;
                if days.is_empty() {
                    return Ok(Touched::Nothing);
                }
                let ranges = days.ranges();
                (Some(days), ranges)
            }
        };
        tracing::info!(
            table = self.source.name,
            partition = partition.name,
            days = %days.as_ref().map_or_else(|| "all".to_owned(), |days| days.to_string()),
            "comparing with the archive"
        );
        Ok(Touched::Days { days, ranges })
    }

    /// How many rows the archive has of each minute; nothing, if it has no more than `rows_max` of all.
    pub(super) async fn archived(
        &self,
        backfill: &mut Backfill<'_>,
        ranges: &[(i64, i64)],
        rows_max: u64,
    ) -> Result<MinuteCounts> {
        let may_hold = |file: &&TableFile| ranges.iter().any(|range| file.may_hold(range.0, range.1));
        let files: Vec<_> = table_of(backfill.tables, self.kind)?.files().filter(may_hold).collect();
        // A foreign writer need not have said how many its files hold.
        let held: Option<u64> = files.iter().map(|file| file.row_count).sum();
        match held {
            Some(rows) if rows <= rows_max => Ok(MinuteCounts::new()),
            _ => archive::minute_counts(backfill.storage, self.kind, &files, ranges).await,
        }
    }

    /// Reads rows and uploads those of them that the archive lacks. The last of them may still be on their way then.
    pub(super) async fn copy(
        &mut self,
        backfill: &mut Backfill<'_>,
        mut rows: Rows<'_>,
        present: Option<Arc<Mutex<Multiset>>>,
        unsettled: &mut Unsettled,
    ) -> Result<()> {
        let is_compared = present.is_some();
        let lsn = self.point.lsn;
        let (storage, namer) = (backfill.storage.clone(), Arc::clone(backfill.namer));
        let (config, vitals) = (backfill.config, backfill.vitals);
        let write = |writing: &mut Writing, batches: Batches| {
            committer::count_quarantined(config, vitals, &batches);
            let (storage, namer, present) = (storage.clone(), Arc::clone(&namer), present.clone());
            writing.spawn(async move {
                let batches = Box::new(batches);
                committer::write_files(&storage, &namer, batches, lsn, present, Some(COPY_PATIENCE)).await
            });
        };
        let window = backfill.config.window;
        let new_batches = || Batches::new(window, chrono::Utc::now().timestamp_micros());
        let mut batches = new_batches();
        let mut stride = 0;
        while let Some(row) = rows.next().await? {
            let inserted = source::insert(&mut self.decoder, row, &mut batches, &mut self.entities).await?;
            self.progress.quarantined += u64::from(inserted == Inserted::Quarantined);
            stride += 1;
            // Rows may be of any size.
            if stride < self.stride && batches.byte_count() < self.batch_bytes_max {
                continue;
            }
            self.throttle(stride).await;
            self.progress.rows(stride);
            stride = 0;
            if batches.byte_count() >= self.batch_bytes_max {
                self.decoder.forget_unresolved();
                let full = std::mem::replace(&mut batches, new_batches());
                // One is read, one is written.
                self.settle(backfill).await?;
                unsettled.written().await?;
                write(&mut unsettled.writing, full);
            }
        }
        self.throttle(stride).await;
        self.progress.rows(stride);
        self.settle(backfill).await?;
        unsettled.written().await?;
        write(&mut unsettled.writing, batches);
        if is_compared {
            // What it is compared with takes memory, too.
            unsettled.written().await?;
        }
        Ok(())
    }

    /// What the archive holds of a slice; `None` if it is not to be compared.
    pub(super) async fn present(
        &self,
        backfill: &mut Backfill<'_>,
        slice: &Slice,
    ) -> Result<Option<Arc<Mutex<Multiset>>>> {
        if slice.ranges.is_empty() {
            return Ok(None);
        }
        let files: Vec<&TableFile> = table_of(backfill.tables, self.kind)?.files().collect();
        let mut present = Multiset::new(self.compared).before(self.point.lsn);
        present.read(backfill.storage, &files, &slice.ranges).await?;
        Ok(Some(Arc::new(Mutex::new(present))))
    }

    pub(super) async fn throttle(&self, rows: u32) {
        if let (Some(limiter), Some(rows)) = (&self.limiter, NonZeroU32::new(rows)) {
            // Never more than the limiter lets through at once.
            let _ = limiter.until_n_ready(rows).await;
        }
    }
}

/// Lets through so many rows a second. What it lets through at once is a tenth of a second's: with less, the delays of timers
/// would add up; with all of a second's, the first one would have twice the rate.
fn limiter(rate: NonZeroU32) -> DefaultDirectRateLimiter {
    let tenth = NonZeroU32::new(rate.get() / 10).unwrap_or(NonZeroU32::MIN);
    let burst = tenth.max(rate.min(STRIDE_MAX));
    RateLimiter::direct(Quota::per_second(rate).allow_burst(burst))
}

impl Unsettled {
    /// Waits for what is being written.
    pub(super) async fn written(&mut self) -> Result<()> {
        while let Some(result) = self.writing.join_next().await {
            let files = result.map_err(|error| Error::Internal(format!("a copy's writer failed: {error}")));
            self.files.extend(files??);
        }
        Ok(())
    }
}

/// The files, and what their commit says of itself.
fn named(files: Vec<(Kind, DataFile)>, at: Lsn) -> (Vec<DataFile>, CommitNote) {
    let files: Vec<DataFile> = files.into_iter().map(|(_, file)| file).collect();
    let row_count = files.iter().map(|file| file.stats.row_count).sum();
    (files, CommitNote { last_lsn: at, row_count, ..CommitNote::default() })
}
