//! What a session mends before it begins: the watermark rows that an earlier one left behind the logs.

use std::collections::BTreeMap;

use super::foreign;
use crate::archive::{self, Storage, Table, TableFile};
use crate::batch::EntitySpan;
use crate::config::Config;
use crate::decode::{self, Settled};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::tables::Kind;
use crate::watermark::{self, Advance, State, Watermark};

/// Brings the watermark rows up to the logs: a session that ended between the two left them behind. Must be
/// called before the first commit of a session. Gives the tables that have files which are none, of which nothing can be told.
///
/// # Errors
///
/// The rows can't be read or written, or storage fails.
pub(crate) async fn watermarks(
    storage: &Storage,
    tables: &[Table],
    sql: &mut Session,
    config: &Config,
) -> Result<Vec<(Kind, Error)>> {
    let mut broken = Vec::new();
    for table in tables.iter().filter(|table| table.totals().doubles_removed > 0) {
        let Some(name) = watermark::source_table(&config.schema, table.kind()) else { continue };
        let (total, entities) = (table.totals().doubles_removed, BTreeMap::new());
        // Whoever removed them may have died before it said so.
        sql.run(async |client| watermark::count_removed(client, &name, total, &entities).await).await?;
    }
    let watermarks = sql.run(watermark::read).await?;
    for table in tables {
        let Some(name) = watermark::source_table(&config.schema, table.kind()) else { continue };
        let Some(row) = watermarks.iter().find(|row| row.source_table == name) else { continue };
        if let Err(error) = check_archive_is_whole(table, row, config) {
            // What the watermark says is not to be relied on: nothing more may be purged.
            sql.run(async |client| watermark::mark_one_gap(client, &name).await).await?;
            return Err(error);
        }
        match settle(storage, table, row, sql).await {
            Err(error) if foreign::is_broken(&error) => broken.push((table.kind(), error)),
            settled => settled?,
        }
    }
    Ok(broken)
}

async fn settle(storage: &Storage, table: &Table, row: &Watermark, sql: &mut Session) -> Result<()> {
    if row.flushed_lsn < table.lsn() {
        catch_up(storage, table, row, sql).await?;
    }
    if row.state == State::Streaming && table.kind().entity().is_some() {
        entity_counts(storage, table, &row.source_table, sql).await?;
    }
    Ok(())
}

async fn catch_up(storage: &Storage, table: &Table, row: &Watermark, sql: &mut Session) -> Result<()> {
    let since = table.files().filter(|file| {
        file.name.as_ref().is_some_and(|name| name.lsn > row.flushed_lsn && name.lsn <= table.lsn())
    });
    let paths: Vec<String> = since.map(|file| file.path.clone()).collect();
    tracing::info!(
        table = row.source_table,
        files = paths.len(),
        from = %row.flushed_lsn,
        to = %table.lsn(),
        "bringing the watermark up to the archive"
    );
    let spans = spans(storage, table.kind(), &row.source_table, &paths).await?;
    let tables = [(row.source_table.clone(), table.totals())];
    let advance = Advance { lsn: table.lsn(), archived_before: None, tables: &tables, spans: &spans };
    sql.run(async |client| watermark::advance(client, &advance).await).await
}

/// Counts the rows of every entity anew, should they not add up to the rows of the table: positions of another history, in
/// the names of older files, can mislead [`watermarks`]. To be asked where no copy is under way. Where a file is gone they stay as they
/// are: that is noted by who looks for the files, and the file may come back.
///
/// # Errors
///
/// As [`watermarks`].
pub(crate) async fn entity_counts(
    storage: &Storage,
    table: &Table,
    name: &str,
    sql: &mut Session,
) -> Result<()> {
    let held = table.totals().row_count;
    let counted = sql.run(async |client| watermark::entity_row_count(client, name).await).await?;
    if u64::try_from(counted) == Ok(held) || table.files().any(|file| file.row_count.is_none()) {
        return Ok(());
    }
    tracing::info!(table = name, counted, held, "counting the rows of every entity anew");
    let paths: Vec<String> = table.files().map(|file| file.path.clone()).collect();
    let spans = match spans(storage, table.kind(), name, &paths).await {
        Err(Error::Storage { context, source: object_store::Error::NotFound { .. } }) => {
            tracing::warn!(
                table = name,
                "the rows of its entities can't be counted, because a file is gone ({context})"
            );
            return Ok(());
        }
        counted => counted?,
    };
    sql.run(async |client| watermark::recount(client, name, &spans).await).await
}

/// The entities of some files, with the table's name.
///
/// # Errors
///
/// A file can't be read.
pub(crate) async fn spans(
    storage: &Storage,
    kind: Kind,
    name: &str,
    paths: &[String],
) -> Result<Vec<(String, EntitySpan)>> {
    let entities = archive::entity_stats(storage, kind, paths).await?;
    Ok(entities.into_iter().map(|stats| (name.to_owned(), span(kind, stats))).collect())
}

/// The rows of a table that are in the quarantine, of which these are the files; for [`Decoder::begin_copy`].
///
/// Without those that are there because of a column that could not be archived, and can be now (`is_fit`): they are not odd rows,
/// and belong into the table itself.
///
/// [`Decoder::begin_copy`]: crate::decode::Decoder::begin_copy
///
/// # Errors
///
/// A file can't be read.
pub(crate) async fn quarantined<'a>(
    storage: &Storage,
    files: impl IntoIterator<Item = &'a TableFile>,
    (source_table, kind): (&str, Kind),
    is_fit: bool,
) -> Result<Settled> {
    let paths: Vec<String> = files.into_iter().map(|file| file.path.clone()).collect();
    let mut settled = Settled::new(&[kind]);
    let lsn = Lsn::ZERO.to_string();
    archive::each_quarantined(storage, &paths, |row| {
        let is_mended = is_fit && decode::is_about_column(row.reason) || decode::is_about_version(row.reason);
        if row.source_table == source_table && !is_mended {
            settled.add(source_table, row.row, &lsn);
        }
    })
    .await?;
    Ok(settled)
}

/// Rows are never removed from the archive, but for surplus copies, which are counted. Where it holds fewer than the watermark
/// says, it is another one, or a part of it was deleted; to go on would let a purge delete rows that nobody has any more.
fn check_archive_is_whole(table: &Table, row: &Watermark, config: &Config) -> Result<()> {
    let held = table.totals().row_count;
    // A foreign writer that merged our files need not have said how many rows its own hold.
    if table.files().any(|file| file.row_count.is_none()) {
        return Ok(());
    }
    if u64::try_from(row.row_count).is_ok_and(|expected| expected <= held) {
        return Ok(());
    }
    Err(Error::Setting {
        setting: "storage".to_owned(),
        value: config.storage.storage_uri.clone(),
        accepted: format!(
            "the archive that the watermark of {} speaks of: it has {} rows there, and {held} here (if rows were \
             deleted from the archive on purpose, lower row_count in highwater.watermark to that)",
            row.source_table, row.row_count
        ),
    })
}

fn span(kind: Kind, stats: archive::EntityStats) -> EntitySpan {
    EntitySpan {
        kind,
        entity: stats.entity,
        min_created_at: stats.min_created_at,
        max_created_at: stats.max_created_at,
        row_count: stats.row_count,
    }
}
