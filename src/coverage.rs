//! Which partitions went through the archive from their first row on: `highwater.covered_partition`.
//!
//! A row is streamed if its partition was attached when it was written. So an attached partition that is seen to be empty is
//! covered from then on; one that is first seen with rows may hold some that never passed the stream, and is compared with
//! the archive (`backfill`) before it is taken for covered.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, GenericClient};

use crate::error::{Error, Result};
use crate::postgres::quote_identifier;

/// A partition that is not covered, with rows in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uncovered {
    /// The drift table.
    pub(crate) source_table: String,
    /// The partition, with its schema.
    pub(crate) partition: String,
}

/// The tables that a drift table's rows are in, with their oids, their schemas and names: `$1` is its oid.
pub(crate) const LEAVES: &str = "
    with recursive tree as (
        select $1::oid as oid
        union all
        select i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid)
    select c.oid, n.nspname::text, c.relname::text
    from tree join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'r'";

/// Where a role reads the rows of a leaf, and under which condition: the leaf itself, or, if the role may read only the root
/// (rights on that don't reach its partitions), the root with what tells the leaf's rows.
pub(crate) fn reading(
    leaf: &str,
    root: &str,
    oid: u32,
    constraint: Option<&str>,
    may_read: bool,
) -> (String, String) {
    if may_read {
        return (format!("only {leaf}"), "true".to_owned());
    }
    // The constraint is there for the planner, which leaves out the other partitions by it.
    (root.to_owned(), format!("(tableoid = {oid}::oid and ({}))", constraint.unwrap_or("true")))
}

/// Looks at the partitions that are not covered: an empty one is from now on. Returns those with rows. Partitions that are
/// no longer attached are forgotten, so that they are looked at again if they come back.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn uncovered(client: &Client, slot: &str) -> Result<Vec<Uncovered>> {
    let failed = || Error::sql("looking for partitions that never passed the stream");
    let tree = "
        with recursive tree as (
            select w.source_table, w.table_oid as oid from highwater.watermark w where w.slot_name = $1
            union all
            select t.source_table, i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid)";
    let forget = format!(
        "{tree} delete from highwater.covered_partition p using highwater.watermark w
         where w.source_table = p.source_table and w.slot_name = $1
           and not exists (select from tree t where t.source_table = p.source_table and t.oid = p.partition_oid)"
    );
    client.execute(&forget, &[&slot]).await.map_err(failed())?;
    let unknown = format!(
        "{tree} select t.source_table, t.oid, n.nspname::text, c.relname::text,
                       has_table_privilege(c.oid, 'select'), pg_get_partition_constraintdef(c.oid),
                       w.table_oid::regclass::text
         from tree t join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace
         join highwater.watermark w on w.source_table = t.source_table
         where c.relkind = 'r' and not exists (select from highwater.covered_partition p
                                               where p.source_table = t.source_table and p.partition_oid = t.oid)"
    );
    let mut found = Vec::new();
    for row in client.query(&unknown, &[&slot]).await.map_err(failed())? {
        let source_table: String = row.try_get(0).map_err(failed())?;
        let oid: u32 = row.try_get(1).map_err(failed())?;
        let schema: String = row.try_get(2).map_err(failed())?;
        let table: String = row.try_get(3).map_err(failed())?;
        let partition = format!("{schema}.{table}");
        let leaf = format!("{}.{}", quote_identifier(&schema), quote_identifier(&table));
        let constraint: Option<String> = row.try_get(5).map_err(failed())?;
        let root: String = row.try_get(6).map_err(failed())?;
        // Null where it was dropped this moment.
        let may_read = row.try_get::<_, Option<bool>>(4).map_err(failed())?.unwrap_or(true);
        let (from, filter) = reading(&leaf, &root, oid, constraint.as_deref(), may_read);
        let empty = format!(
            "insert into highwater.covered_partition (source_table, partition_oid, partition_name)
             select $1, $2, $3 where not exists (select from {from} where {filter}) on conflict do nothing"
        );
        let covered = match client.execute(&empty, &[&source_table, &oid, &partition]).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => continue,
            covered => covered.map_err(Error::sql(format!("looking into {partition}")))?,
        };
        if covered == 0 {
            found.push(Uncovered { source_table, partition });
        }
    }
    Ok(found)
}

/// Takes these partitions, oid and name, for covered.
///
/// # Errors
///
/// The statement failed.
pub(crate) async fn cover(
    client: &impl GenericClient,
    source_table: &str,
    partitions: &[(u32, String)],
) -> Result<()> {
    let (oids, names): (Vec<u32>, Vec<&str>) =
        partitions.iter().map(|(oid, name)| (*oid, name.as_str())).unzip();
    let statement = "
        insert into highwater.covered_partition (source_table, partition_oid, partition_name)
        select $1, oid, name from unnest($2::oid[], $3::text[]) as t (oid, name) on conflict do nothing";
    client
        .execute(statement, &[&source_table, &oids, &names])
        .await
        .map_err(Error::sql(format!("writing which partitions of {source_table} are covered")))
        .map(drop)
}

/// A table's archive holds all of it: state `streaming`, and these are its partitions. Whether that still was so: no gap
/// was found since `gap_count` was read.
///
/// # Errors
///
/// The statement failed; it may be repeated.
pub(crate) async fn complete(
    client: &Client,
    source_table: &str,
    partitions: &[(u32, String)],
    gap_count: i64,
) -> Result<bool> {
    // Should we fail in between, the table is looked at once more.
    cover(client, source_table, partitions).await?;
    let statement = "update highwater.watermark set state = 'streaming', updated_at = clock_timestamp()
                     where source_table = $1 and gap_count = $2";
    let context = format!("completing the watermark of {source_table}");
    let completed = client.execute(statement, &[&source_table, &gap_count]).await;
    completed.map_err(Error::sql(context)).map(|rows| rows > 0)
}
