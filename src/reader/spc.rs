//! Process control: the mean of each feature in each bin.

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
    /// The mean of each bin's values: of the exact sum, rounded once. Nulls don't count; of NaN and infinities it is what arithmetic makes
    /// of them. JSON writes null for what is no number.
    pub values: Vec<f64>,
    /// How many values each mean is of, those that are no numbers among them.
    #[serde(default)]
    pub counts: Vec<i64>,
    /// Rows of each bin whose value is null.
    #[serde(default)]
    pub nulls: Vec<i64>,
    /// Values of each bin that are no numbers.
    #[serde(default)]
    pub nans: Vec<i64>,
    /// The smallest of each bin's values that are numbers; NaN if there is none.
    #[serde(default)]
    pub min: Vec<f64>,
    /// The largest of them.
    #[serde(default)]
    pub max: Vec<f64>,
}

/// The rows of [`frame`], in any order.
pub(super) fn bins(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    let keys = vec![query.bin().alias("bin"), series(Kind::spc()).alias("name_of_feature")];
    summed_up(rows, keys)?.select(vec![
        col("bin").alias("created_at"),
        plain("name_of_feature").alias("feature"),
        col("mean").alias("value"),
        col("count"),
        col("nulls"),
        col("nans"),
        col("min"),
        col("max"),
    ])
}

/// Columns `created_at`, `feature`, `value`, `count`, `nulls`, `nans`, `min`, `max`, sorted by feature and time.
pub(super) fn frame(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    bins(rows, query)?.sort(["feature", "created_at"].map(|name| col(name).sort(true, false)).to_vec())
}

/// Collects what [`frame`] describes.
pub(super) async fn collect(frame: DataFrame) -> Result<SpcFeatures> {
    let mut found = SpcFeatures::default();
    each_batch(frame, "reading process control values", |batch| {
        let columns = Columns::of(batch);
        let (times, names) = (columns.times("created_at")?, columns.texts("feature")?);
        let [values, min, max] = columns.all_doubles(["value", "min", "max"])?;
        let [counts, nulls, nans] = columns.all_longs(["count", "nulls", "nans"])?;
        for (row, (time, name)) in times.zip(names).enumerate() {
            let feature = found.features.entry(name.unwrap_or_default().to_owned()).or_default();
            feature.created_at.push(time);
            feature.values.push(at(values, row));
            feature.counts.push(at(counts, row));
            feature.nulls.push(at(nulls, row));
            feature.nans.push(at(nans, row));
            feature.min.push(at(min, row));
            feature.max.push(at(max, row));
        }
        Ok(())
    })
    .await?;
    Ok(found)
}
