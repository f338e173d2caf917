//! Hours of a table's times, the unit in which both sides are added up.

use crate::tables::MICROS_PER_HOUR;

pub(super) const fn floor_hour(micros: i64) -> i64 {
    micros - micros.rem_euclid(MICROS_PER_HOUR)
}

pub(super) const fn ceil_hour(micros: i64) -> i64 {
    floor_hour(micros.saturating_add(MICROS_PER_HOUR - 1))
}

pub(super) fn hour_text(hour: i64) -> String {
    let time = chrono::DateTime::from_timestamp_micros(hour.saturating_mul(MICROS_PER_HOUR));
    time.unwrap_or_default().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}
