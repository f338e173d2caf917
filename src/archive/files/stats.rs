//! What is known of a file without reading it, and its form in the Delta log.

use arrow::array::RecordBatch;
use arrow::compute::{max, min};
use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::columns::{EntityColumns, times};
use crate::Result;
use crate::tables::{Kind, is_in_calendar};

/// The longest string that goes whole into the Delta log, in characters.
const STRING_CHARS_MAX: usize = 256;

/// What a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStats {
    /// Rows.
    pub row_count: u64,
    /// Smallest `created_at` (`quarantined_at` of the quarantine), microseconds since the epoch.
    pub min_time: i64,
    /// Largest `created_at` (`quarantined_at`), microseconds since the epoch.
    pub max_time: i64,
    /// Smallest and largest value of each column that names the entity, each for itself.
    pub entity_range: Vec<(String, String)>,
}

impl FileStats {
    /// The `stats` of an `add` action (Delta protocol, "Per-file Statistics"), for the time and entity
    /// columns only: doubles have values without a JSON form.
    ///
    /// Some engines read times with milliseconds, and long strings cut. So the minimum is never above,
    /// and the maximum never below, a value of the file; a maximum that has no such form is left out.
    #[must_use]
    pub fn to_delta_json(&self, kind: Kind) -> String {
        let (mut lows, mut highs, mut nulls) = (Map::new(), Map::new(), Map::new());
        let time = kind.time_column();
        nulls.insert(time.to_owned(), json!(0));
        insert(&mut lows, time, time_floor(self.min_time));
        insert(&mut highs, time, time_ceiling(self.max_time));
        for (column, (low, high)) in kind.entity_columns().iter().zip(&self.entity_range) {
            nulls.insert(column.clone(), json!(0));
            insert(&mut lows, column, Some(string_floor(low)));
            insert(&mut highs, column, string_ceiling(high));
        }
        json!({"numRecords": self.row_count, "minValues": lows, "maxValues": highs, "nullCount": nulls})
            .to_string()
    }
}

fn insert(values: &mut Map<String, Value>, column: &str, value: Option<String>) {
    if let Some(value) = value {
        values.insert(column.to_owned(), Value::String(value));
    }
}

fn time_text(millis: i64) -> Option<String> {
    if !is_in_calendar(millis.checked_mul(1000)?) {
        return None;
    }
    let time = DateTime::<Utc>::from_timestamp_millis(millis)?;
    Some(time.format("%Y-%m-%dT%H:%M:%S%.3fZ").to_string())
}

fn time_floor(micros: i64) -> Option<String> {
    time_text(micros.div_euclid(1000))
}

fn time_ceiling(micros: i64) -> Option<String> {
    time_text(-(micros.checked_neg()?.div_euclid(1000)))
}

fn head(text: &str) -> Option<&str> {
    let (end, _) = text.char_indices().nth(STRING_CHARS_MAX)?;
    text.get(..end)
}

fn string_floor(text: &str) -> String {
    head(text).unwrap_or(text).to_owned()
}

fn string_ceiling(text: &str) -> Option<String> {
    let Some(head) = head(text) else { return Some(text.to_owned()) };
    let ceiling = format!("{head}\u{10FFFF}");
    (ceiling.as_str() > text).then_some(ceiling)
}

/// Gathers [`FileStats`] while a file is written.
#[derive(Debug)]
pub(in crate::archive) struct StatsBuilder {
    kind: Kind,
    row_count: u64,
    time: Option<(i64, i64)>,
    entity_range: Vec<(String, String)>,
}

impl StatsBuilder {
    pub(in crate::archive) const fn new(kind: Kind) -> Self {
        Self { kind, row_count: 0, time: None, entity_range: Vec::new() }
    }

    /// Takes in the rows of one entity (of any, for the quarantine).
    pub(in crate::archive) fn update(&mut self, rows: &RecordBatch) -> Result<()> {
        let times = times(self.kind, rows)?;
        let (Some(low), Some(high)) = (min(times), max(times)) else { return Ok(()) };
        self.row_count += rows.num_rows() as u64;
        self.time = Some(self.time.map_or((low, high), |(least, most)| (least.min(low), most.max(high))));
        if let Some(entities) = EntityColumns::of(self.kind, rows)? {
            let Some(entity) = entities.get(0) else { return Ok(()) };
            if self.entity_range.is_empty() {
                self.entity_range =
                    entity.iter().map(|value| (String::from(*value), String::from(*value))).collect();
            }
            for ((low, high), value) in self.entity_range.iter_mut().zip(entity) {
                if value < low.as_str() {
                    value.clone_into(low);
                } else if value > high.as_str() {
                    value.clone_into(high);
                }
            }
        }
        Ok(())
    }

    /// The statistics; `None` if there was no row.
    pub(in crate::archive) fn finish(self) -> Option<FileStats> {
        let (min_time, max_time) = self.time?;
        Some(FileStats { row_count: self.row_count, min_time, max_time, entity_range: self.entity_range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(text: &str) -> i64 {
        text.parse::<DateTime<Utc>>().unwrap().timestamp_micros()
    }

    #[test]
    fn times_are_rounded_outwards_to_milliseconds() {
        for (time, floor, ceiling) in [
            ("2026-11-22T13:00:00.000001Z", "2026-11-22T13:00:00.000Z", "2026-11-22T13:00:00.001Z"),
            ("2026-11-22T13:00:00.999999Z", "2026-11-22T13:00:00.999Z", "2026-11-22T13:00:01.000Z"),
            ("2026-11-22T13:00:00.001000Z", "2026-11-22T13:00:00.001Z", "2026-11-22T13:00:00.001Z"),
            ("1969-12-31T23:59:59.999999Z", "1969-12-31T23:59:59.999Z", "1970-01-01T00:00:00.000Z"),
            ("1915-03-01T00:00:00.000001Z", "1915-03-01T00:00:00.000Z", "1915-03-01T00:00:00.001Z"),
            ("0001-01-01T00:00:00.000000Z", "0001-01-01T00:00:00.000Z", "0001-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(time_floor(micros(time)).as_deref(), Some(floor));
            assert_eq!(time_ceiling(micros(time)).as_deref(), Some(ceiling));
        }
        let last = micros("9999-12-31T23:59:59.999001Z");
        assert_eq!(time_ceiling(last), None, "it would be the year 10000");
        assert_eq!(time_floor(last).as_deref(), Some("9999-12-31T23:59:59.999Z"));
        for far in [i64::MIN, i64::MAX] {
            assert_eq!((time_floor(far), time_ceiling(far)), (None, None));
        }
    }

    #[test]
    fn long_strings_are_cut_so_that_they_still_bound() {
        let whole = "ä".repeat(256);
        assert_eq!((string_floor(&whole), string_ceiling(&whole)), (whole.clone(), Some(whole.clone())));
        let long = format!("{whole}ö");
        assert_eq!(string_floor(&long), whole);
        let ceiling = string_ceiling(&long).unwrap();
        assert_eq!(ceiling, format!("{whole}\u{10FFFF}"));
        assert!(string_floor(&long).as_str() <= long.as_str() && long.as_str() <= ceiling.as_str());
        let last = format!("{whole}\u{10FFFF}");
        assert_eq!(string_ceiling(&last), None);
        assert_eq!(string_ceiling(&format!("{last}x")), None);
    }

    #[test]
    fn only_time_and_entity_columns_are_in_the_log() {
        let range = ["space", "name", "1.0"].map(|value| (value.to_owned(), value.to_owned()));
        let stats = FileStats { row_count: 2, min_time: -1, max_time: 1, entity_range: range.to_vec() };
        let json: Value = serde_json::from_str(&stats.to_delta_json(Kind::psi())).unwrap();
        let columns = json!({"created_at": 0, "space": 0, "name": 0, "version": 0});
        assert_eq!(json["nullCount"], columns);
        assert_eq!(json["numRecords"], 2);
        assert_eq!(json["minValues"]["created_at"], "1969-12-31T23:59:59.999Z");
        assert_eq!(json["maxValues"]["created_at"], "1970-01-01T00:00:00.001Z");
    }
}
