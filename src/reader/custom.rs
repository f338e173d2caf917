//! Custom metrics: mean and spread of each metric in each bin.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions::core::expr_fn::coalesce;
use datafusion::functions_aggregate::expr_fn::{avg, stddev};
use datafusion::logical_expr::{col, lit};
use serde::{Deserialize, Serialize};

use super::columns::{Columns, each_batch};
use super::query::{BinnedQuery, plain, series};
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

/// What the values of a bin are like. Nulls don't count. A NaN among them makes all three NaN, which JSON writes as null.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BinnedMetricStats {
    /// Their mean.
    pub avg: f64,
    /// The mean less their sample standard deviation, which is 0 for one value.
    pub lower_bound: f64,
    /// The mean plus their sample standard deviation.
    pub upper_bound: f64,
}

/// The rows of [`frame`], in any order.
pub(super) fn bins(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    let keys = vec![query.bin().alias("bin"), series(Kind::custom()).alias("metric")];
    let spread = coalesce(vec![col("spread"), lit(0.0)]);
    rows.filter(col("value").is_not_null())?
        .aggregate(keys, vec![avg(col("value")).alias("avg"), stddev(col("value")).alias("spread")])?
        .select(vec![
            col("bin").alias("created_at"),
            plain("metric").alias("metric"),
            col("avg"),
            (col("avg") - spread.clone()).alias("lower_bound"),
            (col("avg") + spread).alias("upper_bound"),
        ])
}

/// Columns `created_at`, `metric`, `avg`, `lower_bound`, `upper_bound`, sorted by metric and time.
pub(super) fn frame(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    bins(rows, query)?.sort(["metric", "created_at"].map(|name| col(name).sort(true, false)).to_vec())
}

/// Collects what [`bins`] describes.
pub(super) async fn collect(frame: DataFrame) -> Result<BinnedMetrics> {
    let mut found: BTreeMap<String, Vec<(DateTime<Utc>, BinnedMetricStats)>> = BTreeMap::new();
    each_batch(frame, "reading custom metrics", |batch| {
        let columns = Columns::of(batch);
        let (times, names) = (columns.times("created_at")?, columns.texts("metric")?);
        let (avg, lower, upper) =
            (columns.doubles("avg")?, columns.doubles("lower_bound")?, columns.doubles("upper_bound")?);
        let stats = avg.iter().zip(lower).zip(upper);
        for ((time, name), ((avg, lower_bound), upper_bound)) in times.zip(names).zip(stats) {
            let stats = BinnedMetricStats { avg: *avg, lower_bound: *lower_bound, upper_bound: *upper_bound };
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
