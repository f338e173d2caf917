//! Deletion of what is archived: SQL in `migrations/` decides and deletes, see there; here it is explained, called and
//! scheduled.

use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};
use crate::postgres::quote_literal;

/// A table of `highwater.retention`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    /// The drift table with its schema, as `highwater.watermark` has it.
    pub source_table: String,
    /// Its oid.
    pub oid: u32,
    /// How long its rows are kept, as PostgreSQL writes an interval.
    pub retention: String,
    /// When a purge of it last ran to its end.
    pub purged_at: Option<chrono::DateTime<chrono::Utc>>,
}

/// What there is to purge of a table, or of one of its partitions, and what stands in the way: a row of
/// `highwater.explain_purge()`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The drift table.
    pub source_table: String,
    /// `None` if it is about all of the table.
    pub partition: Option<String>,
    /// `drop` or `delete`; `None` if nothing can be done.
    pub action: Option<String>,
    /// Rows that are past retention.
    pub row_count: Option<i64>,
    /// How many of them can be deleted now.
    pub deletable: i64,
    /// What a partition takes on the server's disk.
    pub byte_count: Option<i64>,
    /// Why the others can't.
    pub blocked_by: Option<String>,
}

/// An entry of `highwater.purge_log`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Entry {
    /// Its number.
    pub id: i64,
    /// The drift table.
    pub source_table: String,
    /// `None` if all of the table was blocked.
    pub partition: Option<String>,
    /// `dropped`, `deleted` or `blocked`.
    pub action: String,
    /// Rows that are gone, or those that stay although they are past retention.
    pub row_count: Option<i64>,
    /// What was freed.
    pub byte_count: Option<i64>,
    /// Every deleted row is of an earlier transaction.
    pub horizon: Option<u64>,
    /// What stood in the way.
    pub reason: Option<String>,
}

/// The tables that are purged, by name.
///
/// # Errors
///
/// The query failed; `highwater setup` was not run since the last update.
pub async fn goals(client: &Client) -> Result<Vec<Goal>> {
    let query = "select r.source_table, w.table_oid, r.retention::text, r.purged_at
                 from highwater.retention r join highwater.watermark w using (source_table) order by 1";
    let of = |row: &Row| {
        Ok(Goal {
            source_table: row.try_get(0)?,
            oid: row.try_get(1)?,
            retention: row.try_get(2)?,
            purged_at: row.try_get(3)?,
        })
    };
    read(client, query, &[], of).await
}

/// What there is to purge now, of one table or of all, and what stands in the way. Counts rows if told to, which reads all
/// that is past retention; else estimates.
///
/// # Errors
///
/// The query failed.
pub async fn explain(client: &Client, table: Option<u32>, counts_rows: bool) -> Result<Vec<Finding>> {
    let query = "select * from highwater.explain_purge($1::oid::regclass, null, $2)";
    let of = |row: &Row| {
        Ok(Finding {
            source_table: row.try_get(0)?,
            partition: row.try_get(1)?,
            action: row.try_get(2)?,
            row_count: row.try_get(3)?,
            deletable: row.try_get(4)?,
            byte_count: row.try_get(5)?,
            blocked_by: row.try_get(6)?,
        })
    };
    read(client, query, &[&table, &counts_rows], of).await
}

/// The latest cutoff by which rows of a table were purged (all, or only those that were deleted one by one), in microseconds since the
/// epoch.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn cutoff(client: &Client, source_table: &str, one_by_one: bool) -> Result<Option<i64>> {
    let query = "select (extract(epoch from max(cutoff)) * 1000000)::bigint from highwater.purge_log
                 where source_table = $1 and (action = 'deleted' or (action = 'dropped' and not $2))";
    let row = client.query_one(query, &[&source_table, &one_by_one]).await;
    row.and_then(|row| row.try_get(0)).map_err(Error::sql("reading what was purged"))
}

/// Purges a table: drops partitions and deletes rows, committing in between. What stands in the way is in the log.
///
/// # Errors
///
/// The role is not the table's owner; or the server refused a step, and what was done before it stays done.
pub async fn purge(client: &Client, goal: &Goal) -> Result<()> {
    let query = "select current_user::text, pg_get_userbyid(c.relowner)::text from pg_class c
                 where c.oid = $1 and not has_table_privilege('highwater.purge_log', 'insert')";
    let failed = || Error::sql("looking whether the role may purge");
    if let Some(row) = client.query_opt(query, &[&goal.oid]).await.map_err(failed())? {
        let owner: String = row.try_get(1).map_err(failed())?;
        return Err(Error::Setting {
            setting: "the role that purges".to_owned(),
            value: row.try_get(0).map_err(failed())?,
            accepted: format!(
                "the owner of {} ({owner}), who alone may drop its partitions",
                goal.source_table
            ),
        });
    }
    // One statement by itself: a procedure that commits can't be part of a transaction.
    let call =
        format!("call highwater.purge({}::oid::regclass, {})", goal.oid, quote_literal(&goal.retention));
    client.batch_execute(&call).await.map_err(Error::sql(format!("purging {}", goal.source_table)))
}

/// The newest moment of the log, in the server's time: where [`log_since`] goes on.
///
/// # Errors
///
/// The query failed.
pub async fn log_end(client: &Client) -> Result<chrono::DateTime<chrono::Utc>> {
    let row = client.query_one("select clock_timestamp()", &[]).await;
    row.and_then(|row| row.try_get(0)).map_err(Error::sql("reading the server's clock"))
}

/// What there is to purge of a table, in short.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// How long rows are kept, as PostgreSQL writes an interval.
    pub retention: String,
    /// When a purge last ran to its end.
    pub purged_at: Option<String>,
    /// Partitions that can be dropped now, and what they take on the server's disk.
    pub deletable_partitions: u64,
    /// See `deletable_partitions`.
    pub deletable_bytes: i64,
    /// Rows that can be dropped or deleted now, as the planner expects.
    pub deletable_rows_estimate: i64,
    /// Partitions that are past retention, and can't be dropped.
    pub blocked_partitions: u64,
    /// Rows that are past retention, and can't be deleted, as the planner expects.
    pub blocked_rows_estimate: i64,
    /// Why the oldest of them can't.
    pub blocked_by: Option<String>,
}

/// Rows that the purge has removed so far, by table.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn purged_rows(client: &Client) -> Result<Vec<(String, i64)>> {
    let query = "select source_table, sum(row_count)::bigint from highwater.purge_log
                 where action in ('dropped', 'deleted') group by 1 order by 1";
    let of = |row: &Row| Ok((row.try_get(0)?, row.try_get::<_, Option<i64>>(1)?.unwrap_or_default()));
    read(client, query, &[], of).await
}

/// What there is to purge of each table, by name and without counting; nothing, if `highwater setup` was not run since the
/// last update.
///
/// # Errors
///
/// A query failed.
pub async fn summaries(client: &Client) -> Result<Vec<(String, Summary)>> {
    let query = "select to_regprocedure('highwater.explain_purge(regclass, interval, boolean)') is not null";
    let is_there = client.query_one(query, &[]).await.and_then(|row| row.try_get::<_, bool>(0));
    if !is_there.map_err(Error::sql("looking for the purge"))? {
        return Ok(Vec::new());
    }
    let findings = explain(client, None, false).await?;
    let summary = |goal: Goal| {
        let mut summary = Summary {
            retention: goal.retention,
            purged_at: goal.purged_at.map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)),
            deletable_partitions: 0,
            deletable_bytes: 0,
            deletable_rows_estimate: 0,
            blocked_partitions: 0,
            blocked_rows_estimate: 0,
            blocked_by: None,
        };
        for finding in findings.iter().filter(|finding| finding.source_table == goal.source_table) {
            let is_partition = finding.action.as_deref() != Some("delete") && finding.partition.is_some();
            summary.deletable_rows_estimate += finding.deletable;
            if let Some(why) = &finding.blocked_by {
                summary.blocked_partitions += u64::from(is_partition);
                summary.blocked_rows_estimate += finding.row_count.unwrap_or_default() - finding.deletable;
                summary.blocked_by.get_or_insert_with(|| match &finding.partition {
                    Some(partition) => format!("{partition}: {why}"),
                    None => why.clone(),
                });
            } else {
                summary.deletable_partitions += u64::from(is_partition);
                summary.deletable_bytes += finding.byte_count.unwrap_or_default();
            }
        }
        (goal.source_table, summary)
    };
    Ok(goals(client).await?.into_iter().map(summary).collect())
}

/// What the purge has logged of a table from a moment on, the oldest first.
///
/// # Errors
///
/// The query failed.
pub async fn log_since(
    client: &Client,
    source_table: &str,
    start: chrono::DateTime<chrono::Utc>,
) -> Result<Vec<Entry>> {
    let query =
        "select id, source_table, partition_name, action, row_count, byte_count, horizon::text, reason
                 from highwater.purge_log where source_table = $1 and last_at >= $2 order by last_at, id";
    let of = |row: &Row| {
        Ok(Entry {
            id: row.try_get(0)?,
            source_table: row.try_get(1)?,
            partition: row.try_get(2)?,
            action: row.try_get(3)?,
            row_count: row.try_get(4)?,
            byte_count: row.try_get(5)?,
            horizon: row.try_get::<_, Option<String>>(6)?.and_then(|text| text.parse().ok()),
            reason: row.try_get(7)?,
        })
    };
    read(client, query, &[&source_table, &start], of).await
}

async fn read<T>(
    client: &Client,
    query: &str,
    parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    of: impl Fn(&Row) -> Result<T, tokio_postgres::Error>,
) -> Result<Vec<T>> {
    let rows = client.query(query, parameters).await;
    rows.and_then(|rows| rows.iter().map(of).collect()).map_err(Error::sql("reading what there is to purge"))
}
