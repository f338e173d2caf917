//! Population stability: how the rows of each feature spread over its bins, in each bin of time.

use std::collections::BTreeMap;

use arrow::datatypes::DataType;
use chrono::{DateTime, Utc};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions_aggregate::expr_fn::{count, sum};
use datafusion::functions_aggregate::sum::sum_udaf;
use datafusion::logical_expr::expr::WindowFunction;
use datafusion::logical_expr::{Expr, ExprFunctionExt, cast, col, lit};
use serde::{Deserialize, Serialize};

use super::columns::{Columns, at, each_batch};
use super::query::{BinnedQuery, plain, series};
use crate::Result;
use crate::tables::Kind;

/// The distribution of a feature over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FeatureBinProportions {
    /// The feature.
    pub feature: String,
    /// Starts of the bins of time, ascending; without those whose counts add up to 0.
    pub created_at: Vec<DateTime<Utc>>,
    /// For each bin of time the part of its counts that is in each `bin_id`.
    pub bin_proportions: Vec<BTreeMap<i32, f64>>,
    /// The part of all counts of the range that is in each `bin_id`.
    pub overall_proportions: BTreeMap<i32, f64>,
    /// What the counts of each bin of time add up to.
    #[serde(default)]
    pub counts: Vec<i64>,
    /// How many rows have told them.
    #[serde(default)]
    pub rows: Vec<i64>,
}

/// Columns `created_at`, `feature`, `bin_id`, `bin_count`, `rows`: each row is counted here, and nowhere else.
pub(super) fn counts(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    let keys = vec![query.bin().alias("bin"), series(Kind::psi()).alias("feature"), col("bin_id")];
    let counts = vec![sum(col("bin_count")).alias("count"), count(lit(1)).alias("rows")];
    rows.aggregate(keys, counts)?.select(vec![
        col("bin").alias("created_at"),
        plain("feature").alias("feature"),
        col("bin_id"),
        col("count").alias("bin_count"),
        col("rows"),
    ])
}

/// Columns `created_at`, `feature`, `bin_id`, `bin_count`, `proportion`, `rows`, sorted by feature, time and `bin_id`.
pub(super) fn frame(rows: DataFrame, query: &BinnedQuery) -> QueryResult<DataFrame> {
    let of_bin = vec![col("feature"), col("created_at")];
    let total = WindowFunction::new(sum_udaf(), vec![col("bin_count")]);
    let total = Expr::from(total).partition_by(of_bin).build()?.alias("total");
    let double = |name: &str| cast(col(name), DataType::Float64);
    counts(rows, query)?
        .window(vec![total])?
        .filter(col("total").not_eq(lit(0_i64)))?
        .select(vec![
            col("created_at"),
            col("feature"),
            col("bin_id"),
            col("bin_count"),
            (double("bin_count") / double("total")).alias("proportion"),
            col("rows"),
        ])?
        .sort(["feature", "created_at", "bin_id"].map(|name| col(name).sort(true, false)).to_vec())
}

/// Counts by `bin_id`.
pub(super) type Counts = BTreeMap<i32, i64>;

/// Those of a bin of time, and the rows that have told them.
pub(super) type Told = (Counts, i64);

/// Collects what [`counts`] describes, sorted by feature.
pub(super) async fn collect(counts: DataFrame) -> Result<Vec<FeatureBinProportions>> {
    let features = told(counts).await?.into_iter().map(|(feature, bins)| proportions_of(feature, bins));
    Ok(features.filter(|feature| !feature.created_at.is_empty()).collect())
}

/// What [`counts`] describes, by feature and time.
pub(super) async fn told(counts: DataFrame) -> Result<BTreeMap<String, BTreeMap<DateTime<Utc>, Told>>> {
    let mut found: BTreeMap<String, BTreeMap<DateTime<Utc>, Told>> = BTreeMap::new();
    each_batch(counts, "reading counts of bins", |batch| {
        let columns = Columns::of(batch);
        let (times, names) = (columns.times("created_at")?, columns.texts("feature")?);
        let (ids, [counts, rows]) = (columns.ints("bin_id")?, columns.all_longs(["bin_count", "rows"])?);
        for (row, (time, name)) in times.zip(names).enumerate() {
            let name = name.unwrap_or_default();
            if !found.contains_key(name) {
                found.insert(name.to_owned(), BTreeMap::new());
            }
            if let Some(feature) = found.get_mut(name) {
                let told = feature.entry(time).or_default();
                *told.0.entry(at(ids, row)).or_default() += at(counts, row);
                told.1 += at(rows, row);
            }
        }
        Ok(())
    })
    .await?;
    Ok(found)
}

fn proportions_of(feature: String, bins: BTreeMap<DateTime<Utc>, Told>) -> FeatureBinProportions {
    let mut found = FeatureBinProportions { feature, ..FeatureBinProportions::default() };
    let mut overall = Counts::new();
    for (time, (counts, rows)) in bins {
        for (id, count) in &counts {
            *overall.entry(*id).or_default() += count;
        }
        if let Some(proportions) = proportions(&counts) {
            found.created_at.push(time);
            found.bin_proportions.push(proportions);
            found.counts.push(counts.values().sum());
            found.rows.push(rows);
        }
    }
    found.overall_proportions = proportions(&overall).unwrap_or_default();
    found
}

/// `None` if the counts add up to 0.
fn proportions(counts: &Counts) -> Option<BTreeMap<i32, f64>> {
    let total: i64 = counts.values().sum();
    #[expect(clippy::cast_precision_loss, reason = "counts beyond 2^53 are rounded, as SQL does")]
    let part = |count: i64| count as f64 / total as f64;
    (total != 0).then(|| counts.iter().map(|(id, count)| (*id, part(*count))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overall_proportions_are_those_of_the_summed_counts() {
        let time = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        let bins = [
            (time(0), (Counts::from([(0, 1), (1, 1)]), 2)),
            (time(60), (Counts::from([(0, 0)]), 1)),
            (time(120), (Counts::from([(0, 6), (2, 2)]), 5)),
        ];
        let found = proportions_of("f".to_owned(), bins.into_iter().collect());
        assert_eq!(found.created_at, [time(0), time(120)]);
        assert_eq!(found.bin_proportions, [[(0, 0.5), (1, 0.5)].into(), [(0, 0.75), (2, 0.25)].into()]);
        assert_eq!(found.overall_proportions, [(0, 0.7), (1, 0.1), (2, 0.2)].into());
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "feature": "f",
                "created_at": ["1970-01-01T00:00:00Z", "1970-01-01T00:02:00Z"],
                "bin_proportions": [{"0": 0.5, "1": 0.5}, {"0": 0.75, "2": 0.25}],
                "overall_proportions": {"0": 0.7, "1": 0.1, "2": 0.2},
                "counts": [2, 8],
                "rows": [2, 5],
            })
        );
        assert_eq!(serde_json::from_value::<FeatureBinProportions>(json).unwrap(), found);
    }
}
