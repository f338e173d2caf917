//! Highwater archives the drift records of a monitoring database, exactly once.
//!
//! It tails the inserts into the drift tables of a PostgreSQL database by logical replication, keeps
//! every row for ever as Parquet in Delta Lake tables, and records how far the archive reaches, so
//! that retention can be made to delete only what the archive provably holds.
//!
//! ```text
//! PostgreSQL --replication slot--> receiver --frames--> builder --checkpoints--> committer
//!     ^                               |        (stream, decode, batch)      (archive, watermark) |
//!     |                               |                                                          |
//!     +------- acknowledged LSN ------+<----- durable LSN <----- watermark row <----- Delta log <-+
//! ```
//!
//! # Guarantees
//!
//! - **No loss.** A committed row is in the archive or still in Postgres. The server is told that a position
//!   is durable only after the Delta logs and the watermark rows say so.
//! - **Exactly once.** Each log entry carries, beside its files, the position up to which its table is
//!   complete; after a crash that position decides what is skipped. Only one writer can commit: whoever has
//!   been replaced finds its successor's entry, and ends.
//! - **Bounded.** Memory ([`Config::memory_bytes`]) and staleness ([`Config::max_lag`]) have limits.
//! - **Open.** Tables of Delta protocol reader 1, writer 2, without optional features.
//! - **Nothing is dropped silently.** A row that a column can't hold goes to the table `quarantine`, with the
//!   reason.
//!
//! Rows that did not come by the stream (earlier ones, those of a gap) are found by comparison and added; see the
//! `docs/limits.md` for what is not done.
//!
//! # Use
//!
//! [`setup::setup`] makes the publication, the slot and the watermark tables, once; then [`Archiver`]
//! archives in the background until it is told to stop.
//!
//! ```
//! use highwater::config::{ObjectStorageSettings, SourceConfig};
//! use highwater::{Archiver, Config};
//!
//! # #[tokio::main]
//! # async fn main() -> highwater::Result<()> {
//! let source = SourceConfig::new(Some("postgresql://highwater@localhost/scouter"), &|_| None)?;
//! let mut config = Config::new(source, ObjectStorageSettings::new("s3://bucket/drift", "eu-west-1")?);
//! config.max_lag = std::time::Duration::from_secs(10);
//! config.check()?;
//!
//! let (shutdown, watcher) = tokio::sync::watch::channel(());
//! let archiver = Archiver::start(config, watcher);
//! // ... serve, until it is time to stop ...
//! shutdown.send_replace(());
//! archiver.wait().await
//! # }
//! ```
//!
//! # Modules
//!
//! Each uses only those above it; ARCHITECTURE.md says what each knows, and what it must not.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`error`] | every failure, and whether it is worth a retry |
//! | [`lsn`] | positions in the log |
//! | [`tables`] | what is archived: tables, their columns, entities, windows of time |
//! | `moments` | exact sums, and what comes of them |
//! | [`config`] | what was typed, then [`Config`], checked once |
//! | [`telemetry`] | logs |
//! | `vitals` | what a running archiver counts, and how old its rows are |
//! | [`pgoutput`] | messages of the stream; pure |
//! | [`batch`] | rows as columns, by entity and window; pure |
//! | [`decode`] | messages to rows, or to quarantine; pure |
//! | [`postgres`] | the replication connection, SQL sessions |
//! | [`archive`] | Parquet, the Delta tables, commits, merges, vacuum |
//! | [`watermark`] | the mirror of the Delta logs in Postgres |
//! | [`source`] | the tables in Postgres: slot, look-ups, partitions, copies |
//! | [`purge`] | deletion of what is archived, which SQL decides |
//! | `status` | how far the archive reaches, for whoever asks |
//! | [`setup`] | the publication, the slot, the migrations |
//! | `sidecar` | sessions one after the other, and their tasks |
//! | [`verify`] | the archive compared with Postgres; by itself before rows are purged |
//! | `archiver` | [`Archiver`]: sessions, and verifications beside them |
//! | [`reader`] | the history: binned queries, SQL |
//! | [`check`] | the preflight |
//! | `apart` | SQL of anybody, in a process of its own |
//! | [`http`] | health, metrics and the history over HTTP |
//! | [`cli`] | the command line |

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic"))]

mod apart;
pub mod archive;
mod archiver;
pub mod batch;
pub mod check;
pub mod cli;
pub mod config;
pub mod decode;
pub mod error;
mod failpoint;
pub mod http;
pub mod lsn;
mod moments;
pub mod pgoutput;
pub mod postgres;
pub mod purge;
pub mod reader;
pub mod setup;
mod sidecar;
pub mod source;
mod status;
pub mod tables;
pub mod telemetry;
pub mod verify;
mod vitals;
pub mod watermark;

pub use archiver::Archiver;
pub use config::Config;
pub use error::{Error, Policy, Result};
pub use lsn::Lsn;
pub use reader::Archive;

/// The documentation's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
