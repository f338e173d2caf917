//! The transaction that is being decoded.

use serde_json::Value as Json;

use super::relation::Table;
use super::row::{Before, Version};
use crate::batch::QuarantinedRow;
use crate::lsn::Lsn;
use crate::pgoutput::Begin;
use crate::tables::{Change, Kind, PerKind};

/// The last microsecond of the archive's calendar.
const COMMIT_MICROS_MAX: i64 = 253_402_300_799_999_999;

/// The transaction whose rows are being decoded.
#[derive(Clone, Debug)]
pub(super) struct Transaction {
    pub(super) final_lsn: Lsn,
    commit_micros: i64,
    /// Whether the table of each kind already has it.
    archived: PerKind<bool>,
    /// Changes of it so far, of tables that keep versions.
    changes: i64,
    /// Its rows are of a copy that was taken at this position.
    pub(super) copied_at: Option<Lsn>,
    /// Rows that it deletes are archived, and stay in the archive as they are.
    pub(super) is_purge: bool,
}

impl Transaction {
    /// None yet.
    pub(super) const fn new(archived: PerKind<bool>) -> Self {
        Self {
            final_lsn: Lsn::ZERO,
            commit_micros: 0,
            archived,
            changes: 0,
            copied_at: None,
            is_purge: false,
        }
    }

    /// The next one. `lsn` has the position of each kind's table.
    pub(super) fn begin(&mut self, begin: Begin, lsn: impl Fn(Kind) -> Lsn) {
        self.final_lsn = begin.final_lsn;
        // The quarantine's files are named by it.
        self.commit_micros = begin.commit_micros.clamp(0, COMMIT_MICROS_MAX);
        (self.changes, self.is_purge) = (0, false);
        for (kind, is_archived) in self.archived.iter_mut() {
            *is_archived = begin.final_lsn < lsn(kind);
        }
    }

    pub(super) fn has(&self, kind: Kind) -> bool {
        self.archived.get(kind).copied().unwrap_or(false)
    }

    /// The next version of a row. A call that has to be made again for a row counts twice, which does no harm.
    pub(super) fn version<'v>(&mut self, kind: Kind, change: Change, before: Before<'v>) -> Version<'v> {
        self.changes += 1;
        let sequence = self.changes;
        let key_has_time = || kind.row_key().iter().any(|key| key == kind.time_column());
        match self.copied_at {
            // Behind every commit that the copy has seen, before every other.
            Some(at) => Version {
                change: Change::Copy,
                lsn: Lsn(at.0.saturating_sub(1)),
                sequence: 0,
                committed_at: None,
                before: Before::Nothing,
            },
            None => Version {
                change,
                lsn: self.final_lsn,
                sequence,
                committed_at: Some(self.commit_micros),
                before: match before {
                    Before::Unknown if key_has_time() => Before::Nothing,
                    before => before,
                },
            },
        }
    }

    #[cold]
    pub(super) fn quarantined(
        &self,
        table: &Table,
        row: serde_json::Map<String, Json>,
        reason: String,
    ) -> QuarantinedRow {
        QuarantinedRow {
            quarantined_at: self.commit_micros,
            source_table: table.name.clone(),
            reason,
            row: Json::Object(row).to_string(),
            lsn: self.final_lsn,
        }
    }
}
