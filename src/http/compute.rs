//! Threads for queries, which leave the processors to the archiving where there are too few for both.

use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use super::problem::Problem;
use crate::error::Error;
use crate::sidecar::Owned;

/// How long a query may take.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(60);

/// How much the threads of queries yield to others (setpriority(2)).
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// A runtime for queries. Those that run when it is dropped are given up.
#[derive(Debug, Default)]
pub(super) struct Compute(std::sync::OnceLock<Option<Runtime>>);

impl Compute {
    /// Runs a query; it ends when its asker goes away, or after [`QUERY_TIMEOUT`].
    pub(super) async fn run<T: Send + 'static>(
        &self,
        query: impl Future<Output = Result<T, Problem>> + Send + 'static,
    ) -> Result<T, Problem> {
        let Some(runtime) = self.0.get_or_init(start) else {
            return Err(Problem::unavailable("no threads for queries can be started"));
        };
        let mut task = Owned(runtime.spawn(query));
        let failed = |error| Error::Internal(format!("a query failed: {error}")).into();
        match timeout(QUERY_TIMEOUT, &mut task.0).await {
            Ok(ended) => ended.unwrap_or_else(|error| Err(failed(error))),
            Err(_) => Err(Problem::late(QUERY_TIMEOUT)),
        }
    }
}

impl Drop for Compute {
    fn drop(&mut self) {
        // Waiting for its threads is not allowed where other tasks run.
        if let Some(runtime) = self.0.take().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// Starts as many threads as there are processors.
fn start() -> Option<Runtime> {
    let started = Builder::new_multi_thread()
        .thread_name("query")
        .on_thread_start(yield_to_others)
        .enable_all()
        .build();
    started.map_err(|error| tracing::error!(%error, "no threads for queries")).ok()
}

#[cfg(target_os = "linux")]
fn yield_to_others() {
    // On Linux each thread has a priority of its own. Where it may not be set, queries run as all else.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
}

#[cfg(not(target_os = "linux"))]
fn yield_to_others() {}
