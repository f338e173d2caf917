use std::fmt;

use chrono::{DateTime, Utc};

use crate::record::{CALENDAR, MICROS_PER_DAY};

/// `created_at`, as SQL compares it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TimeColumn {
    /// `timestamptz`.
    Zoned,
    /// `timestamp`, taken to be UTC.
    Naive,
    /// Missing, or of a type that no archive column holds: every row goes to quarantine.
    None,
}

impl TimeColumn {
    pub(crate) const fn of(type_oid: Option<u32>) -> Self {
        match type_oid {
            Some(1184) => Self::Zoned,
            Some(1114) => Self::Naive,
            _ => Self::None,
        }
    }

    /// The condition for rows of these microseconds since the epoch.
    pub(super) fn within(self, start: i64, end: i64) -> String {
        match self {
            Self::None => "false".to_owned(),
            _ => format!("created_at >= {} and created_at < {}", self.literal(start), self.literal(end)),
        }
    }

    pub(super) fn literal(self, micros: i64) -> String {
        let micros = micros.clamp(CALENDAR.start, CALENDAR.end);
        let time = DateTime::<Utc>::from_timestamp_micros(micros).unwrap_or_default();
        // The end of the calendar has a year of five digits, which would get a sign.
        let text = time.format("%Y-%m-%d %H:%M:%S%.6f").to_string();
        let text = text.trim_start_matches('+');
        match self {
            Self::Naive => format!("timestamp '{text}'"),
            Self::Zoned | Self::None => format!("timestamptz '{text}+00'"),
        }
    }

    /// The rows of these times.
    pub(crate) fn slice(self, ranges: Vec<(i64, i64)>) -> Slice {
        let conditions = ranges.iter().map(|(start, end)| format!("({})", self.within(*start, *end)));
        Slice { condition: Some(conditions.collect::<Vec<_>>().join(" or ")), ranges }
    }

    /// The rows without a time that the archive can hold; nothing but the quarantine has them.
    pub(crate) fn unfit(self) -> Slice {
        Slice { condition: Some(format!("not coalesce({}, false)", self.is_fit())), ranges: Vec::new() }
    }

    /// The condition for rows whose time the archive can hold.
    pub(super) fn is_fit(self) -> String {
        self.is_fit_of("created_at")
    }

    /// As [`TimeColumn::is_fit`], of `created_at` under another name.
    pub(super) fn is_fit_of(self, value: &str) -> String {
        let (start, end) = (self.literal(CALENDAR.start), self.literal(CALENDAR.end));
        match self {
            Self::None => "false".to_owned(),
            _ => format!(
                "({value} is not null and isfinite({value}) and {value} >= {start} and {value} < {end})"
            ),
        }
    }

    /// Units of so many microseconds since the epoch; null where the time is unfit.
    pub(super) fn units(self, micros: i64) -> String {
        self.units_of("created_at", micros)
    }

    /// As [`TimeColumn::units`], of `created_at` under another name.
    pub(super) fn units_of(self, value: &str, micros: i64) -> String {
        match self {
            Self::None => "null::bigint".to_owned(),
            _ => format!(
                "case when {} then floor(extract(epoch from {value}) / {})::bigint end",
                self.is_fit_of(value),
                micros / 1_000_000
            ),
        }
    }
}

/// Days of `created_at`, in UTC.
#[derive(Clone, Debug, Default)]
pub(crate) struct Days {
    /// Numbers of days since the epoch, ascending.
    pub(super) days: Vec<i64>,
    /// Rows whose time the archive can't hold are among them.
    pub(super) has_unfit: bool,
}

impl Days {
    pub(crate) const fn is_empty(&self) -> bool {
        self.days.is_empty() && !self.has_unfit
    }
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, day) in self.days.iter().enumerate() {
            if index == 10 {
                write!(f, " and {} more", self.days.len() - index)?;
                break;
            }
            let time = DateTime::<Utc>::from_timestamp_micros(day.saturating_mul(MICROS_PER_DAY));
            write!(
                f,
                "{}{}",
                if index == 0 { "" } else { " " },
                time.unwrap_or_default().format("%Y-%m-%d")
            )?;
        }
        if self.has_unfit { f.write_str(" and rows without a usable time") } else { Ok(()) }
    }
}

/// A part of a partition that is read at once.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    /// In SQL; `None` for the whole partition.
    pub(crate) condition: Option<String>,
    /// Times (first, and first after the last) whose rows are compared with the archive, ascending; none if nothing of the
    /// slice can be there.
    pub(crate) ranges: Vec<(i64, i64)>,
}

impl Slice {
    pub(crate) const fn whole() -> Self {
        Self { condition: None, ranges: Vec::new() }
    }
}

pub(super) const fn day_of(micros: i64) -> i64 {
    micros.div_euclid(MICROS_PER_DAY)
}
