//! What a session has found out that the next one needs from its beginning.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::decode::NewColumn;
use crate::lsn::Lsn;

/// What the sessions to come are to do otherwise.
#[derive(Debug, Default)]
pub(crate) struct Wants {
    texts: AtomicBool,
    columns: Mutex<Vec<NewColumn>>,
    /// The stream has the publication of updates and deletes.
    versions: AtomicBool,
    is_behind: AtomicBool,
    /// Where the log ended when that was found out; zero if nobody has asked yet.
    behind: AtomicU64,
}

impl Wants {
    /// From the next session on, all values come as text.
    pub(super) fn texts(&self) {
        self.texts.store(true, Ordering::Relaxed);
    }

    /// Whether they are to.
    pub(super) fn has_texts(&self) -> bool {
        self.texts.load(Ordering::Relaxed)
    }

    /// From the next session on, the archive is to have these columns. Whether one of them is new to us: a session that was to add
    /// it and could not is not ended again.
    pub(super) fn columns(&self, new: Vec<NewColumn>) -> bool {
        let mut columns = self.columns.lock().unwrap_or_else(PoisonError::into_inner);
        let known = columns.len();
        for column in new {
            let is_it =
                |other: &NewColumn| other.kind.name() == column.kind.name() && other.name == column.name;
            if !columns.iter().any(is_it) {
                columns.push(column);
            }
        }
        columns.len() > known
    }

    /// The columns that were wanted so far.
    pub(super) fn all_columns(&self) -> Vec<NewColumn> {
        self.columns.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the stream has the publication of updates and deletes.
    pub(super) fn stream_versions(&self, has_them: bool) {
        self.versions.store(has_them, Ordering::Relaxed);
    }

    /// Whether it has.
    pub(super) fn has_versions(&self) -> bool {
        self.versions.load(Ordering::Relaxed)
    }

    /// The log that is left is older than that publication.
    pub(super) fn fall_behind(&self) {
        self.is_behind.store(true, Ordering::Relaxed);
    }

    /// Whether it was when the last session ended.
    pub(super) fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Relaxed)
    }

    /// It is not from this position on.
    pub(super) fn behind_until(&self, lsn: Lsn) {
        self.behind.store(lsn.0, Ordering::Relaxed);
    }

    /// The position from which on it is not.
    pub(super) fn behind(&self) -> Option<Lsn> {
        Some(self.behind.load(Ordering::Relaxed)).filter(|lsn| *lsn > 0).map(Lsn)
    }

    /// It is not any more.
    pub(super) fn catch_up(&self) {
        self.is_behind.store(false, Ordering::Relaxed);
        self.behind.store(0, Ordering::Relaxed);
    }
}
