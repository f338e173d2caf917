//! Which partitions went through the archive from their first row on: `highwater.covered_partition`.
//!
//! A row is streamed if its partition was attached when it was written. So an attached partition that is seen to be empty is
//! covered from then on; one that is first seen with rows may hold some that never passed the stream, and is compared with
//! the archive (`backfill`) before it is taken for covered.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, GenericClient};

use crate::error::{Error, Result};
use crate::source::leaves;

/// A partition that is not covered, with rows in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uncovered {
    /// The drift table.
    pub(crate) source_table: String,
    /// The partition, with its schema.
    pub(crate) partition: String,
}

/// Looks at the partitions that are not covered: an empty one is from now on. Returns those with rows. Partitions that are
/// no longer attached are forgotten, so that they are looked at again if they come back.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn uncovered(client: &Client, slot: &str) -> Result<Vec<Uncovered>> {
    let failed = || Error::sql("looking for partitions that never passed the stream");
    let forget = "
        with recursive tree as (
            select w.source_table, w.table_oid as oid from highwater.watermark w where w.slot_name = $1
            union all
            select t.source_table, i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid)
        delete from highwater.covered_partition p using highwater.watermark w
        where w.source_table = p.source_table and w.slot_name = $1
          and not exists (select from tree t where t.source_table = p.source_table and t.oid = p.partition_oid)";
    client.execute(forget, &[&slot]).await.map_err(failed())?;
    let roots = "select source_table, table_oid from highwater.watermark where slot_name = $1";
    let mut found = Vec::new();
    for row in client.query(roots, &[&slot]).await.map_err(failed())? {
        let source_table: String = row.try_get(0).map_err(failed())?;
        let root = row.try_get(1).map_err(failed())?;
        for leaf in leaves(client, &source_table, root).await?.iter().filter(|leaf| !leaf.is_covered) {
            let empty = format!(
                "insert into highwater.covered_partition (source_table, partition_oid, partition_name)
                 select $1, $2, $3 where not exists (select from {} where {}) on conflict do nothing",
                leaf.from, leaf.filter
            );
            let covered = match client.execute(&empty, &[&source_table, &leaf.oid, &leaf.name]).await {
                Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => continue,
                covered => covered.map_err(Error::sql(format!("looking into {}", leaf.name)))?,
            };
            if covered == 0 {
                found.push(Uncovered { source_table: source_table.clone(), partition: leaf.name.clone() });
            }
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
