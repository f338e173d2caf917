//! How the log tells the rows of a table apart: what is archived of one whose rows change depends on it.

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::tables::ColumnSpec;

/// The primary key of a table, and what the log has of a row that is updated or deleted (manual section 55.9; `alter table`, "REPLICA
/// IDENTITY").
#[derive(Debug)]
pub(crate) struct RowIdentity {
    /// The columns of the primary key, in its order; empty if there is none.
    pub(crate) key: Vec<String>,
    /// The parts of the table of which the log has neither the primary key nor all of a row.
    without_key: Vec<String>,
    /// ... and those of which it has not all of a row.
    not_full: Vec<String>,
    /// Columns whose values the log leaves out when they are long and an update has not changed them, of these parts.
    left_out: Vec<String>,
}

impl RowIdentity {
    /// Reads it of a table, which is named with its schema.
    ///
    /// # Errors
    ///
    /// The query failed.
    pub(crate) async fn read(client: &Client, source: &str) -> Result<Self> {
        let (schema, table) = source.split_once('.').unwrap_or_default();
        // Of a partitioned table only the partitions have rows; what is not archived has none for us.
        let query = "
            with root as (
                select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
                where n.nspname = $1 and c.relname = $2),
            part as (
                select p.oid, p.oid::regclass::text as name, p.relreplident as identity,
                       exists (select from pg_index i where i.indrelid = p.oid and i.indisprimary and i.indisvalid and i.indimmediate
                                 and (p.relreplident = 'd' or i.indisreplident)) as by_key
                from root r, pg_partition_tree(r.oid) t join pg_class p on p.oid = t.relid
                where p.relkind = 'r'
                union all
                -- A plain table is in no tree.
                select p.oid, p.oid::regclass::text, p.relreplident,
                       exists (select from pg_index i where i.indrelid = p.oid and i.indisprimary and i.indisvalid and i.indimmediate
                               and (p.relreplident = 'd' or i.indisreplident))
                from root r join pg_class p on p.oid = r.oid
                where p.relkind = 'r' and not exists (select from pg_partition_tree(r.oid)))
            select array(select a.attname::text
                         from root r join pg_index i on i.indrelid = r.oid and i.indisprimary and i.indimmediate,
                              unnest(i.indkey::int2[]) with ordinality k (number, place)
                              join pg_attribute a on a.attrelid = (select oid from root) and a.attnum = k.number
                         order by k.place),
                   array(select name from part where identity <> 'f' and not by_key order by 1),
                   array(select name from part where identity <> 'f' order by 1),
                   array(select a.attname::text from root r join pg_attribute a on a.attrelid = r.oid
                         where a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.attstorage <> 'p' order by a.attnum)";
        let failed = || Error::sql(format!("reading the key of {source}"));
        let row = client.query_one(query, &[&schema, &table]).await.map_err(failed())?;
        Ok(Self {
            key: row.try_get(0).map_err(failed())?,
            without_key: row.try_get(1).map_err(failed())?,
            not_full: row.try_get(2).map_err(failed())?,
            left_out: row.try_get(3).map_err(failed())?,
        })
    }

    /// Why versions of rows can't be told apart in an archive with these columns, and what to do; `None` if they can. To follow "must be".
    pub(crate) fn problem(&self, source: &str, time: &str, archived: &[ColumnSpec]) -> Option<String> {
        if self.key.is_empty() {
            return Some(format!(
                "inserts, or the table must have a primary key (that is not deferrable), which tells whose version a row is: alter table \
                 {source} add primary key (...);"
            ));
        }
        let is_archived = |key: &&String| archived.iter().any(|column| column.name == **key);
        if let Some(key) = self.key.iter().find(|key| !is_archived(key)) {
            return Some(format!(
                "inserts, or {key} must be archived: it is a part of the primary key, which tells whose version a row is"
            ));
        }
        let statements = |parts: &[String], identity: &str| {
            let statements =
                parts.iter().map(|part| format!("alter table {part} replica identity {identity};"));
            statements.collect::<Vec<_>>().join(" ")
        };
        if !self.without_key.is_empty() {
            return Some(format!(
                "inserts, or the log must have the primary key of rows that are updated: {}",
                statements(&self.without_key, "default")
            ));
        }
        (!self.key.iter().any(|key| key == time) && !self.not_full.is_empty()).then(|| {
            format!(
                "inserts, or the log must have all of a row that is updated, since its primary key ({}) lacks {time}, which may change: \
                 {}",
                self.key.join(", "),
                statements(&self.not_full, "full")
            )
        })
    }

    /// What it costs the source that updates and deletes are published.
    pub(crate) fn cost(&self, source: &str) -> String {
        let now = if self.not_full.is_empty() {
            "each update and delete writes the whole row as it was into the server's log, beside the new one (replica identity full)".to_owned()
        } else {
            format!(
                "an update that changes the key, and each delete, writes the key as it was into the server's log. Long values that an \
                 update leaves alone (columns {}) are not in it: the archive takes them from the version before. A deleted row has only its \
                 key. `alter table ... replica identity full` on {} would have all of it, at twice the log of an update",
                self.left_out.join(", "),
                if self.not_full.len() == 1 { "the table" } else { "each partition" }
            )
        };
        format!("updates and deletes of {source} are published, too: {now}")
    }
}
