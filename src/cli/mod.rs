//! The command line: one file per subcommand. The only module that speaks to the terminal.

mod check;
mod columns;
mod completions;
mod drift;
mod flags;
mod notify;
mod output;
mod plot;
mod purge;
mod query;
mod resync;
mod run;
mod serve;
mod setup;
mod sql;
mod verify;
mod watermarks;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use crate::apart;
use crate::config::{Config, Layers, environment_variable};
use crate::error::{Error, Policy, Result};
use crate::failpoint;
use crate::telemetry::{self, LogFormat};
use completions::ShellName;
use drift::DriftFlags;
use flags::SettingFlags;
use output::Style;
use purge::PurgeFlags;
use query::QueryFlags;
use resync::ResyncFlags;
use setup::SetupFlags;
use sql::SqlFlags;
use verify::VerifyFlags;

/// Archive drift records from PostgreSQL into Delta Lake, exactly once
///
/// Highwater follows the inserts into the drift tables of a monitoring database by logical
/// replication and keeps every row for ever as Parquet in Delta Lake tables. It records how far the
/// archive reaches, so that retention deletes only what the archive provably holds.
///
/// Start with `highwater setup`, which makes what archiving needs in the database and leaves what is
/// there; then `highwater check`, which names everything that is still missing; then `highwater`, and
/// leave it running. Stop it with SIGTERM or Ctrl-C: it archives what it has and ends.
///
/// Settings come from flags, then the environment, then highwater.toml, then the defaults.
#[derive(Parser)]
#[command(name = "highwater", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    /// Print how far the archive reaches, per table, and end
    #[arg(long)]
    watermarks: bool,

    /// How reports and answers are printed; csv and arrow are for query, entities and sql
    #[arg(long, global = true, value_enum, default_value_t)]
    format: OutputFormat,

    /// With csv: text that a spreadsheet would take for a formula (=, +, -, @, a tab or a line end at its start) gets an apostrophe
    #[arg(long, global = true)]
    spreadsheet: bool,

    /// Level (off, error, warn, info, debug, trace), or a filter such as
    /// warn,highwater::stream=trace [env: HIGHWATER_LOG or RUST_LOG] [default: info]
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,

    /// human or json [env: HIGHWATER_LOG_FORMAT] [default: human]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,

    /// The query runs in this process, which another one watches
    #[arg(long, hide = true)]
    apart: bool,

    /// Archive a server of another history (restored, promoted) that has taken the place of the one archived so far: every
    /// row is compared with the archive first. For the first start only
    #[arg(long, global = true)]
    accept_new_system: bool,

    #[command(flatten)]
    settings: SettingFlags,
}

const EXAMPLES: &str = "\
Examples:
  highwater check
  highwater --database-uri postgresql://archiver@db/scouter --storage-uri s3://bucket/drift
  highwater --watermarks --format json

  highwater verify --table psi_drift --from 2026-11-01

  highwater entities
  highwater query custom --space shop --name ranking --version 2.1.0 --from -30d --bin 6h
  highwater sql 'select metric, count(*) from custom group by metric' --format csv

Exit codes: 0 done, or stopped as told; 1 failed, and the error says what to do; 2 the command line is wrong; 130 ended at once
by a second signal.
Exit code of check: 0 all is well, 1 warnings, 2 errors.
Exit code of verify: 0 equal, 1 different or not compared, 2 failed.
Exit code of purge: 0 all that is past retention is gone (or can be), 1 something is blocked, 2 failed.";

#[derive(Clone, PartialEq, Subcommand)]
enum Command {
    /// Archive until told to stop; what `highwater` does without a subcommand
    Run,
    /// Answer questions of the history over HTTP, and archive nothing: for an archive that another process writes
    Serve,
    /// Make the schema highwater, the publication, the slot and the watermarks, where they are missing, and turn off
    /// pg_partman's own retention of the archived tables
    Setup(SetupFlags),
    /// Look for everything that archiving needs, and name what mends it; all that it writes is one small
    /// object in the storage, which it removes
    Check,
    /// Compare the archive with Postgres, hour by hour, while `highwater run` goes on; names each hour that differs
    Verify(VerifyFlags),
    /// Delete what is past its retention, as far as the archive provably holds it; what pg_cron does with `setup --schedule-purge`
    Purge(PurgeFlags),
    /// Have the sidecar compare every row of a table with the archive, and add what is missing
    Resync(ResyncFlags),
    /// Read the history of a model, in bins of time
    Query(Box<QueryFlags>),
    /// Tell how far a model has moved from a reference, which of its series most, and since when
    Drift(Box<DriftFlags>),
    /// List the models of the archive, with their times and rows
    Entities,
    /// Ask the archive in SQL (DataFusion's dialect)
    Sql(SqlFlags),
    /// Print a script by which a shell completes this command line
    Completions {
        /// The shell
        shell: ShellName,
    },
    /// Print the manual page, for man(1)
    Man,
}

/// How a report is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns, for people
    #[default]
    Table,
    /// One JSON document, for machines
    Json,
}

/// How anything is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// Aligned columns, for people
    #[default]
    Table,
    /// Comma-separated values, with a head
    Csv,
    /// One JSON document, for machines
    Json,
    /// An Arrow IPC stream
    Arrow,
}

impl OutputFormat {
    /// The format of a report, which has columns or a document.
    fn of_report(self) -> Result<Format> {
        match self {
            Self::Table => Ok(Format::Table),
            Self::Json => Ok(Format::Json),
            Self::Csv | Self::Arrow => Err(Error::Setting {
                setting: "--format".to_owned(),
                value: format!("{self:?}").to_lowercase(),
                accepted: "table or json for this command".to_owned(),
            }),
        }
    }
}

/// Runs the command line; the whole of `main`. Prints errors, with what to do about them, to stderr.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    failpoint::setup();
    let cli = match Cli::try_parse_from(arguments).and_then(reject_two_commands) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done when even this can't be printed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    execute(&cli).unwrap_or_else(|error| {
        print_error(&error);
        // For check, 1 means warnings; for verify, a difference; for purge, that something stays.
        let is_report = matches!(cli.command, Some(Command::Check | Command::Verify(_) | Command::Purge(_)));
        ExitCode::from(if is_report { 2 } else { 1 })
    })
}

fn reject_two_commands(cli: Cli) -> Result<Cli, clap::Error> {
    if cli.watermarks && cli.command.is_some() {
        let text = "--watermarks stands alone and can't be used with a subcommand";
        return Err(Cli::command().error(ErrorKind::ArgumentConflict, text));
    }
    Ok(cli)
}

fn execute(cli: &Cli) -> Result<ExitCode> {
    // Of the settings neither wants any.
    match cli.command {
        Some(Command::Completions { shell }) => {
            return completions::completions(Cli::command(), shell).map(|()| ExitCode::SUCCESS);
        }
        Some(Command::Man) => return completions::man(Cli::command()).map(|()| ExitCode::SUCCESS),
        _ => {}
    }
    start_logging(cli)?;
    let env = environment_variable;
    let layers = Layers::collect(cli.settings.raw(), &env, cli.settings.config.as_deref())?;
    let mut config = Config::from_layers(&layers, &env)?;
    config.accept_new_system = cli.accept_new_system;
    let style = Style::new(cli.format, cli.spreadsheet)?;
    let runtime = if cli.apart {
        apart::runtime(&config)
    } else {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()
    };
    runtime.map_err(Error::io("starting the runtime"))?.block_on(async {
        match &cli.command {
            _ if cli.watermarks => {
                watermarks::watermarks(&config, cli.format.of_report()?).await.map(|()| ExitCode::SUCCESS)
            }
            None | Some(Command::Run) => run::run(&config).await.map(|()| ExitCode::SUCCESS),
            Some(Command::Serve) => serve::serve(&config).await.map(|()| ExitCode::SUCCESS),
            Some(Command::Setup(flags)) => setup::setup(&config, flags).await,
            Some(Command::Purge(flags)) => purge::purge(&config, flags, cli.format.of_report()?).await,
            Some(Command::Check) => check::check(&config, cli.format.of_report()?).await,
            Some(Command::Resync(flags)) => resync::resync(&config, flags).await.map(|()| ExitCode::SUCCESS),
            Some(Command::Verify(flags)) => verify::verify(&config, flags, cli.format.of_report()?).await,
            Some(Command::Query(flags)) => {
                query::query(&config, flags, style).await.map(|()| ExitCode::SUCCESS)
            }
            Some(Command::Drift(flags)) => {
                drift::drift(&config, flags, style).await.map(|()| ExitCode::SUCCESS)
            }
            Some(Command::Entities) => query::entities(&config, style).await.map(|()| ExitCode::SUCCESS),
            Some(Command::Sql(flags)) if cli.apart => {
                sql::answer(&config, flags, style).await.map(|()| ExitCode::SUCCESS)
            }
            Some(Command::Sql(flags)) => sql::sql(&config, flags).await,
            Some(Command::Completions { .. } | Command::Man) => Ok(ExitCode::SUCCESS),
        }
    })
}

fn start_logging(cli: &Cli) -> Result<()> {
    let variable = |name| environment_variable(name);
    let format = match (&cli.log_format, variable("HIGHWATER_LOG_FORMAT")) {
        (Some(text), _) => log_format("--log-format", text)?,
        (None, Some(text)) => log_format("HIGHWATER_LOG_FORMAT", &text)?,
        (None, None) => LogFormat::default(),
    };
    let filter = cli.log.clone().or_else(|| variable("HIGHWATER_LOG")).or_else(|| variable("RUST_LOG"));
    telemetry::init(format, filter.as_deref())
}

fn log_format(name: &str, text: &str) -> Result<LogFormat> {
    LogFormat::of_name(text).ok_or_else(|| Error::Setting {
        setting: name.to_owned(),
        value: text.to_owned(),
        accepted: "human or json".to_owned(),
    })
}

fn print_error(error: &Error) {
    let mut text = format!("highwater: {}\n", columns::line(&error.chain()));
    if let Policy::Stop { advice } = error.policy() {
        text.push_str(&format!("  what to do: {advice}\n"));
    }
    // Nothing can be done when stderr is gone.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// The JSON form of a report or an answer.
fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|error| Error::Internal(format!("what was found has no JSON form ({error})")))
}

/// Prints a report to stdout, whoever wrote the names in it.
fn print(text: &str) -> Result<()> {
    print_as_it_is(&telemetry::plain(text))
}

/// Prints to stdout. A reader that has gone away (`| head`) is not an error.
fn print_as_it_is(text: &str) -> Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("printing")(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Setting;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    // Set UPDATE_GOLDEN to accept a change that is meant.
    #[test]
    fn help_is_as_it_was() {
        let help = Cli::command().term_width(100).render_long_help().to_string();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/help.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, &help).unwrap();
        }
        assert_eq!(help, std::fs::read_to_string(path).unwrap_or_default());
    }

    #[test]
    fn help_names_every_setting_its_variable_and_its_default() {
        let help = Cli::command().term_width(0).render_long_help().to_string();
        for setting in Setting::ALL {
            assert!(help.contains(&setting.flag()), "{setting:?}");
            assert!(help.contains(&format!("[env: {}", setting.variable())), "{setting:?}");
            let default = match setting {
                Setting::DatabaseUri => "postgresql://postgres:postgres@localhost:5432/postgres",
                Setting::Region => "us-east-1",
                Setting::HttpToken => continue,
                _ => setting.default_text().unwrap(),
            };
            assert!(help.contains(&format!("[default: {default}]")), "{setting:?}");
        }
    }

    #[test]
    fn flags_may_follow_the_subcommand_and_reach_the_settings() {
        let cli = Cli::try_parse_from(["highwater", "check", "--slot", "other", "--format", "json"]).unwrap();
        assert!(cli.command == Some(Command::Check) && cli.format == OutputFormat::Json);
        assert_eq!(cli.settings.raw().get(Setting::Slot), Some("other"));
        assert!(
            Cli::try_parse_from(["highwater", "--watermarks", "check"])
                .and_then(reject_two_commands)
                .is_err()
        );
    }
}
