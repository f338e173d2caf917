use serde_json::{Value, json};

use super::name::ObjectName;
use crate::tables::Kind;

/// The most rows or bytes that are believed of a file; all files together must be a number.
const SAID_MAX: u64 = 1 << 44;

/// A file of a table, as the Delta log has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableFile {
    /// Path relative to the table.
    pub path: String,
    /// What the path says, if the file is ours.
    pub name: Option<ObjectName>,
    /// Bytes.
    pub size: u64,
    /// When it was written, milliseconds since the epoch.
    pub modified_millis: i64,
    /// Rows; `None` if a foreign writer did not say.
    pub row_count: Option<u64>,
    /// Lower bound of the time column, as `max_time`.
    pub min_time: Option<i64>,
    /// Upper bound of the time column, microseconds since the epoch; exact for files of this session,
    /// else up to a millisecond above.
    pub max_time: Option<i64>,
    /// The statistics as the log has them.
    pub stats: Option<String>,
}

impl TableFile {
    /// A file as an `add` action describes it.
    pub(in crate::archive) fn new(
        kind: Kind,
        path: String,
        size: u64,
        modified_millis: i64,
        stats: Option<String>,
    ) -> Self {
        let parsed: Value =
            stats.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let time = |bound: &str| {
            let text = parsed.pointer(&format!("/{bound}/{}", kind.time_column())).and_then(Value::as_str);
            let time = text.and_then(|text| text.parse::<chrono::DateTime<chrono::Utc>>().ok());
            time.map(|time| time.timestamp_micros())
        };
        Self {
            name: ObjectName::parse(&path),
            size: size.min(SAID_MAX),
            modified_millis,
            row_count: parsed.get("numRecords").and_then(Value::as_u64).filter(|rows| *rows <= SAID_MAX),
            min_time: time("minValues"),
            max_time: time("maxValues"),
            stats,
            path,
        }
    }

    /// Whether rows with `start <= time < end` may be in it. What the statistics don't say may be.
    #[must_use]
    pub fn may_hold(&self, start: i64, end: i64) -> bool {
        self.max_time.is_none_or(|max| max >= start) && self.min_time.is_none_or(|min| min < end)
    }

    /// First and last time that its rows may be of, microseconds since the epoch.
    #[must_use]
    pub fn times(&self) -> (i64, i64) {
        (self.min_time.unwrap_or(i64::MIN), self.max_time.unwrap_or(i64::MAX))
    }

    /// The `add` action (Delta protocol, "Add File and Remove File").
    pub(in crate::archive) fn add(&self, data_change: bool) -> Value {
        json!({"add": {
            "path": self.path,
            "partitionValues": {},
            "size": self.size,
            "modificationTime": self.modified_millis,
            "dataChange": data_change,
            "stats": self.stats,
        }})
    }

    /// The `remove` action; without a change of data the rows stay, in other files.
    pub(in crate::archive) fn remove(&self, now_millis: i64, data_change: bool) -> Value {
        json!({"remove": {
            "path": self.path,
            "deletionTimestamp": now_millis,
            "dataChange": data_change,
            "extendedFileMetadata": true,
            "partitionValues": {},
            "size": self.size,
        }})
    }
}
