//! What a session has found out that the next one needs from its beginning.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::decode::NewColumn;

/// What the sessions to come are to do otherwise.
#[derive(Debug, Default)]
pub(crate) struct Wants {
    texts: AtomicBool,
    columns: Mutex<Vec<NewColumn>>,
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
}
