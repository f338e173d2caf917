//! [`LongRow`]: a row that is too long to be held. Its long values are left out as they arrive. Pure, as [`frame`](super::frame).

use bytes::{Buf as _, BufMut as _, BytesMut};

use super::wire::HEADER_BYTES;
use crate::pgoutput::{LONG_COPIED, LONG_TAG, NULL_COPIED};

/// Values of more bytes are left out of a row that is too long. Shorter ones stay, so that people can tell which row it is.
const VALUE_BYTES_MAX: usize = 4 << 10;

/// What is kept of a row at most: more than a table's 1,600 columns can have.
const KEPT_BYTES_MAX: usize = 8 << 20;

/// How a row's values are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// In a change of the stream, behind its relation: one or two rows, each behind a tag and the count of its values, each of these
    /// behind a tag.
    Streamed,
    /// In a binary copy: each behind its length.
    Copied,
}

/// What is in front of a streamed row's values: a tag, and their count.
const ROW_HEAD_BYTES: usize = 3;

/// A message with a row, of which a part has arrived.
#[derive(Debug)]
pub(super) struct LongRow {
    layout: Layout,
    /// Bytes in front of the first row or value, the message's header among them, that have not arrived yet.
    head: usize,
    /// Values of a streamed row that have not arrived yet.
    values: u16,
    /// Bytes of the message that were not taken yet.
    left: usize,
    /// How many of these are left out.
    skipped: usize,
    kept: BytesMut,
}

/// What comes next in a row.
enum Next {
    Keep(usize),
    /// A streamed row of so many values begins.
    Row(u16),
    /// A value of so many bytes, behind so many bytes of head.
    LeaveOut(usize, u32),
    /// Not yet to be seen.
    Unknown,
}

impl LongRow {
    /// A message of `whole` bytes, whose first row or value is behind `head` bytes.
    pub(super) fn new(layout: Layout, head: usize, whole: usize) -> Self {
        Self { layout, head, values: 0, left: whole, skipped: 0, kept: BytesMut::new() }
    }

    /// Takes what has arrived; gives the message, without its long values, once all of it has.
    ///
    /// # Errors
    ///
    /// The bytes are not a row; says why.
    pub(super) fn take(&mut self, inbox: &mut BytesMut) -> Result<Option<BytesMut>, &'static str> {
        loop {
            let gone = self.skipped.min(inbox.len());
            inbox.advance(gone);
            self.skipped -= gone;
            self.left -= gone;
            if self.skipped > 0 {
                return Ok(None);
            }
            if self.left == 0 {
                return Ok(Some(self.finish()));
            }
            let arrived = inbox.get(..self.left.min(inbox.len())).unwrap_or_default();
            match self.next(arrived) {
                Next::Row(values) => {
                    self.values = values;
                    self.keep(inbox, ROW_HEAD_BYTES)?;
                }
                Next::Keep(count) if count <= arrived.len() => {
                    self.pass_value();
                    self.keep(inbox, count)?;
                }
                Next::LeaveOut(head, length) if head.saturating_add(length as usize) <= self.left => {
                    match self.layout {
                        Layout::Streamed => self.kept.put_u8(LONG_TAG),
                        Layout::Copied => self.kept.put_u32(LONG_COPIED),
                    }
                    self.kept.put_u32(length);
                    self.pass_value();
                    self.skipped = head + length as usize;
                }
                Next::Keep(_) | Next::Unknown if arrived.len() < self.left => return Ok(None),
                _ => return Err("it ends inside a value"),
            }
        }
    }

    /// The head of the message or one value has been taken.
    fn pass_value(&mut self) {
        if self.head == 0 {
            self.values = self.values.saturating_sub(1);
        }
        self.head = 0;
    }

    fn keep(&mut self, inbox: &mut BytesMut, count: usize) -> Result<(), &'static str> {
        if self.kept.len() + count > KEPT_BYTES_MAX {
            return Err("it has more values than a table has columns");
        }
        self.kept.extend_from_slice(&inbox.split_to(count));
        self.left -= count;
        Ok(())
    }

    /// How many bytes of the message were not taken yet.
    pub(super) const fn left(&self) -> usize {
        self.left
    }

    fn next(&self, arrived: &[u8]) -> Next {
        if self.head > 0 {
            return Next::Keep(self.head);
        }
        let (head, length) = match self.layout {
            Layout::Streamed if self.values == 0 => {
                return match arrived.get(1..ROW_HEAD_BYTES) {
                    Some([high, low]) => Next::Row(u16::from_be_bytes([*high, *low])),
                    _ => Next::Unknown,
                };
            }
            Layout::Streamed => match arrived.split_first() {
                None => return Next::Unknown,
                Some((b't' | b'b', rest)) => (1, rest.first_chunk()),
                // Null, or what makes no sense to whoever reads the row.
                Some(_) => return Next::Keep(1),
            },
            Layout::Copied => (0, arrived.first_chunk()),
        };
        let Some(length) = length.map(|length| u32::from_be_bytes(*length)) else { return Next::Unknown };
        let head = head + size_of_val(&length);
        match length {
            NULL_COPIED if self.layout == Layout::Copied => Next::Keep(head),
            _ if length as usize <= VALUE_BYTES_MAX => Next::Keep(head + length as usize),
            _ => Next::LeaveOut(head, length),
        }
    }

    /// The message as if it had been as short as it is now.
    fn finish(&mut self) -> BytesMut {
        let mut message = std::mem::take(&mut self.kept);
        // The length counts itself but not the tag.
        let length = u32::try_from(message.len().saturating_sub(1)).unwrap_or(u32::MAX);
        if let Some(place) = message.get_mut(1..HEADER_BYTES) {
            place.copy_from_slice(&length.to_be_bytes());
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message of this layout, whose head has two bytes, with a short value, a long one, a short one, and a null.
    fn message(layout: Layout, long: usize) -> Vec<u8> {
        let mut body = b"hh".to_vec();
        if layout == Layout::Streamed {
            body.extend(b"N\0\x04");
        }
        let mut value = |tag: u8, value: &[u8]| {
            if layout == Layout::Streamed {
                body.push(tag);
            }
            body.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend(value);
        };
        value(b't', b"short");
        value(b'b', &vec![b'x'; long]);
        value(b't', b"last");
        match layout {
            Layout::Streamed => body.push(b'n'),
            Layout::Copied => body.extend(NULL_COPIED.to_be_bytes()),
        }
        let mut message = vec![b'd'];
        message.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        message.extend(body);
        message
    }

    fn shortened(layout: Layout, message: &[u8], step: usize) -> Result<Vec<u8>, &'static str> {
        let mut row = LongRow::new(layout, HEADER_BYTES + 2, message.len());
        let mut inbox = BytesMut::new();
        for piece in message.chunks(step) {
            inbox.extend_from_slice(piece);
            if let Some(row) = row.take(&mut inbox)? {
                assert!(inbox.is_empty());
                return Ok(row.to_vec());
            }
            assert!(inbox.len() <= VALUE_BYTES_MAX + step + HEADER_BYTES + 2);
        }
        panic!("the message has not ended");
    }

    #[test]
    fn long_values_are_left_out_however_they_arrive() {
        let long = 100_000;
        for (layout, expected) in [
            (Layout::Streamed, &b"d\0\0\0\x22hhN\0\x04t\0\0\0\x05shortL\0\x01\x86\xa0t\0\0\0\x04lastn"[..]),
            (
                Layout::Copied,
                b"d\0\0\0\x23hh\0\0\0\x05short\xff\xff\xff\xfe\0\x01\x86\xa0\0\0\0\x04last\xff\xff\xff\xff",
            ),
        ] {
            for step in [1, 7, 4_096, 1 << 20] {
                assert_eq!(
                    shortened(layout, &message(layout, long), step).as_deref(),
                    Ok(expected),
                    "{step}"
                );
            }
        }
        let whole = message(Layout::Copied, 100);
        assert_eq!(shortened(Layout::Copied, &whole, 3), Ok(whole), "nothing is long");
    }

    #[test]
    fn the_row_that_was_and_the_row_that_is_lose_their_long_values() {
        let long = 100_000_u32.to_be_bytes();
        // Counts whose bytes would be tags of values: 0x6274 is "bt".
        let old = [&b"K\0\x02t"[..], &long, &vec![b'o'; 100_000], b"n"].concat();
        let new = [&b"N\x62\x74t"[..], &long, &vec![b'x'; 100_000], &[b'u'; 0x6273]].concat();
        let body = [&b"hh"[..], &old, &new].concat();
        let mut message = vec![b'd'];
        message.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        message.extend(&body);
        let expected = [&b"hhK\0\x02L"[..], &long, b"nN\x62\x74L", &long, &[b'u'; 0x6273]].concat();
        for step in [1, 4_096, 1 << 20] {
            let found = shortened(Layout::Streamed, &message, step).unwrap();
            assert_eq!(found.get(HEADER_BYTES..), Some(expected.as_slice()), "{step}");
        }
    }

    #[test]
    fn what_is_no_row_is_refused_and_not_held() {
        // One row of nulls after the other.
        let row = [&b"N\xff\xff"[..], &[b'n'; 0xffff]].concat();
        let mut nulls = row.repeat(KEPT_BYTES_MAX / row.len() + 2);
        nulls.splice(..0, *b"d\0\0\0\0hh");
        assert!(shortened(Layout::Streamed, &nulls, 1 << 20).is_err());
        for body in [&b"t\0\x10\0\0abc"[..], b"t\0\0", b"t\0\0\0\x05abc", b"b\xff\xff\xff\xffabc"] {
            let message = [b"d\0\0\0\0hhN\0\x01", body].concat();
            assert!(shortened(Layout::Streamed, &message, 2).is_err(), "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(any::<u8>(), 8..200), copied: bool, step in 1_usize..50, extra in 0_usize..50,
        ) {
            let layout = if copied { Layout::Copied } else { Layout::Streamed };
            let mut row = LongRow::new(layout, 7, bytes.len() + extra);
            let mut inbox = BytesMut::new();
            for piece in bytes.chunks(step) {
                inbox.extend_from_slice(piece);
                if !matches!(row.take(&mut inbox), Ok(None)) {
                    break;
                }
            }
        }
    }
}
