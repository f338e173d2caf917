//! Parquet files: how they are named, written and read, and what is known of them without reading.

pub(in crate::archive) mod columns;
pub(in crate::archive) mod digest;
pub(in crate::archive) mod encode;
pub(in crate::archive) mod entities;
pub(in crate::archive) mod footer;
mod footers;
pub(in crate::archive) mod hours;
pub(in crate::archive) mod latest;
pub(in crate::archive) mod name;
pub(in crate::archive) mod object_reader;
pub(in crate::archive) mod scan;
pub(in crate::archive) mod stats;
pub(in crate::archive) mod table_file;
pub(in crate::archive) mod upload;
