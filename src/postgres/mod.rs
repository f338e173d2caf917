//! PostgreSQL over the wire: sockets and TLS, plain SQL sessions, and the walsender connection.
//!
//! Plain SQL goes through `tokio-postgres`. It has no mode for streaming replication, so that connection is our own; and so
//! are the sessions that read rows by the million (`copy`), where the library's work for each message counts. All use the same
//! [`SourceConfig`](crate::config::SourceConfig) and the same [`Socket`].
//!
//! Must not know drift tables, batches or the archive.

mod connection;
mod copy;
mod encoding;
mod frame;
mod pace;
mod receiver;
mod replication;
mod session;
mod socket;
pub mod sql;
mod startup;
mod tls;
mod wire;

pub(crate) use copy::{CopyConnection, CopyOut};
pub(crate) use encoding::Encoding;
pub use frame::{Chunk, Frame, Frames};
pub use receiver::Receiver;
pub use replication::{ReplicationConnection, ReplicationStream};
pub(crate) use replication::{quote_identifier, quote_literal};
pub(crate) use session::Session;
pub use socket::Socket;
