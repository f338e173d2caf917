//! The second key of the purge, without anybody asking: partitions that near their retention are read back from the archive
//! (see [`crate::verify`]) while the sidecar runs, one at a time, with pauses.

use std::collections::HashMap;
use std::time::Duration;

use chrono::Timelike as _;
use rand::RngExt as _;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::Session;
use crate::source::unarchived::{self, Told};
use crate::source::{self, Source};
use crate::verify::{self, Options, RepairMode, TableReport};
use crate::vitals::{self, OfOutcome, OfTable, Vitals};
use crate::watermark::{self, State};

/// How often the catalog is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);

/// How long before its retention ends a partition is verified.
const LEAD: &str = "interval '1 day'";

/// The pause after a verification, as a multiple of the time that it took.
const REST: u32 = 3;

/// When a partition is looked at again that differed, and one that could not be compared.
const DIFFERENT_PAUSE: Duration = Duration::from_secs(24 * 3600);
const FAILED_PAUSE: Duration = Duration::from_secs(300);

/// A partition that is to be verified.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Due {
    source_table: String,
    /// The table of the archive.
    kind: String,
    partition: String,
    oid: u32,
    /// Microseconds since the epoch; `None` if all of the table must be looked at.
    range: Option<(i64, i64)>,
}

/// Verifies what is due, until it is dropped. Whatever goes wrong is logged, and tried again.
pub(crate) async fn keep_verified(config: Config, vitals: Vitals) {
    let mut sql = Session::new(config.source.clone());
    let mut not_before: HashMap<u32, Instant> = HashMap::new();
    let mut pause = LOOK_INTERVAL;
    let mut told = Told::default();
    loop {
        tell_unarchived(&config, &mut sql, &mut told).await;
        let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
        sleep(jittered).await;
        pause = LOOK_INTERVAL;
        if !config.verify_hours.contains(chrono::Utc::now().hour()) {
            continue;
        }
        let all = match due(&config, &mut sql).await {
            Ok(all) => all,
            Err(error) => {
                // The session of the stream says the same, louder.
                tracing::debug!(error = error.chain(), "looking for partitions that near their retention");
                continue;
            }
        };
        not_before.retain(|oid, _| all.iter().any(|due| due.oid == *oid));
        let now = Instant::now();
        let next = all.iter().find(|due| not_before.get(&due.oid).is_none_or(|time| *time <= now));
        let Some(next) = next else { continue };
        if let Some(pause) = verify_one(&config, &mut sql, &vitals, next).await {
            not_before.insert(next.oid, Instant::now() + pause);
        }
        // There may be more.
        pause = now.elapsed() * REST;
    }
}

/// Says what can't be archived, once each.
async fn tell_unarchived(config: &Config, sql: &mut Session, told: &mut Told) {
    let told = async |client: &Client| {
        for row in watermark::read(client).await?.iter().filter(|row| row.slot_name == config.slot) {
            told.tell(client, &row.source_table).await?;
        }
        Ok(())
    };
    if let Err(error) = sql.run(told).await {
        // The session of the stream says the same, louder.
        tracing::debug!(error = error.chain(), "looking for what can't be archived");
    }
}

/// Verifies a partition; how long it is to be left alone if it could not be. One that was dropped meanwhile needs no more.
async fn verify_one(config: &Config, sql: &mut Session, vitals: &Vitals, due: &Due) -> Option<Duration> {
    let count = |outcome| {
        let of = OfOutcome { table: due.kind.clone(), outcome };
        vitals.counters.verified.get_or_create(&of).inc();
    };
    let why = match compare_one(config, due).await {
        Ok(Outcome::Equal) => {
            count("equal");
            let of = OfTable::new(&due.kind);
            vitals.counters.last_verified.get_or_create(&of).set(vitals::seconds_now());
            return None;
        }
        Ok(Outcome::Mended) => return None,
        Ok(Outcome::Different) => {
            count("different");
            return Some(DIFFERENT_PAUSE);
        }
        Err(why) => why,
    };
    let (table, partition) = (due.source_table.as_str(), due.partition.as_str());
    let query = "select exists (select from pg_class where oid = $1)";
    let is_there = async |client: &Client| {
        let row = client.query_one(query, &[&due.oid]).await;
        row.and_then(|row| row.try_get::<_, bool>(0)).map_err(Error::sql("looking for a partition"))
    };
    // If that can't be told, the reason of the comparison can.
    if sql.run(is_there).await.unwrap_or(true) {
        count("failed");
        tracing::warn!(table, partition, "not verified, so it is not purged: {why}");
    } else {
        tracing::info!(table, partition, "dropped while it was read back");
    }
    Some(FAILED_PAUSE)
}

/// What a comparison has found.
enum Outcome {
    /// The archive has what Postgres has.
    Equal,
    /// It had rows twice, which were removed; it is to be compared again.
    Mended,
    /// It has not.
    Different,
}

/// Compares a partition. The error is why it could not be compared.
async fn compare_one(config: &Config, due: &Due) -> Result<Outcome, String> {
    let (table, partition) = (due.source_table.as_str(), due.partition.as_str());
    let mut options = Options {
        tables: vec![due.source_table.clone()],
        from: due.range.map(|(from, _)| from),
        to: due.range.map(|(_, to)| to),
        ..Options::default()
    };
    let mut verified = verify::verify_beside(config, &options).await;
    if verified.as_ref().is_ok_and(|report| report.tables.iter().any(|table| doubles(table) > 0)) {
        // Rows that were moved. Again, because whoever removes something claims the tables before it reads them.
        options.repair = RepairMode::RemoveDoubles;
        verified = verify::verify_beside(config, &options).await;
    }
    let report = verified.map_err(|error| error.chain())?;
    let found = report.tables.first().ok_or("the table is gone")?;
    if let Some(why) = &found.not_compared {
        return Err(why.clone());
    }
    match found.partitions.iter().find(|one| one.partition == due.partition) {
        Some(one) if one.verified => {
            tracing::info!(table, partition, rows = one.row_count, "read back from the archive: equal");
            Ok(Outcome::Equal)
        }
        // It is still due: what was written anew is read back.
        Some(_) if is_mended(found) => Ok(Outcome::Mended),
        Some(_)
            if !found.quarantine_accepted
                && let [unfit, ..] = found.unfit_columns.as_slice() =>
        {
            Err(format!("column {} {}: {}", unfit.column, unfit.problem, unfit.remedy))
        }
        Some(_) if !found.differences.is_empty() => {
            tell_difference(found, partition);
            Ok(Outcome::Different)
        }
        _ => Err("it was changed meanwhile, or is gone".to_owned()),
    }
}

fn doubles(found: &TableReport) -> u64 {
    found.differences.iter().map(|one| one.doubles).sum()
}

/// Whether it differed by doubles alone, which were removed.
fn is_mended(found: &TableReport) -> bool {
    let is_double = |one: &verify::Difference| one.missing == 0 && one.surplus == 0;
    found.doubles_removed > 0
        && found.doubles_removed == doubles(found)
        && found.differences.iter().all(is_double)
}

fn tell_difference(found: &TableReport, partition: &str) {
    let sum = |count: fn(&verify::Difference) -> u64| found.differences.iter().map(count).sum::<u64>();
    tracing::error!(
        table = found.source_table,
        partition,
        hours = found.differences.len(),
        missing = sum(|one| one.missing),
        surplus = sum(|one| one.surplus),
        cut = sum(|one| one.cut),
        doubles = doubles(found) - found.doubles_removed.min(doubles(found)),
        "the archive differs from Postgres, so the partition is not purged; `highwater verify --table {}` names the hours, \
         --repair adds what is missing, --accept-surplus lets it be purged although rows were deleted in Postgres",
        found.source_table
    );
}

/// The partitions whose retention has ended, or soon will, and which are not verified: the oldest first.
async fn due(config: &Config, sql: &mut Session) -> Result<Vec<Due>> {
    let watermarks = sql.run(watermark::read).await?;
    let mut all = Vec::new();
    for row in watermarks.iter().filter(|row| row.slot_name == config.slot && row.state == State::Streaming) {
        let found = sql.run(async |client| due_of(client, row).await).await?;
        all.extend(found);
    }
    all.sort_by_key(|due| due.range);
    Ok(all)
}

async fn due_of(client: &Client, row: &watermark::Watermark) -> Result<Vec<Due>> {
    let failed = || Error::sql(format!("reading what of {} is verified", row.source_table));
    // As the purge itself decides what is dropped as a whole.
    let query = format!(
        "select u.partition_oid from highwater.retention r join highwater.watermark w using (source_table),
                lateral highwater.purge_units(w.table_oid) u
         where r.source_table = $1 and u.is_whole
           and (not u.is_attached or u.range_end <= highwater.cutoff(r.retention) + {LEAD})
           and not exists (select from highwater.verified_partition v
                           where v.source_table = r.source_table and v.partition_oid = u.partition_oid)"
    );
    let mut wanted: Vec<u32> = Vec::new();
    for found in client.query(&query, &[&row.source_table]).await.map_err(failed())? {
        wanted.push(found.try_get(0).map_err(failed())?);
    }
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let unarchived = unarchived::read(client, &row.source_table).await?;
    if !unarchived.columns.is_empty() && !unarchived.accepts_quarantine {
        // Whatever a comparison says, the table is not purged.
        return Ok(Vec::new());
    }
    let Some(source) = Source::find(client, row).await? else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for holder in source::holders(client, &row.source_table, source.oid).await? {
        if !wanted.contains(&holder.oid) || !holder.is_covered {
            continue;
        }
        let range = match holder.bounds {
            None if holder.is_detached => holder.range(client, &source.time).await?,
            // Without bounds that we understand, only a comparison of all of the table is one of all of it.
            bounds => bounds,
        };
        // The last microsecond belongs to it.
        let range = range.map(|(low, high)| (low, high.saturating_add(i64::from(holder.is_detached))));
        all.push(Due {
            source_table: row.source_table.clone(),
            kind: row.kind.clone(),
            partition: holder.name,
            oid: holder.oid,
            range,
        });
    }
    Ok(all)
}
