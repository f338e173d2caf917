//! Sessions one after the other, until somebody says stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::archive::{self, Namer, Storage, Table};
use crate::backfill::Backfill;
use crate::commit::{Committer, Parts, Work};
use crate::config::Config;
use crate::decode::{Decoder, Settled};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::foreign;
use crate::gap;
use crate::lsn::Lsn;
use crate::postgres::{
    Encoding, Receiver, ReplicationConnection, ReplicationStream, Session, quote_identifier,
};
use crate::record::Kind;
use crate::recover;
use crate::setup;
use crate::slot::{self, Identity, Slot};
use crate::source;
use crate::stream::{Builder, Texts};
use crate::watermark::{self, Watermark};

/// First and longest pause between sessions.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// A session that held for so long was healthy: the next failure starts with the first pause again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// How long a password that the server refuses is tried: it may be on its way into the server, or into the password file.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(60);

/// Chunks (of half a MiB or one frame) between the receiver and the builder.
const CHUNKS_MAX: usize = 8;

/// Checkpoints between the builder and the committer; with the one that is being written, two are in flight.
const CHECKPOINTS_WAITING_MAX: usize = 1;

/// How long a stop waits for the last checkpoint: less than the half minute after which Kubernetes kills. What is not
/// archived by then stays in Postgres.
const STOP_TIMEOUT: Duration = Duration::from_secs(25);

/// How long whole checkpoints that are queued may still take after the connection is lost.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Archives until `shutdown` changes or its sender is gone, which cuts a last checkpoint, acknowledges it, and ends.
///
/// # Errors
///
/// As [`Archiver::wait`](crate::Archiver::wait).
pub(crate) async fn run(
    config: Config,
    shutdown: watch::Receiver<()>,
    phase: watch::Sender<Phase>,
) -> Result<()> {
    let wants_text = Arc::new(AtomicBool::new(false));
    let mut pause = RETRY_PAUSE.0;
    let mut refused_since: Option<Instant> = None;
    // Why the session before this one failed.
    let mut failure: Option<Error> = None;
    loop {
        let started = Instant::now();
        // The session sees the change in its own copy, so that this one still shows it afterwards.
        phase.send_replace(Phase::Opening);
        let error = match session(&config, &shutdown, &wants_text, &phase).await {
            Ok(Ended::Whole) => return Ok(()),
            Ok(Ended::Unopened) => return failure.map_or(Ok(()), Err),
            Err(error) => error,
        };
        phase.send_replace(Phase::Failed);
        refused_since = error.is_refused_password().then(|| refused_since.unwrap_or_else(Instant::now));
        // A table that somebody has made unusable stops alone: the next session goes on without it.
        let may_pass = refused_since.map_or_else(
            || error.is_transient() || foreign::is_broken(&error),
            |since| since.elapsed() < REFUSAL_PATIENCE,
        );
        if !may_pass || is_stopping(&shutdown) {
            return Err(error);
        }
        if started.elapsed() > HEALTHY_AFTER {
            pause = RETRY_PAUSE.0;
        }
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(error = error.chain(), retry_in = ?jittered, "not archiving; rows wait in Postgres");
        tokio::select! {
            biased;
            // Rows may wait that nobody could archive.
            () = stop(&shutdown) => return Err(error),
            () = sleep(jittered) => {}
        }
        failure = Some(error);
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
#[derive(Debug)]
pub(crate) struct Owned<T>(pub(crate) JoinHandle<T>);

impl<T> Owned<Result<T>> {
    /// Waits for its end; what it gave. One that has failed is told by this name.
    ///
    /// # Errors
    ///
    /// Those of the task.
    pub(crate) async fn outcome(&mut self, name: &str) -> Result<T> {
        (&mut self.0).await.unwrap_or_else(|error| Err(Error::Internal(format!("{name} failed: {error}"))))
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a session is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It gets the slot, and adds what the archive lacks.
    Opening,
    /// It archives what the stream brings.
    Streaming,
    /// The last one has failed; the next one begins soon.
    Failed,
}

/// How a session ended that was told to.
enum Ended {
    /// Everything that it received is archived.
    Whole,
    /// It had not begun to stream.
    Unopened,
}

/// How messages name the task.
const COMMITTER: &str = "the committer";

/// One hold of the slot.
async fn session(
    config: &Config,
    shutdown: &watch::Receiver<()>,
    wants_text: &Arc<AtomicBool>,
    phase: &watch::Sender<Phase>,
) -> Result<Ended> {
    let opened = tokio::select! {
        biased;
        () = stop(shutdown) => return Ok(Ended::Unopened),
        opened = open(config, wants_text) => opened?,
    };
    let Tasks { mut receiver, chunks, mut committer, builder } = opened;
    phase.send_replace(Phase::Streaming);
    let stopped_at = OnceLock::new();
    let stopping = async {
        stop(shutdown).await;
        stopped_at.get_or_init(Instant::now);
    };
    let outcome = tokio::select! {
        biased;
        // The committer's own error says more than that its queue is closed.
        result = committer.outcome(COMMITTER) => return Err(committer_ended(result)),
        result = builder.run(chunks, stopping) => result,
        result = receiver.ended() => Err(receiver_ended(result)),
        // The queue to the committer is full, and storage takes nothing.
        () = async { stop(shutdown).await; sleep(STOP_TIMEOUT).await } => Err(late_stop()),
    };
    // The builder is gone, and with it the sender of work: the committer ends after what is queued.
    let since = stopped_at.get().map(Instant::elapsed).unwrap_or_default();
    let wait = if outcome.is_ok() { STOP_TIMEOUT.saturating_sub(since) } else { DRAIN_TIMEOUT };
    match timeout(wait, committer.outcome(COMMITTER)).await {
        // Its error comes first: it may be the reason for the builder's.
        Ok(drained) => drained?,
        Err(_) => {
            outcome?;
            return Err(late_stop());
        }
    }
    outcome?;
    receiver.finish().await.map(|()| Ended::Whole)
}

fn late_stop() -> Error {
    let context = format!(
        "the last checkpoint was not archived within {STOP_TIMEOUT:?}; its rows are still in Postgres"
    );
    Error::io(context)(std::io::ErrorKind::TimedOut.into())
}

fn committer_ended(result: Result<()>) -> Error {
    result.err().unwrap_or_else(|| Error::Internal(format!("{COMMITTER} ended early")))
}

/// Gets the slot, claims the tables, brings the watermarks up to them, adds what the archive lacks, and starts the tasks.
/// The order matters, see ARCHITECTURE.md ("One writer", "Gaps").
async fn open(config: &Config, wants_text: &Arc<AtomicBool>) -> Result<Tasks> {
    let mut sql = Session::new(config.source.clone());
    let storage = Storage::open(&config.storage)?;
    // Claims ask for it, too; but by then there may be a slot that keeps the server's log.
    storage.prove_once().await?;
    sql.run(setup::check_schema).await?;
    let mut connection = ReplicationConnection::connect(&config.source).await?;
    let identity = slot::identify(&mut connection).await?;
    let found = slot::find(&mut sql, &config.slot).await?;
    let watermarks = sql.run(watermark::read).await?;
    let history = history(config, &mut connection, &watermarks, &identity, found.as_ref()).await?;
    ensure_slot(config, &mut sql, &mut connection, found).await?;
    let (stream, texts) = start_stream(config, &mut sql, connection, wants_text).await?;

    // Only now nobody else moves the slot or the archive.
    let (slot, holder) = held_slot(config, &mut sql).await?;
    let start = slot.confirmed_flush_lsn;
    let (durable_sender, durable) = watch::channel(start);
    let (chunk_sender, chunks) = mpsc::channel(CHUNKS_MAX);
    // What follows may take hours; somebody must answer the server meanwhile.
    let mut receiver = stream.spawn(chunk_sender, durable);
    let namer = Arc::new(Namer::new());
    let prepared = prepare(config, &mut sql, &storage, &namer, &identity, &history, &slot);
    let tables = tokio::select! {
        biased;
        result = receiver.ended() => return Err(receiver_ended(result)),
        tables = prepared => tables?,
    };

    let request = sql.run(slot::checkpoint_request).await?;
    let mut decoder = Decoder::new(&config.schema);
    if texts.encoding == Encoding::Other {
        decoder.ask_for_texts();
    }
    decoder.settle(settled(&storage, &tables, start).await?);
    // Of a table that is not to be had the stream brings nothing.
    let lsn_of = |kind| tables.iter().find(|table| table.kind() == kind).map_or(Lsn(u64::MAX), Table::lsn);
    let table_lsn = Kind::ALL.map(lsn_of);
    tracing::info!(
        slot = config.slot,
        from = %start,
        storage = config.storage.storage_uri,
        "archiving"
    );
    let (work_sender, work) = mpsc::channel::<Work>(CHECKPOINTS_WAITING_MAX);
    let parts = Parts {
        config: config.clone(),
        storage,
        tables,
        sql: Session::new(config.source.clone()),
        holder,
        namer,
        durable: durable_sender,
    };
    Ok(Tasks {
        receiver,
        chunks,
        committer: Owned(tokio::spawn(Committer::new(parts).run(work))),
        builder: Builder::new(config, sql, table_lsn, start, work_sender, (decoder, texts, request)),
    })
}

/// Starts the stream, with texts as the database has them, and with other values as text if that is wanted.
async fn start_stream(
    config: &Config,
    sql: &mut Session,
    mut connection: ReplicationConnection,
    wants_text: &Arc<AtomicBool>,
) -> Result<(ReplicationStream, Texts)> {
    let encoding = sql.run(Encoding::of_database).await?;
    let (statement, encoding) = encoding.streamed(&config.publication);
    if let Some(statement) = statement {
        connection.query(statement).await?;
    }
    let slot = config.slot.as_str();
    let has_unreadable = sql.run(async |client| source::has_unreadable(client, slot).await).await?;
    let is_all = has_unreadable || wants_text.load(Ordering::Relaxed);
    let stream = connection.start(slot, &config.publication, is_all).await?;
    let stream = stream.holding(config.row_bytes_max());
    Ok((stream, Texts { encoding, is_all, wants_all: Arc::clone(wants_text) }))
}

fn receiver_ended(result: Result<()>) -> Error {
    result.err().unwrap_or_else(|| Error::Internal("the receiver ended early".to_owned()))
}

/// Claims the tables and makes them fit for the stream.
async fn prepare(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    namer: &Arc<Namer>,
    identity: &Identity,
    history: &History,
    slot: &Slot,
) -> Result<Vec<Table>> {
    let start = slot.confirmed_flush_lsn;
    let app_id = archive::app_id(&identity.system_identifier, &config.slot);
    // Tells our log entries from those of any other session, and is in each of them.
    let session = format!("{:032x}", rand::rng().random::<u128>());
    // A session that can't write its watermarks must not put a claim into every log before it finds that out: the next one
    // would, too, and so on.
    sql.run(async |client| watermark::can_be_moved(client, &config.slot).await).await?;
    let mut tables = Vec::new();
    for kind in Kind::ALL {
        match Table::claim(storage, kind, &app_id, &session, start).await {
            Ok(table) => tables.push(table),
            Err(error) => foreign::leave_out_broken(config, sql, storage, kind, error).await?,
        }
    }
    tracing::info!(session, "claimed the archive's tables");
    let logged = logged_switches(config, &tables, identity).await?;
    match history {
        History::Same { switches } if logged.is_empty() || !config.accept_new_system => {
            check_timeline(config, sql, &tables, switches, &logged).await?;
        }
        History::Same { .. } | History::Accepted => {
            // The positions so far belong to another log. First in the Delta logs: until the watermarks follow, this
            // history has to be accepted again, or is a gap.
            sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await?;
            for table in tables.iter_mut().filter(|table| table.lsn() > start) {
                table.rebase(start).await?;
            }
            let (system, timeline) = (identity.system_identifier.as_str(), identity.timeline_id);
            let accepted = sql
                .run(async |client| watermark::accept(client, &config.slot, system, timeline).await)
                .await?;
            for table in accepted {
                tracing::warn!(
                    table,
                    system,
                    timeline,
                    "accepted as told; every row of the table will be compared with the archive"
                );
            }
        }
    }
    for table in &mut tables {
        // Before any position of this timeline is written.
        table.set_timeline(identity.timeline_id).await?;
    }
    foreign::look_back(config, sql, &mut tables).await?;
    let broken = recover::watermarks(storage, &tables, sql, config).await?;
    foreign::leave_out_all(config, sql, storage, &mut tables, broken).await?;
    check_gap(config, sql, slot).await?;
    let timeline_id = identity.timeline_id;
    sql.run(async |client| watermark::set_timeline(client, &config.slot, timeline_id).await).await?;
    gap::notice(sql, &config.slot, &config.publication).await?;
    let (name, publication) = (config.slot.as_str(), config.publication.as_str());
    let mut incomplete = sql.run(async |client| gap::incomplete(client, name, publication).await).await?;
    incomplete.keep(|row| tables.iter().any(|table| table.kind().name() == row.kind));
    foreign::drop_damaged(config, sql, &mut tables, &incomplete.mendable).await?;
    let backfill = Backfill { config, storage, namer, tables: &mut tables, sql, timeline_id };
    let broken = backfill.run(&incomplete).await?;
    foreign::leave_out_all(config, sql, storage, &mut tables, broken).await?;
    for table in &mut tables {
        foreign::look(config, sql, table).await?;
    }
    Ok(tables)
}

/// The slot as it stands now that we hold it, and the server process that streams from it.
async fn held_slot(config: &Config, sql: &mut Session) -> Result<(Slot, i32)> {
    let slot = slot::find(sql, &config.slot).await?;
    slot.and_then(|slot| slot.active_pid.map(|holder| (slot, holder))).ok_or_else(|| Error::Slot {
        slot: config.slot.clone(),
        detail:
            "nobody holds it on the server that SQL reaches; do SQL and the stream reach different servers?"
                .to_owned(),
        transient: true,
    })
}

/// The rows that an earlier session put into the quarantine, in transactions that the slot, which stands at `start`,
/// will send again.
async fn settled(storage: &Storage, tables: &[Table], start: Lsn) -> Result<Settled> {
    let mut settled = Settled::default();
    let quarantine = tables.iter().find(|table| table.kind() == Kind::Quarantine && table.lsn() > start);
    let Some(quarantine) = quarantine else { return Ok(settled) };
    // A merge keeps the newest position of its inputs, so no file that may hold such a row is left out.
    let files = quarantine.files().filter(|file| file.name.as_ref().is_none_or(|name| name.lsn > start));
    let paths: Vec<String> = files.map(|file| file.path.clone()).collect();
    archive::each_quarantined(storage, &paths, |row| settled.add(row.source_table, row.row, row.lsn)).await?;
    Ok(settled)
}

/// What the server has to do with the one that the watermarks speak of.
enum History {
    /// It is that server. Where the timelines ended that the watermarks speak of, by table, if they are not its own.
    Same { switches: Vec<(String, Lsn)> },
    /// It is another one, or has lost a part of the log, and whoever runs us says that it takes its place.
    Accepted,
}

/// Refuses a server that the watermarks don't speak of, unless told otherwise: it may be the wrong one.
async fn history(
    config: &Config,
    connection: &mut ReplicationConnection,
    watermarks: &[Watermark],
    identity: &Identity,
    slot: Option<&Slot>,
) -> Result<History> {
    let refuse = |detail: String| Error::Slot { slot: config.slot.clone(), detail, transient: false };
    if watermarks.is_empty() {
        return Err(refuse("no table is archived through it yet; run `highwater setup`".to_owned()));
    }
    if let Some(other) = watermarks.iter().find(|row| row.slot_name != config.slot) {
        return Err(refuse(format!("{} is archived through slot {:?}", other.source_table, other.slot_name)));
    }
    let system = &identity.system_identifier;
    if let Some(other) = watermarks.iter().find(|row| row.system_identifier != *system) {
        if config.accept_new_system {
            return Ok(History::Accepted);
        }
        return Err(refuse(format!(
            "this server is system {system}, but {} is archived from system {}: a restored or promoted copy, or the wrong \
             database; if it has taken the place of the other for good, start once with --accept-new-system",
            other.source_table, other.system_identifier
        )));
    }
    let switches = switch_points(connection, watermarks, identity.timeline_id).await?;
    if config.accept_new_system && !switches.is_empty() {
        return Ok(History::Accepted);
    }
    if slot.is_none() && !switches.is_empty() {
        return Err(refuse(format!(
            "the server is on timeline {}, the archive's position on an earlier one, and the slot is not here: a promoted \
             copy; if it has taken the place of the other for good, start once with --accept-new-system, which makes the \
             slot and compares every row with the archive",
            identity.timeline_id
        )));
    }
    Ok(History::Same { switches })
}

/// Makes a new slot where the old one is gone or of no more use. What was written meanwhile is a gap; that is on record
/// before the new slot can hide it.
async fn ensure_slot(
    config: &Config,
    sql: &mut Session,
    connection: &mut ReplicationConnection,
    found: Option<Slot>,
) -> Result<()> {
    let what = match &found {
        Some(slot) if slot.wal_status != "lost" => return Ok(()),
        Some(slot) => format!(
            "the server has removed WAL that the slot still needed (wal_status is lost{})",
            slot.invalidation_reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default()
        ),
        None => "the slot does not exist".to_owned(),
    };
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(table, "gap: {what}, so rows may have passed unseen; its purge is blocked");
    }
    tracing::warn!(
        slot = config.slot,
        "{what}: making a new one, then adding the rows that the archive lacks"
    );
    let publication = config.publication.as_str();
    let is_published = sql.run(async |client| setup::has_publication(client, publication).await).await?;
    if !is_published {
        let detail = format!("{what}, and publication {publication:?} neither; run `highwater setup`");
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    if found.is_some() {
        connection.query(&format!("DROP_REPLICATION_SLOT {}", quote_identifier(&config.slot))).await?;
    }
    failpoint::hit("before-new-slot");
    let nothing = slot::SnapshotUse::Nothing;
    let lifetime = slot::Lifetime::Lasting { failover: config.failover };
    slot::create(&config.source, connection, &config.slot, lifetime, nothing).await.map(drop)
}

/// A slot ahead of the archive means that rows were skipped.
async fn check_gap(config: &Config, sql: &mut Session, slot: &Slot) -> Result<()> {
    let watermarks = sql.run(watermark::read).await?;
    // The row of a table that was left out stands still, and says so already.
    let mut complete = watermarks.iter().filter(|row| row.state != watermark::State::Gap);
    if complete.all(|row| slot.confirmed_flush_lsn <= row.flushed_lsn) {
        return Ok(());
    }
    for table in sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await? {
        tracing::error!(
            table,
            slot_at = %slot.confirmed_flush_lsn,
            "gap: the slot is ahead of the archive, so rows were skipped; the table's purge is blocked until they are found"
        );
    }
    Ok(())
}

/// Where the timelines ended that the watermarks speak of, if they are not the server's: by watermark.
async fn switch_points(
    connection: &mut ReplicationConnection,
    watermarks: &[Watermark],
    timeline_id: i32,
) -> Result<Vec<(String, Lsn)>> {
    let mut switches = Vec::new();
    for row in watermarks.iter().filter(|row| row.timeline_id != timeline_id) {
        let switch = slot::switch_point(connection, row.timeline_id, timeline_id).await?;
        // No ancestor: nothing that was archived is certain to be in this server's log.
        switches.push((row.source_table.clone(), switch.unwrap_or(Lsn::ZERO)));
    }
    Ok(switches)
}

/// Where the timelines ended that the archive's positions are of, if they are not the server's: by kind. The watermarks are
/// those of the server that is asked: where two claim to be the primary, each has its own, but there is one archive.
async fn logged_switches(config: &Config, tables: &[Table], identity: &Identity) -> Result<Vec<(Kind, Lsn)>> {
    let mut switches = Vec::new();
    let mut connection = None;
    for table in tables {
        let Some(logged) = table.timeline().filter(|logged| *logged != identity.timeline_id) else {
            continue;
        };
        let mut switch = None;
        // A later timeline is in no history of this one.
        if logged < identity.timeline_id {
            let mut server = match connection.take() {
                Some(server) => server,
                None => ReplicationConnection::connect(&config.source).await?,
            };
            switch = slot::switch_point(&mut server, logged, identity.timeline_id).await?;
            connection = Some(server);
        }
        switches.push((table.kind(), switch.unwrap_or(Lsn::ZERO)));
    }
    Ok(switches)
}

/// A server that was promoted before it had received everything has lost transactions that are archived, and uses
/// their positions again: what it writes there would be taken for archived. So the archive must not reach past the point
/// where the timelines part; nor past the end of the server's log.
async fn check_timeline(
    config: &Config,
    sql: &mut Session,
    tables: &[Table],
    switches: &[(String, Lsn)],
    logged: &[(Kind, Lsn)],
) -> Result<()> {
    let wal_end = sql.run(slot::wal_end).await?;
    let watermarks = sql.run(watermark::read).await?;
    for table in tables {
        let name = watermark::source_table(&config.schema, table.kind());
        let row = watermarks.iter().find(|row| Some(&row.source_table) == name.as_ref());
        let reach = table.lsn().max(row.map_or(Lsn::ZERO, |row| row.flushed_lsn));
        // The quarantine has no watermark; it moves with the others.
        let switch =
            switches.iter().filter(|(switched, _)| name.as_ref().is_none_or(|name| name == switched));
        let logged_here = logged.iter().filter(|(kind, _)| *kind == table.kind());
        let switch = switch.map(|(_, lsn)| *lsn).chain(logged_here.map(|(_, lsn)| *lsn)).min();
        let end = switch.map_or(wal_end, |lsn| lsn.min(wal_end));
        if reach <= end {
            continue;
        }
        sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await?;
        let detail = format!(
            "the server's log holds what was written up to {end}, but the archive of {} reaches {reach}: the server has lost \
             what is archived (a promoted standby, a restored copy?), and new rows can't be told from archived ones by their \
             position; {}",
            table.kind().name(),
            if switches.is_empty() && logged.is_empty() {
                "give HIGHWATER_SLOT a new name and run `highwater setup`, which makes it and marks the gap; then drop the \
                 old slot"
            } else {
                "if this server has taken the place of the other for good, start once with --accept-new-system, which \
                 compares every row with the archive"
            },
        );
        return Err(Error::Slot { slot: config.slot.clone(), detail, transient: false });
    }
    Ok(())
}
