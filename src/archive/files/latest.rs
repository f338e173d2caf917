//! The newest version of each row, of a table that keeps versions.
//!
//! All versions of a row are of one time, so those of a range of time can be looked at alone.

use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::common::{Column, ScalarValue};
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as QueryResult;
use datafusion::functions::unicode::expr_fn::strpos;
use datafusion::functions_aggregate::expr_fn::last_value;
use datafusion::logical_expr::{BinaryExpr, Expr, Operator, SortExpr, lit};
use futures::TryStreamExt;

use super::scan::{MEMORY_BYTES, Scan, runtime, session};
use super::table_file::TableFile;
use crate::archive::store::storage::Storage;
use crate::lsn::Lsn;
use crate::tables::{CHANGE, Change, ColumnSpec, ColumnType, Kind, LSN, SEQUENCE, UNCHANGED};
use crate::{Error, Result};

/// A column by its very name.
fn column(name: &str) -> Expr {
    Expr::Column(Column::new_unqualified(name))
}

/// The newest version of each row that has not been deleted, with all of the kind's columns; a value that the server did not send is that
/// of the version before. Rows of a kind that keeps no versions are as they are.
pub(crate) fn latest(kind: Kind, rows: DataFrame) -> QueryResult<DataFrame> {
    if !kind.keeps_versions() {
        return Ok(rows);
    }
    let is_key = |name: &str| name == kind.time_column() || kind.row_key().iter().any(|key| key == name);
    let (keys, others): (Vec<&ColumnSpec>, Vec<&ColumnSpec>) =
        kind.columns().iter().partition(|spec| is_key(&spec.name));
    let keys = keys.into_iter().map(|spec| column(&spec.name)).collect();
    let newest = others.into_iter().map(newest).collect();
    let names: Vec<Expr> = kind.columns().iter().map(|spec| column(&spec.name)).collect();
    rows.aggregate(keys, newest)?.filter(column(CHANGE).not_eq(lit(Change::Delete.name())))?.select(names)
}

/// The value of a column in the newest version that has one.
fn newest(spec: &ColumnSpec) -> Expr {
    // Others are never stored out of line.
    let may_be_left_out = spec.source_type.is_some()
        && matches!(spec.column_type, ColumnType::String | ColumnType::Binary | ColumnType::Decimal { .. });
    let joined = |left: Expr, right: Expr| {
        Expr::BinaryExpr(BinaryExpr::new(Box::new(left), Operator::StringConcat, Box::new(right)))
    };
    let names = joined(joined(lit(","), column(UNCHANGED)), lit(","));
    let was_sent =
        column(UNCHANGED).is_null().or(strpos(names, lit(format!(",{},", spec.name))).eq(lit(0_i32)));
    // An order rather than a filter, which DataFusion 55 loses where parts of the rows are put together.
    let order = may_be_left_out.then_some(was_sent).into_iter().chain([column(LSN), column(SEQUENCE)]);
    let order = order.map(|key| SortExpr::new(key, true, true)).collect();
    last_value(column(&spec.name), order).alias(&spec.name)
}

/// The condition that a version was committed before a position of the log, or copied at an earlier one.
pub(super) fn is_before(lsn: Lsn) -> Expr {
    column(LSN).lt(lit(i64::try_from(lsn.0).unwrap_or(i64::MAX)))
}

/// The condition that a row's time is in one of these ranges (microseconds since the epoch, the first and the one after the last).
pub(super) fn is_within(kind: Kind, ranges: &[(i64, i64)]) -> Expr {
    let time = |micros| lit(ScalarValue::TimestampMicrosecond(Some(micros), Some("UTC".into())));
    let within = |(start, end): &(i64, i64)| {
        let at = || column(kind.time_column());
        at().gt_eq(time(*start)).and(at().lt(time(*end)))
    };
    ranges.iter().map(within).reduce(Expr::or).unwrap_or_else(|| lit(false))
}

/// Hands to `seen`, batch by batch, the newest versions before `before` (`None`: of all) of the rows of these files (of one version of a
/// table) whose time is in one of the ranges.
pub(super) async fn each_latest(
    storage: &Storage,
    kind: Kind,
    files: &[&TableFile],
    ranges: &[(i64, i64)],
    before: Option<Lsn>,
    mut seen: impl FnMut(&RecordBatch) -> Result<()>,
) -> Result<()> {
    let failed = || Error::query(format!("reading the newest rows of {}", storage.table_url(kind)));
    let session = session(runtime(storage, MEMORY_BYTES).map_err(failed())?, MEMORY_BYTES);
    let scan = Scan::new(kind, files.iter().copied()).map_err(failed())?;
    let wanted = is_within(kind, ranges);
    let wanted = before.map_or(wanted.clone(), |lsn| wanted.and(is_before(lsn)));
    let rows = session.read_table(Arc::new(scan)).and_then(|rows| rows.filter(wanted));
    let rows = rows.and_then(|rows| latest(kind, rows)).map_err(failed())?;
    let mut batches = rows.execute_stream().await.map_err(failed())?;
    while let Some(batch) = batches.try_next().await.map_err(failed())? {
        seen(&batch)?;
    }
    Ok(())
}
