//! The replication slot as the server's catalog shows it.

use tokio_postgres::types::PgLsn;

use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{ReplicationConnection, Session};

/// A row of `pg_replication_slots` (manual section 54.19).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its name.
    pub(crate) name: String,
    /// What the server was last told to be durable.
    pub(crate) confirmed_flush_lsn: Lsn,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub(crate) wal_status: String,
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
                                                     else pg_current_wal_lsn() end, restart_lsn)::bigint
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
        retained_wal_bytes: row.try_get(4).map_err(Error::sql(unreadable))?,
    }))
}

/// The cluster's identity (`IDENTIFY_SYSTEM`, manual section 55.4), which any role with replication may ask.
///
/// # Errors
///
/// The server did not answer with one.
pub(crate) async fn system_identifier(connection: &mut ReplicationConnection) -> Result<String> {
    let rows = connection.query("IDENTIFY_SYSTEM").await?;
    let first = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    first.ok_or_else(|| Error::Protocol {
        context: "IDENTIFY_SYSTEM".to_owned(),
        detail: "the answer has no system identifier".to_owned(),
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
