//! `/api/query/{table}`: what `highwater query` answers.

use std::sync::Arc;

use arrow::ipc::writer::StreamWriter;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use datafusion::dataframe::DataFrame;
use futures::TryStreamExt as _;

use super::super::params::{Given, Param};
use super::super::problem::Problem;
use super::super::served::{ANSWER_BYTES_MAX, Served};
use super::super::tag::Tag;
use super::json;
use crate::error::Error;
use crate::reader::{Archive, BinnedQuery, Bins, Stat, TableQuery, When, zone};
use crate::tables::{Entity, Kind};

pub(super) const QUERY: [Param; 15] = [
    Param::new("space", "space of the model"),
    Param::new("name", "name of the model"),
    Param::new("version", "version of the model"),
    Param::new("from", "only rows from this time on: RFC 3339, a date, or -30d for 30 days ago").required(),
    Param::new("to", "only rows before this time; without it up to now"),
    Param::new(
        "bin",
        "length of the bins, such as 30s, 15m or 6h; or 1d, 1w, 1mo, 1y for days, weeks from Monday, months and years",
    ),
    Param::new("tz", "the time zone in which days begin, such as Europe/Berlin; UTC if not given"),
    Param::new(
        "points",
        "in place of bin: the shortest round length of which there are at most so many bins; 500 if not given",
    ),
    Param::new("metric", "only this metric").repeated(),
    Param::new("feature", "only this feature").repeated(),
    Param::new("fresh", "true: with the rows in Postgres that are not archived yet"),
    Param::new(
        "value",
        "the column whose values are asked for; the table may then be any, and the model may be left out",
    ),
    Param::new("by", "for each value of this column; only with value").repeated(),
    Param::new(
        "stat",
        "what of the values: mean, min, max, count, sum, or a percentile such as p50; only with value",
    )
    .repeated(),
    Param::new(
        "where",
        "only rows for which this SQL is true; only with value, and where HIGHWATER_HTTP_SQL is on",
    ),
];

/// The most bins of an answer.
pub(super) const POINTS_MAX: u32 = 10_000;

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Json,
    Arrow,
}

pub(super) const ARROW: &str = "application/vnd.apache.arrow.stream";

impl Form {
    fn of(headers: &HeaderMap) -> Self {
        let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        if accept.contains(ARROW) { Self::Arrow } else { Self::Json }
    }
}

/// Bins of a table's rows. The query ends when whoever asks goes away.
pub(in crate::http) async fn query(
    State(served): State<Arc<Served>>,
    Path(table): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let given = Given::read(query.as_deref(), &[&QUERY])?;
    let asked = Asked::read(&table, &given, served.config.http.sql)?;
    let Some(mut archive) = served.archive().await? else {
        return Err(Problem::new(StatusCode::NOT_FOUND, "nothing is archived yet"));
    };
    let form = Form::of(&headers);
    let tag = (!asked.is_fresh).then(|| Tag::of(&archive.versions(), &format!("{form:?}{asked:?}")));
    let known = |tag: &Tag| tag.unchanged(&headers).or_else(|| served.kept.answer(tag));
    if let Some(known) = tag.as_ref().and_then(known) {
        return Ok(known);
    }
    let turn = served.turn().await?;
    if asked.is_fresh {
        archive = archive.with_database(served.config.clone());
    }
    let answered = served.compute.run(async move {
        match form {
            Form::Json => asked.json(&archive).await,
            Form::Arrow => arrow(asked.frame(&archive).await?).await,
        }
    });
    match tag {
        Some(tag) => turn.tagged(answered.await?, &tag, &served.kept).await,
        None => turn.answer(answered.await?).await,
    }
}

/// What is asked.
#[derive(Debug)]
struct Asked {
    question: Question,
    is_fresh: bool,
}

#[derive(Debug)]
enum Question {
    Custom(BinnedQuery),
    Psi(BinnedQuery),
    Spc(BinnedQuery),
    Table(TableQuery),
}

impl Asked {
    fn read(table: &str, given: &Given, allows_sql: bool) -> Result<Self, Problem> {
        let zone = given.text("tz").map(zone).transpose().map_err(Problem::bad)?.unwrap_or(Tz::UTC);
        let now = Utc::now();
        let (start, end) = (moment(given, "from", (zone, now))?, moment(given, "to", (zone, now))?);
        let (start, end) = (start.unwrap_or_default(), end.unwrap_or(now));
        let width = bins(given, zone, (start, end))?;
        let is_fresh = given.flag("fresh")?;
        if let Some(value) = given.text("value") {
            if is_fresh {
                return Err(Problem::bad("fresh and value don't go together"));
            }
            if given.exact("where").is_some() && !allows_sql {
                return Err(Problem::bad(
                    "where is SQL, which is answered only where HIGHWATER_HTTP_SQL is on",
                ));
            }
            let question = Question::Table(table_query(table, value, given, (start, end), width)?);
            return Ok(Self { question, is_fresh });
        }
        for name in ["by", "stat", "where"] {
            if given.exact(name).is_some() {
                return Err(Problem::bad(format!("{name} goes with value only")));
            }
        }
        let entity = entity(given)?;
        let series = given.all("metric").into_iter().chain(given.all("feature"));
        let query = BinnedQuery::new(entity, start, end, width)?.of_series(series);
        let question = match table {
            "custom" => Question::Custom(query),
            "psi" => Question::Psi(query),
            "spc" => Question::Spc(query),
            other => {
                let detail = format!(
                    "{other:?} has no bins of its own: custom, psi and spc have, and any table with value"
                );
                return Err(Problem::new(StatusCode::NOT_FOUND, detail));
            }
        };
        Ok(Self { question, is_fresh })
    }

    async fn json(&self, archive: &Archive) -> Result<Response, Problem> {
        match &self.question {
            Question::Custom(query) => {
                let found = archive.binned_custom(query).await?;
                known(archive, Kind::custom(), query, found.metrics.is_empty()).await?;
                json(&found)
            }
            Question::Psi(query) => {
                let found = archive.binned_psi(query).await?;
                known(archive, Kind::psi(), query, found.is_empty()).await?;
                json(&found)
            }
            Question::Spc(query) => {
                let found = archive.binned_spc(query).await?;
                known(archive, Kind::spc(), query, found.features.is_empty()).await?;
                json(&found)
            }
            Question::Table(query) => json(&archive.binned_table(query).await?),
        }
    }

    async fn frame(&self, archive: &Archive) -> Result<DataFrame, Problem> {
        Ok(match &self.question {
            Question::Custom(query) => archive.custom_frame(query).await?,
            Question::Psi(query) => archive.psi_frame(query).await?,
            Question::Spc(query) => archive.spc_frame(query).await?,
            Question::Table(query) => archive.table_frame(query).await?,
        })
    }
}

/// A time, if it was given.
pub(super) fn moment(
    given: &Given,
    name: &str,
    (zone, now): (Tz, DateTime<Utc>),
) -> Result<Option<DateTime<Utc>>, Problem> {
    let read = |text: &str| {
        let when = text.parse::<When>();
        let when = when.map_err(|why| Problem::bad(format!("{name} is {text:?}, which is {why}")))?;
        Ok::<_, Problem>(when.time(zone, now)?)
    };
    given.text(name).map(read).transpose()
}

/// The model, which has to be given.
pub(super) fn entity(given: &Given) -> Result<Entity, Problem> {
    // A name may be empty, and is not left out for that.
    let part = |name: &str| {
        let missing = || Problem::bad(format!("{name} is missing: a model is a space, a name and a version"));
        given.exact(name).map(str::to_owned).ok_or_else(missing)
    };
    Ok(Entity { space: part("space")?, name: part("name")?, version: part("version")? })
}

/// An empty answer must not hide a mistyped name.
pub(super) async fn known(
    archive: &Archive,
    kind: Kind,
    query: &BinnedQuery,
    is_empty: bool,
) -> Result<(), Problem> {
    if !is_empty {
        return Ok(());
    }
    archive.check_entity(kind, query.entity()).await.map_err(|error| match error {
        Error::Query { detail } => Problem::new(StatusCode::NOT_FOUND, detail),
        error => error.into(),
    })
}

pub(super) fn bins(
    given: &Given,
    zone: Tz,
    (start, end): (DateTime<Utc>, DateTime<Utc>),
) -> Result<Bins, Problem> {
    let range = (start.timestamp_micros(), end.timestamp_micros());
    let points = given.parsed::<u32>("points", "a whole number")?;
    if points.is_some_and(|points| points > POINTS_MAX) {
        return Err(Problem::bad(format!("points may be {POINTS_MAX} at most")));
    }
    let Some(bin) = given.text("bin") else {
        return Ok(Bins::at_most_in(zone, points.unwrap_or(500), range)?);
    };
    if points.is_some() {
        return Err(Problem::bad("bin and points don't go together"));
    }
    let bins = bin.parse::<Bins>().map_err(Problem::bad)?.within(zone);
    if range.1.saturating_sub(range.0) / bins.micros() > i64::from(POINTS_MAX) {
        return Err(Problem::bad(format!("the range has more than {POINTS_MAX} bins of {bin}")));
    }
    Ok(bins)
}

fn table_query(
    table: &str,
    value: &str,
    given: &Given,
    (start, end): (DateTime<Utc>, DateTime<Utc>),
    width: Bins,
) -> Result<TableQuery, Problem> {
    let stats = given.all("stat").into_iter();
    let stats = stats.map(|name| name.parse::<Stat>().map_err(|why| Problem::bad(format!("stat: {why}"))));
    let stats = stats.collect::<Result<Vec<Stat>, Problem>>()?;
    let query = TableQuery::new(table, value, start, end, width)?.by(given.all("by")).stats(stats);
    let query =
        ["space", "name", "version"].into_iter().fold(query, |query, column| match given.exact(column) {
            Some(text) => query.equal(column, text),
            None => query,
        });
    Ok(match given.text("where") {
        Some(condition) => query.only(condition),
        None => query,
    })
}

/// The rows as an Arrow stream.
async fn arrow(frame: DataFrame) -> Result<Response, Problem> {
    let asked = Error::asked("running the query");
    let mut rows = frame.execute_stream().await.map_err(asked)?;
    let failed =
        |error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, format!("writing the answer ({error})"));
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).map_err(failed)?;
    while let Some(batch) = rows.try_next().await.map_err(Error::asked("running the query"))? {
        writer.write(&batch).map_err(failed)?;
        if writer.get_ref().len() > ANSWER_BYTES_MAX {
            return Err(Problem::too_large(ANSWER_BYTES_MAX));
        }
    }
    let bytes = writer.into_inner().map_err(failed)?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(ARROW))], bytes).into_response())
}
