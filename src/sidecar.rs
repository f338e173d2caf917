//! Sessions one after the other, until somebody says stop: what the sidecar runs and an embedding server
//! calls.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::archive::{self, Namer, Storage, Table};
use crate::commit::{self, Committer, Parts, Work};
use crate::config::Config;
use crate::decode::{self, Decoder, Unresolved};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{Receiver, ReplicationConnection, Session};
use crate::record::Kind;
use crate::slot::{self, Slot};
use crate::stream::Builder;
use crate::watermark;

/// First and longest pause between sessions.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// A session that held for so long was healthy: the next failure starts with the first pause again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// Chunks (of half a MiB or one frame) between the receiver and the builder.
const CHUNKS_MAX: usize = 8;

/// Checkpoints between the builder and the committer; with the one that is being written, two are in flight.
const CHECKPOINTS_WAITING_MAX: usize = 1;

/// How long a stop waits for the last checkpoint: less than the half minute after which Kubernetes kills. What is not
/// archived by then stays in Postgres.
const STOP_TIMEOUT: Duration = Duration::from_secs(25);

/// How long whole checkpoints that are queued may still take after the connection is lost.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The archiver as a background task of the current Tokio runtime (multi-threaded).
///
/// ```no_run
/// # async fn example() -> highwater::Result<()> {
/// let (shutdown, watcher) = tokio::sync::watch::channel(());
/// let archiver = highwater::Archiver::start(highwater::Config::from_env()?, watcher);
/// // ... serve ...
/// shutdown.send_replace(());
/// archiver.wait().await
/// # }
/// ```
///
/// It survives whatever may pass by itself (a restart of the server, storage that fails) and ends on what
/// only a person can mend. Dropping it ends it at once, as a crash would; nothing is lost or doubled by that.
#[derive(Debug)]
pub struct Archiver {
    task: JoinHandle<Result<()>>,
}

impl Archiver {
    /// Starts archiving. A change of `shutdown`, or the end of its sender, asks it to stop: it cuts a last
    /// checkpoint, acknowledges it, and ends.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    #[must_use]
    pub fn start(config: Config, shutdown: watch::Receiver<()>) -> Self {
        Self { task: tokio::spawn(run(config, shutdown)) }
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    ///
    /// Why it ended although nobody asked it to; or why a stop was not clean (rows that were not archived yet
    /// are still in Postgres).
    pub async fn wait(mut self) -> Result<()> {
        let result = (&mut self.task).await;
        result.unwrap_or_else(|error| Err(Error::Internal(format!("the archiver failed: {error}"))))
    }
}

impl Drop for Archiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(config: Config, shutdown: watch::Receiver<()>) -> Result<()> {
    let mut pause = RETRY_PAUSE.0;
    loop {
        let started = Instant::now();
        // The session sees the change in its own copy, so that this one still shows it afterwards.
        let error = match session(&config, &shutdown).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if !error.is_transient() || is_stopping(&shutdown) {
            return Err(error);
        }
        if started.elapsed() > HEALTHY_AFTER {
            pause = RETRY_PAUSE.0;
        }
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(error = error.chain(), retry_in = ?jittered, "not archiving; rows wait in Postgres");
        tokio::select! {
            biased;
            () = stop(&shutdown) => return Ok(()),
            () = sleep(jittered) => {}
        }
        pause = (pause * 2).min(RETRY_PAUSE.1);
    }
}

/// Whether somebody has asked for a stop; a dropped sender has.
fn is_stopping(shutdown: &watch::Receiver<()>) -> bool {
    shutdown.has_changed().unwrap_or(true)
}

/// Waits for a stop. Leaves the caller's receiver as it is.
async fn stop(shutdown: &watch::Receiver<()>) {
    // An error is a dropped sender.
    let _ = shutdown.clone().changed().await;
}

/// The tasks of a session.
struct Tasks {
    receiver: Receiver,
    chunks: mpsc::Receiver<crate::postgres::Chunk>,
    committer: Owned<Result<()>>,
    builder: Builder,
}

/// A task that ends with its handle: an archiver that is dropped must leave nothing behind that goes on trying.
struct Owned<T>(JoinHandle<T>);

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One hold of the slot.
async fn session(config: &Config, shutdown: &watch::Receiver<()>) -> Result<()> {
    let opened = tokio::select! {
        biased;
        () = stop(shutdown) => return Ok(()),
        opened = open(config) => opened?,
    };
    let Tasks { mut receiver, chunks, mut committer, builder } = opened;
    let outcome = tokio::select! {
        biased;
        // The committer's own error says more than that its queue is closed.
        result = &mut committer.0 => return Err(early_end(result)),
        result = builder.run(chunks, stop(shutdown)) => result,
        result = receiver.ended() => Err(result.err().unwrap_or_else(|| Error::Internal("the receiver ended early".to_owned()))),
        // The queue to the committer is full, and storage takes nothing.
        () = async { stop(shutdown).await; sleep(STOP_TIMEOUT).await } => Err(late_stop()),
    };
    // The builder is gone, and with it the sender of work: the committer ends after what is queued.
    let wait = if outcome.is_ok() { STOP_TIMEOUT } else { DRAIN_TIMEOUT };
    match timeout(wait, &mut committer.0).await {
        // Its error comes first: it may be the reason for the builder's.
        Ok(drained) => {
            drained.unwrap_or_else(|error| Err(Error::Internal(format!("the committer failed: {error}"))))?
        }
        Err(_) => {
            outcome?;
            return Err(late_stop());
        }
    }
    outcome?;
    receiver.finish().await
}

fn late_stop() -> Error {
    let context = format!(
        "the last checkpoint was not archived within {STOP_TIMEOUT:?}; its rows are still in Postgres"
    );
    Error::io(context)(std::io::ErrorKind::TimedOut.into())
}

fn early_end(result: Result<Result<()>, tokio::task::JoinError>) -> Error {
    match result {
        Ok(Ok(())) => Error::Internal("the committer ended early".to_owned()),
        Ok(Err(error)) => error,
        Err(error) => Error::Internal(format!("the committer failed: {error}")),
    }
}

/// Gets the slot, claims the tables, brings the watermarks up to them, and starts the tasks. The order
/// matters, see ARCHITECTURE.md ("One writer").
async fn open(config: &Config) -> Result<Tasks> {
    let mut sql = Session::new(config.source.clone());
    let storage = Storage::open(&config.storage)?;
    let mut connection = ReplicationConnection::connect(&config.source).await?;
    let system_identifier = slot::system_identifier(&mut connection).await?;
    let slot = slot::find(&mut sql, &config.slot).await?;
    let slot = check_slot(config, &mut sql, slot, &system_identifier).await?;
    let wal_end = sql.run(slot::wal_end).await?;
    let stream = connection.start(&config.slot, &config.publication).await?;

    let app_id = format!("highwater/{system_identifier}/{}", config.slot);
    let namer = Arc::new(Namer::new());
    let session_id = format!("{:032x}", rand::rng().random::<u128>());
    let mut tables = Vec::new();
    for kind in Kind::ALL {
        tables.push(Table::claim(&storage, kind, &app_id, &session_id, slot.confirmed_flush_lsn).await?);
    }
    commit::recover(&storage, &tables, &mut sql, config).await?;
    check_gap(config, &mut sql, &slot).await?;
    check_timeline(config, &mut sql, &tables, wal_end).await?;

    let start = slot.confirmed_flush_lsn;
    let mut decoder = Decoder::new(&config.schema);
    decoder.settle(settled(&storage, &tables, start).await?);
    let mut table_lsn = [Lsn::ZERO; Kind::ALL.len()];
    for (place, table) in table_lsn.iter_mut().zip(&tables) {
        *place = table.lsn();
    }
    tracing::info!(
        slot = config.slot,
        from = %start,
        storage = config.storage.storage_uri,
        session = session_id,
        "archiving"
    );
    let (durable_sender, durable) = watch::channel(start);
    let (chunk_sender, chunks) = mpsc::channel(CHUNKS_MAX);
    let (work_sender, work) = mpsc::channel::<Work>(CHECKPOINTS_WAITING_MAX);
    let parts = Parts {
        storage,
        tables,
        sql: Session::new(config.source.clone()),
        schema: config.schema.clone(),
        window: config.window,
        max_lag: config.max_lag,
        namer,
        durable: durable_sender,
    };
    Ok(Tasks {
        receiver: stream.spawn(chunk_sender, durable),
        chunks,
        committer: Owned(tokio::spawn(Committer::new(parts).run(work))),
        builder: Builder::new(config, sql, table_lsn, start, work_sender, decoder),
    })
}

/// The rows that an earlier session put into the quarantine because nobody knew their entity, in transactions that
/// the slot, which stands at `start`, will send again.
async fn settled(storage: &Storage, tables: &[Table], start: Lsn) -> Result<HashSet<Unresolved>> {
    let quarantine = tables.iter().find(|table| table.kind() == Kind::Quarantine && table.lsn() > start);
    let Some(quarantine) = quarantine else { return Ok(HashSet::new()) };
    // A merge keeps the newest position of its inputs, so no file that may hold such a row is left out.
    let files = quarantine.files().filter(|file| file.name.as_ref().is_none_or(|name| name.lsn > start));
    let paths: Vec<String> = files.map(|file| file.path.clone()).collect();
    let rows = archive::quarantined(storage, &paths).await?;
    Ok(rows.iter().filter_map(|row| decode::unresolved(&row.reason, &row.row, &row.lsn)).collect())
}

/// Refuses a slot that can't feed the archive, and leaves word of it in the watermarks.
async fn check_slot(
    config: &Config,
    sql: &mut Session,
    slot: Option<Slot>,
    system_identifier: &str,
) -> Result<Slot> {
    let watermarks = sql.run(watermark::read).await?;
    if watermarks.is_empty() {
        let detail = "no table is archived through it yet; run `highwater setup`".to_owned();
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    if let Some(other) = watermarks.iter().find(|row| row.system_identifier != system_identifier) {
        let detail = format!(
            "this server is system {system_identifier}, but {} is archived from system {}: a restored or promoted copy, \
             or the wrong database",
            other.source_table, other.system_identifier
        );
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    if let Some(other) = watermarks.iter().find(|row| row.slot_name != config.slot) {
        let detail = format!("{} is archived through slot {:?}", other.source_table, other.slot_name);
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    let slot = match slot {
        Some(slot) if slot.wal_status != "lost" => return Ok(slot),
        slot => slot,
    };
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(table, "gap: rows may have been written that no slot holds; its purge is blocked");
    }
    let detail = match slot {
        None => "it does not exist; run `highwater setup` to make a new one",
        Some(_) => {
            "the server has removed WAL that it still needed (wal_status is lost); drop it and run `highwater setup`"
        }
    };
    Err(Error::Slot { slot: config.slot.clone(), detail: detail.to_owned(), transient: false })
}

/// A slot ahead of the archive means that rows were skipped. What comes is archived, and the gap stays
/// marked.
async fn check_gap(config: &Config, sql: &mut Session, slot: &Slot) -> Result<()> {
    let watermarks = sql.run(watermark::read).await?;
    if watermarks.iter().all(|row| slot.confirmed_flush_lsn <= row.flushed_lsn) {
        return Ok(());
    }
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(
            table,
            slot_at = %slot.confirmed_flush_lsn,
            "gap: the slot is ahead of the archive, so rows were skipped; what comes is archived, and the table's purge is blocked"
        );
    }
    Ok(())
}

/// A server whose log ends before the archive has lost transactions that are archived, and will use their positions
/// again: what it writes there would be taken for archived. (A standby was promoted that had not received everything.)
async fn check_timeline(config: &Config, sql: &mut Session, tables: &[Table], wal_end: Lsn) -> Result<()> {
    let Some(ahead) = tables.iter().find(|table| table.lsn() > wal_end) else { return Ok(()) };
    sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await?;
    let detail = format!(
        "the server's log ends at {wal_end}, but the archive of {} reaches {}: the server has lost what was archived (a \
         promoted standby?), and new rows can't be told from archived ones by their position",
        ahead.kind().name(),
        ahead.lsn()
    );
    Err(Error::Slot { slot: config.slot.clone(), detail, transient: false })
}
