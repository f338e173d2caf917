//! Quantiles of lists, exactly.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array};
use arrow::datatypes::{DataType, Float64Type};
use datafusion::error::{DataFusionError, Result};
use datafusion::functions_aggregate::array_agg::array_agg_udaf;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

use super::stat::Quantile;

/// All values of a group, as a list. (`DataFusion`'s own `percentile_cont` cuts the place between two values to six digits.)
pub(super) fn values(values: Expr) -> Expr {
    array_agg_udaf().call(vec![values])
}

/// The value of a list of doubles below which a part of them is, as `percentile_cont` of PostgreSQL has it (manual, section 9.21); nulls don't
/// count, and NaN is the largest.
pub(super) fn quantile(of: Quantile, list: Expr) -> Expr {
    let signature = Signature::any(1, Volatility::Immutable);
    ScalarUDF::from(OfList { of, signature }).call(vec![list])
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct OfList {
    of: Quantile,
    signature: Signature,
}

impl ScalarUDFImpl for OfList {
    fn name(&self) -> &str {
        "quantile"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Float64)
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let wrong = || DataFusionError::Internal("quantile is of a list of doubles".to_owned());
        let [lists]: [ArrayRef; 1] =
            ColumnarValue::values_to_arrays(&arguments.args)?.try_into().map_err(|_| wrong())?;
        let lists = lists.as_list_opt::<i32>().ok_or_else(wrong)?;
        let of = |row: usize| {
            if lists.is_null(row) {
                return Ok(None);
            }
            let values = lists.value(row);
            let values = values.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?;
            Ok(of_values(self.of.share(), values.iter().flatten().collect()))
        };
        let found = (0..lists.len()).map(of).collect::<Result<Float64Array>>()?;
        Ok(ColumnarValue::Array(Arc::new(found)))
    }
}

fn of_values(share: f64, mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "as many values as fit into memory")]
    let place = share * values.len().checked_sub(1)? as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place of the list")]
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    let (low_value, high_value) = (*values.get(low)?, *values.get(high)?);
    // Between equal ones, which may be infinite, there is nothing.
    if low == high || low_value == high_value {
        return Some(low_value);
    }
    Some(low_value + (high_value - low_value) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_between_two_values_in_proportion() {
        for (share, values, wanted) in [
            (0.5, &[3.0, 1.0, 2.0][..], Some(2.0)),
            (0.95, &[0.0, 1.0, 2.0], Some(1.9)),
            (0.0, &[5.0, 4.0], Some(4.0)),
            (1.0, &[5.0, 4.0], Some(5.0)),
            (0.25, &[1.0, 2.0], Some(1.25)),
            (0.5, &[f64::INFINITY, f64::INFINITY, 0.0], Some(f64::INFINITY)),
            (0.5, &[], None),
        ] {
            assert_eq!(of_values(share, values.to_vec()), wanted, "{share} {values:?}");
        }
        assert!(of_values(1.0, vec![f64::NAN, 1.0]).unwrap().is_nan());
    }
}
