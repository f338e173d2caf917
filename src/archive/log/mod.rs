//! The Delta logs: entries, claims and commits, and one version of a table as its log has it.

mod claim;
pub(in crate::archive) mod damage;
pub(in crate::archive) mod described;
pub(in crate::archive) mod entry;
pub(in crate::archive) mod foreign;
mod marks;
pub(in crate::archive) mod open;
mod properties;
pub(in crate::archive) mod snapshot;
pub(in crate::archive) mod table;
pub(in crate::archive) mod view;
