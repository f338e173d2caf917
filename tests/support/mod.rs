//! What the tests, the demo and the benches share: throw-away servers, drift tables, load, the real
//! binary as a child process, and a reader of the archive that shares no code with the writer.
//!
//! Everything here panics with a text that says what to do; a missing server is a failure.

#![allow(dead_code, reason = "each of the programs that include this uses a part of it")]
#![allow(unreachable_pub, reason = "a module tree that several programs include is pub towards them")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::too_many_lines,
    reason = "support of tests may panic, and reports on stderr"
)]

pub mod archive;
pub mod browser;
pub mod cluster;
pub mod freeze;
pub mod http;
pub mod load;
pub mod proxy;
pub mod s3;
pub mod schema;
pub mod shadow;
pub mod sidecar;
pub mod stage;
pub mod store;
pub mod stream;
pub mod tmpfs;
pub mod wait;
