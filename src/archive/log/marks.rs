//! What a table's log remembers beside the position: a `txn` each, by an id that begins with the application's.

use std::collections::BTreeMap;

use super::entry;
use super::open::open_delta;
use super::table::{CommitNote, Table};
use crate::archive::files::upload::DataFile;
use crate::{Error, Result};

impl Table {
    /// Adds files that did not come by the stream, in one log entry with marks, which [`Table::marks`] gives back. The
    /// position stays. Otherwise as [`Table::commit`].
    ///
    /// # Errors
    ///
    /// As [`Table::commit`]; and [`Error::Conflict`] if somebody else has added rows in this way since the claim: they may
    /// be the same ones.
    pub async fn commit_copy(
        &mut self,
        files: &[DataFile],
        marks: &[(String, u64)],
        note: &CommitNote,
    ) -> Result<()> {
        let mut change = self.change("WRITE", self.lsn());
        change.is_copy = true;
        change.adds = files.iter().map(|file| file.to_table_file(self.kind())).collect();
        for (name, value) in marks {
            let value = i64::try_from(*value)
                .map_err(|_| Error::Internal(format!("mark {name} is past what a log holds: {value}")))?;
            change.marks.push((self.mark_id(name), value));
        }
        change.note = note.to_json();
        self.land(change).await.map(drop)
    }

    /// The newest values of these marks, where they were ever set.
    ///
    /// # Errors
    ///
    /// [`Error::Delta`] if the log can't be read.
    pub async fn marks(&self, names: &[String]) -> Result<BTreeMap<String, u64>> {
        let delta = open_delta(self.storage(), self.kind()).await?;
        let failed = || Error::delta(self.kind(), "reading the log");
        let state = delta.snapshot().map_err(failed())?;
        let mut marks = BTreeMap::new();
        for name in names {
            let log_store = delta.log_store();
            let value = state.transaction_version(log_store.as_ref(), self.mark_id(name)).await;
            if let Some(value) = value.map_err(failed())?.and_then(|value| u64::try_from(value).ok()) {
                marks.insert(name.clone(), value);
            }
        }
        Ok(marks)
    }

    fn mark_id(&self, name: &str) -> String {
        format!("{}/{name}", self.app_id())
    }

    /// The server's timeline that its position is of, as the log has it.
    #[must_use]
    pub const fn timeline(&self) -> Option<i32> {
        self.timeline
    }

    /// Writes down which timeline the positions are of from now on, if the log does not say so yet.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`].
    pub async fn set_timeline(&mut self, timeline: i32) -> Result<()> {
        if self.timeline == Some(timeline) {
            return Ok(());
        }
        let mut change = self.change("HIGHWATER TIMELINE", self.lsn());
        change.marks.push((entry::timeline_id(self.app_id()), i64::from(timeline)));
        self.land(change).await?;
        self.timeline = Some(timeline);
        Ok(())
    }
}
