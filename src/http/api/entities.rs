//! `/api/entities` and `/api/tables`: what there is to ask for.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Serialize;

use super::super::params::{Given, Param};
use super::super::problem::Problem;
use super::super::served::Served;
use super::super::tag::Tag;
use super::json;
use crate::reader::EntitySummary;
use crate::tables::Kind;

pub(super) const ENTITIES: [Param; 3] = [
    Param::new("table", "only those of this table"),
    Param::new("search", "only those whose space, name or version contains this text"),
    Param::new("limit", "at most so many; without it all"),
];

/// The entities of all tables, as `highwater entities` lists them; sorted by space, name, version and table.
pub(in crate::http) async fn entities(
    State(served): State<Arc<Served>>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let given = Given::read(query.as_deref(), &[&ENTITIES])?;
    let limit = given.parsed::<usize>("limit", "a whole number")?.unwrap_or(usize::MAX);
    let all = served.entities().await?;
    let search = given.text("search").unwrap_or_default().to_lowercase();
    let is_wanted = |one: &&EntitySummary| {
        let is_of_table = given.text("table").is_none_or(|table| table == one.kind);
        let texts = [&one.space, &one.name, &one.version];
        is_of_table && texts.iter().any(|text| text.to_lowercase().contains(&search))
    };
    let mut found: Vec<&EntitySummary> = all.iter().filter(is_wanted).collect();
    found.sort_by_key(|one| (&one.space, &one.name, &one.version, one.kind));
    found.truncate(limit);
    let response = json(&found)?;
    // There is no version that says whether the database's list has changed.
    Tag::of_body(response, &headers).await
}

/// A table of the archive.
#[derive(Debug, Serialize)]
struct TableObject {
    name: &'static str,
    /// Whether `/api/query` answers it without `value`.
    is_binned: bool,
    time_column: &'static str,
    entity_columns: Vec<String>,
    columns: Vec<ColumnObject>,
}

#[derive(Debug, Serialize)]
struct ColumnObject {
    name: String,
    #[serde(rename = "type")]
    column_type: String,
}

/// The tables with their columns.
pub(in crate::http) async fn tables(State(served): State<Arc<Served>>) -> Result<Response, Problem> {
    let Some(archive) = served.archive().await? else { return json(&[(); 0]) };
    let of = |kind: Kind| TableObject {
        name: kind.name(),
        is_binned: [Kind::custom(), Kind::psi(), Kind::spc()].iter().any(|one| one.name() == kind.name()),
        time_column: kind.time_column(),
        entity_columns: kind.entity_columns().to_vec(),
        columns: kind
            .columns()
            .iter()
            .map(|column| ColumnObject {
                name: column.name.clone(),
                column_type: format!("{:?}", column.column_type).to_lowercase(),
            })
            .collect(),
    };
    json(&archive.kinds().into_iter().map(of).collect::<Vec<_>>())
}
