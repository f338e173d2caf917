//! What somebody else has done to the archive, for the purge: `highwater.archive_log`, and partitions that may lack rows.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use tokio_postgres::Client;

use super::signed;
use crate::error::{Error, Result};
use crate::tables::Kind;

/// How far the log of one Delta table was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveLog {
    /// Every entry up to this version was looked at.
    pub version: u64,
    /// When somebody has last taken archived rows out of the table.
    pub removal_at: Option<SystemTime>,
}

const READING: &str = "reading highwater.archive_log";

/// Reads how far the logs were looked at, by the table's name.
///
/// # Errors
///
/// The query failed.
pub async fn read_archive_logs(client: &Client) -> Result<BTreeMap<String, ArchiveLog>> {
    let failed = || Error::sql(READING);
    let query = "select kind, version, removal_at from highwater.archive_log";
    let mut logs = BTreeMap::new();
    for row in client.query(query, &[]).await.map_err(failed())? {
        let version: i64 = row.try_get(1).map_err(failed())?;
        let removal_at: Option<DateTime<Utc>> = row.try_get(2).map_err(failed())?;
        let log =
            ArchiveLog { version: version.unsigned_abs(), removal_at: removal_at.map(SystemTime::from) };
        logs.insert(row.try_get(0).map_err(failed())?, log);
    }
    Ok(logs)
}

/// Writes down that a table's log was looked at up to a version, and its files, `age` ago. A purge relies on it for as long as `trust`.
/// `damage` says which files are gone, for people.
///
/// # Errors
///
/// The statement failed.
pub async fn set_looked(
    client: &Client,
    kind: Kind,
    version: u64,
    age: Duration,
    trust: Duration,
    damage: Option<&str>,
) -> Result<()> {
    let statement = "
        insert into highwater.archive_log as l (kind, version, looked_at, purge_trust, damage_note)
        values ($1, $2, clock_timestamp() - $3::float8 * interval '1 second',
                justify_hours($4::float8 * interval '1 second'), $5)
        on conflict (kind) do update
        set version = greatest(l.version, excluded.version), looked_at = greatest(l.looked_at, excluded.looked_at),
            purge_trust = excluded.purge_trust, damage_note = excluded.damage_note";
    let (age, trust) = (age.as_secs_f64(), trust.as_secs_f64());
    let written = client.execute(statement, &[&kind.name(), &signed(version), &age, &trust, &damage]).await;
    written.map_err(Error::sql(format!("writing that the log of {} was looked at", kind.name()))).map(drop)
}

/// Writes down that what others did up to a version of a table's log is noted; whether its files are there was not looked at.
///
/// # Errors
///
/// The statement failed.
pub async fn set_noted(client: &Client, kind: Kind, version: u64) -> Result<()> {
    let statement = "update highwater.archive_log set version = greatest(version, $2) where kind = $1";
    let written = client.execute(statement, &[&kind.name(), &signed(version)]).await;
    written.map_err(Error::sql(format!("writing that the log of {} was looked at", kind.name()))).map(drop)
}

/// What is written down of somebody else's entry in a table's log.
#[derive(Clone, Copy, Debug)]
pub struct Removal<'a> {
    /// The table.
    pub kind: Kind,
    /// The entry's version.
    pub version: u64,
    /// What happened, and how to go back.
    pub note: &'a str,
    /// How many rows fewer the table has; negative if they are more. `None` if that is not known.
    pub row_count: Option<i64>,
    /// It has brought rows back.
    pub is_return: bool,
}

/// Writes down that somebody has taken archived rows out of a table, or has brought some back. Of several the first and the last are told:
/// the version before the first has the most. All are forgotten when no row is missing any more, by the counts of the entries.
///
/// # Errors
///
/// The statement failed.
pub async fn note_removal(client: &Client, removal: &Removal<'_>) -> Result<()> {
    // Without a look nobody may purge, so the row begins with one that is too old.
    let statement = "
        insert into highwater.archive_log as l
            (kind, version, looked_at, purge_trust, removal_version, removal_at, removal_note, removed_rows)
        values ($1, 0, to_timestamp(0), interval '0', $2, clock_timestamp(), $3, $4)
        on conflict (kind) do update
        set removal_version = excluded.removal_version, removal_at = excluded.removal_at,
            removed_rows = case when l.removal_note is null then 0 else l.removed_rows end + excluded.removed_rows,
            removal_note = case when $5 and (l.removal_note is null or l.removed_rows + excluded.removed_rows <= 0) then null
                                when l.removal_note is null or strpos(l.removal_note, excluded.removal_note) > 0
                                  then coalesce(l.removal_note, excluded.removal_note)
                                else split_part(l.removal_note, '; then ', 1) || '; then ' || excluded.removal_note end";
    let Removal { kind, version, note, row_count, is_return } = *removal;
    let written =
        client.execute(statement, &[&kind.name(), &signed(version), &note, &row_count, &is_return]).await;
    written.map_err(Error::sql(format!("writing what was taken out of {}", kind.name()))).map(drop)
}

/// What is not to be relied on any more of a drift table.
#[derive(Clone, Copy, Debug)]
pub struct Void<'a> {
    /// The drift table.
    pub source_table: &'a str,
    /// Its partitions whose rows may be concerned.
    pub partitions: &'a [u32],
    /// Why rows of them may be missing, which blocks their purge until they were compared; without it they are only to be
    /// read back again.
    pub reason: Option<&'a str>,
    /// How many rows the archive holds now, if that may be fewer than before.
    pub row_count: Option<u64>,
}

/// Takes back what verifications have said of some partitions; one that is under way is not recorded.
///
/// # Errors
///
/// The statement failed.
pub async fn void_partitions(client: &Client, void: &Void<'_>) -> Result<()> {
    let statement = "select highwater.void_partitions($1, $2::oid[], $3::text, $4::bigint)";
    let row_count = void.row_count.map(signed);
    let voided =
        client.execute(statement, &[&void.source_table, &void.partitions, &void.reason, &row_count]).await;
    voided.map_err(Error::sql(format!("taking back what was verified of {}", void.source_table))).map(drop)
}
