//! [`ReplicationConnection`]: a walsender connection, from the login to the start of the stream.
//!
//! The section numbers in `postgres/` are those of the manual of PostgreSQL 15.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tracing::info;

use super::connection::{Connection, Rows};
use super::quote::{quote_identifier, quote_literal};
use super::startup::Process;
use super::wire::Wire;
use super::{frame, patience};
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// The one message of this connection that `postgres-protocol` doesn't know.
const COPY_BOTH_RESPONSE_TAG: u8 = b'W';

/// How long to wait for another process to let go of the slot. A predecessor that was killed is noticed by
/// its server within moments; one that lives is worth a message.
const SLOT_WAIT: Duration = Duration::from_secs(10);
const SLOT_RETRY: Duration = Duration::from_millis(500);

/// The one command that waits for others, however long they take: for the transactions that run when it is given.
const WAITS: &str = "CREATE_REPLICATION_SLOT";

/// A walsender connection (`replication=database`) on which no stream has been started. It understands SQL,
/// too, in the simple protocol.
#[derive(Debug)]
pub struct ReplicationConnection(Connection);

impl ReplicationConnection {
    /// Connects and logs in.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if no server can be reached, [`Error::Server`] if the login is refused,
    /// [`Error::Protocol`] if the server asks for an authentication that is not supported.
    pub async fn connect(config: &SourceConfig) -> Result<Self> {
        Connection::open(config, Process::Walsender).await.map(Self)
    }

    /// The server's process that serves this connection, as `pg_replication_slots.active_pid` names it. Zero if
    /// the server didn't tell.
    #[must_use]
    pub const fn process_id(&self) -> i32 {
        self.0.process_id
    }

    /// Runs a statement or replication command; the rows of all its results, as text.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] if the server refuses it (the connection stays usable), [`Error::Io`] or
    /// [`Error::Protocol`] if the connection is lost. Answers above 64 MiB are refused, and so are those that take
    /// more than 30 s, except that of `CREATE_REPLICATION_SLOT`, which waits for other transactions. After that, or
    /// if the call was dropped, the connection can't be used any more.
    pub async fn query(&mut self, sql: &str) -> Result<Rows> {
        if sql.starts_with(WAITS) {
            return self.0.query_patiently(sql).await;
        }
        self.0.query(sql).await
    }

    /// Starts streaming what these publications send from the slot's confirmed position, with values in their binary form, or, if `as_text`, all as text. A
    /// slot that another process holds is waited for, at most 10 s; each answer of the server, at most 30 s.
    ///
    /// # Errors
    ///
    /// [`Error::Slot`] if the slot is held (transient; names the holder) or missing, [`Error::Server`] for
    /// any other refusal.
    pub async fn start(
        mut self,
        slot: &str,
        publications: &[impl AsRef<str>],
        as_text: bool,
    ) -> Result<ReplicationStream> {
        if slot.is_empty() || !slot.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_')) {
            return Err(Error::Slot {
                slot: slot.to_owned(),
                detail: "a name has lower-case letters, digits and underscores only; correct HIGHWATER_SLOT"
                    .to_owned(),
                transient: false,
            });
        }
        let wal_sender_timeout = self.wal_sender_timeout().await?;
        let command = format!(
            "START_REPLICATION SLOT \"{slot}\" LOGICAL 0/0
             (proto_version '1', publication_names {}, binary '{}', messages 'true')",
            quote_literal(
                &publications
                    .iter()
                    .map(|name| quote_identifier(name.as_ref()))
                    .collect::<Vec<_>>()
                    .join(",")
            ),
            !as_text,
        );
        let deadline = Instant::now() + SLOT_WAIT;
        let mut told = false;
        loop {
            let refusal = match self.try_start(&command, slot).await {
                Ok(()) => {
                    return Ok(ReplicationStream {
                        wire: self.0.wire,
                        process_id: self.0.process_id,
                        slot: slot.to_owned(),
                        status_interval: patience::status_interval(wal_sender_timeout),
                        silence: patience::silence(wal_sender_timeout),
                        held_bytes_max: frame::HELD_BYTES_MAX,
                    });
                }
                Err(refusal) => refusal,
            };
            let Error::Server { code, message, .. } = &refusal else { return Err(refusal) };
            if code == SqlState::OBJECT_IN_USE.code() {
                if Instant::now() >= deadline {
                    return Err(self.held(slot, message).await);
                }
                if !told {
                    info!(slot, reason = message, "waiting for the replication slot");
                    told = true;
                }
                tokio::time::sleep(SLOT_RETRY).await;
            } else if code == SqlState::UNDEFINED_OBJECT.code() {
                let detail = format!("{message}; run `highwater setup`");
                return Err(Error::Slot { slot: slot.to_owned(), detail, transient: false });
            } else {
                return Err(refusal);
            }
        }
    }

    async fn try_start(&mut self, command: &str, slot: &str) -> Result<()> {
        let context = format!("starting replication from slot {slot:?} at {}", self.0.place);
        self.0.begin_soon(command, COPY_BOTH_RESPONSE_TAG, &context).await
    }

    /// Who holds the slot. Its user and address may be hidden from us; then the number alone is told.
    async fn held(&mut self, slot: &str, message: &str) -> Error {
        let sql = format!(
            "select s.active_pid, a.application_name, coalesce(host(a.client_addr), 'a local socket'), a.usename \
             from pg_catalog.pg_replication_slots s \
             left join pg_catalog.pg_stat_activity a on a.pid = s.active_pid \
             where s.slot_name = {} and s.active_pid is not null",
            quote_literal(slot)
        );
        let rows = self.query(&sql).await.unwrap_or_default();
        let detail = match rows.first().map(Vec::as_slice) {
            Some([Some(pid), Some(application), address, user]) if !application.is_empty() => format!(
                "active for PID {pid} (application {application:?} of user {:?} from {}); stop it, or give \
                 this one a slot of its own",
                user.as_deref().unwrap_or("?"),
                address.as_deref().unwrap_or("?"),
            ),
            // The server's own words end with "is active for PID <n>".
            _ => format!("{message}; stop that process, or give this one a slot of its own"),
        };
        Error::Slot { slot: slot.to_owned(), detail, transient: true }
    }

    /// After how long without a report the server gives up; zero if never.
    async fn wal_sender_timeout(&mut self) -> Result<Duration> {
        let rows = self
            .query("select setting from pg_catalog.pg_settings where name = 'wal_sender_timeout'")
            .await?;
        let milliseconds = rows.first().and_then(|row| row.first()?.as_deref()?.parse::<u64>().ok());
        Ok(Duration::from_millis(milliseconds.unwrap_or_default()))
    }
}

/// A stream that has been started and that nobody reads yet; [`spawn`](Self::spawn) sees to that.
#[derive(Debug)]
pub struct ReplicationStream {
    pub(super) wire: Wire,
    pub(super) status_interval: Duration,
    pub(super) silence: Duration,
    pub(super) held_bytes_max: usize,
    pub(super) slot: String,
    process_id: i32,
}

impl ReplicationStream {
    /// The server's process that serves this stream; see [`ReplicationConnection::process_id`].
    #[must_use]
    pub const fn process_id(&self) -> i32 {
        self.process_id
    }

    /// Changes how long the server may say nothing before it is asked for an answer, and again before it is given
    /// up. By default 30 s, or three quarters of `wal_sender_timeout` if that is more. Less than half of that
    /// setting takes a server that decodes a long transaction for a dead one.
    #[must_use]
    pub fn with_silence(mut self, silence: Duration) -> Self {
        self.silence = silence;
        self
    }

    /// Changes how long a frame may be that is held as a whole: a longer row loses its long values. By default 16 MiB.
    pub(crate) const fn holding(mut self, bytes_max: usize) -> Self {
        self.held_bytes_max = bytes_max;
        self
    }
}
