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

mod big;
mod connection;
mod crash;
mod idle;
mod partition;
mod reader;
mod self_check;
mod shutdown;
mod storage;
mod tidy;
mod values;
mod writers;
