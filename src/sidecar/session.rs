//! One hold of the slot: what is made ready before the stream is read, and the tasks that read it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::backfill::Backfill;
use super::builder::{Builder, Texts};
use super::committer::{Committer, Parts, Work};
use super::foreign;
use super::gap;
use super::history::{History, check_gap, check_timeline, ensure_slot, history, logged_switches};
use super::recovery;
use super::task::{Owned, stop};
use super::versions;
use super::wants::Wants;
use crate::archive::{self, Namer, Storage, Table};
use crate::config::Config;
use crate::decode::{Decoder, SORTS_OF_REASONS, Settled};
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::{Encoding, Receiver, ReplicationConnection, ReplicationStream, Session};
use crate::setup;
use crate::source::slot::{self, Identity, Slot};
use crate::source::{self, describe, growth};
use crate::tables::{Kind, PerKind};
use crate::vitals::{Phase, Vitals, watched};
use crate::watermark;

/// Chunks (of half a MiB or one frame) between the receiver and the builder.
const CHUNKS_MAX: usize = 8;

/// Checkpoints between the builder and the committer; with the one that is being written, two are in flight.
const CHECKPOINTS_WAITING_MAX: usize = 1;

/// How long a stop waits for the last checkpoint: less than the half minute after which Kubernetes kills. What is not
/// archived by then stays in Postgres.
const STOP_TIMEOUT: Duration = Duration::from_secs(25);

/// How long whole checkpoints that are queued may still take after the connection is lost.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The tasks of a session.
struct Tasks {
    receiver: Receiver,
    chunks: mpsc::Receiver<crate::postgres::Chunk>,
    committer: Owned<Result<()>>,
    builder: Builder,
}

/// How a session ended that was told to.
pub(super) enum Ended {
    /// Everything that it received is archived.
    Whole,
    /// It had not begun to stream.
    Unopened,
}

/// How messages name the task.
const COMMITTER: &str = "the committer";

/// One hold of the slot.
pub(super) async fn session(
    config: &Config,
    shutdown: &watch::Receiver<()>,
    wants: &Arc<Wants>,
    vitals: &Vitals,
) -> Result<Ended> {
    let opened = tokio::select! {
        biased;
        () = stop(shutdown) => return Ok(Ended::Unopened),
        opened = open(config, wants, vitals) => opened?,
    };
    let Tasks { mut receiver, chunks, mut committer, builder } = opened;
    vitals.enter(Phase::Streaming);
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
async fn open(config: &Config, wants: &Arc<Wants>, vitals: &Vitals) -> Result<Tasks> {
    let mut sql = Session::new(config.source.clone());
    let storage = Storage::open(&config.storage)?.through(|store| watched(store, &vitals.counters));
    // Claims ask for it, too; but by then there may be a slot that keeps the server's log.
    storage.prove_once().await?;
    sql.run(setup::check_schema).await?;
    let config = &sql.run(async |client| describe::with_tables(config, client, Some(&storage)).await).await?;
    let mut connection = ReplicationConnection::connect(&config.source).await?;
    let identity = slot::identify(&mut connection).await?;
    let found = slot::find(&mut sql, &config.slot).await?;
    let watermarks = sql.run(watermark::read).await?;
    let history = history(config, &mut connection, &watermarks, &identity, found.as_ref()).await?;
    let publications = versions::streamed(config, &mut sql, found.as_ref(), wants).await?;
    ensure_slot(config, &mut sql, &mut connection, found).await?;
    let (stream, texts) = start_stream(config, &mut sql, connection, &publications, wants).await?;

    // Only now nobody else moves the slot or the archive.
    let (slot, holder) = held_slot(config, &mut sql).await?;
    let start = slot.confirmed_flush_lsn;
    vitals.lag.begin(start);
    let (durable_sender, durable) = watch::channel(start);
    let (chunk_sender, chunks) = mpsc::channel(CHUNKS_MAX);
    // What follows may take hours; somebody must answer the server meanwhile.
    let mut receiver = stream.spawn(chunk_sender, durable);
    let namer = Arc::new(Namer::new());
    let prepared = async {
        let claimed = claim(config, &mut sql, &storage, &identity, start, wants).await?;
        let config = config.describing(kinds_of(config, &claimed));
        prepare(&config, &mut sql, &storage, (&namer, wants, vitals), &identity, &history, (&slot, claimed))
            .await
            .map(|tables| (config, tables))
    };
    let (config, tables) = tokio::select! {
        biased;
        result = receiver.ended() => return Err(receiver_ended(result)),
        prepared = prepared => prepared?,
    };
    let config = &config;

    let messages = sql.run(slot::messages).await?;
    let decoder = decoder(config, &storage, &tables, start, texts.encoding).await?;
    // Of a table that is not to be had the stream brings nothing.
    let lsn_of = |kind| tables.iter().find(|table| table.kind() == kind).map_or(Lsn(u64::MAX), Table::lsn);
    let table_lsn = PerKind::new(config.all_kinds(), lsn_of);
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
        wants: Arc::clone(wants),
        vitals: vitals.clone(),
        durable: durable_sender,
    };
    Ok(Tasks {
        receiver,
        chunks,
        committer: Owned(tokio::spawn(Committer::new(parts).run(work))),
        builder: Builder::new(
            config,
            (sql, vitals),
            table_lsn,
            start,
            work_sender,
            (decoder, texts, messages),
        ),
    })
}

/// A decoder that knows what an earlier session has decided.
async fn decoder(
    config: &Config,
    storage: &Storage,
    tables: &[Table],
    start: Lsn,
    encoding: Encoding,
) -> Result<Decoder> {
    let mut decoder = Decoder::new(&config.schema, &config.kinds());
    if encoding == Encoding::Other {
        decoder.ask_for_texts();
    }
    decoder.settle(settled(config, storage, tables, start).await?);
    Ok(decoder)
}

/// Starts the stream, with texts as the database has them, and with other values as text if that is wanted.
async fn start_stream(
    config: &Config,
    sql: &mut Session,
    mut connection: ReplicationConnection,
    publications: &[String],
    wants: &Arc<Wants>,
) -> Result<(ReplicationStream, Texts)> {
    let encoding = sql.run(Encoding::of_database).await?;
    let (statement, encoding) = encoding.streamed(&config.publication);
    if let Some(statement) = statement {
        connection.query(statement).await?;
    }
    let slot = config.slot.as_str();
    let has_unreadable = sql.run(async |client| source::has_unreadable(client, slot).await).await?;
    let is_all = has_unreadable || wants.has_texts();
    let stream = connection.start(slot, publications, is_all).await?;
    let stream = stream.holding(config.row_bytes_max());
    Ok((stream, Texts { encoding, is_all, wants: Arc::clone(wants) }))
}

fn receiver_ended(result: Result<()>) -> Error {
    result.err().unwrap_or_else(|| Error::Internal("the receiver ended early".to_owned()))
}

/// Claims the tables; they have the columns then that their sources have by now.
async fn claim(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    identity: &Identity,
    start: Lsn,
    wants: &Wants,
) -> Result<Vec<Table>> {
    let app_id = archive::app_id(&identity.system_identifier, &config.slot);
    // Tells our log entries from those of any other session, and is in each of them.
    let session = format!("{:032x}", rand::rng().random::<u128>());
    // A session that can't write its watermarks must not put a claim into every log before it finds that out: the next one
    // would, too, and so on.
    sql.run(async |client| watermark::can_be_moved(client, &config.slot).await).await?;
    let (schema, shown) = (config.schema.as_str(), wants.all_columns());
    let mut tables = Vec::new();
    for kind in config.all_kinds() {
        let new = async |client: &_| growth::new_columns(client, schema, kind, &shown).await;
        let new = sql.run(new).await?;
        match Table::claim_with(storage, kind, &app_id, &session, start, &new).await {
            Ok(table) => tables.push(table),
            Err(error) => foreign::leave_out_broken(config, sql, storage, kind, error).await?,
        }
    }
    tracing::info!(session, "claimed the archive's tables");
    Ok(tables)
}

/// What the tables are, now that they are claimed; those that are not to be had are as they were.
fn kinds_of(config: &Config, claimed: &[Table]) -> Vec<Kind> {
    let now =
        |kind: Kind| claimed.iter().map(Table::kind).find(|now| now.name() == kind.name()).unwrap_or(kind);
    config.kinds().into_iter().map(now).collect()
}

/// Makes the tables fit for the stream.
async fn prepare(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    (namer, wants, vitals): (&Arc<Namer>, &Arc<Wants>, &Vitals),
    identity: &Identity,
    history: &History,
    (slot, mut tables): (&Slot, Vec<Table>),
) -> Result<Vec<Table>> {
    vitals.counters.expect(config.kinds().into_iter().map(Kind::name), &SORTS_OF_REASONS);
    let start = slot.confirmed_flush_lsn;
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
    let broken = recovery::watermarks(storage, &tables, sql, config).await?;
    foreign::leave_out_all(config, sql, storage, &mut tables, broken).await?;
    check_gap(config, sql, slot).await?;
    let timeline_id = identity.timeline_id;
    sql.run(async |client| watermark::set_timeline(client, &config.slot, timeline_id).await).await?;
    gap::notice(sql, &config.slot, &config.publication).await?;
    let (name, publication) = (config.slot.as_str(), config.publication.as_str());
    let mut incomplete = sql.run(async |client| gap::incomplete(client, name, publication).await).await?;
    incomplete.keep(|row| tables.iter().any(|table| table.kind().name() == row.kind));
    incomplete.keep(|row| versions::is_streamed(config, row, wants));
    foreign::drop_damaged(config, sql, &mut tables, &incomplete.mendable).await?;
    let backfill = Backfill { config, storage, namer, tables: &mut tables, sql, wants, vitals, timeline_id };
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
async fn settled(config: &Config, storage: &Storage, tables: &[Table], start: Lsn) -> Result<Settled> {
    let mut settled = Settled::new(&config.kinds());
    let quarantine = tables.iter().find(|table| table.kind().is_quarantine() && table.lsn() > start);
    let Some(quarantine) = quarantine else { return Ok(settled) };
    // A merge keeps the newest position of its inputs, so no file that may hold such a row is left out.
    let files = quarantine.files().filter(|file| file.name.as_ref().is_none_or(|name| name.lsn > start));
    let paths: Vec<String> = files.map(|file| file.path.clone()).collect();
    archive::each_quarantined(storage, &paths, |row| settled.add(row.source_table, row.row, row.lsn)).await?;
    Ok(settled)
}
