//! `highwater verify`: the report of [`crate::verify`], for people or for machines, and how far it is meanwhile.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use clap::Args;

use super::{Format, columns, json, print};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reader::moment;
use crate::source::unarchived::{Part, UnfitColumn};
use crate::telemetry::Bar;
use crate::verify::{Difference, Options, Progress, RepairMode, Report, TableReport};

/// How often progress is logged where there is no terminal.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Differences that the table for people shows of one table; JSON has all.
const DIFFERENCES_SHOWN: usize = 50;

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct VerifyFlags {
    /// Only this table (psi_drift, or with its schema); may be repeated
    #[arg(long, value_name = "TABLE")]
    table: Vec<String>,

    /// Only rows from this time on (RFC 3339, or a date), rounded down to an hour
    #[arg(long, value_name = "TIME", value_parser = moment)]
    from: Option<DateTime<Utc>>,

    /// Only rows before this time, rounded up to an hour
    #[arg(long, value_name = "TIME", value_parser = moment)]
    to: Option<DateTime<Utc>>,

    /// Add the rows that the archive lacks, but not in hours where rows were changed in Postgres, as far as can be told: where
    /// the archive has others, too. Of rows that it has more often than Postgres, which has them, too, the surplus copies are
    /// removed; whatever else it has too much is left as it is
    #[arg(long)]
    repair: bool,

    /// As --repair, and also in those hours: the archive then has a changed row in both forms
    #[arg(long)]
    repair_changed: bool,

    /// Let the purge drop partitions of which the archive has rows that Postgres has not, because they were deleted or
    /// changed there on purpose
    #[arg(long)]
    accept_surplus: bool,

    /// Call a table equal of which no row can be archived but in the quarantine, because of a column's type. (Its rows are purged
    /// where accepts_quarantine is set in highwater.retention.)
    #[arg(long)]
    accept_quarantine: bool,
}

/// Compares, and prints what was found; the exit code is 0 when both sides are equal, 1 when not.
pub(super) async fn verify(config: &Config, flags: &VerifyFlags, format: Format) -> Result<ExitCode> {
    let (from, to) = (flags.from, flags.to);
    if let (Some(from), Some(to)) = (from, to)
        && from >= to
    {
        return Err(Error::Setting {
            setting: "--to".to_owned(),
            value: to.to_rfc3339(),
            accepted: format!("later than --from, {}", from.to_rfc3339()),
        });
    }
    let options = Options {
        tables: flags.table.clone(),
        from: from.map(|time| time.timestamp_micros()),
        to: to.map(|time| time.timestamp_micros()),
        repair: match (flags.repair_changed, flags.repair) {
            (true, _) => RepairMode::AddChanged,
            (false, true) => RepairMode::AddMissing,
            (false, false) => RepairMode::Report,
        },
        accept_surplus: flags.accept_surplus,
        accept_quarantine: flags.accept_quarantine,
    };
    let shown = Mutex::new(Shown { bar: None, unit: "", logged: Instant::now() });
    let tell = |progress: Progress| {
        shown.lock().unwrap_or_else(PoisonError::into_inner).tell(&progress);
    };
    tracing::info!("taking a snapshot; this waits for transactions that are running now");
    let report = crate::verify::verify(config, &options, &tell).await;
    drop(shown);
    let report = report?;
    print(&match format {
        Format::Table => text(&report),
        Format::Json => json(&report)?,
    })?;
    Ok(if report.equal { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// How far it is: a bar on the terminal, or told in the log from time to time.
struct Shown {
    bar: Option<Bar>,
    /// What the bar counts.
    unit: &'static str,
    logged: Instant,
}

impl Shown {
    fn tell(&mut self, progress: &Progress) {
        let Progress { table, step, done, all, unit } = progress;
        if self.unit != *unit {
            self.unit = unit;
            self.bar = Bar::new(unit);
        }
        if let Some(bar) = &self.bar {
            bar.show(&format!("{table}: {step}"), *done, (*all > 0).then_some(*all));
        } else if self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            tracing::info!(table, done, all, unit, "{step}");
        }
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for table in &report.tables {
        // Writing to a `String` can't fail.
        let _ = writeln!(text, "{}", columns::line(&summary(table)));
        for Part { part, reason, remedy } in &table.parts_not_compared {
            let told = format!("  {part} was not compared: it {reason}; to have it archived: {remedy}");
            let _ = writeln!(text, "{}", columns::line(&told));
        }
        for UnfitColumn { column, problem, remedy } in &table.unfit_columns {
            let told = format!(
                "  only its quarantine has its rows: column {column} {problem}; to have them archived: {remedy}{}",
                if table.quarantine_accepted { " (accepted)" } else { "; --accept-quarantine accepts it" }
            );
            let _ = writeln!(text, "{}", columns::line(&told));
        }
        for difference in table.differences.iter().take(DIFFERENCES_SHOWN) {
            let _ = writeln!(text, "  {}", line(difference));
        }
        if let Some(more) = table.differences.len().checked_sub(DIFFERENCES_SHOWN).filter(|more| *more > 0) {
            let _ = writeln!(text, "  and {more} more hours; --format json has them all");
        }
    }
    let is_mended = |table: &TableReport| {
        let mended = |one: &Difference| one.added == one.missing && one.surplus + one.cut == 0;
        let doubles = table.differences.iter().map(|one| one.doubles).sum::<u64>();
        table.is_whole() && table.doubles_removed == doubles && table.differences.iter().all(mended)
    };
    let is_empty = |table: &TableReport| table.postgres_rows + table.archive_rows == 0;
    text.push_str(if report.equal && report.tables.iter().all(is_empty) {
        "\nequal: neither side has rows of that time"
    } else if report.equal {
        "\nequal"
    } else if report.tables.iter().all(is_mended) {
        "\nNOT equal before; what was missing was added, and what was double removed: verify again"
    } else {
        "\nNOT equal"
    });
    text
}

fn summary(table: &TableReport) -> String {
    if let Some(why) = &table.not_compared {
        return format!("{}  not compared: {why}", table.source_table);
    }
    let verified = table.partitions.iter().filter(|partition| partition.verified).count();
    let removed = match table.doubles_removed {
        0 => String::new(),
        count => format!("; {count} surplus copies removed"),
    };
    format!(
        "{}  {} rows in Postgres, {} in the archive{}, {} hours, {} different; {verified} of {} partitions verified, at {}{removed}",
        table.source_table,
        table.postgres_rows,
        table.archive_rows,
        match table.quarantined_rows {
            0 => String::new(),
            rows => format!(", {rows} for its quarantine"),
        },
        table.hours,
        table.differences.len(),
        table.partitions.len(),
        table.lsn.as_deref().unwrap_or("?"),
    )
}

fn line(difference: &Difference) -> String {
    let mut parts = Vec::new();
    if difference.missing > 0 {
        parts.push(match difference.added {
            0 => format!("the archive lacks {} rows", difference.missing),
            added => format!("the archive lacked {} rows, {added} were added", difference.missing),
        });
    }
    if difference.surplus > 0 {
        parts.push(format!("the archive has {} rows that Postgres has not", difference.surplus));
    }
    if difference.doubles > 0 {
        parts.push(format!(
            "the archive had {} copies too many of rows that Postgres has",
            difference.doubles
        ));
    }
    if difference.cut > 0 {
        parts.push(format!(
            "{} rows are too long for --memory, so the quarantine has them without their long values",
            difference.cut
        ));
    }
    format!(
        "{}  {} rows in Postgres, {} in the archive: {}",
        difference.hour.as_deref().unwrap_or("without a usable time"),
        difference.postgres_rows,
        difference.archive_rows,
        parts.join("; ")
    )
}
