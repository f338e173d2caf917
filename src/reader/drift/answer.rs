//! The answer to a question of drift.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::error::ArrowError;
use chrono::{DateTime, Utc};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::DriftQuery;
use crate::reader::Bins;
use crate::tables::Kind;
use crate::{Error, Result};

/// How many bins in a row have to be over before the first of them is when it began.
const LASTING: usize = 3;

/// How far each series of a model is from the reference, in each bin of time.
///
/// As JSON: `{"measure", "against", "smoothing", "threshold_rule", "features": {f: {"created_at", "score", "count", "reference_count", "threshold",
/// "over", "since", "until", "largest_step"}}}`, with `metrics` in place of `features` for custom metrics. What is no number is null.
#[derive(Clone, Debug, PartialEq)]
pub struct Drift {
    /// The kind of rows.
    pub kind: Kind,
    /// By what; see [`Measure`](super::Measure).
    pub measure: &'static str,
    /// What the rows are compared with, as it is written.
    pub against: String,
    /// What was done about empty bins.
    pub smoothing: &'static str,
    /// What the thresholds are, as it is written.
    pub threshold_rule: String,
    /// The one that moved most first: by its highest score.
    pub series: Vec<DriftSeries>,
}

/// A series over time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DriftSeries {
    /// The feature or metric.
    pub name: String,
    /// Starts of the bins that have rows, ascending.
    pub created_at: Vec<DateTime<Utc>>,
    /// How far each bin is from the reference; NaN where one of the two is empty.
    pub score: Vec<f64>,
    /// What stands behind each score: counts, or values.
    pub count: Vec<i64>,
    /// The same of the reference; `None` of a profile.
    pub reference_count: Vec<Option<i64>>,
    /// From which score on a bin is over; `None` where there is no reference.
    pub threshold: Vec<Option<f64>>,
    /// Whether it is: the score, or what it is below 0, is larger than the threshold.
    pub over: Vec<bool>,
    /// The first bin that was over and was followed by two more, each next to the one before: when it began, and lasted.
    pub since: Option<DateTime<Utc>>,
    /// The end of the last bin that was over without a break since then; `None` if the newest bin is.
    pub until: Option<DateTime<Utc>>,
    /// The largest change from one bin to the next.
    pub largest_step: Option<Step>,
}

/// A change of a score.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Step {
    /// The start of the bin after it.
    pub created_at: DateTime<Utc>,
    /// The score before.
    pub from: f64,
    /// The score after.
    pub to: f64,
}

/// A bin with its score.
pub(super) struct Scored {
    pub(super) start: i64,
    pub(super) score: f64,
    pub(super) count: i64,
    pub(super) reference_count: Option<i64>,
    pub(super) threshold: Option<f64>,
}

pub(super) fn series(name: &str, bins: Bins, scored: Vec<Scored>) -> DriftSeries {
    let mut found = DriftSeries { name: name.to_owned(), ..DriftSeries::default() };
    for bin in scored {
        found.created_at.push(DateTime::from_timestamp_micros(bin.start).unwrap_or_default());
        found.score.push(bin.score);
        found.count.push(bin.count);
        found.reference_count.push(bin.reference_count);
        found.threshold.push(bin.threshold);
        found.over.push(bin.threshold.is_some_and(|threshold| bin.score.abs() > threshold));
    }
    if let Some((first, last)) = lasting(&found, bins) {
        found.since = found.created_at.get(first).copied();
        let end = found.created_at.get(last).map(|start| bins.end_of(start.timestamp_micros()));
        found.until = end.filter(|_| last + 1 < found.over.len()).and_then(DateTime::from_timestamp_micros);
    }
    let scores = found.created_at.iter().zip(&found.score).filter(|(_, score)| score.is_finite());
    let scores: Vec<(&DateTime<Utc>, &f64)> = scores.collect();
    let steps = scores.windows(2).filter_map(|pair| match pair {
        [(_, from), (time, to)] => Some(Step { created_at: **time, from: **from, to: **to }),
        _ => None,
    });
    found.largest_step = steps.max_by(|a, b| (a.to - a.from).abs().total_cmp(&(b.to - b.from).abs()));
    found
}

/// The first and the last of the first bins that are over and next to each other, if there are enough of them.
fn lasting(found: &DriftSeries, bins: Bins) -> Option<(usize, usize)> {
    let (mut run, mut end): (Option<(usize, usize)>, i64) = (None, 0);
    for (place, (start, over)) in found.created_at.iter().zip(&found.over).enumerate() {
        let start = start.timestamp_micros();
        run = match (run.filter(|_| *over && start == end), *over) {
            (Some((first, _)), _) => Some((first, place)),
            (None, is_over) => {
                if let Some((first, last)) = run.filter(|(first, last)| last - first + 1 >= LASTING) {
                    return Some((first, last));
                }
                is_over.then_some((place, place))
            }
        };
        end = bins.end_of(start);
    }
    run.filter(|(first, last)| last - first + 1 >= LASTING)
}

pub(super) fn answer(query: &DriftQuery, mut series: Vec<DriftSeries>) -> Drift {
    let far = |series: &DriftSeries| if series.highest().is_nan() { -1.0 } else { series.highest().abs() };
    series.sort_by(|a, b| far(b).total_cmp(&far(a)));
    series.truncate(query.most().unwrap_or(usize::MAX));
    Drift {
        kind: query.kind(),
        measure: query.measure().name(),
        against: query.against().to_string(),
        smoothing: query.smoothing().name(),
        threshold_rule: query.threshold().to_string(),
        series,
    }
}

impl DriftSeries {
    /// The score that is farthest from 0, with its sign; NaN if there is none.
    #[must_use]
    pub fn highest(&self) -> f64 {
        let scores = self.score.iter().copied().filter(|score| !score.is_nan());
        scores.max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(f64::NAN)
    }

    /// The bin of that score.
    #[must_use]
    pub fn highest_at(&self) -> Option<DateTime<Utc>> {
        let highest = self.highest();
        let at = self.score.iter().position(|score| *score == highest)?;
        self.created_at.get(at).copied()
    }

    /// How many bins are over.
    #[must_use]
    pub fn bins_over(&self) -> usize {
        self.over.iter().filter(|over| **over).count()
    }
}

impl Drift {
    /// `feature` or `metric`.
    fn series_name(&self) -> &'static str {
        if self.kind == Kind::custom() { "metric" } else { "feature" }
    }

    /// A row for each bin: `created_at`, `feature` (or `metric`), `score`, `count`, `reference_count`, `threshold`, `over`; the series that moved most
    /// first.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`] if that is more than Arrow holds.
    pub fn rows(&self) -> Result<RecordBatch> {
        let all = || self.series.iter();
        let times = all().flat_map(|series| &series.created_at).copied();
        let names = all().flat_map(|series| std::iter::repeat_n(series.name.as_str(), series.score.len()));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("created_at", instants(times.map(Some))),
            (self.series_name(), Arc::new(names.map(Some).collect::<StringArray>())),
            ("score", numbers(all().flat_map(|series| &series.score).copied())),
            ("count", Arc::new(all().flat_map(|series| &series.count).copied().collect::<Int64Array>())),
            (
                "reference_count",
                Arc::new(all().flat_map(|series| &series.reference_count).copied().collect::<Int64Array>()),
            ),
            (
                "threshold",
                Arc::new(all().flat_map(|series| &series.threshold).copied().collect::<Float64Array>()),
            ),
            (
                "over",
                Arc::new(all().flat_map(|series| &series.over).copied().map(Some).collect::<BooleanArray>()),
            ),
        ];
        RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, column)| (name, column, true)),
        )
        .map_err(failed)
    }

    /// A row for each series: `feature` (or `metric`), `highest` score and when (`highest_at`), `bins`, `bins_over`, `since` (the first bin over
    /// that lasted), `until`, `largest_step` and when (`largest_step_at`); the one that moved most first.
    ///
    /// # Errors
    ///
    /// As [`Drift::rows`].
    pub fn summary(&self) -> Result<RecordBatch> {
        let all = || self.series.iter();
        let whole = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let step = |series: &DriftSeries| series.largest_step.map(|step| step.to - step.from);
        let columns: Vec<(&str, ArrayRef)> = vec![
            (
                self.series_name(),
                Arc::new(all().map(|series| Some(series.name.as_str())).collect::<StringArray>()),
            ),
            ("highest", numbers(all().map(DriftSeries::highest))),
            ("highest_at", instants(all().map(DriftSeries::highest_at))),
            ("bins", Arc::new(all().map(|series| whole(series.score.len())).collect::<Int64Array>())),
            ("bins_over", Arc::new(all().map(|series| whole(series.bins_over())).collect::<Int64Array>())),
            ("since", instants(all().map(|series| series.since))),
            ("until", instants(all().map(|series| series.until))),
            ("largest_step", Arc::new(all().map(step).collect::<Float64Array>())),
            (
                "largest_step_at",
                instants(all().map(|series| series.largest_step.map(|step| step.created_at))),
            ),
        ];
        RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, column)| (name, column, true)),
        )
        .map_err(failed)
    }
}

fn failed(source: ArrowError) -> Error {
    Error::Encode { context: "building the answer".to_owned(), source: Box::new(source) }
}

fn instants(times: impl Iterator<Item = Option<DateTime<Utc>>>) -> ArrayRef {
    let micros = times.map(|time| time.map(|time| time.timestamp_micros()));
    Arc::new(micros.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
}

/// What is no score is null.
fn numbers(scores: impl Iterator<Item = f64>) -> ArrayRef {
    let known = |score: f64| (!score.is_nan()).then_some(score);
    Arc::new(scores.map(known).collect::<Float64Array>())
}

impl Serialize for DriftSeries {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("created_at", &self.created_at)?;
        map.serialize_entry("score", &self.score)?;
        map.serialize_entry("count", &self.count)?;
        // Of most references it is the same for all bins.
        match self.reference_count.split_first() {
            Some((first, rest)) if rest.iter().all(|count| count == first) => {
                map.serialize_entry("reference_count", first)?;
            }
            _ => map.serialize_entry("reference_count", &self.reference_count)?,
        }
        map.serialize_entry("threshold", &self.threshold)?;
        map.serialize_entry("over", &self.over)?;
        map.serialize_entry("since", &self.since)?;
        map.serialize_entry("until", &self.until)?;
        map.serialize_entry("largest_step", &self.largest_step)?;
        map.end()
    }
}

/// The series, by name, in their order.
struct ByName<'a>(&'a [DriftSeries]);

impl Serialize for ByName<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|series| (&series.name, series)))
    }
}

impl Serialize for Drift {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("measure", self.measure)?;
        map.serialize_entry("against", &self.against)?;
        map.serialize_entry("smoothing", self.smoothing)?;
        map.serialize_entry("threshold_rule", &self.threshold_rule)?;
        map.serialize_entry(
            if self.kind == Kind::custom() { "metrics" } else { "features" },
            &ByName(&self.series),
        )?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(days: &[(i64, f64)]) -> DriftSeries {
        const DAY: i64 = 86_400_000_000;
        let scored = |(day, score): &(i64, f64)| Scored {
            start: day * DAY,
            score: *score,
            count: 1,
            reference_count: Some(1),
            threshold: Some(0.5),
        };
        series("a", "1d".parse().unwrap(), days.iter().map(scored).collect())
    }

    fn day(number: i64) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(number * 86_400, 0)
    }

    #[test]
    fn it_began_with_the_first_of_three_bins_that_touch_and_may_be_over_with() {
        let lasts = found(&[(0, 0.9), (1, 0.1), (2, 0.9), (3, -0.9), (4, 0.9), (5, 0.9)]);
        assert_eq!((lasts.since, lasts.until), (day(2), None));
        let ended = found(&[(0, 0.9), (1, 0.9), (2, 0.9), (3, 0.1), (4, 0.9)]);
        assert_eq!((ended.since, ended.until), (day(0), day(3)));
        // Days without rows are a break.
        let broken = found(&[(0, 0.9), (2, 0.9), (4, 0.9)]);
        assert_eq!((broken.since, broken.until), (None, None));
        let after = found(&[(0, 0.9), (1, 0.9), (3, 0.9), (4, 0.9), (5, 0.9), (7, 0.9)]);
        assert_eq!((after.since, after.until), (day(3), day(6)));
        assert_eq!((lasts.highest(), lasts.bins_over()), (0.9, 5));
        let step = lasts.largest_step.unwrap();
        assert_eq!((step.from - step.to).abs(), 1.8);
        let falls = found(&[(0, 0.1), (1, -2.0), (2, f64::NAN)]);
        assert_eq!((falls.highest(), falls.highest_at()), (-2.0, day(1)));
        assert_eq!(found(&[(0, f64::NAN)]).highest_at(), None);
    }
}
