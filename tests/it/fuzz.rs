//! No bytes make the decoder panic: recorded streams, whole, cut, spliced and with bytes changed. The same
//! without bounds is in `fuzz/`.

use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use highwater::postgres::Chunk;
use highwater::tables::Kind;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::roundtrip::{NOW_MICROS, decoded_rows};
use crate::support::schema::Shape;
use crate::support::stream::{decode, join, messages, tables};

/// Mutants of each recorded stream; a few seconds in all.
const ROUNDS: u32 = 400;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn name(shape: Shape, binary: bool) -> String {
    let shape = match shape {
        Shape::Named => "named",
        Shape::Entity => "by-id",
    };
    format!("pgoutput-{shape}-{}", if binary { "binary" } else { "text" })
}

/// Keeps a recorded stream, the rows that it decodes to, and both as seeds for the fuzzer.
pub(crate) fn record(shape: Shape, binary: bool, stream: &[u8]) {
    let name = name(shape, binary);
    fs::write(golden(&format!("{name}.bin")), stream).unwrap();
    fs::write(golden(&format!("{name}.rows")), rows(stream)).unwrap();
    for (target, seed) in [("pgoutput", stream.to_vec()), ("frames", frames(&messages(stream)))] {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(&name), seed).unwrap();
    }
}

/// All rows of a stream as text, a line each. Entities that it does not bring are not found.
fn rows(stream: &[u8]) -> String {
    let decoded = decode(&messages(stream), NOW_MICROS, |_| None);
    assert_eq!(decoded.refused, Vec::<String>::new());
    let lines = Kind::drift().into_iter().chain([Kind::quarantine()]).flat_map(|kind| {
        let rows = decoded_rows(&decoded, kind).into_iter();
        rows.map(move |row| format!("{}: {row}\n", kind.name()))
    });
    lines.collect()
}

/// The messages as the server frames them, with a keepalive after each tenth.
fn frames(messages: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut frame = |body: &[u8]| {
        bytes.push(b'd');
        bytes.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        bytes.extend(body);
    };
    for (number, message) in messages.iter().enumerate() {
        frame(&[&b"w"[..], &[0; 24], message].concat());
        if number % 10 == 9 {
            frame(&[&b"k"[..], &[0; 16], &[u8::from(number % 20 == 9)]].concat());
        }
    }
    bytes
}

fn recorded() -> Vec<(String, Vec<u8>)> {
    let all = [(Shape::Named, false), (Shape::Named, true), (Shape::Entity, false), (Shape::Entity, true)];
    let read = |(shape, binary)| {
        let name = name(shape, binary);
        let stream =
            fs::read(golden(&format!("{name}.bin"))).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, stream)
    };
    all.into_iter().map(read).collect()
}

#[test]
fn recorded_streams_decode_as_ever() {
    for (name, stream) in recorded() {
        let expected = fs::read_to_string(golden(&format!("{name}.rows"))).unwrap();
        assert!(rows(&stream) == expected, "{name} decodes to other rows than it did");
        assert!(
            expected.lines().count() >= 100 && expected.contains("quarantine: "),
            "{name} holds too little"
        );
    }
}

#[test]
fn recorded_streams_come_out_of_their_frames_whole() {
    use highwater::postgres::Frame;
    for (name, stream) in recorded() {
        let messages = messages(&stream);
        let chunk = Chunk::new(Bytes::from(frames(&messages)));
        let found = chunk.frames().filter_map(|frame| match frame.unwrap() {
            Frame::XLogData { message, .. } => Some(message),
            Frame::Keepalive { .. } => None,
        });
        assert_eq!(found.collect::<Vec<_>>(), messages, "{name}");
    }
}

/// Numbers that lengths and counts go wrong at.
const EDGES: [u32; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];

fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..5) {
        if bytes.is_empty() {
            return;
        }
        let place = rng.random_range(0..bytes.len());
        match rng.random_range(0..7) {
            0 => bytes[place] = rng.random(),
            1 => bytes[place] ^= 1 << rng.random_range(0..8),
            2 => bytes.truncate(place),
            3 => drop(bytes.drain(place..bytes.len().min(place + rng.random_range(1..9)))),
            4 => bytes.insert(place, rng.random()),
            5 => {
                let edge = EDGES[rng.random_range(0..EDGES.len())].to_be_bytes();
                bytes.iter_mut().skip(place).zip(edge).for_each(|(byte, edge)| *byte = edge);
            }
            _ => {
                let from = rng.random_range(0..other.len());
                let piece = &other[from..other.len().min(from + rng.random_range(1..40))];
                bytes.splice(place..place, piece.iter().copied());
            }
        }
    }
}

fn seed() -> u64 {
    // Fixed, so that a change of the code is what makes a difference; FUZZ_SEED tries others.
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    eprintln!("fuzz: FUZZ_SEED={seed}");
    seed
}

#[test]
fn no_mutant_of_a_stream_makes_the_decoder_panic() {
    let mut rng = StdRng::seed_from_u64(seed());
    let streams = recorded();
    let (mut refused, mut kept) = (0, 0);
    for (_, stream) in &streams {
        let whole = messages(stream);
        for _ in 0..ROUNDS {
            let other = &streams[rng.random_range(0..streams.len())].1;
            // Each message on its own, so that the lengths between them stay right and the mutants get deep.
            let mut mutants: Vec<Vec<u8>> = whole.iter().map(|message| message.to_vec()).collect();
            for _ in 0..rng.random_range(1..20) {
                let place = rng.random_range(0..mutants.len());
                mutate(&mut mutants[place], other, &mut rng);
            }
            let messages: Vec<&[u8]> = mutants.iter().map(Vec::as_slice).collect();
            let decoded = decode(&messages, NOW_MICROS, |_| None);
            refused += decoded.refused.len();
            kept += tables(&decoded.batches).iter().map(|(_, batch)| batch.num_rows()).sum::<usize>();
            assert_eq!(messages.len(), self::messages(&join(messages.iter().copied())).len());
        }
    }
    assert!(refused > 1_000 && kept > 10_000, "the mutants are too wild or too tame: {refused}, {kept}");
}

#[test]
fn no_mutant_of_a_frame_makes_the_splitter_panic() {
    let mut rng = StdRng::seed_from_u64(seed());
    for (_, stream) in recorded() {
        let whole = frames(&messages(&stream));
        for _ in 0..ROUNDS * 5 {
            let start = rng.random_range(0..whole.len());
            let mut bytes = whole[..start.max(1)].to_vec();
            mutate(&mut bytes, &whole, &mut rng);
            let chunk = Chunk::new(Bytes::from(bytes));
            let mut frames = chunk.frames();
            let results: Vec<bool> = frames.by_ref().map(|frame| frame.is_ok()).collect();
            assert!(results.iter().rev().skip(1).all(|ok| *ok), "nothing comes after an error");
            assert!(frames.next().is_none());
        }
    }
}
