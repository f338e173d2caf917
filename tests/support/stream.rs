//! Recorded streams, and the decoder driven over them as the sidecar drives it; shared with the fuzz targets.

use arrow::array::RecordBatch;
use highwater::batch::Batches;
use highwater::decode::{Decoder, Inserted};
use highwater::lsn::Lsn;
use highwater::pgoutput::Message;
use highwater::tables::{Entity, Kind, PerKind, WindowWidth};

/// A recorded stream: each message behind its length, 32 bits, big-endian.
pub fn join<'a>(messages: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut stream = Vec::new();
    for message in messages {
        stream.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
        stream.extend(message);
    }
    stream
}

/// The messages of a recorded stream. A length that promises too much, as fuzzers write it, means the rest.
pub fn messages(mut stream: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some((length, rest)) = stream.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX).min(rest.len());
        let (message, rest) = rest.split_at(length);
        found.push(message);
        stream = rest;
    }
    found
}

/// What became of the messages of a stream.
#[derive(Debug)]
pub struct Decoded {
    /// The rows.
    pub batches: Batches,
    /// What was refused, in words. The sidecar would end its session at the first.
    pub refused: Vec<String>,
}

/// Decodes all messages, also those after one that is refused. An entity that the stream does not bring is
/// looked up with `find`.
pub fn decode(messages: &[&[u8]], now_micros: i64, find: impl Fn(i64) -> Option<Entity>) -> Decoded {
    let mut decoder = Decoder::new("scouter", &Kind::drift());
    let mut batches = Batches::new(WindowWidth::HOUR, now_micros);
    let mut refused = Vec::new();
    for bytes in messages {
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(error) => {
                refused.push(error.to_string());
                continue;
            }
        };
        match message {
            Message::Begin(begin) => decoder.begin(begin, &PerKind::new(Kind::drift(), |_| Lsn::ZERO)),
            Message::Relation(relation) => drop(decoder.relation(&relation)),
            Message::Insert(insert) => loop {
                match decoder.insert(&insert, &mut batches) {
                    Ok(Inserted::UnknownEntity(id)) => decoder.resolve(id, find(id)),
                    Ok(_) => break,
                    Err(error) => {
                        refused.push(error.to_string());
                        break;
                    }
                }
            },
            Message::Commit(_)
            | Message::Update(_)
            | Message::Delete(_)
            | Message::Logical(_)
            | Message::Other(_) => {}
        }
    }
    Decoded { batches, refused }
}

/// The rows as the files that would be written, with plain columns in the place of dictionaries.
pub fn tables(batches: &Batches) -> Vec<(Kind, RecordBatch)> {
    let mut tables = Vec::new();
    for file in batches.files() {
        for batch in file.record_batches() {
            let batch = batch.expect("a record batch");
            let schema = file.kind().schema();
            let columns = batch.columns().iter().zip(schema.fields());
            let columns = columns.map(|(column, field)| {
                arrow::compute::cast(column, field.data_type()).expect("plain columns")
            });
            let plain = RecordBatch::try_new(schema.clone(), columns.collect()).expect("the kind's columns");
            tables.push((file.kind(), plain));
        }
    }
    tables
}
