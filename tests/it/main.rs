//! Integration tests: one binary, one module per behaviour, against real servers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test panics when something is not as it must be, and reports on stderr"
)]

#[path = "../support/mod.rs"]
mod support;

mod api;
mod backfill;
mod big;
mod changes;
mod check;
mod columns;
mod connection;
mod crash;
mod described;
mod docs;
mod drift;
mod earlier;
mod embed;
mod encodings;
mod failover;
mod foreign;
mod fuzz;
mod gap;
mod horizon;
mod http;
mod http_load;
mod idle;
mod intruder;
mod liar;
mod metrics;
mod moved;
mod page;
mod partition;
mod partman;
mod purge;
mod purge_load;
mod query;
mod query_cli;
mod query_live;
mod query_stores;
mod reader;
mod rights;
mod roundtrip;
mod s3;
mod scouter;
mod self_check;
mod service;
mod settings;
mod shutdown;
mod storage;
mod stores;
mod strangers;
mod tidy;
mod unarchived;
mod values;
mod verify;
mod versions;
mod waiting;
mod wide;
mod windows;
mod writers;
