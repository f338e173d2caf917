use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, TimeUnit};
use datafusion::common::cast::as_timestamp_microsecond_array;
use datafusion::error::Result as QueryResult;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

use crate::tables::{CALENDAR, MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE};
use crate::{Error, Result};

/// The length of a bin. Bins are aligned to 1970-01-01T00:00:00Z, whatever their length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BinWidth(i64);

const SECOND: i64 = 1_000_000;

/// Lengths that a clock shows, in microseconds, each up to 2.5 times the one before it.
const ROUND: [i64; 31] = [
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1_000,
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    SECOND,
    2 * SECOND,
    5 * SECOND,
    10 * SECOND,
    15 * SECOND,
    30 * SECOND,
    MICROS_PER_MINUTE,
    2 * MICROS_PER_MINUTE,
    5 * MICROS_PER_MINUTE,
    10 * MICROS_PER_MINUTE,
    15 * MICROS_PER_MINUTE,
    30 * MICROS_PER_MINUTE,
    MICROS_PER_HOUR,
];

/// The same for longer ones.
const ROUND_HOURS: [i64; 4] = [2, 3, 6, 12];

impl BinWidth {
    /// Bins of this length; fractions of a microsecond are dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if it is shorter than a microsecond or longer than the archive's calendar.
    pub fn new(length: Duration) -> Result<Self> {
        let micros = i64::try_from(length.as_micros()).unwrap_or(i64::MAX);
        Self::of_micros(micros, || humantime::format_duration(length).to_string())
    }

    /// Bins of so many minutes, as Scouter's interface has them.
    ///
    /// # Errors
    ///
    /// As [`BinWidth::new`]; also if the number is not finite.
    pub fn from_minutes(minutes: f64) -> Result<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "a cast saturates, and NaN becomes 0")]
        let micros = (minutes * MICROS_PER_MINUTE as f64).round() as i64;
        Self::of_micros(micros, || format!("{minutes} minutes"))
    }

    /// The shortest round length (1, 2, 5 ... of a second, 15 or 30 seconds or minutes, 2, 3, 6 or 12 hours, whole days)
    /// by which the times from `start` up to `end`, in microseconds since the epoch, are in at most `points_max` bins.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if `points_max` is 0, or 1 where the range reaches over a bin's edge at any length.
    pub fn at_most(points_max: u32, start: i64, end: i64) -> Result<Self> {
        let fits = |width: &i64| bin_count(start, end, *width) <= i64::from(points_max);
        let hours = ROUND_HOURS.map(|hours| hours * MICROS_PER_HOUR);
        if let Some(width) = ROUND.into_iter().chain(hours).find(fits) {
            return Ok(Self(width));
        }
        let days = end.saturating_sub(start) / MICROS_PER_DAY / i64::from(points_max.max(1));
        // The first and the last bin may stand out.
        let mut widths = (days.max(1)..=days.saturating_mul(2) + 2).map(|days| days * MICROS_PER_DAY);
        widths.find(fits).map(Self).ok_or_else(|| Error::Query {
            detail: format!("the range does not fit into {points_max} bins: ask for more points"),
        })
    }

    fn of_micros(micros: i64, shown: impl Fn() -> String) -> Result<Self> {
        if (1..=CALENDAR.end - CALENDAR.start).contains(&micros) {
            return Ok(Self(micros));
        }
        let detail = format!("the bin is {}, but must be a microsecond to 9999 years", shown());
        Err(Error::Query { detail })
    }

    /// Length in microseconds.
    #[must_use]
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// Start of the bin that holds a time, microseconds since the epoch.
    #[must_use]
    pub const fn start_of(self, micros: i64) -> i64 {
        micros - micros.rem_euclid(self.0)
    }

    /// The start of the bin that holds the time in a column.
    pub(super) fn start_expr(self, time: Expr) -> Expr {
        let signature = Signature::exact(vec![time_type()], Volatility::Immutable);
        ScalarUDF::from(BinStart { width: self, signature }).call(vec![time])
    }
}

/// How many bins of this width have times in a range.
const fn bin_count(start: i64, end: i64, width: i64) -> i64 {
    if end <= start { 0 } else { (end - 1).div_euclid(width) - start.div_euclid(width) + 1 }
}

fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// DataFusion's own `date_bin` counts in nanoseconds, which end in 2262 and begin in 1677.
#[derive(Debug, PartialEq, Eq, Hash)]
struct BinStart {
    width: BinWidth,
    signature: Signature,
}

impl ScalarUDFImpl for BinStart {
    fn name(&self) -> &str {
        "bin_start"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> QueryResult<DataType> {
        Ok(time_type())
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> QueryResult<ColumnarValue> {
        let [times]: [ArrayRef; 1] = ColumnarValue::values_to_arrays(&arguments.args)?
            .try_into()
            .map_err(|_| datafusion::error::DataFusionError::Internal("bin_start takes a time".to_owned()))?;
        let starts: TimestampMicrosecondArray =
            as_timestamp_microsecond_array(&times)?.unary(|time| self.width.start_of(time));
        Ok(ColumnarValue::Array(Arc::new(starts.with_timezone("UTC"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_aligned_to_the_epoch_also_before_it() {
        let width = BinWidth::new(Duration::from_secs(7 * 60)).unwrap();
        for (time, start) in [(0, 0), (-1, -420_000_000), (419_999_999, 0), (420_000_000, 420_000_000)] {
            assert_eq!(width.start_of(time), start, "{time}");
        }
        let widest = BinWidth::of_micros(CALENDAR.end - CALENDAR.start, String::new).unwrap();
        assert!(chrono::DateTime::from_timestamp_micros(widest.start_of(CALENDAR.start)).is_some());
    }

    #[test]
    fn a_bin_has_a_positive_length() {
        for minutes in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
            assert!(BinWidth::from_minutes(minutes).is_err(), "{minutes}");
        }
        assert!(BinWidth::new(Duration::ZERO).is_err());
        assert!(BinWidth::new(Duration::MAX).is_err());
        assert_eq!(BinWidth::from_minutes(0.01).unwrap().micros(), 600_000);
        assert_eq!(BinWidth::from_minutes(86.4).unwrap().micros(), 5_184_000_000);
    }

    #[test]
    fn the_chosen_width_is_round_and_never_gives_too_many_bins() {
        for (start, length, points, width) in [
            (0, 30 * MICROS_PER_DAY, 500, 2 * MICROS_PER_HOUR),
            (1, 30 * MICROS_PER_DAY, 360, 3 * MICROS_PER_HOUR),
            (0, MICROS_PER_HOUR, 60, MICROS_PER_MINUTE),
            (0, 365 * MICROS_PER_DAY, 100, 4 * MICROS_PER_DAY),
            (0, 1000, 1000, 1),
            (0, 3, 2, 2),
        ] {
            assert_eq!(BinWidth::at_most(points, start, start + length).unwrap().micros(), width, "{points}");
        }
        for points in [1, 2, 3, 7, 100, 1000] {
            for (start, end) in
                [(0, 86_400_000_001), (-5, 5), (-MICROS_PER_DAY * 9000, 1), (CALENDAR.start, CALENDAR.end)]
            {
                let Ok(width) = BinWidth::at_most(points, start, end) else {
                    assert_eq!(points, 1, "{start} {end}");
                    continue;
                };
                let bins = bin_count(start, end, width.micros());
                assert!(bins <= i64::from(points), "{bins} {points}");
                assert!(
                    bins > i64::from(points) / 4 || width.micros() == 1 || bins == 0 || points < 4,
                    "{bins} {points} {width:?}"
                );
            }
        }
        assert!(BinWidth::at_most(0, 0, 1).is_err());
    }
}
