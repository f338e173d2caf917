//! Plain SQL sessions, for which `tokio-postgres` takes over a connection that is logged in.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, BufMut as _, BytesMut};
use postgres_protocol::message::backend::{AUTHENTICATION_TAG, BACKEND_KEY_DATA_TAG, READY_FOR_QUERY_TAG};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, NoTls};
use tracing::{debug, warn};

use super::Socket;
use super::connection::Connection;
use super::startup::Process;
use super::wire::{HEADER_BYTES, header};
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// Longest message of the server. Texts that the server converts for us are the longest that we ask for.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Most bytes of all that the server sends until it is ready for a next statement, each message counting for what the library
/// keeps of it beside its bytes. A million entities have a third of that.
const ANSWER_BYTES_MAX: usize = 1 << 30;
/// That part of a message.
const MESSAGE_OVERHEAD: usize = 128;

/// How messages name a session.
const SESSION: &str = "SQL session";

/// Has a session see what policies let it see, and no more, where any other of ours ends with an error (`row_security`): a role
/// sees its own jobs in pg_cron's tables that way.
///
/// # Errors
///
/// The statement failed.
pub(crate) async fn see_own_rows(client: &Client) -> Result<()> {
    client.batch_execute("set row_security = on").await.map_err(Error::sql("starting an SQL session"))
}

/// Opens an SQL session. Its connection is driven by a task of its own, which ends when the client is dropped
/// or the connection fails; the client's next call then says so.
///
/// # Errors
///
/// [`Error::Io`] if no server can be reached, [`Error::Server`] if the login is refused or only a standby answers,
/// [`Error::Protocol`] if the server asks for what is not supported, [`Error::Setting`] if a setting can't be fulfilled.
pub async fn connect(config: &SourceConfig) -> Result<Client> {
    let connection = Connection::open(config, Process::Backend).await?;
    let mut login = tokio_postgres::Config::new();
    // Encrypted and logged in already.
    login.user(&config.user).ssl_mode(SslMode::Disable);
    let resumed = login.connect_raw(Resumed::new(connection), NoTls).await;
    let (client, connection) = resumed.map_err(Error::sql("taking over a session"))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            let error = Error::sql(SESSION)(error);
            match is_excess(&error) {
                true => warn!(error = error.chain(), "an SQL session was ended"),
                false => debug!(error = error.chain(), "an SQL session ended"),
            }
        }
    });
    Ok(client)
}

/// Whether a session was ended because the server sent too much.
fn is_excess(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(std::error::Error::source);
    let io = cause.and_then(|cause| cause.downcast_ref::<io::Error>());
    io.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<Error>())
}

/// Sees the heads of the messages that pass, and refuses what the library would hold without a bound.
#[derive(Debug, Default)]
struct Heads {
    head: [u8; HEADER_BYTES],
    /// How many bytes of the head have come.
    seen: usize,
    /// How many bytes of the message are still to come.
    left: usize,
    /// What has come since the server was ready for a statement.
    answer_bytes: usize,
}

impl Heads {
    fn pass(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let of_body = self.left.min(bytes.len());
            self.left -= of_body;
            bytes = bytes.get(of_body..).unwrap_or_default();
            let missing = self.head.get_mut(self.seen..).unwrap_or_default();
            let (head, rest) = bytes.split_at(missing.len().min(bytes.len()));
            if let Some(place) = missing.get_mut(..head.len()) {
                place.copy_from_slice(head);
            }
            bytes = rest;
            self.seen += head.len();
            if self.seen < HEADER_BYTES {
                return Ok(());
            }
            self.seen = 0;
            let Some((tag, whole)) = header(&self.head, MESSAGE_BYTES_MAX, SESSION)? else { return Ok(()) };
            self.left = whole - HEADER_BYTES;
            self.answer_bytes = match tag {
                READY_FOR_QUERY_TAG => 0,
                _ => self.answer_bytes.saturating_add(whole + MESSAGE_OVERHEAD),
            };
            if self.answer_bytes > ANSWER_BYTES_MAX {
                let detail = format!("an answer of more than {ANSWER_BYTES_MAX} bytes");
                return Err(Error::Protocol { context: SESSION.to_owned(), detail });
            }
        }
        Ok(())
    }
}

/// A socket whose login is done, for a library that wants to do it itself: its start-up message goes nowhere, and is
/// answered from here. So there is one login, with one set of rules, for all sessions.
#[derive(Debug)]
struct Resumed {
    socket: Socket,
    heads: Heads,
    /// What is read before the socket.
    answer: BytesMut,
    /// Bytes of the start-up message that are still to be written; `None` before its first ones, which tell its length.
    unwritten: Option<usize>,
}

impl Resumed {
    fn new(connection: Connection) -> Self {
        let mut answer = BytesMut::new();
        answer.put_u8(AUTHENTICATION_TAG);
        answer.put_i32(8);
        answer.put_i32(0);
        answer.put_u8(BACKEND_KEY_DATA_TAG);
        answer.put_i32(12);
        answer.put_i32(connection.process_id);
        answer.put_i32(connection.secret_key);
        answer.put_u8(READY_FOR_QUERY_TAG);
        answer.put_i32(5);
        answer.put_u8(b'I');
        let (socket, unread) = connection.into_parts();
        answer.extend_from_slice(&unread);
        Self { socket, heads: Heads::default(), answer, unwritten: None }
    }
}

impl AsyncRead for Resumed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.answer.is_empty() {
            match Pin::new(&mut self.socket).poll_read(cx, buf) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
        } else {
            let count = self.answer.len().min(buf.remaining());
            buf.put_slice(self.answer.get(..count).unwrap_or_default());
            self.answer.advance(count);
        }
        let passed = self.heads.pass(buf.filled().get(before..).unwrap_or_default());
        Poll::Ready(passed.map_err(io::Error::other))
    }
}

impl AsyncWrite for Resumed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let unwritten = match (self.unwritten, buf.first_chunk::<4>()) {
            (Some(count), _) => count,
            (None, Some(length)) => usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX),
            // The library writes a message at once.
            (None, None) => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
        };
        if unwritten == 0 {
            return Pin::new(&mut self.socket).poll_write(cx, buf);
        }
        let count = unwritten.min(buf.len());
        self.unwritten = Some(unwritten - count);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(bytes: &[u8], step: usize) -> Result<usize> {
        let mut heads = Heads::default();
        bytes.chunks(step).try_for_each(|piece| heads.pass(piece))?;
        Ok(heads.answer_bytes)
    }

    #[test]
    fn messages_are_counted_until_the_server_is_ready() {
        let rows = b"D\0\0\0\x06\0\0D\0\0\0\x06\0\0Z\0\0\0\x05ID\0\0\0\x0b\0\x01\0\0\0\x01xC\0\0\0\x04";
        for step in 1..=rows.len() {
            assert_eq!(pass(rows, step).unwrap(), 12 + 5 + 2 * MESSAGE_OVERHEAD, "{step}");
        }
    }

    #[test]
    fn what_would_be_held_without_a_bound_is_refused() {
        for bytes in [&b"D\x7f\xff\xff\xff"[..], b"D\0\0\0\x03", b"N\xff\xff\xff\xff", b"D\x04\0\0\0"] {
            assert!(matches!(pass(bytes, 1), Err(Error::Protocol { .. })), "{bytes:?}");
        }
        // Rows of nothing, without end.
        let row = b"D\0\0\0\x06\0\0".repeat(1 << 16);
        let mut heads = Heads::default();
        let count = (0..10_000).take_while(|_| heads.pass(&row).is_ok()).count();
        assert_eq!(count, ANSWER_BYTES_MAX / (7 + MESSAGE_OVERHEAD) / (1 << 16));
    }
}
