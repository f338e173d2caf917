//! `/api/openapi.json`: the routes, made of what the routes themselves read.

use axum::Json;
use serde_json::{Map, Value, json};

use super::super::health;
use super::super::params::Param;
use super::{drift, entities, query, scouter, sql};

/// A route as it is described.
struct Route {
    path: &'static str,
    summary: &'static str,
    params: &'static [Param],
    content: &'static [&'static str],
    /// Statuses beside 200, and those that any route may have.
    statuses: &'static [u16],
}

/// One of Scouter's own routes.
const fn of_scouter(path: &'static str, summary: &'static str) -> Route {
    Route { path, summary, params: &scouter::DRIFT, content: &[JSON], statuses: &[400, 404, 429, 503, 504] }
}

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

/// All routes but this one and the page.
const ROUTES: [Route; 15] = [
    Route {
        path: "/livez",
        summary: "Whether the tasks run; also /healthz",
        params: &[],
        content: &[TEXT],
        statuses: &[503],
    },
    Route {
        path: "/readyz",
        summary: "Whether the archive is as it should be, with a line for each condition that does not hold",
        params: &health::READYZ,
        content: &[TEXT],
        statuses: &[503],
    },
    Route {
        path: "/status",
        summary: "How far the archive reaches: what `highwater --watermarks --format json` prints",
        params: &[],
        content: &[JSON],
        statuses: &[503],
    },
    Route {
        path: "/metrics",
        summary: "Metrics, as OpenMetrics for those who accept it, else as Prometheus' text",
        params: &[],
        content: &[TEXT, "application/openmetrics-text"],
        statuses: &[],
    },
    Route {
        path: "/api/entities",
        summary: "The models, with their times and rows, by table",
        params: &entities::ENTITIES,
        content: &[JSON],
        statuses: &[304, 503],
    },
    Route {
        path: "/api/tables",
        summary: "The tables, with their columns",
        params: &[],
        content: &[JSON],
        statuses: &[503],
    },
    Route {
        path: "/api/drift/{table}",
        summary: "How far a model has moved from a reference, in bins of time (custom, psi, spc): what `highwater drift` answers",
        params: &drift::DRIFT,
        content: &[JSON],
        statuses: &[304, 400, 404, 429, 503, 504],
    },
    Route {
        path: "/api/query/{table}",
        summary: "The history of a model (custom, psi, spc), or of a column of any table, in bins of time: what `highwater query` \
                  answers",
        params: &query::QUERY,
        content: &[JSON, query::ARROW],
        statuses: &[304, 400, 404, 429, 503, 504],
    },
    Route {
        path: "/api/sql",
        summary: "What `highwater sql` answers, as JSON, Arrow or CSV; only where HIGHWATER_HTTP_SQL is on",
        params: &sql::SQL,
        content: &[JSON, query::ARROW, "text/csv"],
        statuses: &[400, 404, 429, 503, 504],
    },
    of_scouter(
        "/scouter/drift/custom",
        "Scouter's own route: means of custom metrics, with what is not archived yet",
    ),
    of_scouter(
        "/scouter/drift/psi",
        "Scouter's own route: the population stability index of each feature against its profile",
    ),
    of_scouter("/scouter/drift/spc", "Scouter's own route: means of features, with what is not archived yet"),
    Route {
        path: "/api/state",
        summary: "What the page shows of the archiver: conditions, watermarks, and the lag of the last hours",
        params: &[],
        content: &[JSON],
        statuses: &[],
    },
    Route {
        path: "/api/check",
        summary: "What `highwater check` finds, but for the storage's probe, which writes; a minute old at most",
        params: &[],
        content: &[JSON],
        statuses: &[404],
    },
    Route {
        path: "/api/coverage",
        summary: "For each table and day: archived, verified, still in Postgres, missing, in the quarantine",
        params: &[],
        content: &[JSON],
        statuses: &[304, 503],
    },
];

/// The description, in OpenAPI 3.1.
pub(in crate::http) async fn openapi() -> Json<Value> {
    let paths: Map<String, Value> =
        ROUTES.iter().map(|route| (route.path.to_owned(), json!({ "get": operation(route) }))).collect();
    Json(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Highwater",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The state and the history of an archive. Every request only reads.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": {
            "schemas": {
                "Problem": {
                    "type": "object",
                    "description": "An error (RFC 9457)",
                    "properties": {
                        "title": { "type": "string" },
                        "status": { "type": "integer" },
                        "detail": { "type": "string" },
                    },
                },
            },
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "basic": { "type": "http", "scheme": "basic" },
            },
        },
        "security": [{}, { "bearer": [] }, { "basic": [] }],
    }))
}

fn operation(route: &Route) -> Value {
    let mut parameters: Vec<Value> = route.params.iter().map(parameter).collect();
    if route.path.contains("{table}") {
        parameters
            .push(json!({ "name": "table", "in": "path", "required": true, "schema": { "type": "string" } }));
    }
    let content: Map<String, Value> =
        route.content.iter().map(|kind| ((*kind).to_owned(), json!({}))).collect();
    let mut responses =
        Map::from_iter([("200".to_owned(), json!({ "description": "The answer", "content": content }))]);
    for status in route.statuses {
        let told =
            axum::http::StatusCode::from_u16(*status).ok().and_then(|status| status.canonical_reason());
        let schema = json!({ "schema": { "$ref": "#/components/schemas/Problem" } });
        let content = match *status >= 400 && route.content != [TEXT] {
            true => json!({ "application/problem+json": schema }),
            false => json!({}),
        };
        let response = json!({ "description": told.unwrap_or("Error"), "content": content });
        responses.insert(status.to_string(), response);
    }
    json!({ "summary": route.summary, "parameters": parameters, "responses": responses })
}

fn parameter(param: &Param) -> Value {
    let schema = match param.is_repeated {
        true => json!({ "type": "array", "items": { "type": "string" } }),
        false => json!({ "type": "string" }),
    };
    json!({
        "name": param.name,
        "in": "query",
        "description": param.about,
        "required": param.is_required,
        "schema": schema,
    })
}
