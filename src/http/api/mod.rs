//! The history, for programs and for the page.

mod check;
mod coverage;
mod entities;
mod openapi;
mod query;
mod state;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

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
}

/// What an answer is made of: the versions of the tables that it reads, and all that was asked. Equal ones have equal answers.
struct Tag(String);

impl Tag {
    fn of(versions: &[(&'static str, Option<u64>)], asked: &str) -> Self {
        let digest = Sha256::digest(format!("{}{versions:?}{asked}", env!("CARGO_PKG_VERSION")));
        Self(format!("\"{}\"", hex(digest.get(..16).unwrap_or_default())))
    }

    /// The answer, which is the same as another one whose body is equal; without it, if that is what the asker has.
    async fn of_body(response: Response, headers: &HeaderMap) -> Result<Response, Problem> {
        let (parts, body) = response.into_parts();
        let failed =
            |error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("reading the answer ({error})"));
        let body = axum::body::to_bytes(body, usize::MAX).await.map_err(failed)?;
        let tag = Self::of(&[], &hex(&Sha256::digest(&body)));
        let unchanged = tag.unchanged(headers);
        Ok(unchanged.unwrap_or_else(|| tag.put_into(Response::from_parts(parts, body.into()))))
    }

    /// The answer that the asker's own is still right, if it is.
    fn unchanged(&self, headers: &HeaderMap) -> Option<Response> {
        let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut known = known.flat_map(|value| value.split(',')).map(str::trim);
        known.any(|known| known == self.0).then(|| self.put_into(StatusCode::NOT_MODIFIED.into_response()))
    }

    /// Adds it to an answer, which may be kept, and has to be asked for again each time.
    fn put_into(&self, mut response: Response) -> Response {
        let headers = response.headers_mut();
        if let Ok(tag) = HeaderValue::from_str(&self.0) {
            headers.insert(header::ETAG, tag);
        }
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        headers.insert(header::VARY, HeaderValue::from_static("accept"));
        response
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn json(answer: &impl Serialize) -> Result<Response, Problem> {
    let failed = |error| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer has no JSON form ({error})"))
    };
    let body = serde_json::to_vec(answer).map_err(failed)?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response())
}
