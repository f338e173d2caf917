//! `highwater setup`: makes what archiving needs in the database, and says what it did and what it left.

use std::process::ExitCode;

use clap::Args;

use super::print;
use crate::config::Config;
use crate::error::Result;
use crate::setup;

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct SetupFlags {
    /// Have pg_cron purge what is past its retention and archived, at these times (in its time zone, GMT by default)
    #[arg(long, value_name = "SCHEDULE", num_args = 0..=1, default_missing_value = "17 * * * *")]
    schedule_purge: Option<String>,
}

/// The exit code is 1 if something is left to do without which rows may be dropped unarchived, or the purge was to be scheduled
/// and could not be.
pub(super) async fn setup(config: &Config, flags: &SetupFlags) -> Result<ExitCode> {
    let report = setup::setup(config).await?;
    tell(&report)?;
    let mut code = if report.todo.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if let Some(schedule) = &flags.schedule_purge {
        let report = setup::schedule_purge(config, schedule).await?;
        tell(&report)?;
        if !report.todo.is_empty() {
            code = ExitCode::FAILURE;
        }
    }
    print("\nNext: `highwater check`, then `highwater`.")?;
    Ok(code)
}

fn tell(report: &setup::Report) -> Result<()> {
    for (word, lines) in [("did ", &report.done), ("left", &report.left), ("TODO", &report.todo)] {
        for line in lines {
            print(&format!("{word}  {line}"))?;
        }
    }
    Ok(())
}
