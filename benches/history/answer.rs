use std::collections::BTreeMap;

use arrow::array::{Array as _, AsArray as _, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use highwater::reader::FeatureBinProportions;

/// Shares by feature, start of the bin of time (microseconds; none for the whole range) and PSI bin.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Answer(BTreeMap<(String, Option<i64>, i64), f64>);

impl Answer {
    pub(crate) fn of(found: &[FeatureBinProportions]) -> Self {
        let mut answer = Self::default();
        for feature in found {
            let bins = feature.created_at.iter().map(|time| Some(time.timestamp_micros()));
            let parts = bins.zip(&feature.bin_proportions).chain([(None, &feature.overall_proportions)]);
            for (bin, shares) in parts {
                answer.0.extend(
                    shares.iter().map(|(id, share)| ((feature.feature.clone(), bin, i64::from(*id)), *share)),
                );
            }
        }
        answer
    }

    /// Of batches with the columns feature, bin, `bin_id` and share.
    pub(crate) fn of_batches(batches: &[RecordBatch]) -> Self {
        let mut answer = Self::default();
        for batch in batches {
            let column = |index: usize, data_type| cast(batch.column(index), &data_type).expect("a cast");
            let (features, bins) = (column(0, DataType::Utf8), column(1, DataType::Int64));
            let (ids, shares) = (column(2, DataType::Int64), column(3, DataType::Float64));
            let bins = bins.as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                let feature = features.as_string::<i32>().value(row).to_owned();
                let bin = (!bins.is_null(row)).then(|| bins.value(row));
                let key = (feature, bin, ids.as_primitive::<Int64Type>().value(row));
                let share = shares.as_primitive::<Float64Type>().value(row);
                assert!(answer.0.insert(key, share).is_none(), "a share twice");
            }
        }
        answer
    }

    pub(crate) fn of_shares(shares: impl IntoIterator<Item = (String, Option<i64>, i64, f64)>) -> Self {
        Self(shares.into_iter().map(|(feature, bin, id, share)| ((feature, bin, id), share)).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Panics unless both are the same but for rounding.
    pub(crate) fn assert_is(&self, other: &Self, whose: &str) {
        assert!(self.0.keys().eq(other.0.keys()), "{whose}: other bins ({} and {})", self.len(), other.len());
        for ((key, share), other) in self.0.iter().zip(other.0.values()) {
            assert!((share - other).abs() < 1e-12, "{whose}: {key:?} is {share} or {other}");
        }
    }
}
