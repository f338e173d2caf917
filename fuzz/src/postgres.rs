//! What the splitter of frames needs of `highwater::postgres`.

#[path = "../../src/postgres/frame.rs"]
mod frame;
#[path = "../../src/postgres/wire.rs"]
mod wire;

/// In the place of real sockets.
mod socket {
    pub(super) type Socket = tokio::io::DuplexStream;
}

pub use frame::{Chunk, Frame, Frames};
