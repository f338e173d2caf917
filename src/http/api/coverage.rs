//! `/api/coverage`: which days are archived, verified, still in Postgres, missing or in the quarantine.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use chrono::DateTime;
use datafusion::dataframe::DataFrame;
use serde::Serialize;

use super::super::problem::Problem;
use super::super::served::Served;
use super::super::tag::Tag;
use super::json;
use crate::error::Error;
use crate::reader::Archive;
use crate::status::PartitionCover;
use crate::tables::{Kind, MICROS_PER_DAY};

#[derive(Serialize)]
struct CoverageObject {
    tables: Vec<TableObject>,
    /// Why nothing is known of Postgres, if that is so.
    database: Option<String>,
}

#[derive(Serialize)]
struct TableObject {
    table: &'static str,
    source_table: Option<String>,
    /// By day (`2026-11-22`).
    days: BTreeMap<String, DayObject>,
}

/// What is known of a day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct DayObject {
    /// Files that may have rows of it.
    files: u32,
    /// Their rows, as far as the log says.
    rows: Option<u64>,
    /// A partition in Postgres has it.
    in_postgres: bool,
    /// Of that every row is archived, or on its way.
    is_covered: bool,
    /// It was read back from the archive, and found equal.
    is_verified: bool,
    /// Rows may be missing in the archive.
    is_gap: bool,
    /// Rows that the quarantine got on that day.
    quarantined: u64,
}

/// What is known of each table and day.
pub(in crate::http) async fn coverage(
    State(served): State<Arc<Served>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Some(archive) = served.archive().await? else {
        return json(&CoverageObject { tables: Vec::new(), database: None });
    };
    let (covers, database) = match served.observer.coverage().await {
        Ok(covers) => (covers, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    let quarantined = quarantined(&archive).await?;
    let schema = &served.config.schema;
    let tables = archive.days().into_iter().filter(|(kind, _)| !kind.is_quarantine()).map(|(kind, files)| {
        let source_table = kind.source_table(schema);
        let mut days: BTreeMap<i64, DayObject> = BTreeMap::new();
        for (day, found) in files {
            let known = days.entry(day).or_default();
            (known.files, known.rows) = (found.files, found.rows);
        }
        for cover in covers.iter().filter(|cover| Some(&cover.source_table) == source_table.as_ref()) {
            add(&mut days, cover);
        }
        for (_, day, rows) in quarantined.iter().filter(|(table, ..)| Some(table) == source_table.as_ref()) {
            days.entry(*day).or_default().quarantined += rows;
        }
        let days = days.into_iter().filter_map(|(day, known)| Some((name(day)?, known))).collect();
        TableObject { table: kind.name(), source_table, days }
    });
    let found = CoverageObject { tables: tables.collect(), database };
    Tag::of_body(json(&found)?, &headers).await
}

/// Adds what Postgres says of a partition to its days; of one without bounds to those that are known.
fn add(days: &mut BTreeMap<i64, DayObject>, cover: &PartitionCover) {
    let of = |known: &mut DayObject| {
        known.in_postgres = true;
        known.is_covered |= cover.is_covered;
        known.is_verified |= cover.is_verified;
        known.is_gap |= !cover.is_covered || cover.lacks;
    };
    let (start, end) = cover.range;
    let range = start.div_euclid(MICROS_PER_DAY)..=(end - 1).div_euclid(MICROS_PER_DAY);
    if cover.is_bounded {
        range.for_each(|day| of(days.entry(day).or_default()));
    } else {
        days.range_mut(range).for_each(|(_, known)| of(known));
    }
}

/// Rows of the quarantine by source table and day.
async fn quarantined(archive: &Archive) -> Result<Vec<(String, i64, u64)>, Problem> {
    use arrow::array::AsArray as _;
    use arrow::datatypes::Int64Type;
    let is_empty = archive.days().iter().all(|(kind, days)| !kind.is_quarantine() || days.is_empty());
    if is_empty {
        return Ok(Vec::new());
    }
    let query = format!(
        "select arrow_cast(source_table, 'Utf8') as source_table,
                cast(quarantined_at as bigint) / {MICROS_PER_DAY} as day, count(*) as rows
         from {} group by 1, 2",
        Kind::quarantine().name()
    );
    let frame: DataFrame = archive.sql(&query).await?;
    let mut found = Vec::new();
    for batch in frame.collect().await.map_err(Error::query("counting the quarantine"))? {
        let [tables, days, rows] = batch.columns() else { continue };
        let (tables, days) = (tables.as_string::<i32>(), days.as_primitive::<Int64Type>());
        let rows = rows.as_primitive::<Int64Type>();
        for ((table, day), rows) in tables.iter().zip(days).zip(rows) {
            if let (Some(table), Some(day), Some(rows)) = (table, day, rows) {
                found.push((table.to_owned(), day, u64::try_from(rows).unwrap_or_default()));
            }
        }
    }
    Ok(found)
}

/// A day as people write it.
fn name(day: i64) -> Option<String> {
    let time = DateTime::from_timestamp_micros(day.checked_mul(MICROS_PER_DAY)?)?;
    Some(time.format("%Y-%m-%d").to_string())
}
