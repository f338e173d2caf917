//! The columns of a table by which its files are told apart: the times, and the entities' names.

use arrow::array::{
    Array, ArrayRef, AsArray, DictionaryArray, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Int32Type, UInt32Type};

use crate::tables::{ColumnType, Kind};
use crate::{Error, Result};

/// The times of a batch's rows.
pub(in crate::archive) fn times(kind: Kind, rows: &RecordBatch) -> Result<&TimestampMicrosecondArray> {
    let column = kind.time_column();
    debug_assert!(kind.columns().first().is_some_and(|spec| spec.column_type == ColumnType::Timestamp));
    rows.column_by_name(column)
        .and_then(|times| times.as_any().downcast_ref())
        .filter(|times: &&TimestampMicrosecondArray| times.null_count() == 0)
        .ok_or_else(|| Error::Internal(format!("a batch of {} lacks times in {column}", kind.name())))
}

/// Strings, dictionary-encoded or not.
#[derive(Debug)]
pub(in crate::archive) enum Strings<'a> {
    Plain(&'a StringArray),
    Signed(&'a DictionaryArray<Int32Type>, &'a StringArray),
    Unsigned(&'a DictionaryArray<UInt32Type>, &'a StringArray),
}

impl<'a> Strings<'a> {
    pub(in crate::archive) fn of(column: &'a ArrayRef) -> Option<Self> {
        match column.data_type() {
            DataType::Utf8 => column.as_string_opt().map(Self::Plain),
            DataType::Dictionary(key, _) if **key == DataType::Int32 => {
                let strings = column.as_dictionary_opt::<Int32Type>()?;
                Some(Self::Signed(strings, strings.values().as_string_opt()?))
            }
            DataType::Dictionary(key, _) if **key == DataType::UInt32 => {
                let strings = column.as_dictionary_opt::<UInt32Type>()?;
                Some(Self::Unsigned(strings, strings.values().as_string_opt()?))
            }
            _ => None,
        }
    }

    pub(in crate::archive) fn get(&self, row: usize) -> Option<&'a str> {
        let (values, index) = match self {
            Self::Plain(values) => (*values, row),
            Self::Signed(strings, values) => (*values, strings.key(row)?),
            Self::Unsigned(strings, values) => (*values, strings.key(row)?),
        };
        (index < values.len() && values.is_valid(index)).then(|| values.value(index))
    }
}

/// The entity columns of a batch.
#[derive(Debug)]
pub(in crate::archive) struct EntityColumns<'a> {
    columns: Vec<Strings<'a>>,
    row_count: usize,
}

impl<'a> EntityColumns<'a> {
    /// The entity columns; `None` if the kind has none.
    pub(in crate::archive) fn of(kind: Kind, rows: &'a RecordBatch) -> Result<Option<Self>> {
        if kind.entity_columns().is_empty() {
            return Ok(None);
        }
        let strings = |name: &String| {
            rows.column_by_name(name)
                .and_then(Strings::of)
                .ok_or_else(|| Error::Internal(format!("a batch of {} lacks strings in {name}", kind.name())))
        };
        let columns = kind.entity_columns().iter().map(strings).collect::<Result<_>>()?;
        Ok(Some(Self { columns, row_count: rows.num_rows() }))
    }

    /// The names of a row's entity; `None` past the last row, or if one of them is null.
    pub(in crate::archive) fn get(&self, row: usize) -> Option<Vec<&'a str>> {
        if row >= self.row_count {
            return None;
        }
        self.columns.iter().map(|column| column.get(row)).collect()
    }

    /// First row after `start` that belongs to another entity. Rows of an entity are adjacent, so this
    /// searches in steps that double, then halves: a batch costs per entity, not per row.
    pub(in crate::archive) fn end_of_run(&self, start: usize) -> usize {
        let is_same = |row: usize| self.columns.iter().all(|column| column.get(row) == column.get(start));
        let mut step = 1;
        let mut low = start;
        while low + step < self.row_count && is_same(low + step) {
            low += step;
            step *= 2;
        }
        let mut high = (low + step).min(self.row_count);
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if is_same(middle) { low = middle } else { high = middle }
        }
        high
    }
}
