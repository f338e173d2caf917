//! `highwater setup`: makes what archiving needs in the database, and says what it did and what it left.

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use clap::Args;

use super::{columns, print, print_as_it_is};
use crate::config::Config;
use crate::error::Result;
use crate::setup;

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct SetupFlags {
    /// Have pg_cron purge what is past its retention and archived, at these times (in its time zone, GMT by default)
    #[arg(long, value_name = "SCHEDULE", num_args = 0..=1, default_missing_value = "17 * * * *")]
    schedule_purge: Option<String>,

    /// Do what only the owner of the drift tables may: schema highwater, the publication, the rights of the role that archives. Log in
    /// as the owner, or as a superuser
    #[arg(long)]
    as_owner: bool,

    /// Print what `--as-owner` would do, as a script for psql, and do nothing
    #[arg(long, conflicts_with_all = ["as_owner", "schedule_purge"])]
    print_sql: bool,

    /// The role that archives, for `--as-owner` (highwater unless said otherwise) and `--print-sql` (the one that logs in, if that is not the owner)
    #[arg(long, value_name = "ROLE")]
    sidecar_role: Option<String>,
}

/// The exit code is 1 if something is left to do without which rows may be dropped unarchived, or the purge was to be scheduled
/// and could not be.
pub(super) async fn setup(config: &Config, flags: &SetupFlags) -> Result<ExitCode> {
    let role = flags.sidecar_role.as_deref();
    if flags.print_sql {
        // For psql, to which every character of a name counts.
        let script = setup::owner_script(config, role).await?;
        let show = if io::stdout().is_terminal() { print } else { print_as_it_is };
        show(script.trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = if flags.as_owner {
        setup::setup_as_owner(config, role.unwrap_or(setup::SIDECAR_ROLE)).await?
    } else {
        setup::setup(config).await?
    };
    tell(&report)?;
    let mut code = if report.todo.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if let Some(schedule) = &flags.schedule_purge {
        let report = setup::schedule_purge(config, schedule).await?;
        tell(&report)?;
        if !report.todo.is_empty() {
            code = ExitCode::FAILURE;
        }
    }
    print(if flags.as_owner {
        "\nNext, as the role that archives: `highwater setup`."
    } else {
        "\nNext: `highwater check`, then `highwater`."
    })?;
    Ok(code)
}

fn tell(report: &setup::Report) -> Result<()> {
    for (word, lines) in [("did ", &report.done), ("left", &report.left), ("TODO", &report.todo)] {
        for line in lines {
            print(&columns::line(&format!("{word}  {line}")))?;
        }
    }
    Ok(())
}
