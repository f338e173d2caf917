//! [`ReplicationConnection`]: a walsender connection, from the login to the start of the stream.
//!
//! The section numbers in `postgres/` are those of the manual of PostgreSQL 15.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, DATA_ROW_TAG, EMPTY_QUERY_RESPONSE_TAG, ERROR_RESPONSE_TAG, READY_FOR_QUERY_TAG,
    ROW_DESCRIPTION_TAG,
};
use postgres_protocol::message::frontend;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tracing::info;

use super::startup::log_in;
use super::wire::{Message, Wire, server_error, unexpected};
use super::{receiver, socket};
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// The one message of this connection that `postgres-protocol` doesn't know.
const COPY_BOTH_RESPONSE_TAG: u8 = b'W';

/// How long to wait for another process to let go of the slot. A predecessor that was killed is noticed by
/// its server within moments; one that lives is worth a message.
const SLOT_WAIT: Duration = Duration::from_secs(10);
const SLOT_RETRY: Duration = Duration::from_millis(500);

/// How long one answer may take. All of them are a few rows of the catalog, so one that takes longer comes from
/// a server that hangs, or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The one command that waits for others, however long they take: for the transactions that run when it is given.
const WAITS: &str = "CREATE_REPLICATION_SLOT";

/// Bound of the rows of one answer.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A walsender connection (`replication=database`) on which no stream has been started. It understands SQL,
/// too, in the simple protocol.
#[derive(Debug)]
pub struct ReplicationConnection {
    wire: Wire,
    /// For messages: user, server and database.
    place: String,
    process_id: i32,
    answer_timeout: Duration,
    /// An exchange was left before its end. What comes next on the wire answers that one.
    answer_due: bool,
}

impl ReplicationConnection {
    /// Connects and logs in.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::connect`](super::Socket::connect); [`Error::Server`] if the login is refused,
    /// [`Error::Protocol`] if the server asks for an authentication that is not supported.
    pub async fn connect(config: &SourceConfig) -> Result<Self> {
        let (socket, endpoint) = socket::connect(config).await?;
        let context = format!("logging in to {config} for replication");
        let mut wire = Wire::new(socket);
        let login = log_in(&mut wire, config, endpoint.password.as_ref(), &context);
        let process_id = match tokio::time::timeout(config.connect_timeout, login).await {
            Ok(result) => result?,
            Err(_) => return Err(Error::io(context)(io::ErrorKind::TimedOut.into())),
        };
        let place = config.to_string();
        Ok(Self { wire, place, process_id, answer_timeout: ANSWER_TIMEOUT, answer_due: false })
    }

    /// The server's process that serves this connection, as `pg_replication_slots.active_pid` names it. Zero if
    /// the server didn't tell.
    #[must_use]
    pub const fn process_id(&self) -> i32 {
        self.process_id
    }

    /// Runs a statement or replication command; the rows of all its results, as text.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] if the server refuses it (the connection stays usable), [`Error::Io`] or
    /// [`Error::Protocol`] if the connection is lost. Answers above 64 MiB are refused, and so are those that take
    /// more than 30 s, except that of `CREATE_REPLICATION_SLOT`, which waits for other transactions. After that, or
    /// if the call was dropped, the connection can't be used any more.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let context = format!("{} at {}", abridged(sql), self.place);
        if sql.starts_with(WAITS) {
            return self.answer(sql, &context).await;
        }
        bounded(self.answer_timeout, &context, self.answer(sql, &context)).await
    }

    async fn answer(&mut self, sql: &str, context: &str) -> Result<Vec<Vec<Option<String>>>> {
        self.send_query(sql, context).await?;
        let mut rows = Vec::new();
        let mut byte_count = 0_usize;
        let mut refusal = None;
        loop {
            let message = self.wire.receive(context).await?;
            byte_count = byte_count.saturating_add(message.body.len());
            if byte_count > ANSWER_BYTES_MAX {
                let detail = format!("an answer of more than {ANSWER_BYTES_MAX} bytes");
                return Err(Error::Protocol { context: context.to_owned(), detail });
            }
            match message.tag {
                DATA_ROW_TAG => rows.push(parse_row(&message, context)?),
                ROW_DESCRIPTION_TAG | COMMAND_COMPLETE_TAG | EMPTY_QUERY_RESPONSE_TAG => {}
                ERROR_RESPONSE_TAG => refusal = Some(server_error(&message.body, context)),
                READY_FOR_QUERY_TAG => {
                    self.answer_due = false;
                    return refusal.map_or(Ok(rows), Err);
                }
                _ => return Err(unexpected(&message, context)),
            }
        }
    }

    /// Starts streaming from the slot's confirmed position, with the binary form of `pgoutput`. A slot that
    /// another process holds is waited for, at most 10 s; each answer of the server, at most 30 s.
    ///
    /// # Errors
    ///
    /// [`Error::Slot`] if the slot is held (transient; names the holder) or missing, [`Error::Server`] for
    /// any other refusal.
    pub async fn start(mut self, slot: &str, publication: &str) -> Result<ReplicationStream> {
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
             (proto_version '1', publication_names {}, binary 'true', messages 'true')",
            quote_literal(&quote_identifier(publication)),
        );
        let deadline = Instant::now() + SLOT_WAIT;
        let mut told = false;
        loop {
            let refusal = match self.try_start(&command, slot).await {
                Ok(()) => {
                    return Ok(ReplicationStream {
                        wire: self.wire,
                        process_id: self.process_id,
                        slot: slot.to_owned(),
                        status_interval: receiver::status_interval(wal_sender_timeout),
                        silence: receiver::silence(wal_sender_timeout),
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
        let context = format!("starting replication from slot {slot:?} at {}", self.place);
        bounded(self.answer_timeout, &context, self.answer_to_start(command, &context)).await
    }

    async fn answer_to_start(&mut self, command: &str, context: &str) -> Result<()> {
        self.send_query(command, context).await?;
        let mut refusal = None;
        loop {
            let message = self.wire.receive(context).await?;
            match (message.tag, refusal) {
                (COPY_BOTH_RESPONSE_TAG, _) => return Ok(()),
                (ERROR_RESPONSE_TAG, _) => refusal = Some(server_error(&message.body, context)),
                (READY_FOR_QUERY_TAG, Some(refusal)) => {
                    self.answer_due = false;
                    return Err(refusal);
                }
                _ => return Err(unexpected(&message, context)),
            }
        }
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

    async fn send_query(&mut self, sql: &str, context: &str) -> Result<()> {
        if self.answer_due {
            return Err(Error::io(context)(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "an earlier answer is still due on this connection",
            )));
        }
        let mut message = BytesMut::new();
        frontend::query(sql, &mut message).map_err(Error::io(context))?;
        self.answer_due = true;
        self.wire.send(&message, context).await
    }
}

/// A stream that has been started and that nobody reads yet; [`spawn`](Self::spawn) sees to that.
#[derive(Debug)]
pub struct ReplicationStream {
    pub(super) wire: Wire,
    pub(super) status_interval: Duration,
    pub(super) silence: Duration,
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
}

/// Bounds an exchange. One that is cut off leaves its answer due.
async fn bounded<T>(limit: Duration, context: &str, exchange: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(Error::io(context)(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {limit:?}"),
        ))),
    }
}

fn parse_row(message: &Message, context: &str) -> Result<Vec<Option<String>>> {
    let mut body = &message.body[..];
    let short = |_| Error::Protocol { context: context.to_owned(), detail: "a row is cut short".to_owned() };
    let count = body.try_get_u16().map_err(short)?;
    let mut row = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().map_err(short)?;
        let Ok(length) = usize::try_from(length) else {
            row.push(None);
            continue;
        };
        let Some((value, rest)) = body.split_at_checked(length) else {
            return Err(Error::Protocol {
                context: context.to_owned(),
                detail: "a value is cut short".to_owned(),
            });
        };
        row.push(Some(String::from_utf8_lossy(value).into_owned()));
        body = rest;
    }
    Ok(row)
}

/// A name as SQL wants it in double quotes (manual section 4.1.1).
pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as SQL wants it in quotes, with `standard_conforming_strings`, the default since 9.1.
pub(crate) fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Enough of a statement to know it by.
fn abridged(sql: &str) -> String {
    let short: String = sql.chars().take(60).collect();
    if short.len() < sql.len() { format!("{short:?}...") } else { format!("{sql:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::Socket;
    use bytes::Bytes;
    use tokio::io::AsyncWriteExt as _;

    fn row(body: &'static [u8]) -> Result<Vec<Option<String>>> {
        parse_row(&Message { tag: DATA_ROW_TAG, body: Bytes::from_static(body) }, "test")
    }

    #[test]
    fn rows_are_read_and_short_ones_refused() {
        assert_eq!(
            row(b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0").unwrap(),
            [Some("ab".to_owned()), None, Some(String::new())]
        );
        assert_eq!(row(b"\0\x01\0\0\0\x01\xff").unwrap(), [Some("\u{fffd}".to_owned())]);
        for body in [&b""[..], b"\0", b"\0\x01", b"\0\x01\0\0\0\x02a", b"\xff\xff\x7f\xff\xff\xff"] {
            assert!(matches!(row(body), Err(Error::Protocol { .. })), "{body:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_hangs_is_given_up_and_its_late_answer_is_nobody_elses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut connection = ReplicationConnection {
            wire: Wire::new(Socket::Tcp(stream)),
            place: "test".to_owned(),
            process_id: 1,
            answer_timeout: Duration::from_millis(50),
            answer_due: false,
        };
        let is_io =
            |error: &Error, wanted| matches!(error, Error::Io { source, .. } if source.kind() == wanted);
        let error = connection.query("IDENTIFY_SYSTEM").await.unwrap_err();
        assert!(is_io(&error, io::ErrorKind::TimedOut) && error.is_transient(), "{error:?}");
        server.write_all(b"D\0\0\0\x0b\0\x01\0\0\0\x01xZ\0\0\0\x05I").await.unwrap();
        let error = connection.query("select 1").await.unwrap_err();
        assert!(is_io(&error, io::ErrorKind::ConnectionAborted), "{error:?}");

        connection.answer_due = false;
        connection.wire.inbox.clear();
        assert_eq!(connection.query("select 1").await.unwrap(), [[Some("x".to_owned())]]);
        let error = connection.start("s", "p").await.unwrap_err();
        assert!(is_io(&error, io::ErrorKind::TimedOut), "{error:?}");
    }

    #[test]
    fn names_can_not_end_their_quotes() {
        assert_eq!(quote_literal(&quote_identifier("it's \"x\"")), "'\"it''s \"\"x\"\"\"'");
    }
}
