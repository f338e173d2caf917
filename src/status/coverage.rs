//! Which partitions of the archived tables Postgres has, and what is known of each.

use std::collections::HashSet;

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::purge;
use crate::source::{self, Source};
use crate::watermark::{self, State};

/// A partition (a plain table is its own), and what is known of it.
#[derive(Clone, Debug)]
pub(crate) struct PartitionCover {
    pub(crate) source_table: String,
    /// Microseconds since the epoch that its rows are within (first, and first after the last), if it has any.
    pub(crate) range: (i64, i64),
    /// Whether the range is a partition's; else it may have rows of any day in it, and none of many.
    pub(crate) is_bounded: bool,
    /// Every row of it is archived, or on its way.
    pub(crate) is_covered: bool,
    /// It was compared with the archive, and is equal.
    pub(crate) is_verified: bool,
    /// The archive is known to lack rows of it, or may.
    pub(crate) lacks: bool,
}

/// Looks at the partitions of the tables that the slot archives.
pub(super) async fn read(client: &Client, slot_name: &str) -> Result<Vec<PartitionCover>> {
    let verified = verified(client).await?;
    let mut all = Vec::new();
    for row in watermark::read(client).await?.iter().filter(|row| row.slot_name == slot_name) {
        let Some(source) = Source::find(client, row).await? else { continue };
        let is_whole = row.state == State::Streaming;
        // What is not a partition of its own is purged row by row.
        let purged = purge::cutoff(client, &row.source_table, true).await?.unwrap_or(i64::MIN);
        for holder in source::holders(client, &row.source_table, source.oid).await? {
            let bounds = holder.bounds.or(holder.extent);
            // A default partition mostly.
            if bounds.is_none() && holder.rows_expected < 1.0 {
                continue;
            }
            all.push(PartitionCover {
                source_table: row.source_table.clone(),
                range: bounds.unwrap_or((purged, i64::MAX)),
                is_bounded: bounds.is_some(),
                is_covered: holder.is_covered && is_whole,
                is_verified: verified.contains(&(row.source_table.clone(), holder.oid)),
                lacks: holder.lacks,
            });
        }
    }
    Ok(all)
}

async fn verified(client: &Client) -> Result<HashSet<(String, u32)>> {
    let failed = || Error::sql("reading highwater.verified_partition");
    let query = "select source_table, partition_oid from highwater.verified_partition";
    let rows = client.query(query, &[]).await.map_err(failed())?;
    rows.iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(failed())
}
