//! What of the drift tables no archive can hold: parts whose rows are in no log that we read, and columns that keep every row in
//! the quarantine.
//!
//! Such a part is neither copied nor compared nor purged, and such a table is not purged; so whoever looks (`check`, `setup`, the
//! sidecar's log, `verify`) must say that it is there.

use std::collections::HashSet;

use tokio_postgres::{Client, Row};

use crate::error::{Error, Result};

/// A table that holds rows of a drift table, and is not archived.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Part {
    /// Its name with its schema; that of the drift table itself, if that is it.
    pub part: String,
    /// Why its rows are not archived.
    pub reason: String,
    /// What has them archived.
    pub remedy: String,
}

/// A column that no row of the archive can be made from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct UnfitColumn {
    /// Its name.
    pub column: String,
    /// What is wrong with it.
    pub problem: String,
    /// The statement that mends it.
    pub remedy: String,
}

/// What of one drift table is not archived.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unarchived {
    pub(crate) parts: Vec<Part>,
    pub(crate) columns: Vec<UnfitColumn>,
    /// The operator has said that the quarantine will do (`highwater.retention.accepts_quarantine`).
    pub(crate) accepts_quarantine: bool,
}

/// The condition for tables whose rows are archived: `c` is a row of `pg_class`.
pub(crate) const IS_ARCHIVED: &str = "c.relkind = 'r' and c.relpersistence = 'p'
    and c.relam = (select heap.oid from pg_am heap where heap.amname = 'heap')";

/// What is under the table of oid `$1`, and itself, as far as it holds rows that are not archived.
const PARTS: &str = "
    with recursive tree as (
        select $1::oid as oid, true as is_published
        union all
        select c.oid, t.is_published and c.relispartition
        from tree t join pg_inherits i on i.inhparent = t.oid join pg_class c on c.oid = i.inhrelid
        where not i.inhdetachpending),
    told as (
        select n.nspname || '.' || c.relname as part, format('%I.%I', n.nspname, c.relname) as quoted, m.amname,
               case when not t.is_published then 'child'
                    when c.relkind = 'f' then 'foreign'
                    when c.relkind <> 'r' then null
                    when c.relpersistence <> 'p' then 'unlogged'
                    when m.amname <> 'heap' then 'method' end as why
        from tree t join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace left join pg_am m on m.oid = c.relam)
    select part,
           case why when 'child' then 'is a child by inheritance and no partition, so its rows are not published with those of the table'
                    when 'foreign' then 'is a foreign table, so its rows are not in the log of this server'
                    when 'unlogged' then 'is unlogged, so its rows are in no log'
                    else 'has the access method ' || amname || ', which need not write rows to the log as a table of the method heap does' end,
           case why when 'child' then 'make it a partition of a partitioned table, or move its rows into the table'
                    when 'foreign' then 'keep its rows in a partition of this server until they are archived; detach it then'
                    when 'unlogged' then 'alter table ' || quoted || ' set logged'
                    else 'alter table ' || quoted || ' set access method heap' end
    from told where why is not null order by part";

/// The parts of the table of oid `root` that are not archived, by name. Needs no schema `highwater`.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn parts(client: &Client, root: u32) -> Result<Vec<Part>> {
    let of = |row: &Row| Ok(Part { part: row.try_get(0)?, reason: row.try_get(1)?, remedy: row.try_get(2)? });
    let rows = client.query(PARTS, &[&root]).await;
    rows.and_then(|rows| rows.iter().map(of).collect())
        .map_err(Error::sql("looking for what is not archived of a table"))
}

/// What of an archived table is not archived.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn read(client: &Client, source_table: &str) -> Result<Unarchived> {
    let failed = || Error::sql(format!("looking for what is not archived of {source_table}"));
    let query = "select w.table_oid, coalesce((select r.accepts_quarantine from highwater.retention r
                                               where r.source_table = w.source_table), false)
                 from highwater.watermark w where w.source_table = $1";
    let Some(row) = client.query_opt(query, &[&source_table]).await.map_err(failed())? else {
        return Ok(Unarchived::default());
    };
    let root: u32 = row.try_get(0).map_err(failed())?;
    let of = |row: &Row| {
        Ok(UnfitColumn { column: row.try_get(0)?, problem: row.try_get(1)?, remedy: row.try_get(2)? })
    };
    // A table that is gone has no columns.
    let query = "select u.* from pg_class c, highwater.unfit_columns(c.oid) u where c.oid = $1";
    let columns = client.query(query, &[&root]).await;
    let columns = columns.and_then(|rows| rows.iter().map(of).collect()).map_err(failed())?;
    let accepts_quarantine = row.try_get(1).map_err(failed())?;
    Ok(Unarchived { parts: parts(client, root).await?, columns, accepts_quarantine })
}

/// What has been said of it: each thing once.
#[derive(Debug, Default)]
pub(crate) struct Told(HashSet<(String, String, String)>);

impl Told {
    /// Says what is new, in the log.
    ///
    /// # Errors
    ///
    /// A query failed.
    pub(crate) async fn tell(&mut self, client: &Client, source_table: &str) -> Result<()> {
        let found = read(client, source_table).await?;
        let mut now = HashSet::new();
        let key = |one: &str, why: &str| (source_table.to_owned(), one.to_owned(), why.to_owned());
        for Part { part, reason, remedy } in &found.parts {
            if !self.0.contains(&key(part, reason)) {
                tracing::error!(
                    table = source_table,
                    "rows of {part} are not archived: it {reason}; to have them archived: {remedy}"
                );
            }
            now.insert(key(part, reason));
        }
        for UnfitColumn { column, problem, remedy } in &found.columns {
            if !self.0.contains(&key(column, problem)) {
                tracing::error!(
                    table = source_table,
                    "no row of {source_table} can be archived but in the quarantine: column {column} {problem}; to have them \
                     archived: {remedy}; until then {}",
                    if found.accepts_quarantine {
                        "the purge deletes what only the quarantine holds, as highwater.retention says"
                    } else {
                        "none of them is purged"
                    }
                );
            }
            now.insert(key(column, problem));
        }
        // What was mended is told again should it come back.
        self.0.retain(|(table, ..)| table != source_table);
        self.0.extend(now);
        Ok(())
    }
}
