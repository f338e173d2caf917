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

/// How many values a row has comes before them.
const COUNT_BYTES: usize = 2;

/// A drift table, as the snapshot's catalog has it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) oid: u32,
    /// As `highwater.watermark.source_table` has it.
    pub(crate) name: String,
    pub(crate) time: TimeColumn,
    columns: Vec<SourceColumn>,
    /// Which columns have a type without a binary form, so that the stream sends its text, too.
    is_text: Vec<bool>,
}

#[derive(Debug)]
struct SourceColumn {
    name: String,
    type_oid: u32,
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
        let (mut columns, mut is_text) = (Vec::new(), Vec::new());
        for found in client.query(query, &[&row.source_table]).await.map_err(failed())? {
            oid = Some(found.try_get(0).map_err(failed())?);
            columns.push(SourceColumn {
                name: found.try_get(1).map_err(failed())?,
                type_oid: found.try_get(2).map_err(failed())?,
            });
            is_text.push(found.try_get::<_, Option<bool>>(3).map_err(failed())?.unwrap_or(true));
        }
        Ok(oid.map(|oid| {
            let name = row.source_table.clone();
            let mut source = Self { oid, name, time: TimeColumn::None, columns, is_text };
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
            let text = |(column, is_text): (&SourceColumn, &bool)| {
                quote_identifier(&column.name) + if cast && *is_text { "::text" } else { "" }
            };
            self.columns.iter().zip(&self.is_text).map(text).collect::<Vec<_>>().join(", ")
        };
        // Without a condition the table itself is copied, which the server does faster.
        let what = match &slice.condition {
            None if partition.may_read && !self.is_text.contains(&true) => {
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
            given: 0,
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
    /// Bytes of the row that was given out last, at the front of the unread ones.
    given: usize,
    has_begun: bool,
}

impl Rows<'_> {
    /// The next row; `None` past the last one.
    ///
    /// # Errors
    ///
    /// The copy was cut short, or is none.
    pub(crate) async fn next(&mut self) -> Result<Option<Insert<'_>>> {
        self.unread.advance(std::mem::take(&mut self.given));
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
                let Cut::Row { column_count, length } = row else { return Ok(None) };
                self.given = COUNT_BYTES + length;
                let values = self.unread.get(COUNT_BYTES..self.given).unwrap_or_default();
                let tuple = Tuple::copied(column_count, values, &self.source.is_text);
                return Ok(Some(Insert { relation: self.source.oid, tuple }));
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

    /// How far the row reaches that the bytes begin with. `None` if a part of it is still to come.
    fn cut(&self) -> Result<Option<Cut>> {
        let mut bytes = &self.unread[..];
        let Ok(count) = bytes.try_get_i16() else { return Ok(None) };
        let Ok(column_count) = u16::try_from(count) else {
            // The trailer is -1; whatever follows it is not ours.
            return Ok(Some(Cut::End));
        };
        if usize::from(column_count) != self.source.columns.len() {
            return Err(self.malformed(&format!("a row has {count} values")));
        }
        let whole = bytes.len();
        for _ in 0..column_count {
            let Ok(length) = bytes.try_get_i32() else { return Ok(None) };
            // Null has the length -1.
            let Some(rest) = bytes.get(usize::try_from(length).unwrap_or(0)..) else { return Ok(None) };
            bytes = rest;
        }
        Ok(Some(Cut::Row { column_count, length: whole - bytes.len() }))
    }

    fn malformed(&self, detail: &str) -> Error {
        Error::Protocol { context: self.context.clone(), detail: detail.to_owned() }
    }
}

enum Cut {
    /// A row of so many values, which take so many bytes.
    Row {
        column_count: u16,
        length: usize,
    },
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
