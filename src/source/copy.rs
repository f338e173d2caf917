//! [`Source`]: rows by `COPY ... TO STDOUT (FORMAT binary)`, in the form in which the stream has them.

use tokio_postgres::Client;

use super::{Copier, Partition, Slice, TimeColumn};
use crate::batch::Batches;
use crate::decode::{Decoder, Inserted, Notice};
use crate::error::{Error, Result};
use crate::pgoutput::{Column, Insert, Relation, Tuple};
use crate::postgres::{CopyOut, Encoding, quote_identifier};
use crate::source::lookup::{BINARY_FORM, Lookup};
use crate::tables::Kind;
use crate::watermark::Watermark;

/// How a binary copy begins (manual, `COPY`, "Binary Format").
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// What follows the signature: flags, and the length of an extension of the header. Those that are known have neither.
const NO_FLAGS: [u8; 8] = [0; 8];

/// What comes in place of a row's count of values, after the last row.
const TRAILER: u16 = u16::MAX;

/// Which column of which table a row `a` of `pg_attribute` is, in SQL: the same after it was renamed.
pub(super) const ATTRIBUTE: &str = "a.attrelid::text || '.' || a.attnum";

/// Whether values of a built-in type are texts (`text`, `varchar`, `bpchar`, `name`).
pub(super) const fn is_text(type_oid: u32) -> bool {
    matches!(type_oid, 25 | 1043 | 1042 | 19)
}

/// Whether the binary form of this built-in type holds text (`json` and `jsonb` do, too).
const fn has_text(type_oid: u32) -> bool {
    is_text(type_oid) || matches!(type_oid, 114 | 3802)
}

/// Whether an archived table has a column of a type whose binary form is not known.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn has_unreadable(client: &Client, slot: &str) -> Result<bool> {
    let query = format!(
        "select exists (
             select from highwater.watermark w join pg_attribute a on a.attrelid = w.table_oid join pg_type t on t.oid = a.atttypid
             where w.slot_name = $1 and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and {BINARY_FORM} is null)"
    );
    let row = client.query_one(&query, &[&slot]).await;
    row.and_then(|row| row.try_get(0)).map_err(Error::sql("reading the types of the drift tables' columns"))
}

/// A drift table, as the snapshot's catalog has it.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) oid: u32,
    /// As `highwater.watermark.source_table` has it.
    pub(crate) name: String,
    pub(crate) time: TimeColumn,
    /// Of its database.
    pub(super) encoding: Encoding,
    columns: Vec<SourceColumn>,
    /// Which columns come as text, and not in their binary form: all texts, and what is of a type whose form is not known.
    is_text: Vec<bool>,
}

#[derive(Debug)]
struct SourceColumn {
    name: String,
    /// The built-in type that has the same binary form, if there is one.
    type_oid: u32,
    /// The type itself.
    own: u32,
    has_known_form: bool,
    modifier: i32,
    /// As SQL writes its type.
    type_name: String,
    /// As [`ColumnSpec::attribute`](crate::tables::ColumnSpec) has it.
    attribute: String,
}

impl Source {
    /// The table of a watermark row; `None` if it is gone.
    pub(crate) async fn find(client: &Client, row: &Watermark) -> Result<Option<Self>> {
        let failed = || Error::sql(format!("reading the columns of {}", row.source_table));
        // What the stream sends: generated columns are left out.
        let query = format!(
            "select w.table_oid, a.attname::text, a.atttypid, {BINARY_FORM}, getdatabaseencoding()::text, a.atttypmod,
                    format_type(a.atttypid, a.atttypmod), {ATTRIBUTE}
             from highwater.watermark w join pg_class c on c.oid = w.table_oid
             join pg_attribute a on a.attrelid = w.table_oid join pg_type t on t.oid = a.atttypid
             where w.source_table = $1 and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
             order by a.attnum"
        );
        let mut table = None;
        let mut columns = Vec::new();
        for found in client.query(&query, &[&row.source_table]).await.map_err(failed())? {
            let encoding: String = found.try_get(4).map_err(failed())?;
            table = Some((found.try_get(0).map_err(failed())?, Encoding::of_name(&encoding)));
            let own: u32 = found.try_get(2).map_err(failed())?;
            let form: Option<u32> = found.try_get(3).map_err(failed())?;
            columns.push(SourceColumn {
                name: found.try_get(1).map_err(failed())?,
                type_oid: form.unwrap_or(own),
                own,
                has_known_form: form.is_some(),
                modifier: found.try_get(5).map_err(failed())?,
                type_name: found.try_get(6).map_err(failed())?,
                attribute: found.try_get(7).map_err(failed())?,
            });
        }
        Ok(table.map(|(oid, encoding)| {
            let name = row.source_table.clone();
            // Where a text may not be convertible, its bytes are asked for.
            let is_raw = |column: &SourceColumn| encoding != Encoding::Utf8 && has_text(column.type_oid);
            let is_text = columns.iter().map(|column| !column.has_known_form || is_raw(column)).collect();
            let time = columns.iter().find(|column| column.name == row.time_column);
            let time = TimeColumn::new(&row.time_column, time.map(|column| column.type_oid));
            Self { oid, name, time, encoding, columns, is_text }
        }))
    }

    /// The type (`pg_type.oid`) of a column, or the built-in one that has the same binary form.
    pub(super) fn type_of(&self, name: &str) -> Option<u32> {
        self.columns.iter().find(|column| column.name == name).map(|column| column.type_oid)
    }

    /// Whether a column is a text that is compared as one.
    pub(crate) fn is_plain_text(&self, name: &str) -> bool {
        self.columns.iter().any(|column| column.name == name && is_text(column.own))
    }

    /// A decoder for its rows, which comes to know what they look like. Returns also what its operator should know.
    pub(crate) fn decoder(&self, schema: &str, kind: Kind) -> (Decoder, Vec<Notice>) {
        let mut decoder = Decoder::new(schema, &[kind]);
        if self.encoding == Encoding::Other {
            decoder.ask_for_texts();
        }
        decoder.adopt(self.oid, kind, &self.name);
        let notices = decoder.relation(&self.relation());
        (decoder, notices)
    }

    /// The columns and their types, as SQL writes them.
    pub(super) fn column_types(&self) -> impl Iterator<Item = (&str, &str)> {
        self.columns.iter().map(|column| (column.name.as_str(), column.type_name.as_str()))
    }

    /// Which column of which table that of this name is.
    pub(super) fn attribute_of(&self, name: &str) -> Option<&str> {
        let column = self.columns.iter().find(|column| column.name == name);
        column.map(|column| column.attribute.as_str())
    }

    /// Whether it has a column of this name.
    pub(crate) fn has_column(&self, name: &str) -> bool {
        self.type_of(name).is_some()
    }

    /// The table as the stream would describe it.
    fn relation(&self) -> Relation<'_> {
        let (namespace, table) = self.name.split_once('.').unwrap_or_default();
        let columns = self.columns.iter().map(|column| Column {
            name: column.name.as_bytes(),
            type_oid: column.type_oid,
            modifier: column.modifier,
        });
        Relation {
            oid: self.oid,
            namespace: namespace.as_bytes(),
            name: table.as_bytes(),
            columns: columns.collect(),
        }
    }

    /// Starts reading a slice of a partition.
    pub(crate) async fn read<'a>(
        &'a self,
        copier: &'a mut Copier,
        partition: &Partition,
        slice: &Slice,
    ) -> Result<Rows<'a>> {
        let list = |cast: bool| {
            let text = |(column, is_text): (&SourceColumn, &bool)| {
                let name = quote_identifier(&column.name);
                // What the type itself writes; a cast to text may be another text.
                let text = || format!("case when {name} is not null then format('%s', {name}) end");
                match (cast && *is_text, self.encoding) {
                    (false, _) => name,
                    (true, Encoding::Utf8) => text(),
                    (true, _) => format!("convert_to({}, getdatabaseencoding())", text()),
                }
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
        let context = format!("copying {}", partition.name);
        Ok(Rows { source: self, out: copier.copy_out(&statement, context).await?, has_begun: false })
    }
}

/// The rows of a copy.
pub(crate) struct Rows<'a> {
    source: &'a Source,
    out: CopyOut<'a>,
    has_begun: bool,
}

impl Rows<'_> {
    /// The next row; `None` past the last one.
    ///
    /// # Errors
    ///
    /// The copy was cut short, or is none.
    pub(crate) async fn next(&mut self) -> Result<Option<Insert<'_>>> {
        // A message has one row (manual 55.2.6); the header is one of its own, or in front of the first.
        let mut start = 0;
        if !self.has_begun {
            self.step().await?;
            start = self.header()?;
            self.has_begun = true;
        }
        if start == 0 || start == self.out.data().len() {
            self.step().await?;
            start = 0;
        }
        let Some((count, _)) = self.message(start).split_first_chunk() else {
            return Err(self.malformed("a row is cut short"));
        };
        let column_count = u16::from_be_bytes(*count);
        if column_count == TRAILER {
            return match self.out.next().await? {
                false => Ok(None),
                true => Err(self.malformed("it goes on past its end")),
            };
        }
        if usize::from(column_count) != self.source.columns.len() {
            return Err(self.malformed(&format!("a row has {column_count} values")));
        }
        let values = self.message(start + size_of_val(&column_count));
        let tuple = Tuple::copied(column_count, values, &self.source.is_text);
        Ok(Some(Insert { relation: self.source.oid, tuple }))
    }

    async fn step(&mut self) -> Result<()> {
        match self.out.next().await? {
            true => Ok(()),
            false => Err(self.malformed("it ends before its end")),
        }
    }

    /// Length of what is in front of the rows.
    fn header(&self) -> Result<usize> {
        let rest = self.message(0).strip_prefix(SIGNATURE);
        match rest.is_some_and(|rest| rest.starts_with(&NO_FLAGS)) {
            true => Ok(SIGNATURE.len() + NO_FLAGS.len()),
            false => Err(self.malformed("it does not begin as a binary copy")),
        }
    }

    fn message(&self, start: usize) -> &[u8] {
        self.out.data().get(start..).unwrap_or_default()
    }

    fn malformed(&self, detail: &str) -> Error {
        self.out.malformed(detail)
    }
}

/// Appends a row to the batches; looks up its entity if that is not known. Says where it is now.
#[inline]
pub(crate) async fn insert(
    decoder: &mut Decoder,
    row: Insert<'_>,
    batches: &mut Batches,
    entities: &mut Lookup,
) -> Result<Inserted> {
    loop {
        let inserted = decoder.insert(&row, batches).map_err(|error| Error::Protocol {
            context: "decoding a copied row".to_owned(),
            detail: error.to_string(),
        })?;
        match inserted {
            Inserted::Done | Inserted::Quarantined => return Ok(inserted),
            Inserted::NotArchived => return Err(Error::Internal("a copied row has no table".to_owned())),
            asked => entities.answer(decoder, asked).await?,
        }
    }
}
