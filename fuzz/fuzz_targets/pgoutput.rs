//! A recorded stream with anything done to it: messages, rows, batches and record batches, without a panic.
#![no_main]

#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../tests/support/stream.rs"]
mod stream;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let messages = stream::messages(bytes);
    let decoded = stream::decode(&messages, 1_795_000_000_000_000, |_| None);
    let rows: usize = stream::tables(&decoded.batches).iter().map(|(_, batch)| batch.num_rows()).sum();
    assert_eq!(rows as u64, decoded.batches.row_count(), "no row comes out twice, or not at all");
});
