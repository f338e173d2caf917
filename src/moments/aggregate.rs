//! [`Moments`] as functions of the query engine: of values, of moments that were taken before, and what comes of them.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, BooleanArray, Float64Array, Int64Array, StructArray,
};
use arrow::datatypes::{DataType, Field, Fields, Float64Type};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, ColumnarValue, EmitTo, Expr, GroupsAccumulator,
    ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

use super::{Moments, Summary};

/// The moments of a column of doubles, as bytes.
pub(crate) fn moments(values: Expr) -> Expr {
    let signature = Signature::exact(vec![DataType::Float64], Volatility::Immutable);
    AggregateUDF::from(Aggregate { signature }).call(vec![values])
}

/// What comes of moments, as a struct: `count`, `nulls`, `nans`, `sum`, `mean`, `stddev`, `min`, `max`.
pub(crate) fn summary(moments: Expr) -> Expr {
    let signature = Signature::exact(vec![DataType::Binary], Volatility::Immutable);
    ScalarUDF::from(Summarize { signature }).call(vec![moments])
}

fn broken() -> DataFusionError {
    DataFusionError::Execution("bytes that should be moments are none".to_owned())
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Aggregate {
    signature: Signature,
}

impl AggregateUDFImpl for Aggregate {
    fn name(&self) -> &str {
        "moments"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Binary)
    }

    fn accumulator(&self, _: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(One(Groups { groups: vec![Moments::default()], bytes: 0 })))
    }

    fn groups_accumulator_supported(&self, _: AccumulatorArgs<'_>) -> bool {
        true
    }

    fn create_groups_accumulator(&self, _: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Box::new(Groups::default()))
    }
}

/// The moments of each group. What it has so far, and what comes of it, are the same.
#[derive(Debug, Default)]
struct Groups {
    groups: Vec<Moments>,
    /// What they keep outside of themselves.
    bytes: usize,
}

impl Groups {
    fn change(&mut self, group: usize, change: impl FnOnce(&mut Moments)) -> Result<()> {
        let moments = self.groups.get_mut(group).ok_or_else(broken)?;
        let before = moments.size();
        change(moments);
        self.bytes = self.bytes.saturating_add(moments.size()).saturating_sub(before);
        Ok(())
    }
}

/// Hands each row's group and number to `add`, of those that a filter lets through.
fn each_row(
    groups: &[usize],
    filter: Option<&BooleanArray>,
    mut add: impl FnMut(usize, usize) -> Result<()>,
) -> Result<()> {
    for (row, group) in groups.iter().enumerate() {
        if filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row)) {
            add(*group, row)?;
        }
    }
    Ok(())
}

fn first(values: &[ArrayRef]) -> Result<&ArrayRef> {
    values.first().ok_or_else(broken)
}

fn written(groups: impl IntoIterator<Item = Moments>) -> BinaryArray {
    let mut bytes = BinaryBuilder::new();
    for mut moments in groups {
        bytes.append_value(moments.write());
    }
    bytes.finish()
}

impl GroupsAccumulator for Groups {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        group_count: usize,
    ) -> Result<()> {
        self.groups.resize_with(group_count, Moments::default);
        let values = first(values)?.as_primitive_opt::<Float64Type>().ok_or_else(broken)?;
        each_row(groups, filter, |group, row| {
            self.change(group, |moments| moments.add(values.is_valid(row).then(|| values.value(row))))
        })
    }

    fn merge_batch(&mut self, values: &[ArrayRef], groups: &[usize], group_count: usize) -> Result<()> {
        self.groups.resize_with(group_count, Moments::default);
        let values = first(values)?.as_binary_opt::<i32>().ok_or_else(broken)?;
        each_row(groups, None, |group, row| {
            let other = Moments::read(values.value(row)).ok_or_else(broken)?;
            self.change(group, |moments| moments.merge(&other))
        })
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        let taken = emit.take_needed(&mut self.groups);
        self.bytes = self.bytes.saturating_sub(taken.iter().map(Moments::size).sum());
        Ok(Arc::new(written(taken)))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        Ok(vec![self.evaluate(emit)?])
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let mut rows = Self::default();
        let groups: Vec<usize> = (0..first(values)?.len()).collect();
        rows.update_batch(values, &groups, filter, groups.len())?;
        rows.state(EmitTo::All)
    }

    fn size(&self) -> usize {
        self.groups.capacity() * size_of::<Moments>() + self.bytes
    }
}

/// The moments of all rows.
#[derive(Debug)]
struct One(Groups);

impl Accumulator for One {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let groups = vec![0; first(values)?.len()];
        GroupsAccumulator::update_batch(&mut self.0, values, &groups, None, 1)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let moments = self.0.groups.first_mut().ok_or_else(broken)?;
        Ok(ScalarValue::Binary(Some(moments.write())))
    }

    fn size(&self) -> usize {
        GroupsAccumulator::size(&self.0)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        Ok(vec![self.evaluate()?])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let groups = vec![0; first(states)?.len()];
        GroupsAccumulator::merge_batch(&mut self.0, states, &groups, 1)
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Summarize {
    signature: Signature,
}

/// A field of a summary.
type Part<T> = (&'static str, fn(&Summary) -> T);

const COUNTS: [Part<u64>; 3] = [
    ("count", |summary| summary.count),
    ("nulls", |summary| summary.nulls),
    ("nans", |summary| summary.nans),
];

const NUMBERS: [Part<f64>; 5] = [
    ("sum", |summary| summary.sum),
    ("mean", |summary| summary.mean),
    ("stddev", |summary| summary.stddev),
    ("min", |summary| summary.min),
    ("max", |summary| summary.max),
];

/// The names of a summary's fields.
pub(crate) const PARTS: [&str; 8] = ["count", "nulls", "nans", "sum", "mean", "stddev", "min", "max"];

fn fields() -> Fields {
    let counts = COUNTS.iter().map(|(name, _)| Field::new(*name, DataType::Int64, false));
    let numbers = NUMBERS.iter().map(|(name, _)| Field::new(*name, DataType::Float64, false));
    counts.chain(numbers).collect()
}

impl ScalarUDFImpl for Summarize {
    fn name(&self) -> &str {
        "summary"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Struct(fields()))
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let moments = first(&arrays)?.as_binary_opt::<i32>().ok_or_else(broken)?;
        let read = |bytes: Option<&[u8]>| match bytes {
            Some(bytes) => Ok(Moments::read(bytes).ok_or_else(broken)?.summary()),
            None => Ok(Moments::default().summary()),
        };
        let summaries = moments.iter().map(read).collect::<Result<Vec<Summary>>>()?;
        let counts = COUNTS.map(|(_, of)| {
            Arc::new(summaries.iter().map(|summary| of(summary).cast_signed()).collect::<Int64Array>())
                as ArrayRef
        });
        let numbers =
            NUMBERS.map(|(_, of)| Arc::new(summaries.iter().map(of).collect::<Float64Array>()) as ArrayRef);
        let columns = counts.into_iter().chain(numbers).collect();
        Ok(ColumnarValue::Array(Arc::new(StructArray::try_new(fields(), columns, None)?)))
    }
}
