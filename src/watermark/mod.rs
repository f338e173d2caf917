//! The watermark rows in Postgres: a mirror of the archive's logs, for the purge and for people.
//!
//! # The horizon
//!
//! `archived_before` tells the purge, by transaction id, what the archive holds. To move it, one statement
//! reads `pg_snapshot_xmin(pg_current_snapshot())` and *then* `pg_current_wal_insert_lsn()`. Every
//! transaction below that xmin had ended when it was read, so its commit record lies before the position that
//! was read after it; once everything before that position is durable, all of them are. A row's `xmin` may be
//! a subtransaction's id, which no snapshot lists; but a subtransaction's id is above its parent's, so
//! comparing with a snapshot's xmin stays right.

mod entity;
mod foreign;
mod gap;
mod verified;

use chrono::{DateTime, Utc};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row};

use entity::Spans;
pub use entity::{EntityWatermark, add_entities, count_removed, entity_row_count, read_entities, recount};
pub use foreign::{
    ArchiveLog, Removal, Void, note_removal, read_archive_logs, set_looked, set_noted, void_partitions,
};
pub use gap::{
    Unpublished, accept, archived_root, mark_gap, mark_one_gap, mark_table_gap, mark_unpublished, rebase,
    resync, table_oid, unpublished,
};
pub use verified::{Verified, forget_verified, record_verified, set_lacking};

use crate::archive::Totals;
use crate::batch::EntitySpan;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::tables::Kind;

/// Whether the archive of a table is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Rows from before the slot are being copied.
    Snapshot,
    /// Every row is archived or still to come.
    Streaming,
    /// Rows may have been skipped.
    Gap,
}

impl State {
    /// The state as `highwater.watermark.state` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Streaming => "streaming",
            Self::Gap => "gap",
        }
    }

    fn parse(text: &str) -> Result<Self> {
        [Self::Snapshot, Self::Streaming, Self::Gap]
            .into_iter()
            .find(|state| state.name() == text)
            .ok_or_else(|| Error::Internal(format!("highwater.watermark has the unknown state {text:?}")))
    }
}

/// One row of `highwater.watermark`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// The archived table with its schema, as `schema.table`.
    pub source_table: String,
    /// The kind of its rows.
    pub kind: String,
    /// The slot that feeds it.
    pub slot_name: String,
    /// The cluster that the slot belongs to.
    pub system_identifier: String,
    /// The timeline that `flushed_lsn` belongs to.
    pub timeline_id: i32,
    /// Whether its archive is complete.
    pub state: State,
    /// Every transaction whose commit record begins before this is archived.
    pub flushed_lsn: Lsn,
    /// Every transaction with a smaller id is archived; 64 bits wide.
    pub archived_before: Option<u64>,
    /// The newest `created_at` in the archive.
    pub max_created_at: Option<DateTime<Utc>>,
    /// Rows in the archive.
    pub row_count: i64,
    /// Files that hold them.
    pub file_count: i64,
    /// Size of those files.
    pub byte_count: i64,
    /// When the row was written.
    pub updated_at: DateTime<Utc>,
    /// How often a gap was found.
    pub gap_count: i64,
    /// Marks of copies up to this transaction are void.
    pub marks_void_upto: Option<u64>,
    /// Surplus copies of rows that were ever removed from the archive.
    pub doubles_removed: i64,
    /// The column of the table that says when a row is of.
    pub time_column: String,
}

/// A move of the watermark of some tables.
#[derive(Debug)]
pub struct Advance<'a> {
    /// The position that they reach.
    pub lsn: Lsn,
    /// The horizon to publish, if one has been passed.
    pub archived_before: Option<u64>,
    /// The tables with what their archives hold now.
    pub tables: &'a [(String, Totals)],
    /// What the archive holds more than at the last move: table and entity.
    pub spans: &'a [(String, EntitySpan)],
}

/// A transaction id and the position after which everything below it is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Horizon {
    /// Transactions with a smaller id had ended.
    pub xmin: u64,
    /// Their commit records lie before this.
    pub lsn: Lsn,
}

/// The name of a kind's drift table, as `highwater.watermark.source_table` has it.
#[must_use]
pub fn source_table(schema: &str, kind: Kind) -> Option<String> {
    kind.source_table(schema)
}

/// Makes sure that the watermarks can be written, without writing them.
///
/// # Errors
///
/// They can't: the role may not, the session is read-only, or somebody holds a lock.
pub(crate) async fn can_be_moved(client: &Client, slot: &str) -> Result<()> {
    let query = "select from highwater.watermark where slot_name = $1 for update";
    client.query(query, &[&slot]).await.map_err(Error::sql("preparing to write the watermarks")).map(drop)
}

/// Reads every watermark, by table name.
///
/// # Errors
///
/// The query failed; before `highwater setup` has run, because the table is not there.
pub async fn read(client: &Client) -> Result<Vec<Watermark>> {
    let rows = client
        .query(
            "select source_table, kind, slot_name, system_identifier, timeline_id, state, flushed_lsn,
                    archived_before::text, max_created_at, row_count, file_count, byte_count, updated_at, gap_count,
                    marks_void_upto::text, doubles_removed, time_column::text
             from highwater.watermark order by source_table",
            &[],
        )
        .await
        .map_err(Error::sql("reading highwater.watermark"))?;
    rows.iter().map(watermark).collect()
}

fn watermark(row: &Row) -> Result<Watermark> {
    let column = "reading a row of highwater.watermark";
    let lsn: PgLsn = row.try_get("flushed_lsn").map_err(Error::sql(column))?;
    let state: String = row.try_get("state").map_err(Error::sql(column))?;
    let xid = |name: &str| {
        let text: Option<String> = row.try_get(name).map_err(Error::sql(column))?;
        text.map(|text| parse_xid(&text)).transpose()
    };
    Ok(Watermark {
        source_table: row.try_get("source_table").map_err(Error::sql(column))?,
        kind: row.try_get("kind").map_err(Error::sql(column))?,
        slot_name: row.try_get("slot_name").map_err(Error::sql(column))?,
        system_identifier: row.try_get("system_identifier").map_err(Error::sql(column))?,
        timeline_id: row.try_get("timeline_id").map_err(Error::sql(column))?,
        state: State::parse(&state)?,
        flushed_lsn: Lsn(lsn.into()),
        archived_before: xid("archived_before")?,
        max_created_at: row.try_get("max_created_at").map_err(Error::sql(column))?,
        row_count: row.try_get("row_count").map_err(Error::sql(column))?,
        file_count: row.try_get("file_count").map_err(Error::sql(column))?,
        byte_count: row.try_get("byte_count").map_err(Error::sql(column))?,
        updated_at: row.try_get("updated_at").map_err(Error::sql(column))?,
        gap_count: row.try_get("gap_count").map_err(Error::sql(column))?,
        marks_void_upto: xid("marks_void_upto")?,
        doubles_removed: row.try_get("doubles_removed").map_err(Error::sql(column))?,
        time_column: row.try_get("time_column").map_err(Error::sql(column))?,
    })
}

fn parse_xid(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::Internal(format!("{text:?} is not a transaction id")))
}

/// What a new watermark row says.
#[derive(Clone, Copy, Debug)]
pub struct NewWatermark<'a> {
    /// The drift table as `schema.table`.
    pub source_table: &'a str,
    /// Its oid.
    pub table_oid: u32,
    /// The kind of its rows.
    pub kind: Kind,
    /// The slot that feeds it.
    pub slot: &'a str,
    /// The cluster that the slot belongs to.
    pub system_identifier: &'a str,
    /// The cluster's timeline.
    pub timeline_id: i32,
    /// Whether rows from before the slot are missing.
    pub state: State,
    /// Where the slot stands.
    pub lsn: Lsn,
}

/// Makes the row of a newly archived table; one that is there is left as it is. Returns whether it was made.
///
/// # Errors
///
/// The statement failed.
pub async fn create(client: &impl tokio_postgres::GenericClient, new: &NewWatermark<'_>) -> Result<bool> {
    let made = client
        .execute(
            "insert into highwater.watermark
                 (source_table, table_oid, kind, slot_name, system_identifier, timeline_id, state, flushed_lsn, time_column,
                  keeps_versions)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9::text, $10) on conflict (source_table) do nothing",
            &[
                &new.source_table,
                &new.table_oid,
                &new.kind.name(),
                &new.slot,
                &new.system_identifier,
                &new.timeline_id,
                &new.state.name(),
                &PgLsn::from(new.lsn.0),
                &new.kind.time_column(),
                &new.kind.keeps_versions(),
            ],
        )
        .await
        .map_err(Error::sql(format!("making the watermark of {}", new.source_table)))?;
    Ok(made > 0)
}

/// Takes note of the timeline that the slot's positions belong to from now on.
///
/// # Errors
///
/// The statement failed.
pub async fn set_timeline(client: &Client, slot: &str, timeline_id: i32) -> Result<()> {
    let statement =
        "update highwater.watermark set timeline_id = $2 where slot_name = $1 and timeline_id <> $2";
    let context = "writing the timeline";
    client.execute(statement, &[&slot, &timeline_id]).await.map_err(Error::sql(context)).map(drop)
}

/// The rows of a slot's tables that are asked for, by `schema.table` or `table`; all if none is.
///
/// # Errors
///
/// [`Error::Slot`] if no table is archived through the slot, [`Error::Setting`] if one that is asked for is not.
pub fn choose(watermarks: Vec<Watermark>, slot: &str, asked: &[String]) -> Result<Vec<Watermark>> {
    let mut rows: Vec<Watermark> = watermarks.into_iter().filter(|row| row.slot_name == slot).collect();
    if rows.is_empty() {
        let detail = "no table is archived through it; run `highwater setup`".to_owned();
        return Err(Error::Slot { slot: slot.to_owned(), detail, transient: false });
    }
    let is_called = |row: &Watermark, name: &str| {
        row.source_table == name || row.source_table.split_once('.').is_some_and(|(_, table)| table == name)
    };
    if let Some(unknown) = asked.iter().find(|name| !rows.iter().any(|row| is_called(row, name))) {
        let known: Vec<&str> = rows.iter().map(|row| row.source_table.as_str()).collect();
        return Err(Error::Setting {
            setting: "the table".to_owned(),
            value: unknown.clone(),
            accepted: format!("an archived one: {}", known.join(", ")),
        });
    }
    rows.retain(|row| asked.is_empty() || asked.iter().any(|name| is_called(row, name)));
    Ok(rows)
}

/// Moves watermarks forward: tables and entities in one statement, so in one transaction. A table that
/// already is at the position, or past it, stays as it is with its entities, so that an attempt whose answer
/// was lost may be repeated.
///
/// # Errors
///
/// The statement failed; whether it took effect is then unknown.
pub async fn advance(client: &Client, advance: &Advance<'_>) -> Result<()> {
    let names: Vec<&str> = advance.tables.iter().map(|(name, _)| name.as_str()).collect();
    let totals: TotalColumns = advance.tables.iter().map(|(_, totals)| totals).collect();
    let spans = Spans::new(advance.spans);
    let horizon = advance.archived_before.map(|xmin| xmin.to_string());
    client
        .execute(
            ADVANCE,
            &[
                &PgLsn::from(advance.lsn.0),
                &horizon,
                &names,
                &totals.max_created_at,
                &totals.row_count,
                &totals.file_count,
                &totals.byte_count,
                &spans.table,
                &spans.space,
                &spans.name,
                &spans.version,
                &spans.min_created_at,
                &spans.max_created_at,
                &spans.row_count,
                &totals.doubles_removed,
            ],
        )
        .await
        .map_err(Error::sql(format!("moving the watermarks to {}", advance.lsn)))?;
    Ok(())
}

/// The horizon moves only in state `streaming`: before the first copy and in a gap, transactions below it
/// may be missing from the archive. What was removed from the archive counts as if it were there until that is on record, too, and
/// not a second time ([`count_removed`]).
const ADVANCE: &str = "
with advanced as (
    update highwater.watermark w
    set flushed_lsn = $1,
        archived_before = case when w.state = 'streaming' then greatest(w.archived_before, $2::text::xid8)
                               else w.archived_before end,
        max_created_at = t.max_created_at, file_count = t.file_count, byte_count = t.byte_count,
        row_count = greatest(w.row_count, t.row_count + t.doubles_removed - w.doubles_removed), updated_at = clock_timestamp()
    from unnest($3::text[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[], $15::bigint[])
         as t (source_table, max_created_at, row_count, file_count, byte_count, doubles_removed)
    where w.source_table = t.source_table and w.flushed_lsn < $1
    returning w.source_table
),
horizon as (
    update highwater.watermark w set archived_before = greatest(w.archived_before, $2::text::xid8)
    where w.source_table = any($3) and w.flushed_lsn = $1 and w.state = 'streaming' and $2 is not null
)
insert into highwater.entity_watermark as e
    (source_table, space, name, version, min_created_at, max_created_at, row_count)
select s.source_table, s.space, s.name, s.version, min(s.min_created_at), max(s.max_created_at), sum(s.row_count)
from unnest($8::text[], $9::text[], $10::text[], $11::text[], $12::timestamptz[], $13::timestamptz[], $14::bigint[])
     as s (source_table, space, name, version, min_created_at, max_created_at, row_count)
join advanced using (source_table)
group by s.source_table, s.space, s.name, s.version
on conflict (source_table, (md5(space) || md5(name) || md5(version))) do update
set min_created_at = least(e.min_created_at, excluded.min_created_at),
    max_created_at = greatest(e.max_created_at, excluded.max_created_at),
    row_count = e.row_count + excluded.row_count,
    updated_at = clock_timestamp()";

/// The totals of several tables, a vector for each column.
#[derive(Default)]
struct TotalColumns {
    max_created_at: Vec<Option<DateTime<Utc>>>,
    row_count: Vec<i64>,
    file_count: Vec<i64>,
    byte_count: Vec<i64>,
    doubles_removed: Vec<i64>,
}

impl<'a> FromIterator<&'a Totals> for TotalColumns {
    fn from_iter<T: IntoIterator<Item = &'a Totals>>(totals: T) -> Self {
        let mut columns = Self::default();
        for table in totals {
            columns.max_created_at.push(table.max_created_at.and_then(DateTime::from_timestamp_micros));
            columns.row_count.push(signed(table.row_count));
            columns.file_count.push(signed(table.file_count));
            columns.byte_count.push(signed(table.byte_count));
            columns.doubles_removed.push(signed(table.doubles_removed));
        }
        columns
    }
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Writes what merging has changed: how many files hold the rows.
///
/// # Errors
///
/// The statement failed.
pub async fn update_files(client: &Client, table: &str, totals: Totals) -> Result<()> {
    client
        .execute(
            "update highwater.watermark set file_count = $2, byte_count = $3, updated_at = clock_timestamp()
             where source_table = $1",
            &[&table, &signed(totals.file_count), &signed(totals.byte_count)],
        )
        .await
        .map_err(Error::sql(format!("writing the file count of {table}")))?;
    Ok(())
}

/// Reads a new horizon. The order of the two columns matters, see the module's documentation. `None` if `holder` does not
/// hold the slot on the server that answers: then it is another server than the one that streams (after a failover), and its
/// transactions are not those of the stream.
///
/// # Errors
///
/// The query failed.
pub async fn horizon(client: &Client, slot: &str, holder: i32) -> Result<Option<Horizon>> {
    let query = "select pg_snapshot_xmin(pg_current_snapshot())::text, pg_current_wal_insert_lsn()
                 from pg_replication_slots where slot_name = $1 and active_pid = $2";
    let row = client
        .query_opt(query, &[&slot, &holder])
        .await
        .map_err(Error::sql("reading the transaction horizon"))?;
    let Some(row) = row else { return Ok(None) };
    let xmin: String = row.try_get(0).map_err(Error::sql("reading the horizon's xmin"))?;
    let lsn: PgLsn = row.try_get(1).map_err(Error::sql("reading the horizon's position"))?;
    Ok(Some(Horizon { xmin: parse_xid(&xmin)?, lsn: Lsn(lsn.into()) }))
}
