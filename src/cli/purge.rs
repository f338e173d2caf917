//! `highwater purge`: what pg_cron runs in the database, for those without it; and `--dry-run`, which explains it.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::{MissedTickBehavior, interval};

use super::columns::line;
use super::watermarks::bytes;
use super::{Format, json, print};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::postgres::sql;
use crate::purge::{self, Entry, Finding, Goal};
use crate::watermark;

/// How often the log is read while the purge works.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct PurgeFlags {
    /// Delete nothing: say what is past retention, what of it could be deleted now, and what blocks the rest
    #[arg(long)]
    dry_run: bool,

    /// Only this table (psi_drift, or with its schema); may be repeated
    #[arg(long, value_name = "TABLE")]
    table: Vec<String>,
}

/// The exit code is 0 if nothing that is past retention was left, 1 if something was.
pub(super) async fn purge(config: &Config, flags: &PurgeFlags, format: Format) -> Result<ExitCode> {
    let client = sql::connect(&config.source).await?;
    let chosen = watermark::choose(watermark::read(&client).await?, &config.slot, &flags.table)?;
    let goals = purge::goals(&client).await?;
    let goals: Vec<&Goal> = chosen
        .iter()
        .filter_map(|row| goals.iter().find(|goal| goal.source_table == row.source_table))
        .collect();
    if goals.is_empty() {
        return Err(Error::Setting {
            setting: "highwater.retention".to_owned(),
            value: "no row for these tables".to_owned(),
            accepted: "a retention for each table, which `highwater setup` writes".to_owned(),
        });
    }
    if flags.dry_run {
        explain(&client, &goals, format).await
    } else {
        run(config, &client, &goals, format).await
    }
}

async fn explain(client: &tokio_postgres::Client, goals: &[&Goal], format: Format) -> Result<ExitCode> {
    let mut findings = Vec::new();
    for goal in goals {
        findings.extend(purge::explain(client, Some(goal.oid), true).await?);
    }
    let is_blocked = findings.iter().any(|finding| finding.blocked_by.is_some());
    print(&match format {
        Format::Json => json(&findings)?,
        Format::Table if findings.is_empty() => "nothing is past its retention".to_owned(),
        Format::Table => {
            findings.iter().map(|finding| line(&described(finding))).collect::<Vec<_>>().join("\n")
        }
    })?;
    Ok(ExitCode::from(u8::from(is_blocked)))
}

fn described(finding: &Finding) -> String {
    let mut text = finding.partition.as_ref().unwrap_or(&finding.source_table).clone();
    // Writing to a `String` can't fail.
    if let Some(rows) = finding.row_count {
        let size = finding.byte_count.map(|count| format!(", {}", bytes(count))).unwrap_or_default();
        let _ = write!(text, ": {rows} rows past retention{size}");
    }
    let _ = match (finding.action.as_deref(), &finding.blocked_by) {
        (Some("drop"), None) => write!(text, "; it can be dropped"),
        (_, None) => write!(text, "; they can be deleted"),
        (Some("delete"), Some(why)) if finding.deletable > 0 => {
            write!(text, "; {} can be deleted; the others stay: {why}", finding.deletable)
        }
        (_, Some(why)) => write!(text, "; blocked: {why}"),
    };
    text
}

async fn run(
    config: &Config,
    client: &tokio_postgres::Client,
    goals: &[&Goal],
    format: Format,
) -> Result<ExitCode> {
    let watcher = sql::connect(&config.source).await?;
    let mut all = Vec::new();
    for goal in goals {
        let start = purge::log_end(client).await?;
        let mut told = Vec::new();
        let mut ticks = interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut work = std::pin::pin!(purge::purge(client, goal));
        loop {
            tokio::select! {
                done = &mut work => break done?,
                _ = ticks.tick(), if format == Format::Table => {
                    tell(&purge::log_since(&watcher, &goal.source_table, start).await?, &mut told, false)?;
                }
            }
        }
        let entries = purge::log_since(client, &goal.source_table, start).await?;
        if format == Format::Table {
            tell(&entries, &mut told, true)?;
            if entries.is_empty() {
                print(&format!("{}: nothing is older than {}", goal.source_table, goal.retention))?;
            }
        }
        all.extend(entries);
    }
    if format == Format::Json {
        print(&json(&all)?)?;
    }
    Ok(ExitCode::from(u8::from(all.iter().any(|entry| entry.action == "blocked"))))
}

/// Prints the entries that were not told yet; those that may still change only at the end.
fn tell(entries: &[Entry], told: &mut Vec<i64>, is_end: bool) -> Result<()> {
    for entry in entries {
        if told.contains(&entry.id) || (entry.action != "dropped" && !is_end) {
            continue;
        }
        told.push(entry.id);
        let what = entry.partition.as_ref().unwrap_or(&entry.source_table);
        let rows = entry.row_count.unwrap_or_default();
        let told = match (entry.action.as_str(), &entry.reason) {
            ("dropped", _) => {
                format!("{what}: dropped, {rows} rows, {}", bytes(entry.byte_count.unwrap_or_default()))
            }
            (_, Some(why)) => format!("{what}: blocked: {why}"),
            (action, None) => format!("{what}: {action} {rows} rows"),
        };
        print(&line(&told))?;
    }
    Ok(())
}
