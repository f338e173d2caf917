//! What is archived: tables, described, their entities, and windows of time.
//!
//! Pure descriptions. Everything that must agree on a name, an order or a type (the decoder, the
//! Parquet writer, the Delta schema, the watermarks) reads it from here.

mod built_in;
mod change;
mod kind;
mod per_kind;
mod window;

pub use built_in::{DRIFT_TABLES, ENTITY_TABLE, OWN_COLUMNS, SCOUTER_TABLES, ScouterTable, change_columns};
pub use change::{CHANGE, CHANGE_COLUMNS, COMMITTED_AT, Change, LSN, SEQUENCE, UNCHANGED};
pub use kind::{
    ColumnSpec, ColumnType, Compared, Description, ENTITY_COLUMNS_MAX, EntityKey, EntityTable, Kind,
    SORT_COLUMNS_MAX, is_storable,
};
pub use per_kind::PerKind;
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

impl Entity {
    /// The entity of these names, in the order of the columns that name it; a name that there is not is empty.
    #[must_use]
    pub fn of_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut names = names.into_iter().map(str::to_owned);
        let mut next = || names.next().unwrap_or_default();
        Self { space: next(), name: next(), version: next() }
    }
}
