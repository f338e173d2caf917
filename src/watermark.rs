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
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, Row};

use crate::archive::Totals;
use crate::batch::EntitySpan;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::record::{Entity, Kind};

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
            "select source_table, kind, slot_name, system_identifier, timeline_id, state, flushed_lsn,
                    archived_before::text, max_created_at, row_count, file_count, byte_count, updated_at, gap_count,
                    marks_void_upto::text
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
                 (source_table, table_oid, kind, slot_name, system_identifier, timeline_id, state, flushed_lsn)
             values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict (source_table) do nothing",
            &[
                &new.source_table,
                &new.table_oid,
                &new.kind.name(),
                &new.slot,
                &new.system_identifier,
                &new.timeline_id,
                &new.state.name(),
                &PgLsn::from(new.lsn.0),
            ],
        )
        .await
        .map_err(Error::sql(format!("making the watermark of {}", new.source_table)))?;
    Ok(made > 0)
}

/// Takes note that a table's row may have been written while nothing sent them, or that another table has its name
/// now. Returns whether there is a watermark row.
///
/// # Errors
///
/// The statement failed.
pub async fn mark_table_gap(
    client: &impl tokio_postgres::GenericClient,
    table: &str,
    table_oid: u32,
) -> Result<bool> {
    let marked = client
        .execute(
            "with another as (
                 select source_table from highwater.watermark where source_table = $1 and table_oid <> $2),
             uncovered as (
                 delete from highwater.covered_partition p using another a where p.source_table = a.source_table),
             unverified as (
                 delete from highwater.verified_partition v using another a where v.source_table = a.source_table)
             update highwater.watermark
             set state = 'gap', gap_count = gap_count + 1, table_oid = $2, updated_at = clock_timestamp()
             where source_table = $1",
            &[&table, &table_oid],
        )
        .await
        .map_err(Error::sql(format!("marking a gap in the watermark of {table}")))?;
    Ok(marked > 0)
}

/// The table that is archived under a name, by its oid.
///
/// # Errors
///
/// The query failed.
pub async fn table_oid(client: &Client, source_table: &str) -> Result<Option<u32>> {
    let query = "select table_oid from highwater.watermark where source_table = $1";
    let context = format!("reading the watermark of {source_table}");
    let row = client.query_opt(query, &[&source_table]).await.map_err(Error::sql(&context))?;
    row.map(|row| row.try_get(0).map_err(Error::sql(context))).transpose()
}

/// A table whose rows may have passed the stream, because of its publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpublished {
    /// The drift table.
    pub source_table: String,
    /// The publication sends its inserts now, but was changed since the watermark last moved.
    pub is_published: bool,
}

/// Puts the tables into state `gap` whose inserts the publication does not send (it is gone, sends no inserts, lacks the
/// table or filters its rows), or may not have sent, because it was changed since the last call. Tables go by their oid.
/// Returns those that were not in it yet.
///
/// # Errors
///
/// The statement failed.
pub async fn mark_unpublished(client: &Client, slot: &str, publication: &str) -> Result<Vec<Unpublished>> {
    let statement = format!(
        "with looked as (
             select w.source_table, w.state as before, p.is_published, p.published_as,
                    not p.is_published or w.published_as is not null as is_gap
             from highwater.watermark w, lateral (
                 select {PUBLISHED} as is_published, highwater.published_as($2, w.table_oid) as published_as) p
             where w.slot_name = $1 and (not p.is_published or w.published_as is distinct from p.published_as)
             for update of w),
         noted as (
             update highwater.watermark w
             set published_as = l.published_as, updated_at = clock_timestamp(),
                 state = case when l.is_gap then 'gap' else w.state end,
                 gap_count = w.gap_count + case when l.is_gap then 1 else 0 end
             from looked l where w.source_table = l.source_table)
         select source_table, is_published from looked where is_gap and before <> 'gap'"
    );
    let failed = || Error::sql(COMPARING);
    let rows = client.query(&statement, &[&slot, &publication]).await.map_err(failed())?;
    let of = |row: &Row| Ok(Unpublished { source_table: row.try_get(0)?, is_published: row.try_get(1)? });
    rows.iter().map(of).collect::<Result<_, tokio_postgres::Error>>().map_err(failed())
}

/// The tables of a slot whose inserts the publication does not send now.
///
/// # Errors
///
/// The query failed.
pub async fn unpublished(client: &Client, slot: &str, publication: &str) -> Result<Vec<String>> {
    let query = format!(
        "select w.source_table from highwater.watermark w where w.slot_name = $1 and not {PUBLISHED}"
    );
    names(client, &query, &[&slot, &publication], COMPARING).await
}

const COMPARING: &str = "comparing the publication with the watermarks";
const MARKING: &str = "marking a gap in the watermarks";

/// Whether publication `$2` sends every insert into the table of `w`, with every column that is archived. Where partitions are
/// published as themselves, some may lack, and rows of one that is dropped before they are decoded are nobody's.
const PUBLISHED: &str = "exists (
    select from pg_publication p join pg_publication_tables t using (pubname)
    where p.pubname = $2 and p.pubinsert and t.rowfilter is null
      and w.table_oid = to_regclass(format('%I.%I', t.schemaname, t.tablename))
      and not exists (
        select from pg_attribute a
        where a.attrelid = w.table_oid and a.attnum > 0 and not a.attisdropped and a.attname <> all (t.attnames)
          and a.attname in ('created_at', 'space', 'name', 'version', 'entity_id', 'metric', 'value', 'feature', 'bin_id', 'bin_count')))";

/// The statement that marks a gap in the rows `w` of a condition. Counts it also where there is one already, and returns the
/// tables where there was none.
fn marking(condition: &str) -> String {
    format!(
        "with marked as (
             select w.source_table, w.state as before from highwater.watermark w where {condition} for update),
         counted as (
             update highwater.watermark w
             set state = 'gap', gap_count = w.gap_count + 1, updated_at = clock_timestamp()
             from marked m where w.source_table = m.source_table)
         select source_table from marked where before <> 'gap'"
    )
}

/// Runs a statement that gives back names of tables.
async fn names(
    client: &Client,
    statement: &str,
    parameters: &[&(dyn ToSql + Sync)],
    context: &str,
) -> Result<Vec<String>> {
    let rows = client.query(statement, parameters).await.map_err(Error::sql(context))?;
    rows.iter().map(|row| row.try_get(0).map_err(Error::sql(context))).collect()
}

/// Puts a table that was complete into state `gap`; whether it was.
///
/// # Errors
///
/// The statement failed.
pub async fn mark_one_gap(client: &Client, source_table: &str) -> Result<bool> {
    let statement = marking("w.source_table = $1 and w.state = 'streaming'");
    let marked = names(client, &statement, &[&source_table], MARKING).await?;
    Ok(!marked.is_empty())
}

/// The drift table that a relation is, or is a partition of, by its oid: its name and kind.
///
/// # Errors
///
/// The query failed.
pub async fn archived_root(client: &Client, relation: u32) -> Result<Option<(String, String)>> {
    let query = "select source_table, kind from highwater.watermark
                 where table_oid = $1 or table_oid = pg_partition_root($1::oid::regclass)";
    let context = "looking for the root of a partition";
    let row = client.query_opt(query, &[&relation]).await.map_err(Error::sql(context))?;
    row.map(|row| {
        Ok((row.try_get(0).map_err(Error::sql(context))?, row.try_get(1).map_err(Error::sql(context))?))
    })
    .transpose()
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

/// Puts every table of a slot into state `gap`, which blocks its purge and freezes its horizon. Returns the
/// tables that were not in it yet.
///
/// # Errors
///
/// The statement failed.
pub async fn mark_gap(client: &Client, slot: &str) -> Result<Vec<String>> {
    names(client, &marking("w.slot_name = $1"), &[&slot], MARKING).await
}

/// Makes a table a gap of which nothing is taken for archived: every row will be compared.
///
/// # Errors
///
/// The statement failed.
pub async fn resync(client: &Client, source_table: &str) -> Result<()> {
    // Whoever copies from now on has a snapshot of a later xmin, as soon as what runs now has ended.
    let statement = "
        with unverified as (delete from highwater.verified_partition where source_table = $1)
        update highwater.watermark
        set state = 'gap', gap_count = gap_count + 1, archived_before = null,
            marks_void_upto = pg_snapshot_xmin(pg_current_snapshot()), updated_at = clock_timestamp()
        where source_table = $1";
    let context = format!("marking {source_table} to be compared");
    client.execute(statement, &[&source_table]).await.map_err(Error::sql(context)).map(drop)
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

/// Hands every table of a slot over to a server of another history. Nothing that is known of transactions or positions
/// holds there: the tables get state `gap`, and each row will be compared. Returns them.
///
/// # Errors
///
/// The statement failed.
pub async fn accept(
    client: &Client,
    slot: &str,
    system_identifier: &str,
    timeline_id: i32,
) -> Result<Vec<String>> {
    let statement = "
        with accepted as (
            update highwater.watermark
            set system_identifier = $2, timeline_id = $3, state = 'gap', gap_count = gap_count + 1, flushed_lsn = '0/0', archived_before = null,
                marks_void_upto = null, updated_at = clock_timestamp()
            where slot_name = $1 returning source_table),
        unverified as (
            delete from highwater.verified_partition using accepted a where verified_partition.source_table = a.source_table),
        uncovered as (
            delete from highwater.covered_partition using accepted a where covered_partition.source_table = a.source_table),
        uncounted as (
            delete from highwater.entity_watermark using accepted a where entity_watermark.source_table = a.source_table)
        select source_table from accepted";
    let parameters: [&(dyn ToSql + Sync); 3] = [&slot, &system_identifier, &timeline_id];
    names(client, statement, &parameters, "handing the watermarks over to this server").await
}

/// Hands the tables of a cluster over to a new slot that stands at `lsn`. What was written since the old one is missing, so
/// they all get state `gap`. Returns them.
///
/// # Errors
///
/// The statement failed.
pub async fn rebase(
    client: &Client,
    slot: &str,
    system_identifier: &str,
    timeline_id: i32,
    lsn: Lsn,
) -> Result<Vec<String>> {
    let statement = "
        update highwater.watermark
        set slot_name = $1, timeline_id = $3, flushed_lsn = $4, state = 'gap',
            gap_count = gap_count + 1, updated_at = clock_timestamp()
        where system_identifier = $2 returning source_table";
    let lsn = PgLsn::from(lsn.0);
    let parameters: [&(dyn ToSql + Sync); 4] = [&slot, &system_identifier, &timeline_id, &lsn];
    names(client, statement, &parameters, "handing the watermarks over to the new slot").await
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
        max_created_at = t.max_created_at, row_count = greatest(w.row_count, t.row_count), file_count = t.file_count,
        byte_count = t.byte_count, updated_at = clock_timestamp()
    from unnest($3::text[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[])
         as t (source_table, max_created_at, row_count, file_count, byte_count)
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
}

impl<'a> FromIterator<&'a Totals> for TotalColumns {
    fn from_iter<T: IntoIterator<Item = &'a Totals>>(totals: T) -> Self {
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
    /// The columns as parameters of a statement, in their order.
    fn parameters(&self) -> [&(dyn ToSql + Sync); 7] {
        [
            &self.table,
            &self.space,
            &self.name,
            &self.version,
            &self.min_created_at,
            &self.max_created_at,
            &self.row_count,
        ]
    }

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

/// How many rows the entities of a table have in sum.
///
/// # Errors
///
/// The query failed.
pub async fn entity_row_count(client: &Client, table: &str) -> Result<i64> {
    let query =
        "select coalesce(sum(row_count), 0)::bigint from highwater.entity_watermark where source_table = $1";
    let context = "adding up the entity watermarks";
    let row = client.query_one(query, &[&table]).await.map_err(Error::sql(context))?;
    row.try_get(0).map_err(Error::sql(context))
}

/// Counts rows that were added to the archive beside the sidecar.
///
/// # Errors
///
/// The statement failed.
pub async fn add_entities(client: &Client, spans: &[(String, EntitySpan)]) -> Result<()> {
    let statement = "
        insert into highwater.entity_watermark as e
            (source_table, space, name, version, min_created_at, max_created_at, row_count)
        select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::bigint[])
        on conflict (source_table, (md5(space) || md5(name) || md5(version))) do update
        set min_created_at = least(e.min_created_at, excluded.min_created_at),
            max_created_at = greatest(e.max_created_at, excluded.max_created_at),
            row_count = e.row_count + excluded.row_count, updated_at = clock_timestamp()";
    client
        .execute(statement, &Spans::new(spans).parameters())
        .await
        .map_err(Error::sql("counting the entities of added rows"))
        .map(drop)
}

/// A partition whose rows were compared with the archive and are equal.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'a> {
    /// The drift table.
    pub source_table: &'a str,
    /// The partition.
    pub partition_oid: u32,
    /// Its name with its schema.
    pub partition_name: &'a str,
    /// Its rows.
    pub row_count: u64,
    /// The sum of their digests.
    pub checksum: &'a str,
    /// Rows of transactions with a smaller id were compared.
    pub horizon: u64,
    /// [`Watermark::gap_count`] when the comparison began.
    pub gap_count: i64,
}

/// Records that a partition is verified, unless a gap was found since. Whether it was recorded.
///
/// # Errors
///
/// The statement failed.
pub async fn record_verified(client: &Client, verified: &Verified<'_>) -> Result<bool> {
    let statement = "
        insert into highwater.verified_partition as v
            (source_table, partition_oid, partition_name, row_count, checksum, horizon)
        select source_table, $2, $3, $4, $5, $6::text::xid8 from highwater.watermark
        where source_table = $1 and state = 'streaming' and gap_count = $7
        on conflict (source_table, partition_oid) do update
        set partition_name = excluded.partition_name, row_count = excluded.row_count, checksum = excluded.checksum,
            horizon = excluded.horizon, verified_at = clock_timestamp()";
    let horizon = verified.horizon.to_string();
    let recorded = client
        .execute(
            statement,
            &[
                &verified.source_table,
                &verified.partition_oid,
                &verified.partition_name,
                &signed(verified.row_count),
                &verified.checksum,
                &horizon,
                &verified.gap_count,
            ],
        )
        .await;
    let context = format!("recording that {} is verified", verified.partition_name);
    recorded.map_err(Error::sql(context)).map(|rows| rows > 0)
}

/// Takes back that a partition is verified.
///
/// # Errors
///
/// The statement failed.
pub async fn forget_verified(client: &Client, verified: &Verified<'_>) -> Result<()> {
    let statement = "delete from highwater.verified_partition where source_table = $1 and partition_oid = $2";
    let context = format!("taking back that {} is verified", verified.partition_name);
    let forgotten = client.execute(statement, &[&verified.source_table, &verified.partition_oid]).await;
    forgotten.map_err(Error::sql(context)).map(drop)
}

/// Writes down whether the archive lacks rows of a partition, which blocks the purge of all of it.
///
/// # Errors
///
/// The statement failed.
pub async fn set_lacking(client: &Client, verified: &Verified<'_>, lacks: bool) -> Result<()> {
    let statement = "
        update highwater.covered_partition set lacks_since = case when $3 then clock_timestamp() end
        where source_table = $1 and partition_oid = $2 and (lacks_since is not null) <> $3";
    let context = format!("writing whether the archive lacks rows of {}", verified.partition_name);
    let written = client.execute(statement, &[&verified.source_table, &verified.partition_oid, &lacks]).await;
    written.map_err(Error::sql(context)).map(drop)
}

/// Replaces a table's entity watermarks.
///
/// # Errors
///
/// The statement failed; it may be repeated.
pub async fn recount(client: &Client, table: &str, spans: &[(String, EntitySpan)]) -> Result<()> {
    let statement = "
        with counted as (
            select * from unnest($2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::bigint[])
                as s (space, name, version, min_created_at, max_created_at, row_count)),
        gone as (
            delete from highwater.entity_watermark e where e.source_table = $1 and not exists (
                select from counted c where (c.space, c.name, c.version) = (e.space, e.name, e.version)))
        insert into highwater.entity_watermark
            (source_table, space, name, version, min_created_at, max_created_at, row_count)
        select $1, * from counted
        on conflict (source_table, (md5(space) || md5(name) || md5(version))) do update
        set min_created_at = excluded.min_created_at, max_created_at = excluded.max_created_at,
            row_count = excluded.row_count, updated_at = clock_timestamp()";
    let spans = Spans::new(spans);
    let [_, space, name, version, low, high, rows] = spans.parameters();
    client
        .execute(statement, &[&table, space, name, version, low, high, rows])
        .await
        .map_err(Error::sql(format!("counting the entities of {table} anew")))
        .map(drop)
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
