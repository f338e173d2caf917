//! The archive: Parquet files in one Delta table per kind, and the log entries that make them count.
//!
//! What no log entry names does not exist. So uploading is harmless and may be repeated; [`Table::commit`] is
//! the one step that archives rows, and [`Table::claim`] is what makes this process the only one that can
//! take it. Must not know Postgres.

mod error;
mod files;
mod log;
mod store;
mod upkeep;

#[cfg(test)]
pub(crate) mod tests;

pub use files::digest::{Copies, Multiset, each_digest};
pub use files::encode::{EncodedFile, encode};
pub use files::entities::{EntityStats, QuarantinedText, each_quarantined, entity_stats};
pub use files::hours::{HourSums, MinuteCounts, RowSum, hour_sums, minute_counts, sums_of};
pub(crate) use files::latest::latest;
pub use files::name::{Namer, ObjectName, Span};
pub use files::object_reader::{check_footers, read_through};
pub(crate) use files::scan::{MEMORY_BYTES, Scan, runtime, session};
pub use files::stats::FileStats;
pub use files::table_file::TableFile;
pub use files::upload::{DataFile, upload};
pub use log::damage::Damaged;
pub use log::described::{described, described_tables};
pub use log::entry::app_id;
pub use log::foreign::{ForeignRemoval, broken_since, removes_since};
pub use log::snapshot::Snapshot;
pub use log::table::{CommitNote, Merged, Table, Totals};
pub use log::view::View;
pub use store::storage::Storage;
pub(crate) use store::storage::{is_nothing, nothing_in};
pub use upkeep::doubles::{Doubles, Removal};
pub use upkeep::merge::{MergePlan, MergeTurns, merge};
