//! Tables whose archive may lack rows: state `gap`, which blocks their purge, and what decides it.

use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};
use crate::lsn::Lsn;

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
                 select {PUBLISHED} as is_published, highwater.published_as({PUBLICATION_OF}, w.table_oid) as published_as) p
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

/// The publication that is to send what happens in the table of `w`: `$2`, or that of updates and deletes.
const PUBLICATION_OF: &str = "case when w.keeps_versions then $2::text || '_versions' else $2::text end";

/// Whether the publication sends every insert into the table of `w` (every change, where versions are kept), with every column that is
/// archived. Where partitions are published as themselves, some may lack, and rows of one that is dropped before they are decoded are
/// nobody's.
const PUBLISHED: &str = "exists (
    select from pg_publication p join pg_publication_tables t using (pubname)
    where p.pubname = case when w.keeps_versions then $2::text || '_versions' else $2::text end and p.pubinsert
      and (not w.keeps_versions or p.pubupdate and p.pubdelete) and t.rowfilter is null
      -- By name: a look-up by `to_regclass` may be asked of any table, and fails in schemas that the role may not use.
      and (t.schemaname, t.tablename) = (
        select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = w.table_oid)
      and not exists (
        select from pg_attribute a
        where a.attrelid = w.table_oid and a.attnum > 0 and not a.attisdropped and a.attname <> all (t.attnames)
          and (w.kind not in ('custom', 'psi', 'spc') or a.attname in ('created_at', 'space', 'name', 'version', 'entity_id', 'metric', 'value', 'feature', 'bin_id', 'bin_count'))))";

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
