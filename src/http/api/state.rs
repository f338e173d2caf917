//! `/api/state`: what the page shows of the archiver.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::super::problem::Problem;
use super::super::served::Served;
use super::json;
use crate::status::{Check, Document, Sample};

#[derive(Serialize)]
struct StateObject<'a> {
    version: &'static str,
    /// Whether this process archives; else it only reads.
    archives: bool,
    /// Seconds since the epoch.
    now: i64,
    max_lag_seconds: f64,
    lag_seconds: Option<f64>,
    buffered_bytes: i64,
    memory_bytes: usize,
    is_ready: bool,
    checks: Vec<Check>,
    /// What Postgres says, if it answers.
    watermarks: Option<Document<'a>>,
    /// The last hours, the oldest first.
    samples: Vec<Sample>,
}

/// What `/readyz?verbose` and `/status` say, without the entities, and the last hours.
pub(in crate::http) async fn state(State(served): State<Arc<Served>>) -> Result<Response, Problem> {
    let observer = &served.observer;
    let checks = observer.readiness().await;
    let look = observer.look().await.ok();
    json(&StateObject {
        version: env!("CARGO_PKG_VERSION"),
        archives: observer.archives(),
        now: chrono::Utc::now().timestamp(),
        max_lag_seconds: observer.config.max_lag.as_secs_f64(),
        lag_seconds: observer.vitals.lag.seconds(),
        buffered_bytes: observer.vitals.counters.buffered_bytes.get(),
        memory_bytes: observer.config.memory_bytes,
        is_ready: checks.iter().all(|check| check.is_good),
        checks,
        watermarks: look.as_deref().map(|look| Document::new(look, &[])),
        samples: observer.samples(),
    })
}
