//! The history, for programs and for the page.

mod check;
mod coverage;
mod drift;
mod entities;
mod openapi;
mod query;
mod scouter;
mod sql;
mod state;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde::Serialize;

use super::problem::Problem;
use super::served::Served;

pub(super) fn routes() -> Router<Arc<Served>> {
    Router::new()
        .route("/api/openapi.json", get(openapi::openapi))
        .route("/api/entities", get(entities::entities))
        .route("/api/tables", get(entities::tables))
        .route("/api/check", get(check::check))
        .route("/api/coverage", get(coverage::coverage))
        .route("/api/state", get(state::state))
        .route("/api/query/{table}", get(query::query))
        .route("/api/drift/{table}", get(drift::drift))
        .route("/api/sql", get(sql::sql))
        .route("/scouter/drift/custom", get(scouter::custom))
        .route("/scouter/drift/psi", get(scouter::psi))
        .route("/scouter/drift/spc", get(scouter::spc))
}

fn json(answer: &impl Serialize) -> Result<Response, Problem> {
    let failed = |error| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer has no JSON form ({error})"))
    };
    let body = serde_json::to_vec(answer).map_err(failed)?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response())
}
