//! The committer: the task that makes checkpoints durable, in the order that ARCHITECTURE.md ("What is
//! durable when") gives reasons for: files, log entries, watermark rows, acknowledgement.

mod files;
mod housekeeping;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::archive::{CommitNote, DataFile, MergeTurns, Merged, Namer, Storage, Table, Totals};
use crate::batch::{Batches, EntitySpan};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::foreign;
use crate::sidecar::gap;
use crate::sidecar::wants::Wants;
use crate::tables::Kind;
use crate::vitals::{self, OfOrigin, OfTable, Origin, Vitals};
use crate::watermark::{self, Advance, Horizon};
pub(crate) use files::{COPY_PATIENCE, StorageRetry, count_quarantined, write_files};
use housekeeping::finished;

/// How often merges and maintenance are looked at.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(10);

/// How often, at least and at most, the files of the tables are looked for, and it is written down that the logs were looked
/// at; in between as often as the archive is to be up to date. Lists the tables, so it costs a request or a few.
const LOOK_INTERVAL: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(1));

/// When a session vacuums first. Not at its start: it lists the whole archive, and a session that begins has rows to
/// catch up with.
const FIRST_VACUUM_AFTER: Duration = Duration::from_mins(10);

/// How often a table is vacuumed, and how old an object must be to be removed: running queries and uploads
/// keep their files for that long.
const VACUUM_INTERVAL: Duration = Duration::from_hours(24);

/// What the builder asks for.
#[derive(Debug)]
pub(crate) enum Work {
    /// Rows that end inside a transaction: written out now, named in the log with the checkpoint that
    /// holds the transaction's commit.
    Piece {
        /// The rows.
        batches: Box<Batches>,
        /// Past the start of the transaction's commit record.
        lsn: Lsn,
    },
    /// Rows that end at a commit boundary.
    Checkpoint {
        /// The rows; may be empty after a piece.
        batches: Box<Batches>,
        /// What it covers.
        range: Range,
    },
    /// Nothing is pending before this position, which is to be in the archive's logs, too.
    Mark {
        /// Where a commit ends.
        lsn: Lsn,
    },
    /// Nothing is pending before this position.
    Idle {
        /// A keepalive's position.
        lsn: Lsn,
    },
    /// Somebody wants to know that everything before is done.
    Tell(oneshot::Sender<()>),
    /// Nothing is pending before this position, and nothing will come: it is in the archive's logs only, since a watermark row
    /// would be something new in the server's log.
    Last {
        /// A keepalive's position.
        lsn: Lsn,
    },
}

/// What a checkpoint covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    /// Where the first transaction's commit record begins.
    pub(crate) first_lsn: Lsn,
    /// Where the last transaction's commit record ends.
    pub(crate) last_lsn: Lsn,
    /// When the first was committed, microseconds since the epoch.
    pub(crate) first_commit: i64,
    /// When the last was committed.
    pub(crate) last_commit: i64,
}

/// What the committer is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) storage: Storage,
    /// Those that can be used.
    pub(crate) tables: Vec<Table>,
    pub(crate) sql: Session,
    /// The server process that streams to us: who holds the slot.
    pub(crate) holder: i32,
    /// Names this session's objects.
    pub(crate) namer: Arc<Namer>,
    pub(crate) wants: Arc<Wants>,
    pub(crate) vitals: Vitals,
    /// The position that everything is known to be durable up to.
    pub(crate) durable: watch::Sender<Lsn>,
}

/// The task's state.
#[derive(Debug)]
pub(crate) struct Committer {
    parts: Parts,
    /// Files that are uploaded and not yet named in a log, by kind.
    uploaded: BTreeMap<Kind, Vec<DataFile>>,
    /// What the archive holds more than the watermark rows say: each checkpoint's position, and its entities. Each
    /// is mirrored at its own position, so that one whose answer was lost is not counted twice.
    unmirrored: VecDeque<(Lsn, Vec<(String, EntitySpan)>)>,
    /// What the archive will hold more once `uploaded` is named.
    spans: Vec<EntitySpan>,
    /// Waits to be passed by the durable position.
    horizon: Option<Horizon>,
    merge: Option<(Kind, JoinHandle<Result<Merged>>)>,
    merge_turns: MergeTurns,
    vacuum_at: Instant,
    look_at: Instant,
}

impl Drop for Committer {
    fn drop(&mut self) {
        if let Some((_, merge)) = &self.merge {
            merge.abort();
        }
    }
}

impl Committer {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            parts,
            uploaded: BTreeMap::new(),
            unmirrored: VecDeque::new(),
            spans: Vec::new(),
            horizon: None,
            merge: None,
            merge_turns: MergeTurns::default(),
            vacuum_at: Instant::now() + FIRST_VACUUM_AFTER,
            look_at: Instant::now(),
        }
    }

    /// Works until the builder is gone. Priorities, highest first; the first two are rare and short, so they
    /// can't keep a checkpoint waiting, and must not starve behind a busy stream:
    ///
    /// 1. a merge that has finished;
    /// 2. housekeeping, every 10 s;
    /// 3. what the builder asks for, in its order.
    ///
    /// # Errors
    ///
    /// Whatever can't be cured by trying again; [`Error::Fenced`] above all. Storage that fails is tried for
    /// ever.
    pub(crate) async fn run(mut self, mut work: mpsc::Receiver<Work>) -> Result<()> {
        let mut housekeeping = interval_at(Instant::now() + HOUSEKEEPING_INTERVAL, HOUSEKEEPING_INTERVAL);
        housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // 1.
                (kind, merged) = finished(&mut self.merge) => self.commit_merge(kind, merged).await?,
                // 2.
                _ = housekeeping.tick() => self.keep_house().await?,
                // 3.
                next = work.recv() => match next {
                    Some(next) => self.perform(next).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn perform(&mut self, work: Work) -> Result<()> {
        match work {
            Work::Piece { batches, lsn } => self.write_files(batches, lsn).await,
            Work::Checkpoint { batches, range } => {
                self.write_files(batches, range.last_lsn).await?;
                self.commit(range).await?;
                self.record_position(range.last_lsn).await
            }
            Work::Mark { lsn } => {
                self.mark(lsn).await?;
                self.record_position(lsn).await
            }
            Work::Idle { lsn } => self.record_position(lsn).await,
            Work::Tell(done) => {
                // Nobody may want to know any more.
                let _ = done.send(());
                Ok(())
            }
            Work::Last { lsn } => {
                self.mark(lsn).await?;
                self.acknowledge(lsn);
                Ok(())
            }
        }
    }

    /// Encodes and uploads; step 1 of an advance.
    async fn write_files(&mut self, batches: Box<Batches>, lsn: Lsn) -> Result<()> {
        self.spans.extend(batches.entity_spans());
        count_quarantined(&self.parts.config, &self.parts.vitals, &batches);
        let files = write_files(&self.parts.storage, &self.parts.namer, batches, lsn, None, None).await?;
        for (kind, file) in files {
            self.uploaded.entry(kind).or_default().push(file);
        }
        Ok(())
    }

    /// One log entry for each table that got rows, the quarantine's first; step 2 of an advance.
    async fn commit(&mut self, range: Range) -> Result<()> {
        let uploaded = std::mem::take(&mut self.uploaded);
        let mut row_count = 0;
        for (kind, files) in &uploaded {
            let kind = *kind;
            let note = CommitNote {
                first_lsn: range.first_lsn,
                last_lsn: range.last_lsn,
                first_committed_at: Some(range.first_commit),
                last_committed_at: Some(range.last_commit),
                row_count: files.iter().map(|file| file.stats.row_count).sum(),
            };
            row_count += note.row_count;
            // After a crash the quarantine may be ahead, and still get rows that were decided otherwise then.
            let at =
                self.parts.tables.iter().find(|table| table.kind() == kind).map_or(Lsn::ZERO, Table::lsn);
            self.commit_table(kind, files, range.last_lsn.max(at), &note).await?;
            failpoint::hit("between-tables");
        }
        let schema = &self.parts.config.schema;
        let spans = self.spans.drain(..);
        let spans =
            spans.filter_map(|span| Some((watermark::source_table(schema, span.kind)?, span))).collect();
        self.unmirrored.push_back((range.last_lsn, spans));
        let age_ms = chrono::Utc::now().timestamp_micros().saturating_sub(range.first_commit) / 1000;
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of years are exact")]
        self.parts.vitals.counters.checkpoint_age.observe(age_ms.max(0) as f64 / 1e3);
        tracing::info!(rows = row_count, lsn = %range.last_lsn, age_ms, "archived a checkpoint");
        Ok(())
    }

    async fn commit_table(
        &mut self,
        kind: Kind,
        files: &[DataFile],
        lsn: Lsn,
        note: &CommitNote,
    ) -> Result<()> {
        let Some(table) = self.parts.tables.iter_mut().find(|table| table.kind() == kind) else {
            return Err(Error::Internal(format!("no archive table for {}", kind.name())));
        };
        let what = format!("committing {}", kind.name());
        let mut retry = StorageRetry::new(&what);
        let begun = Instant::now();
        // A commit that is repeated recognises itself in the log.
        while let Err(error) = table.commit(files, lsn, note).await {
            retry.wait(error).await?;
        }
        if !files.is_empty() {
            let (counters, of) = (&self.parts.vitals.counters, OfTable::new(kind.name()));
            counters.commits.get_or_create(&of).inc();
            counters.commit_seconds.observe(begun.elapsed().as_secs_f64());
            counters.last_commit.get_or_create(&of).set(vitals::seconds_now());
            let of = OfOrigin { table: kind.name().to_owned(), origin: Origin::stream };
            counters.archived_rows.get_or_create(&of).inc_by(note.row_count);
        }
        Ok(())
    }

    /// Steps 3 and 4 of an advance: everything before `lsn` is in the logs, so say so in Postgres, and then
    /// let the server forget it.
    async fn record_position(&mut self, lsn: Lsn) -> Result<()> {
        failpoint::hit("before-watermark");
        match self.mirror(lsn).await {
            Ok(()) => failpoint::hit("after-watermark"),
            Err(error) if error.is_transient() => {
                // Most likely the server shuts down, and waits for us: record the position where we can.
                tracing::warn!(
                    error = error.chain(),
                    "no watermark row; recording {lsn} in the archive's logs"
                );
                self.mark(lsn).await?;
            }
            Err(error) => return Err(error),
        }
        failpoint::hit("before-ack");
        self.acknowledge(lsn);
        Ok(())
    }

    fn acknowledge(&self, lsn: Lsn) {
        self.parts.vitals.lag.archived(lsn);
        self.parts.durable.send_if_modified(|durable| {
            let moved = lsn > *durable;
            *durable = lsn.max(*durable);
            moved
        });
    }

    async fn mirror(&mut self, lsn: Lsn) -> Result<()> {
        for table in &mut self.parts.tables {
            foreign::note(&self.parts.config, &mut self.parts.sql, table).await?;
        }
        gap::notice(&mut self.parts.sql, &self.parts.config.slot, &self.parts.config.publication).await?;
        let tables: Vec<(String, Totals)> = self.totals();
        let mut mirrored = Lsn::ZERO;
        while let Some((at, spans)) = self.unmirrored.front() {
            let advance = Advance { lsn: *at, archived_before: None, tables: &tables, spans };
            self.parts.sql.run(async |client| watermark::advance(client, &advance).await).await?;
            mirrored = *at;
            self.unmirrored.pop_front();
        }
        let passed = self.horizon.filter(|horizon| horizon.lsn <= lsn);
        let archived_before = passed.map(|horizon| horizon.xmin);
        if mirrored < lsn || passed.is_some() {
            let advance = Advance { lsn, archived_before, tables: &tables, spans: &[] };
            self.parts.sql.run(async |client| watermark::advance(client, &advance).await).await?;
        }
        if passed.is_some() {
            self.horizon = None;
        }
        if self.horizon.is_none() {
            // The next advance publishes it. Without it the purge waits a little longer, no more.
            let (slot, holder) = (self.parts.config.slot.as_str(), self.parts.holder);
            let horizon =
                self.parts.sql.run(async |client| watermark::horizon(client, slot, holder).await).await;
            self.horizon = horizon.unwrap_or_else(|error| {
                tracing::debug!(error = error.chain(), "no horizon");
                None
            });
        }
        Ok(())
    }

    fn totals(&self) -> Vec<(String, Totals)> {
        let tables = self.parts.tables.iter();
        tables
            .filter_map(|table| {
                Some((watermark::source_table(&self.parts.config.schema, table.kind())?, table.totals()))
            })
            .collect()
    }

    /// An entry with only a position in every log.
    async fn mark(&mut self, lsn: Lsn) -> Result<()> {
        for kind in self.parts.config.all_kinds() {
            let at = self.parts.tables.iter().find(|table| table.kind() == kind).map(Table::lsn);
            if at.is_some_and(|at| at < lsn) {
                self.commit_table(kind, &[], lsn, &CommitNote { last_lsn: lsn, ..CommitNote::default() })
                    .await?;
            }
        }
        Ok(())
    }
}
