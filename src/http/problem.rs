//! Errors as RFC 9457 has them.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::{Error, Policy};

/// What went wrong with a request, as `application/problem+json` (RFC 9457).
#[derive(Debug, Serialize)]
pub(super) struct Problem {
    /// The status in words.
    title: &'static str,
    status: u16,
    /// What is wrong, with which part of the request, and what to do.
    detail: String,
    /// When to ask again, in seconds.
    #[serde(skip)]
    retry_after: Option<u32>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { title, status: status.as_u16(), detail: detail.into(), retry_after: None }
    }

    /// The request is at fault.
    pub(super) fn bad(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn not_found(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is nothing at {path}; see /api/openapi.json"))
    }

    pub(super) fn method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: nothing can be changed here")
    }

    /// A query has taken longer than it may.
    pub(super) fn late(limit: Duration) -> Self {
        let detail = format!("there was no answer within {} s: ask for less", limit.as_secs());
        Self::new(StatusCode::GATEWAY_TIMEOUT, detail)
    }

    /// The answer has more bytes than it may.
    pub(super) fn too_large(limit: usize) -> Self {
        Self::bad(format!("the answer has more than {} MiB: ask for less", limit >> 20))
    }

    /// Too much is under way.
    pub(super) fn busy(detail: impl Into<String>) -> Self {
        Self { retry_after: Some(1), ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail) }
    }

    /// Something that the answer needs does not answer.
    pub(super) fn unavailable(detail: impl Into<String>) -> Self {
        Self { retry_after: Some(5), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, detail) }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        match &error {
            // The pool is shared: alone it may have fitted.
            Error::Query { detail } if detail.contains("Resources exhausted") => Self::busy(
                "the queries that are running want more memory than there is; ask again, or for less",
            ),
            Error::Query { detail } => Self::bad(detail.clone()),
            Error::Setting { .. } => Self::bad(error.chain()),
            Error::Internal(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.chain()),
            _ => Self::unavailable(match error.policy() {
                Policy::Stop { advice } => format!("{}; what to do: {advice}", error.chain()),
                Policy::Retry => error.chain(),
            }),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // Texts and numbers have a JSON form.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}
