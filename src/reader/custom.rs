//! Custom metrics: mean and spread of each metric in each bin.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::logical_expr::col;
use serde::{Deserialize, Serialize};

use super::columns::{Columns, at, each_batch};
use super::query::{BinnedQuery, plain, series, summed_up};
use crate::Result;
use crate::tables::Kind;

/// The metrics of an entity, by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BinnedMetrics {
    /// By name.
    pub metrics: BTreeMap<String, BinnedMetric>,
}

/// A metric over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BinnedMetric {
    /// Its name.
    pub metric: String,
    /// Starts of the bins that have values, ascending.
    pub created_at: Vec<DateTime<Utc>>,
    /// What the values of each bin are like.
    pub stats: Vec<BinnedMetricStats>,
}

/// What the values of a bin are like. Nulls don't count. A NaN or an infinity among them makes the mean and both bounds what arithmetic
/// makes of it; JSON writes null for what is no number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BinnedMetricStats {
    /// Their mean: of the exact sum, rounded once.
    pub avg: f64,
    /// The mean less their sample standard deviation, which is 0 for one value.
    pub lower_bound: f64,
    /// The mean plus their sample standard deviation.
    pub upper_bound: f64,
    /// How many there are, those that are no numbers among them.
    #[serde(default)]
    pub count: i64,
    /// Rows whose value is null.
    #[serde(default)]
    pub nulls: i64,
    /// Values that are no numbers.
    #[serde(default)]
    pub nans: i64,
    /// The smallest of those that are numbers; NaN if there is none.
    #[serde(default)]
    pub min: f64,
    /// The largest of them.
    #[serde(default)]
    pub max: f64,
}

/// The rows of [`frame`], in any order.
pub(super) fn bins(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    let keys = vec![query.bin().alias("bin"), series(Kind::custom()).alias("name_of_metric")];
    let rows = summed_up(rows, keys)?;
    rows.select(vec![
        col("bin").alias("created_at"),
        plain("name_of_metric").alias("metric"),
        col("mean").alias("avg"),
        (col("mean") - col("stddev")).alias("lower_bound"),
        (col("mean") + col("stddev")).alias("upper_bound"),
        col("count"),
        col("nulls"),
        col("nans"),
        col("min"),
        col("max"),
    ])
}

/// Columns `created_at`, `metric`, `avg`, `lower_bound`, `upper_bound`, `count`, `nulls`, `nans`, `min`, `max`, sorted by metric and time.
pub(super) fn frame(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    bins(rows, query)?.sort(["metric", "created_at"].map(|name| col(name).sort(true, false)).to_vec())
}

/// Collects what [`bins`] describes.
pub(super) async fn collect(frame: DataFrame) -> Result<BinnedMetrics> {
    let mut found: BTreeMap<String, Vec<(DateTime<Utc>, BinnedMetricStats)>> = BTreeMap::new();
    each_batch(frame, "reading custom metrics", |batch| {
        let columns = Columns::of(batch);
        let (times, names) = (columns.times("created_at")?, columns.texts("metric")?);
        let [avg, lower, upper, min, max] =
            columns.all_doubles(["avg", "lower_bound", "upper_bound", "min", "max"])?;
        let [count, nulls, nans] = columns.all_longs(["count", "nulls", "nans"])?;
        for (row, (time, name)) in times.zip(names).enumerate() {
            let stats = BinnedMetricStats {
                avg: at(avg, row),
                lower_bound: at(lower, row),
                upper_bound: at(upper, row),
                count: at(count, row),
                nulls: at(nulls, row),
                nans: at(nans, row),
                min: at(min, row),
                max: at(max, row),
            };
            found.entry(name.unwrap_or_default().to_owned()).or_default().push((time, stats));
        }
        Ok(())
    })
    .await?;
    let metrics = found.into_iter().map(|(name, mut bins)| {
        bins.sort_unstable_by_key(|(time, _)| *time);
        let (created_at, stats) = bins.into_iter().unzip();
        (name.clone(), BinnedMetric { metric: name, created_at, stats })
    });
    Ok(BinnedMetrics { metrics: metrics.collect() })
}
