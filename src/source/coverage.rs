//! Which partitions went through the archive from their first row on: `highwater.covered_partition`.
//!
//! A row is streamed if its partition was attached when it was written. So an attached partition that is seen to be empty is
//! covered from then on; one that is first seen with rows may hold some that never passed the stream, and is compared with
//! the archive (`backfill`) before it is taken for covered.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, GenericClient};

use crate::error::{Error, Result};
use crate::source::{Partition, leaves};

/// A partition that is not covered, with rows in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Uncovered {
    /// The drift table.
    pub(crate) source_table: String,
    /// The partition, with its schema.
    pub(crate) partition: String,
}

/// Looks at the partitions that are not covered: an empty one is from now on. Returns those with rows. Of partitions that are
/// no longer attached it is noted since when: their rows are archived, but they are looked at again if they come back.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn uncovered(client: &Client, slot: &str) -> Result<Vec<Uncovered>> {
    let failed = || Error::sql("looking for partitions that never passed the stream");
    let follow = "
        with recursive tree as (
            select w.source_table, w.table_oid as oid from highwater.watermark w where w.slot_name = $1
            union all
            select t.source_table, i.inhrelid from pg_inherits i join tree t on i.inhparent = t.oid
            join pg_class c on c.oid = i.inhrelid where not i.inhdetachpending and c.relispartition),
        known as (
            select p.source_table, p.partition_oid, t.oid is not null as is_attached,
                   p.detached_at is null and p.attachment = highwater.attachment(p.partition_oid) as is_steady,
                   exists (select from pg_class c where c.oid = p.partition_oid) as is_there
            from highwater.watermark w join highwater.covered_partition p using (source_table)
            left join tree t on t.source_table = p.source_table and t.oid = p.partition_oid
            where w.slot_name = $1),
        forgotten as (
            delete from highwater.covered_partition p using known k
            where (k.source_table, k.partition_oid) = (p.source_table, p.partition_oid)
              and (not k.is_there or (k.is_attached and not k.is_steady))),
        unverified as (
            delete from highwater.verified_partition v using known k
            where (k.source_table, k.partition_oid) = (v.source_table, v.partition_oid) and not k.is_there)
        update highwater.covered_partition p set detached_at = clock_timestamp() from known k
        where (k.source_table, k.partition_oid) = (p.source_table, p.partition_oid)
          and k.is_there and not k.is_attached and p.detached_at is null";
    client.execute(follow, &[&slot]).await.map_err(failed())?;
    let roots = "select source_table, table_oid from highwater.watermark where slot_name = $1";
    let mut found = Vec::new();
    for row in client.query(roots, &[&slot]).await.map_err(failed())? {
        let source_table: String = row.try_get(0).map_err(failed())?;
        let root = row.try_get(1).map_err(failed())?;
        for leaf in leaves(client, &source_table, root).await?.iter().filter(|leaf| !leaf.is_covered) {
            let empty = format!(
                "insert into highwater.covered_partition (source_table, partition_oid, partition_name, attachment)
                 select $1, $2, $3, $4 where not exists (select from {} where {}) on conflict do nothing",
                leaf.from, leaf.filter
            );
            let covered =
                match client.execute(&empty, &[&source_table, &leaf.oid, &leaf.name, &leaf.attachment]).await
                {
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

/// Takes these partitions for covered, as they are attached now.
///
/// # Errors
///
/// The statement failed.
pub(crate) async fn cover(
    client: &impl GenericClient,
    source_table: &str,
    partitions: &[Partition],
) -> Result<()> {
    let oids: Vec<u32> = partitions.iter().map(|partition| partition.oid).collect();
    let names: Vec<&str> = partitions.iter().map(|partition| partition.name.as_str()).collect();
    let attachments: Vec<&str> = partitions.iter().map(|partition| partition.attachment.as_str()).collect();
    let statement = "
        insert into highwater.covered_partition as p (source_table, partition_oid, partition_name, attachment)
        select $1, oid, name, attachment
        from unnest($2::oid[], $3::text[], $4::text[]) as t (oid, name, attachment)
        on conflict (source_table, partition_oid) do update
        set partition_name = excluded.partition_name, attachment = excluded.attachment, detached_at = null,
            lacks_since = null, lacks_reason = null";
    client
        .execute(statement, &[&source_table, &oids, &names, &attachments])
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
    partitions: &[Partition],
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
