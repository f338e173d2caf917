//! `highwater run`: archive until told to stop.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::Archiver;
use crate::config::Config;
use crate::error::{Error, Result};

/// Exit code after a second signal: what a shell reports of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs until SIGTERM or SIGINT, which cut a last checkpoint; a second one ends at once.
pub(super) async fn run(config: &Config) -> Result<()> {
    let listen = |kind| signal(kind).map_err(Error::io("listening for signals"));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let (shutdown, watcher) = watch::channel(());
    let archiver = Archiver::start(config.clone(), watcher);
    tokio::spawn(async move {
        for stops in 0.. {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stops > 0 {
                tracing::warn!("second signal: ending at once; what is not archived is still in Postgres");
                std::process::exit(EXIT_INTERRUPTED);
            }
            tracing::info!("stopping: archiving what is there; a second signal ends at once");
            shutdown.send_replace(());
        }
    });
    archiver.wait().await?;
    tracing::info!("stopped");
    Ok(())
}
