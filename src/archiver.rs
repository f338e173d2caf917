//! [`Archiver`]: what the binary runs and an embedding server calls.

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Config;
use crate::error::Result;
use crate::sidecar::{self, Owned};
use crate::status::Observer;
use crate::verify::retention;
use crate::vitals::Vitals;

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
    observer: Arc<Observer>,
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
        let vitals = Vitals::default();
        let observer = Arc::new(Observer::new(config.clone(), vitals.clone()));
        let observing = Arc::clone(&observer);
        let task = tokio::spawn(async move {
            let _verifying = Owned(tokio::spawn(retention::keep_verified(config.clone(), vitals.clone())));
            let _observing = Owned(tokio::spawn(async move { observing.watch().await }));
            sidecar::run(config, shutdown, &vitals).await
        });
        Self { task: Owned(task), observer }
    }

    /// Who watches it.
    pub(crate) const fn observer(&self) -> &Arc<Observer> {
        &self.observer
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
