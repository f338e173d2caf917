use arrow::datatypes::DataType;
use chrono::{DateTime, SecondsFormat, Utc};
use datafusion::common::{Column, ScalarValue};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions::core::expr_ext::FieldAccessor as _;
use datafusion::functions::core::expr_fn::coalesce;
use datafusion::logical_expr::{Expr, cast, col, lit};

use super::Bins;
use crate::moments;
use crate::tables::{Entity, Kind};
use crate::{Error, Result};

/// What a binned query asks for: the rows of one entity with `start <= created_at < end`, in bins of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BinnedQuery {
    entity: Entity,
    /// Microseconds since the epoch, and the first one after the last.
    range: (i64, i64),
    bins: Bins,
    series: Vec<String>,
}

impl BinnedQuery {
    /// A query for all metrics (or features) of an entity. A range without rows is no error.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the range is empty or reversed.
    pub fn new(entity: Entity, start: DateTime<Utc>, end: DateTime<Utc>, bins: Bins) -> Result<Self> {
        Ok(Self { entity, range: range(start, end)?, bins, series: Vec::new() })
    }

    /// The same in the shortest round bins of which there are at most `points_max`: what a server does that is asked for
    /// so many points of a plot.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the range is empty or reversed, or `points_max` too small.
    pub fn with_points(
        entity: Entity,
        start: DateTime<Utc>,
        end: DateTime<Utc>,
        points_max: u32,
    ) -> Result<Self> {
        let range = range(start, end)?;
        let bins = Bins::at_most(points_max, range.0, range.1)?;
        Ok(Self { entity, range, bins, series: Vec::new() })
    }

    /// The same for these metrics (or features) only; for all of them if there are none.
    #[must_use]
    pub fn of_series(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.series = names.into_iter().collect();
        self
    }

    /// The same of another range.
    pub(super) fn within(&self, start: DateTime<Utc>, end: DateTime<Utc>) -> Result<Self> {
        Ok(Self { range: range(start, end)?, ..self.clone() })
    }

    /// The same of another entity.
    pub(super) fn of_entity(self, entity: Entity) -> Self {
        Self { entity, ..self }
    }

    /// The entity.
    #[must_use]
    pub const fn entity(&self) -> &Entity {
        &self.entity
    }

    /// Its bins.
    #[must_use]
    pub const fn bins(&self) -> Bins {
        self.bins
    }

    /// First microsecond since the epoch, and the first one after the last.
    #[must_use]
    pub const fn range(&self) -> (i64, i64) {
        self.range
    }

    /// The condition for a row of the kind.
    pub(super) fn condition(&self, kind: Kind) -> Expr {
        let is_wanted = is_of(&self.entity).and(is_within("created_at", self.range));
        if self.series.is_empty() {
            return is_wanted;
        }
        is_wanted.and(series(kind).in_list(self.series.iter().map(lit).collect(), false))
    }

    /// The start of a row's bin.
    pub(super) fn bin(&self) -> Expr {
        self.bins.start_expr(col("created_at"))
    }
}

/// The name of a row's metric or feature; that of a row without one is empty.
pub(super) fn series(kind: Kind) -> Expr {
    if kind == Kind::custom() {
        return col("metric");
    }
    // Of SPC rows it may be null.
    coalesce(vec![col("feature"), lit("")])
}

/// The moments of each group's values, as columns `count`, `nulls`, `nans`, `sum`, `mean`, `stddev`, `min`, `max` beside the keys, which have
/// names. A group without values is left out.
pub(super) fn summed_up(rows: DataFrame, keys: Vec<Expr>) -> QueryResult<DataFrame> {
    let names: Vec<Expr> = keys.iter().map(|key| col(key.qualified_name().1)).collect();
    let bins = rows.aggregate(keys, vec![moments::moments(col("value")).alias("moments")])?;
    let summary = moments::summary(col("moments")).alias("summary");
    let parts = moments::PARTS.map(|part| col("summary").field(part).alias(part));
    bins.select(names.iter().cloned().chain([summary]).collect::<Vec<_>>())?
        .select(names.into_iter().chain(parts).collect::<Vec<_>>())?
        .filter(col("count").gt(lit(0_i64)))
}

/// A column of names as plain texts, which every client reads; in the scan they are views.
pub(super) fn plain(name: &str) -> Expr {
    cast(col(name), DataType::Utf8)
}

/// The condition for a time, in microseconds since the epoch: the first one, and the one after the last.
pub(super) fn is_within(column: &str, (start, end): (i64, i64)) -> Expr {
    let time = |micros| lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())));
    let column = || Expr::Column(Column::new_unqualified(column));
    column().gt_eq(time(start)).and(column().lt(time(end)))
}

/// The condition for a row of the entity.
pub(super) fn is_of(entity: &Entity) -> Expr {
    col("space")
        .eq(lit(&entity.space))
        .and(col("name").eq(lit(&entity.name)))
        .and(col("version").eq(lit(&entity.version)))
}

/// The range of the times from `start` up to `end`, in microseconds since the epoch.
pub(super) fn range(start: DateTime<Utc>, end: DateTime<Utc>) -> Result<(i64, i64)> {
    if start < end {
        return Ok((ceil_micros(start), ceil_micros(end)));
    }
    let text = |time: DateTime<Utc>| time.to_rfc3339_opts(SecondsFormat::AutoSi, true);
    Err(Error::Query {
        detail: format!("the range ends at {}, but must end after its start, {}", text(end), text(start)),
    })
}

/// The first whole microsecond at or after a time: rows have no finer times, so both ends mean the same by it.
fn ceil_micros(time: DateTime<Utc>) -> i64 {
    time.timestamp_micros() + i64::from(!time.timestamp_subsec_nanos().is_multiple_of(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(start: &str, end: &str) -> Result<BinnedQuery> {
        let entity = Entity { space: "s".into(), name: "n".into(), version: "1".into() };
        let bins = Bins::from_minutes(1.0)?;
        BinnedQuery::new(entity, start.parse().unwrap(), end.parse().unwrap(), bins)
    }

    #[test]
    fn a_range_must_not_be_reversed_or_empty() {
        for (start, end) in [
            ("2026-11-22T00:00:00Z", "2026-11-22T00:00:00Z"),
            ("2026-11-22T00:00:01Z", "2026-11-22T00:00:00Z"),
        ] {
            let text = query(start, end).unwrap_err().to_string();
            assert_eq!(text, format!("the range ends at {end}, but must end after its start, {start}"));
        }
    }

    #[test]
    fn parts_of_a_microsecond_are_rounded_up_at_both_ends() {
        let found = query("1970-01-01T00:00:00.000000001Z", "1970-01-01T00:00:00.000001001Z").unwrap();
        assert_eq!(found.range(), (1, 2));
        let before = query("1969-12-31T23:59:59.999999001Z", "1970-01-01T00:00:00Z").unwrap();
        assert_eq!(before.range(), (0, 0));
    }
}
