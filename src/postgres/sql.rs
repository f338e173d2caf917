//! Plain SQL sessions, for which `tokio-postgres` takes over a connection that is logged in.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, BufMut as _, BytesMut};
use postgres_protocol::message::backend::{AUTHENTICATION_TAG, BACKEND_KEY_DATA_TAG, READY_FOR_QUERY_TAG};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Client, NoTls};
use tracing::debug;

use super::Socket;
use super::connection::Connection;
use super::startup::Process;
use crate::config::SourceConfig;
use crate::error::{Error, Result};

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
            debug!(error = Error::sql("SQL connection")(error).chain(), "an SQL connection ended");
        }
    });
    Ok(client)
}

/// A socket whose login is done, for a library that wants to do it itself: its start-up message goes nowhere, and is
/// answered from here. So there is one login, with one set of rules, for all sessions.
#[derive(Debug)]
struct Resumed {
    socket: Socket,
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
        Self { socket, answer, unwritten: None }
    }
}

impl AsyncRead for Resumed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.answer.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        let count = self.answer.len().min(buf.remaining());
        buf.put_slice(self.answer.get(..count).unwrap_or_default());
        self.answer.advance(count);
        Poll::Ready(Ok(()))
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
