use std::sync::Arc;

use arrow::array::{ArrayRef, StringArray, TimestampMicrosecondArray};

use crate::lsn::Lsn;
use crate::tables::{Window, WindowWidth};

/// Bytes that a quarantined row takes beside its texts.
const QUARANTINED_ROW_BYTES: usize = 128;

/// A row that its own table can't hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuarantinedRow {
    /// When its transaction was committed: microseconds since the epoch. (Not when we saw it: decoding it
    /// again after a crash must give the same row.)
    pub quarantined_at: i64,
    /// The table that it was inserted into, with its schema.
    pub source_table: String,
    /// Why it is here.
    pub reason: String,
    /// The row as a JSON object of texts.
    pub row: String,
    /// Where its transaction's commit record begins.
    pub lsn: Lsn,
}

/// The quarantined rows of one checkpoint.
#[derive(Debug, Default)]
pub(super) struct QuarantineBatch {
    rows: Vec<QuarantinedRow>,
}

impl QuarantineBatch {
    /// Appends a row; returns the bytes of memory it takes.
    pub(super) fn push(&mut self, row: QuarantinedRow) -> usize {
        // Twice: the row, and its copy in the record batch.
        let byte_count =
            2 * (row.source_table.len() + row.reason.len() + row.row.len()) + QUARANTINED_ROW_BYTES;
        self.rows.push(row);
        byte_count
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &QuarantinedRow> {
        self.rows.iter()
    }

    /// The windows that have rows, in order.
    pub(super) fn windows(&self, width: WindowWidth) -> Vec<Window> {
        let mut windows: Vec<Window> =
            self.rows.iter().map(|row| Window::of(row.quarantined_at, width)).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    }

    pub(super) fn row_count_in(&self, window: Window) -> u64 {
        self.rows_in(window).count() as u64
    }

    fn rows_in(&self, window: Window) -> impl Iterator<Item = &QuarantinedRow> {
        self.rows.iter().filter(move |row| window.contains(row.quarantined_at))
    }

    /// The columns of a window's rows, sorted by time.
    pub(super) fn columns(&self, window: Window) -> Vec<ArrayRef> {
        let mut rows: Vec<&QuarantinedRow> = self.rows_in(window).collect();
        rows.sort_by_key(|row| row.quarantined_at);
        let texts = |text: fn(&QuarantinedRow) -> &str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(rows.iter().map(|row| text(row))))
        };
        let times = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|row| row.quarantined_at));
        let lsns = StringArray::from_iter_values(rows.iter().map(|row| row.lsn.to_string()));
        vec![
            Arc::new(times.with_timezone("UTC")),
            texts(|row| &row.source_table),
            texts(|row| &row.reason),
            texts(|row| &row.row),
            Arc::new(lsns),
        ]
    }
}
