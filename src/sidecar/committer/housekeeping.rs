//! What the committer does between checkpoints: it looks at what others did, merges, trims logs, and looks for gaps.

use super::{Committer, LOOK_INTERVAL, Parts, VACUUM_INTERVAL};
use crate::archive::{self, Merged};
use crate::error::{Error, Result};
use crate::sidecar::foreign;
use crate::sidecar::gap;
use crate::sidecar::versions;
use crate::tables::Kind;
use crate::vitals::{self, OfTable};
use crate::watermark;
use std::sync::Arc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

impl Committer {
    /// Starts a merge if a window wants one, and keeps the logs short.
    pub(super) async fn keep_house(&mut self) -> Result<()> {
        // Before the logs are trimmed: who wants to go back needs the older entries.
        self.look_at_others().await?;
        for table in &mut self.parts.tables {
            table.maintain().await;
        }
        self.vacuum().await?;
        self.start_merge();
        self.look_for_gaps().await
    }

    /// Notices what somebody else has done to the tables. What can't be looked at now is looked at the next time; the purge
    /// waits for that in the end.
    pub(super) async fn look_at_others(&mut self) -> Result<()> {
        let is_due = self.look_at <= Instant::now();
        if is_due {
            self.look_at = Instant::now() + self.parts.config.max_lag.clamp(LOOK_INTERVAL.0, LOOK_INTERVAL.1);
        }
        let Parts { config, tables, sql, storage, .. } = &mut self.parts;
        for table in tables.iter_mut() {
            let looked = if is_due {
                foreign::look(config, sql, table).await
            } else {
                match table.look().await {
                    Ok(()) => foreign::note(config, sql, table).await,
                    failed => failed,
                }
            };
            match looked {
                Err(error) if error.is_transient() => {
                    tracing::debug!(
                        table = table.kind().name(),
                        error = error.chain(),
                        "its log was not looked at"
                    );
                }
                looked => looked?,
            }
        }
        let is_left_out = |kind: &Kind| tables.iter().all(|table| table.kind() != *kind);
        for kind in config.all_kinds().into_iter().filter(|kind| is_due && is_left_out(kind)) {
            if foreign::is_mended(storage, kind).await {
                let detail = format!(
                    "the archive's table {} can be used again; the stream begins anew with it",
                    kind.name()
                );
                return Err(Error::Anew { detail });
            }
        }
        Ok(())
    }

    /// Ends the session if a table can be completed: its successor does that before it streams.
    pub(super) async fn look_for_gaps(&mut self) -> Result<()> {
        let (slot, publication) = (self.parts.config.slot.as_str(), self.parts.config.publication.as_str());
        if versions::can_join(&self.parts.config, &mut self.parts.sql, &self.parts.wants)
            .await
            .unwrap_or(false)
        {
            return Err(versions::to_be_joined(&self.parts.config));
        }
        let mut looked = gap::notice_partitions(&mut self.parts.sql, slot).await.map(|()| Vec::new());
        if looked.is_ok() {
            let incomplete = async |client: &_| gap::incomplete(client, slot, publication).await;
            let (config, tables, wants) = (&self.parts.config, &self.parts.tables, &self.parts.wants);
            looked = self.parts.sql.run(incomplete).await.map(|mut incomplete| {
                incomplete.keep(|row| tables.iter().any(|table| table.kind().name() == row.kind));
                incomplete.keep(|row| versions::is_streamed(config, row, wants));
                incomplete.mendable
            });
        }
        match looked {
            Ok(mendable) if mendable.is_empty() => Ok(()),
            Ok(mendable) => Err(gap::to_be_mended(&mendable)),
            // The next look is in a few seconds.
            Err(error) => {
                tracing::debug!(error = error.chain(), "could not look for gaps");
                Ok(())
            }
        }
    }

    pub(super) fn start_merge(&mut self) {
        // While rows are missing in the entity watermarks, the names of their files tell which (see
        // `recover`); a merge would mix them with others.
        if self.merge.is_some() || !self.unmirrored.is_empty() {
            return;
        }
        let now = chrono::Utc::now().timestamp_micros();
        // Late rows come for about as long as checkpoints take.
        let quiet = self.parts.config.max_lag * 2;
        let tables = self.parts.tables.iter();
        let plans = tables.flat_map(|table| table.merge_candidates(now, quiet, self.parts.config.window));
        if let Some(plan) = self.merge_turns.choose(plans, Instant::now().into_std()) {
            let (storage, namer) = (self.parts.storage.clone(), Arc::clone(&self.parts.namer));
            let kind = plan.kind;
            let merge = tokio::spawn(async move { archive::merge(&storage, &namer, &plan).await });
            self.merge = Some((kind, merge));
        }
    }

    pub(super) async fn commit_merge(&mut self, kind: Kind, merged: Result<Merged>) -> Result<()> {
        let merged = match merged {
            Ok(merged) => merged,
            Err(error) => {
                self.parts.vitals.counters.merge_failures.get_or_create(&OfTable::new(kind.name())).inc();
                let (window, pause) = self.merge_turns.failed(Instant::now().into_std()).unwrap_or_default();
                tracing::error!(
                    kind = kind.name(),
                    window,
                    error = error.chain(),
                    again_in = ?pause,
                    "a window was not merged; others are, and it will be tried again"
                );
                return Ok(());
            }
        };
        self.merge_turns.succeeded();
        let Some(table) = self.parts.tables.iter_mut().find(|table| table.kind() == kind) else {
            return Ok(());
        };
        match table.commit_merge(&merged).await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error @ (Error::Storage { .. } | Error::Vanished { .. })) => {
                tracing::warn!(error = error.chain(), "a merge was not committed, it will be tried again");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        self.parts.vitals.counters.merges.get_or_create(&OfTable::new(kind.name())).inc();
        tracing::info!(
            kind = kind.name(),
            window = merged.window,
            files = merged.inputs.len(),
            into = merged.outputs.len(),
            // Absent once there are none.
            files_to_rewrite = Some(table.unportable_file_count()).filter(|count| *count > 0),
            "merged a window"
        );
        if let Some(name) = watermark::source_table(&self.parts.config.schema, kind) {
            let totals = table.totals();
            let written =
                self.parts.sql.run(async |client| watermark::update_files(client, &name, totals).await).await;
            if let Err(error) = written {
                tracing::debug!(error = error.chain(), "the file count follows with the next checkpoint");
            }
        }
        // There may be more to merge.
        self.start_merge();
        Ok(())
    }

    pub(super) async fn vacuum(&mut self) -> Result<()> {
        if self.vacuum_at > Instant::now() {
            return Ok(());
        }
        self.vacuum_at = Instant::now() + VACUUM_INTERVAL;
        self.parts.vitals.counters.last_vacuum.set(vitals::seconds_now());
        for table in &mut self.parts.tables {
            match table.vacuum(&self.parts.namer, VACUUM_INTERVAL).await {
                Ok(0) => {}
                Ok(removed) => {
                    let of = OfTable::new(table.kind().name());
                    self.parts.vitals.counters.vacuumed.get_or_create(&of).inc_by(removed);
                    tracing::info!(kind = table.kind().name(), removed, "removed unused objects");
                }
                Err(error @ Error::Fenced { .. }) => return Err(error),
                Err(error) => tracing::warn!(
                    kind = table.kind().name(),
                    error = error.chain(),
                    "vacuum failed, it will be tried again"
                ),
            }
        }
        Ok(())
    }
}

/// Waits for the running merge, for ever if there is none.
pub(super) async fn finished(
    merge: &mut Option<(Kind, JoinHandle<Result<Merged>>)>,
) -> (Kind, Result<Merged>) {
    let Some((kind, handle)) = merge else { return std::future::pending().await };
    let (kind, result) = (*kind, handle.await);
    *merge = None;
    (kind, result.unwrap_or_else(|error| Err(Error::Internal(format!("the merge failed: {error}")))))
}
