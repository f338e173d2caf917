//! What `highwater check` finds, kept for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::check::{self, Report};
use crate::config::Config;

/// How long a report is told again: making one takes a login for replication and many queries.
const NEW_FOR: Duration = Duration::from_mins(1);

/// The last report, and when it was made.
#[derive(Debug, Default)]
pub(super) struct LastReport(Mutex<Option<(Instant, Arc<Report>)>>);

impl LastReport {
    /// One that is new enough.
    pub(super) async fn get(&self, config: &Config) -> Arc<Report> {
        let mut last = self.0.lock().await;
        match &*last {
            Some((made, report)) if made.elapsed() < NEW_FOR => Arc::clone(report),
            _ => {
                let report = Arc::new(check::check_by_reading(config).await);
                *last = Some((Instant::now(), Arc::clone(&report)));
                report
            }
        }
    }
}
