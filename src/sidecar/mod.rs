//! Sessions one after the other, until somebody says stop.

pub(crate) mod backfill;
pub(crate) mod builder;
pub(crate) mod committer;
pub(crate) mod foreign;
mod gap;
mod history;
pub(crate) mod recovery;
mod session;
mod task;
mod timing;
mod versions;
mod wants;

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::vitals::{Phase, Vitals};
use session::{Ended, session};
pub(crate) use task::Owned;
use task::{is_stopping, stop};
use wants::Wants;

/// First and longest pause between sessions.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// A session that held for so long was healthy: the next failure starts with the first pause again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// How long a password that the server refuses is tried: it may be on its way into the server, or into the password file.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(60);

/// Archives until `shutdown` changes or its sender is gone, which cuts a last checkpoint, acknowledges it, and ends.
///
/// # Errors
///
/// As [`Archiver::wait`](crate::Archiver::wait).
pub(crate) async fn run(config: Config, shutdown: watch::Receiver<()>, vitals: &Vitals) -> Result<()> {
    let wants = Arc::new(Wants::default());
    let mut pause = RETRY_PAUSE.0;
    let mut refused_since: Option<Instant> = None;
    // Why the session before this one failed.
    let mut failure: Option<Error> = None;
    loop {
        let started = Instant::now();
        // The session sees the change in its own copy, so that this one still shows it afterwards.
        vitals.enter(Phase::Opening);
        let ended = session(&config, &shutdown, &wants, vitals).await;
        vitals.lag.end();
        let error = match ended {
            Ok(Ended::Whole) => return Ok(()),
            Ok(Ended::Unopened) => return failure.map_or(Ok(()), Err),
            Err(error) => error,
        };
        if let Error::Anew { detail } = &error {
            tracing::info!("{detail}");
            sleep(RETRY_PAUSE.0).await;
            continue;
        }
        vitals.enter(Phase::Failed);
        vitals.counters.reconnects.inc();
        refused_since = error.is_refused_password().then(|| refused_since.unwrap_or_else(Instant::now));
        // A table that somebody has made unusable stops alone: the next session goes on without it.
        let may_pass = refused_since.map_or_else(
            || {
                error.is_transient()
                    || foreign::is_broken(&error)
                    || versions::has_fallen_behind(&error, &wants)
            },
            |since| since.elapsed() < REFUSAL_PATIENCE,
        );
        if !may_pass || is_stopping(&shutdown) {
            return Err(error);
        }
        if started.elapsed() > HEALTHY_AFTER {
            pause = RETRY_PAUSE.0;
        }
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(error = error.chain(), retry_in = ?jittered, "not archiving; rows wait in Postgres");
        tokio::select! {
            biased;
            // Rows may wait that nobody could archive.
            () = stop(&shutdown) => return Err(error),
            () = sleep(jittered) => {}
        }
        failure = Some(error);
        pause = (pause * 2).min(RETRY_PAUSE.1);
    }
}
