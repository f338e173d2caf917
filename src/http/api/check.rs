//! `/api/check`: what `highwater check` finds, but for the storage's probe, which writes.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::super::problem::Problem;
use super::super::served::Served;
use super::json;
use crate::check::Finding;

#[derive(Serialize)]
struct ReportObject<'a> {
    findings: &'a [Finding],
}

/// The findings, a minute old at most.
pub(in crate::http) async fn check(State(served): State<Arc<Served>>) -> Result<Response, Problem> {
    if !served.observer.archives() {
        return Err(Problem::not_found("/api/check of a process that only reads"));
    }
    let report = served.report.get(&served.config).await;
    json(&ReportObject { findings: report.findings() })
}
