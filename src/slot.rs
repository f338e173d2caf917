//! The replication slot as the server's catalog shows it.

use tokio_postgres::types::PgLsn;

use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session, quote_identifier};

/// A row of `pg_replication_slots` (manual section 54.19).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its name.
    pub(crate) name: String,
    /// What the server was last told to be durable.
    pub(crate) confirmed_flush_lsn: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub(crate) wal_status: String,
    /// The server process that streams from it.
    pub active_pid: Option<i32>,
    /// Bytes of log that it keeps from being removed; `None` when it is lost.
    pub(crate) retained_wal_bytes: Option<i64>,
}

/// The slot of that name in the session's database.
///
/// # Errors
///
/// The query failed, or the slot is one that pgoutput can't use.
pub(crate) async fn find(sql: &mut Session, name: &str) -> Result<Option<Slot>> {
    let row = sql
        .run(async |client| {
            let query = "select plugin::text, database::text = current_database(), confirmed_flush_lsn,
                                coalesce(wal_status, 'reserved'),
                                pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn()
                                                     else pg_current_wal_lsn() end, restart_lsn)::bigint, active_pid
                         from pg_replication_slots where slot_name = $1";
            client.query_opt(query, &[&name]).await.map_err(Error::sql(format!("looking for slot {name:?}")))
        })
        .await?;
    let Some(row) = row else { return Ok(None) };
    let unreadable = "reading pg_replication_slots";
    let plugin: Option<String> = row.try_get(0).map_err(Error::sql(unreadable))?;
    let here: Option<bool> = row.try_get(1).map_err(Error::sql(unreadable))?;
    let lsn: Option<PgLsn> = row.try_get(2).map_err(Error::sql(unreadable))?;
    let (Some("pgoutput"), Some(true), Some(lsn)) = (plugin.as_deref(), here, lsn) else {
        let detail = format!(
            "it is not a pgoutput slot of this database (plugin {}); choose another name with HIGHWATER_SLOT",
            plugin.as_deref().unwrap_or("none")
        );
        return Err(Error::Slot { slot: name.to_owned(), detail, transient: false });
    };
    Ok(Some(Slot {
        name: name.to_owned(),
        confirmed_flush_lsn: Lsn(lsn.into()),
        wal_status: row.try_get(3).map_err(Error::sql(unreadable))?,
        active_pid: row.try_get(5).map_err(Error::sql(unreadable))?,
        retained_wal_bytes: row.try_get(4).map_err(Error::sql(unreadable))?,
    }))
}

/// Makes a pgoutput slot (`CREATE_REPLICATION_SLOT`, manual section 55.4); with `kind` and `snapshot` in the command's own words.
/// Returns its consistent point, and the name of the snapshot if one is exported.
///
/// # Errors
///
/// The server refused, or did not answer as it should.
pub(crate) async fn create(
    connection: &mut ReplicationConnection,
    name: &str,
    kind: &str,
    snapshot: &str,
) -> Result<(Lsn, Option<String>)> {
    let name = quote_identifier(name);
    let command = format!("CREATE_REPLICATION_SLOT {name} {kind} pgoutput (SNAPSHOT '{snapshot}')");
    let rows = connection.query(&command).await?;
    let mut row = rows.into_iter().next().unwrap_or_default().into_iter();
    let (point, snapshot) = (row.nth(1).flatten(), row.next().flatten());
    let point = point.and_then(|text| text.parse().ok()).ok_or_else(|| Error::Protocol {
        context: "CREATE_REPLICATION_SLOT".to_owned(),
        detail: "the answer has no consistent point".to_owned(),
    })?;
    Ok((point, snapshot))
}

/// Prefix and content of the logical message that asks for a checkpoint.
pub(crate) const CHECKPOINT_REQUEST: (&[u8], &[u8]) = (b"highwater", b"checkpoint");

/// Asks whoever archives this database to make everything durable that is committed by now, and to say so in the logs of the
/// archive and in the watermark rows, rather than when it is due.
///
/// # Errors
///
/// The statement failed.
pub(crate) async fn ask_for_checkpoint(client: &tokio_postgres::Client) -> Result<()> {
    // Outside of a transaction it would not be sent at its place among them.
    let statement = "select pg_logical_emit_message(true, 'highwater', 'checkpoint')";
    client.query(statement, &[]).await.map_err(Error::sql("asking for a checkpoint")).map(drop)
}

/// A cluster, and the history of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) system_identifier: String,
    pub(crate) timeline_id: i32,
}

/// Asks the server who it is (`IDENTIFY_SYSTEM`, manual section 55.4), which any role with replication may.
///
/// # Errors
///
/// The server did not answer as it should.
pub(crate) async fn identify(connection: &mut ReplicationConnection) -> Result<Identity> {
    let rows = connection.query("IDENTIFY_SYSTEM").await?;
    let mut row = rows.into_iter().next().unwrap_or_default().into_iter();
    let (system, timeline) = (row.next().flatten(), row.next().flatten());
    match (system, timeline.and_then(|text| text.parse().ok())) {
        (Some(system_identifier), Some(timeline_id)) => Ok(Identity { system_identifier, timeline_id }),
        _ => Err(Error::Protocol {
            context: "IDENTIFY_SYSTEM".to_owned(),
            detail: "the answer has no system identifier and timeline".to_owned(),
        }),
    }
}

/// Where an earlier timeline ended, by the history of a later one (`TIMELINE_HISTORY`, manual section 55.4): a line for
/// each, with its number, the position of the switch and a reason. `None`: it is no ancestor.
///
/// # Errors
///
/// The server has no such history.
pub(crate) async fn switch_point(
    connection: &mut ReplicationConnection,
    of: i32,
    in_history_of: i32,
) -> Result<Option<Lsn>> {
    let rows = connection.query(&format!("TIMELINE_HISTORY {in_history_of}")).await?;
    let content = rows.first().and_then(|row| row.get(1)?.clone()).unwrap_or_default();
    Ok(parse_history(&content, of))
}

fn parse_history(content: &str, timeline: i32) -> Option<Lsn> {
    content.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let is_it = fields.next()?.parse::<i32>() == Ok(timeline);
        is_it.then(|| fields.next()?.parse().ok()).flatten()
    })
}

/// Where the server's log ends now.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn wal_end(client: &tokio_postgres::Client) -> Result<Lsn> {
    let query =
        "select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end";
    let row = client.query_one(query, &[]).await.map_err(Error::sql("reading the end of the log"))?;
    let lsn: PgLsn = row.try_get(0).map_err(Error::sql("reading the end of the log"))?;
    Ok(Lsn(lsn.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_names_where_each_timeline_ended() {
        let content = "1\t0/3000110\tno recovery target specified\n\n2\t16/B374D848\tbefore 2026-11-22\n";
        assert_eq!(parse_history(content, 1), Some(Lsn(0x300_0110)));
        assert_eq!(parse_history(content, 2), Some(Lsn(0x16_B374_D848)));
        assert_eq!(parse_history(content, 3), None);
        assert_eq!(parse_history("nonsense", 1), None);
    }
}
