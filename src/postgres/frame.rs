//! Frames of the replication stream (manual 55.4, `START_REPLICATION`). Pure: bytes in, frames out, and no
//! bytes make it panic.

use bytes::{Buf as _, Bytes, BytesMut};
use postgres_protocol::message::backend::{
    COMMAND_COMPLETE_TAG, COPY_DATA_TAG, COPY_DONE_TAG, ERROR_RESPONSE_TAG, NOTICE_RESPONSE_TAG,
    NOTIFICATION_RESPONSE_TAG, PARAMETER_STATUS_TAG,
};
use std::io;

use super::long::{Layout, LongRow};
use super::wire::{HEADER_BYTES, header, server_error};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

pub(super) const STREAM: &str = "replication stream";

/// Longest frame, header included. The server can't make a longer one: a row is below 1 GB (its
/// `MaxAllocSize`).
pub(super) const FRAME_BYTES_MAX: usize = 1 << 30;
/// Longest frame that is held, unless somebody says less.
pub(super) const HELD_BYTES_MAX: usize = 16 << 20;

/// What is in front of the plugin's message in an `XLogData`: kind, two positions and a time.
const DATA_HEAD_BYTES: usize = 25;
/// What is in front of the rows of an insert, update or delete: tag and relation.
const CHANGE_HEAD_BYTES: usize = 5;
/// What is read of an error that is too long to be held.
pub(super) const ERROR_BYTES: usize = 8 << 10;

const XLOG_DATA: u8 = b'w';
const KEEPALIVE: u8 = b'k';

/// Whole frames of the stream, as they came, in one piece of memory.
#[derive(Clone, Debug)]
pub struct Chunk(Bytes);

impl Chunk {
    /// Takes bytes that should be whole frames (`CopyData` messages). If they are not, the iteration of
    /// [`frames`](Self::frames) says so.
    #[must_use]
    pub fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// The frames, in the order of the stream. After an error there are no more.
    #[must_use]
    pub fn frames(&self) -> Frames<'_> {
        Frames(&self.0)
    }

    /// Size of all frames with their headers.
    #[must_use]
    pub fn byte_count(&self) -> usize {
        self.0.len()
    }

    /// The memory behind the frames. A message that is kept can be kept as a slice of it
    /// ([`Bytes::slice_ref`]).
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }
}

/// A frame of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A message of the output plugin.
    XLogData {
        /// Where its record is in the log; zero for messages without one.
        wal_start: Lsn,
        /// The server's end of log when it was sent.
        wal_end: Lsn,
        /// What the plugin wrote.
        message: &'a [u8],
    },
    /// A sign of life. Everything before `wal_end` that concerns this stream has been sent.
    Keepalive {
        /// The server's position.
        wal_end: Lsn,
        /// Whether the server wants a status update at once. The receiver has seen to it.
        reply_requested: bool,
    },
}

/// Iterator over the frames of a [`Chunk`].
#[derive(Clone, Debug)]
pub struct Frames<'a>(&'a [u8]);

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let frame = self.split();
        if frame.is_err() {
            self.0 = &[];
        }
        Some(frame)
    }
}

impl<'a> Frames<'a> {
    fn split(&mut self) -> Result<Frame<'a>> {
        let cut_short = || refuse("a frame is cut short".to_owned());
        let (tag, whole) = header(self.0, FRAME_BYTES_MAX, STREAM)?.ok_or_else(cut_short)?;
        let (frame, rest) = self.0.split_at_checked(whole).ok_or_else(cut_short)?;
        self.0 = rest;
        match tag {
            COPY_DATA_TAG => parse(frame.get(HEADER_BYTES..).unwrap_or_default()),
            _ => Err(refuse(format!("a message of type {:?} among the frames", char::from(tag)))),
        }
    }
}

/// Reads the body of a `CopyData` message.
fn parse(mut body: &[u8]) -> Result<Frame<'_>> {
    let short = |_| refuse("a frame is shorter than its fields".to_owned());
    match body.try_get_u8().map_err(short)? {
        XLOG_DATA => {
            let wal_start = Lsn(body.try_get_u64().map_err(short)?);
            let wal_end = Lsn(body.try_get_u64().map_err(short)?);
            // The server's clock.
            body.try_get_i64().map_err(short)?;
            Ok(Frame::XLogData { wal_start, wal_end, message: body })
        }
        KEEPALIVE => {
            let wal_end = Lsn(body.try_get_u64().map_err(short)?);
            body.try_get_i64().map_err(short)?;
            let reply_requested = body.try_get_u8().map_err(short)? != 0;
            match body {
                [] => Ok(Frame::Keepalive { wal_end, reply_requested }),
                _ => Err(refuse(format!("a keepalive has {} bytes too many", body.len()))),
            }
        }
        kind => Err(refuse(format!("a frame of unknown type {:?}", char::from(kind)))),
    }
}

fn refuse(detail: String) -> Error {
    Error::Protocol { context: STREAM.to_owned(), detail }
}

/// What [`Cutter::cut`] took from the front of the inbox.
#[derive(Debug, Default)]
pub(super) struct Cut {
    /// The whole frames there, if any.
    pub(super) chunk: Option<Chunk>,
    /// Whether a keepalive among them wants an answer.
    pub(super) reply_requested: bool,
}

/// Cuts frames from what arrives. One that is too long to be held is taken in pieces: a row loses its long values, and what is
/// no row, such as a message that anybody may write into the log, is dropped.
#[derive(Debug)]
pub(super) struct Cutter {
    /// Length of the longest frame that is held.
    held_max: usize,
    /// What is left of one that isn't.
    long: Option<Long>,
}

#[derive(Debug)]
enum Long {
    Row(LongRow),
    /// So many bytes of something else.
    Other(usize),
}

impl Cutter {
    pub(super) const fn new(held_max: usize) -> Self {
        Self { held_max, long: None }
    }

    /// Takes the whole frames from the front of the inbox; an incomplete one stays. Frames are not copied.
    /// Messages that may come between frames are dropped; as a chunk is one piece, it ends before such a message,
    /// and before a long frame, and the next call goes on after it.
    ///
    /// # Errors
    ///
    /// The server's error, or that it ended the stream. Frames in front of that are given up: nobody has
    /// acknowledged them, so they come again.
    pub(super) fn cut(&mut self, inbox: &mut BytesMut) -> Result<Cut> {
        loop {
            match &mut self.long {
                Some(Long::Row(row)) => {
                    let malformed = |detail| refuse(format!("a row that is too long to be held: {detail}"));
                    let Some(frame) = row.take(inbox).map_err(malformed)? else { return Ok(Cut::default()) };
                    self.long = None;
                    return Ok(Cut { chunk: Some(Chunk(frame.freeze())), reply_requested: false });
                }
                Some(Long::Other(left)) => {
                    let here = inbox.len().min(*left);
                    inbox.advance(here);
                    *left -= here;
                    if *left > 0 {
                        return Ok(Cut::default());
                    }
                    self.long = None;
                }
                None => {}
            }
            let cut = self.cut_whole(inbox)?;
            if self.long.is_none() {
                return Ok(cut);
            }
        }
    }

    /// How many bytes of a long frame have not come yet.
    pub(super) const fn left(&self) -> usize {
        match &self.long {
            Some(Long::Row(row)) => row.left(),
            Some(Long::Other(left)) => *left,
            None => 0,
        }
    }

    /// Cuts frames that are held; stops in front of a longer one, which is begun if it is the first.
    fn cut_whole(&mut self, inbox: &mut BytesMut) -> Result<Cut> {
        let mut end = 0;
        let mut reply_requested = false;
        while let Some(rest) = inbox.get(end..)
            && let Some((tag, whole)) = header(rest, FRAME_BYTES_MAX, STREAM)?
        {
            if whole > self.held_max {
                if end == 0 {
                    self.long = Long::begin(rest, tag, whole)?;
                }
                break;
            }
            let Some(frame) = rest.get(..whole) else { break };
            let body = frame.get(HEADER_BYTES..).unwrap_or_default();
            match tag {
                COPY_DATA_TAG => {
                    if body.first() == Some(&KEEPALIVE) {
                        reply_requested |=
                            matches!(parse(body)?, Frame::Keepalive { reply_requested: true, .. });
                    }
                    end += whole;
                }
                NOTICE_RESPONSE_TAG | PARAMETER_STATUS_TAG | NOTIFICATION_RESPONSE_TAG if end == 0 => {
                    inbox.advance(whole);
                }
                NOTICE_RESPONSE_TAG | PARAMETER_STATUS_TAG | NOTIFICATION_RESPONSE_TAG => break,
                ERROR_RESPONSE_TAG => return Err(server_error(body, STREAM)),
                // A walsender that shuts down says only `CommandComplete`.
                COPY_DONE_TAG | COMMAND_COMPLETE_TAG => return Err(closed()),
                _ => {
                    return Err(refuse(format!("a message of type {:?} among the frames", char::from(tag))));
                }
            }
        }
        let chunk = (end > 0).then(|| Chunk(inbox.split_to(end).freeze()));
        Ok(Cut { chunk, reply_requested })
    }
}

impl Long {
    /// What is to become of a message of `whole` bytes that begins like this; `None` while that is not to be seen.
    fn begin(start: &[u8], tag: u8, whole: usize) -> Result<Option<Self>> {
        match tag {
            COPY_DATA_TAG => {
                let place = HEADER_BYTES + DATA_HEAD_BYTES;
                let (Some(kind), Some(message)) = (start.get(HEADER_BYTES), start.get(place)) else {
                    return Ok(None);
                };
                match (*kind, *message) {
                    (XLOG_DATA, b'I' | b'U' | b'D') => {
                        let row = LongRow::new(Layout::Streamed, place + CHANGE_HEAD_BYTES, whole);
                        Ok(Some(Self::Row(row)))
                    }
                    // What anybody may write into the log; nothing of ours is that long.
                    (XLOG_DATA, b'M') => Ok(Some(Self::Other(whole))),
                    (kind, message) => Err(refuse(format!(
                        "a frame of type {:?} and {whole} bytes, beginning with {:?}",
                        char::from(kind),
                        char::from(message)
                    ))),
                }
            }
            NOTICE_RESPONSE_TAG | PARAMETER_STATUS_TAG | NOTIFICATION_RESPONSE_TAG => {
                Ok(Some(Self::Other(whole)))
            }
            // Its beginning says what people need.
            ERROR_RESPONSE_TAG if start.len() < ERROR_BYTES => Ok(None),
            ERROR_RESPONSE_TAG => Err(server_error(start.get(HEADER_BYTES..).unwrap_or_default(), STREAM)),
            tag => Err(refuse(format!("a message of type {:?} and {whole} bytes", char::from(tag)))),
        }
    }
}

/// The stream's end, when it was not we who ended it.
pub(super) fn closed() -> Error {
    Error::io("server closed the replication stream")(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `XLogData` at 1/2 with the server at 3/4 and the message `hi`.
    const DATA: &[u8] = b"d\0\0\0\x1fw\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0\0\0\0\0\0hi";
    /// A keepalive at 0/10 that wants a reply.
    const ASKS: &[u8] = b"d\0\0\0\x16k\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x01";
    /// One at 0/11 that doesn't.
    const QUIET: &[u8] = b"d\0\0\0\x16k\0\0\0\0\0\0\0\x11\0\0\0\0\0\0\0\0\0";
    const NOTICE: &[u8] = b"N\0\0\0\x08Mx\0\0";

    fn cut(inbox: &mut BytesMut) -> Result<Cut> {
        Cutter::new(HELD_BYTES_MAX).cut(inbox)
    }

    /// An `XLogData` with this message.
    fn data(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(4 + DATA_HEAD_BYTES + message.len()).unwrap();
        [&b"d"[..], &length.to_be_bytes(), b"w", &[0; 24], message].concat()
    }

    fn frames(chunk: &Chunk) -> Vec<Frame<'_>> {
        chunk.frames().map(Result::unwrap).collect()
    }

    #[test]
    fn frames_are_read_in_order() {
        let mut inbox = BytesMut::from([DATA, ASKS, QUIET, &DATA[..DATA.len() - 1]].concat().as_slice());
        let cut = cut(&mut inbox).unwrap();
        assert!(cut.reply_requested);
        assert_eq!(
            frames(&cut.chunk.unwrap()),
            [
                Frame::XLogData {
                    wal_start: Lsn(0x1_0000_0002),
                    wal_end: Lsn(0x3_0000_0004),
                    message: b"hi"
                },
                Frame::Keepalive { wal_end: Lsn(0x10), reply_requested: true },
                Frame::Keepalive { wal_end: Lsn(0x11), reply_requested: false },
            ]
        );
        assert_eq!(&inbox[..], &DATA[..DATA.len() - 1], "the partial frame stays");
    }

    #[test]
    fn a_frame_that_arrives_byte_by_byte_is_cut_once() {
        let mut inbox = BytesMut::new();
        for byte in &DATA[..DATA.len() - 1] {
            inbox.extend_from_slice(&[*byte]);
            assert!(cut(&mut inbox).unwrap().chunk.is_none());
        }
        inbox.extend_from_slice(&DATA[DATA.len() - 1..]);
        assert_eq!(&cut(&mut inbox).unwrap().chunk.unwrap().bytes()[..], DATA);
        assert!(inbox.is_empty());
    }

    #[test]
    fn messages_between_frames_are_passed_over() {
        let mut inbox = BytesMut::from([NOTICE, DATA, NOTICE, NOTICE, QUIET, NOTICE].concat().as_slice());
        assert_eq!(frames(&cut(&mut inbox).unwrap().chunk.unwrap()).len(), 1);
        let second = cut(&mut inbox).unwrap();
        assert_eq!(frames(&second.chunk.unwrap()).len(), 1);
        assert!(!second.reply_requested);
        assert!(cut(&mut inbox).unwrap().chunk.is_none());
        assert!(inbox.is_empty());
    }

    #[test]
    fn the_end_of_the_stream_is_an_error_of_its_own_kind() {
        let refused = cut(&mut BytesMut::from(&b"E\0\0\0\x13C57P01\0Mbye\0\0xx"[..])).unwrap_err();
        assert!(matches!(&refused, Error::Server { code, .. } if code == "57P01"), "{refused:?}");
        for bytes in [&b"c\0\0\0\x04"[..], b"C\0\0\0\x0bCOPY 0\0"] {
            let error = cut(&mut BytesMut::from(bytes)).unwrap_err();
            assert_eq!(error.to_string(), "server closed the replication stream");
            assert!(
                matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof)
            );
        }
    }

    #[test]
    fn what_is_too_long_is_dropped_or_shortened_and_the_frames_around_it_stay() {
        const HELD: usize = 8 << 10;
        let long = vec![b'x'; 100_000];
        let message = [b"M\x01\0\0\0\0\0\0\0\x01x\0\0\x01\x86\xa0", long.as_slice()].concat();
        let row = [b"I\0\0\0\x01N\0\x02nt\0\x01\x86\xa0", long.as_slice()].concat();
        let notice = [b"N\0\x01\x86\xa4", long.as_slice()].concat();
        let update = [b"U\0\0\0\x01K\0\x01nN\0\x01t\0\x01\x86\xa0", long.as_slice()].concat();
        let stream = [DATA, &data(&message), ASKS, &data(&row), &notice, &data(&update), QUIET].concat();
        for step in [1, 1_000, 30_000, stream.len()] {
            let (mut cutter, mut inbox) = (Cutter::new(HELD), BytesMut::new());
            let (mut found, mut asked) = (Vec::new(), 0);
            for piece in stream.chunks(step) {
                inbox.extend_from_slice(piece);
                loop {
                    let cut = cutter.cut(&mut inbox).unwrap();
                    asked += u32::from(cut.reply_requested);
                    let Some(chunk) = cut.chunk else { break };
                    found.extend(frames(&chunk).into_iter().map(|frame| match frame {
                        Frame::XLogData { message, .. } => message.to_vec(),
                        Frame::Keepalive { wal_end, .. } => wal_end.to_string().into_bytes(),
                    }));
                }
                assert!(inbox.len() <= HELD, "{} bytes are held", inbox.len());
            }
            let expected = [
                &b"hi"[..],
                b"0/10",
                b"I\0\0\0\x01N\0\x02nL\0\x01\x86\xa0",
                b"U\0\0\0\x01K\0\x01nN\0\x01L\0\x01\x86\xa0",
                b"0/11",
            ];
            assert_eq!(found, expected, "in pieces of {step} bytes");
            assert_eq!(asked, 1);
        }
    }

    #[test]
    fn what_is_too_long_and_nothing_else_is_refused_before_it_has_come() {
        const HELD: usize = 8 << 10;
        let frame = |kind: &[u8], tag: &[u8]| [b"d\x10\0\0\0", kind, &[0; 24], tag].concat();
        for bytes in [frame(b"k", b"I"), frame(b"w", b"R"), frame(b"x", b"I"), b"Z\x10\0\0\0".to_vec()] {
            let error = Cutter::new(HELD).cut(&mut BytesMut::from(bytes.as_slice())).unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{bytes:?}: {error:?}");
        }
        let error = [b"E\x10\0\0\0C57P01\0Mbye\0".to_vec(), vec![b'x'; HELD]].concat();
        let error = Cutter::new(HELD).cut(&mut BytesMut::from(error.as_slice())).unwrap_err();
        assert!(matches!(&error, Error::Server { code, .. } if code == "57P01"), "{error:?}");
    }

    #[test]
    fn what_the_protocol_does_not_allow_is_refused() {
        for bytes in [
            &b"d\0\0\0\x03"[..],
            b"d\xff\xff\xff\xff",
            b"d\x7f\xff\xff\xff",
            b"d\x40\0\0\0",
            b"Z\0\0\0\x05I",
            b"d\0\0\0\x06kx",
            b"d\0\0\0\x17k\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x01\0",
        ] {
            let error = cut(&mut BytesMut::from(bytes)).unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{bytes:?}");
        }
        for bytes in [&b"d\0\0\0\x05x"[..], b"d\0\0\0\x04", b"d\0\0\0\x09wabcd", b"d\0\0", b"d\0\0\0\x09w"] {
            let chunk = Chunk::new(Bytes::copy_from_slice(bytes));
            let read: Vec<_> = chunk.frames().collect();
            assert!(matches!(read.as_slice(), [Err(Error::Protocol { .. })]), "{bytes:?}: {read:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just(DATA.to_vec()), Just(ASKS.to_vec()), Just(NOTICE.to_vec()), Just(b"d\0\0\0".to_vec()),
                    prop::collection::vec(any::<u8>(), 0..40),
                ],
                0..8,
            )
        ) {
            let bytes = pieces.concat();
            let chunk = Chunk::new(Bytes::from(bytes.clone()));
            prop_assert!(chunk.frames().count() <= bytes.len());
            for held_max in [30, HELD_BYTES_MAX] {
                let (mut cutter, mut inbox) = (Cutter::new(held_max), BytesMut::from(bytes.as_slice()));
                for _ in 0..=bytes.len() {
                    let Ok(Cut { chunk: Some(_), .. }) = cutter.cut(&mut inbox) else { break };
                }
            }
        }
    }
}
