//! `/livez`, `/readyz` and `/status`.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::access::Shown;
use super::params::{Given, Param};
use super::problem::Problem;
use super::served::Served;
use crate::status::{Check, Document};

pub(super) const READYZ: [Param; 1] = [Param::new("verbose", "also list the conditions that hold")];

/// Whether the tasks run. Asks neither Postgres nor the storage: a restart mends neither of them.
pub(super) async fn livez(State(served): State<Arc<Served>>) -> Response {
    match served.observer.is_alive() {
        true => text(StatusCode::OK, "ok\n".to_owned()),
        false => text(StatusCode::SERVICE_UNAVAILABLE, "the tasks do not run\n".to_owned()),
    }
}

/// Whether the archive is as it should be, and, for those who may know, what is not.
pub(super) async fn readyz(
    State(served): State<Arc<Served>>,
    shown: Option<Extension<Shown>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let is_verbose = Given::read(query.as_deref(), &[&READYZ])?.flag("verbose")?;
    let checks = served.observer.readiness().await;
    let is_ready = checks.iter().all(|check| check.is_good);
    let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if let Some(Extension(Shown::Outcome)) = shown {
        return Ok(text(status, if is_ready { "ok\n" } else { "not ready\n" }.to_owned()));
    }
    let mut lines = String::new();
    for Check { name, is_good, detail } in checks.iter().filter(|check| is_verbose || !check.is_good) {
        let mark = if *is_good { "+" } else { "-" };
        // Writing to a text can't fail.
        let _ = writeln!(lines, "[{mark}] {name}: {}", crate::telemetry::plain(detail));
    }
    lines.push_str(if is_ready { "ok\n" } else { "not ready\n" });
    Ok(text(status, lines))
}

/// What `highwater --watermarks --format json` prints.
pub(super) async fn status(State(served): State<Arc<Served>>) -> Result<Response, Problem> {
    let look = served.observer.look().await.map_err(Problem::unavailable)?;
    let entities = served.observer.entities().await?;
    Ok(Json(Document::new(&look, &entities)).into_response())
}

fn text(status: StatusCode, body: String) -> Response {
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    (status, [(header::CONTENT_TYPE, plain)], body).into_response()
}
