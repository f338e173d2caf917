//! The hops of a row, each alone: decode, batch, encode. No I/O, so that a change of a hop shows even where the walsender
//! hides it. The inputs come from a fixed seed.
//!
//! `cargo bench --bench hops -- encode` runs a part of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a bench panics when something is not as it must be"
)]

mod input;

use std::hint::black_box;
use std::time::Duration;

use arrow::record_batch::RecordBatch;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement};
use highwater::Lsn;
use highwater::archive;
use highwater::batch::{Batches, Cell, EntityId, TextId};
use highwater::decode::{Decoder, Inserted};
use highwater::pgoutput::Message;
use highwater::postgres::{Chunk, Frame};
use highwater::tables::{self, Kind, PerKind, WindowWidth};

use input::{Input, NOW, ROW_COUNT, Table};

/// What a row takes in the columns of a batch: time, series, and a double or two integers.
const COLUMN_BYTES: u64 = 8 + 4 + 8;

fn group<'a>(
    criterion: &'a mut Criterion,
    name: &str,
    byte_count: u64,
) -> BenchmarkGroup<'a, measurement::WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::ElementsAndBytes { elements: ROW_COUNT as u64, bytes: byte_count });
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4));
    group
}

fn empty() -> Batches {
    Batches::new(WindowWidth::HOUR, NOW)
}

/// What the builder does with a chunk, without its waiting.
fn decode(chunk: &Chunk, input: &Input) -> Batches {
    let mut decoder = Decoder::new("scouter", &Kind::drift());
    let positions = PerKind::new(Kind::drift(), |_| Lsn::ZERO);
    let mut batches = empty();
    for frame in chunk.frames() {
        let Frame::XLogData { message, .. } = frame.unwrap() else { continue };
        match Message::parse(message).unwrap() {
            Message::Insert(insert) => {
                while let Inserted::UnknownEntity(id) = decoder.insert(&insert, &mut batches).unwrap() {
                    let entity = &input.entities[usize::try_from(id).unwrap() - 1];
                    decoder.resolve(id, Some(entity.clone()));
                }
            }
            Message::Begin(begin) => decoder.begin(begin, &positions),
            Message::Relation(relation) => drop(decoder.relation(&relation)),
            Message::Commit(_)
            | Message::Update(_)
            | Message::Delete(_)
            | Message::Logical(_)
            | Message::Other(_) => {}
        }
    }
    batches
}

fn bench_decode(criterion: &mut Criterion) {
    let input = Input::new();
    for table in [Table::PsiById, Table::PsiNamed, Table::CustomById] {
        let chunk = input.stream(table);
        let batches = decode(&chunk, &input);
        assert_eq!(batches.row_count(), ROW_COUNT as u64, "every row is decoded");
        let mut group = group(criterion, "decode", chunk.byte_count() as u64);
        group.bench_function(table.name(), |bencher| bencher.iter(|| decode(black_box(&chunk), &input)));
        group.finish();
    }
}

/// The input's entities and series as numbers of some batches.
fn intern(batches: &mut Batches, input: &Input) -> (Vec<EntityId>, Vec<TextId>) {
    let entities = input.entities.iter().map(|tables::Entity { space, name, version }| {
        batches.entity(&[space.as_bytes(), name.as_bytes(), version.as_bytes()]).unwrap()
    });
    let entities = entities.collect();
    (entities, input.series.iter().map(|text| batches.text(text.as_bytes()).unwrap()).collect())
}

fn push(input: &Input, kind: Kind) -> Batches {
    let mut batches = empty();
    let (entities, series) = intern(&mut batches, input);
    for row in &input.rows {
        let (entity, series) = (entities[row.entity], series[row.series]);
        let bin = [Cell::Text(series), Cell::Int(row.bin_id), Cell::Int(row.bin_count)];
        let value = [Cell::Text(series), Cell::Double(row.value)];
        let cells = if kind == Kind::psi() { &bin[..] } else { &value[..] };
        batches.push(kind, entity, row.created_at, cells);
    }
    batches
}

fn bench_batch(criterion: &mut Criterion) {
    for (order, input) in [("in order", Input::new()), ("shuffled", Input::new().shuffled())] {
        let mut group = group(criterion, "batch", ROW_COUNT as u64 * COLUMN_BYTES);
        group.bench_function(format!("push {order}"), |bencher| {
            bencher.iter(|| push(black_box(&input), Kind::psi()));
        });
        let batches = push(&input, Kind::psi());
        group.bench_function(format!("sort {order}"), |bencher| {
            bencher.iter(|| sorted(black_box(&batches)));
        });
        group.finish();
    }
}

/// All files of some batches, as the encoder gets them.
fn sorted(batches: &Batches) -> Vec<Vec<RecordBatch>> {
    batches.files().iter().map(|file| file.record_batches().map(Result::unwrap).collect()).collect()
}

fn encode(kind: Kind, files: &[Vec<RecordBatch>]) -> usize {
    let encoded = files.iter().map(|file| archive::encode(kind, file.iter().cloned()).unwrap().unwrap());
    encoded.map(|file| file.bytes.len()).sum()
}

fn bench_encode(criterion: &mut Criterion) {
    let input = Input::new();
    for kind in [Kind::psi(), Kind::custom()] {
        let files = sorted(&push(&input, kind));
        let mut group = group(criterion, "encode", ROW_COUNT as u64 * COLUMN_BYTES);
        group.bench_function(kind.name(), |bencher| bencher.iter(|| encode(kind, black_box(&files))));
        group.finish();
    }
}

criterion_group!(hops, bench_decode, bench_batch, bench_encode);
criterion_main!(hops);
