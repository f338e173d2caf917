//! A task that is owned, and how it is told to stop.

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

/// A task that ends with its handle: an archiver that is dropped must leave nothing behind that goes on trying.
#[derive(Debug)]
pub(crate) struct Owned<T>(pub(crate) JoinHandle<T>);

impl<T> Owned<Result<T>> {
    /// Waits for its end; what it gave. One that has failed is told by this name.
    ///
    /// # Errors
    ///
    /// Those of the task.
    pub(crate) async fn outcome(&mut self, name: &str) -> Result<T> {
        (&mut self.0).await.unwrap_or_else(|error| Err(Error::Internal(format!("{name} failed: {error}"))))
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whether somebody has asked for a stop; a dropped sender has.
pub(super) fn is_stopping(shutdown: &watch::Receiver<()>) -> bool {
    shutdown.has_changed().unwrap_or(true)
}

/// Waits for a stop. Leaves the caller's receiver as it is.
pub(super) async fn stop(shutdown: &watch::Receiver<()>) {
    // An error is a dropped sender.
    let _ = shutdown.clone().changed().await;
}
