//! `highwater run`: archive until told to stop.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::notify;
use crate::Archiver;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::http::{self, Server};
use crate::sidecar::Owned;

/// Exit code after a second signal: what a shell reports of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// The signals that ask for a stop.
pub(super) struct Stops {
    terminate: Signal,
    interrupt: Signal,
}

impl Stops {
    /// Listens from now on.
    pub(super) fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).map_err(Error::io("listening for signals"));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs until SIGTERM or SIGINT, which cut a last checkpoint; a second one ends at once.
pub(super) async fn run(config: &Config) -> Result<()> {
    let mut stops = Stops::listen()?;
    // A port that is taken is told before anything is begun.
    let server = Server::bind(&config.http).await?;
    let (shutdown, watcher) = watch::channel(());
    let mut archived = watcher.clone();
    let archiver = Archiver::start(config.clone(), watcher);
    let serving = server.map(|server| {
        tracing::info!("serving http://{}", server.address());
        let stopped = async move {
            // The sender is gone with us.
            let _ = archived.changed().await;
        };
        Owned(tokio::spawn(server.serve(http::program_router(&archiver), stopped)))
    });
    let observer = Arc::clone(archiver.observer());
    let _watched = Owned(tokio::spawn(notify::watchdog(move || observer.is_alive())));
    notify::ready();
    tokio::spawn(async move {
        stops.next().await;
        notify::stopping();
        tracing::info!("stopping: archiving what is there; a second signal ends at once");
        shutdown.send_replace(());
        stops.next().await;
        tracing::warn!("second signal: ending at once; what is not archived is still in Postgres");
        std::process::exit(EXIT_INTERRUPTED);
    });
    archiver.wait().await?;
    if let Some(mut serving) = serving {
        // It has been told to stop, too, and finishes what is under way within its own time.
        let _ = (&mut serving.0).await;
    }
    tracing::info!("stopped");
    Ok(())
}
