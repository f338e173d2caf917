//! The replication slot as the server's catalog shows it.

use std::fmt;
use std::future::pending;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::types::PgLsn;

use crate::config::SourceConfig;
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
    /// Whether standbys are to have it, too; `None` before PostgreSQL 17, which has no such slots.
    pub(crate) failover: Option<bool>,
    /// Why it is lost, as far as the server says (from 17 on).
    pub(crate) invalidation_reason: Option<String>,
    /// Since when nobody streams from it, RFC 3339, as far as the server says (from 17 on).
    pub(crate) inactive_since: Option<String>,
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
                                                     else pg_current_wal_lsn() end, restart_lsn)::bigint, active_pid,
                                (to_jsonb(s) ->> 'failover')::boolean, to_jsonb(s) ->> 'invalidation_reason',
                                to_char((to_jsonb(s) ->> 'inactive_since')::timestamptz at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')
                         from pg_replication_slots s where slot_name = $1";
            client.query_opt(query, &[&name]).await.map_err(Error::sql(format!("looking for slot {name:?}")))
        })
        .await?;
    let Some(row) = row else { return Ok(None) };
    let unreadable = "reading pg_replication_slots";
    let plugin: Option<String> = row.try_get(0).map_err(Error::sql(unreadable))?;
    let here: Option<bool> = row.try_get(1).map_err(Error::sql(unreadable))?;
    let lsn: Option<PgLsn> = row.try_get(2).map_err(Error::sql(unreadable))?;
    let active_pid: Option<i32> = row.try_get(5).map_err(Error::sql(unreadable))?;
    if let (Some("pgoutput"), Some(true), None, Some(pid)) = (plugin.as_deref(), here, lsn, active_pid) {
        let detail = format!(
            "process {pid} is still making it, and waits for transactions that began before; let them end, or take it back with \
             `select pg_terminate_backend({pid});`"
        );
        return Err(Error::Slot { slot: name.to_owned(), detail, transient: true });
    }
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
        active_pid,
        retained_wal_bytes: row.try_get(4).map_err(Error::sql(unreadable))?,
        failover: row.try_get(6).map_err(Error::sql(unreadable))?,
        invalidation_reason: row.try_get(7).map_err(Error::sql(unreadable))?,
        inactive_since: row.try_get(8).map_err(Error::sql(unreadable))?,
    }))
}

/// How long a new slot is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// As long as its connection.
    Connection,
    /// Until somebody drops it; on standbys, too, if that is wanted and the server can.
    Lasting {
        /// Whether it is wanted.
        failover: bool,
    },
}

/// Whether somebody streams from the slot of that name.
///
/// # Errors
///
/// As [`find`].
pub(crate) async fn is_held(sql: &mut Session, name: &str) -> Result<bool> {
    Ok(find(sql, name).await?.is_some_and(|slot| slot.active_pid.is_some()))
}

/// What becomes of the snapshot that a new slot has (manual section 55.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SnapshotUse {
    /// Nobody wants it.
    Nothing,
    /// Others may import it, until the connection is used again.
    Export,
    /// It is that of the transaction in which the connection is from then on.
    Take,
}

/// Makes a pgoutput slot (`CREATE_REPLICATION_SLOT`, manual section 55.4); for as long as `lifetime` says.
/// Returns its consistent point, and the name of the snapshot if one is exported.
///
/// That takes until every transaction has ended that runs now. After a few seconds the log says whom it waits for. If we end
/// meanwhile, the server takes back what it has made.
///
/// # Errors
///
/// The server refused, or did not answer as it should.
pub(crate) async fn create(
    source: &SourceConfig,
    connection: &mut ReplicationConnection,
    name: &str,
    lifetime: Lifetime,
    snapshot: SnapshotUse,
) -> Result<(Lsn, Option<String>)> {
    let (kind, more) = match lifetime {
        Lifetime::Connection => ("TEMPORARY LOGICAL", ""),
        Lifetime::Lasting { failover } if failover && keeps_on_standbys(connection).await? => {
            ("LOGICAL", ", FAILOVER true")
        }
        Lifetime::Lasting { .. } => ("LOGICAL", ""),
    };
    connection.query(NOTICE_LOSS).await?;
    let snapshot = match snapshot {
        SnapshotUse::Nothing => "nothing",
        SnapshotUse::Export => "export",
        SnapshotUse::Take => {
            connection.query("begin transaction isolation level repeatable read read only").await?;
            "use"
        }
    };
    let command = format!(
        "CREATE_REPLICATION_SLOT {} {kind} pgoutput (SNAPSHOT '{snapshot}'{more})",
        quote_identifier(name)
    );
    let process = connection.process_id();
    let rows = tokio::select! {
        rows = connection.query(&command) => rows?,
        () = tell_waiting(source, name, process) => Vec::new(),
    };
    let mut row = rows.into_iter().next().unwrap_or_default().into_iter();
    let (point, snapshot) = (row.nth(1).flatten(), row.next().flatten());
    let point = point.and_then(|text| text.parse().ok()).ok_or_else(|| Error::Protocol {
        context: "CREATE_REPLICATION_SLOT".to_owned(),
        detail: "the answer has no consistent point".to_owned(),
    })?;
    Ok((point, snapshot))
}

/// Whether the server can keep slots on its standbys (manual of PostgreSQL 17, section 47.2.3).
async fn keeps_on_standbys(connection: &mut ReplicationConnection) -> Result<bool> {
    let rows = connection.query("select current_setting('server_version_num')::int >= 170000").await?;
    Ok(rows.first().and_then(|row| row.first()?.as_deref()) == Some("t"))
}

/// Has the server keep a slot, which nobody may hold, on its standbys, or not any more (`ALTER_REPLICATION_SLOT`, manual of
/// PostgreSQL 17, section 53.4).
///
/// # Errors
///
/// The server refused.
pub(crate) async fn set_failover(
    connection: &mut ReplicationConnection,
    name: &str,
    failover: bool,
) -> Result<()> {
    let command = format!("ALTER_REPLICATION_SLOT {} (FAILOVER {failover})", quote_identifier(name));
    connection.query(&command).await.map(drop)
}

/// A process that waits doesn't see by itself that its client is gone, and what it was to make would stay behind, half-made.
/// The second statement starts the clock, which goes on in the command that follows (where the server's system can tell).
const NOTICE_LOSS: &str = "
    do $$ begin
        set client_connection_check_interval = '2s';
    exception when others then null;
    end $$;
    select 1";

/// When it is first said whom a slot waits for, and how often it is looked up.
const WAIT_INTERVAL: Duration = Duration::from_secs(3);

/// After how many looks it is said again.
const WAIT_REMINDER: u32 = 20;

/// Says whom a server process that makes a slot waits for; never returns.
async fn tell_waiting(source: &SourceConfig, slot: &str, process: i32) {
    let mut sql = Session::new(source.clone());
    let mut told = Vec::new();
    for look in 1_u32.. {
        sleep(WAIT_INTERVAL).await;
        match sql.run(async |client| holders_up(client, process).await).await {
            Ok(found) if !found.is_empty() && (found != told || look.is_multiple_of(WAIT_REMINDER)) => {
                tracing::warn!(
                    slot,
                    "still waiting for what began before, until it ends: {}; a slot can begin only then, and Ctrl-C leaves \
                     nothing behind",
                    found.iter().map(Holdup::to_string).collect::<Vec<_>>().join("; ")
                );
                told = found;
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(slot, error = error.chain(), "looking whom the slot waits for"),
        }
    }
    pending().await
}

/// A transaction that a process waits for.
#[derive(Debug)]
struct Holdup {
    who: String,
    age: String,
    what: String,
}

impl PartialEq for Holdup {
    fn eq(&self, other: &Self) -> bool {
        self.who == other.who
    }
}

impl fmt::Display for Holdup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, begun {} ({})", self.who, self.age, self.what)
    }
}

async fn holders_up(client: &tokio_postgres::Client, process: i32) -> Result<Vec<Holdup>> {
    let query = "
        select format('process %s of %s', a.pid, coalesce(a.usename::text, 'the server')),
               coalesce(date_trunc('second', clock_timestamp() - coalesce(a.xact_start, a.backend_start))::text || ' ago', 'some time ago'),
               case when a.query = '<insufficient privilege>' then 'a role with pg_read_all_stats sees its query in pg_stat_activity'
                    else coalesce(a.state || ': ', '') || left(regexp_replace(a.query, '[[:space:]]+', ' ', 'g'), 200) end
        from pg_stat_activity a where a.pid = any(pg_blocking_pids($1))
        union all
        select format('prepared transaction %L of %s', p.gid, p.owner), date_trunc('second', clock_timestamp() - p.prepared)::text || ' ago',
               format('end it with commit prepared %L or rollback prepared %L', p.gid, p.gid)
        from pg_locks l join pg_prepared_xacts p on p.transaction = l.transactionid
        where l.pid = $1 and not l.granted
        order by 1";
    let failed = || Error::sql("looking whom the slot waits for");
    let mut found = Vec::new();
    for row in client.query(query, &[&process]).await.map_err(failed())? {
        let text = |column: usize| row.try_get::<_, Option<String>>(column).map_err(failed());
        found.push(Holdup {
            who: text(0)?.unwrap_or_default(),
            age: text(1)?.unwrap_or_default(),
            what: text(2)?.unwrap_or_default(),
        });
    }
    Ok(found)
}

/// Prefix of our logical messages. Anybody may send one; what it says is of those who can read the key.
pub(crate) const MESSAGE_PREFIX: &[u8] = b"highwater";

/// What our logical messages say, in one database.
#[derive(Clone, Debug)]
pub(crate) struct Messages {
    /// Asks for a checkpoint.
    pub(crate) checkpoint: Vec<u8>,
    /// What the transaction deletes from here on is archived (`highwater.purge_rows`).
    pub(crate) purge: Vec<u8>,
}

/// Reads what our logical messages say, in this database.
///
/// # Errors
///
/// The key can't be read.
pub(crate) async fn messages(client: &tokio_postgres::Client) -> Result<Messages> {
    let row = client.query_one("select key from highwater.request_key", &[]).await;
    let key: String =
        row.and_then(|row| row.try_get(0)).map_err(Error::sql("reading highwater.request_key"))?;
    Ok(Messages {
        checkpoint: format!("checkpoint {key}").into_bytes(),
        purge: format!("purge {key}").into_bytes(),
    })
}

/// Asks whoever archives this database to make everything durable that is committed by now, and to say so in the logs of the
/// archive and in the watermark rows, rather than when it is due.
///
/// # Errors
///
/// The statement failed.
pub(crate) async fn ask_for_checkpoint(client: &tokio_postgres::Client) -> Result<()> {
    // Outside of a transaction it would not be sent at its place among them.
    let statement =
        "select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key";
    client.query_one(statement, &[]).await.map_err(Error::sql("asking for a checkpoint")).map(drop)
}

/// Whether a role `r` (of `pg_roles`) may replicate. `rds_replication` stands for `rolreplication` on Amazon RDS, where nobody gets the
/// attribute; elsewhere it is a role like any.
pub(crate) const MAY_REPLICATE: &str = "
    r.rolreplication or r.rolsuper
    or (exists (select from pg_settings where name = 'rds.logical_replication')
        and exists (select from pg_roles g where g.rolname = 'rds_replication' and pg_has_role(r.oid, g.oid, 'member')))";

/// A cluster, and the history of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) system_identifier: String,
    pub(crate) timeline_id: i32,
}

/// Who the server is, for a role that may not replicate. The timeline is that of the file that the log is written to.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn identify_by_sql(client: &tokio_postgres::Client) -> Result<Identity> {
    let failed = || Error::sql("asking the server who it is");
    let query = "select system_identifier::text, ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer
                 from pg_control_system()";
    let row = client.query_one(query, &[]).await.map_err(failed())?;
    Ok(Identity {
        system_identifier: row.try_get(0).map_err(failed())?,
        timeline_id: row.try_get(1).map_err(failed())?,
    })
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
