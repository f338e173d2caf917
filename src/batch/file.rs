use std::sync::Arc;

use arrow::array::{
    ArrayRef, DictionaryArray, PrimitiveArray, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use arrow::error::ArrowError;

use super::Batches;
use super::columns::{Column, EntityBatch, TextOrder};
use super::interner::Interner;
use super::quarantine::QuarantineBatch;
use crate::error::{Error, Result};
use crate::tables::{Kind, Window};

/// Rows that one record batch holds at most: enough to keep the encoder's inner loops long, few enough
/// that the sorted copy stays small beside the batches themselves.
const RECORD_BATCH_ROWS_MAX: usize = 32 * 1024;

/// The rows of one future file: one kind, one window.
#[derive(Debug)]
pub struct FileRows<'a> {
    kind: Kind,
    window: Window,
    row_count: u64,
    source: Source<'a>,
}

#[derive(Debug)]
enum Source<'a> {
    /// Batches of the window in entity order, with the names of their entities, column by column, at the same positions.
    Table {
        entities: Vec<Arc<StringArray>>,
        texts: Arc<TextOrder>,
        binaries: &'a Interner,
        batches: Vec<&'a EntityBatch>,
    },
    Quarantine(&'a QuarantineBatch),
}

impl<'a> FileRows<'a> {
    pub(super) fn of_table(
        kind: Kind,
        window: Window,
        all: &'a Batches,
        texts: Arc<TextOrder>,
        batches: Vec<&'a EntityBatch>,
    ) -> Self {
        let names = |place: usize| {
            let key = |batch: &&EntityBatch| all.entities.get(batch.entity().0).split('\0').nth(place);
            let names = batches.iter().map(|batch| key(batch).unwrap_or_default());
            Arc::new(StringArray::from_iter_values(names))
        };
        let entities = (0..kind.entity_columns().len()).map(names).collect();
        let row_count = batches.iter().map(|batch| batch.row_count() as u64).sum();
        let source = Source::Table { entities, texts, binaries: &all.binaries, batches };
        Self { kind, window, row_count, source }
    }

    pub(super) fn quarantine(window: Window, batch: &'a QuarantineBatch) -> Self {
        Self {
            kind: Kind::quarantine(),
            window,
            row_count: batch.row_count_in(window),
            source: Source::Quarantine(batch),
        }
    }

    /// The kind of the rows.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The window that holds every row's time.
    #[must_use]
    pub const fn window(&self) -> Window {
        self.window
    }

    /// Number of rows, never 0.
    #[must_use]
    pub const fn row_count(&self) -> u64 {
        self.row_count
    }

    /// The rows, sorted by the kind's sort columns, in record batches of the kind's schema; but texts
    /// that repeat are dictionaries (32-bit keys) of strings.
    #[must_use]
    pub fn record_batches(&self) -> RecordBatches<'_> {
        RecordBatches { file: self, position: 0, order: None }
    }
}

/// Iterator over the record batches of a [`FileRows`].
#[derive(Debug)]
pub struct RecordBatches<'a> {
    file: &'a FileRows<'a>,
    /// The entity batch to go on with.
    position: usize,
    /// What is left of it: its rows in order, and how many have been given out.
    order: Option<(Vec<u32>, usize)>,
}

impl Iterator for RecordBatches<'_> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.build()?;
        Some(batch.map_err(|error| Error::Encode {
            context: format!("building the columns of {}", self.file.kind.name()),
            source: Box::new(error),
        }))
    }
}

impl RecordBatches<'_> {
    fn build(&mut self) -> Option<Result<RecordBatch, ArrowError>> {
        match &self.file.source {
            Source::Quarantine(batch) => {
                let first = self.position == 0;
                self.position = 1;
                first.then(|| record_batch(Kind::quarantine(), batch.columns(self.file.window)))
            }
            Source::Table { entities, texts, binaries, batches } => {
                let kind = self.file.kind;
                let mut columns = Columns::new(kind);
                while let (Some(batch), Some(room)) =
                    (batches.get(self.position), RECORD_BATCH_ROWS_MAX.checked_sub(columns.row_count()))
                {
                    if room == 0 {
                        break;
                    }
                    let (order, done) = self.order.get_or_insert_with(|| (batch.order(kind, texts), 0));
                    let end = order.len().min(*done + room);
                    let rows = order.get(*done..end).unwrap_or_default();
                    columns.append(self.position, batch, rows, texts);
                    *done = end;
                    if end == order.len() {
                        self.order = None;
                        self.position += 1;
                    }
                }
                (columns.row_count() > 0).then(|| columns.finish(kind, entities, texts, binaries))
            }
        }
    }
}

/// The sorted columns of one record batch.
#[derive(Debug)]
struct Columns {
    entity: Vec<i32>,
    times: Vec<i64>,
    data: Vec<Column>,
}

impl Columns {
    fn new(kind: Kind) -> Self {
        let data = kind.data_columns().iter().map(|column| Column::new(column.column_type));
        Self { entity: Vec::new(), times: Vec::new(), data: data.collect() }
    }

    const fn row_count(&self) -> usize {
        self.times.len()
    }

    fn append(&mut self, entity: usize, batch: &EntityBatch, rows: &[u32], texts: &TextOrder) {
        let entity = i32::try_from(entity).unwrap_or(i32::MAX);
        self.entity.resize(self.entity.len() + rows.len(), entity);
        self.times.extend(rows.iter().filter_map(|row| batch.times.get(*row as usize)));
        for (target, source) in self.data.iter_mut().zip(&batch.columns) {
            target.gather(source, rows, texts);
        }
    }

    fn finish(
        self,
        kind: Kind,
        entities: &[Arc<StringArray>],
        texts: &TextOrder,
        binaries: &Interner,
    ) -> Result<RecordBatch, ArrowError> {
        let entity = PrimitiveArray::<Int32Type>::from(self.entity);
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(TimestampMicrosecondArray::from(self.times).with_timezone("UTC"))];
        for names in entities {
            columns.push(Arc::new(DictionaryArray::try_new(entity.clone(), Arc::clone(names) as ArrayRef)?));
        }
        for (column, spec) in self.data.into_iter().zip(kind.data_columns()) {
            columns.push(column.finish(spec.column_type, texts, binaries)?);
        }
        record_batch(kind, columns)
    }
}

/// A record batch of the kind's columns, as they are typed.
fn record_batch(kind: Kind, columns: Vec<ArrayRef>) -> Result<RecordBatch, ArrowError> {
    let schema = kind.schema();
    let fields = schema.fields().iter().zip(&columns).map(|(field, column)| {
        let data_type: DataType = column.data_type().clone();
        Field::new(field.name(), data_type, field.is_nullable())
    });
    RecordBatch::try_new(Arc::new(Schema::new(fields.collect::<Vec<_>>())), columns)
}
