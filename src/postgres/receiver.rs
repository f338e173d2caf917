//! [`Receiver`]: the task that owns the socket of the replication stream.
//!
//! It does two things that must not wait for each other. It reads frames and hands them on, and it tells the
//! server how far everything is durable. A full queue stops the reading: the socket fills up, then the server
//! waits. The reports go on, or the server would take us for dead after `wal_sender_timeout`, just when
//! storage hangs and every row counts. So the task never waits for the queue and for nothing else.
//!
//! ```text
//!   socket --read--> inbox --cut--> waiting chunk --queue--> builder
//!     ^                                                         |
//!     +------ standby status <------ durable LSN <---- committer+
//! ```

use std::future::{Future as _, pending, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, BufMut as _, BytesMut};
use postgres_protocol::message::backend::{ERROR_RESPONSE_TAG, READY_FOR_QUERY_TAG};
use postgres_protocol::message::frontend;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::error::SqlState;
use tracing::warn;

use super::frame::{self, Chunk, Cut, Cutter, ERROR_BYTES, FRAME_BYTES_MAX, STREAM};
use super::pace::{self, Pace};
use super::replication::ReplicationStream;
use super::socket::Socket;
use super::wire::{HEADER_BYTES, Wire, header, server_error};
use crate::error::{Error, Result};
use crate::lsn::Lsn;

/// Shortest time between two reports that say the same. A server that shuts down asks again as soon as it has
/// an answer, and would keep two cores busy with it.
const REPLY_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// A report is a few bytes; a socket that doesn't take them for so long is dead.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the server may take to end the stream.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Space that is made before a read, and so the usual size of a chunk while behind.
const READ_BYTES: usize = 512 << 10;
/// A read is not worth while with less space than this.
const READ_BYTES_MIN: usize = 64 << 10;

/// 2000-01-01 in seconds of Unix time: the protocol's clock starts there.
const EPOCH_2000: Duration = Duration::from_secs(946_684_800);

impl ReplicationStream {
    /// Starts the task that reads the stream. It sends whole frames, in order and without a gap, into
    /// `chunks`, and reports `durable` as written, flushed and applied: at once when it changes, when the
    /// server asks (at most every 100 ms), and else at the pace that `wal_sender_timeout` needs. A value
    /// below an earlier one is ignored.
    ///
    /// A full queue stops the reading only; at most one chunk waits beside it. A chunk is 0.5 MiB or one
    /// frame, whichever is larger. A frame that is too long to be held loses the long values of its row, which become
    /// [`Value::Long`](crate::pgoutput::Value::Long), or is dropped if it is no row. When the other end of `chunks` is gone nothing more is read, but the
    /// reports go on until [`Receiver::finish`]: the last checkpoint may still be on its way.
    ///
    /// A server that says nothing while we read is asked for an answer, and given up if none comes.
    pub fn spawn(self, chunks: mpsc::Sender<Chunk>, durable: watch::Receiver<Lsn>) -> Receiver {
        let (finish, finished) = oneshot::channel();
        let pump = Pump {
            wire: self.wire,
            cutter: Cutter::new(self.held_bytes_max),
            status_interval: self.status_interval,
            durable,
            reported: Lsn::ZERO,
            reported_at: Instant::now(),
            reply_owed: false,
            silence: self.silence,
            silent_at: Instant::now() + self.silence,
            is_asked: false,
            slot: self.slot,
        };
        Receiver { task: Some(tokio::spawn(pump.run(chunks, finished))), finish: Some(finish) }
    }
}

/// The handle of the receiving task. Dropping it ends the task and the connection at once.
#[derive(Debug)]
pub struct Receiver {
    /// `None` once its result has been taken.
    task: Option<JoinHandle<Result<()>>>,
    finish: Option<oneshot::Sender<()>>,
}

impl Receiver {
    /// Waits until the stream ends by itself. May be dropped and called again; once it has returned it
    /// waits for ever.
    ///
    /// # Errors
    ///
    /// Always an error, since only [`finish`](Self::finish) ends a stream as it should: [`Error::Server`] or
    /// [`Error::Io`] as the server or the network ended it (of kind `TimedOut` if it fell silent),
    /// [`Error::Slot`] if the publication is missing where the slot stands, [`Error::Protocol`] for bytes that
    /// make no sense.
    pub async fn ended(&mut self) -> Result<()> {
        let Some(task) = &mut self.task else { return pending().await };
        let result = task.await;
        self.task = None;
        flatten(result)
    }

    /// Reports the durable position once more, ends the stream and logs out. What was not acknowledged comes
    /// again in the next session. Takes at most about 5 s; a server that is too slow is left without a
    /// farewell.
    ///
    /// # Errors
    ///
    /// If the stream had failed before, or fails while it is being ended.
    pub async fn finish(mut self) -> Result<()> {
        if let Some(finish) = self.finish.take() {
            // If the task is gone, its result says why.
            let _ = finish.send(());
        }
        match &mut self.task {
            Some(task) => flatten(task.await),
            None => Ok(()),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

fn flatten(result: Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    result.unwrap_or_else(|error| Err(Error::Internal(format!("the receiver failed: {error}"))))
}

#[derive(Debug)]
struct Pump {
    wire: Wire,
    cutter: Cutter,
    status_interval: Duration,
    durable: watch::Receiver<Lsn>,
    /// What the last report said, and when.
    reported: Lsn,
    reported_at: Instant,
    /// The server has asked since.
    reply_owed: bool,
    /// How long the server may say nothing.
    silence: Duration,
    /// When that time is over. Counts only while we read.
    silent_at: Instant,
    /// It was over once, and the server has been asked for an answer.
    is_asked: bool,
    /// For messages: the slot's name.
    slot: String,
}

impl Pump {
    /// The loop. Its priorities:
    ///
    /// 1. the order to finish: nothing that comes after it matters;
    /// 2. a new durable position: it frees WAL on the server, and a server that shuts down waits for it;
    /// 3. a report that is due: without it the server gives up;
    /// 4. the waiting chunk goes into the queue;
    /// 5. only with no chunk waiting: more bytes;
    /// 6. while there are none: the server's silence. Bytes that are there disprove it, so it comes after them.
    ///
    /// The first three are rare, so they can't starve 4 and 5; and these exclude each other.
    async fn run(mut self, chunks: mpsc::Sender<Chunk>, finished: oneshot::Receiver<()>) -> Result<()> {
        let slot = std::mem::take(&mut self.slot);
        self.pump(chunks, finished).await.map_err(|error| name_missing_publication(&slot, error))
    }

    async fn pump(mut self, chunks: mpsc::Sender<Chunk>, mut finished: oneshot::Receiver<()>) -> Result<()> {
        let mut waiting = None;
        let mut pace = Pace::new(&self.wire.socket);
        let mut is_published = true;
        // Tells the server at once that somebody is there.
        self.report(Reply::Unneeded).await?;
        loop {
            if waiting.is_none() && !chunks.is_closed() {
                let Cut { chunk, reply_requested } = self.cutter.cut(&mut self.wire.inbox)?;
                self.reply_owed |= reply_requested;
                waiting = chunk;
            }
            let report_at = self.report_at();
            let is_reading = waiting.is_none() && !chunks.is_closed();
            tokio::select! {
                biased;
                // 1. An error means that the handle is gone, and then this task is, too.
                _ = &mut finished => return self.finish().await,
                // 2.
                changed = self.durable.changed(), if is_published => {
                    // Without a publisher the last value stands.
                    is_published = changed.is_ok();
                    if self.durable_position() > self.reported {
                        self.report(Reply::Unneeded).await?;
                    }
                }
                // 3.
                () = sleep_until(report_at) => self.report(Reply::Unneeded).await?,
                // 4.
                permit = chunks.reserve(), if waiting.is_some() => {
                    // Otherwise nobody takes chunks any more.
                    if let (Ok(permit), Some(chunk)) = (permit, waiting.take()) {
                        permit.send(chunk);
                    }
                    // Nobody listened until now.
                    self.restart_silence();
                }
                // 5.
                result = read(&mut self.wire, &mut pace), if is_reading => {
                    result?;
                    self.restart_silence();
                }
                // 6.
                () = sleep_until(self.silent_at), if is_reading => self.break_silence().await?,
            }
        }
    }

    fn restart_silence(&mut self) {
        self.silent_at = Instant::now() + self.silence;
        self.is_asked = false;
    }

    /// Asks the server for an answer; gives it up if it has been asked.
    async fn break_silence(&mut self) -> Result<()> {
        if self.is_asked {
            let detail = format!(
                "the server has sent nothing for {:?}, and not answered a request",
                self.silence.saturating_mul(2)
            );
            return Err(Error::io(STREAM)(io::Error::new(io::ErrorKind::TimedOut, detail)));
        }
        self.report(Reply::Requested).await?;
        self.restart_silence();
        self.is_asked = true;
        Ok(())
    }

    fn durable_position(&self) -> Lsn {
        self.reported.max(*self.durable.borrow())
    }

    /// When the next report is due if nothing changes.
    fn report_at(&self) -> Instant {
        self.reported_at + if self.reply_owed { REPLY_INTERVAL_MIN } else { self.status_interval }
    }

    async fn report(&mut self, reply: Reply) -> Result<()> {
        let position = self.durable.borrow_and_update().max(self.reported);
        let message = standby_status(position, SystemTime::now(), reply);
        self.write(&message).await?;
        self.reported = position;
        self.reported_at = Instant::now();
        self.reply_owed = false;
        Ok(())
    }

    async fn write(&mut self, message: &[u8]) -> Result<()> {
        let context = "reporting on the replication stream";
        match timeout(WRITE_TIMEOUT, self.wire.send(message, context)).await {
            Ok(result) => result,
            Err(_) => Err(Error::io(context)(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn finish(mut self) -> Result<()> {
        self.report(Reply::Unneeded).await?;
        let mut message = BytesMut::new();
        frontend::copy_done(&mut message);
        self.write(&message).await?;
        match timeout(FINISH_TIMEOUT, self.drain()).await {
            Ok(result) => result?,
            Err(_) => {
                // It is in the middle of a large transaction, and sees the end of the connection later.
                warn!("the server did not end the replication stream in time; the connection is closed");
                return Ok(());
            }
        }
        message.clear();
        frontend::terminate(&mut message);
        // The server closes as soon as it has read this, or before.
        let _ = self.write(&message).await;
        Ok(())
    }

    /// Reads, and drops, what is still on its way, up to the server's readiness for a next command.
    async fn drain(&mut self) -> Result<()> {
        let mut pace = Pace::hurried();
        // Of the message that is being dropped; the cutter may be in the middle of one.
        let mut left = self.cutter.left();
        loop {
            let inbox = &mut self.wire.inbox;
            loop {
                let here = left.min(inbox.len());
                inbox.advance(here);
                left -= here;
                let Some((tag, whole)) = header(inbox, FRAME_BYTES_MAX, STREAM)? else { break };
                match tag {
                    READY_FOR_QUERY_TAG => return Ok(()),
                    // Its beginning says what people need.
                    ERROR_RESPONSE_TAG if inbox.len() < whole.min(ERROR_BYTES) => break,
                    ERROR_RESPONSE_TAG => {
                        return Err(server_error(inbox.get(HEADER_BYTES..).unwrap_or_default(), STREAM));
                    }
                    _ => left = whole,
                }
            }
            match read(&mut self.wire, &mut pace).await {
                Ok(()) => {}
                // A server that shuts down leaves without a farewell.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// What an error says of a publication that is younger than what the stream is at.
pub(crate) const NO_PUBLICATION: &str = "it did not exist at this point of the log";

/// A publication is looked for in the catalog as it was where the decoder stands. So if it is missing there,
/// making it now doesn't help: the same place of the log fails for ever. Nothing else that `pgoutput` looks up by
/// name can be missing.
fn name_missing_publication(slot: &str, error: Error) -> Error {
    match error {
        Error::Server { message, code, .. } if code == SqlState::UNDEFINED_OBJECT.code() => Error::Slot {
            slot: slot.to_owned(),
            detail: format!(
                "{message}: {NO_PUBLICATION}, so the slot can't go on. Drop the slot with \
                 `select pg_drop_replication_slot('{slot}')`, then make the publication and a new slot with \
                 `highwater setup`; rows since the publication was dropped are then a gap"
            ),
            transient: false,
        },
        other => other,
    }
}

/// Reads at this pace until something worth handing on is there. Cancelling it loses nothing: all is in the inbox.
async fn read(wire: &mut Wire, pace: &mut Pace) -> Result<()> {
    let Wire { socket, inbox } = wire;
    let begin = Instant::now();
    let before = inbox.len();
    loop {
        pace.pause().await;
        if inbox.capacity() - inbox.len() < READ_BYTES_MIN {
            // A fixed step, whatever length the frame at the end of the inbox claims.
            inbox.reserve(READ_BYTES);
        }
        let has_some = inbox.len() > before;
        let count = match read_unwatched(socket, inbox) {
            Some(result) => result.map(Some),
            None => {
                poll_fn(|cx| match poll_fill(socket, inbox, cx) {
                    Poll::Pending if has_some => Poll::Ready(Ok(None)),
                    other => other.map_ok(Some),
                })
                .await
            }
        };
        match count.map_err(Error::io(STREAM))? {
            Some(0) => return Err(frame::closed()),
            None => return Ok(()),
            Some(count) if pace.wants_pause(count) => {
                socket.unwatch().map_err(Error::io(STREAM))?;
                pace.start_pause();
            }
            Some(_) => {}
        }
        if inbox.len() - before >= pace.batch_bytes() || begin.elapsed() > pace::GATHER_MAX {
            return Ok(());
        }
    }
}

/// Reads once from a Unix socket that is not watched: to have the runtime watch it again costs more than such a read.
/// `None` if it has to be watched first, because nothing is there, and for all other sockets.
fn read_unwatched(socket: &mut Socket, inbox: &mut BytesMut) -> Option<io::Result<usize>> {
    let before = inbox.len();
    inbox.resize(before + READ_BYTES_MIN, 0);
    let result = socket.read_unwatched(inbox.get_mut(before..).unwrap_or_default());
    let count = result.as_ref().and_then(|result| result.as_ref().ok());
    inbox.truncate(before + count.copied().unwrap_or_default());
    result
}

/// Reads until the socket is empty or the space is full, because a single read of a TLS stream gives one
/// record of at most 16 KiB. Ready with 0 only at the end of the stream.
fn poll_fill(
    socket: &mut Socket,
    inbox: &mut BytesMut,
    cx: &mut std::task::Context<'_>,
) -> Poll<io::Result<usize>> {
    let before = inbox.len();
    while inbox.len() < inbox.capacity() {
        match pin!(socket.read_buf(inbox)).poll(cx) {
            Poll::Pending if inbox.len() > before => break,
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) if inbox.len() == before => return Poll::Ready(Err(error)),
            // What came before the error or the end is delivered; the next read meets it again.
            Poll::Ready(Err(_) | Ok(0)) => break,
            Poll::Ready(Ok(_)) => {}
        }
    }
    Poll::Ready(Ok(inbox.len() - before))
}

/// Whether a status update wants an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    Unneeded,
    Requested,
}

/// A standby status update in its `CopyData` (manual 55.4): everything before `position` is written, flushed
/// and applied.
fn standby_status(position: Lsn, now: SystemTime, reply: Reply) -> [u8; 39] {
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let clock = u64::try_from(since_1970.saturating_sub(EPOCH_2000).as_micros()).unwrap_or_default();
    let mut message = [0; 39];
    let mut out = &mut message[..];
    out.put_u8(b'd');
    out.put_u32(38);
    out.put_u8(b'r');
    for _ in ["written", "flushed", "applied"] {
        out.put_u64(position.0);
    }
    out.put_u64(clock);
    out.put_u8(u8::from(reply == Reply::Requested));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_update_has_the_layout_of_the_manual() {
        let now = SystemTime::UNIX_EPOCH + EPOCH_2000 + Duration::from_micros(5);
        let message = |reply| standby_status(Lsn(0x1_0000_0002), now, reply);
        let mut expected = b"d\0\0\0\x26r".to_vec();
        for number in [0x1_0000_0002_u64, 0x1_0000_0002, 0x1_0000_0002, 5] {
            expected.extend_from_slice(&number.to_be_bytes());
        }
        expected.push(0);
        assert_eq!(&message(Reply::Unneeded)[..], expected);
        expected.pop();
        expected.push(1);
        assert_eq!(&message(Reply::Requested)[..], expected);
    }

    #[test]
    fn only_a_missing_object_is_laid_to_the_publication() {
        let refusal = |code: &str| Error::Server {
            context: STREAM.to_owned(),
            message: "publication \"p\" does not exist".to_owned(),
            code: code.to_owned(),
        };
        let named = name_missing_publication("s", refusal("42704"));
        assert!(!named.is_transient());
        assert!(named.to_string().contains("pg_drop_replication_slot('s')"), "{named}");
        assert!(matches!(name_missing_publication("s", refusal("57P01")), Error::Server { .. }));
    }
}
