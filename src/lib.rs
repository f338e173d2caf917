//! Highwater archives the drift records of a monitoring database, exactly once.
//!
//! It tails the inserts into the drift tables of a PostgreSQL database by logical replication, keeps
//! every row for ever as Parquet in Delta Lake tables, and records how far the archive reaches, so
//! that retention deletes only what the archive provably holds.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic"))]

pub mod archive;
pub mod batch;
pub mod check;
pub mod cli;
mod commit;
pub mod config;
pub mod decode;
pub mod error;
mod failpoint;
pub mod lsn;
pub mod pgoutput;
pub mod postgres;
pub mod record;
pub mod setup;
mod sidecar;
mod slot;
mod stream;
pub mod telemetry;
pub mod watermark;

pub use config::Config;
pub use error::{Error, Policy, Result};
pub use lsn::Lsn;
pub use sidecar::Archiver;
