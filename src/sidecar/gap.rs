//! Gaps: noticing that rows may have passed the stream, and which of them can be mended now.

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::source::coverage;
use crate::watermark::{self, State, Watermark};

/// Marks the tables whose rows the stream may not see: those that the publication does not send, and those with a partition
/// that came with rows in it. Must come before every move of a watermark.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn notice(sql: &mut Session, slot: &str, publication: &str) -> Result<()> {
    notice_unpublished(sql, slot, publication).await?;
    notice_partitions(sql, slot).await
}

/// Marks the tables that the publication does not send, or may not have sent all the time.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn notice_unpublished(sql: &mut Session, slot: &str, publication: &str) -> Result<()> {
    for found in sql.run(async |client| watermark::mark_unpublished(client, slot, publication).await).await? {
        let table = found.source_table;
        if found.is_published {
            tracing::warn!(
                table,
                publication,
                "gap: the publication was changed, and may have let rows pass meanwhile; they will be compared with the archive"
            );
        } else {
            tracing::error!(
                table,
                publication,
                "gap: the publication does not send the table's inserts; its purge is blocked. `highwater setup` mends the \
                 publication, then what was missed is added"
            );
        }
    }
    Ok(())
}

/// Marks the tables with a partition that came with rows in it.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn notice_partitions(sql: &mut Session, slot: &str) -> Result<()> {
    for found in sql.run(async |client| coverage::uncovered(client, slot).await).await? {
        let table = found.source_table.as_str();
        if sql.run(async |client| watermark::mark_one_gap(client, table).await).await? {
            tracing::warn!(
                table,
                partition = found.partition,
                "gap: the partition holds rows that may not have passed the stream; they will be compared with the archive"
            );
        }
    }
    Ok(())
}

/// The tables of a slot that may lack rows.
#[derive(Debug)]
pub(crate) struct Incomplete {
    /// They can be completed: the publication sends what is written to them from now on.
    pub(crate) mendable: Vec<Watermark>,
    /// The publication does not.
    pub(crate) unpublished: Vec<Watermark>,
}

impl Incomplete {
    /// Leaves out the tables that are not to be had.
    pub(crate) fn keep(&mut self, is_kept: impl Fn(&Watermark) -> bool) {
        self.mendable.retain(&is_kept);
        self.unpublished.retain(&is_kept);
    }
}

/// Reads which tables lack rows.
///
/// # Errors
///
/// A query failed.
pub(crate) async fn incomplete(client: &Client, slot: &str, publication: &str) -> Result<Incomplete> {
    let names = watermark::unpublished(client, slot, publication).await?;
    let rows = watermark::read(client).await?.into_iter();
    let (unpublished, mendable) = rows
        .filter(|row| row.slot_name == slot && row.state != State::Streaming)
        .partition(|row| names.contains(&row.source_table));
    Ok(Incomplete { mendable, unpublished })
}

/// The error that ends a session whose successor has something to mend.
pub(crate) fn to_be_mended(tables: &[Watermark]) -> Error {
    let names: Vec<&str> = tables.iter().map(|row| row.source_table.as_str()).collect();
    let names = names.join(", ");
    Error::Anew { detail: format!("rows of {names} are to be added; the stream begins anew for that") }
}
