//! Binned questions of any table: what the values of a column are like in each bin, by what other columns say.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray};
use arrow::compute::cast as cast_array;
use arrow::datatypes::{DataType, Float64Type};
use chrono::{DateTime, Utc};
use datafusion::common::Column;
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions::core::expr_ext::FieldAccessor as _;
use datafusion::functions_aggregate::expr_fn::{count, max, min, sum};
use datafusion::logical_expr::{Expr, cast, lit, when};
use datafusion::prelude::SessionContext;
use serde::Serialize;

use super::Bins;
use super::columns::{Columns, each_batch};
use super::query::{is_within, range};
use super::stat::Stat;
use super::{quantile, sql};
use crate::moments;
use crate::tables::{ColumnSpec, ColumnType, Kind};
use crate::{Error, Result};

/// What is asked of a table: the values of one column with `start <= time < end`, in bins of time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableQuery {
    table: String,
    value: String,
    by: Vec<String>,
    equal: Vec<(String, String)>,
    condition: Option<String>,
    stats: Vec<Stat>,
    /// Microseconds since the epoch, and the first one after the last.
    range: (i64, i64),
    bins: Bins,
}

impl TableQuery {
    /// The means of a column's values, of all rows together.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if the range is empty or reversed.
    pub fn new(
        table: impl Into<String>,
        value: impl Into<String>,
        start: DateTime<Utc>,
        end: DateTime<Utc>,
        bins: Bins,
    ) -> Result<Self> {
        Ok(Self {
            table: table.into(),
            value: value.into(),
            by: Vec::new(),
            equal: Vec::new(),
            condition: None,
            stats: vec![Stat::Mean],
            range: range(start, end)?,
            bins,
        })
    }

    /// The same for each combination of values of these columns.
    #[must_use]
    pub fn by(mut self, columns: impl IntoIterator<Item = String>) -> Self {
        self.by = columns.into_iter().collect();
        self
    }

    /// The same of the rows whose column, a text, is this; of those for which all such conditions are true.
    #[must_use]
    pub fn equal(mut self, column: impl Into<String>, text: impl Into<String>) -> Self {
        self.equal.push((column.into(), text.into()));
        self
    }

    /// The same of the rows for which a condition in SQL (DataFusion's dialect, over the table's columns) is true.
    #[must_use]
    pub fn only(mut self, condition: impl Into<String>) -> Self {
        self.condition = Some(condition.into());
        self
    }

    /// With these in the answer, each once; none are the mean.
    #[must_use]
    pub fn stats(mut self, stats: impl IntoIterator<Item = Stat>) -> Self {
        self.stats.clear();
        for stat in stats {
            if !self.stats.contains(&stat) {
                self.stats.push(stat);
            }
        }
        if self.stats.is_empty() {
            self.stats.push(Stat::Mean);
        }
        self
    }

    /// The table.
    #[must_use]
    pub fn table(&self) -> &str {
        &self.table
    }

    /// The column of the values.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
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

    /// What of the values, in the order of the answer's columns.
    #[must_use]
    pub fn asked(&self) -> &[Stat] {
        &self.stats
    }

    fn wrong(detail: String) -> Error {
        Error::Query { detail }
    }

    fn column(&self, kind: Kind, name: &str) -> Result<&'static ColumnSpec> {
        kind.columns().iter().find(|column| column.name == name).ok_or_else(|| {
            let names: Vec<&str> = kind.columns().iter().map(|column| column.name.as_str()).collect();
            Self::wrong(format!("{} has no column {name:?}; it has {}", self.table, names.join(", ")))
        })
    }

    /// Makes sure that the table can answer it.
    fn check(&self, kind: Kind) -> Result<&'static ColumnSpec> {
        let value = self.column(kind, &self.value)?;
        for by in &self.by {
            let is_taken = self.stats.iter().any(|stat| stat.name() == *by) || kind.time_column() == by;
            if is_taken || self.by.iter().filter(|other| *other == by).count() > 1 {
                return Err(Self::wrong(format!("the answer would have two columns {by:?}")));
            }
            self.column(kind, by)?;
        }
        let is_number = !matches!(
            value.column_type,
            ColumnType::Timestamp | ColumnType::String | ColumnType::Date | ColumnType::Binary
        );
        match self
            .stats
            .iter()
            .find(|stat| matches!(stat, Stat::Mean | Stat::Sum | Stat::Quantile(_)) && !is_number)
        {
            None => Ok(value),
            Some(stat) => Err(Self::wrong(format!(
                "there is no {} of {}, which holds no numbers; min, max and count there are",
                stat.name(),
                self.value
            ))),
        }
    }
}

/// The rows that the query's condition lets through.
pub(super) async fn chosen(
    session: &SessionContext,
    kind: Kind,
    rows: DataFrame,
    query: &TableQuery,
) -> Result<DataFrame> {
    let failed = |error| Error::asked("planning the condition")(error);
    let only = |rows: DataFrame| {
        query.equal.iter().try_fold(rows, |rows, (column, text)| {
            query.column(kind, column)?;
            rows.filter(Expr::Column(Column::new_unqualified(column)).eq(lit(text))).map_err(failed)
        })
    };
    let Some(condition) = &query.condition else { return only(rows) };
    // On a line of its own, should it end in a comment. It is one condition and no more only if it is one by itself.
    let text = format!("select * from \"{}\" where ((\n{condition}\n))", kind.name().replace('"', "\"\""));
    let plan = sql::plan(session, &text).await?;
    rows.parse_sql_expr(condition).map_err(failed)?;
    only(session.execute_logical_plan(plan).await.map_err(failed)?)
}

/// Columns: the start of the bin under the name of the table's time, those of `by`, and a column for each of the query's stats; sorted
/// by the columns of `by`, then by time. A bin without rows is left out.
pub(super) fn frame(kind: Kind, rows: DataFrame, query: &TableQuery) -> Result<DataFrame> {
    let column = |name: &str| Expr::Column(Column::new_unqualified(name));
    let spec = query.check(kind)?;
    let value = || match spec.column_type {
        ColumnType::Boolean => cast(column(&query.value), DataType::Int64),
        _ => column(&query.value),
    };
    let aggregate = |stat: &Stat| {
        let aggregate = match (stat, spec.column_type) {
            // Decimals would be cut to a few digits more than they have.
            (Stat::Mean, _) | (Stat::Sum, ColumnType::Double) => {
                moments::moments(cast(value(), DataType::Float64))
            }
            // 64 bits may be too few.
            (Stat::Sum, ColumnType::Int | ColumnType::Long) => {
                sum(cast(value(), DataType::Decimal128(38, 0)))
            }
            (Stat::Sum, _) => sum(value()),
            (Stat::Min, _) => min(column(&query.value)),
            (Stat::Max, _) => max(column(&query.value)),
            (Stat::Count, _) => count(value()),
            (Stat::Quantile(_), _) => quantile::values(cast(value(), DataType::Float64)),
        };
        aggregate.alias(stat.name())
    };
    // Of no value there is no mean and no sum.
    let of_moments = |stat: &Stat, part: &str| {
        let summary = || moments::summary(column(&stat.name()));
        when(summary().field("count").gt(lit(0_i64)), summary().field(part)).end()
    };
    let stat = |stat: &Stat| {
        let answer = match (stat, spec.column_type) {
            (Stat::Mean, _) => of_moments(stat, "mean")?,
            (Stat::Sum, ColumnType::Double) => of_moments(stat, "sum")?,
            (Stat::Quantile(of), _) => quantile::quantile(*of, column(&stat.name())),
            _ => column(&stat.name()),
        };
        Ok(answer.alias(stat.name()))
    };
    let time = kind.time_column();
    let mut keys = vec![query.bins.start_expr(column(time)).alias(time)];
    keys.extend(query.by.iter().map(|name| column(name)));
    let names = [time].into_iter().chain(query.by.iter().map(String::as_str));
    let answers = names.map(|name| Ok(column(name))).chain(query.stats.iter().map(stat));
    let sorted = query.by.iter().map(String::as_str).chain([time]);
    let sorted = sorted.map(|name| column(name).sort(true, false)).collect();
    let planned = rows
        .filter(is_within(time, query.range))
        .and_then(|rows| rows.aggregate(keys, query.stats.iter().map(aggregate).collect()))
        .and_then(|rows| rows.select(answers.collect::<QueryResult<Vec<_>>>()?))
        .and_then(|rows| rows.sort(sorted));
    planned.map_err(Error::query(format!("preparing to read {}", kind.name())))
}

/// The values of a column over time, for each combination of what other columns say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TableBins {
    /// The table.
    pub table: String,
    /// The column of the values.
    pub value: String,
    /// In the order of what they are of.
    pub series: Vec<TableSeries>,
}

/// One of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TableSeries {
    /// What the columns of `by` say, as text; `None` for a null.
    pub by: Vec<Option<String>>,
    /// Starts of the bins that have rows, ascending.
    pub created_at: Vec<DateTime<Utc>>,
    /// The stats by their names, as numbers: a value for each bin, `None` where all values are null.
    pub stats: BTreeMap<String, Vec<Option<f64>>>,
}

/// Collects what [`frame`] describes.
pub(super) async fn collect(kind: Kind, frame: DataFrame, query: &TableQuery) -> Result<TableBins> {
    let mut series: Vec<TableSeries> = Vec::new();
    each_batch(frame, "reading bins", |batch| {
        let of = |name: &str, data_type: &DataType| {
            let column = batch.column_by_name(name);
            let column = column.map(|column| cast_array(column, data_type)).transpose();
            column.ok().flatten().ok_or_else(|| {
                TableQuery::wrong(format!(
                    "{name} of {} is no number; the answer's rows have it",
                    query.value
                ))
            })
        };
        let times = Columns::of(batch).times(kind.time_column())?;
        let by = query.by.iter().map(|name| of(name, &DataType::Utf8)).collect::<Result<Vec<_>>>()?;
        let stats = query.stats.iter().map(|stat| Ok((stat.name(), of(&stat.name(), &DataType::Float64)?)));
        let stats = stats.collect::<Result<Vec<_>>>()?;
        for (row, time) in times.enumerate() {
            let text = |texts: &arrow::array::ArrayRef| {
                let texts = texts.as_string_opt::<i32>()?;
                texts.is_valid(row).then(|| texts.value(row).to_owned())
            };
            let by: Vec<Option<String>> = by.iter().map(text).collect();
            if series.last().is_none_or(|last| last.by != by) {
                series.push(TableSeries { by, ..TableSeries::default() });
            }
            let Some(last) = series.last_mut() else { continue };
            last.created_at.push(time);
            for (name, values) in &stats {
                let values = values.as_primitive_opt::<Float64Type>();
                let value = values.filter(|values| values.is_valid(row)).map(|values| values.value(row));
                last.stats.entry(name.clone()).or_default().push(value);
            }
        }
        Ok(())
    })
    .await?;
    Ok(TableBins { table: query.table.clone(), value: query.value.clone(), series })
}
