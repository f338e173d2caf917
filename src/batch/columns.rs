use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray, Float64Array,
    Int32Array, Int64Array, NullBufferBuilder, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::Int32Type;
use arrow::error::ArrowError;

use super::interner::Interner;
use super::{Cell, EntityId, TextId};
use crate::tables::{ColumnType, Kind, Window};

/// The rows of one kind, entity and window, in order of arrival.
#[derive(Debug)]
pub(super) struct EntityBatch {
    entity: EntityId,
    window: Window,
    pub(super) times: Vec<i64>,
    /// The kind's data columns.
    pub(super) columns: Vec<Column>,
}

/// The values of a column. One that is null has any value, and is not valid.
#[derive(Debug)]
pub(super) struct Column {
    values: Values,
    validity: Validity,
}

#[derive(Debug)]
enum Values {
    Int(Vec<i32>),
    Long(Vec<i64>),
    Double(Vec<f64>),
    Boolean(Vec<bool>),
    Decimal(Vec<i128>),
    /// Numbers of interned texts, or their ranks.
    Text(Vec<u32>),
    /// Numbers of interned bytes.
    Binary(Vec<u32>),
}

/// A null buffer that costs nothing while there are no nulls.
#[derive(Debug)]
struct Validity(NullBufferBuilder);

impl EntityBatch {
    pub(super) fn new(kind: Kind, entity: EntityId, window: Window) -> Self {
        let columns = kind.data_columns().iter().map(|column| Column::new(column.column_type));
        Self { entity, window, times: Vec::new(), columns: columns.collect() }
    }

    pub(super) const fn entity(&self) -> EntityId {
        self.entity
    }

    pub(super) const fn window(&self) -> Window {
        self.window
    }

    pub(super) const fn row_count(&self) -> usize {
        self.times.len()
    }

    /// Whether a row of this entity and time belongs here.
    #[inline]
    pub(super) fn holds(&self, entity: EntityId, time: i64) -> bool {
        self.entity == entity && self.window.contains(time)
    }

    pub(super) fn time_range(&self) -> Option<(i64, i64)> {
        Some((self.times.iter().min().copied()?, self.times.iter().max().copied()?))
    }

    /// Appends a row: one cell for each data column, of its type.
    #[inline]
    pub(super) fn push(&mut self, time: i64, cells: &[Cell]) {
        self.times.push(time);
        for (column, cell) in self.columns.iter_mut().zip(cells) {
            column.push(*cell);
        }
    }

    /// Row numbers in sort order: by time, and the kind's sort columns.
    pub(super) fn order(&self, kind: Kind, texts: &TextOrder) -> Vec<u32> {
        let sort = kind.data_sort();
        let column = |place: usize| sort.get(place).and_then(|place| self.columns.get(*place));
        let (first, second) = (column(0), column(1));
        let key = |column: Option<&Column>, row| column.map_or(0, |column| column.sort_key(row, texts));
        let mut keys: Vec<(i64, u64, u64, u32)> = Vec::with_capacity(self.row_count());
        for (row, time) in (0..).zip(&self.times) {
            keys.push((*time, key(first, row), key(second, row), row));
        }
        // Rows of one writer mostly arrive in order of time; then only those of the same time are left to sort.
        if keys.is_sorted_by_key(|key| key.0) {
            for same_time in keys.chunk_by_mut(|one, next| one.0 == next.0) {
                same_time.sort_unstable();
            }
        } else {
            keys.sort_unstable();
        }
        keys.into_iter().map(|key| key.3).collect()
    }
}

/// Bytes of memory that a row of a kind takes: its values; twice, because vectors double as they grow.
pub(super) fn row_bytes(kind: Kind) -> usize {
    let bytes = |column_type| match column_type {
        ColumnType::Boolean => 1,
        ColumnType::Int | ColumnType::Date | ColumnType::String | ColumnType::Binary => 4,
        ColumnType::Timestamp | ColumnType::Long | ColumnType::Double => 8,
        ColumnType::Decimal { .. } => 16,
    };
    let data: usize = kind.data_columns().iter().map(|column| bytes(column.column_type)).sum();
    2 * (size_of::<i64>() + data)
}

impl Column {
    pub(super) fn new(column_type: ColumnType) -> Self {
        let values = match column_type {
            ColumnType::Int | ColumnType::Date => Values::Int(Vec::new()),
            ColumnType::Timestamp | ColumnType::Long => Values::Long(Vec::new()),
            ColumnType::Double => Values::Double(Vec::new()),
            ColumnType::Boolean => Values::Boolean(Vec::new()),
            ColumnType::Decimal { .. } => Values::Decimal(Vec::new()),
            ColumnType::String => Values::Text(Vec::new()),
            ColumnType::Binary => Values::Binary(Vec::new()),
        };
        Self { values, validity: Validity(NullBufferBuilder::new(0)) }
    }

    #[inline]
    fn push(&mut self, cell: Cell) {
        let is_valid = match (&mut self.values, cell) {
            (Values::Int(values), Cell::Int(value)) => push(values, value),
            (Values::Long(values), Cell::Long(value)) => push(values, value),
            (Values::Double(values), Cell::Double(value)) => push(values, value),
            (Values::Boolean(values), Cell::Boolean(value)) => push(values, value),
            (Values::Decimal(values), Cell::Decimal(value)) => push(values, i128::from_ne_bytes(value)),
            (Values::Text(values), Cell::Text(TextId(value)))
            | (Values::Binary(values), Cell::Binary(TextId(value))) => push(values, value),
            (values, _) => {
                values.push_default();
                false
            }
        };
        self.validity.0.append(is_valid);
    }

    /// A number that sorts as the value does: nulls first, as Arrow's row format sorts. The two greatest 64-bit integers are one.
    #[inline]
    fn sort_key(&self, row: u32, texts: &TextOrder) -> u64 {
        let row = row as usize;
        let valid = self.validity.0.as_slice().is_none() || self.validity.0.is_valid(row);
        let key = match &self.values {
            Values::Text(ids) => ids.get(row).map(|id| u64::from(texts.rank(*id))),
            Values::Int(values) => {
                values.get(row).map(|value| (i64::from(*value) - i64::from(i32::MIN)).cast_unsigned())
            }
            Values::Long(values) => values.get(row).map(|value| value.cast_unsigned() ^ (1 << 63)),
            Values::Boolean(values) => values.get(row).map(|value| u64::from(*value)),
            Values::Double(_) | Values::Decimal(_) | Values::Binary(_) => None,
        };
        key.filter(|_| valid).map_or(0, |key| key.saturating_add(1))
    }

    /// Appends these rows of another column of the type; of texts their ranks.
    pub(super) fn gather(&mut self, source: &Self, rows: &[u32], texts: &TextOrder) {
        match (&mut self.values, &source.values) {
            (Values::Int(target), Values::Int(values)) => gather(target, values, rows),
            (Values::Long(target), Values::Long(values)) => gather(target, values, rows),
            (Values::Double(target), Values::Double(values)) => gather(target, values, rows),
            (Values::Boolean(target), Values::Boolean(values)) => gather(target, values, rows),
            (Values::Decimal(target), Values::Decimal(values)) => gather(target, values, rows),
            (Values::Binary(target), Values::Binary(values)) => gather(target, values, rows),
            (Values::Text(target), Values::Text(values)) => {
                let ids = rows.iter().filter_map(|row| values.get(*row as usize));
                target.extend(ids.map(|id| texts.rank(*id)));
            }
            _ => {}
        }
        if source.validity.0.as_slice().is_some() {
            for row in rows {
                self.validity.0.append(source.validity.0.is_valid(*row as usize));
            }
        } else {
            self.validity.0.append_n_non_nulls(rows.len());
        }
    }

    /// The gathered values as an array of the column's type, texts as a dictionary.
    pub(super) fn finish(
        self,
        column_type: ColumnType,
        texts: &TextOrder,
        binaries: &Interner,
    ) -> Result<ArrayRef, ArrowError> {
        let Validity(mut validity) = self.validity;
        let nulls = validity.finish();
        Ok(match self.values {
            Values::Int(values) if column_type == ColumnType::Date => {
                Arc::new(Date32Array::try_new(values.into(), nulls)?)
            }
            Values::Int(values) => Arc::new(Int32Array::try_new(values.into(), nulls)?),
            Values::Long(values) if column_type == ColumnType::Timestamp => {
                Arc::new(TimestampMicrosecondArray::try_new(values.into(), nulls)?.with_timezone("UTC"))
            }
            Values::Long(values) => Arc::new(Int64Array::try_new(values.into(), nulls)?),
            Values::Double(values) => Arc::new(Float64Array::try_new(values.into(), nulls)?),
            Values::Boolean(values) => Arc::new(BooleanArray::new(values.into(), nulls)),
            Values::Decimal(values) => {
                let array = Decimal128Array::try_new(values.into(), nulls)?;
                match column_type {
                    ColumnType::Decimal { precision, scale } => {
                        Arc::new(array.with_precision_and_scale(precision, scale)?)
                    }
                    _ => Arc::new(array),
                }
            }
            Values::Text(ranks) => {
                let keys = ranks.into_iter().map(|rank| i32::try_from(rank).unwrap_or(i32::MAX));
                let keys = Int32Array::try_new(keys.collect(), nulls)?;
                let texts = Arc::clone(&texts.texts) as ArrayRef;
                Arc::new(DictionaryArray::<Int32Type>::try_new(keys, texts)?)
            }
            Values::Binary(ids) => {
                let is_valid = |row| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(row));
                let bytes = ids.iter().enumerate();
                let bytes = bytes.map(|(row, id)| is_valid(row).then(|| binaries.bytes(*id)));
                Arc::new(bytes.collect::<BinaryArray>())
            }
        })
    }
}

#[inline]
fn push<T>(values: &mut Vec<T>, value: T) -> bool {
    values.push(value);
    true
}

impl Values {
    fn push_default(&mut self) {
        match self {
            Self::Int(values) => values.push(0),
            Self::Long(values) => values.push(0),
            Self::Double(values) => values.push(0.0),
            Self::Boolean(values) => values.push(false),
            Self::Decimal(values) => values.push(0),
            Self::Text(values) | Self::Binary(values) => values.push(0),
        }
    }
}

fn gather<T: Copy>(target: &mut Vec<T>, source: &[T], rows: &[u32]) {
    target.extend(rows.iter().filter_map(|row| source.get(*row as usize)));
}

/// The interned texts in their order, so that sorting rows compares no text.
#[derive(Debug)]
pub(super) struct TextOrder {
    /// Rank of each text's number.
    ranks: Vec<u32>,
    /// Texts by rank.
    texts: Arc<StringArray>,
}

impl TextOrder {
    pub(super) fn new(texts: &Interner) -> Self {
        let count = u32::try_from(texts.len()).unwrap_or(u32::MAX);
        let mut ids: Vec<u32> = (0..count).collect();
        ids.sort_unstable_by_key(|id| texts.get(*id));
        let mut ranks = vec![0; ids.len()];
        for (rank, id) in (0_u32..).zip(&ids) {
            if let Some(place) = ranks.get_mut(*id as usize) {
                *place = rank;
            }
        }
        // A null has the first text, behind a null buffer.
        let first = ids.is_empty().then_some("");
        let texts = StringArray::from_iter_values(ids.iter().map(|id| texts.get(*id)).chain(first));
        Self { ranks, texts: Arc::new(texts) }
    }

    /// The position of a text in `texts`.
    #[inline]
    fn rank(&self, id: u32) -> u32 {
        self.ranks.get(id as usize).copied().unwrap_or_default()
    }
}
