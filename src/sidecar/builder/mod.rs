//! The builder: the task that turns the stream into checkpoints.
//!
//! ```text
//! chunk of frames -> message -> row -> batches -- cut --> Work -> committer
//! ```
//!
//! A checkpoint is cut at a commit boundary when the oldest row in it is nearly as old as `max_lag`, when its
//! rows fill a third of the memory (one is built, one waits, one is being written), when a window of time
//! ends, and when somebody asks: a shutdown of ours, a server that shuts down and waits for us, or a transaction with a
//! logical message for us ([`slot::ask_for_checkpoint`](crate::source::slot::ask_for_checkpoint)). Who can read
//! `highwater.request_key` may send such a message: one is answered when the committer has room, a second after the last one at the earliest, and those that come
//! meanwhile are answered together.
//!
//! # Why a keepalive may move our position
//!
//! The server sends transactions in the order of their commit records, each whole, and a keepalive carries
//! the position that it has decoded up to. So when no transaction is open and no row is pending, everything
//! committed before that position has been handed on to the committer or was not ours, and since the
//! committer works in order, the position may be recorded after whatever is queued there.

mod counted;
mod shapes;
mod texts;

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::committer::{Range, Work};
use super::timing::{has_room_at, now, time_to_cut};
use crate::batch::Batches;
use crate::config::Config;
use crate::decode::{Decoder, InsertError, Inserted};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::pgoutput::{Begin, Commit, Delete, Message, Update};
use crate::postgres::{Chunk, Frame, Session};
use crate::source::lookup::Lookup;
use crate::source::slot::{self, MESSAGE_PREFIX, Messages};
use crate::tables::{Kind, PerKind, WindowWidth};
use crate::vitals::Vitals;
pub(crate) use texts::Texts;

/// A position that only keepalives moved is recorded when it is this much further, the size of the smallest
/// part of the log that the server can remove being 16 MiB: far more than our own recording writes, so that
/// an idle server and an idle sidecar don't keep each other awake.
const IDLE_ADVANCE_BYTES: u64 = 1 << 20;

/// ... and at most so often: each costs a write in the source database.
const IDLE_INTERVAL: Duration = Duration::from_secs(10);

/// Shortest time between two answers to those who ask for a checkpoint: each makes files, and everybody may ask.
const ANSWER_INTERVAL: Duration = Duration::from_secs(1);

/// How long a stop waits for the end of a transaction that is being received. Its rows come again otherwise.
const TRANSACTION_END_WAIT: Duration = Duration::from_secs(5);

/// How long a stop waits for the server to have passed what we have written ourselves.
const LAST_POSITION_WAIT: Duration = Duration::from_secs(3);

/// The builder's state.
pub(crate) struct Builder {
    lookup: Lookup,
    decoder: Decoder,
    batches: Batches,
    window: WindowWidth,
    max_lag: Duration,
    batch_bytes_max: usize,
    table_lsn: PerKind<Lsn>,
    work: mpsc::Sender<Work>,
    /// The transaction that is being received.
    open: Option<Begin>,
    /// Whether pieces of it were handed on, so that its commit must follow.
    in_pieces: bool,
    /// The committed transactions since the last checkpoint that had rows for us.
    range: Option<Range>,
    /// When the checkpoint must be cut.
    deadline: Option<Instant>,
    /// The newest keepalive's position while nothing is pending.
    idle: Option<Lsn>,
    /// The position last handed on, and when.
    recorded: (Lsn, Instant),
    /// Whether rows were handed on since: their horizon waits to be published.
    horizon_waits: bool,
    /// The open transaction asks for a checkpoint.
    asked: bool,
    /// Where the last transaction that asked for a checkpoint ends, until it is answered.
    wanted: Option<Lsn>,
    /// What messages for us say.
    messages: Messages,
    /// When it may be answered.
    answer_at: Instant,
    quarantined: u64,
    /// Transactions that were received since they were last counted.
    transactions: u64,
    publication: String,
    schema: String,
    kinds: Vec<Kind>,
    /// Tables that are none of ours.
    foreign: HashSet<u32>,
    texts: Texts,
    vitals: Vitals,
}

impl Builder {
    /// A builder for a session whose tables have these LSNs, and whose slot stands at
    /// `start`. Rows are read with the decoder; `messages` is what those for us say.
    pub(crate) fn new(
        config: &Config,
        (sql, vitals): (Session, &Vitals),
        table_lsn: PerKind<Lsn>,
        start: Lsn,
        work: mpsc::Sender<Work>,
        (decoder, texts, messages): (Decoder, Texts, Messages),
    ) -> Self {
        Self {
            lookup: Lookup::new(sql, &config.schema),
            decoder,
            batches: Batches::new(config.window, now()),
            window: config.window,
            max_lag: config.max_lag,
            batch_bytes_max: config.batch_bytes_max(),
            table_lsn,
            work,
            open: None,
            in_pieces: false,
            range: None,
            deadline: None,
            idle: None,
            recorded: (start, Instant::now()),
            horizon_waits: false,
            asked: false,
            wanted: None,
            answer_at: Instant::now(),
            quarantined: 0,
            transactions: 0,
            publication: config.publication.clone(),
            schema: config.schema.clone(),
            kinds: config.kinds(),
            foreign: HashSet::new(),
            texts,
            messages,
            vitals: vitals.clone(),
        }
    }

    /// Works until the stream ends or `stop` says so; then cuts a last checkpoint. Priorities, highest first:
    ///
    /// 1. a stop;
    /// 2. a checkpoint, or an idle position, that is due;
    /// 3. a checkpoint that was asked for, if the committer has room for it;
    /// 4. the stream.
    ///
    /// # Errors
    ///
    /// The stream is not what it should be, or an entity could not be looked up. Rows since the last
    /// checkpoint are then given up; they come again.
    pub(crate) async fn run(
        mut self,
        mut chunks: mpsc::Receiver<Chunk>,
        stop: impl Future<Output = ()>,
    ) -> Result<()> {
        let mut stop = pin!(stop);
        let work = self.work.clone();
        loop {
            let due = self.due();
            tokio::select! {
                biased;
                // 1.
                () = &mut stop => break,
                // 2.
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    self.fall_due().await?;
                }
                // 3.
                () = has_room_at(&work, self.answer_at), if self.wanted.is_some() && self.open.is_none() => {
                    self.answer().await?;
                }
                // 4.
                chunk = chunks.recv() => match chunk {
                    Some(chunk) => self.take(&chunk).await?,
                    None => return Ok(()),
                },
            }
        }
        // What has been received belongs to the last checkpoint.
        for _ in 0..chunks.len() {
            if let Ok(chunk) = chunks.try_recv() {
                self.take(&chunk).await?;
            }
        }
        let deadline = Instant::now() + TRANSACTION_END_WAIT;
        while self.open.is_some() {
            tokio::select! {
                biased;
                () = sleep_until(deadline) => return Err(unfinished()),
                chunk = chunks.recv() => match chunk {
                    Some(chunk) => self.take(&chunk).await?,
                    None => return Ok(()),
                },
            }
        }
        self.cut().await?;
        self.answer().await?;
        timeout(LAST_POSITION_WAIT, self.catch_up_with_itself(&mut chunks)).await.unwrap_or(Ok(()))
    }

    /// Passes the watermark rows that the last checkpoint has written, too: a server that is upgraded wants a slot before which
    /// nothing is left (`pg_upgrade`). So this position is only in the archive's logs; the next session takes it from there.
    async fn catch_up_with_itself(&mut self, chunks: &mut mpsc::Receiver<Chunk>) -> Result<()> {
        let (done, written) = oneshot::channel();
        self.hand_on(Work::Tell(done)).await?;
        // The committer that is gone tells why itself.
        let Ok(()) = written.await else { return Ok(()) };
        let end = match self.lookup.sql().run(slot::wal_end).await {
            Ok(end) => end,
            Err(error) => {
                tracing::debug!(error = error.chain(), "the end of the log is not known");
                return Ok(());
            }
        };
        // The server tells its position as soon as it is past what we have acknowledged.
        while self.range.is_none() && self.idle.is_none_or(|idle| idle < end) {
            let Some(chunk) = chunks.recv().await else { return Ok(()) };
            self.take(&chunk).await?;
        }
        match self.idle {
            Some(lsn) if self.open.is_none() && self.range.is_none() => {
                self.hand_on(Work::Last { lsn }).await
            }
            _ => Ok(()),
        }
    }

    /// When [`Builder::fall_due`] has something to do.
    fn due(&self) -> Option<Instant> {
        if self.open.is_none() && self.deadline.is_some() {
            return self.deadline;
        }
        let moved = self.idle?.bytes_since(self.recorded.0);
        (moved >= IDLE_ADVANCE_BYTES || (moved > 0 && self.horizon_waits))
            .then(|| self.recorded.1 + IDLE_INTERVAL)
    }

    async fn fall_due(&mut self) -> Result<()> {
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.cut().await
        } else {
            self.record_idle().await
        }
    }

    async fn take(&mut self, chunk: &Chunk) -> Result<()> {
        for frame in chunk.frames() {
            match frame? {
                Frame::XLogData { message, .. } => self.message(message).await?,
                Frame::Keepalive { wal_end, reply_requested } => {
                    self.keepalive(wal_end, reply_requested).await?
                }
            }
        }
        self.count(chunk);
        Ok(())
    }

    #[inline]
    async fn message(&mut self, bytes: &[u8]) -> Result<()> {
        match Message::parse(bytes).map_err(malformed)? {
            Message::Insert(insert) => {
                self.row(insert.relation, |decoder, batches| decoder.insert(&insert, batches)).await
            }
            Message::Begin(begin) => {
                self.decoder.begin(begin, &self.table_lsn);
                self.open = Some(begin);
                self.idle = None;
                Ok(())
            }
            Message::Commit(commit) => self.commit(commit).await,
            Message::Relation(relation) => self.relation(&relation).await,
            Message::Logical(logical) => {
                // Anybody's other messages come this way, too.
                let is_ours = logical.is_transactional && logical.prefix == MESSAGE_PREFIX;
                self.asked |= is_ours && logical.content == self.messages.checkpoint;
                if is_ours && logical.content == self.messages.purge {
                    self.decoder.purge();
                }
                Ok(())
            }
            Message::Update(update) => self.update(&update).await,
            Message::Delete(delete) => {
                self.row(delete.relation, |decoder, batches| decoder.delete(&delete, batches)).await
            }
            // No publication of ours sends truncates; `highwater check` says so when one does.
            Message::Other(_) => Ok(()),
        }
    }

    async fn update(&mut self, update: &Update<'_>) -> Result<()> {
        // What it has moved is known once its table is.
        if !self.decoder.is_ours(update.relation) && !self.adopt(update.relation).await? {
            return Ok(());
        }
        if let Some(old) = update.old
            && self.decoder.has_moved(update).map_err(malformed)?
        {
            if self.decoder.has_lost_values(update).map_err(malformed)? {
                self.mark_lost(update.relation).await?;
            }
            let gone = Delete { relation: update.relation, old };
            self.row(update.relation, |decoder, batches| decoder.delete(&gone, batches)).await?;
        }
        self.row(update.relation, |decoder, batches| decoder.update(update, batches)).await
    }

    /// Takes in a row of a table; `decode` may be asked more than once.
    #[inline]
    async fn row(
        &mut self,
        relation: u32,
        decode: impl Fn(&mut Decoder, &mut Batches) -> Result<Inserted, InsertError>,
    ) -> Result<()> {
        loop {
            match decode(&mut self.decoder, &mut self.batches).map_err(malformed)? {
                Inserted::Done => break,
                Inserted::Quarantined => {
                    self.quarantined += 1;
                    break;
                }
                Inserted::NotArchived => {
                    if !self.adopt(relation).await? {
                        break;
                    }
                }
                asked => self.lookup.answer(&mut self.decoder, asked).await?,
            }
        }
        if self.batches.byte_count() < self.batch_bytes_max { Ok(()) } else { self.cut_piece().await }
    }

    async fn commit(&mut self, commit: Commit) -> Result<()> {
        self.open = None;
        self.transactions += 1;
        if std::mem::take(&mut self.asked) {
            self.wanted = Some(commit.end_lsn);
        }
        // Otherwise nothing of it was for us, or all of it is archived.
        if !self.batches.is_empty() || self.in_pieces {
            self.extend(commit).await?;
        }
        self.vitals.lag.seen(commit.end_lsn);
        // On a busy stream the end of a chunk is seldom the end of a transaction.
        let may_answer =
            self.wanted.is_some() && self.work.capacity() > 0 && self.answer_at <= Instant::now();
        if may_answer { self.answer().await } else { Ok(()) }
    }

    /// Takes a transaction that had rows for us into the checkpoint, and ends it if that is due.
    async fn extend(&mut self, commit: Commit) -> Result<()> {
        let first = self
            .range
            .map_or((commit.commit_lsn, commit.commit_micros), |range| (range.first_lsn, range.first_commit));
        if self.range.is_none() {
            self.vitals.lag.received(first.0, first.1);
        }
        self.range = Some(Range {
            first_lsn: first.0,
            last_lsn: commit.end_lsn,
            first_commit: first.1,
            last_commit: commit.commit_micros,
        });
        let is_due = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        if is_due || self.in_pieces || self.batches.byte_count() >= self.batch_bytes_max {
            return self.cut().await;
        }
        self.deadline.get_or_insert_with(|| Instant::now() + time_to_cut(self.max_lag, self.window, now()));
        Ok(())
    }

    async fn keepalive(&mut self, wal_end: Lsn, reply_requested: bool) -> Result<()> {
        if self.open.is_some() {
            return Ok(());
        }
        // We report so often that a server only asks when it shuts down: it waits for us, so don't wait for
        // the deadline.
        if reply_requested {
            self.cut().await?;
        }
        self.vitals.lag.seen(wal_end);
        if self.range.is_none() {
            self.idle = Some(wal_end);
            if reply_requested && wal_end > self.recorded.0 {
                return self.record_idle().await;
            }
        }
        Ok(())
    }

    async fn record_idle(&mut self) -> Result<()> {
        if let Some(lsn) = self.idle {
            self.hand_on(Work::Idle { lsn }).await?;
            self.recorded = (lsn, Instant::now());
            self.horizon_waits = false;
        }
        Ok(())
    }

    /// Cuts the checkpoint that was asked for, if one was, and has the position recorded everywhere. Must not be called
    /// inside a transaction.
    async fn answer(&mut self) -> Result<()> {
        let Some(wanted) = self.wanted.take() else { return Ok(()) };
        self.check_catalog().await?;
        self.answer_at = Instant::now() + ANSWER_INTERVAL;
        self.cut().await?;
        // A checkpoint may have passed it meanwhile; everything before that was handed on, too.
        let lsn = wanted.max(self.recorded.0);
        self.hand_on(Work::Mark { lsn }).await?;
        self.recorded = (lsn, Instant::now());
        // The horizon that is read then is published by the next move.
        self.horizon_waits = true;
        Ok(())
    }

    /// Ends the checkpoint at the last commit. Must not be called inside a transaction.
    async fn cut(&mut self) -> Result<()> {
        self.deadline = None;
        let Some(range) = self.range.take() else { return Ok(()) };
        self.tell_quarantined();
        let batches = self.replace_batches();
        self.in_pieces = false;
        self.idle = None;
        self.recorded = (range.last_lsn, Instant::now());
        self.horizon_waits = true;
        self.hand_on(Work::Checkpoint { batches, range }).await
    }

    /// Hands on what a transaction that is larger than memory has brought so far.
    async fn cut_piece(&mut self) -> Result<()> {
        // Between transactions a commit cuts, so there is an open one.
        let Some(begin) = self.open else { return Ok(()) };
        let batches = self.replace_batches();
        self.in_pieces = true;
        // Past the start of its commit record, as the skip rule wants it.
        self.hand_on(Work::Piece { batches, lsn: Lsn(begin.final_lsn.0.saturating_add(1)) }).await
    }

    fn replace_batches(&mut self) -> Box<Batches> {
        self.decoder.forget_unresolved();
        self.count_rows();
        Box::new(std::mem::replace(&mut self.batches, Batches::new(self.window, now())))
    }

    async fn hand_on(&mut self, work: Work) -> Result<()> {
        // The committer has failed; its own error says why.
        let gone = |_| Error::Internal("the committer is gone".to_owned());
        if self.work.capacity() > 0 {
            return self.work.send(work).await.map_err(gone);
        }
        let begun = Instant::now();
        let sent = self.work.send(work).await;
        self.vitals.counters.backpressure_seconds.inc_by(begun.elapsed().as_secs_f64());
        sent.map_err(gone)
    }
}

/// A stop came in the middle of a transaction.
fn unfinished() -> Error {
    let context = format!(
        "a transaction was still being received {TRANSACTION_END_WAIT:?} after the stop; its rows, and those since the last \
         checkpoint, are still in Postgres"
    );
    Error::io(context)(std::io::ErrorKind::TimedOut.into())
}

/// The error of a stream that is not what it should be.
pub(crate) fn malformed(error: impl std::fmt::Display) -> Error {
    Error::Protocol { context: "decoding the replication stream".to_owned(), detail: error.to_string() }
}
