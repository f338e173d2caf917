//! What is told of the rows that come.

use super::Builder;
use crate::postgres::Chunk;
use crate::vitals::OfTable;

impl Builder {
    /// Tells what a chunk has brought.
    pub(super) fn count(&mut self, chunk: &Chunk) {
        self.count_rows();
        let counters = &self.vitals.counters;
        counters.received_bytes.inc_by(chunk.byte_count() as u64);
        counters.received_transactions.inc_by(std::mem::take(&mut self.transactions));
        counters.buffered_bytes.set(i64::try_from(self.batches.byte_count()).unwrap_or(i64::MAX));
    }

    /// Counts the rows that came since this was last called.
    pub(super) fn count_rows(&mut self) {
        for (kind, rows) in self.batches.take_new_rows() {
            self.vitals.counters.received_rows.get_or_create(&OfTable::new(kind.name())).inc_by(rows);
        }
    }

    /// Says how many rows the archive can't hold, once a checkpoint.
    pub(super) fn tell_quarantined(&mut self) {
        match std::mem::take(&mut self.quarantined) {
            0 => {}
            rows => tracing::warn!(
                rows,
                "rows that the archive can't hold went to its quarantine table, with the reason"
            ),
        }
    }
}
