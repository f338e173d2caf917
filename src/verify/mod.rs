//! `highwater verify`: what the archive holds, compared with Postgres at one point of both.
//!
//! ```text
//! point (S, L)        a temporary slot's snapshot S sees what was committed before L
//! checkpoint          the sidecar is asked for one, and its watermarks are waited for: the archive is past L
//! archive at P        one version of each Delta log, with its files and its position P >= L
//! tail                the temporary slot streams what was committed from L on, up to P
//! Postgres = S + tail, by SQL and by the decoder; archive = the files of that version, by DataFusion
//! ```
//!
//! Both are added up by hour of `created_at`: rows, and the sum of their digests (see `archive/files/digest`). Where they are equal,
//! nothing more is read. Where not, and where rows of the hour are in the quarantine, the hour is compared row by row, which
//! also tells the missing rows that a repair adds, and the surplus copies that it removes (see `archive/upkeep/doubles`).

mod damage;
mod hour;
mod report;
pub(crate) mod retention;
mod rows;
mod sums;
mod table;
mod tail;
mod upkeep;

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::archive::{self, Snapshot, Storage};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::postgres::Session;
use crate::sidecar::foreign;
use crate::source::describe;
use crate::source::slot;
use crate::source::{Point, Source};
use crate::tables::{Kind, PerKind};
use crate::watermark::{self, State, Watermark};
use hour::{ceil_hour, floor_hour};
pub use report::{Difference, Options, PartitionReport, Progress, RepairMode, Report, TableReport};
use rows::Repair;
use table::Table;
use tail::Tail;
use upkeep::Upkeep;

/// How often the watermarks are looked at while the archive is to pass the point.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How long the log of a table may be behind its watermark.
const ARCHIVE_WAIT: Duration = Duration::from_secs(15);

/// Compares the archive with Postgres; see the module's documentation. `tell` is called as it goes on. Where nobody archives, it
/// brings the archive up to Postgres by itself, and keeps it so until it is done.
///
/// # Errors
///
/// Nobody archives, and it can't either; the archive does not pass the point in time; or one of both sides can't be read. What a
/// repair has added by then stays.
pub async fn verify(config: &Config, options: &Options, tell: &(dyn Fn(Progress) + Sync)) -> Result<Report> {
    let mut sql = Session::new(config.source.clone());
    let rows = watermark::choose(sql.run(watermark::read).await?, &config.slot, &options.tables)?;
    // Where nothing was archived, nothing is begun.
    Storage::open_existing(&config.storage)?;
    let mut upkeep = Upkeep::begin(config, &mut sql, &rows, tell).await?;
    let report = compare(config, options, tell, &mut upkeep).await;
    upkeep.end().await;
    report
}

/// As [`verify`], beside an archiver of this process that may be between two sessions.
///
/// # Errors
///
/// As [`verify`], and if nobody archives.
pub(crate) async fn verify_beside(config: &Config, options: &Options) -> Result<Report> {
    compare(config, options, &|_| {}, &mut Upkeep::default()).await
}

async fn compare(
    config: &Config,
    options: &Options,
    tell: &(dyn Fn(Progress) + Sync),
    upkeep: &mut Upkeep,
) -> Result<Report> {
    let mut sql = Session::new(config.source.clone());
    let storage = Storage::open_existing(&config.storage)?;
    let config = &sql.run(async |client| describe::with_tables(config, client, Some(&storage)).await).await?;
    foreign::wait_until_noted(config, &mut sql).await?;
    let (point, mut slot) = Point::take(config).await?;
    let identity = slot::identify(&mut slot.connection).await?;
    let app_id = archive::app_id(&identity.system_identifier, &config.slot);
    let chosen = choose(config, options, &identity.system_identifier, sql.run(watermark::read).await?)?;
    sql.run(slot::ask_for_checkpoint).await?;
    upkeep.wait_until_archived(config, &mut sql, &chosen, point.lsn, tell).await?;
    let (mut archives, broken) = archives_of(config, &storage, &mut sql, &chosen, &app_id, point.lsn).await?;
    let mut repair = Repair::default();
    if options.repair != RepairMode::Report {
        let sound: Vec<Watermark> = archives.iter().map(|(row, ..)| (*row).clone()).collect();
        // Before the archive is read: whoever repairs it then is noticed.
        repair = Repair::claim(config, &storage, &sound, &app_id, options.repair).await?;
        (archives, _) = archives_of(config, &storage, &mut sql, &chosen, &app_id, point.lsn).await?;
    }
    // A table has the columns that it has got by now.
    let now = |kind: Kind| {
        archives.iter().map(|archived| archived.1).find(|now| now.name() == kind.name()).unwrap_or(kind)
    };
    let config = &config.describing(config.kinds().into_iter().map(now).collect());
    let compared = compared(config, &point, &archives).await?;
    // What has versions is compared as it was at the point.
    let is_in_tail = |kind: Kind, other: Kind| other == kind && !kind.keeps_versions();
    let reach =
        |kind: Kind| archives.iter().find(|(_, other, ..)| is_in_tail(kind, *other)).map(|(.., lsn)| *lsn);
    let upto = PerKind::new(config.kinds(), |kind| reach(kind).unwrap_or_default());
    let tail = Tail::read(config, slot, point.lsn, upto, compared.clone()).await?;
    let now = sql.run(watermark::read).await?;
    let mut report = Report { equal: broken.is_empty(), tables: Vec::new() };
    for (row, error) in broken {
        let mut table = TableReport::begin(row, options, &mut sql).await?;
        table.not_compared = Some(error.chain());
        report.tables.push(table);
    }
    for (row, kind, snapshot, lsn) in &archives {
        let mut table = TableReport::begin(row, options, &mut sql).await?;
        table.lsn = Some(lsn.to_string());
        let still = now.iter().find(|now| now.source_table == row.source_table);
        let is_steady =
            still.is_some_and(|now| now.state == State::Streaming && now.gap_count == row.gap_count);
        if row.state == State::Streaming && is_steady {
            let work = Table {
                config,
                storage: &storage,
                point: &point,
                row,
                kind: *kind,
                compared: compared.get(*kind).copied().unwrap_or(*kind),
                files: &snapshot.files,
                range: options.hours(),
                accepts_surplus: options.accept_surplus,
                tell,
            };
            if let Err(error) = work.compare(&mut table, &tail, &mut repair, &mut sql).await {
                // The others may be compared all the same, and what was added is told.
                if !is_about_table(&error) {
                    return Err(error);
                }
                let _ = point.rollback_to_savepoint().await;
                table.not_compared = Some(error.chain());
            }
        } else {
            let state = still.map_or(row.state, |now| now.state);
            table.not_compared = Some(not_steady(state, slot::is_held(&mut sql, &config.slot).await?));
        }
        report.equal &= table.is_whole() && table.differences.is_empty();
        report.tables.push(table);
    }
    Ok(report)
}

/// How the rows of each kind are compared with the tables as the snapshot sees them.
async fn compared(config: &Config, point: &Point, archives: &[Archived<'_>]) -> Result<PerKind<Kind>> {
    let mut compared = PerKind::new(config.kinds(), |kind| kind);
    for (row, kind, ..) in archives {
        let source = Source::find(&point.client, row).await?;
        if let (Some(source), Some(place)) = (source, compared.get_mut(*kind)) {
            *place = source.compared(*kind);
        }
    }
    Ok(compared)
}

/// Why a table in this state is not compared; whether somebody holds the slot.
fn not_steady(state: State, is_held: bool) -> String {
    let name = state.name();
    match (state, is_held) {
        (State::Streaming, _) => "a gap was found and mended meanwhile; verify again".to_owned(),
        (_, true) => format!(
            "its state is {name}: the sidecar has rows to add first (`highwater --watermarks` shows when it has)"
        ),
        (_, false) => format!(
            "its state is {name}, and nobody archives: start `highwater run`, which adds the rows that are missing first"
        ),
    }
}

/// The tables that are asked for.
fn choose(
    config: &Config,
    options: &Options,
    system: &str,
    watermarks: Vec<Watermark>,
) -> Result<Vec<Watermark>> {
    let rows = watermark::choose(watermarks, &config.slot, &options.tables)?;
    match rows.iter().find(|row| row.system_identifier != system) {
        None => Ok(rows),
        Some(other) => Err(Error::Slot {
            slot: config.slot.clone(),
            detail: format!(
                "this server is system {system}, but {} is archived from system {}",
                other.source_table, other.system_identifier
            ),
            transient: false,
        }),
    }
}

/// A table with its archive, and the position of that.
type Archived<'a> = (&'a Watermark, Kind, Snapshot, Lsn);

/// The archives of these tables; and the tables whose archive can't be read as it is, with the reason.
async fn archives_of<'a>(
    config: &Config,
    storage: &Storage,
    sql: &mut Session,
    chosen: &'a [Watermark],
    app_id: &str,
    lsn: Lsn,
) -> Result<(Vec<Archived<'a>>, Vec<(&'a Watermark, Error)>)> {
    let (mut archives, mut broken) = (Vec::new(), Vec::new());
    for row in chosen {
        let Some(kind) = config.kind(&row.kind) else { continue };
        match archive_of(config, storage, sql, (row, kind), app_id, lsn).await {
            Ok((snapshot, lsn)) => archives.push((row, snapshot.kind, snapshot, lsn)),
            Err(error) if foreign::is_broken(&error) => broken.push((row, error)),
            Err(error) => return Err(error),
        }
    }
    Ok((archives, broken))
}

/// The newest version of a table's archive, and its position, which must have passed `lsn`: only the sidecar's own archive has.
async fn archive_of(
    config: &Config,
    storage: &Storage,
    sql: &mut Session,
    (row, kind): (&Watermark, Kind),
    app_id: &str,
    lsn: Lsn,
) -> Result<(Snapshot, Lsn)> {
    let begun = Instant::now();
    let mut asked = begun;
    loop {
        let snapshot = Snapshot::read(storage, kind, app_id).await?;
        let at = snapshot.lsn.unwrap_or_default();
        // The watermark may be a moment ahead, where nothing was pending. That of an incomplete table stands still.
        if at >= lsn || row.state != State::Streaming {
            return Ok((snapshot, at));
        }
        if begun.elapsed() > ARCHIVE_WAIT {
            return Err(Error::Setting {
                setting: "storage".to_owned(),
                value: config.storage.storage_uri.clone(),
                accepted: format!(
                    "the storage that the sidecar writes to: the watermark of {} has passed {lsn}, but {} is at {at}",
                    row.source_table,
                    storage.table_url(kind)
                ),
            });
        }
        // A sidecar that was stopped between its watermark rows and the archive's logs has forgotten who asked.
        if asked.elapsed() > ARCHIVE_WAIT / 3 {
            sql.run(slot::ask_for_checkpoint).await?;
            asked = Instant::now();
        }
        sleep(LOOK_INTERVAL).await;
    }
}

/// Whether an error is about one table, and leaves the others be.
fn is_about_table(error: &Error) -> bool {
    match error {
        Error::Slot { transient, .. } => *transient,
        // The table or a column is gone, or locked by somebody.
        Error::Server { code, .. } => ["42P01", "42703", "55P03"].contains(&code.as_str()),
        _ => false,
    }
}

impl Options {
    /// The times that are compared, whole hours.
    fn hours(&self) -> (i64, i64) {
        (self.from.map_or(i64::MIN, floor_hour), self.to.map_or(i64::MAX, ceil_hour))
    }
}
