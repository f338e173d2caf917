//! The pure layers of Highwater, compiled from its own sources under its own name, so that fuzz targets build
//! in minutes.

#![allow(dead_code, unused_imports, unreachable_pub, reason = "a part of a crate")]

#[path = "../../src/batch/mod.rs"]
pub mod batch;
#[path = "../../src/decode/mod.rs"]
pub mod decode;
#[path = "../../src/lsn.rs"]
pub mod lsn;
#[path = "../../src/pgoutput/mod.rs"]
pub mod pgoutput;
#[path = "../../src/record/mod.rs"]
pub mod record;

pub use error::{Error, Result};
pub use lsn::Lsn;

/// What the splitter of frames needs of `highwater::postgres`.
pub mod postgres {
    #[path = "../../../src/postgres/frame.rs"]
    mod frame;
    #[path = "../../../src/postgres/wire.rs"]
    mod wire;

    /// In the place of real sockets.
    mod socket {
        pub(super) type Socket = tokio::io::DuplexStream;
    }

    pub use frame::{Chunk, Frame, Frames};
}

/// In the place of the crate's error, whose other variants hold the storage libraries' errors.
pub mod error {
    pub type Result<T, E = Error> = std::result::Result<T, E>;

    #[derive(Debug, thiserror::Error)]
    pub enum Error {
        #[error("{context}")]
        Io { context: String, source: std::io::Error },
        #[error("{context}: {message} ({code})")]
        Server { context: String, message: String, code: String },
        #[error("{context}: {detail}")]
        Protocol { context: String, detail: String },
        #[error("{slot}: {detail}")]
        Slot { slot: String, detail: String, transient: bool },
        #[error("{0}")]
        Internal(String),
    }

    impl Error {
        pub fn io(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
            let context = context.into();
            move |source| Self::Io { context, source }
        }
    }
}
