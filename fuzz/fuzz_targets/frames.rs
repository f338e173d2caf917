//! Bytes that should be frames: they are split without a panic, and never into more than there are.
#![no_main]

use highwater::postgres::{Chunk, Frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let chunk = Chunk::new(bytes.to_vec().into());
    let mut taken = 0;
    for frame in chunk.frames() {
        match frame {
            Ok(Frame::XLogData { message, .. }) => taken += message.len() + 30,
            Ok(Frame::Keepalive { .. }) => taken += 23,
            Err(_) => break,
        }
    }
    assert!(taken <= bytes.len());
});
