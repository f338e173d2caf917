//! What is counted of requests.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A route and what came of its request.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfRoute {
    route: String,
    status: u16,
}

/// What is counted of requests. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub(super) struct Requests {
    requests: Family<OfRoute, Counter>,
    seconds: Histogram,
}

impl Default for Requests {
    fn default() -> Self {
        let seconds = Histogram::new(exponential_buckets(0.001, 4.0, 9));
        Self { requests: Family::default(), seconds }
    }
}

impl Requests {
    pub(super) fn register(&self, to: &mut Registry) {
        to.register(
            "http_requests",
            "Requests that were answered, by route and status",
            self.requests.clone(),
        );
        let help = "How long answers took to begin";
        to.register_with_unit("http_request_duration", help, Unit::Seconds, self.seconds.clone());
    }
}

/// Counts a request. Paths that are no route are one.
pub(super) async fn count(State(requests): State<Requests>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("none", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let of = OfRoute { route, status: response.status().as_u16() };
    requests.requests.get_or_create(&of).inc();
    requests.seconds.observe(begun.elapsed().as_secs_f64());
    response
}
