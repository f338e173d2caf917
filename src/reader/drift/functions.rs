//! Measures of drift as functions in SQL, of two lists of counts or shares.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Float64Type};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{
    ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

use super::measures::weigh;
use super::{Measure, Smoothing};

/// `psi`, `js`, `hellinger`, `tvd` and `chi2`: each of the reference's list and the current one, whose places are the bins.
pub(in crate::reader) fn functions() -> impl Iterator<Item = ScalarUDF> {
    let measures = [Measure::Psi, Measure::Js, Measure::Hellinger, Measure::Tvd, Measure::Chi2];
    measures.into_iter().map(|measure| {
        let signature = Signature::any(2, Volatility::Immutable);
        ScalarUDF::from(OfLists { measure, signature })
    })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct OfLists {
    measure: Measure,
    signature: Signature,
}

impl ScalarUDFImpl for OfLists {
    fn name(&self) -> &str {
        self.measure.name()
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Float64)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [reference, current]: [ArrayRef; 2] = ColumnarValue::values_to_arrays(&arguments.args)?
            .try_into()
            .map_err(|_| DataFusionError::Internal(format!("{} takes two lists", self.name())))?;
        let lists = |array: &ArrayRef| {
            let numbers = DataType::List(Arc::new(Field::new_list_field(DataType::Float64, true)));
            let wrong = || DataFusionError::Execution(format!("{} is of two lists of numbers", self.name()));
            match array.data_type() {
                DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) | DataType::Null => {
                }
                _ => return Err(wrong()),
            }
            // What is no number is an error, and not a null.
            let options = CastOptions { safe: false, ..CastOptions::default() };
            cast_with_options(array, &numbers, &options).map_err(|_| wrong())
        };
        let (reference, current) = (lists(&reference)?, lists(&current)?);
        let list = |array: &ArrayRef, row: usize| -> Result<Option<Vec<f64>>> {
            let lists = array.as_list_opt::<i32>().filter(|lists| lists.is_valid(row));
            let Some(values) = lists.map(|lists| lists.value(row)) else { return Ok(None) };
            let values = values.as_primitive::<Float64Type>();
            // A null is a bin of nothing.
            Ok(Some(values.iter().map(Option::unwrap_or_default).collect()))
        };
        let score = |row: usize| -> Result<Option<f64>> {
            let (Some(reference), Some(current)) = (list(&reference, row)?, list(&current, row)?) else {
                return Ok(None);
            };
            if reference.len() != current.len() {
                let detail = format!(
                    "{} is of two lists of one length; these have {} and {} places",
                    self.name(),
                    reference.len(),
                    current.len()
                );
                return Err(DataFusionError::Execution(detail));
            }
            let smoothing = if self.measure == Measure::Psi { Smoothing::Scouter } else { Smoothing::Off };
            Ok(weigh(self.measure, smoothing, &reference, &current).filter(|score| !score.is_nan()))
        };
        let scores = (0..reference.len()).map(score).collect::<Result<Float64Array>>()?;
        Ok(ColumnarValue::Array(Arc::new(scores)))
    }
}
