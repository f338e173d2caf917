//! What is asked of a verification, and what it finds.

use crate::error::Result;
use crate::postgres::Session;
use crate::source::unarchived::{self, Part, UnfitColumn};
use crate::watermark::Watermark;

/// What is compared, and what becomes of a difference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Tables, as `schema.table` or `table`; none means all that are archived.
    pub tables: Vec<String>,
    /// First microsecond since the epoch of `created_at`; rounded down to an hour.
    pub from: Option<i64>,
    /// First microsecond after the last; rounded up to an hour.
    pub to: Option<i64>,
    /// What becomes of rows that the archive lacks, or has more often than Postgres.
    pub repair: RepairMode,
    /// A partition counts as verified also where the archive has rows that Postgres has not: they were deleted or changed
    /// there on purpose.
    pub accept_surplus: bool,
    /// A table counts as equal also if no row of it can be archived but in the quarantine.
    pub accept_quarantine: bool,
}

/// What becomes of rows that the archive lacks, and of doubles: those that it has more often than Postgres, which has them, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RepairMode {
    /// They are reported.
    #[default]
    Report,
    /// They are added; but not in hours of which the archive also has rows that Postgres has not. Those are rows that were
    /// changed, as far as can be told: the archive has them as they were inserted.
    AddMissing,
    /// They are added, so that the archive has both what was inserted and what Postgres has today.
    AddChanged,
    /// They are reported; only doubles are removed, which the other repairs do, too.
    RemoveDoubles,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Whether nothing was missing and nothing too much, and every part of every table was compared. Rows that a repair has added
    /// were missing.
    pub equal: bool,
    /// The tables, by name.
    pub tables: Vec<TableReport>,
}

/// What was found in one table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TableReport {
    /// The drift table with its schema.
    pub source_table: String,
    /// The kind of its rows.
    pub kind: String,
    /// Why it was not compared.
    pub not_compared: Option<String>,
    /// Position up to which both sides were compared.
    pub lsn: Option<String>,
    /// Rows in Postgres.
    pub postgres_rows: u64,
    /// Rows in the archive, of the same hours.
    pub archive_rows: u64,
    /// Rows in Postgres that the archive can't hold: its quarantine must have them.
    pub quarantined_rows: u64,
    /// What holds rows of the table, and can't be archived: it was not compared.
    pub parts_not_compared: Vec<Part>,
    /// What keeps all rows of the table in the quarantine.
    pub unfit_columns: Vec<UnfitColumn>,
    /// Whether that will do: somebody has said so.
    pub quarantine_accepted: bool,
    /// Hours in which Postgres or the archive has rows.
    pub hours: u64,
    /// How many of them were compared row by row: those that are not plainly equal, or have rows that only the quarantine holds.
    pub hours_by_row: u64,
    /// Hours that differ, oldest first.
    pub differences: Vec<Difference>,
    /// Surplus copies that were removed from the archive: those of `doubles`, in a repair.
    pub doubles_removed: u64,
    /// The partitions (or the table itself).
    pub partitions: Vec<PartitionReport>,
}

/// An hour of `created_at` in which the archive does not hold what Postgres does.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Its start, RFC 3339; `None` for the rows without a time that the archive can hold, which belong into the quarantine.
    pub hour: Option<String>,
    /// Rows in Postgres.
    pub postgres_rows: u64,
    /// Rows in the archive, without the quarantine.
    pub archive_rows: u64,
    /// Rows that Postgres has, and neither the archive nor its quarantine.
    pub missing: u64,
    /// Rows that the archive has, and Postgres does not; not counting hours that Postgres may have forgotten.
    pub surplus: u64,
    /// Copies that the archive has too many of rows that Postgres does have, in the same hours: they were moved there.
    pub doubles: u64,
    /// How many of the missing rows were added.
    pub added: u64,
    /// Rows that only the quarantine can have, and there without their long values, because they are too long for the memory;
    /// zero if the quarantine is accepted.
    pub cut: u64,
}

/// What was found in one partition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PartitionReport {
    /// Its name with its schema.
    pub partition: String,
    /// Its rows in Postgres.
    pub row_count: u64,
    /// The sum of their digests, 16 hexadecimal digits.
    pub checksum: String,
    /// Whether every hour of it is equal, and it was compared as a whole; then it is in `highwater.verified_partition`.
    pub verified: bool,
}

/// How far a verification is, for whoever shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The table.
    pub table: String,
    /// What is being done, and to what.
    pub step: String,
    /// How much of `all` is done.
    pub done: u64,
    /// How much there is; of rows, what the server expects.
    pub all: u64,
    /// What is counted: `rows`, or `hours` while some are compared row by row.
    pub unit: &'static str,
}

impl TableReport {
    /// Whether all of the table was compared, and nothing of it is in the quarantine alone that should not be.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.not_compared.is_none() && self.parts_not_compared.is_empty() && self.is_fit()
    }

    /// Whether its columns can be archived, or the quarantine will do.
    pub(super) const fn is_fit(&self) -> bool {
        self.unfit_columns.is_empty() || self.quarantine_accepted
    }

    /// The report of a table of which nothing but what can't be archived is known yet.
    pub(super) async fn begin(row: &Watermark, options: &Options, sql: &mut Session) -> Result<Self> {
        let name = row.source_table.as_str();
        let unarchived = sql.run(async |client| unarchived::read(client, name).await).await?;
        Ok(Self {
            source_table: row.source_table.clone(),
            kind: row.kind.clone(),
            not_compared: None,
            lsn: None,
            postgres_rows: 0,
            archive_rows: 0,
            quarantined_rows: 0,
            parts_not_compared: unarchived.parts,
            unfit_columns: unarchived.columns,
            quarantine_accepted: unarchived.accepts_quarantine || options.accept_quarantine,
            hours: 0,
            hours_by_row: 0,
            differences: Vec::new(),
            doubles_removed: 0,
            partitions: Vec::new(),
        })
    }
}
