//! What a verification has found of a partition: the second key of the purge, or what blocks it.

use tokio_postgres::Client;

use super::signed;
use crate::error::{Error, Result};

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
    /// [`Watermark::gap_count`](super::Watermark::gap_count) when the comparison began.
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
        where source_table = $1 and state = 'streaming' and gap_count = $7 for update
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

/// Writes down whether the archive lacks rows of a partition, which blocks the purge of all of it; and why, if there is more to
/// say than that they are missing.
///
/// # Errors
///
/// The statement failed.
pub async fn set_lacking(
    client: &Client,
    verified: &Verified<'_>,
    lacks: bool,
    reason: Option<&str>,
) -> Result<()> {
    // What was noticed since the comparison began is not taken back by it.
    let statement = "
        with held as (select gap_count from highwater.watermark where source_table = $1 for update)
        update highwater.covered_partition set lacks_since = case when $3 then clock_timestamp() end, lacks_reason = $5
        where source_table = $1 and partition_oid = $2 and (lacks_since is not null) <> $3
          and exists (select from held where $3 or held.gap_count = $4)";
    let context = format!("writing whether the archive lacks rows of {}", verified.partition_name);
    let written = client
        .execute(
            statement,
            &[&verified.source_table, &verified.partition_oid, &lacks, &verified.gap_count, &reason],
        )
        .await;
    written.map_err(Error::sql(context)).map(drop)
}
