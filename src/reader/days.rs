//! Which days the archive has rows of, as far as the log of a table says so without a look at its files.

use std::collections::BTreeMap;

use crate::archive::{Span, TableFile};
use crate::tables::MICROS_PER_DAY;

/// The files that may have rows of a day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DayFiles {
    /// How many.
    pub(crate) files: u32,
    /// Their rows; `None` if a file of more than one day is among them, or one that does not say how many it has.
    pub(crate) rows: Option<u64>,
}

/// Days that a single file is believed to have rows of.
const DAYS_MAX: i64 = 10_000;

/// By day, counted from 1970-01-01. A file that does not say which times it has is left out.
pub(super) fn of<'a>(files: impl Iterator<Item = &'a TableFile>) -> BTreeMap<i64, DayFiles> {
    let mut days = BTreeMap::new();
    for file in files {
        let (Some(first), Some(last)) = (file.min_time, file.max_time) else { continue };
        // The upper bound may be a millisecond too high: a file of ours that is of one day says so in its name.
        let first = first.div_euclid(MICROS_PER_DAY);
        let is_of_a_day = file.name.as_ref().is_some_and(|name| name.span != Span::Month);
        let last = if is_of_a_day { first } else { last.div_euclid(MICROS_PER_DAY) };
        for day in first..=last.min(first.saturating_add(DAYS_MAX)) {
            let known = days.entry(day).or_insert(DayFiles { files: 0, rows: Some(0) });
            known.files += 1;
            let rows = file.row_count.filter(|_| first == last);
            known.rows = known.rows.zip(rows).map(|(known, rows)| known + rows);
        }
    }
    days
}
