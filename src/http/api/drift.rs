//! `/api/drift/{table}`: what `highwater drift` answers.

use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use chrono::Utc;
use chrono_tz::Tz;

use super::super::params::{Given, Param};
use super::super::problem::Problem;
use super::super::served::Served;
use super::super::tag::Tag;
use super::json;
use super::query::{bins, entity, known, moment};
use crate::reader::drift::{Against, DriftQuery, Named, Profile};
use crate::reader::{BinnedQuery, zone};
use crate::source::scouter;
use crate::tables::Kind;

pub(super) const DRIFT: [Param; 16] = [
    Param::new("space", "space of the model"),
    Param::new("name", "name of the model"),
    Param::new("version", "version of the model"),
    Param::new("from", "only rows from this time on: RFC 3339, a date, or -30d for 30 days ago").required(),
    Param::new("to", "only rows before this time; without it up to now"),
    Param::new("bin", "length of the bins, such as 6h, 1d, 1w or 1mo"),
    Param::new(
        "points",
        "in place of bin: the shortest round length of which there are at most so many bins; 500 if not given",
    ),
    Param::new("tz", "the time zone in which days begin, such as Europe/Berlin; UTC if not given"),
    Param::new("metric", "only this metric").repeated(),
    Param::new("feature", "only this feature").repeated(),
    Param::new(
        "against",
        "the reference: 2026-01-01..2026-02-01, previous (the default), -365d, version:1.3.0 or profile",
    ),
    Param::new("measure", "psi, js, hellinger, tvd or chi2, of psi; smd or ks, of custom and spc"),
    Param::new(
        "smoothing",
        "of bins that one side has nothing in: scouter (the default), evidently, count or none",
    ),
    Param::new("threshold", "from where on a bin is over: a number, chi2:0.05 (the default) or sd:3"),
    Param::new("top", "only this many series: those that moved most"),
    Param::new("fresh", "true: with the rows in Postgres that are not archived yet"),
];

/// How far a model has moved. The query ends when whoever asks goes away.
pub(in crate::http) async fn drift(
    State(served): State<Arc<Served>>,
    Path(table): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let given = Given::read(query.as_deref(), &[&DRIFT])?;
    let Some(kind) = Kind::drift().iter().find(|kind| kind.name() == table).copied() else {
        let detail = format!("{table:?} has no drift: custom, psi and spc have");
        return Err(Problem::new(StatusCode::NOT_FOUND, detail));
    };
    let asked = read(&served, kind, &given).await?;
    let is_fresh = given.flag("fresh")?;
    let Some(mut archive) = served.archive().await? else {
        return Err(Problem::new(StatusCode::NOT_FOUND, "nothing is archived yet"));
    };
    // A profile may change, and is in the tag as it is. What is not archived yet has no version.
    let tag = (!is_fresh).then(|| Tag::of(&archive.versions(), &format!("{kind:?}{asked:?}")));
    let answer = |tag: &Tag| tag.unchanged(&headers).or_else(|| served.kept.answer(tag));
    if let Some(answer) = tag.as_ref().and_then(answer) {
        return Ok(answer);
    }
    let turn = served.turn().await?;
    if is_fresh {
        archive = archive.with_database(served.config.clone());
    }
    let answered = served.compute.run(async move {
        let found = archive.drift(&asked).await?;
        known(&archive, kind, asked.query(), found.series.is_empty()).await?;
        json(&found)
    });
    match tag {
        Some(tag) => turn.tagged(answered.await?, &tag, &served.kept).await,
        None => turn.answer(answered.await?).await,
    }
}

async fn read(served: &Served, kind: Kind, given: &Given) -> Result<DriftQuery, Problem> {
    let (tz, now) =
        (given.text("tz").map(zone).transpose().map_err(Problem::bad)?.unwrap_or(Tz::UTC), Utc::now());
    let (start, end) = (moment(given, "from", (tz, now))?, moment(given, "to", (tz, now))?.unwrap_or(now));
    let start = start.unwrap_or_default();
    let entity = entity(given)?;
    let series = given.all("metric").into_iter().chain(given.all("feature"));
    let query =
        BinnedQuery::new(entity.clone(), start, end, bins(given, tz, (start, end))?)?.of_series(series);
    let against = match parsed::<Named>(given, "against")?.unwrap_or(Named::Previous) {
        Named::Profile(None) => {
            let found = served
                .database(async |client, schema| scouter::profile(client, schema, &entity, kind.name()).await)
                .await?;
            let missing =
                || Problem::new(StatusCode::NOT_FOUND, "the database has no such profile of the model");
            Against::Profile(Profile::new(found.ok_or_else(missing)?))
        }
        named => named.at(|when| when.time(tz, now))?,
    };
    let mut asked = DriftQuery::new(kind, query, against)?;
    if let Some(measure) = parsed(given, "measure")? {
        asked = asked.by(measure);
    }
    if let Some(smoothing) = parsed(given, "smoothing")? {
        asked = asked.smoothed(smoothing);
    }
    if let Some(threshold) = parsed(given, "threshold")? {
        asked = asked.over(threshold);
    }
    Ok(match given.parsed::<std::num::NonZeroUsize>("top", "a whole number from 1 on")? {
        Some(top) => asked.top(top.get()),
        None => asked,
    })
}

/// A value that says itself what is wrong with it.
fn parsed<T: FromStr<Err = String>>(given: &Given, name: &str) -> Result<Option<T>, Problem> {
    given
        .text(name)
        .map(|text| text.parse().map_err(|why| Problem::bad(format!("{name}: {why}"))))
        .transpose()
}
