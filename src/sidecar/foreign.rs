//! What somebody else does to the archive, noticed and told to the purge: log entries that take rows away, files that are
//! gone, tables that can't be used any more.

use std::time::{Duration, Instant, SystemTime};

use tokio::time::sleep;
use tokio_postgres::Client;

use crate::archive::{self, ForeignRemoval, Storage, Table};
use crate::config::Config;
use crate::error::{Error, Policy, Result};
use crate::postgres::Session;
use crate::postgres::sql::connect;
use crate::purge;
use crate::source;
use crate::source::slot;
use crate::tables::Kind;
use crate::watermark::{self, Removal, Void, Watermark};

/// How long after a removal nothing is vacuumed or trimmed, so that the table can be taken back; Delta's own default.
const HISTORY_KEPT: Duration = Duration::from_hours(7 * 24);

/// A file that is gone so soon after it was written was never read by anybody: somebody has vacuumed without retention.
/// Postgres still has its rows, unless retention is as short.
const SOON: Duration = Duration::from_hours(24);

/// Added to twice the staleness bound: how long a sidecar may take to note what others did.
const NOTE_WAIT: Duration = Duration::from_mins(1);

/// How often that is looked at.
const NOTE_INTERVAL: Duration = Duration::from_millis(500);

/// So many files at most are written again without being asked.
const REWRITTEN_MAX: usize = 1000;

/// Files that a message names.
const SHOWN: usize = 5;

/// Looks for what others did while nobody ran; must come before anything is published that a purge relies on.
///
/// # Errors
///
/// The logs are not the ones that were looked at; they, or the database, can't be read.
pub(crate) async fn look_back(config: &Config, sql: &mut Session, tables: &mut [Table]) -> Result<()> {
    let logs = sql.run(watermark::read_archive_logs).await?;
    for table in tables.iter_mut() {
        let Some(log) = logs.get(table.kind().name()) else { continue };
        if let Some(at) = log.removal_at {
            table.keep_history(at + HISTORY_KEPT);
        }
        if let Err(mut error) = table.look_back(log.version).await {
            if let Error::Setting { accepted, .. } = &mut error {
                let name = watermark::source_table(&config.schema, table.kind()).unwrap_or_default();
                accepted.push_str(&format!("; the watermark of {name} speaks of that"));
                // What the watermarks say is not to be relied on: nothing more may be purged.
                sql.run(async |client| watermark::mark_gap(client, &config.slot).await).await?;
            }
            return Err(error);
        }
        note(config, sql, table).await?;
    }
    Ok(())
}

/// Writes down what a table's handle has noticed, and takes back what was verified of the rows.
///
/// # Errors
///
/// The database can't be read or written; then it is noted the next time.
pub(crate) async fn note(config: &Config, sql: &mut Session, table: &mut Table) -> Result<()> {
    let removals = table.removals().to_vec();
    for removal in &removals {
        let kind = table.kind();
        let description = table.describe(removal);
        let reason = removal.is_loss.then_some(description.as_str());
        if removal.is_loss {
            tracing::error!(table = kind.name(), "{description}; what it concerns is not purged");
            let noted = Removal {
                kind,
                version: removal.version,
                note: &description,
                row_count: removal.row_count,
                is_return: removal.is_return(),
            };
            sql.run(async |client| watermark::note_removal(client, &noted).await).await?;
            table.keep_history(SystemTime::now() + HISTORY_KEPT);
        } else {
            let (version, operation) = (removal.version, removal.operation.as_str());
            tracing::info!(
                table = kind.name(),
                version,
                operation,
                "somebody else wrote the files anew; they are read back before a purge"
            );
        }
        void(config, sql, table, removal, reason).await?;
    }
    if !removals.is_empty() {
        let (kind, version) = (table.kind(), table.version());
        sql.run(async |client| watermark::set_noted(client, kind, version).await).await?;
    }
    table.forget_removals(removals.len());
    Ok(())
}

/// Waits until the sidecar has noted what others have taken out of the tables by now: what is verified before that is void when
/// it does. Goes on without where nobody archives, or nothing can be read; then nothing is recorded as verified.
///
/// # Errors
///
/// The database can't be read.
pub(crate) async fn wait_until_noted(config: &Config, sql: &mut Session) -> Result<()> {
    let Ok(storage) = Storage::open_existing(&config.storage) else { return Ok(()) };
    let rows = sql.run(watermark::read).await?;
    let Some(row) = rows.iter().find(|row| row.slot_name == config.slot) else { return Ok(()) };
    let app_id = archive::app_id(&row.system_identifier, &config.slot);
    let begun = Instant::now();
    for kind in config.all_kinds() {
        while begun.elapsed() < config.max_lag * 2 + NOTE_WAIT {
            let logs = sql.run(watermark::read_archive_logs).await?;
            let Some(log) = logs.get(kind.name()) else { break };
            let is_behind = archive::removes_since(&storage, kind, &app_id, log.version).await;
            if !is_behind.unwrap_or(false) || !slot::is_held(sql, &config.slot).await? {
                break;
            }
            sleep(NOTE_INTERVAL).await;
        }
    }
    Ok(())
}

/// Takes back what was verified of the partitions that a removal may concern. Of a removal from the quarantine, whose rows
/// may be of any table and time, of all.
async fn void(
    config: &Config,
    sql: &mut Session,
    table: &Table,
    removal: &ForeignRemoval,
    reason: Option<&str>,
) -> Result<()> {
    let kind = table.kind();
    for row in &fed(config, sql, kind).await? {
        let partitions =
            concerned(sql, row, |low, high| kind.is_quarantine() || removal.may_concern(low, high)).await?;
        let row_count = (!kind.is_quarantine()).then_some(table.totals().row_count);
        let void = Void { source_table: &row.source_table, partitions: &partitions, reason, row_count };
        sql.run(async |client| watermark::void_partitions(client, &void).await).await?;
    }
    Ok(())
}

/// The watermarks of the drift tables whose rows a Delta table may hold: the quarantine may have some of each.
async fn fed(config: &Config, sql: &mut Session, kind: Kind) -> Result<Vec<Watermark>> {
    let mut rows = sql.run(watermark::read).await?;
    rows.retain(|row| row.slot_name == config.slot && (kind.is_quarantine() || row.kind == kind.name()));
    Ok(rows)
}

/// The partitions of a drift table that may have rows of certain times.
async fn concerned(
    sql: &mut Session,
    row: &Watermark,
    is_concerned: impl Fn(i64, i64) -> bool,
) -> Result<Vec<u32>> {
    let name = row.source_table.as_str();
    let Some(oid) = sql.run(async |client| watermark::table_oid(client, name).await).await? else {
        return Ok(Vec::new());
    };
    let holders = sql.run(async |client| source::holders(client, name, oid).await).await?;
    let concerned = holders.iter().filter(|holder| {
        let (low, high) = holder.extent.unwrap_or((i64::MIN, i64::MAX));
        is_concerned(low, high)
    });
    Ok(concerned.map(|holder| holder.oid).collect())
}

/// Looks at all of a table: entries of others, and whether the files are there. Writes down that it has.
///
/// Where young files are gone that Postgres still has the rows of, the table becomes a gap: its rows are compared with Postgres, and
/// written again. Other files stay in the log, because they may come back: a mount may have been away.
///
/// # Errors
///
/// As [`Table::look`], and if the database can't be written.
pub(crate) async fn look(config: &Config, sql: &mut Session, table: &mut Table) -> Result<()> {
    let begun = Instant::now();
    table.look().await?;
    note(config, sql, table).await?;
    let damaged = table.damaged().await?;
    let damage = take_note(config, sql, table, &damaged).await?;
    let (kind, version, trust) = (table.kind(), table.version(), config.purge_trust);
    let looked = async |client: &Client| {
        watermark::set_looked(client, kind, version, begun.elapsed(), trust, damage.as_deref()).await
    };
    sql.run(looked).await
}

/// Takes back what was verified of the rows of files that are gone, when they are first missed; what people are told of them. `None` if
/// all are there.
async fn take_note(
    config: &Config,
    sql: &mut Session,
    table: &mut Table,
    damaged: &[archive::Damaged],
) -> Result<Option<String>> {
    let is_new = table.set_damaged(damaged);
    if damaged.is_empty() {
        return Ok(None);
    }
    let kind = table.kind();
    let is_young = |file: &archive::Damaged| {
        let written = u64::try_from(file.file.modified_millis).unwrap_or_default();
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + Duration::from_millis(written));
        age.unwrap_or_default() < SOON
    };
    let names: Vec<&str> = damaged.iter().take(SHOWN).map(|one| one.file.path.as_str()).collect();
    let reason = format!(
        "{} files of the archive's table {} are gone, or not as they were written ({}{}): bring them back (a mount or rights that \
         were lost, a backup, an older version of the objects) and run `highwater verify`; or have the rows that Postgres still has \
         written again with `highwater resync`, after which version {} of the table's log is the one that names them",
        damaged.len(),
        kind.name(),
        names.join(", "),
        if damaged.len() > names.len() { ", ..." } else { "" },
        table.version(),
    );
    let removal = ForeignRemoval {
        version: table.version(),
        operation: "files that are gone".to_owned(),
        row_count: damaged
            .iter()
            .map(|one| one.file.row_count.and_then(|count| i64::try_from(count).ok()))
            .sum(),
        is_loss: true,
        times: damaged.iter().map(|one| one.file.times()).collect(),
    };
    if is_new {
        tracing::error!(table = kind.name(), "{reason}; what they hold is not purged");
        table.keep_history(SystemTime::now() + HISTORY_KEPT);
        void(config, sql, table, &removal, Some(&reason)).await?;
    }
    if is_new && damaged.iter().any(is_young) && has_all(config, sql, kind, damaged).await? {
        rewrite(config, sql, kind).await?;
    }
    Ok(Some(reason))
}

/// Whether Postgres still has what some files of a table held, as far as can be told: nothing of their times was purged, and there are
/// rows of them. More files than a few are a storage that is not well.
async fn has_all(
    config: &Config,
    sql: &mut Session,
    kind: Kind,
    damaged: &[archive::Damaged],
) -> Result<bool> {
    if damaged.len() > REWRITTEN_MAX {
        return Ok(false);
    }
    let rows = fed(config, sql, kind).await?;
    // It may take longer than what a session allows that only touches a few rows.
    let client = connect(&config.source).await?;
    let times: Vec<(i64, i64)> = damaged.iter().map(|one| one.file.times()).collect();
    for row in &rows {
        let purged = purge::cutoff(&client, &row.source_table, false).await?.unwrap_or(i64::MIN);
        if times.iter().any(|(first, _)| *first < purged) {
            return Ok(false);
        }
        // What the quarantine holds may be of any time.
        if !kind.is_quarantine() && source::have_rows(&client, row, &times).await?.contains(&false) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes the tables whose rows a table may have held gaps, so that what is missing is added.
async fn rewrite(config: &Config, sql: &mut Session, kind: Kind) -> Result<()> {
    for row in &fed(config, sql, kind).await? {
        let table = row.source_table.as_str();
        tracing::warn!(
            table,
            "gap: files are gone soon after they were written; what Postgres still has is written again"
        );
        sql.run(async |client| watermark::resync(client, table).await).await?;
    }
    Ok(())
}

/// Takes the files that are gone out of the logs of tables that are about to be completed, so that their rows can be read and
/// added: a comparison reads every file of the times that Postgres has rows of. Those of other times stay: nothing of them could be
/// added, and they may come back.
///
/// # Errors
///
/// The log, or the database, can't be written.
pub(crate) async fn drop_damaged(
    config: &Config,
    sql: &mut Session,
    tables: &mut [Table],
    incomplete: &[Watermark],
) -> Result<()> {
    for table in tables.iter_mut() {
        let kind = table.kind();
        let row = incomplete.iter().find(|row| row.kind == kind.name());
        if incomplete.is_empty() || (row.is_none() && !kind.is_quarantine()) {
            continue;
        }
        let mut damaged = table.damaged().await?;
        if let Some(row) = row.filter(|_| !damaged.is_empty()) {
            let client = connect(&config.source).await?;
            let times: Vec<(i64, i64)> = damaged.iter().map(|one| one.file.times()).collect();
            let mut is_needed = source::have_rows(&client, row, &times).await?.into_iter();
            damaged.retain(|_| is_needed.next() == Some(true));
        }
        if damaged.is_empty() {
            continue;
        }
        let lost: u64 = damaged.iter().filter_map(|one| one.file.row_count).sum();
        let paths: Vec<String> = damaged.into_iter().map(|one| one.file.path).collect();
        tracing::error!(
            table = kind.name(),
            version = table.version(),
            files = paths.len(),
            rows = lost,
            first = paths.first(),
            "files that are gone are taken out of the log; what Postgres still has of their rows is added again. Should they come \
             back, with rows that Postgres has not any more: {}, then `highwater verify --repair`",
            table.restoring()
        );
        if let Some(row) = row {
            // Before the entry: the watermark must never say more than the archive has.
            let name = row.source_table.as_str();
            let held = table.totals().row_count.saturating_sub(lost);
            let void = Void { source_table: name, partitions: &[], reason: None, row_count: Some(held) };
            sql.run(async |client| watermark::void_partitions(client, &void).await).await?;
        }
        table.keep_history(SystemTime::now() + HISTORY_KEPT);
        table.drop_files(paths).await?;
    }
    Ok(())
}

/// Whether an error says that a table can't be used as it is: the others can go on without it. Not so without the quarantine,
/// which they need.
pub(crate) fn is_broken(error: &Error) -> bool {
    let is_one = matches!(error, Error::Delta { table, .. } if *table != Kind::quarantine().name());
    is_one && error.policy() != Policy::Retry
}

/// Leaves a table out that could not be claimed, if that is because of its log.
///
/// # Errors
///
/// The error itself if it has another cause; the database can't be read or written.
pub(crate) async fn leave_out_broken(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    kind: Kind,
    error: Error,
) -> Result<()> {
    let mut is_its_own = is_broken(&error);
    // The library tells of an entry that is none as it does of a storage that fails.
    if !is_its_own && !kind.is_quarantine() && matches!(error, Error::Delta { .. }) {
        let logs = sql.run(watermark::read_archive_logs).await?;
        if let Some(log) = logs.get(kind.name()) {
            is_its_own = archive::broken_since(storage, kind, log.version).await?.is_some();
        }
    }
    if is_its_own { leave_out(config, sql, storage, kind, error).await } else { Err(error) }
}

/// Takes note that a table can't be used: its rows pass the stream until it can be again, and are added then.
///
/// # Errors
///
/// The database can't be written.
pub(crate) async fn leave_out(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    kind: Kind,
    error: Error,
) -> Result<()> {
    let logs = sql.run(watermark::read_archive_logs).await?;
    let broken = match logs.get(kind.name()) {
        Some(log) => archive::broken_since(storage, kind, log.version).await.ok().flatten(),
        None => None,
    };
    let error = broken.unwrap_or(error);
    if let Some(name) = watermark::source_table(&config.schema, kind) {
        sql.run(async |client| watermark::mark_one_gap(client, &name).await).await?;
        let note = error.chain();
        let noted = Removal { kind, version: 0, note: &note, row_count: Some(0), is_return: false };
        sql.run(async |client| watermark::note_removal(client, &noted).await).await?;
    }
    tracing::error!(
        table = kind.name(),
        error = error.chain(),
        "this table is not archived, and its purge is blocked; the others go on. What is written meanwhile stays in Postgres, and \
         is added when the table can be used again"
    );
    Ok(())
}

/// Leaves tables out that were claimed.
///
/// # Errors
///
/// The database can't be written.
pub(crate) async fn leave_out_all(
    config: &Config,
    sql: &mut Session,
    storage: &Storage,
    tables: &mut Vec<Table>,
    broken: Vec<(Kind, Error)>,
) -> Result<()> {
    for (kind, error) in broken {
        leave_out(config, sql, storage, kind, error).await?;
        tables.retain(|table| table.kind() != kind);
    }
    Ok(())
}

/// Whether a table that was left out can be used again: its log, and the files that it names.
pub(crate) async fn is_mended(storage: &Storage, kind: Kind) -> bool {
    match archive::View::read(storage, kind).await {
        Ok(view) => archive::check_footers(storage, kind, view.files()).await.is_ok(),
        Err(_) => false,
    }
}
