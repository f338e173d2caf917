//! Process control: the mean of each feature in each bin.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions_aggregate::expr_fn::avg;
use datafusion::logical_expr::col;
use serde::{Deserialize, Serialize};

use super::columns::{Columns, each_batch};
use super::query::{BinnedQuery, plain, series};
use crate::Result;
use crate::tables::Kind;

/// The features of an entity, by name. Rows without a feature are under the empty name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpcFeatures {
    /// By name.
    pub features: BTreeMap<String, SpcFeature>,
}

/// A feature over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpcFeature {
    /// Starts of the bins that have values, ascending.
    pub created_at: Vec<DateTime<Utc>>,
    /// The mean of each bin's values. Nulls don't count; a NaN makes it NaN, which JSON writes as null.
    pub values: Vec<f64>,
}

/// The rows of [`frame`], in any order.
pub(super) fn bins(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    rows.filter(col("value").is_not_null())?
        .aggregate(
            vec![query.bin().alias("bin"), series(Kind::spc()).alias("name_of_feature")],
            vec![avg(col("value")).alias("mean")],
        )?
        .select(vec![
            col("bin").alias("created_at"),
            plain("name_of_feature").alias("feature"),
            col("mean").alias("value"),
        ])
}

/// Columns `created_at`, `feature`, `value`, sorted by feature and time.
pub(super) fn frame(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    bins(rows, query)?.sort(["feature", "created_at"].map(|name| col(name).sort(true, false)).to_vec())
}

/// Collects what [`bins`] describes.
pub(super) async fn collect(frame: DataFrame) -> Result<SpcFeatures> {
    let mut found: BTreeMap<String, Vec<(DateTime<Utc>, f64)>> = BTreeMap::new();
    each_batch(frame, "reading process control values", |batch| {
        let columns = Columns::of(batch);
        let (times, names) = (columns.times("created_at")?, columns.texts("feature")?);
        for ((time, name), value) in times.zip(names).zip(columns.doubles("value")?) {
            found.entry(name.unwrap_or_default().to_owned()).or_default().push((time, *value));
        }
        Ok(())
    })
    .await?;
    let features = found.into_iter().map(|(name, mut bins)| {
        bins.sort_unstable_by_key(|(time, _)| *time);
        let (created_at, values) = bins.into_iter().unzip();
        (name, SpcFeature { created_at, values })
    });
    Ok(SpcFeatures { features: features.collect() })
}
