//! Whether this server goes on with the log that the archive is of, and the slot that it needs for that.

use crate::archive::Table;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session, quote_identifier};
use crate::setup;
use crate::source::slot::{self, Identity, Slot};
use crate::tables::Kind;
use crate::watermark::{self, Watermark};

/// What the server has to do with the one that the watermarks speak of.
pub(super) enum History {
    /// It is that server. Where the timelines ended that the watermarks speak of, by table, if they are not its own.
    Same { switches: Vec<(String, Lsn)> },
    /// It is another one, or has lost a part of the log, and whoever runs us says that it takes its place.
    Accepted,
}

/// Refuses a server that the watermarks don't speak of, unless told otherwise: it may be the wrong one.
pub(super) async fn history(
    config: &Config,
    connection: &mut ReplicationConnection,
    watermarks: &[Watermark],
    identity: &Identity,
    slot: Option<&Slot>,
) -> Result<History> {
    let refuse = |detail: String| Error::Slot { slot: config.slot.clone(), detail, transient: false };
    if watermarks.is_empty() {
        return Err(refuse("no table is archived through it yet; run `highwater setup`".to_owned()));
    }
    if let Some(other) = watermarks.iter().find(|row| row.slot_name != config.slot) {
        return Err(refuse(format!("{} is archived through slot {:?}", other.source_table, other.slot_name)));
    }
    let system = &identity.system_identifier;
    if let Some(other) = watermarks.iter().find(|row| row.system_identifier != *system) {
        if config.accept_new_system {
            return Ok(History::Accepted);
        }
        return Err(refuse(format!(
            "this server is system {system}, but {} is archived from system {}: a restored or promoted copy, or the wrong \
             database; if it has taken the place of the other for good, start once with --accept-new-system",
            other.source_table, other.system_identifier
        )));
    }
    let switches = switch_points(connection, watermarks, identity.timeline_id).await?;
    if config.accept_new_system && !switches.is_empty() {
        return Ok(History::Accepted);
    }
    if slot.is_none() && !switches.is_empty() {
        return Err(refuse(format!(
            "the server is on timeline {}, the archive's position on an earlier one, and the slot is not here: a promoted \
             copy; if it has taken the place of the other for good, start once with --accept-new-system, which makes the \
             slot and compares every row with the archive",
            identity.timeline_id
        )));
    }
    Ok(History::Same { switches })
}

/// Makes a new slot where the old one is gone or of no more use. What was written meanwhile is a gap; that is on record
/// before the new slot can hide it.
pub(super) async fn ensure_slot(
    config: &Config,
    sql: &mut Session,
    connection: &mut ReplicationConnection,
    found: Option<Slot>,
) -> Result<()> {
    let what = match &found {
        Some(slot) if slot.wal_status != "lost" => return Ok(()),
        Some(slot) => format!(
            "the server has removed WAL that the slot still needed (wal_status is lost{})",
            slot.invalidation_reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default()
        ),
        None => "the slot does not exist".to_owned(),
    };
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(table, "gap: {what}, so rows may have passed unseen; its purge is blocked");
    }
    tracing::warn!(
        slot = config.slot,
        "{what}: making a new one, then adding the rows that the archive lacks"
    );
    let publication = config.publication.as_str();
    let is_published = sql.run(async |client| setup::has_publication(client, publication).await).await?;
    if !is_published {
        let detail = format!("{what}, and publication {publication:?} neither; run `highwater setup`");
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    if found.is_some() {
        connection.query(&format!("DROP_REPLICATION_SLOT {}", quote_identifier(&config.slot))).await?;
    }
    failpoint::hit("before-new-slot");
    let nothing = slot::SnapshotUse::Nothing;
    let lifetime = slot::Lifetime::Lasting { failover: config.failover };
    slot::create(&config.source, connection, &config.slot, lifetime, nothing).await.map(drop)
}

/// A slot ahead of the archive means that rows were skipped.
pub(super) async fn check_gap(config: &Config, sql: &mut Session, slot: &Slot) -> Result<()> {
    let watermarks = sql.run(watermark::read).await?;
    // The row of a table that was left out stands still, and says so already. So does that of one that nothing describes, of which
    // nothing was archived.
    let (known, unknown): (Vec<&Watermark>, Vec<&Watermark>) = watermarks
        .iter()
        .filter(|row| row.state != watermark::State::Gap && row.slot_name == config.slot)
        .partition(|row| config.kind(&row.kind).is_some());
    for row in unknown {
        let table = row.source_table.as_str();
        if sql.run(async |client| watermark::mark_one_gap(client, table).await).await? {
            tracing::error!(
                table,
                "gap: neither a [[table]] section nor the archive describes the table; its purge is blocked"
            );
        }
    }
    let mut complete = known.into_iter();
    if complete.all(|row| slot.confirmed_flush_lsn <= row.flushed_lsn) {
        return Ok(());
    }
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(
            table,
            slot_at = %slot.confirmed_flush_lsn,
            "gap: the slot is ahead of the archive, so rows were skipped; the table's purge is blocked until they are found"
        );
    }
    Ok(())
}

/// Where the timelines ended that the watermarks speak of, if they are not the server's: by watermark.
async fn switch_points(
    connection: &mut ReplicationConnection,
    watermarks: &[Watermark],
    timeline_id: i32,
) -> Result<Vec<(String, Lsn)>> {
    let mut switches = Vec::new();
    for row in watermarks.iter().filter(|row| row.timeline_id != timeline_id) {
        let switch = slot::switch_point(connection, row.timeline_id, timeline_id).await?;
        // No ancestor: nothing that was archived is certain to be in this server's log.
        switches.push((row.source_table.clone(), switch.unwrap_or(Lsn::ZERO)));
    }
    Ok(switches)
}

/// Where the timelines ended that the archive's positions are of, if they are not the server's: by kind. The watermarks are
/// those of the server that is asked: where two claim to be the primary, each has its own, but there is one archive.
pub(super) async fn logged_switches(
    config: &Config,
    tables: &[Table],
    identity: &Identity,
) -> Result<Vec<(Kind, Lsn)>> {
    let mut switches = Vec::new();
    let mut connection = None;
    for table in tables {
        let Some(logged) = table.timeline().filter(|logged| *logged != identity.timeline_id) else {
            continue;
        };
        let mut switch = None;
        // A later timeline is in no history of this one.
        if logged < identity.timeline_id {
            let mut server = match connection.take() {
                Some(server) => server,
                None => ReplicationConnection::connect(&config.source).await?,
            };
            switch = slot::switch_point(&mut server, logged, identity.timeline_id).await?;
            connection = Some(server);
        }
        switches.push((table.kind(), switch.unwrap_or(Lsn::ZERO)));
    }
    Ok(switches)
}

/// A server that was promoted before it had received everything has lost transactions that are archived, and uses
/// their positions again: what it writes there would be taken for archived. So the archive must not reach past the point
/// where the timelines part; nor past the end of the server's log.
pub(super) async fn check_timeline(
    config: &Config,
    sql: &mut Session,
    tables: &[Table],
    switches: &[(String, Lsn)],
    logged: &[(Kind, Lsn)],
) -> Result<()> {
    let wal_end = sql.run(slot::wal_end).await?;
    let watermarks = sql.run(watermark::read).await?;
    for table in tables {
        let name = watermark::source_table(&config.schema, table.kind());
        let row = watermarks.iter().find(|row| Some(&row.source_table) == name.as_ref());
        let reach = table.lsn().max(row.map_or(Lsn::ZERO, |row| row.flushed_lsn));
        // The quarantine has no watermark; it moves with the others.
        let switch =
            switches.iter().filter(|(switched, _)| name.as_ref().is_none_or(|name| name == switched));
        let logged_here = logged.iter().filter(|(kind, _)| *kind == table.kind());
        let switch = switch.map(|(_, lsn)| *lsn).chain(logged_here.map(|(_, lsn)| *lsn)).min();
        let end = switch.map_or(wal_end, |lsn| lsn.min(wal_end));
        if reach <= end {
            continue;
        }
        sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await?;
        let detail = format!(
            "the server's log holds what was written up to {end}, but the archive of {} reaches {reach}: the server has lost \
             what is archived (a promoted standby, a restored copy?), and new rows can't be told from archived ones by their \
             position; {}",
            table.kind().name(),
            if switches.is_empty() && logged.is_empty() {
                "give HIGHWATER_SLOT a new name and run `highwater setup`, which makes it and marks the gap; then drop the \
                 old slot"
            } else {
                "if this server has taken the place of the other for good, start once with --accept-new-system, which \
                 compares every row with the archive"
            },
        );
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    Ok(())
}
