use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use chrono::{DateTime, Datelike, Timelike, Utc};

/// Microseconds in a day without leap seconds, as PostgreSQL and the epoch count them.
pub const MICROS_PER_DAY: i64 = 86_400_000_000;

/// Microseconds of an hour.
pub const MICROS_PER_HOUR: i64 = 60 * MICROS_PER_MINUTE;
/// Microseconds of a minute.
pub const MICROS_PER_MINUTE: i64 = 60_000_000;

/// The years (proleptic Gregorian) that the archive's timestamps may have. PostgreSQL goes from
/// 4713 BC to 294276 AD; the calendars of Python, Spark and of the file paths end here.
pub const YEAR_RANGE: RangeInclusive<i32> = 1..=9999;

/// Microseconds of 0001-01-01T00:00:00Z and of 10000-01-01T00:00:00Z.
pub const CALENDAR: std::ops::Range<i64> = -62_135_596_800_000_000..253_402_300_800_000_000;

/// Whether a time (microseconds since the epoch) lies in [`YEAR_RANGE`].
#[must_use]
pub fn is_in_calendar(micros: i64) -> bool {
    CALENDAR.contains(&micros)
}

/// The time itself, or the nearest one in [`YEAR_RANGE`].
#[must_use]
pub fn clamp_to_calendar(micros: i64) -> i64 {
    micros.clamp(CALENDAR.start, CALENDAR.end - 1)
}

/// The length of a window: whole minutes that divide a day, so that no window spans two UTC days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowWidth(i64);

impl WindowWidth {
    /// A whole day, the widest window.
    pub const DAY: Self = Self(MICROS_PER_DAY);

    /// An hour, the default.
    pub const HOUR: Self = Self(MICROS_PER_HOUR);

    /// A window of this length, if it is whole minutes and divides a day.
    #[must_use]
    pub fn new(length: Duration) -> Option<Self> {
        let micros = i64::try_from(length.as_micros()).ok()?;
        let fits = micros > 0 && micros % MICROS_PER_MINUTE == 0 && MICROS_PER_DAY % micros == 0;
        fits.then_some(Self(micros))
    }

    /// Length in microseconds.
    #[must_use]
    pub const fn micros(self) -> i64 {
        self.0
    }
}

/// A UTC day of `created_at`, as its start in microseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(i64);

impl Day {
    /// The day that holds a time.
    #[must_use]
    pub const fn of(micros: i64) -> Self {
        Self(micros - micros.rem_euclid(MICROS_PER_DAY))
    }

    /// Start of the day, microseconds since the epoch.
    #[must_use]
    pub const fn start(self) -> i64 {
        self.0
    }
}

/// A span of `created_at` whose rows share files: a fraction of a UTC day, or the whole of one.
///
/// Displays as the folder and first part of the names of its files: `2026/11/22/13` for an hour,
/// `2026/11/22/1315` for a shorter window, `2026/11/22` for a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Window {
    start: i64,
    width: i64,
}

impl Window {
    /// The window of this width that holds a time in [`YEAR_RANGE`].
    #[must_use]
    pub const fn of(micros: i64, width: WindowWidth) -> Self {
        Self { start: micros - micros.rem_euclid(width.0), width: width.0 }
    }

    /// First microsecond that belongs to the window.
    #[must_use]
    pub const fn start(self) -> i64 {
        self.start
    }

    /// First microsecond after the window.
    #[must_use]
    pub const fn end(self) -> i64 {
        self.start + self.width
    }

    /// Whether the window is a whole day.
    #[must_use]
    pub const fn is_day(self) -> bool {
        self.width == MICROS_PER_DAY
    }

    /// Whether a time belongs to the window.
    #[must_use]
    pub const fn contains(self, micros: i64) -> bool {
        self.start <= micros && micros < self.start + self.width
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = DateTime::<Utc>::from_timestamp_micros(self.start).ok_or(fmt::Error)?;
        write!(f, "{:04}/{:02}/{:02}", start.year(), start.month(), start.day())?;
        if self.is_day() {
            return Ok(());
        }
        write!(f, "/{:02}", start.hour())?;
        if self.width % MICROS_PER_HOUR != 0 {
            write!(f, "{:02}", start.minute())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(text: &str) -> i64 {
        text.parse::<DateTime<Utc>>().map(|time| time.timestamp_micros()).unwrap_or_default()
    }

    fn width(minutes: u64) -> Option<WindowWidth> {
        WindowWidth::new(Duration::from_secs(minutes * 60))
    }

    #[test]
    fn a_window_never_spans_two_days() {
        for minutes in 1..=2000 {
            assert_eq!(width(minutes).is_some(), 1440 % minutes == 0, "{minutes}");
        }
        assert_eq!(WindowWidth::new(Duration::from_millis(60_001)), None);
        assert_eq!(WindowWidth::new(Duration::ZERO), None);
    }

    #[test]
    fn names_say_which_span_a_file_holds() {
        let time = micros("2026-11-22T13:17:59.999999Z");
        for (minutes, name) in
            [(60, "2026/11/22/13"), (15, "2026/11/22/1315"), (720, "2026/11/22/12"), (1440, "2026/11/22")]
        {
            let window = width(minutes).map(|width| Window::of(time, width).to_string());
            assert_eq!(window.as_deref(), Some(name));
        }
    }

    #[test]
    fn times_before_the_epoch_round_down() {
        let time = micros("1969-12-31T23:59:59.999999Z");
        let window = Window::of(time, WindowWidth::DAY);
        assert_eq!(window.to_string(), "1969/12/31");
        assert!(window.contains(time) && !window.contains(0));
    }

    #[test]
    fn the_calendar_is_exactly_the_years_of_the_range() {
        let (first, last) = (micros("0001-01-01T00:00:00Z"), micros("9999-12-31T23:59:59.999999Z"));
        assert!(is_in_calendar(first) && !is_in_calendar(first - 1));
        assert!(is_in_calendar(last) && !is_in_calendar(last + 1));
        assert_eq!(
            [i64::MIN, first, 0, last, i64::MAX].map(clamp_to_calendar),
            [first, first, 0, last, last]
        );
        assert_eq!(Window::of(first, WindowWidth::DAY).to_string(), "0001/01/01");
    }
}
