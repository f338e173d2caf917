//! Bins of time: of one length, or days, weeks, months and years of a time zone's calendar.

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, TimeUnit};
use chrono::{DateTime, Datelike as _, LocalResult, NaiveDate, NaiveDateTime, Offset as _, TimeZone as _};
use chrono_tz::{TZ_VARIANTS, Tz};
use datafusion::common::cast::as_timestamp_microsecond_array;
use datafusion::error::Result as QueryResult;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};

use crate::tables::{CALENDAR, MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE};
use crate::{Error, Result};

/// How times are put into bins.
///
/// | bins of | begin |
/// | --- | --- |
/// | a length that is no whole number of days | at multiples of it since 1970-01-01T00:00:00 |
/// | days | at midnight; of several days so that the days since Monday, 1970-01-05, are a multiple: weeks begin on Mondays |
/// | months, years | on the first, of January for years; of several months so that those since January 1970 are a multiple |
///
/// All of it in UTC, or in the time of a zone ([`Bins::in_zone`]), as PostgreSQL's `date_trunc(..., zone)` has it (manual, section
/// 9.9.2). Bins of up to an hour have their length. Longer ones begin at local times, so that the one in which clocks are changed is an hour
/// longer or shorter. A local time that clocks skip is the one right after; of one that comes twice it is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bins {
    step: Step,
    zone: Tz,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Microseconds.
    Length(i64),
    Days(i64),
    Months(i64),
}

const SECOND: i64 = 1_000_000;

/// Monday, 1970-01-05, in days since 1970-01-01.
const MONDAY: i64 = 4;

const MONTHS_PER_YEAR: i64 = 12;

/// The mean length of a month of the calendar, which has 97 leap years in 400 years.
const MICROS_PER_MONTH: i64 = MICROS_PER_DAY * 146_097 / 4_800;

/// The most days, or months, of a bin.
const DAYS_MAX: i64 = (CALENDAR.end - CALENDAR.start) / MICROS_PER_DAY;
const MONTHS_MAX: i64 = DAYS_MAX / 31;

/// How the units of the calendar are written, and how many days or months each is.
const UNITS: [(&[&str], Step); 4] = [
    (&["d", "day", "days"], Step::Days(1)),
    (&["w", "week", "weeks"], Step::Days(7)),
    (&["mo", "M", "month", "months"], Step::Months(1)),
    (&["y", "year", "years"], Step::Months(MONTHS_PER_YEAR)),
];

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

impl Bins {
    /// Bins of this length, in UTC; fractions of a microsecond are dropped. Whole days are days of the calendar.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if it is shorter than a microsecond or longer than the archive's calendar.
    pub fn new(length: Duration) -> Result<Self> {
        let micros = i64::try_from(length.as_micros()).unwrap_or(i64::MAX);
        let bins = Self::of_micros(micros, || humantime::format_duration(length).to_string())?;
        Ok(match micros % MICROS_PER_DAY {
            0 => Self { step: Step::Days(micros / MICROS_PER_DAY), ..bins },
            _ => bins,
        })
    }

    /// Bins of so many minutes, as Scouter's interface has them: whatever their length, they are aligned to 1970-01-01T00:00:00Z.
    ///
    /// # Errors
    ///
    /// As [`Bins::new`]; also if the number is not finite.
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
        Self::at_most_in(Tz::UTC, points_max, (start, end))
    }

    /// The same in the time of a zone.
    pub(crate) fn at_most_in(zone: Tz, points_max: u32, range: (i64, i64)) -> Result<Self> {
        let fits = |step: &Step| Self { step: *step, zone }.count(range) <= i64::from(points_max);
        let hours = ROUND_HOURS.map(|hours| hours * MICROS_PER_HOUR);
        let lengths = ROUND.into_iter().chain(hours).map(Step::Length);
        let days = range.1.saturating_sub(range.0) / MICROS_PER_DAY / i64::from(points_max.max(1));
        // The first and the last bin may stand out.
        let days = (days.max(1)..=days.saturating_mul(2) + 2).map(Step::Days);
        let step = lengths.chain(days).find(fits).ok_or_else(|| Error::Query {
            detail: format!("the range does not fit into {points_max} bins: ask for more points"),
        })?;
        Ok(Self { step, zone })
    }

    fn of_micros(micros: i64, shown: impl Fn() -> String) -> Result<Self> {
        if (1..=CALENDAR.end - CALENDAR.start).contains(&micros) {
            return Ok(Self { step: Step::Length(micros), zone: Tz::UTC });
        }
        let detail = format!("the bin is {}, but must be a microsecond to 9999 years", shown());
        Err(Error::Query { detail })
    }

    /// The same bins in the time of a zone, by its name in the IANA time zone database, such as `Europe/Berlin`.
    ///
    /// # Errors
    ///
    /// [`Error::Query`] if there is no such zone.
    pub fn in_zone(self, name: &str) -> Result<Self> {
        Ok(Self { zone: zone(name).map_err(|detail| Error::Query { detail })?, ..self })
    }

    pub(crate) const fn within(self, zone: Tz) -> Self {
        Self { zone, ..self }
    }

    /// Their length in microseconds: that of most of them, or about that, of bins of the calendar.
    #[must_use]
    pub const fn micros(self) -> i64 {
        match self.step {
            Step::Length(micros) => micros,
            Step::Days(days) => days * MICROS_PER_DAY,
            Step::Months(months) => months * MICROS_PER_MONTH,
        }
    }

    /// Start of the bin that holds a time, microseconds since the epoch.
    #[must_use]
    pub fn start_of(self, micros: i64) -> i64 {
        self.of(micros).0
    }

    /// Start of the bin after the one that holds a time.
    #[must_use]
    pub fn end_of(self, micros: i64) -> i64 {
        self.of(micros).1
    }

    /// Start of the bin that holds the time which is so long before the start of a bin: a length, or days or months of the calendar.
    pub(super) fn start_before(self, start: i64, ago: Self) -> i64 {
        let local = naive(start.saturating_add(self.offset_at(start)));
        let before = match ago.step {
            Step::Length(length) => return self.start_of(start.saturating_sub(length)),
            Step::Days(days) => local.checked_sub_signed(chrono::Duration::days(days)),
            Step::Months(months) => {
                local.checked_sub_months(chrono::Months::new(u32::try_from(months).unwrap_or(u32::MAX)))
            }
        };
        self.start_of(before.map_or(CALENDAR.start, |before| from_local(self.zone, before)))
    }

    /// The bin that holds a time.
    fn of(self, micros: i64) -> (i64, i64) {
        match self.step {
            Step::Length(length) if self.zone == Tz::UTC || length <= MICROS_PER_HOUR => {
                let local = micros + self.offset_at(micros);
                let start = micros - local.rem_euclid(length);
                (self.changed_before(start, micros), self.changed_after(micros, start + length))
            }
            Step::Length(_) | Step::Days(_) | Step::Months(_) => {
                let index = self.index_of(micros);
                let (mut start, mut end) = (self.start_at(index), self.start_at(index + 1));
                // Where clocks go back over a bin's edge, the times of the second pass are not before the edge any more.
                if micros >= end {
                    (start, end) = (end, self.start_at(index + 2));
                }
                (start, end)
            }
        }
    }

    /// A bin's start, or where clocks were changed between it and a time in the bin.
    fn changed_before(self, start: i64, time: i64) -> i64 {
        let (mut before, mut after) = (start, time);
        if self.offset_at(before) == self.offset_at(after) {
            return start;
        }
        while after - before > 1 {
            let middle = i64::midpoint(before, after);
            if self.offset_at(middle) == self.offset_at(time) { after = middle } else { before = middle }
        }
        after
    }

    /// A bin's end, or where clocks are changed between a time in the bin and it.
    fn changed_after(self, time: i64, end: i64) -> i64 {
        let (mut before, mut after) = (time, end - 1);
        if self.offset_at(before) == self.offset_at(after) {
            return end;
        }
        while after - before > 1 {
            let middle = i64::midpoint(before, after);
            if self.offset_at(middle) == self.offset_at(time) { before = middle } else { after = middle }
        }
        after
    }

    /// What is added to a time for that of the zone, in microseconds.
    fn offset_at(self, micros: i64) -> i64 {
        if self.zone == Tz::UTC {
            return 0;
        }
        let offset = self.zone.offset_from_utc_datetime(&naive(micros)).fix().local_minus_utc();
        i64::from(offset) * SECOND
    }

    /// The number of a time's bin, by the clocks of its zone.
    fn index_of(self, micros: i64) -> i64 {
        let local = micros + self.offset_at(micros);
        match self.step {
            Step::Length(length) => local.div_euclid(length),
            Step::Days(days) => (local.div_euclid(MICROS_PER_DAY) - MONDAY).div_euclid(days),
            Step::Months(months) => {
                let date = naive(local).date();
                let month = (i64::from(date.year()) - 1970) * MONTHS_PER_YEAR + i64::from(date.month0());
                month.div_euclid(months)
            }
        }
    }

    /// Where the bin of a number begins.
    fn start_at(self, index: i64) -> i64 {
        let local = match self.step {
            Step::Length(length) => index * length,
            Step::Days(days) => (index * days + MONDAY) * MICROS_PER_DAY,
            Step::Months(months) => {
                let month = index * months;
                let year = i32::try_from(1970 + month.div_euclid(MONTHS_PER_YEAR)).unwrap_or(i32::MAX);
                let month = u32::try_from(month.rem_euclid(MONTHS_PER_YEAR)).unwrap_or_default() + 1;
                let date = NaiveDate::from_ymd_opt(year, month, 1).unwrap_or(NaiveDate::MAX);
                date.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros()
            }
        };
        from_local(self.zone, naive(local))
    }

    /// How many bins have times in a range; one too many at most where that depends on the zone.
    pub(crate) fn count(self, (start, end): (i64, i64)) -> i64 {
        if end <= start {
            return 0;
        }
        match self.step {
            Step::Length(length) if self.zone != Tz::UTC => {
                end.saturating_sub(start).div_euclid(length).saturating_add(2)
            }
            Step::Length(_) | Step::Days(_) | Step::Months(_) => {
                self.index_of(end - 1) - self.index_of(start) + 1
            }
        }
    }

    /// The start of the bin that holds the time in a column.
    pub(super) fn start_expr(self, time: Expr) -> Expr {
        let signature = Signature::exact(vec![time_type()], Volatility::Immutable);
        ScalarUDF::from(BinStart { bins: self, signature }).call(vec![time])
    }
}

impl FromStr for Bins {
    type Err = String;

    /// As people write it: `15m`, `1h 30m`, `1d`, `1w`, `1mo`, `1y`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || {
            format!(
                "{text:?} is no length of bins: write 30s, 15m, 1h, or 1d, 1w, 1mo, 1y for those of the calendar"
            )
        };
        let digits = text.len() - text.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        let (count, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        if let Some((_, step)) = UNITS.iter().find(|(names, _)| names.contains(&unit)) {
            let count = count.parse::<i64>().map_err(|_| refused())?;
            let times = |one: i64, most: i64| {
                count.checked_mul(one).filter(|all| (1..=most).contains(all)).ok_or_else(refused)
            };
            let step = match step {
                Step::Days(days) => Step::Days(times(*days, DAYS_MAX)?),
                Step::Months(months) => Step::Months(times(*months, MONTHS_MAX)?),
                Step::Length(length) => Step::Length(*length),
            };
            return Ok(Self { step, zone: Tz::UTC });
        }
        // A month among other units would be 30.44 days.
        let has_months = text.split(|letter: char| !letter.is_alphabetic()).any(|unit| {
            UNITS.iter().any(|(names, step)| names.contains(&unit) && matches!(step, Step::Months(_)))
        });
        let length = humantime::parse_duration(text).ok().filter(|_| !has_months).ok_or_else(refused)?;
        Self::new(length).map_err(|error| error.to_string())
    }
}

impl fmt::Display for Bins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            Step::Length(micros) => {
                write!(f, "{}", humantime::format_duration(Duration::from_micros(micros.unsigned_abs())))
            }
            Step::Days(days) if days % 7 == 0 => write!(f, "{}w", days / 7),
            Step::Days(days) => write!(f, "{days}d"),
            Step::Months(months) if months % MONTHS_PER_YEAR == 0 => {
                write!(f, "{}y", months / MONTHS_PER_YEAR)
            }
            Step::Months(months) => write!(f, "{months}mo"),
        }?;
        if self.zone == Tz::UTC { Ok(()) } else { write!(f, " ({})", self.zone) }
    }
}

/// A time zone by its name.
pub(crate) fn zone(name: &str) -> std::result::Result<Tz, String> {
    let found = TZ_VARIANTS.iter().find(|zone| zone.name().eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| {
        format!("there is no time zone {name:?}; the names are those of IANA, such as Europe/Berlin")
    })
}

/// The time, in microseconds since the epoch, that clocks of a zone show so; see [`Bins`] for those that they skip or show twice.
pub(super) fn from_local(zone: Tz, local: NaiveDateTime) -> i64 {
    match zone.from_local_datetime(&local) {
        LocalResult::Single(time) | LocalResult::Ambiguous(time, _) => time.timestamp_micros(),
        // By the clocks as they were the day before.
        LocalResult::None => {
            let before = local.checked_sub_signed(chrono::Duration::days(1)).unwrap_or(local);
            let offset = zone.offset_from_local_datetime(&before).earliest().map(|offset| offset.fix());
            let seconds = offset.map(|offset| offset.local_minus_utc()).unwrap_or_default();
            local.and_utc().timestamp_micros() - i64::from(seconds) * SECOND
        }
    }
}

fn naive(micros: i64) -> NaiveDateTime {
    DateTime::from_timestamp_micros(micros).unwrap_or_default().naive_utc()
}

fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

/// DataFusion's own `date_bin` counts in nanoseconds, which end in 2262 and begin in 1677.
#[derive(Debug, PartialEq, Eq, Hash)]
struct BinStart {
    bins: Bins,
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
        // Rows mostly come in the order of their times.
        let bin = Cell::new((0, 0));
        let starts: TimestampMicrosecondArray = as_timestamp_microsecond_array(&times)?.unary(|time| {
            let (start, end) = bin.get();
            if !(start..end).contains(&time) {
                bin.set(self.bins.of(time));
            }
            bin.get().0
        });
        Ok(ColumnarValue::Array(Arc::new(starts.with_timezone("UTC"))))
    }
}
