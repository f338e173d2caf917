//! What a running archiver tells of itself: what it counts, how old the rows are that it has not archived, and what it is at.
//!
//! Whoever works gets a [`Vitals`] and counts into it; whoever asks reads it, without asking anybody. So a health check
//! or a scrape never waits for a server or a store. What is in Postgres (watermarks, slot, purge) is looked at elsewhere, see
//! [`crate::status`].

mod counters;
mod lag;
mod process;
mod storage;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use prometheus_client::registry::Registry;
use tokio::sync::watch;

pub(crate) use counters::{
    Counters, OfOperation, OfOrigin, OfOutcome, OfPartitions, OfReason, OfTable, Origin,
};
pub(crate) use lag::Lag;
pub(crate) use process::Process;
pub(crate) use storage::watched;

/// What a session is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It gets the slot, and adds what the archive lacks.
    #[default]
    Opening,
    /// It archives what the stream brings.
    Streaming,
    /// The last one has failed; the next one begins soon.
    Failed,
}

/// The vitals of an archiver. Cheap to clone; clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Vitals {
    /// What is counted.
    pub(crate) counters: Counters,
    /// What is committed and not archived yet.
    pub(crate) lag: Arc<Lag>,
    phase: watch::Sender<Phase>,
    /// When the runtime last ran a task of ours, microseconds since the epoch.
    beat: Arc<AtomicI64>,
}

impl Default for Vitals {
    fn default() -> Self {
        Self {
            counters: Counters::default(),
            lag: Arc::default(),
            phase: watch::channel(Phase::Opening).0,
            beat: Arc::new(AtomicI64::new(now())),
        }
    }
}

impl Vitals {
    /// Has everything that is counted told by the registry, and what the process takes.
    pub(crate) fn register(&self, registry: &mut Registry) {
        self.counters.register(registry);
    }

    /// The session is at this.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// What the session is at.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// A task of ours has run.
    pub(crate) fn beat(&self) {
        self.beat.store(now(), Ordering::Relaxed);
    }

    /// Microseconds since a task of ours has run.
    pub(crate) fn beat_age(&self) -> i64 {
        now() - self.beat.load(Ordering::Relaxed)
    }
}

/// Seconds since the epoch, as timestamps are told.
pub(crate) fn seconds_now() -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "microseconds of our time are exact")]
    let seconds = now() as f64 / 1e6;
    seconds
}

/// Microseconds since the epoch.
pub(crate) fn now() -> i64 {
    chrono::Utc::now().timestamp_micros()
}
