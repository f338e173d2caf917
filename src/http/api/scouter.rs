//! Scouter's own routes (`GET /scouter/drift/{spc,psi,custom}`), so that a proxy can send them here and a Scouter UI shows the history
//! without a patch of its server. The answers have Scouter's JSON (`crates/scouter_types`); `docs/scouter.md` says what differs.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Duration, Utc};
use serde::Serialize;

use super::super::params::{Given, Param};
use super::super::problem::Problem;
use super::super::served::Served;
use super::json;
use super::query::POINTS_MAX;
use crate::reader::drift::{Profile, ProfileShares};
use crate::reader::{Archive, BinnedMetrics, BinnedQuery, FeatureBinProportions, SpcFeatures};
use crate::source::scouter;
use crate::tables::Entity;

pub(super) const DRIFT: [Param; 8] = [
    Param::new("uid", "the model, by the uid of scouter.drift_entities; or by space, name and version"),
    Param::new("space", "space of the model"),
    Param::new("name", "name of the model"),
    Param::new("version", "version of the model"),
    Param::new(
        "time_interval",
        "how far back: FifteenMinutes, ThirtyMinutes, OneHour, FourHours, SixHours, TwelveHours, TwentyFourHours, SevenDays, or Custom",
    ),
    Param::new("max_data_points", "at most so many bins; 100 if not given"),
    Param::new("start_custom_datetime", "RFC 3339; with the end, in place of time_interval"),
    Param::new("end_custom_datetime", "RFC 3339"),
];

/// Minutes of each interval.
const INTERVALS: [(&str, i64); 8] = [
    ("FifteenMinutes", 15),
    ("ThirtyMinutes", 30),
    ("OneHour", 60),
    ("FourHours", 240),
    ("SixHours", 360),
    ("TwelveHours", 720),
    ("TwentyFourHours", 1_440),
    ("SevenDays", 10_080),
];

/// The means of each metric, with a standard deviation to both sides.
pub(in crate::http) async fn custom(
    State(served): State<Arc<Served>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let (archive, query, _) = ask(&served, query).await?;
    let Some(archive) = archive else { return json(&BinnedMetrics::default()) };
    let turn = served.turn().await?;
    turn.answer(json(&asked(&served, async move { archive.binned_custom(&query).await }).await?)?).await
}

/// The means of each feature.
pub(in crate::http) async fn spc(
    State(served): State<Arc<Served>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let (archive, query, _) = ask(&served, query).await?;
    let Some(archive) = archive else { return json(&SpcFeatures::default()) };
    let turn = served.turn().await?;
    turn.answer(json(&asked(&served, async move { archive.binned_spc(&query).await }).await?)?).await
}

/// The population stability index of each feature against the profile that it was trained with.
pub(in crate::http) async fn psi(
    State(served): State<Arc<Served>>,
    RawQuery(query): RawQuery,
) -> Result<Response, Problem> {
    let (archive, query, entity) = ask(&served, query).await?;
    let Some(archive) = archive else { return json(&PsiAnswer::default()) };
    let profile = served
        .database(async |client, schema| scouter::profile(client, schema, &entity, "psi").await)
        .await?;
    let Some(profile) = profile else {
        let detail = "the database has no PSI profile of the model, which its index is computed against";
        return Err(Problem::new(StatusCode::NOT_FOUND, detail));
    };
    let profile = Profile::new(profile).shares().map_err(|error| Problem::unavailable(error.to_string()))?;
    let turn = served.turn().await?;
    turn.answer(json(&answer(
        &profile,
        asked(&served, async move { archive.binned_psi(&query).await }).await?,
    ))?)
    .await
}

/// Asks the archive.
async fn asked<T: Send + 'static>(
    served: &Served,
    question: impl Future<Output = crate::Result<T>> + Send + 'static,
) -> Result<T, Problem> {
    served.compute.run(async move { question.await.map_err(Problem::from) }).await
}

/// What is asked, of which archive.
async fn ask(
    served: &Served,
    query: Option<String>,
) -> Result<(Option<Archive>, BinnedQuery, Entity), Problem> {
    // A client of Scouter may send more than counts here.
    let given = Given::read_known(query.as_deref(), &DRIFT)?;
    let entity = entity(served, &given).await?;
    let (start, end) = range(&given, Utc::now())?;
    let points =
        given.parsed::<u32>("max_data_points", "a whole number")?.unwrap_or(100).clamp(1, POINTS_MAX);
    // Bins that stand on round times need one more.
    let query = BinnedQuery::with_points(entity.clone(), start, end, points.max(2))?;
    let archive = served.archive().await?;
    // One answer over what is archived and what is not yet: no seam, and one width.
    let archive = match served.observer.archives() {
        true => archive.map(|archive| archive.with_database(served.config.clone())),
        false => archive,
    };
    Ok((archive, query, entity))
}

async fn entity(served: &Served, given: &Given) -> Result<Entity, Problem> {
    if let (Some(space), Some(name), Some(version)) =
        (given.exact("space"), given.exact("name"), given.exact("version"))
    {
        return Ok(Entity { space: space.to_owned(), name: name.to_owned(), version: version.to_owned() });
    }
    let Some(uid) = given.text("uid") else {
        return Err(Problem::bad("the model is missing: a uid, or a space, a name and a version"));
    };
    let found = served.database(async |client, schema| scouter::entity_of(client, schema, uid).await).await?;
    found.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, format!("no model has the uid {uid:?}")))
}

fn range(given: &Given, now: DateTime<Utc>) -> Result<(DateTime<Utc>, DateTime<Utc>), Problem> {
    let time = |name: &str| given.parsed::<DateTime<Utc>>(name, "a time such as 2026-11-22T13:00:00Z");
    match (time("start_custom_datetime")?, time("end_custom_datetime")?) {
        (Some(start), Some(end)) => return Ok((start, end)),
        (None, None) => {}
        _ => return Err(Problem::bad("start_custom_datetime and end_custom_datetime go together")),
    }
    let interval = given.text("time_interval").unwrap_or("SixHours");
    let minutes = INTERVALS.iter().find(|(name, _)| *name == interval).map(|(_, minutes)| *minutes);
    let minutes = minutes.ok_or_else(|| {
        let names: Vec<&str> = INTERVALS.iter().map(|(name, _)| *name).collect();
        Problem::bad(format!(
            "time_interval is {interval:?}, but must be {}, or Custom with both times",
            names.join(", ")
        ))
    })?;
    Ok((now - Duration::minutes(minutes), now))
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct PsiAnswer {
    features: BTreeMap<String, PsiFeature>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct PsiFeature {
    created_at: Vec<DateTime<Utc>>,
    psi: Vec<f64>,
    overall_psi: f64,
    bins: BTreeMap<i32, f64>,
}

/// Features that are not in the profile are left out, as in Scouter.
fn answer(profile: &ProfileShares, found: Vec<FeatureBinProportions>) -> PsiAnswer {
    let features = found.into_iter().filter_map(|feature| {
        let index = |observed: &BTreeMap<i32, f64>| profile.psi(&feature.feature, observed);
        let overall_psi = index(&feature.overall_proportions)?;
        let psi = feature.bin_proportions.iter().filter_map(index).collect();
        let (created_at, bins) = (feature.created_at, feature.overall_proportions);
        Some((feature.feature, PsiFeature { created_at, psi, overall_psi, bins }))
    });
    PsiAnswer { features: features.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_intervals_or_both_times() {
        let now = "2026-11-22T12:00:00Z".parse().unwrap();
        let range = |query: &str| range(&Given::read_known(Some(query), &DRIFT).unwrap(), now);
        let (start, end) = range("time_interval=OneHour&drift_type=Psi").unwrap();
        assert_eq!((start.to_rfc3339(), end), ("2026-11-22T11:00:00+00:00".to_owned(), now));
        let (start, _) = range(
            "time_interval=Custom&start_custom_datetime=2026-01-01T00:00:00Z&end_custom_datetime=2026-02-01T00:00:00%2B00:00",
        )
        .unwrap();
        assert_eq!(start.to_rfc3339(), "2026-01-01T00:00:00+00:00");
        for wrong in [
            "time_interval=Custom",
            "time_interval=5",
            "start_custom_datetime=2026-01-01T00:00:00Z",
            "end_custom_datetime=x",
        ] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
    }
}
