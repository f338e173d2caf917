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

use chrono::{DateTime, Utc};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row};

use crate::batch::EntitySpan;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::record::{Entity, Kind};

/// Whether the archive of a table is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Rows from before the slot are not archived yet.
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
}

/// How much a table of the archive holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableTotals {
    /// The newest `created_at`, microseconds since the epoch.
    pub max_created_at: Option<i64>,
    /// Rows.
    pub row_count: u64,
    /// Files.
    pub file_count: u64,
    /// Bytes of those files.
    pub byte_count: u64,
}

/// A move of the watermark of some tables.
#[derive(Debug)]
pub struct Advance<'a> {
    /// The position that they reach.
    pub lsn: Lsn,
    /// The horizon to publish, if one has been passed.
    pub archived_before: Option<u64>,
    /// The tables with what their archives hold now.
    pub tables: &'a [(String, TableTotals)],
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
    kind.source_table().map(|table| format!("{schema}.{table}"))
}

/// Reads every watermark, by table name.
///
/// # Errors
///
/// The query failed; before `highwater setup` has run, because the table is not there.
pub async fn read(client: &Client) -> Result<Vec<Watermark>> {
    let rows = client
        .query(
            "select source_table, kind, slot_name, system_identifier, state, flushed_lsn,
                    archived_before::text, max_created_at, row_count, file_count, byte_count, updated_at
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
    let archived_before: Option<String> = row.try_get("archived_before").map_err(Error::sql(column))?;
    Ok(Watermark {
        source_table: row.try_get("source_table").map_err(Error::sql(column))?,
        kind: row.try_get("kind").map_err(Error::sql(column))?,
        slot_name: row.try_get("slot_name").map_err(Error::sql(column))?,
        system_identifier: row.try_get("system_identifier").map_err(Error::sql(column))?,
        state: State::parse(&state)?,
        flushed_lsn: Lsn(lsn.into()),
        archived_before: archived_before.map(|text| parse_xid(&text)).transpose()?,
        max_created_at: row.try_get("max_created_at").map_err(Error::sql(column))?,
        row_count: row.try_get("row_count").map_err(Error::sql(column))?,
        file_count: row.try_get("file_count").map_err(Error::sql(column))?,
        byte_count: row.try_get("byte_count").map_err(Error::sql(column))?,
        updated_at: row.try_get("updated_at").map_err(Error::sql(column))?,
    })
}

fn parse_xid(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::Internal(format!("{text:?} is not a transaction id")))
}

/// Makes the row of a newly archived table; one that is there is left as it is. Returns whether it was made.
///
/// # Errors
///
/// The statement failed.
pub async fn create(
    client: &impl tokio_postgres::GenericClient,
    table: &str,
    kind: Kind,
    slot: &str,
    system_identifier: &str,
    state: State,
    lsn: Lsn,
) -> Result<bool> {
    let made = client
        .execute(
            "insert into highwater.watermark (source_table, kind, slot_name, system_identifier, state, flushed_lsn)
             values ($1, $2, $3, $4, $5, $6) on conflict (source_table) do nothing",
            &[&table, &kind.name(), &slot, &system_identifier, &state.name(), &PgLsn::from(lsn.0)],
        )
        .await
        .map_err(Error::sql(format!("making the watermark of {table}")))?;
    Ok(made > 0)
}

/// Puts every table of a slot into state `gap`, which blocks its purge and freezes its horizon. Returns the
/// tables that were not in it yet.
///
/// # Errors
///
/// The statement failed.
pub async fn mark_gap(client: &Client, slot: &str) -> Result<Vec<String>> {
    let rows = client
        .query(
            "update highwater.watermark set state = 'gap', updated_at = clock_timestamp()
             where slot_name = $1 and state <> 'gap' returning source_table",
            &[&slot],
        )
        .await
        .map_err(Error::sql("marking a gap in highwater.watermark"))?;
    rows.iter().map(|row| row.try_get(0).map_err(Error::sql("reading a table name"))).collect()
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
    let totals: Totals = advance.tables.iter().map(|(_, totals)| totals).collect();
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
            ],
        )
        .await
        .map_err(Error::sql(format!("moving the watermarks to {}", advance.lsn)))?;
    Ok(())
}

/// The horizon moves only in state `streaming`: before the first copy and in a gap, transactions below it
/// may be missing from the archive.
const ADVANCE: &str = "
with advanced as (
    update highwater.watermark w
    set flushed_lsn = $1,
        archived_before = case when w.state = 'streaming' then greatest(w.archived_before, $2::text::xid8)
                               else w.archived_before end,
        max_created_at = t.max_created_at, row_count = t.row_count, file_count = t.file_count,
        byte_count = t.byte_count, updated_at = clock_timestamp()
    from unnest($3::text[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[])
         as t (source_table, max_created_at, row_count, file_count, byte_count)
    where w.source_table = t.source_table and w.flushed_lsn < $1
    returning w.source_table
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
struct Totals {
    max_created_at: Vec<Option<DateTime<Utc>>>,
    row_count: Vec<i64>,
    file_count: Vec<i64>,
    byte_count: Vec<i64>,
}

impl<'a> FromIterator<&'a TableTotals> for Totals {
    fn from_iter<T: IntoIterator<Item = &'a TableTotals>>(totals: T) -> Self {
        let mut columns = Self::default();
        for table in totals {
            columns.max_created_at.push(table.max_created_at.and_then(DateTime::from_timestamp_micros));
            columns.row_count.push(signed(table.row_count));
            columns.file_count.push(signed(table.file_count));
            columns.byte_count.push(signed(table.byte_count));
        }
        columns
    }
}

/// Entity spans, a vector for each column.
#[derive(Default)]
struct Spans<'a> {
    table: Vec<&'a str>,
    space: Vec<&'a str>,
    name: Vec<&'a str>,
    version: Vec<&'a str>,
    min_created_at: Vec<Option<DateTime<Utc>>>,
    max_created_at: Vec<Option<DateTime<Utc>>>,
    row_count: Vec<i64>,
}

impl<'a> Spans<'a> {
    fn new(spans: &'a [(String, EntitySpan)]) -> Self {
        let mut columns = Self::default();
        for (table, span) in spans {
            let Entity { space, name, version } = &span.entity;
            columns.table.push(table);
            columns.space.push(space);
            columns.name.push(name);
            columns.version.push(version);
            columns.min_created_at.push(DateTime::from_timestamp_micros(span.min_created_at));
            columns.max_created_at.push(DateTime::from_timestamp_micros(span.max_created_at));
            columns.row_count.push(signed(span.row_count));
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
pub async fn update_files(client: &Client, table: &str, totals: TableTotals) -> Result<()> {
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

/// Reads a new horizon. The order of the two columns matters, see the module's documentation.
///
/// # Errors
///
/// The query failed.
pub async fn horizon(client: &Client) -> Result<Horizon> {
    let row = client
        .query_one("select pg_snapshot_xmin(pg_current_snapshot())::text, pg_current_wal_insert_lsn()", &[])
        .await
        .map_err(Error::sql("reading the transaction horizon"))?;
    let xmin: String = row.try_get(0).map_err(Error::sql("reading the horizon's xmin"))?;
    let lsn: PgLsn = row.try_get(1).map_err(Error::sql("reading the horizon's position"))?;
    Ok(Horizon { xmin: parse_xid(&xmin)?, lsn: Lsn(lsn.into()) })
}

/// One row of `highwater.entity_watermark`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntityWatermark {
    /// The archived table with its schema.
    pub source_table: String,
    /// The entity.
    pub entity: Entity,
    /// Its oldest archived `created_at`.
    pub min_created_at: DateTime<Utc>,
    /// Its newest archived `created_at`.
    pub max_created_at: DateTime<Utc>,
    /// Its archived rows.
    pub row_count: i64,
}

/// Reads every entity's watermark, by table and entity.
///
/// # Errors
///
/// The query failed.
pub async fn read_entities(client: &Client) -> Result<Vec<EntityWatermark>> {
    let query = "select source_table, space, name, version, min_created_at, max_created_at, row_count
                 from highwater.entity_watermark order by source_table, space, name, version";
    let rows = client.query(query, &[]).await.map_err(Error::sql("reading highwater.entity_watermark"))?;
    rows.iter().map(entity_watermark).collect()
}

fn entity_watermark(row: &Row) -> Result<EntityWatermark> {
    let column = "reading a row of highwater.entity_watermark";
    Ok(EntityWatermark {
        source_table: row.try_get(0).map_err(Error::sql(column))?,
        entity: Entity {
            space: row.try_get(1).map_err(Error::sql(column))?,
            name: row.try_get(2).map_err(Error::sql(column))?,
            version: row.try_get(3).map_err(Error::sql(column))?,
        },
        min_created_at: row.try_get(4).map_err(Error::sql(column))?,
        max_created_at: row.try_get(5).map_err(Error::sql(column))?,
        row_count: row.try_get(6).map_err(Error::sql(column))?,
    })
}
