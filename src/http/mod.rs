//! What is answered over HTTP: health, metrics, the history, and the page that shows them.
//!
//! ```text
//! server    a socket: how many connections, how slow they may be, how it drains
//!   access    who may ask: a token, or this machine alone; what browsers are told
//!     routes    /livez /readyz /status /metrics   from memory, see `status`
//!               /api/...  /scouter/...            from the archive, so many at a time
//!               /ui/...                           files of the program
//! ```
//!
//! Every request only reads. [`router`] is for a server that embeds Highwater, and has neither a socket nor a token: these are
//! the server's own. [`Server`] is what `highwater run` and `highwater serve` open.

mod access;
mod api;
mod compute;
mod health;
mod kept;
mod metrics;
mod params;
mod problem;
mod report;
mod requests;
mod served;
mod server;
mod tag;
mod ui;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use crate::archiver::Archiver;
use crate::config::Config;
use problem::Problem;
use served::Served;
pub use server::Server;

/// How long any answer may take to begin. Queries have less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// What an archiver has to tell, and the history that it has archived, as routes for a server that embeds it:
///
/// | route | answer |
/// | --- | --- |
/// | `/livez`, `/healthz` | whether its tasks run; asks nobody |
/// | `/readyz` | whether the archive is as it should be; within a second |
/// | `/status` | what `highwater --watermarks --format json` prints |
/// | `/metrics` | OpenMetrics, or Prometheus' text |
/// | `/api/...` | the history; `/api/openapi.json` describes it |
/// | `/ui/` | the page |
///
/// All of them only read. Whoever reaches them may ask: the server that nests them decides who that is.
///
/// ```no_run
/// # fn example(archiver: &highwater::Archiver) -> axum::Router {
/// axum::Router::new().nest("/highwater", highwater::http::router(archiver))
/// # }
/// ```
pub fn router(archiver: &Archiver) -> Router {
    routes(Served::by_archiver(archiver))
}

/// The same for `highwater run`.
pub(crate) fn program_router(archiver: &Archiver) -> Router {
    routes(Served::by_archiver(archiver).of_program())
}

/// The same without an archiver, for an archive that another process writes: health, metrics of the process, and the history.
/// Runs tasks that watch the storage for as long as the router lives.
///
/// # Panics
///
/// Outside a Tokio runtime.
pub fn reader(config: &Config) -> Router {
    routes(Served::by_reader(config))
}

/// The same for `highwater serve`.
pub(crate) fn program_reader(config: &Config) -> Router {
    routes(Served::by_reader(config).of_program())
}

fn routes(served: Served) -> Router {
    let served = Arc::new(served);
    let counted = served.requests.clone();
    Router::new()
        .route("/livez", get(health::livez))
        .route("/healthz", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/status", get(health::status))
        .route("/metrics", get(metrics::metrics))
        .merge(api::routes())
        .merge(ui::routes())
        .fallback(async |request: Request| Problem::not_found(request.uri().path()))
        .method_not_allowed_fallback(async || Problem::method())
        .layer(middleware::from_fn(only_reads))
        .layer(middleware::from_fn_with_state(counted, requests::count))
        .with_state(served)
}

/// Refuses what is not a question, and ends what takes too long.
async fn only_reads(request: Request, next: Next) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Problem::method().into_response();
    }
    match tokio::time::timeout(ANSWER_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(StatusCode::GATEWAY_TIMEOUT, "there was no answer in time").into_response(),
    }
}
