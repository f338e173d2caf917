use std::sync::Arc;

use arrow::array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, NullBufferBuilder, PrimitiveArray, RecordBatch,
    StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use arrow::error::ArrowError;

use super::columns::{EntityBatch, SeriesOrder};
use super::interner::Interner;
use super::quarantine::QuarantineBatch;
use crate::error::{Error, Result};
use crate::tables::{Entity, Kind, Window};

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
    /// Batches of the window in entity order, with their entities' texts at the same positions.
    Drift {
        entities: [Arc<StringArray>; 3],
        series: Arc<SeriesOrder>,
        batches: Vec<&'a EntityBatch>,
    },
    Quarantine(&'a QuarantineBatch),
}

impl<'a> FileRows<'a> {
    pub(super) fn drift(
        kind: Kind,
        window: Window,
        entities: &Interner,
        series: Arc<SeriesOrder>,
        batches: Vec<&'a EntityBatch>,
    ) -> Self {
        let parts = |part: usize| {
            let texts = batches.iter().map(|batch| entity_part(entities.get(batch.entity().0), part));
            Arc::new(StringArray::from_iter_values(texts))
        };
        let entities = [parts(0), parts(1), parts(2)];
        let row_count = batches.iter().map(|batch| batch.row_count() as u64).sum();
        Self { kind, window, row_count, source: Source::Drift { entities, series, batches } }
    }

    pub(super) fn quarantine(window: Window, batch: &'a QuarantineBatch) -> Self {
        Self {
            kind: Kind::Quarantine,
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
                first.then(|| record_batch(Kind::Quarantine, batch.columns(self.file.window)))
            }
            Source::Drift { entities, series, batches } => {
                let mut columns = Columns::default();
                while let (Some(batch), Some(room)) =
                    (batches.get(self.position), RECORD_BATCH_ROWS_MAX.checked_sub(columns.row_count()))
                {
                    if room == 0 {
                        break;
                    }
                    let (order, done) = self.order.get_or_insert_with(|| (batch.order(series), 0));
                    let end = order.len().min(*done + room);
                    let rows = order.get(*done..end).unwrap_or_default();
                    columns.append(self.position, batch, rows, series);
                    *done = end;
                    if end == order.len() {
                        self.order = None;
                        self.position += 1;
                    }
                }
                (columns.row_count() > 0).then(|| columns.finish(self.file.kind, entities, series))
            }
        }
    }
}

/// The sorted columns of one record batch.
#[derive(Debug, Default)]
struct Columns {
    entity: Vec<i32>,
    created_at: Vec<i64>,
    series: Vec<i32>,
    series_validity: Validity,
    bin_id: Vec<i32>,
    bin_count: Vec<i32>,
    value: Vec<f64>,
    value_validity: Validity,
}

/// A null buffer that costs nothing while there are no nulls.
#[derive(Debug)]
struct Validity(NullBufferBuilder);

impl Default for Validity {
    fn default() -> Self {
        Self(NullBufferBuilder::new(0))
    }
}

fn gather<T: Copy>(target: &mut Vec<T>, source: &[T], rows: &[u32]) {
    target.extend(rows.iter().filter_map(|row| source.get(*row as usize)));
}

impl Columns {
    const fn row_count(&self) -> usize {
        self.created_at.len()
    }

    fn append(&mut self, entity: usize, batch: &EntityBatch, rows: &[u32], series: &SeriesOrder) {
        let entity = i32::try_from(entity).unwrap_or(i32::MAX);
        self.entity.resize(self.entity.len() + rows.len(), entity);
        gather(&mut self.created_at, &batch.created_at, rows);
        gather(&mut self.bin_id, &batch.bin_id, rows);
        gather(&mut self.bin_count, &batch.bin_count, rows);
        gather(&mut self.value, &batch.value, rows);
        for row in rows {
            let rank = batch.series.get(*row as usize).and_then(|id| series.rank(*id));
            self.series.push(rank.map_or(0, |rank| i32::try_from(rank).unwrap_or(i32::MAX)));
            self.series_validity.0.append(rank.is_some());
        }
        if batch.value_validity.as_slice().is_some() {
            for row in rows {
                self.value_validity.0.append(batch.value_validity.is_valid(*row as usize));
            }
        } else if !batch.value.is_empty() {
            self.value_validity.0.append_n_non_nulls(rows.len());
        }
    }

    fn finish(
        self,
        kind: Kind,
        entities: &[Arc<StringArray>; 3],
        series: &SeriesOrder,
    ) -> Result<RecordBatch, ArrowError> {
        let entity = PrimitiveArray::<Int32Type>::from(self.entity);
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(TimestampMicrosecondArray::from(self.created_at).with_timezone("UTC"))];
        for texts in entities {
            columns.push(Arc::new(DictionaryArray::try_new(entity.clone(), Arc::clone(texts) as ArrayRef)?));
        }
        let Validity(mut validity) = self.series_validity;
        let keys = PrimitiveArray::<Int32Type>::new(self.series.into(), validity.finish());
        columns.push(Arc::new(DictionaryArray::try_new(keys, Arc::clone(&series.texts) as ArrayRef)?));
        match kind {
            Kind::Psi => {
                columns.push(Arc::new(Int32Array::from(self.bin_id)));
                columns.push(Arc::new(Int32Array::from(self.bin_count)));
            }
            Kind::Custom | Kind::Spc | Kind::Quarantine => {
                let Validity(mut validity) = self.value_validity;
                columns.push(Arc::new(Float64Array::new(self.value.into(), validity.finish())));
            }
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

/// One of the three texts that [`Batches::entity`](super::Batches::entity) joined.
fn entity_part(key: &str, part: usize) -> &str {
    key.split('\0').nth(part).unwrap_or_default()
}

/// The entity whose texts were joined.
pub(super) fn entity(key: &str) -> Entity {
    let part = |part| entity_part(key, part).to_owned();
    Entity { space: part(0), name: part(1), version: part(2) }
}
