//! Drift: how far a model's rows are from a reference, in each bin of time, and from when on.
//!
//! ```text
//! samples     of each series (feature or metric) and bin: counts, moments or values
//! reference   of each series, once or for each bin: another time, another version, a profile
//! measures    a score of the two, and the threshold that chance would pass
//! answer      by series, the one that moved most first: scores, and since when they are over
//! ```

mod answer;
mod asked;
mod functions;
mod measures;
mod profile;
mod samples;

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};

pub use answer::{Drift, DriftSeries, Step};
pub(crate) use asked::Named;
pub use asked::{Against, DriftQuery, Measure, Smoothing, Threshold};
pub(super) use functions::functions;
use measures::{Sample, score, significant};
pub use profile::Profile;
pub(crate) use profile::ProfileShares;
use samples::{Series, Source};

use super::{Archive, BinnedQuery};
use crate::tables::Entity;
use crate::{Error, Result};

/// What the samples of each series are compared with.
enum Reference {
    /// The same for all bins, and the bins that it is made of.
    Fixed(BTreeMap<String, Sample>, Option<Series>),
    /// Of each bin another one: where it begins, that of a bin that begins here.
    Moving(Series, Box<dyn Fn(i64) -> i64 + Send + Sync>),
}

impl Reference {
    fn of(&self, series: &str, start: i64) -> Option<&Sample> {
        match self {
            Self::Fixed(samples, _) => samples.get(series),
            Self::Moving(samples, shifted) => samples.get(series)?.get(&shifted(start)),
        }
    }

    fn has_several_bins(&self) -> bool {
        matches!(self, Self::Fixed(_, Some(bins)) if bins.values().any(|bins| bins.len() > 1))
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Fixed(samples, _) => samples.is_empty(),
            Self::Moving(samples, _) => samples.is_empty(),
        }
    }
}

/// Answers a question of drift.
pub(super) async fn drift(archive: &Archive, query: &DriftQuery) -> Result<Drift> {
    query.check()?;
    let source = Source { archive, kind: query.kind(), measure: query.measure() };
    let current = source.samples(query.query()).await?;
    if current.is_empty() {
        // Whether there is such a model is another question.
        return Ok(answer::answer(query, Vec::new()));
    }
    let reference = reference(&source, query).await?;
    // The bin before has no rows where the range begins with the first ones.
    if reference.is_empty() && *query.against() != Against::Previous {
        let detail = format!("the reference has no {} rows: {}", query.kind().name(), query.against());
        return Err(Error::Query { detail });
    }
    if matches!(query.threshold(), Threshold::Spread(_)) && !reference.has_several_bins() {
        let detail = format!(
            "sd needs a reference of several bins, but {} has one: choose a longer one",
            query.against()
        );
        return Err(Error::Query { detail });
    }
    let series = current.iter().map(|(name, bins)| {
        let spread = match query.threshold() {
            Threshold::Spread(deviations) => spread(query, &reference, name, deviations),
            Threshold::Chance(_) | Threshold::Fixed(_) => None,
        };
        let scored = bins.iter().map(|(start, sample)| {
            let against = reference.of(name, *start);
            answer::Scored {
                start: *start,
                score: against
                    .map_or(f64::NAN, |against| score(query.measure(), query.smoothing(), against, sample)),
                count: sample.count().unwrap_or_default(),
                // Of a profile nobody knows; of a series that the reference has not there are none.
                reference_count: against.map_or(Some(0), Sample::count),
                threshold: against.and_then(|against| match query.threshold() {
                    Threshold::Chance(alpha) => significant(query.measure(), alpha, against, sample),
                    Threshold::Fixed(limit) => Some(limit),
                    Threshold::Spread(_) => spread,
                }),
            }
        });
        answer::series(name, query.query().bins(), scored.collect())
    });
    Ok(answer::answer(query, series.collect()))
}

/// The reference's own scores against all of it: their mean, and so many standard deviations more (`NannyML`,
/// `StandardDeviationThreshold`).
fn spread(query: &DriftQuery, reference: &Reference, name: &str, deviations: f64) -> Option<f64> {
    let Reference::Fixed(all, Some(bins)) = reference else { return None };
    let (all, bins) = (all.get(name)?, bins.get(name)?);
    let scores = bins.values().map(|sample| score(query.measure(), query.smoothing(), all, sample).abs());
    let scores: Vec<f64> = scores.filter(|score| score.is_finite()).collect();
    // Of one there is no spread.
    if scores.len() < 2 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "as many bins as an answer has")]
    let count = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / count;
    let variance = scores.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / count;
    Some(mean + deviations * variance.sqrt()).filter(|limit| limit.is_finite())
}

async fn reference(source: &Source<'_>, query: &DriftQuery) -> Result<Reference> {
    let (asked, bins) = (query.query(), query.query().bins());
    let (start, end) = asked.range();
    let whole = async |query: BinnedQuery| {
        let bins = source.samples(&query).await?;
        let all = bins.iter().filter_map(|(name, bins)| {
            let mut samples = bins.values();
            let mut all = samples.next()?.clone();
            samples.for_each(|sample| all.add(sample));
            all.settle();
            Some((name.clone(), all))
        });
        Ok::<_, Error>(Reference::Fixed(all.collect(), Some(bins)))
    };
    match query.against() {
        Against::Window(start, end) => whole(asked.within(*start, *end)?).await,
        Against::Version(version) => {
            let Entity { space, name, .. } = asked.entity().clone();
            whole(asked.clone().of_entity(Entity { space, name, version: version.clone() })).await
        }
        Against::Previous => {
            let before = bins.start_of(bins.start_of(start).saturating_sub(1));
            let samples = source.samples(&asked.within(time(before)?, time(end)?)?).await?;
            Ok(Reference::Moving(samples, Box::new(move |start| bins.start_of(start.saturating_sub(1)))))
        }
        Against::Ago(ago) => {
            let ago = *ago;
            let shifted = move |start: i64| bins.start_before(start, ago);
            let (first, last) =
                (shifted(bins.start_of(start)), shifted(bins.start_of(end.saturating_sub(1))));
            let samples = source.samples(&asked.within(time(first)?, time(bins.end_of(last))?)?).await?;
            Ok(Reference::Moving(samples, Box::new(shifted)))
        }
        Against::Profile(profile) => Ok(Reference::Fixed(profile.samples(query.kind())?, None)),
    }
}

fn time(micros: i64) -> Result<DateTime<Utc>> {
    DateTime::from_timestamp_micros(micros)
        .ok_or_else(|| Error::Query { detail: "the reference is before all calendars".to_owned() })
}

/// A time as it is shown.
fn shown(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}
