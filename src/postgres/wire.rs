//! Messages over a socket, for the parts of the protocol that are not the stream (manual 55.7).

use bytes::{Buf as _, Bytes, BytesMut};
use postgres_protocol::message::backend::{
    ERROR_RESPONSE_TAG, Header, NOTICE_RESPONSE_TAG, PARAMETER_STATUS_TAG,
};
use std::io;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tracing::debug;

use super::socket::Socket;
use crate::error::{Error, Result};

/// Longest message outside the stream. What is asked there has a few rows.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Most bytes of what may come at any time, in front of one answer.
const ASIDE_BYTES_MAX: usize = 4 << 20;
/// Space that is made for a read.
const READ_BYTES: usize = 8 << 10;
/// Tag and length.
pub(super) const HEADER_BYTES: usize = 5;

/// A message of the server.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

/// A socket that speaks in messages.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) socket: Socket,
    pub(super) inbox: BytesMut,
}

impl Wire {
    pub(super) fn new(socket: Socket) -> Self {
        Self { socket, inbox: BytesMut::new() }
    }

    pub(super) async fn send(&mut self, message: &[u8], context: &str) -> Result<()> {
        self.socket.write_all(message).await.map_err(Error::io(context))?;
        self.socket.flush().await.map_err(Error::io(context))
    }

    /// The next message that answers something. Notices and changed parameters may come at any time
    /// (manual 55.2.7) and are passed over, but not without end.
    pub(super) async fn receive(&mut self, context: &str) -> Result<Message> {
        let mut aside = 0;
        loop {
            if let Some(message) = split_message(&mut self.inbox, context)? {
                if aside > ASIDE_BYTES_MAX {
                    let detail =
                        format!("the server has sent {aside} bytes of notices in place of an answer");
                    return Err(Error::Protocol { context: context.to_owned(), detail });
                }
                aside += HEADER_BYTES + message.body.len();
                match message.tag {
                    NOTICE_RESPONSE_TAG => debug!(notice = ServerText::parse(&message.body).text(), "notice"),
                    PARAMETER_STATUS_TAG => {}
                    _ => return Ok(message),
                }
                continue;
            }
            // In steps, however long the message claims to be: memory is for what has arrived.
            self.inbox.reserve(READ_BYTES);
            if self.socket.read_buf(&mut self.inbox).await.map_err(Error::io(context))? == 0 {
                return Err(Error::io(context)(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the server closed the connection",
                )));
            }
        }
    }
}

fn split_message(inbox: &mut BytesMut, context: &str) -> Result<Option<Message>> {
    let Some((tag, whole)) = header(inbox, MESSAGE_BYTES_MAX, context)? else { return Ok(None) };
    if inbox.len() < whole {
        return Ok(None);
    }
    let mut body = inbox.split_to(whole).freeze();
    body.advance(HEADER_BYTES);
    Ok(Some(Message { tag, body }))
}

/// Tag and whole length of the message that begins the bytes, once they are there.
pub(super) fn header(bytes: &[u8], longest: usize, context: &str) -> Result<Option<(u8, usize)>> {
    let refuse = |detail: String| Error::Protocol { context: context.to_owned(), detail };
    let Some(header) = Header::parse(bytes).map_err(|error| refuse(error.to_string()))? else {
        return Ok(None);
    };
    match usize::try_from(header.len()) {
        // The length counts itself but not the tag.
        Ok(length) if length < longest => Ok(Some((header.tag(), length + 1))),
        _ => Err(refuse(format!("a message of {} bytes, more than {longest}", header.len()))),
    }
}

/// The words of an error or notice (manual 55.8).
#[derive(Debug, Default)]
pub(super) struct ServerText {
    pub(super) code: String,
    message: String,
    detail: String,
    hint: String,
}

impl ServerText {
    /// Takes what can be understood; bytes that are not UTF-8 (an error before the encoding is agreed on) are
    /// replaced.
    pub(super) fn parse(body: &[u8]) -> Self {
        let mut found = Self::default();
        for field in body.split(|byte| *byte == 0) {
            let Some((kind, value)) = field.split_first() else { break };
            let value = String::from_utf8_lossy(value).into_owned();
            match kind {
                b'C' => found.code = value,
                b'M' => found.message = value,
                b'D' => found.detail = value,
                b'H' => found.hint = value,
                _ => {}
            }
        }
        found
    }

    pub(super) fn text(&self) -> String {
        let parts = [&self.message, &self.detail, &self.hint];
        parts.into_iter().filter(|part| !part.is_empty()).map(String::as_str).collect::<Vec<_>>().join("; ")
    }
}

/// An `ErrorResponse` as an error.
pub(super) fn server_error(body: &[u8], context: &str) -> Error {
    let text = ServerText::parse(body);
    Error::Server { context: context.to_owned(), message: text.text(), code: text.code }
}

/// For a message that has no place where it came.
pub(super) fn unexpected(message: &Message, context: &str) -> Error {
    match message.tag {
        ERROR_RESPONSE_TAG => server_error(&message.body, context),
        tag => Error::Protocol {
            context: context.to_owned(),
            detail: format!("an unexpected message of type {:?}", char::from(tag)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_split_where_they_end() {
        let mut inbox = BytesMut::from(&b"Z\0\0\0\x05IC\0\0\0\x04D\0\0"[..]);
        let message = split_message(&mut inbox, "test").unwrap().unwrap();
        assert_eq!((message.tag, &message.body[..]), (b'Z', &b"I"[..]));
        let message = split_message(&mut inbox, "test").unwrap().unwrap();
        assert_eq!((message.tag, message.body.len()), (b'C', 0));
        assert!(split_message(&mut inbox, "test").unwrap().is_none());
        assert_eq!(&inbox[..], b"D\0\0");
    }

    #[test]
    fn hostile_lengths_are_refused_before_anything_is_reserved() {
        for bytes in
            [b"D\0\0\0\x03", b"D\xff\xff\xff\xff", b"D\x7f\xff\xff\xff", b"D\x80\0\0\0", b"D\x01\0\0\0"]
        {
            let error = split_message(&mut BytesMut::from(&bytes[..]), "test").unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{bytes:?}");
        }
    }

    #[test]
    fn an_error_keeps_the_servers_words() {
        let body = b"SERROR\0VERROR\0C42704\0Mno \xff slot\0Ddetail\0Hhint\0Fslot.c\0\0";
        let error = server_error(body, "starting");
        assert_eq!(error.to_string(), "starting: no \u{fffd} slot; detail; hint (SQLSTATE 42704)");
        for bytes in [&b""[..], b"\0", b"C", b"Mx", b"\0\0\0", b"\xff\xff"] {
            let _ = server_error(bytes, "odd");
        }
    }
}
