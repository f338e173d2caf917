//! One table, compared: both sides added up by hour, and what differs row by row.

use super::damage;
use super::hour::{ceil_hour, floor_hour, hour_text};
use super::report::{Difference, PartitionReport, TableReport};
use super::rows::{Comparison, Found, Repair};
use super::table::{Table, changed};
use super::tail::Tail;
use crate::archive::{self, HourSums, RowSum, TableFile};
use crate::error::Result;
use crate::postgres::Session;
use crate::purge;
use crate::source::{Fate, Partition, PartitionSums, Source};
use crate::tables::{CALENDAR, MICROS_PER_DAY, MICROS_PER_HOUR};
use crate::telemetry::whole;
use crate::watermark::{self, Verified};
use std::collections::BTreeSet;

/// What both sides have been added up to.
struct Counted<'a> {
    postgres: &'a HourSums,
    archive: &'a HourSums,
    /// Hours that are not plainly equal.
    suspect: &'a [i64],
    /// Rows in Postgres without a usable time.
    timeless: u64,
}

/// What was found to differ.
#[derive(Debug, Default)]
struct Different {
    hours: BTreeSet<i64>,
    /// Those of which the archive still lacks rows.
    lacking: BTreeSet<i64>,
    /// Those of which only the quarantine has some rows, without their long values.
    cut: BTreeSet<i64>,
    /// The rows without a usable time.
    timeless: bool,
    /// The archive still lacks some of these.
    lacks_timeless: bool,
    /// Some of these are cut.
    cut_timeless: bool,
}

impl Table<'_> {
    pub(super) async fn compare(
        &self,
        report: &mut TableReport,
        tail: &Tail,
        repair: &mut Repair,
        sql: &mut Session,
    ) -> Result<()> {
        let Some(source) = Source::find(&self.point.client, self.row).await? else {
            report.not_compared = Some("the table is gone".to_owned());
            return Ok(());
        };
        let leaves = self.holders(&source).await?;
        report.unfit_columns.extend(source.unfit_columns(self.kind));
        report.unfit_columns.extend(source.columns_to_come(self.kind));
        let sums = self.partition_sums(&source, &leaves, repair).await?;
        let postgres = self.postgres_sums(&sums, tail);
        let archive = match self.archive_sums(&leaves, &postgres).await {
            Ok(sums) => sums,
            Err(error) if damage::is_told_by(&error) => {
                report.not_compared = Some(self.take_back(&leaves, error, sql).await?);
                return Ok(());
            }
            Err(error) => return Err(error),
        };

        // Whatever is not plainly equal is looked at row by row.
        let unfit: BTreeSet<i64> = sums.iter().flat_map(|sums| sums.unfit_hours.iter().copied()).collect();
        let hours: BTreeSet<i64> = postgres.keys().chain(archive.keys()).chain(&unfit).copied().collect();
        let suspect: Vec<i64> = hours
            .iter()
            .copied()
            .filter(|hour| postgres.get(hour) != archive.get(hour) || unfit.contains(hour))
            .collect();
        let timeless: u64 = sums.iter().map(|sums| sums.timeless).sum();
        report.hours = hours.len() as u64;
        report.hours_by_row = suspect.len() as u64;
        report.postgres_rows =
            sums.iter().map(|sums| sums.rows).sum::<u64>() + tail.rows(self.kind, self.range);
        report.quarantined_rows = sums.iter().map(PartitionSums::unfit_rows).sum();
        report.archive_rows = archive.values().map(|sum| sum.rows).sum();
        let mut different = Different::default();
        if !suspect.is_empty() || timeless > 0 {
            let counted = Counted { postgres: &postgres, archive: &archive, suspect: &suspect, timeless };
            let mut comparison = Comparison::new(self, &source, &leaves, tail, repair).await?;
            different = self.compare_rows(&mut comparison, &leaves, &counted, report, (repair, sql)).await?;
        }
        self.record(&leaves, &sums, &different, report, sql).await
    }

    /// What holds the table's rows; of detached partitions also from when to when.
    async fn holders(&self, source: &Source) -> Result<Vec<Partition>> {
        let client = &self.point.client;
        let mut holders = self.point.holders(&self.row.source_table, source.oid).await?;
        for holder in holders.iter_mut().filter(|holder| holder.is_detached) {
            self.point.savepoint().await?;
            let range = holder.range(client, &source.time).await?;
            holder.extent = range.map(|(low, high)| (floor_hour(low), ceil_hour(high.saturating_add(1))));
            if self.point.end_part(holder).await? != Fate::Unchanged {
                return Err(changed(self.config, holder));
            }
        }
        Ok(holders)
    }

    /// Compares these hours, and the rows without a usable time, row by row.
    async fn compare_rows(
        &self,
        comparison: &mut Comparison<'_>,
        leaves: &[Partition],
        counted: &Counted<'_>,
        report: &mut TableReport,
        (repair, sql): (&mut Repair, &mut Session),
    ) -> Result<Different> {
        let mut different = Different::default();
        let purged =
            sql.run(async |client| purge::cutoff(client, &self.row.source_table, true).await).await?;
        let bounds = merged(leaves.iter().filter_map(|leaf| leaf.bounds).collect());
        for (index, hour) in counted.suspect.iter().enumerate() {
            repair.look().await?;
            let step = format!("comparing the rows of {}", hour_text(*hour));
            self.told(&step, (index as u64, counted.suspect.len() as u64), "hours");
            let rows = |sums: &HourSums| sums.get(hour).map_or(0, |sum| sum.rows);
            let (postgres_rows, archive_rows) = (rows(counted.postgres), rows(counted.archive));
            let is_held = self.is_held(&bounds, purged, *hour);
            let rows = postgres_rows + archive_rows;
            let found = comparison.hour(*hour, rows, is_held, (&mut *repair, &mut *sql)).await?;
            let cut = if report.quarantine_accepted { 0 } else { found.cut };
            if found.missing + found.surplus + found.doubles + cut > 0 {
                // Files that were written anew, without the surplus copies, are to be read back.
                let is_rewritten = found.doubles > 0 && repair.is_on();
                if found.missing + cut > 0 || is_rewritten || !self.accepts_surplus {
                    different.hours.insert(*hour);
                }
                if cut > 0 {
                    different.cut.insert(*hour);
                }
                let Found { missing, surplus, doubles, .. } = found;
                let added = comparison.add(found, repair, sql).await?;
                if added < missing {
                    different.lacking.insert(*hour);
                }
                let hour = Some(hour_text(*hour));
                report.differences.push(Difference {
                    hour,
                    postgres_rows,
                    archive_rows,
                    missing,
                    surplus,
                    doubles,
                    added,
                    cut,
                });
            }
        }
        report.doubles_removed = comparison.removed(repair, sql).await?;
        if counted.timeless > 0 {
            let found = comparison.timeless().await?;
            let cut = if report.quarantine_accepted { 0 } else { found.cut };
            if found.missing + cut > 0 {
                different.timeless = true;
                let missing = found.missing;
                let added = comparison.add(found, repair, sql).await?;
                different.lacks_timeless = added < missing;
                different.cut_timeless = cut > 0;
                report.differences.push(Difference {
                    hour: None,
                    postgres_rows: counted.timeless,
                    archive_rows: 0,
                    missing,
                    surplus: 0,
                    doubles: 0,
                    added,
                    cut,
                });
            }
        }
        Ok(different)
    }

    /// What Postgres holds, partition by partition.
    async fn partition_sums(
        &self,
        source: &Source,
        leaves: &[Partition],
        repair: &mut Repair,
    ) -> Result<Vec<PartitionSums>> {
        let is_whole = self.range == (i64::MIN, i64::MAX);
        let expected = leaves.iter().map(|leaf| leaf.rows_expected).sum::<f64>();
        let (mut done, mut rest) = (0, expected);
        let mut all = Vec::new();
        for leaf in leaves {
            self.told(&format!("adding up {}", leaf.name), (done, done + whole(rest)), "rows");
            rest -= leaf.rows_expected;
            repair.look().await?;
            if !is_whole
                && leaf.extent.is_some_and(|extent| extent.1 <= self.range.0 || extent.0 >= self.range.1)
            {
                all.push(PartitionSums::default());
                continue;
            }
            self.point.savepoint().await?;
            let client = &self.point.client;
            let sums = source.sums(client, leaf, self.compared, (!is_whole).then_some(self.range)).await?;
            done += sums.rows;
            all.push(sums);
            if self.point.end_part(leaf).await? != Fate::Unchanged {
                return Err(changed(self.config, leaf));
            }
        }
        self.told("adding up the archive", (done, done), "rows");
        Ok(all)
    }

    /// All of Postgres at the archive's position: the snapshot, and what was committed after it.
    fn postgres_sums(&self, sums: &[PartitionSums], tail: &Tail) -> HourSums {
        let mut all = HourSums::new();
        let hours = sums.iter().flat_map(|sums| &sums.fit).map(|(hour, sum)| (*hour, *sum));
        for (hour, sum) in hours.chain(tail.sums(self.kind, self.range)) {
            *all.entry(hour).or_default() += sum;
        }
        all
    }

    /// What the archive holds of the hours that Postgres has rows of, or a partition for.
    async fn archive_sums(&self, leaves: &[Partition], postgres: &HourSums) -> Result<HourSums> {
        let (from, to) = self.range;
        let hours = postgres.keys().map(|hour| (hour * MICROS_PER_HOUR, (hour + 1) * MICROS_PER_HOUR));
        let bounds = leaves.iter().filter_map(|leaf| leaf.bounds);
        // A row that was deleted may have been the only one of its hour.
        let kept = (self.kind.keeps_versions() && leaves.iter().all(|leaf| leaf.bounds.is_none()))
            .then(|| (self.cutoff(), CALENDAR.end));
        let bounds = bounds.chain(kept);
        let bounds = bounds.map(|(low, high)| (floor_hour(low).max(from), ceil_hour(high).min(to)));
        let ranges = merged(hours.chain(bounds).filter(|(low, high)| low < high).collect());
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Ok(HourSums::new()) };
        let files: Vec<&TableFile> = self
            .files
            .iter()
            .filter(|file| ranges.iter().any(|(low, high)| file.may_hold(*low, *high)))
            .collect();
        let (range, at) = ((first.0, last.1), self.point.lsn);
        let mut sums = archive::hour_sums(self.storage, self.compared, &files, range, at).await?;
        let is_wanted = |hour: i64| {
            let time = hour * MICROS_PER_HOUR;
            let after = ranges.partition_point(|(low, _)| *low <= time);
            after.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|(_, high)| time < *high)
        };
        sums.retain(|hour, _| is_wanted(*hour));
        Ok(sums)
    }

    /// Rows from before it may be gone from a table that is not partitioned by time, since they are past retention.
    fn cutoff(&self) -> i64 {
        let retention = i64::from(self.config.retention_days_of(&self.row.source_table)) * MICROS_PER_DAY;
        chrono::Utc::now().timestamp_micros() - retention
    }

    /// Whether Postgres still has every row of an hour: its partitions reach over all of it, or, where there are none by time,
    /// retention has not reached it, nor a purge (`purged`). `bounds` are those of the partitions, merged.
    fn is_held(&self, bounds: &[(i64, i64)], purged: Option<i64>, hour: i64) -> bool {
        let (start, end) = (hour * MICROS_PER_HOUR, (hour + 1) * MICROS_PER_HOUR);
        if bounds.is_empty() {
            let cutoff = self.cutoff();
            return start >= purged.map_or(cutoff, |purged| purged.max(cutoff));
        }
        bounds.iter().any(|(low, high)| *low <= start && end <= *high)
    }

    /// Records which partitions are verified, and takes back what an earlier verification said of others.
    async fn record(
        &self,
        leaves: &[Partition],
        sums: &[PartitionSums],
        different: &Different,
        report: &mut TableReport,
        sql: &mut Session,
    ) -> Result<()> {
        for (leaf, sums) in leaves.iter().zip(sums) {
            let (low, high) = leaf.extent.unwrap_or((i64::MIN, i64::MAX));
            let is_whole = self.range == (i64::MIN, i64::MAX)
                || (leaf.extent.is_some() && self.range.0 <= low && high <= self.range.1);
            let touches = |hour: &i64| {
                let start = *hour * MICROS_PER_HOUR;
                sums.fit.contains_key(hour)
                    || sums.unfit_hours.contains(hour)
                    || (leaf.extent.is_some() && low < start + MICROS_PER_HOUR && start < high)
            };
            let differs = different.hours.iter().any(touches) || (different.timeless && sums.timeless > 0);
            let lacks =
                different.lacking.iter().any(touches) || (different.lacks_timeless && sums.timeless > 0);
            let is_cut = different.cut.iter().any(touches) || (different.cut_timeless && sums.timeless > 0);
            let reason = is_cut.then(|| cut_reason(&self.row.source_table));
            let mut total = RowSum::default();
            sums.fit.values().for_each(|sum| total += *sum);
            let checksum = format!("{:016x}", total.sum);
            let verified = Verified {
                source_table: &self.row.source_table,
                partition_oid: leaf.oid,
                partition_name: &leaf.name,
                row_count: sums.rows,
                checksum: &checksum,
                horizon: self.point.xmin,
                gap_count: self.row.gap_count,
            };
            // What a part of it shows proves that rows are missing, but not that none are.
            let lacks = lacks || is_cut;
            if lacks || is_whole {
                let reason = reason.as_deref();
                sql.run(async |client| watermark::set_lacking(client, &verified, lacks, reason).await)
                    .await?;
            }
            let is_verified = is_whole && !differs && report.is_fit();
            let mut is_recorded = false;
            if is_verified {
                is_recorded =
                    sql.run(async |client| watermark::record_verified(client, &verified).await).await?;
            } else if differs {
                sql.run(async |client| watermark::forget_verified(client, &verified).await).await?;
            }
            if is_whole || sums.rows > 0 || differs {
                report.partitions.push(PartitionReport {
                    partition: leaf.name.clone(),
                    row_count: sums.rows,
                    checksum,
                    verified: is_recorded,
                });
            }
        }
        Ok(())
    }
}

/// Why a partition stays of which some rows were too long.
fn cut_reason(source_table: &str) -> String {
    format!(
        "rows of it are too long for the sidecar's memory, so the quarantine has them without their long values: with a \
         larger memory (HIGHWATER_MEMORY) `highwater verify --repair` archives them, or update highwater.retention set \
         accepts_quarantine = true where source_table = '{source_table}' and `highwater verify` lets them be deleted"
    )
}

/// Ranges in order, with those that touch made one.
fn merged(mut ranges: Vec<(i64, i64)>) -> Vec<(i64, i64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(i64, i64)> = Vec::new();
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if low <= last.1 => last.1 = last.1.max(high),
            _ => merged.push((low, high)),
        }
    }
    merged
}
