//! What keeps a table small and quick to read: merges, checkpoints and vacuum of its log, and copies too many removed.

pub(in crate::archive) mod doubles;
mod maintain;
pub(in crate::archive) mod merge;
