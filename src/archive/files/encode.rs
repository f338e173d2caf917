//! Sorted rows to Parquet.
//!
//! Row groups end where an entity ends: a reader of one entity then fetches little else. Encodings are
//! those that measured smallest of the ones that every engine reads (`ARCHITECTURE.md` has the layout).

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;

use super::columns::EntityColumns;
use super::stats::{FileStats, StatsBuilder};
use crate::archive::error::encode_error;
use crate::tables::{ColumnType, Kind};
use crate::{Error, Result};

/// Rows of a row group. More make readers without page indexes read too much; fewer make footers large.
pub(in crate::archive) const ROW_GROUP_ROWS: usize = 128 * 1024;

/// A Parquet file in memory.
#[derive(Clone, Debug)]
pub struct EncodedFile {
    /// The file's bytes.
    pub bytes: Bytes,
    /// What it holds.
    pub stats: FileStats,
}

/// Encodes rows of a kind, which must be sorted over all batches by [`Kind::sort_columns`] (nulls first).
/// String columns may be dictionaries (`Int32` or `UInt32` keys, `Utf8` values), in all batches alike;
/// the file holds plain strings. `None` if there are no rows. Blocks for as long as encoding takes.
///
/// # Errors
///
/// [`Error::Encode`] if a batch has other columns than its kind, [`Error::Internal`] if the entities are
/// not sorted.
pub fn encode(kind: Kind, batches: impl IntoIterator<Item = RecordBatch>) -> Result<Option<EncodedFile>> {
    encode_with(kind, writer_properties(kind), batches)
}

pub(in crate::archive) fn encode_with(
    kind: Kind,
    properties: WriterProperties,
    batches: impl IntoIterator<Item = RecordBatch>,
) -> Result<Option<EncodedFile>> {
    let mut batches = batches.into_iter().filter(|batch| batch.num_rows() > 0).peekable();
    let Some(first) = batches.peek() else { return Ok(None) };
    let failed = || encode_error(format!("encoding a file of {}", kind.name()));
    let schema = writer_schema(kind, &first.schema());
    let options = to_options(properties);
    let mut writer =
        ArrowWriter::try_new_with_options(Vec::new(), Arc::clone(&schema), options).map_err(failed())?;
    let mut stats = StatsBuilder::new(kind);
    let mut packer = Packer::new(kind);
    let mut steps = Vec::new();
    loop {
        match batches.next() {
            Some(batch) => {
                let columns = batch.columns().to_vec();
                let rows = RecordBatch::try_new(Arc::clone(&schema), columns)
                    .map_err(encode_error(format!("encoding a file of {}", kind.name())))?;
                packer.push(rows, &mut steps)?;
            }
            None if packer.is_empty() => break,
            None => packer.finish(&mut steps),
        }
        for step in steps.drain(..) {
            match step {
                Step::Write(rows) => {
                    stats.update(&rows)?;
                    writer.write(&rows).map_err(failed())?;
                }
                Step::Close { .. } => writer.flush().map_err(failed())?,
            }
        }
    }
    let bytes = Bytes::from(writer.into_inner().map_err(failed())?);
    Ok(stats.finish().map(|stats| EncodedFile { bytes, stats }))
}

/// The kind's schema with the types of strings that the batches have.
pub(in crate::archive) fn writer_schema(kind: Kind, actual: &Schema) -> SchemaRef {
    let wanted = kind.schema();
    let fields = wanted.fields().iter().map(|field| {
        let given = actual.field_with_name(field.name()).map(Field::data_type);
        match given {
            Ok(DataType::Dictionary(..)) if *field.data_type() == DataType::Utf8 => {
                Arc::new(field.as_ref().clone().with_data_type(given.cloned().unwrap_or(DataType::Utf8)))
            }
            _ => Arc::clone(field),
        }
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// How a kind's files are written.
pub(in crate::archive) fn writer_options(kind: Kind) -> ArrowWriterOptions {
    to_options(writer_properties(kind))
}

/// The Arrow schema stays out of the file, since it would tell readers to make dictionaries of what Delta calls strings.
fn to_options(properties: WriterProperties) -> ArrowWriterOptions {
    ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true)
}

/// Files are for ever, so they have nothing that a reader of 2022 (Spark 3.3, parquet-mr 1.12, DuckDB 1.0) lacks: pages of the
/// first version; dictionaries, and where these grow too large integers DELTA_BINARY_PACKED and all else PLAIN.
pub(in crate::archive) fn writer_properties(kind: Kind) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_statistics_enabled(EnabledStatistics::Page)
        // Row groups are closed by the packer, and by nothing else.
        .set_max_row_group_row_count(None)
        // In the form of the format's specification: parquet-mr trusts no statistics of a writer that it can't parse.
        .set_created_by(concat!("highwater version ", env!("CARGO_PKG_VERSION")).to_owned());
    for column in kind.columns() {
        let path = ColumnPath::from(column.name.as_str());
        properties = match column.column_type {
            ColumnType::Timestamp => properties
                .set_column_dictionary_enabled(path.clone(), false)
                .set_column_encoding(path, Encoding::DELTA_BINARY_PACKED),
            ColumnType::Int | ColumnType::Long | ColumnType::Date => properties
                .set_column_dictionary_page_size_limit(path.clone(), NUMBERS_DICTIONARY_BYTES)
                .set_column_encoding(path, Encoding::DELTA_BINARY_PACKED),
            ColumnType::Double => properties
                .set_column_dictionary_page_size_limit(path.clone(), NUMBERS_DICTIONARY_BYTES)
                .set_column_encoding(path, Encoding::PLAIN),
            ColumnType::String | ColumnType::Binary | ColumnType::Boolean | ColumnType::Decimal { .. } => {
                properties
            }
        };
    }
    properties.build()
}

/// Numbers that repeat are a tenth to a third smaller in a dictionary. A larger one costs more where they don't than it gains
/// (`benches/README.md`); this one costs 4 % at most.
const NUMBERS_DICTIONARY_BYTES: usize = 16 << 10;

/// What to do next with a file that is being written.
#[derive(Debug)]
pub(in crate::archive) enum Step {
    /// Append rows of one entity (of the quarantine: any).
    Write(RecordBatch),
    /// End the row group.
    Close {
        /// Whether the rows after it belong to another entity.
        entity_ends: bool,
    },
}

/// Packs sorted rows into row groups: whole entities up to [`ROW_GROUP_ROWS`], larger ones split. Holds
/// back (slices of) at most that many rows, since it must know an entity's size before it can place it.
#[derive(Debug)]
pub(in crate::archive) struct Packer {
    kind: Kind,
    /// The entity whose rows are coming in.
    entity: Option<Vec<String>>,
    held: Vec<RecordBatch>,
    held_rows: usize,
    /// Rows in the open row group.
    group_rows: usize,
}

impl Packer {
    pub(in crate::archive) const fn new(kind: Kind) -> Self {
        Self { kind, entity: None, held: Vec::new(), held_rows: 0, group_rows: 0 }
    }

    pub(in crate::archive) const fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(in crate::archive) fn push(&mut self, batch: RecordBatch, steps: &mut Vec<Step>) -> Result<()> {
        let Some(columns) = EntityColumns::of(self.kind, &batch)? else {
            self.hold(&batch, steps);
            return Ok(());
        };
        let mut start = 0;
        while start < batch.num_rows() {
            let entity = columns.get(start).ok_or_else(|| self.defect("lacks an entity"))?;
            let same = self.entity.as_ref().is_some_and(|current| entity.iter().eq(current.iter()));
            if !same {
                if self
                    .entity
                    .as_ref()
                    .is_some_and(|current| entity.iter().copied().lt(current.iter().map(String::as_str)))
                {
                    return Err(self.defect("is not sorted by entity"));
                }
                self.finish(steps);
                self.entity = Some(entity.into_iter().map(str::to_owned).collect());
            }
            let end = columns.end_of_run(start);
            self.hold(&batch.slice(start, end - start), steps);
            start = end;
        }
        Ok(())
    }

    /// Places what is held: the entity has ended.
    pub(in crate::archive) fn finish(&mut self, steps: &mut Vec<Step>) {
        if self.held.is_empty() {
            return;
        }
        if self.group_rows > 0 && self.group_rows + self.held_rows > ROW_GROUP_ROWS {
            steps.push(Step::Close { entity_ends: true });
            self.group_rows = 0;
        }
        steps.extend(self.held.drain(..).map(Step::Write));
        self.group_rows += std::mem::take(&mut self.held_rows);
    }

    fn hold(&mut self, rows: &RecordBatch, steps: &mut Vec<Step>) {
        let mut start = 0;
        while start < rows.num_rows() {
            let length = (rows.num_rows() - start).min(ROW_GROUP_ROWS - self.held_rows);
            self.held.push(rows.slice(start, length));
            self.held_rows += length;
            start += length;
            if self.held_rows == ROW_GROUP_ROWS {
                // A row group of this entity alone; what follows starts another one.
                self.finish(steps);
                steps.push(Step::Close { entity_ends: false });
                self.group_rows = 0;
            }
        }
    }

    fn defect(&self, what: &str) -> Error {
        Error::Internal(format!("a batch of {} {what}", self.kind.name()))
    }
}
