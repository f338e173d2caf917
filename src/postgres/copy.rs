//! [`CopyConnection`]: rows by `COPY ... TO STDOUT` (manual 55.2.6), read where the socket has put them.

use std::io;

use bytes::{Buf as _, BytesMut};
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, COPY_DATA_TAG, COPY_DONE_TAG, COPY_OUT_RESPONSE_TAG, ERROR_RESPONSE_TAG,
    NOTICE_RESPONSE_TAG, NOTIFICATION_RESPONSE_TAG, PARAMETER_STATUS_TAG, READY_FOR_QUERY_TAG,
};
use tokio::io::AsyncReadExt as _;

use super::connection::{Connection, Rows};
use super::frame::FRAME_BYTES_MAX;
use super::long::{Layout, LongRow};
use super::startup::Process;
use super::wire::{HEADER_BYTES, header, server_error, unexpected};
use crate::config::SourceConfig;
use crate::error::{Error, Result};

/// Space that is made before a read, at least.
const READ_BYTES: usize = 256 << 10;

/// What a binary copy begins with, and its length with the fields that follow (manual, `COPY`, "Binary Format").
const SIGNATURE: (&[u8], usize) = (b"PGCOPY\n", 19);
/// What is in front of a row's values: their number.
const ROW_HEAD_BYTES: usize = 2;

/// A session that reads rows.
#[derive(Debug)]
pub(crate) struct CopyConnection {
    connection: Connection,
    /// Length of the longest message that is held as a whole.
    held_max: usize,
}

impl CopyConnection {
    /// Connects and logs in. A row of more than `held_max` bytes will lose its long values, which become
    /// [`Value::Long`](crate::pgoutput::Value::Long).
    ///
    /// # Errors
    ///
    /// As [`ReplicationConnection::connect`](super::ReplicationConnection::connect).
    pub(crate) async fn open(config: &SourceConfig, held_max: usize) -> Result<Self> {
        Ok(Self { connection: Connection::open(config, Process::Backend).await?, held_max })
    }

    /// Runs statements that are answered soon; the rows of all their results, as text.
    ///
    /// # Errors
    ///
    /// As [`ReplicationConnection::query`](super::ReplicationConnection::query); [`Error::Io`] also if a copy was not read to
    /// its end.
    pub(crate) async fn query(&mut self, sql: &str) -> Result<Rows> {
        self.connection.query(sql).await
    }

    /// Starts a copy; `context` names it in errors. One that is dropped before its end leaves the connection unusable.
    ///
    /// # Errors
    ///
    /// As [`query`](Self::query). Waits for a lock as long as the session's settings allow.
    pub(crate) async fn copy_out(&mut self, statement: &str, context: String) -> Result<CopyOut<'_>> {
        self.connection.begin(statement, COPY_OUT_RESPONSE_TAG, &context).await?;
        let (connection, held_max) = (&mut self.connection, self.held_max);
        Ok(CopyOut { connection, held_max, context, message_bytes: 0, long: None, is_done: false })
    }
}

/// The messages of a binary copy, of which the server sends one for each row.
#[derive(Debug)]
pub(crate) struct CopyOut<'a> {
    connection: &'a mut Connection,
    held_max: usize,
    context: String,
    /// Length of the message at the front of the inbox, which [`data`](Self::data) gives; zero before the first one.
    message_bytes: usize,
    /// The message, without its long values, if it was too long to be held.
    long: Option<BytesMut>,
    is_done: bool,
}

impl CopyOut<'_> {
    /// Goes on to the next message; `false` past the last one.
    ///
    /// # Errors
    ///
    /// [`Error::Server`] if the server ended the copy before its end, [`Error::Io`] or [`Error::Protocol`] if the connection
    /// is lost.
    pub(crate) async fn next(&mut self) -> Result<bool> {
        if self.is_done {
            return Ok(false);
        }
        self.connection.wire.inbox.advance(std::mem::take(&mut self.message_bytes));
        self.long = None;
        let mut long = None;
        loop {
            let begun = match long.take() {
                Some(row) => Some(row),
                None => self.long_row()?,
            };
            if let Some(mut row) = begun {
                let taken = LongRow::take(&mut row, &mut self.connection.wire.inbox);
                self.long = taken.map_err(|detail| self.malformed(&format!("a long row: {detail}")))?;
                if self.long.is_some() {
                    return Ok(true);
                }
                long = Some(row);
            } else if let Some((tag, whole)) = self.whole_message()? {
                match tag {
                    COPY_DATA_TAG => {
                        self.message_bytes = whole;
                        return Ok(true);
                    }
                    // These may come at any time (manual 55.2.7).
                    NOTICE_RESPONSE_TAG | PARAMETER_STATUS_TAG | NOTIFICATION_RESPONSE_TAG => {
                        self.connection.wire.inbox.advance(whole);
                        continue;
                    }
                    _ => {
                        self.end().await?;
                        return Ok(false);
                    }
                }
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<()> {
        let inbox = &mut self.connection.wire.inbox;
        // In steps, however long the message claims to be: memory is for what has arrived.
        inbox.reserve(READ_BYTES);
        let read = self.connection.wire.socket.read_buf(inbox).await;
        match read.map_err(Error::io(&self.context))? {
            0 => Err(Error::io(&self.context)(io::ErrorKind::UnexpectedEof.into())),
            _ => Ok(()),
        }
    }

    /// The row at the front of the inbox, if it is too long to be held, and its beginning has come.
    fn long_row(&self) -> Result<Option<LongRow>> {
        let inbox = &self.connection.wire.inbox;
        let found = header(inbox, FRAME_BYTES_MAX, &self.context)?;
        let Some((tag, whole)) = found.filter(|(_, whole)| *whole > self.held_max) else { return Ok(None) };
        if tag != COPY_DATA_TAG {
            return Err(self.malformed(&format!("a message of type {:?} and {whole} bytes", char::from(tag))));
        }
        let begins = inbox.get(HEADER_BYTES..HEADER_BYTES + SIGNATURE.0.len());
        Ok(begins.map(|begins| {
            let signature = if begins == SIGNATURE.0 { SIGNATURE.1 } else { 0 };
            LongRow::new(Layout::Copied, HEADER_BYTES + signature + ROW_HEAD_BYTES, whole)
        }))
    }

    /// What the message holds that [`next`](Self::next) has found.
    pub(crate) fn data(&self) -> &[u8] {
        let message = match &self.long {
            Some(row) => row.get(HEADER_BYTES..),
            None => self.connection.wire.inbox.get(HEADER_BYTES..self.message_bytes),
        };
        message.unwrap_or_default()
    }

    /// The error for what this copy should not have sent.
    pub(crate) fn malformed(&self, detail: &str) -> Error {
        Error::Protocol { context: self.context.clone(), detail: detail.to_owned() }
    }

    /// Tag and length of the message at the front of the inbox, once all of it is there.
    fn whole_message(&self) -> Result<Option<(u8, usize)>> {
        let inbox = &self.connection.wire.inbox;
        let found = header(inbox, FRAME_BYTES_MAX, &self.context)?;
        Ok(found.filter(|(_, whole)| *whole <= inbox.len()))
    }

    /// Reads what follows the last row, or takes its place.
    async fn end(&mut self) -> Result<()> {
        let mut refusal = None;
        loop {
            let message = self.connection.wire.receive(&self.context).await?;
            match message.tag {
                COPY_DONE_TAG | COMMAND_COMPLETE_TAG => {}
                ERROR_RESPONSE_TAG => refusal = Some(server_error(&message.body, &self.context)),
                READY_FOR_QUERY_TAG => {
                    self.connection.answer_due = false;
                    self.is_done = true;
                    return refusal.map_or(Ok(()), Err);
                }
                _ => return Err(unexpected(&message, &self.context)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::connection::tests::connection;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpStream;

    const BEGUN: &[u8] = b"H\0\0\0\x09\x01\0\x01\0\x01";
    const NOTICE: &[u8] = b"N\0\0\0\x08Mx\0\0";
    const DONE: &[u8] = b"c\0\0\0\x04C\0\0\0\x0bCOPY 2\0Z\0\0\0\x05T";
    const REFUSED: &[u8] = b"E\0\0\0\x14C57014\0Mcancel\0\0Z\0\0\0\x05E";

    async fn copy() -> (CopyConnection, TcpStream) {
        let (connection, server) = connection().await;
        (CopyConnection { connection, held_max: 1 << 10 }, server)
    }

    /// The messages of a copy that is answered with these bytes, and how it ended.
    async fn read(bytes: &[u8]) -> (Vec<Vec<u8>>, Result<()>) {
        let (mut connection, mut server) = copy().await;
        server.write_all(bytes).await.unwrap();
        server.shutdown().await.unwrap();
        let mut messages = Vec::new();
        let mut out = match connection.copy_out("copy t to stdout", "copying t".to_owned()).await {
            Ok(out) => out,
            Err(error) => return (messages, Err(error)),
        };
        loop {
            match out.next().await {
                Ok(true) => messages.push(out.data().to_vec()),
                Ok(false) => return (messages, Ok(())),
                Err(error) => return (messages, Err(error)),
            }
        }
    }

    #[tokio::test]
    async fn messages_come_in_order_and_the_connection_goes_on_after_the_last() {
        let (mut connection, mut server) = copy().await;
        let answer =
            [BEGUN, b"d\0\0\0\x06ab", NOTICE, b"d\0\0\0\x04", b"d\0\0\0\x05c", NOTICE, DONE].concat();
        let sent = tokio::spawn(async move {
            // A message may arrive in any pieces.
            for byte in answer {
                server.write_all(&[byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            server
        });
        let mut out = connection.copy_out("copy t to stdout", "copying t".to_owned()).await.unwrap();
        for expected in [&b"ab"[..], b"", b"c"] {
            assert!(out.next().await.unwrap());
            assert_eq!(out.data(), expected);
        }
        assert!(!out.next().await.unwrap() && !out.next().await.unwrap());
        assert_eq!(out.data(), b"");
        let mut server = sent.await.unwrap();
        server.write_all(b"D\0\0\0\x0b\0\x01\0\0\0\x01xZ\0\0\0\x05I").await.unwrap();
        assert_eq!(connection.query("select 1").await.unwrap(), [[Some("x".to_owned())]]);
    }

    #[tokio::test]
    async fn long_values_are_left_out_of_a_row_that_is_too_long_to_be_held() {
        let long = [b"\0\0\xc3\x50", vec![b'x'; 50_000].as_slice()].concat();
        let first = [b"d\0\0\xc3\x6dPGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x01", long.as_slice()].concat();
        let second = [b"d\0\0\xc3\x5e\0\x02\xff\xff\xff\xff", long.as_slice()].concat();
        let (messages, ended) = read(&[BEGUN, &first, b"d\0\0\0\x06ab", &second, DONE].concat()).await;
        let left = b"\xff\xff\xff\xfe\0\0\xc3\x50";
        let expected = [
            [b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0\0\x01", &left[..]].concat(),
            b"ab".to_vec(),
            [b"\0\x02\xff\xff\xff\xff", &left[..]].concat(),
        ];
        assert_eq!(messages, expected);
        assert!(ended.is_ok(), "{ended:?}");
        for bytes in [&b"d\0\0\xff\xff\0\x01\0\x01\0\0abcdef"[..], b"N\x10\0\0\0"] {
            let (messages, ended) = read(&[BEGUN, bytes].concat()).await;
            assert!(messages.is_empty() && matches!(ended, Err(Error::Protocol { .. })), "{ended:?}");
        }
    }

    #[tokio::test]
    async fn what_ends_a_copy_early_is_an_error() {
        let (messages, ended) = read(&[BEGUN, b"d\0\0\0\x05a", REFUSED].concat()).await;
        assert_eq!(messages, [b"a"]);
        assert!(matches!(&ended, Err(Error::Server { code, .. }) if code == "57014"), "{ended:?}");
        let (_, ended) = read(REFUSED).await;
        assert!(matches!(&ended, Err(Error::Server { code, .. }) if code == "57014"), "{ended:?}");
        for rest in [&b""[..], b"d\0\0\0\x05", b"c\0\0\0\x04"] {
            let (messages, ended) = read(&[BEGUN, b"d\0\0\0\x05a", rest].concat()).await;
            assert_eq!(messages, [b"a"]);
            assert!(matches!(&ended, Err(Error::Io { .. })), "{rest:?}: {ended:?}");
        }
    }

    #[tokio::test]
    async fn what_the_protocol_does_not_allow_is_refused() {
        for bytes in [
            &b"d\0\0\0\x03"[..],
            b"d\xff\xff\xff\xff",
            b"d\x7f\xff\xff\xff",
            b"D\0\0\0\x06\0\0",
            b"H\0\0\0\x09\x01\0\x01\0\x01",
        ] {
            let (messages, ended) = read(&[BEGUN, bytes].concat()).await;
            assert!(
                messages.is_empty() && matches!(ended, Err(Error::Protocol { .. })),
                "{bytes:?}: {ended:?}"
            );
        }
        let (_, ended) = read(b"C\0\0\0\x0bSELECT\0Z\0\0\0\x05I").await;
        assert!(matches!(ended, Err(Error::Protocol { .. })), "{ended:?}");
    }
}
