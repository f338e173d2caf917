//! What is archived: the kinds of drift records, their entities, and the columns of each kind.
//!
//! Pure descriptions. Everything that must agree on a name, an order or a type (the decoder, the
//! Parquet writer, the Delta schema, the watermarks) reads it from here.

mod kind;
mod window;

pub use kind::{ColumnSpec, ColumnType, Kind, RECORD_COLUMNS_MAX};
pub use window::{
    CALENDAR, Day, MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE, Window, WindowWidth, YEAR_RANGE,
    clamp_to_calendar, is_in_calendar,
};

/// The model (or agent) that a drift record speaks of. Sorts by space, then name, then version, as
/// the archive's files do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entity {
    /// The space (team, repository) that owns the model.
    pub space: String,
    /// The model's name.
    pub name: String,
    /// The model's version.
    pub version: String,
}
