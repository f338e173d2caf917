use std::collections::HashSet;

use tokio::sync::{mpsc, watch};

use crate::archive::{self, HourSums, Multiset};
use crate::batch::Batches;
use crate::config::Config;
use crate::decode::{Decoder, Inserted};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::pgoutput::{Begin, Insert, Message};
use crate::postgres::{Chunk, Encoding, Frame, Session};
use crate::sidecar::builder::malformed;
use crate::source::TemporarySlot;
use crate::source::lookup::Lookup;
use crate::tables::{Kind, PerKind};
use crate::watermark;

/// Chunks between the receiver and the decoder.
const CHUNKS_MAX: usize = 8;

/// Memory that the digest of one row takes, with its time.
const ROW_BYTES: usize = 32;

/// What was committed between the snapshot and the archive's position: times and digests of rows, by kind.
pub(super) struct Tail {
    rows: PerKind<Vec<(i64, u128)>>,
}

impl Tail {
    /// Streams from the slot, which stands at `from`, up to each kind's position.
    pub(super) async fn read(
        config: &Config,
        slot: TemporarySlot,
        from: Lsn,
        upto: PerKind<Lsn>,
        compared: PerKind<Kind>,
    ) -> Result<Self> {
        let mut reader = Reader {
            config,
            decoder: Decoder::new(&config.schema, &config.kinds()),
            lookup: Lookup::new(Session::new(config.source.clone()), &config.schema),
            batches: Batches::new(config.window, chrono::Utc::now().timestamp_micros()),
            last: upto.iter().map(|(_, lsn)| *lsn).max().unwrap_or_default(),
            upto,
            compared,
            in_transaction: false,
            foreign: HashSet::new(),
            encoding: Encoding::Utf8,
            tail: Self { rows: PerKind::new(config.kinds(), |_| Vec::new()) },
        };
        if reader.last <= from {
            return Ok(reader.tail);
        }
        let encoding = reader.lookup.sql().run(Encoding::of_database).await?;
        let (statement, texts) = encoding.streamed(&config.publication);
        let mut connection = slot.connection;
        if let Some(statement) = statement {
            connection.query(statement).await?;
        }
        if texts == Encoding::Other {
            reader.decoder.ask_for_texts();
        }
        reader.encoding = texts;
        let stream = connection.start(&slot.name, std::slice::from_ref(&config.publication), false).await?;
        let stream = stream.holding(config.row_bytes_max());
        let (sender, mut chunks) = mpsc::channel(CHUNKS_MAX);
        // Nothing is ever acknowledged: the slot goes with its connection.
        let (_durable, durable) = watch::channel(Lsn::ZERO);
        let mut receiver = stream.spawn(sender, durable);
        while let Some(chunk) = chunks.recv().await {
            if reader.take(&chunk).await? {
                reader.add_up()?;
                return Ok(reader.tail);
            }
        }
        receiver.ended().await?;
        Err(Error::Internal("the stream from the snapshot's point ended early".to_owned()))
    }

    /// The rows of a kind whose time lies in a range, added up.
    pub(super) fn sums(&self, kind: Kind, range: (i64, i64)) -> HourSums {
        archive::sums_of(self.of(kind).iter().filter(|row| range.0 <= row.0 && row.0 < range.1).copied())
    }

    /// How many they are.
    pub(super) fn rows(&self, kind: Kind, range: (i64, i64)) -> u64 {
        self.sums(kind, range).values().map(|sum| sum.rows).sum()
    }

    /// Takes the rows of a time out of what the archive holds; returns how many it lacks.
    pub(super) fn missing(&self, kind: Kind, range: (i64, i64), present: &mut Multiset) -> u64 {
        let rows = self.of(kind).iter().filter(|row| range.0 <= row.0 && row.0 < range.1);
        rows.filter(|(_, digest)| !present.take(*digest)).count() as u64
    }

    fn of(&self, kind: Kind) -> &[(i64, u128)] {
        self.rows.get(kind).map_or(&[], Vec::as_slice)
    }
}

struct Reader<'a> {
    config: &'a Config,
    decoder: Decoder,
    lookup: Lookup,
    batches: Batches,
    upto: PerKind<Lsn>,
    /// How the rows of each kind are compared.
    compared: PerKind<Kind>,
    /// The farthest of them.
    last: Lsn,
    in_transaction: bool,
    /// Tables that are none of ours.
    foreign: HashSet<u32>,
    /// That of names.
    encoding: Encoding,
    tail: Tail,
}

impl Reader<'_> {
    /// Whether all that is wanted has been read.
    async fn take(&mut self, chunk: &Chunk) -> Result<bool> {
        for frame in chunk.frames() {
            match frame? {
                Frame::XLogData { message, .. } => match Message::parse(message).map_err(malformed)? {
                    Message::Begin(begin) if begin.final_lsn >= self.last => return Ok(true),
                    Message::Begin(begin) => {
                        self.in_transaction = true;
                        self.begin(begin);
                    }
                    Message::Insert(insert) => self.insert(&insert).await?,
                    Message::Relation(relation) => {
                        self.foreign.remove(&relation.oid);
                        drop(self.lookup.relation(&mut self.decoder, &relation, self.encoding).await?);
                    }
                    Message::Commit(commit) if commit.end_lsn >= self.last => return Ok(true),
                    Message::Commit(_) => self.in_transaction = false,
                    // Tables whose rows change are compared without the tail.
                    Message::Update(_) | Message::Delete(_) | Message::Logical(_) | Message::Other(_) => {}
                },
                // Everything before this position has been sent.
                Frame::Keepalive { wal_end, .. } if wal_end >= self.last && !self.in_transaction => {
                    return Ok(true);
                }
                Frame::Keepalive { .. } => {}
            }
        }
        Ok(false)
    }

    /// The archive has the transactions whose commit record begins before its position; so those are wanted.
    fn begin(&mut self, begin: Begin) {
        let is_wanted = |kind| self.upto.get(kind).is_some_and(|upto| begin.final_lsn < *upto);
        let skip_before = |kind| if is_wanted(kind) { Lsn::ZERO } else { Lsn(u64::MAX) };
        let all = PerKind::new(self.config.all_kinds(), skip_before);
        self.decoder.begin(begin, &all);
    }

    async fn insert(&mut self, insert: &Insert<'_>) -> Result<()> {
        // Also within a transaction, which may be larger than memory.
        if self.batches.byte_count() >= self.config.batch_bytes_max() {
            self.add_up()?;
        }
        loop {
            match self.decoder.insert(insert, &mut self.batches).map_err(malformed)? {
                Inserted::Done | Inserted::Quarantined => return Ok(()),
                Inserted::NotArchived => {
                    let relation = insert.relation;
                    if self.foreign.contains(&relation) {
                        return Ok(());
                    }
                    let root = async |client: &_| watermark::archived_root(client, relation).await;
                    let root = self.lookup.sql().run(root).await?;
                    let known = root.and_then(|(name, kind)| Some((name, self.config.kind(&kind)?)));
                    let Some((name, kind)) = known else {
                        self.foreign.insert(relation);
                        return Ok(());
                    };
                    self.decoder.adopt(relation, kind, &name);
                }
                asked => self.lookup.answer(&mut self.decoder, asked).await?,
            }
        }
    }

    /// Keeps the digests of the rows so far.
    fn add_up(&mut self) -> Result<()> {
        let empty = Batches::new(self.config.window, chrono::Utc::now().timestamp_micros());
        let batches = std::mem::replace(&mut self.batches, empty);
        for rows in batches.files().iter().filter(|rows| !rows.kind().is_quarantine()) {
            let kind = rows.kind();
            let compared = self.compared.get(kind).copied().unwrap_or(kind);
            let Some(place) = self.tail.rows.get_mut(kind) else { continue };
            for batch in rows.record_batches() {
                archive::each_digest(compared, &batch?, |time, digest| place.push((time, digest)))?;
            }
        }
        let rows: usize = self.tail.rows.iter().map(|(_, rows)| rows.len()).sum();
        if rows.saturating_mul(ROW_BYTES) <= self.config.memory_bytes / 3 {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "HIGHWATER_MEMORY".to_owned(),
            value: self.config.memory_bytes.to_string(),
            accepted: format!(
                "more, or verify at a quieter time: {rows} rows were written before the archive had passed the point that it \
                 is compared at"
            ),
        })
    }
}
