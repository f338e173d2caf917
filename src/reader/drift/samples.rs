//! What of a query's rows is compared: a sample of each series and bin.

use std::collections::BTreeMap;

use arrow::array::AsArray as _;
use datafusion::logical_expr::col;

use super::Measure;
use super::measures::Sample;
use crate::moments::{self, Moments};
use crate::reader::columns::{Columns, each_batch};
use crate::reader::query::series;
use crate::reader::version::planning;
use crate::reader::{Archive, BinnedQuery, psi};
use crate::tables::Kind;
use crate::{Error, Result};

/// By series, and by the start of their bin.
pub(super) type Series = BTreeMap<String, BTreeMap<i64, Sample>>;

/// The most values that are held in memory to be compared, eight bytes each.
const VALUES_MAX: usize = 20_000_000;

/// Where samples come from.
pub(super) struct Source<'a> {
    pub(super) archive: &'a Archive,
    pub(super) kind: Kind,
    pub(super) measure: Measure,
}

impl Source<'_> {
    pub(super) async fn samples(&self, query: &BinnedQuery) -> Result<Series> {
        let rows = self.archive.rows(self.kind, query).await?;
        if self.kind == Kind::psi() {
            let told = psi::told(psi::counts(rows, query).map_err(planning(self.kind))?).await?;
            let counts = |(time, told): (chrono::DateTime<chrono::Utc>, psi::Told)| {
                (time.timestamp_micros(), Sample::Counts(told.0))
            };
            return Ok(told
                .into_iter()
                .map(|(name, bins)| (name, bins.into_iter().map(counts).collect()))
                .collect());
        }
        let keys = vec![query.bin().alias("created_at"), plain_series(self.kind).alias("series")];
        if self.measure == Measure::Ks {
            let rows = rows
                .filter(col("value").is_not_null())
                .and_then(|rows| rows.select(keys.into_iter().chain([col("value")]).collect::<Vec<_>>()));
            return values(rows.map_err(planning(self.kind))?).await;
        }
        let rows = rows.aggregate(keys, vec![moments::moments(col("value")).alias("moments")]);
        moments_of(rows.map_err(planning(self.kind))?).await
    }
}

fn plain_series(kind: Kind) -> datafusion::logical_expr::Expr {
    datafusion::logical_expr::cast(series(kind), arrow::datatypes::DataType::Utf8)
}

async fn moments_of(rows: datafusion::dataframe::DataFrame) -> Result<Series> {
    let mut found = Series::new();
    each_batch(rows, "reading what is compared", |batch| {
        let columns = Columns::of(batch);
        let moments = batch.column_by_name("moments").and_then(|column| column.as_binary_opt::<i32>());
        let moments = moments.ok_or_else(|| Error::Internal("a query's result lacks moments".to_owned()))?;
        for ((time, name), bytes) in columns.times("created_at")?.zip(columns.texts("series")?).zip(moments) {
            let read = bytes.and_then(Moments::read);
            let moments =
                read.ok_or_else(|| Error::Internal("bytes that should be moments are none".to_owned()))?;
            // A bin of nulls alone is none.
            if moments.count() > 0 {
                let bins = found.entry(name.unwrap_or_default().to_owned()).or_default();
                bins.insert(time.timestamp_micros(), Sample::Moments(Box::new(moments)));
            }
        }
        Ok(())
    })
    .await?;
    Ok(found)
}

async fn values(rows: datafusion::dataframe::DataFrame) -> Result<Series> {
    let (mut found, mut count) = (Series::new(), 0_usize);
    each_batch(rows, "reading the values that are compared", |batch| {
        count += batch.num_rows();
        if count > VALUES_MAX {
            let detail = format!(
                "there are more than {VALUES_MAX} values to compare: ask for a shorter range, or for smd"
            );
            return Err(Error::Query { detail });
        }
        let columns = Columns::of(batch);
        let names = columns.times("created_at")?.zip(columns.texts("series")?);
        for ((time, name), value) in names.zip(columns.doubles("value")?) {
            if !found.contains_key(name.unwrap_or_default()) {
                found.insert(name.unwrap_or_default().to_owned(), BTreeMap::new());
            }
            let bins = found.get_mut(name.unwrap_or_default());
            let bin = bins.map(|bins| {
                bins.entry(time.timestamp_micros()).or_insert_with(|| Sample::Values(Vec::new()))
            });
            // NaN has no place in an order.
            if let Some(Sample::Values(values)) = bin.filter(|_| !value.is_nan()) {
                values.push(*value);
            }
        }
        Ok(())
    })
    .await?;
    for sample in found.values_mut().flat_map(BTreeMap::values_mut) {
        sample.settle();
    }
    Ok(found)
}
