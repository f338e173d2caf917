//! [`Connection`]: a session of our own in the simple query protocol (manual 55.2.2), with a backend or a walsender.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, DATA_ROW_TAG, EMPTY_QUERY_RESPONSE_TAG, ERROR_RESPONSE_TAG, READY_FOR_QUERY_TAG,
    ROW_DESCRIPTION_TAG,
};
use postgres_protocol::message::frontend;

use rand::seq::SliceRandom as _;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tracing::{debug, warn};

use super::socket::{self, Encryption};
use super::startup::{Login, Process, SSL_MODE};
use super::wire::{HEADER_BYTES, Message, Wire, server_error, unexpected};
use super::{Socket, settings};
use crate::config::{Endpoint, SourceConfig, Target};
use crate::error::{Error, Result};

/// How long one answer may take. All of them are a few rows of the catalog, so one that takes longer comes from
/// a server that hangs, or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bound of the rows of one answer.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The rows of a statement's results, as text.
pub(super) type Rows = Vec<Vec<Option<String>>>;

/// A connection whose login is done.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) wire: Wire,
    /// For messages: user, server and database.
    pub(super) place: String,
    /// The server's process, or zero.
    pub(super) process_id: i32,
    /// With which a statement of that process can be cancelled.
    pub(super) secret_key: i32,
    answer_timeout: Duration,
    /// An exchange was left before its end. What comes next on the wire answers that one.
    pub(super) answer_due: bool,
}

impl Connection {
    /// Connects to the first server that is the one to talk to, logs in, and sets what a session relies on. The user's time
    /// bounds the connecting to each, and each login.
    ///
    /// As in libpq (manual 34.1.1.3), the next one is tried if a server can't be reached, can't take sessions now, or is a
    /// standby; a login that is refused is final.
    pub(super) async fn open(config: &SourceConfig, process: Process) -> Result<Self> {
        let mut endpoints: Vec<&Endpoint> = config.endpoints.iter().collect();
        if config.shuffles {
            endpoints.shuffle(&mut rand::rng());
        }
        let mut failure: Option<Error> = None;
        for endpoint in endpoints {
            let error = match Self::open_at(config, endpoint, process).await {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            let is_elsewhere = error.is_transient() || matches!(error, Error::Io { .. });
            if config.endpoints.len() == 1 || !is_elsewhere {
                return Err(error);
            }
            if is_standby(&error) {
                debug!(error = error.chain(), "not the server to talk to");
            } else {
                warn!(error = error.chain(), "server can't be reached");
            }
            // What a standby says tells less than why the primary can't be reached.
            failure =
                Some(failure.filter(|earlier| is_standby(&error) && !is_standby(earlier)).unwrap_or(error));
        }
        Err(failure.unwrap_or_else(|| Error::Internal("a source without servers".to_owned())))
    }

    /// As much TLS as the settings ask for, in as many attempts as they allow.
    async fn open_at(config: &SourceConfig, endpoint: &Endpoint, process: Process) -> Result<Self> {
        let mut earlier: Option<Error> = None;
        for encryption in socket::attempts(config.ssl_mode, &endpoint.address) {
            let (error, may_differ) = match Self::attempt(config, endpoint, *encryption, process).await {
                Ok(connection) => return Ok(connection),
                Err(failure) => failure,
            };
            let error = match earlier.take() {
                // It says what to do, whatever became of the attempt with TLS.
                Some(first @ Error::Setting { .. }) => first,
                Some(first) => Error::server_also(error, &first),
                None => error,
            };
            if !may_differ {
                return Err(error);
            }
            debug!(error = error.chain(), ?encryption, "refused");
            earlier = Some(error);
        }
        Err(earlier.unwrap_or_else(|| Error::Internal("a server that nothing was tried with".to_owned())))
    }

    /// One attempt; with the failure, whether another one with more or less TLS may end otherwise.
    async fn attempt(
        config: &SourceConfig,
        endpoint: &Endpoint,
        encryption: Encryption,
        process: Process,
    ) -> Result<Self, (Error, bool)> {
        let late = |context: String| {
            let detail = format!("no answer within {:?}", config.connect_timeout);
            Error::io(context)(io::Error::new(io::ErrorKind::TimedOut, detail))
        };
        let opened = timeout(config.connect_timeout, socket::open(config, endpoint, encryption)).await;
        let socket = match opened {
            // Only the handshake has an error that another attempt avoids.
            Ok(opened) => opened.map_err(|error| {
                let may_differ = encryption == Encryption::Offered && is_handshake(&error);
                (error, may_differ)
            })?,
            Err(_) => return Err((late(format!("connecting to {}", endpoint.address)), false)),
        };
        let is_tls = socket.is_tls();
        let purpose = if process == Process::Walsender { " for replication" } else { "" };
        let context = format!("logging in to {config} at {}{purpose}", endpoint.address);
        let mut connection = Self {
            wire: Wire::new(socket),
            place: config.to_string(),
            process_id: 0,
            secret_key: 0,
            answer_timeout: ANSWER_TIMEOUT,
            answer_due: false,
        };
        let mut login = Login {
            wire: &mut connection.wire,
            config,
            process,
            password: config.password(endpoint),
            context: &context,
            was_asked: false,
        };
        let result =
            timeout(config.connect_timeout, login.run()).await.unwrap_or_else(|_| Err(late(context.clone())));
        let may_differ = !login.was_asked && (is_tls || encryption == Encryption::Plain);
        let keys = result.map_err(|error| {
            let may_differ = match &error {
                Error::Server { .. } => may_differ,
                // With TLS the server may have what it asks for.
                Error::Setting { setting, .. } => encryption == Encryption::Plain && setting == SSL_MODE,
                _ => false,
            };
            (error, may_differ)
        })?;
        (connection.process_id, connection.secret_key) = keys;
        connection.prepare(config, endpoint).await.map_err(|error| (error, false))?;
        Ok(connection)
    }

    /// Sets what a session relies on, and refuses a server that is not the one to talk to.
    async fn prepare(&mut self, config: &SourceConfig, endpoint: &Endpoint) -> Result<()> {
        let keeps_role = config.options.as_deref().is_some_and(|options| options.contains("role="));
        let rows = self.query(&settings::statements(keeps_role)).await?;
        let in_recovery = rows.last().and_then(|row| row.first()?.as_deref()) == Some("t");
        if !in_recovery || config.target == Target::Any {
            return Ok(());
        }
        Err(Error::Server {
            context: format!("choosing {}", endpoint.address),
            message: "this server is a standby, and the primary is needed; name that in DATABASE_URI (of several hosts, \
                      host=a,b, the one that is not in recovery is taken), or say target_session_attrs=any to read the \
                      watermarks only"
                .to_owned(),
            code: SqlState::READ_ONLY_SQL_TRANSACTION.code().to_owned(),
        })
    }

    /// The socket, and what came by it that nobody has read.
    pub(super) fn into_parts(self) -> (Socket, BytesMut) {
        (self.wire.socket, self.wire.inbox)
    }

    /// Runs statements; the rows of all their results, as text. Gives up after 30 s.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Rows> {
        let context = format!("{} at {}", abridged(sql), self.place);
        let limit = self.answer_timeout;
        bounded(limit, &context, self.answer(sql, &context)).await
    }

    /// As [`query`](Self::query), for what waits for others, however long they take.
    pub(super) async fn query_patiently(&mut self, sql: &str) -> Result<Rows> {
        let context = format!("{} at {}", abridged(sql), self.place);
        self.answer(sql, &context).await
    }

    async fn answer(&mut self, sql: &str, context: &str) -> Result<Rows> {
        self.send_query(sql, context).await?;
        let mut rows = Vec::new();
        let mut byte_count = 0_usize;
        let mut refusal = None;
        loop {
            let message = self.wire.receive(context).await?;
            byte_count = byte_count.saturating_add(message.body.len() + row_overhead(&message));
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

    /// Sends statements whose answer is not rows; waits until the server has begun that answer with a message of this type.
    pub(super) async fn begin(&mut self, sql: &str, answer_tag: u8, context: &str) -> Result<()> {
        self.send_query(sql, context).await?;
        let mut refusal = None;
        loop {
            let message = self.wire.receive(context).await?;
            match (message.tag, refusal) {
                (tag, _) if tag == answer_tag => return Ok(()),
                (ERROR_RESPONSE_TAG, _) => refusal = Some(server_error(&message.body, context)),
                (READY_FOR_QUERY_TAG, Some(refusal)) => {
                    self.answer_due = false;
                    return Err(refusal);
                }
                _ => return Err(unexpected(&message, context)),
            }
        }
    }

    /// As [`begin`](Self::begin), and gives up after 30 s.
    pub(super) async fn begin_soon(&mut self, sql: &str, answer_tag: u8, context: &str) -> Result<()> {
        let limit = self.answer_timeout;
        bounded(limit, context, self.begin(sql, answer_tag, context)).await
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

/// A standby, where the primary is wanted.
pub(crate) fn is_standby(error: &Error) -> bool {
    matches!(error, Error::Server { code, .. } if code == SqlState::READ_ONLY_SQL_TRANSACTION.code())
}

/// The server was reached, and no TLS came about.
fn is_handshake(error: &Error) -> bool {
    let Error::Io { source, .. } = error else { return false };
    !matches!(
        source.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::TimedOut
            | io::ErrorKind::NotFound
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::PermissionDenied
    )
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

/// What a row takes in memory beside its bytes: it may have many columns, and nothing in them.
fn row_overhead(message: &Message) -> usize {
    let columns = message.body.first_chunk().map_or(0, |count| usize::from(u16::from_be_bytes(*count)));
    match message.tag {
        DATA_ROW_TAG => size_of::<Vec<Option<String>>>() + columns * size_of::<Option<String>>(),
        _ => HEADER_BYTES,
    }
}

/// Enough of a statement to know it by.
fn abridged(sql: &str) -> String {
    let short: String = sql.chars().take(60).collect();
    if short.len() < sql.len() { format!("{short:?}...") } else { format!("{sql:?}") }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::postgres::Socket;
    use bytes::Bytes;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::{TcpListener, TcpStream};

    /// A connection that gives up after 50 ms, and its server's side.
    pub(in crate::postgres) async fn connection() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let connection = Connection {
            wire: Wire::new(Socket::Tcp(stream)),
            place: "test".to_owned(),
            process_id: 1,
            secret_key: 2,
            answer_timeout: Duration::from_millis(50),
            answer_due: false,
        };
        (connection, server)
    }

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
        let (mut connection, mut server) = connection().await;
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
        let error = connection.begin_soon("START_REPLICATION", b'W', "test").await.unwrap_err();
        assert!(is_io(&error, io::ErrorKind::TimedOut), "{error:?}");
    }
}
