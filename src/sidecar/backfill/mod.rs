//! Rows that did not come by the stream: the first copy, and whatever a gap has left out.
//!
//! A table is made complete at one point of the log, while the stream stands still. A temporary slot gives that point,
//! and a snapshot that sees exactly the transactions whose commit records begin before it (manual section 49.2.4). Every row
//! that the snapshot sees and the archive lacks is added; then the table's position in its Delta log moves to the point, and
//! the stream, which begins earlier, skips what lies between by the same rule as after a crash. So whatever snapshot is
//! taken, nothing between it and the slot is missed or doubled, and a copy that was interrupted goes on with a new one.
//!
//! # Which rows are looked at
//!
//! A partition is finished by one log entry with its files and a *mark*, the snapshot's xmin: every row of the partition
//! with a smaller xmin is archived, for ever. `archived_before` says the same of every covered partition. So of a partition
//! with such a horizon only the rows at or above it may be missing; the days that they belong to are compared with the
//! archive as multisets, and the rows that it lacks are added. A partition without a horizon is compared as a whole, or, if
//! the archive holds nothing of its time, just copied.

mod progress;
mod work;

use std::sync::Arc;

use work::Work;

use crate::archive::{CommitNote, Namer, Storage, Table};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::committer::StorageRetry;
use crate::sidecar::foreign;
use crate::sidecar::gap::{self, Incomplete};
use crate::sidecar::recovery;
use crate::sidecar::wants::Wants;
use crate::source::coverage;
use crate::source::slot;
use crate::source::{Copier, Fate, Partition, Point, Source};
use crate::tables::Kind;
use crate::vitals::{Origin, Vitals};
use crate::watermark::{State, Watermark};

/// What a backfill works with: the session's own tables, while it holds the slot and does not decode yet.
pub(super) struct Backfill<'a> {
    pub(crate) config: &'a Config,
    pub(crate) storage: &'a Storage,
    pub(crate) namer: &'a Arc<Namer>,
    pub(crate) tables: &'a mut [Table],
    pub(crate) sql: &'a mut Session,
    pub(crate) wants: &'a Wants,
    pub(crate) vitals: &'a Vitals,
    /// Tells positions of one history from those of another.
    pub(crate) timeline_id: i32,
}

impl Backfill<'_> {
    /// Completes the tables that can be, and puts them into state `streaming`. Gives those whose archive has files which are
    /// none: they are as they were.
    ///
    /// # Errors
    ///
    /// The snapshot was lost with its session, or a table can't be read. Partitions that were finished stay finished.
    pub(crate) async fn run(mut self, incomplete: &Incomplete) -> Result<Vec<(Kind, Error)>> {
        let mut broken = Vec::new();
        for row in &incomplete.unpublished {
            self.skip_copied(row).await?;
        }
        if incomplete.mendable.is_empty() {
            return Ok(broken);
        }
        tracing::info!("taking a snapshot; this waits for transactions that are running now");
        let (point, _) = Point::take(self.config).await?;
        for row in &incomplete.mendable {
            match (self.complete(&point, row).await, self.config.kind(&row.kind)) {
                (Err(error), Some(kind)) if foreign::is_broken(&error) => broken.push((kind, error)),
                (completed, _) => completed?,
            }
        }
        // So that the horizon moves even if nobody writes; else it waits until somebody does.
        if let Err(error) = self.sql.run(slot::ask_for_checkpoint).await {
            tracing::warn!(error = error.chain(), "no checkpoint was asked for");
        }
        Ok(broken)
    }

    /// A copy that was interrupted, and can't go on now, has added rows that the stream would bring again. They are skipped,
    /// with all others up to the copy's position; those that it has not reached are found when the table is completed.
    async fn skip_copied(&mut self, row: &Watermark) -> Result<()> {
        let Some(kind) = self.config.kind(&row.kind) else { return Ok(()) };
        let name = self.copied_mark();
        let table = table_of(self.tables, kind)?;
        let copied = table.marks(std::slice::from_ref(&name)).await?.remove(&name).map(Lsn);
        match copied.filter(|copied| *copied > table.lsn()) {
            Some(lsn) => self.move_to(kind, lsn).await,
            None => Ok(()),
        }
    }

    /// From here on the stream skips what was committed before `lsn`.
    async fn move_to(&mut self, kind: Kind, lsn: Lsn) -> Result<()> {
        let table = table_of(self.tables, kind)?;
        let note = CommitNote { last_lsn: lsn, ..CommitNote::default() };
        let what = format!("moving {} to {lsn}", kind.name());
        let mut retry = StorageRetry::new(&what);
        while let Err(error) = table.commit(&[], lsn, &note).await {
            retry.wait(error).await?;
        }
        Ok(())
    }

    async fn complete(&mut self, point: &Point, row: &Watermark) -> Result<()> {
        let Some(kind) = self.config.kind(&row.kind) else { return Ok(()) };
        let table = row.source_table.as_str();
        let Some(source) = Source::find(&point.client, row).await? else {
            tracing::warn!(table, "the table is gone; its state stays {}", row.state.name());
            return Ok(());
        };
        let partitions = point.holders(table, source.oid).await?;
        let mut horizons = self.marks(kind, &partitions).await?;
        for (horizon, partition) in horizons.iter_mut().zip(&partitions) {
            let covered = row.archived_before.filter(|_| partition.is_covered);
            *horizon = horizon.filter(|mark| row.marks_void_upto.is_none_or(|void| *mark > void));
            // What is missing may be older than either.
            let known = covered.max(*horizon).filter(|_| !partition.lacks);
            // Ids of rows have 32 bits: they can be compared with a horizon within half of their range.
            *horizon = known.filter(|horizon| point.xmin.saturating_sub(*horizon) < 1 << 31);
        }
        tracing::info!(
            table,
            state = row.state.name(),
            partitions = partitions.len(),
            at = %point.lsn,
            "making the archive complete: rows that it lacks are copied, the stream waits meanwhile"
        );
        let origin = if row.state == State::Snapshot { Origin::copy } else { Origin::gap };
        let mut work = Work::new(self, point, (kind, origin), &source, &partitions).await?;
        let mut copier = Copier::open(self.config, &point.client).await?;
        let read = self.read_all(&mut work, &mut copier, &partitions, horizons).await;
        // Also after a failure: what is whole need not be read again.
        let settled = work.settle(self).await;
        let covered = read?;
        settled?;
        let Work { progress, .. } = work;
        self.move_to(kind, point.lsn).await?;
        failpoint::hit("after-copy");
        let broken = recovery::watermarks(self.storage, self.tables, self.sql, self.config).await?;
        if let Some((_, error)) = broken.into_iter().next() {
            return Err(error);
        }
        recovery::entity_counts(self.storage, table_of(self.tables, kind)?, table, self.sql).await?;
        let (slot, publication) = (self.config.slot.as_str(), self.config.publication.as_str());
        gap::notice_unpublished(self.sql, slot, publication).await?;
        let gap_count = row.gap_count;
        let completed =
            self.sql.run(async |client| coverage::complete(client, table, &covered, gap_count).await).await?;
        if !completed {
            let detail = format!("another gap was found while {table} was completed; it is looked at again");
            return Err(Error::Slot { slot: slot.to_owned(), detail, transient: true });
        }
        if progress.quarantined > 0 {
            tracing::warn!(
                table,
                rows = progress.quarantined,
                "rows that the archive can't hold went to its quarantine table, with the reason"
            );
        }
        tracing::info!(
            table,
            read = progress.read(),
            added = progress.added,
            seconds = progress.elapsed().as_secs(),
            "the archive is complete; state streaming"
        );
        Ok(())
    }

    /// Reads the partitions in turn, each with its horizon. Returns those that are covered then; the last of them is not
    /// settled yet.
    async fn read_all(
        &mut self,
        work: &mut Work<'_>,
        copier: &mut Copier,
        partitions: &[Partition],
        horizons: Vec<Option<u64>>,
    ) -> Result<Vec<Partition>> {
        let mut covered = Vec::new();
        for (partition, horizon) in partitions.iter().zip(horizons) {
            match work.complete(self, copier, partition, horizon).await? {
                Fate::Unchanged => covered.push(partition.clone()),
                Fate::Changed => return Err(changed(self.config, partition)),
                Fate::Dropped => tracing::error!(
                    table = work.source.name,
                    partition = partition.name,
                    "the partition was dropped before it was copied: rows that only it held are lost"
                ),
            }
        }
        Ok(covered)
    }

    /// The marks that earlier attempts have left, by partition.
    async fn marks(&mut self, kind: Kind, partitions: &[Partition]) -> Result<Vec<Option<u64>>> {
        let names: Vec<String> = partitions.iter().map(|partition| self.mark(partition)).collect();
        let mut marks = table_of(self.tables, kind)?.marks(&names).await?;
        Ok(names.iter().map(|name| marks.remove(name)).collect())
    }

    fn mark(&self, partition: &Partition) -> String {
        format!("{}/{}", self.timeline_id, partition.oid)
    }

    /// Tells the newest point whose snapshot the archive has rows of. Not to be had from the files' names: positions of
    /// another history may be among them.
    fn copied_mark(&self) -> String {
        format!("{}/copied", self.timeline_id)
    }
}

/// The server has not let us begin to read a partition: because of what has become of it, or for another reason, which is the
/// error then. Not to be asked of an error in mid-copy: by then the partition is locked, and something else has failed.
async fn refused(copier: &mut Copier, partition: &Partition, error: Error) -> Result<Fate> {
    match copier.end_refused(partition).await {
        // A column is gone that the snapshot still sees.
        Ok(Fate::Unchanged) if error.is_undefined_column() => Ok(Fate::Changed),
        Ok(Fate::Unchanged) | Err(_) => Err(error),
        Ok(fate) => Ok(fate),
    }
}

/// The error that ends a session which can't go on with its snapshot; the next one takes another.
fn changed(config: &Config, partition: &Partition) -> Error {
    let detail = format!(
        "{} was renamed, rewritten or altered while it was read; it is read again with a new snapshot",
        partition.name
    );
    Error::Slot { slot: config.slot.clone(), detail, transient: true }
}

fn table_of(tables: &mut [Table], kind: Kind) -> Result<&mut Table> {
    let found = tables.iter_mut().find(|table| table.kind() == kind);
    found.ok_or_else(|| Error::Internal(format!("no archive table for {}", kind.name())))
}
