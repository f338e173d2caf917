//! The publication of updates and deletes: whether the stream can have it.
//!
//! The server looks for a publication in the catalog as it was where the log is decoded (manual section 49.2.1). So one that is younger
//! than what is left of the log would end the stream at every start. Then a session goes without it, and its tables are gaps, until the
//! slot has passed the place where it was missing; the next session streams both, and completes these tables.

use super::wants::Wants;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::{NO_PUBLICATION, Session};
use crate::setup;
use crate::source::slot::{self, Slot};
use crate::watermark::{self, Watermark};

/// The publications that a session is to stream. `found` is the slot as it is before that.
///
/// # Errors
///
/// A query failed.
pub(super) async fn streamed(
    config: &Config,
    sql: &mut Session,
    found: Option<&Slot>,
    wants: &Wants,
) -> Result<Vec<String>> {
    let mut names = vec![config.publication.clone()];
    wants.stream_versions(false);
    if !config.keeps_versions() {
        return Ok(names);
    }
    if wants.is_behind() && wants.behind().is_none() {
        wants.behind_until(sql.run(slot::wal_end).await?);
    }
    let has_passed = |slot: &Slot| wants.behind().is_none_or(|end| slot.confirmed_flush_lsn >= end);
    let versions = config.versions_publication();
    let exists = sql.run(async |client| setup::has_publication(client, &versions).await).await?;
    if exists && found.is_none_or(has_passed) {
        wants.catch_up();
        wants.stream_versions(true);
        names.push(versions);
        return Ok(names);
    }
    for kind in config.kinds().into_iter().filter(|kind| kind.keeps_versions()) {
        let Some(table) = kind.source_table(&config.schema) else { continue };
        if sql.run(async |client| watermark::mark_one_gap(client, &table).await).await? {
            tracing::warn!(
                table,
                publication = versions,
                "gap: the stream goes without the publication; its rows will be compared with the archive"
            );
        }
    }
    Ok(names)
}

/// Whether a stream has ended because the publication is younger than what it was at. The next session then goes without it.
pub(super) fn has_fallen_behind(error: &Error, wants: &Wants) -> bool {
    let is_missing = matches!(error, Error::Slot { detail, .. } if detail.contains(NO_PUBLICATION));
    let has_fallen = is_missing && wants.has_versions();
    if has_fallen {
        wants.fall_behind();
    }
    has_fallen
}

/// Whether the stream brings what happens in a table.
pub(super) fn is_streamed(config: &Config, row: &Watermark, wants: &Wants) -> bool {
    wants.has_versions() || config.kind(&row.kind).is_none_or(|kind| !kind.keeps_versions())
}

/// Whether a session that goes without the publication can be followed by one that has it.
///
/// # Errors
///
/// A query failed.
pub(super) async fn can_join(config: &Config, sql: &mut Session, wants: &Wants) -> Result<bool> {
    if wants.has_versions() || !config.keeps_versions() {
        return Ok(false);
    }
    let versions = config.versions_publication();
    if !sql.run(async |client| setup::has_publication(client, &versions).await).await? {
        return Ok(false);
    }
    let found = slot::find(sql, &config.slot).await?;
    Ok(wants.behind().is_none_or(|end| found.is_some_and(|slot| slot.confirmed_flush_lsn >= end)))
}

/// The error that ends a session whose successor streams the publication.
pub(super) fn to_be_joined(config: &Config) -> Error {
    let publication = config.versions_publication();
    Error::Anew {
        detail: format!("publication {publication} can be streamed by now; the stream begins anew"),
    }
}
