//! [`Archiver`]: what the binary runs and an embedding server calls.

use tokio::sync::watch;

use crate::config::Config;
use crate::error::Result;
use crate::sidecar::{self, Owned, Phase};
use crate::verify::retention;

/// The archiver as a background task of the current Tokio runtime (multi-threaded).
///
/// ```no_run
/// # async fn example() -> highwater::Result<()> {
/// let (shutdown, watcher) = tokio::sync::watch::channel(());
/// let archiver = highwater::Archiver::start(highwater::Config::from_env()?, watcher);
/// // ... serve ...
/// shutdown.send_replace(());
/// archiver.wait().await
/// # }
/// ```
///
/// It survives whatever may pass by itself (a restart of the server, storage that fails) and ends on what
/// only a person can mend. Dropping it ends it at once, as a crash would; nothing is lost or doubled by that.
#[derive(Debug)]
pub struct Archiver {
    task: Owned<Result<()>>,
}

impl Archiver {
    /// Starts archiving. A change of `shutdown`, or the end of its sender, asks it to stop: it cuts a last
    /// checkpoint, acknowledges it, and ends.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    #[must_use]
    pub fn start(config: Config, shutdown: watch::Receiver<()>) -> Self {
        Self {
            task: Owned(tokio::spawn(async move {
                let _verifying = Owned(tokio::spawn(retention::keep_verified(config.clone())));
                sidecar::run(config, shutdown, watch::channel(Phase::Opening).0).await
            })),
        }
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    ///
    /// Why it ended although nobody asked it to; or why a stop was not clean (rows that were not archived yet
    /// are still in Postgres).
    pub async fn wait(mut self) -> Result<()> {
        self.task.outcome("the archiver").await
    }
}
