//! [`Connection`]: a session of our own in the simple query protocol (manual 55.2.2), with a backend or a walsender.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, DATA_ROW_TAG, EMPTY_QUERY_RESPONSE_TAG, ERROR_RESPONSE_TAG, READY_FOR_QUERY_TAG,
    ROW_DESCRIPTION_TAG,
};
use postgres_protocol::message::frontend;

use super::socket;
use super::startup::{Process, log_in};
use super::wire::{Message, Wire, server_error, unexpected};
use crate::config::SourceConfig;
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
    answer_timeout: Duration,
    /// An exchange was left before its end. What comes next on the wire answers that one.
    pub(super) answer_due: bool,
}

impl Connection {
    /// Connects and logs in, within the user's time for each.
    pub(super) async fn open(config: &SourceConfig, process: Process) -> Result<Self> {
        let (socket, endpoint) = socket::connect(config).await?;
        let purpose = if process == Process::Walsender { " for replication" } else { "" };
        let context = format!("logging in to {config}{purpose}");
        let mut wire = Wire::new(socket);
        let login = log_in(&mut wire, config, process, endpoint.password.as_ref(), &context);
        let process_id = match tokio::time::timeout(config.connect_timeout, login).await {
            Ok(result) => result?,
            Err(_) => return Err(Error::io(context)(io::ErrorKind::TimedOut.into())),
        };
        let place = config.to_string();
        Ok(Self { wire, place, process_id, answer_timeout: ANSWER_TIMEOUT, answer_due: false })
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
