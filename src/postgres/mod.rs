//! PostgreSQL over the wire: sockets and TLS, plain SQL sessions, and the walsender connection.
//!
//! Plain SQL goes through `tokio-postgres`. It has no mode for streaming replication, so that connection is our own; and so
//! are the sessions that read rows by the million (`copy`), where the library's work for each message counts. All come
//! through one door: `connection` chooses the server, logs in, and sets what a session relies on (`settings`); the library gets
//! what is ready for its first statement.
//!
//! Must not know drift tables, batches or the archive.

mod certificate;
mod connection;
mod copy;
mod encoding;
mod frame;
mod long;
mod pace;
mod patience;
mod quote;
mod receiver;
mod replication;
mod session;
mod settings;
mod socket;
pub mod sql;
mod startup;
mod tls;
mod wire;

pub(crate) use connection::is_standby;
pub(crate) use copy::{CopyConnection, CopyOut};
pub(crate) use encoding::Encoding;
pub use frame::{Chunk, Frame, Frames};
pub(crate) use quote::{quote_identifier, quote_literal};
pub(crate) use receiver::NO_PUBLICATION;
pub use receiver::Receiver;
pub use replication::{ReplicationConnection, ReplicationStream};
pub(crate) use session::Session;
pub(crate) use settings::READING;
pub use socket::Socket;
