//! [`Source`]: rows by `COPY ... TO STDOUT (FORMAT binary)`, in the form in which the stream has them.

use std::pin::Pin;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::TryStreamExt as _;
use tokio_postgres::{Client, CopyOutStream};

use super::{Partition, Slice, TimeColumn};
use crate::batch::Batches;
use crate::decode::{Decoder, Inserted};
use crate::error::{Error, Result};
use crate::lookup::Lookup;
use crate::pgoutput::{Column, Insert, Relation, Tuple};
use crate::postgres::quote_identifier;
use crate::record::Kind;
use crate::watermark::Watermark;

/// How a binary copy begins (manual, `COPY`, "Binary Format").
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// A drift table, as the snapshot's catalog has it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) oid: u32,
    /// As `highwater.watermark.source_table` has it.
    pub(crate) name: String,
    pub(crate) time: TimeColumn,
    columns: Vec<SourceColumn>,
}

#[derive(Debug)]
struct SourceColumn {
    name: String,
    type_oid: u32,
    /// The type has no binary form, so that the stream sends its text, too.
    is_text: bool,
}

impl Source {
    /// The table of a watermark row; `None` if it is gone.
    pub(crate) async fn find(client: &Client, row: &Watermark) -> Result<Option<Self>> {
        let failed = || Error::sql(format!("reading the columns of {}", row.source_table));
        // What the stream sends: generated columns are left out.
        let query = "select w.table_oid, a.attname::text, a.atttypid, t.typsend = 0
                     from highwater.watermark w join pg_class c on c.oid = w.table_oid
                     join pg_attribute a on a.attrelid = w.table_oid join pg_type t on t.oid = a.atttypid
                     where w.source_table = $1 and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
                     order by a.attnum";
        let mut oid = None;
        let mut columns = Vec::new();
        for found in client.query(query, &[&row.source_table]).await.map_err(failed())? {
            oid = Some(found.try_get(0).map_err(failed())?);
            columns.push(SourceColumn {
                name: found.try_get(1).map_err(failed())?,
                type_oid: found.try_get(2).map_err(failed())?,
                is_text: found.try_get::<_, Option<bool>>(3).map_err(failed())?.unwrap_or(true),
            });
        }
        Ok(oid.map(|oid| {
            let mut source = Self { oid, name: row.source_table.clone(), time: TimeColumn::None, columns };
            source.time = TimeColumn::of(source.type_of("created_at"));
            source
        }))
    }

    /// The type (`pg_type.oid`) of a column.
    pub(super) fn type_of(&self, name: &str) -> Option<u32> {
        self.columns.iter().find(|column| column.name == name).map(|column| column.type_oid)
    }

    /// Whether it has a column of this name.
    pub(crate) fn has_column(&self, name: &str) -> bool {
        self.type_of(name).is_some()
    }

    /// The table as the stream would describe it.
    pub(crate) fn relation(&self, kind: Kind) -> Relation<'_> {
        let (namespace, _) = self.name.split_once('.').unwrap_or_default();
        let columns =
            self.columns.iter().map(|column| Column { name: &column.name, type_oid: column.type_oid });
        Relation {
            oid: self.oid,
            namespace,
            name: kind.source_table().unwrap_or_default(),
            columns: columns.collect(),
        }
    }

    /// Starts reading a slice of a partition.
    pub(crate) async fn read(
        &self,
        client: &Client,
        partition: &Partition,
        slice: &Slice,
    ) -> Result<Rows<'_>> {
        let context = format!("copying {}", partition.name);
        let list = |cast: bool| {
            let text = |column: &SourceColumn| {
                quote_identifier(&column.name) + if cast && column.is_text { "::text" } else { "" }
            };
            self.columns.iter().map(text).collect::<Vec<_>>().join(", ")
        };
        // Without a condition the table itself is copied, which the server does faster.
        let what = match &slice.condition {
            None if partition.may_read && self.columns.iter().all(|column| !column.is_text) => {
                format!("{} ({})", partition.quoted, list(false))
            }
            condition => format!(
                "(select {} from {} where {} and ({}))",
                list(true),
                partition.from,
                partition.filter,
                condition.as_deref().unwrap_or("true")
            ),
        };
        let statement = format!("copy {what} to stdout (format binary)");
        let stream = client.copy_out(&statement).await.map_err(Error::sql(&context))?;
        Ok(Rows {
            source: self,
            context,
            stream: Box::pin(stream),
            unread: Bytes::new(),
            tuple: Vec::new(),
            has_begun: false,
        })
    }
}

/// The rows of a copy.
pub(crate) struct Rows<'a> {
    source: &'a Source,
    context: String,
    stream: Pin<Box<CopyOutStream>>,
    unread: Bytes,
    tuple: Vec<u8>,
    has_begun: bool,
}

impl Rows<'_> {
    /// The next row; `None` past the last one.
    ///
    /// # Errors
    ///
    /// The copy was cut short, or is none.
    pub(crate) async fn next(&mut self) -> Result<Option<Insert<'_>>> {
        loop {
            if !self.has_begun {
                // Signature, flags, and an extension of the header whose length is told.
                if let Some(header) = self.unread.get(..SIGNATURE.len() + 8) {
                    let rest = header.get(SIGNATURE.len()..).unwrap_or_default();
                    if !header.starts_with(SIGNATURE) || rest != [0; 8] {
                        return Err(self.malformed("it does not begin as a binary copy"));
                    }
                    self.unread.advance(SIGNATURE.len() + 8);
                    self.has_begun = true;
                    continue;
                }
            } else if let Some(row) = self.cut()? {
                return match row {
                    Cut::Row(column_count) => {
                        let tuple = Tuple::new(column_count, &self.tuple);
                        Ok(Some(Insert { relation: self.source.oid, tuple }))
                    }
                    Cut::End => Ok(None),
                };
            }
            match self.stream.try_next().await.map_err(Error::sql(&self.context))? {
                Some(more) if self.unread.is_empty() => self.unread = more,
                Some(more) => {
                    let mut joined = BytesMut::from(&self.unread[..]);
                    joined.extend_from_slice(&more);
                    self.unread = joined.freeze();
                }
                None => return Err(self.malformed("it ends before its end")),
            }
        }
    }

    /// Takes a row off the bytes that are there, as the stream would have sent it: each value with its form before its
    /// length. `None` if a part of it is still to come.
    fn cut(&mut self) -> Result<Option<Cut>> {
        let mut bytes = &self.unread[..];
        let Ok(count) = bytes.try_get_i16() else { return Ok(None) };
        let Ok(count) = u16::try_from(count) else {
            // The trailer is -1; whatever follows it is not ours.
            return Ok(Some(Cut::End));
        };
        if usize::from(count) != self.source.columns.len() {
            return Err(self.malformed(&format!("a row has {count} values")));
        }
        self.tuple.clear();
        for column in &self.source.columns {
            let Ok(length) = bytes.try_get_i32() else { return Ok(None) };
            let Ok(length) = usize::try_from(length) else {
                self.tuple.push(b'n');
                continue;
            };
            let Some((value, rest)) = bytes.split_at_checked(length) else { return Ok(None) };
            self.tuple.push(if column.is_text { b't' } else { b'b' });
            self.tuple.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            self.tuple.extend_from_slice(value);
            bytes = rest;
        }
        let used = self.unread.len() - bytes.len();
        self.unread.advance(used);
        Ok(Some(Cut::Row(count)))
    }

    fn malformed(&self, detail: &str) -> Error {
        Error::Protocol { context: self.context.clone(), detail: detail.to_owned() }
    }
}

enum Cut {
    /// A row of so many values.
    Row(u16),
    End,
}

/// Appends a row to the batches; looks up its entity if that is not known.
#[inline]
pub(crate) async fn insert(
    decoder: &mut Decoder,
    row: Insert<'_>,
    batches: &mut Batches,
    entities: &mut Lookup,
) -> Result<()> {
    loop {
        let inserted = decoder.insert(&row, batches).map_err(|error| Error::Protocol {
            context: "decoding a copied row".to_owned(),
            detail: error.to_string(),
        })?;
        match inserted {
            Inserted::Done | Inserted::Quarantined => return Ok(()),
            Inserted::NotArchived => return Err(Error::Internal("a copied row has no table".to_owned())),
            Inserted::UnknownEntity(id) => {
                let entity = entities.entity(id).await?;
                decoder.resolve(id, entity);
            }
        }
    }
}
