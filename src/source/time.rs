use std::fmt;

use chrono::{DateTime, Utc};

use crate::archive::MinuteCounts;
use crate::postgres::quote_identifier;
use crate::tables::{CALENDAR, MICROS_PER_DAY, MICROS_PER_MINUTE};

/// Ranges of time in one condition.
const RANGES_MAX: usize = 500;

/// The type of a column of times, as SQL compares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimeType {
    /// `timestamptz`.
    Zoned,
    /// `timestamp`, taken to be UTC.
    Naive,
    /// Missing, or of a type that no archive column holds: every row goes to quarantine.
    None,
}

impl TimeType {
    pub(super) const fn of(type_oid: Option<u32>) -> Self {
        match type_oid {
            Some(1184) => Self::Zoned,
            Some(1114) => Self::Naive,
            _ => Self::None,
        }
    }

    fn literal(self, micros: i64) -> String {
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

    /// The condition for a value that the archive can hold.
    pub(super) fn is_fit(self, value: &str) -> String {
        let (start, end) = (self.literal(CALENDAR.start), self.literal(CALENDAR.end));
        match self {
            Self::None => "false".to_owned(),
            _ => format!(
                "({value} is not null and isfinite({value}) and {value} >= {start} and {value} < {end})"
            ),
        }
    }

    /// Units of so many microseconds since the epoch; null where the time is unfit.
    pub(super) fn units(self, value: &str, micros: i64) -> String {
        match self {
            Self::None => "null::bigint".to_owned(),
            _ => format!(
                "case when {} then floor(extract(epoch from {value}) / {})::bigint end",
                self.is_fit(value),
                micros / 1_000_000
            ),
        }
    }
}

/// The column that says when a table's rows are of.
#[derive(Clone, Debug)]
pub(crate) struct TimeColumn {
    /// As SQL writes it.
    pub(super) name: String,
    pub(super) time_type: TimeType,
}

impl TimeColumn {
    /// The column of this name, if it has a type.
    pub(super) fn new(name: &str, type_oid: Option<u32>) -> Self {
        Self { name: quote_identifier(name), time_type: TimeType::of(type_oid) }
    }

    /// The condition for rows of these microseconds since the epoch.
    pub(super) fn within(&self, start: i64, end: i64) -> String {
        let name = &self.name;
        match self.time_type {
            TimeType::None => "false".to_owned(),
            _ => format!("{name} >= {} and {name} < {}", self.literal(start), self.literal(end)),
        }
    }

    pub(super) fn literal(&self, micros: i64) -> String {
        self.time_type.literal(micros)
    }

    /// The rows of these times.
    pub(crate) fn slice(&self, ranges: Vec<(i64, i64)>) -> Slice {
        let conditions = ranges.iter().map(|(start, end)| format!("({})", self.within(*start, *end)));
        Slice { condition: Some(conditions.collect::<Vec<_>>().join(" or ")), ranges }
    }

    /// The rows without a time that the archive can hold; nothing but the quarantine has them.
    pub(crate) fn unfit(&self) -> Slice {
        Slice { condition: Some(format!("not coalesce({}, false)", self.is_fit())), ranges: Vec::new() }
    }

    /// The condition for rows whose time the archive can hold.
    pub(super) fn is_fit(&self) -> String {
        self.time_type.is_fit(&self.name)
    }

    /// Units of so many microseconds since the epoch; null where the time is unfit.
    pub(super) fn units(&self, micros: i64) -> String {
        self.time_type.units(&self.name, micros)
    }
}

/// Days of the time column, in UTC.
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

    /// Each day in microseconds since the epoch: its first, and the first after it.
    pub(crate) fn ranges(&self) -> Vec<(i64, i64)> {
        self.days.iter().map(|day| (day * MICROS_PER_DAY, (day + 1) * MICROS_PER_DAY)).collect()
    }

    /// The condition for their rows.
    pub(super) fn condition(&self, time: &TimeColumn) -> String {
        let mut conditions: Vec<String> =
            self.ranges().into_iter().map(|(start, end)| format!("({})", time.within(start, end))).collect();
        if self.has_unfit {
            conditions.push(format!("not coalesce({}, false)", time.is_fit()));
        }
        format!("({})", conditions.join(" or "))
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

/// Cuts minutes with rows into slices (ranges of microseconds) of which neither side has more than about `rows_max` rows, the
/// one that both sides are compared by as a whole. Minutes that only the archive has are in none.
pub(super) fn cut(counts: &MinuteCounts, archived: &MinuteCounts, rows_max: u64) -> Vec<Vec<(i64, i64)>> {
    let mut slices = Vec::new();
    let mut open: Vec<(i64, i64)> = Vec::new();
    let mut open_rows = 0_u64;
    for (minute, count) in counts {
        let rows = archived.get(minute).copied().unwrap_or_default().max(*count);
        if !open.is_empty() && (open_rows.saturating_add(rows) > rows_max || open.len() >= RANGES_MAX) {
            slices.push(std::mem::take(&mut open));
            open_rows = 0;
        }
        open_rows = open_rows.saturating_add(rows);
        let (start, end) = (minute * MICROS_PER_MINUTE, (minute + 1) * MICROS_PER_MINUTE);
        match open.last_mut() {
            Some((_, last))
                if archived.range(*last / MICROS_PER_MINUTE..*minute).next().is_none()
                    && day_of(*last - 1) == day_of(start) =>
            {
                *last = end;
            }
            _ => open.push((start, end)),
        }
    }
    if !open.is_empty() {
        slices.push(open);
    }
    slices
}

const fn day_of(micros: i64) -> i64 {
    micros.div_euclid(MICROS_PER_DAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTES_PER_DAY: i64 = MICROS_PER_DAY / MICROS_PER_MINUTE;

    /// The slices in minutes.
    fn cut_at(rows: &[(i64, u64)], archived: &[(i64, u64)], rows_max: u64) -> Vec<Vec<(i64, i64)>> {
        let slices = cut(&rows.iter().copied().collect(), &archived.iter().copied().collect(), rows_max);
        let minutes = |(start, end)| (start / MICROS_PER_MINUTE, end / MICROS_PER_MINUTE);
        slices.into_iter().map(|ranges| ranges.into_iter().map(minutes).collect()).collect()
    }

    #[test]
    fn slices_are_bounded_by_the_rows_of_both_sides() {
        let rows = [(-2, 5), (0, 5), (1, 5), (2, 5), (10, 5)];
        assert_eq!(cut_at(&rows, &[], 100), [[(-2, -1), (0, 11)]]);
        assert_eq!(cut_at(&rows, &[], 10), [vec![(-2, -1), (0, 1)], vec![(1, 3)], vec![(10, 11)]]);
        let archived = [(1, 5), (2, 95), (10, 5)];
        assert_eq!(cut_at(&rows, &archived, 100), [vec![(-2, -1), (0, 2)], vec![(2, 11)]]);
        assert_eq!(cut_at(&[(7, 200)], &archived, 100), [[(7, 8)]], "a minute is not divided");
        assert!(cut_at(&[], &archived, 100).is_empty());
    }

    #[test]
    fn what_only_the_archive_has_is_not_read() {
        let rows = [(0, 1), (MINUTES_PER_DAY - 1, 1), (MINUTES_PER_DAY, 1)];
        assert_eq!(cut_at(&rows, &[], 100), [[(0, MINUTES_PER_DAY), (MINUTES_PER_DAY, MINUTES_PER_DAY + 1)]]);
        let between = [(0, 1), (5, 1_000_000)];
        assert_eq!(
            cut_at(&rows, &between, 100),
            [[(0, 1), (MINUTES_PER_DAY - 1, MINUTES_PER_DAY), (MINUTES_PER_DAY, MINUTES_PER_DAY + 1)]]
        );
        let many: Vec<_> = (0..=RANGES_MAX as i64).map(|day| (day * MINUTES_PER_DAY, 1)).collect();
        assert_eq!(cut_at(&many, &[], 1_000).iter().map(Vec::len).collect::<Vec<_>>(), [RANGES_MAX, 1]);
    }
}
