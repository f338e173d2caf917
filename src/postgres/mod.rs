//! Placeholder, replaced at the merge.
pub mod sql;
