//! Where the archive lies: opening it, proving that of several who create an object one succeeds, and what each kind of
//! store needs for that. Knows no table.

pub(in crate::archive) mod probe;
mod s3;
pub(in crate::archive) mod storage;
pub(in crate::archive) mod synced;
