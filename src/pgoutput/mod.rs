//! The messages of the `pgoutput` plugin, protocol version 1 (manual section 55.9, "Logical
//! Replication Message Formats").
//!
//! Pure and total: bytes in, borrowed messages out, an error for anything else. Nothing is copied;
//! an insert's values are read one by one from the message.
//!
//! **Invariant.** This module knows nothing of drift tables.

mod reader;
mod relation;
mod tuple;

pub use reader::DecodeError;
pub use relation::{Column, Relation};
pub(crate) use tuple::{LONG_COPIED, LONG_TAG, NULL_COPIED};
pub use tuple::{Tuple, Value, Values};

use crate::lsn::Lsn;
use crate::tables::clamp_to_calendar;
use reader::Reader;

/// Microseconds from the Unix epoch to PostgreSQL's (2000-01-01T00:00:00Z).
pub const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// One message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction's changes follow. Only committed transactions are sent.
    Begin(Begin),
    /// The transaction is complete.
    Commit(Commit),
    /// How the rows of a table look from here on.
    Relation(Relation<'a>),
    /// A row.
    Insert(Insert<'a>),
    /// A row has other values.
    Update(Update<'a>),
    /// A row is gone.
    Delete(Delete<'a>),
    /// What somebody wrote into the log by `pg_logical_emit_message`.
    Logical(Logical<'a>),
    /// A message that the archive does not need (types, origins), or that a publication should not send (truncate): its tag.
    Other(u8),
}

/// A logical message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logical<'a> {
    /// It is part of the transaction around it.
    pub is_transactional: bool,
    /// Whom it is for.
    pub prefix: &'a [u8],
    /// What it says.
    pub content: &'a [u8],
}

/// The start of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Where the transaction's commit record begins.
    pub final_lsn: Lsn,
    /// When it was committed: microseconds since the Unix epoch.
    pub commit_micros: i64,
    /// Its id, 32 bits wide.
    pub xid: u32,
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Where the commit record begins.
    pub commit_lsn: Lsn,
    /// Where it ends: the position to confirm once the transaction is durable.
    pub end_lsn: Lsn,
    /// When it was committed: microseconds since the Unix epoch.
    pub commit_micros: i64,
}

/// A row of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insert<'a> {
    /// The table's oid, as an earlier [`Message::Relation`] gave it.
    pub relation: u32,
    /// The row's values.
    pub tuple: Tuple<'a>,
}

/// New values of a row of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update<'a> {
    /// The table's oid, as an earlier [`Message::Relation`] gave it.
    pub relation: u32,
    /// What the row was before: all of its values, or, if these have changed, those of its replica identity, with nulls in place of the
    /// others. `None` where the log has neither.
    pub old: Option<Tuple<'a>>,
    /// It has all values (`replica identity full`).
    pub is_whole: bool,
    /// The row's values.
    pub tuple: Tuple<'a>,
}

/// The end of a row of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delete<'a> {
    /// The table's oid, as an earlier [`Message::Relation`] gave it.
    pub relation: u32,
    /// What the row was: all of its values, or those of its replica identity, with nulls in place of the others.
    pub old: Tuple<'a>,
}

impl<'a> Message<'a> {
    /// Reads one message.
    ///
    /// The values of a row are checked when they are read ([`Tuple::values`]), not here.
    ///
    /// # Errors
    ///
    /// The bytes are not one whole message of protocol version 1.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        match reader.u8("the message tag")? {
            b'I' => parse_insert(reader).map(Self::Insert),
            b'B' => parse_begin(reader).map(Self::Begin),
            b'C' => parse_commit(reader).map(Self::Commit),
            b'R' => Relation::parse(reader).map(Self::Relation),
            b'M' => parse_logical(reader).map(Self::Logical),
            b'U' => parse_update(reader).map(Self::Update),
            b'D' => parse_delete(reader).map(Self::Delete),
            tag @ (b'Y' | b'O' | b'T') => Ok(Self::Other(tag)),
            tag => Err(DecodeError::UnknownTag { field: "message", tag }),
        }
    }
}

#[inline]
fn parse_insert(mut reader: Reader<'_>) -> Result<Insert<'_>, DecodeError> {
    let relation = reader.u32("the insert's relation")?;
    match reader.u8("the insert's tuple tag")? {
        b'N' => Ok(Insert { relation, tuple: Tuple::parse(reader)? }),
        tag => Err(DecodeError::UnknownTag { field: "tuple", tag }),
    }
}

fn parse_update(mut reader: Reader<'_>) -> Result<Update<'_>, DecodeError> {
    let relation = reader.u32("the update's relation")?;
    let mut old = None;
    let mut tag = reader.u8("the update's tuple tag")?;
    let is_whole = tag == b'O';
    if matches!(tag, b'K' | b'O') {
        old = Some(Tuple::parse_first(&mut reader)?);
        tag = reader.u8("the update's tuple tag")?;
    }
    match tag {
        b'N' => Ok(Update { relation, old, is_whole, tuple: Tuple::parse(reader)? }),
        tag => Err(DecodeError::UnknownTag { field: "tuple", tag }),
    }
}

fn parse_delete(mut reader: Reader<'_>) -> Result<Delete<'_>, DecodeError> {
    let relation = reader.u32("the delete's relation")?;
    match reader.u8("the delete's tuple tag")? {
        b'K' | b'O' => Ok(Delete { relation, old: Tuple::parse(reader)? }),
        tag => Err(DecodeError::UnknownTag { field: "tuple", tag }),
    }
}

fn parse_begin(mut reader: Reader<'_>) -> Result<Begin, DecodeError> {
    let begin = Begin {
        final_lsn: reader.lsn("the final position")?,
        commit_micros: unix_micros(reader.i64("the commit time")?),
        xid: reader.u32("the transaction id")?,
    };
    reader.finish().map(|()| begin)
}

fn parse_commit(mut reader: Reader<'_>) -> Result<Commit, DecodeError> {
    reader.u8("the commit flags")?;
    let commit = Commit {
        commit_lsn: reader.lsn("the commit position")?,
        end_lsn: reader.lsn("the end position")?,
        commit_micros: unix_micros(reader.i64("the commit time")?),
    };
    reader.finish().map(|()| commit)
}

fn parse_logical(mut reader: Reader<'_>) -> Result<Logical<'_>, DecodeError> {
    let is_transactional = reader.u8("the message's flags")? & 1 != 0;
    reader.lsn("the message's position")?;
    let prefix = reader.zero_ended("the message's prefix")?;
    let length = usize::try_from(reader.u32("the message's length")?).unwrap_or(usize::MAX);
    let content = reader.take(length, "the message's content")?;
    reader.finish().map(|()| Logical { is_transactional, prefix, content })
}

/// A commit time is the server's clock. One that no clock shows is cut to the calendar that windows have.
fn unix_micros(postgres_micros: i64) -> i64 {
    clamp_to_calendar(postgres_micros.saturating_add(POSTGRES_EPOCH_MICROS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &[u8] = b"B\0\0\0\0\x01\x02\x03\x04\0\0\0\0\0\0\0\x05\0\0\x03\xe8";
    const COMMIT: &[u8] = b"C\0\0\0\0\0\x01\x02\x03\x04\0\0\0\0\x01\x02\x03\x34\0\0\0\0\0\0\0\x05";
    const LOGICAL: &[u8] = b"M\x01\0\0\0\0\x01\x02\x03\x04highwater\0\0\0\0\x02hi";
    const INSERT: &[u8] = b"I\0\0\x40\x01N\0\x04n\x75t\0\0\0\x02hib\0\0\0\x01\x07";

    #[test]
    fn reads_a_transaction() {
        let begin =
            Begin { final_lsn: Lsn(0x0102_0304), commit_micros: POSTGRES_EPOCH_MICROS + 5, xid: 1000 };
        assert_eq!(Message::parse(BEGIN), Ok(Message::Begin(begin)));
        let commit = Commit {
            commit_lsn: Lsn(0x0102_0304),
            end_lsn: Lsn(0x0102_0334),
            commit_micros: POSTGRES_EPOCH_MICROS + 5,
        };
        assert_eq!(Message::parse(COMMIT), Ok(Message::Commit(commit)));
        let logical = Logical { is_transactional: true, prefix: b"highwater", content: b"hi" };
        assert_eq!(Message::parse(LOGICAL), Ok(Message::Logical(logical)));
        let Ok(Message::Insert(insert)) = Message::parse(INSERT) else { panic!("an insert") };
        assert_eq!(insert.relation, 0x4001);
        let values: Result<Vec<_>, _> = insert.tuple.values().collect();
        assert_eq!(values, Ok(vec![Value::Null, Value::Unchanged, Value::Text(b"hi"), Value::Binary(&[7])]));
    }

    #[test]
    fn reads_what_a_row_was_and_what_it_is() {
        let values = |tuple: Tuple<'_>| tuple.values().map(|value| format!("{value:?}")).collect::<Vec<_>>();
        let key = b"U\0\0\x40\x01K\0\x02t\0\0\0\x01anN\0\x02t\0\0\0\x01bu";
        let Ok(Message::Update(update)) = Message::parse(key) else { panic!("an update") };
        assert_eq!((update.relation, update.is_whole), (0x4001, false));
        assert_eq!(update.old.map(values), Some(vec!["Ok(Text([97]))".to_owned(), "Ok(Null)".to_owned()]));
        assert_eq!(values(update.tuple), ["Ok(Text([98]))", "Ok(Unchanged)"]);
        let Ok(Message::Update(update)) = Message::parse(b"U\0\0\x40\x01N\0\x01n") else {
            panic!("an update")
        };
        assert_eq!((update.old, values(update.tuple)), (None, vec!["Ok(Null)".to_owned()]));
        let Ok(Message::Delete(delete)) = Message::parse(b"D\0\0\x40\x01O\0\x01n") else {
            panic!("a delete")
        };
        assert_eq!(values(delete.old), ["Ok(Null)"]);
    }

    #[test]
    fn every_truncation_and_every_surplus_byte_is_an_error() {
        for message in [BEGIN, COMMIT, LOGICAL] {
            for end in 0..message.len() {
                assert!(matches!(Message::parse(&message[..end]), Err(DecodeError::Truncated { .. })));
            }
            let long = [message, b"\0"].concat();
            assert_eq!(Message::parse(&long), Err(DecodeError::Trailing { bytes: 1 }));
        }
        for end in 0..INSERT.len() {
            let values = |insert: Insert<'_>| insert.tuple.values().collect::<Result<Vec<_>, _>>().map(drop);
            let result = Message::parse(&INSERT[..end]).and_then(|message| match message {
                Message::Insert(insert) => values(insert),
                _ => Ok(()),
            });
            assert!(result.is_err(), "{end}");
        }
    }

    #[test]
    fn an_unknown_tag_is_an_error() {
        assert_eq!(Message::parse(b"S123"), Err(DecodeError::UnknownTag { field: "message", tag: b'S' }));
        assert_eq!(Message::parse(b"Tanything"), Ok(Message::Other(b'T')));
        for wrong in [&b"U\0\0\0\x01N"[..], b"U\0\0\0\x01X\0\0", b"D\0\0\0\x01N\0\0", b"U\0\0\0\x01K\0\x01n"]
        {
            assert!(Message::parse(wrong).is_err(), "{wrong:?}");
        }
        assert!(Message::parse(b"").is_err());
    }
}
