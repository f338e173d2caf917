//! `/metrics`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use prometheus_client::encoding::{prometheus_text, text};

use super::problem::Problem;
use super::served::Served;

/// The content type of OpenMetrics 1.0.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// OpenMetrics for those who accept it, else Prometheus' text format.
pub(super) async fn metrics(
    State(served): State<Arc<Served>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let is_open = accept.contains("application/openmetrics-text");
    let mut body = String::new();
    let (encoded, content_type) = match is_open {
        true => (text::encode(&mut body, &served.registry), OPEN_METRICS),
        false => (prometheus_text::encode(&mut body, &served.registry), prometheus_text::CONTENT_TYPE),
    };
    encoded.map_err(|_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the metrics have no text form"))?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response())
}
