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

pub mod postgres;

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
        #[error("{context}")]
        Encode { context: String, source: Box<dyn std::error::Error + Send + Sync> },
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
