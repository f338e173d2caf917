//! `highwater sql`: SQL of anybody, in a process of its own.
//!
//! What a query makes outside of DataFusion's pool nobody counts, and planning doesn't look at the clock. So the query runs in
//! a child process, for which the system bounds the memory; its death is an error message of ours.

use std::io::Read as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::Style;
use super::query::print_frame;
use crate::apart::{self, Apart};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reader::Archive;

/// How long the child may take past its deadline to end by itself, and to remove what it sent to disk.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct SqlFlags {
    /// A query over the tables of the archive; - reads it from stdin
    #[arg(value_name = "QUERY")]
    query: String,

    /// How long the answer may take
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "10m")]
    timeout: Duration,
}

/// The most bytes of a query that comes from stdin.
const QUERY_BYTES_MAX: u64 = 1 << 20;

impl SqlFlags {
    /// The query, from stdin if that is asked for: the arguments of a process are for all users to see.
    fn text(&self) -> Result<String> {
        if self.query != "-" {
            return Ok(self.query.clone());
        }
        let mut query = String::new();
        let read = std::io::stdin().take(QUERY_BYTES_MAX + 1).read_to_string(&mut query);
        if read.map_err(Error::io("reading the query from stdin"))? as u64 > QUERY_BYTES_MAX {
            return Err(Error::Query { detail: "the query has more than 1 MiB".to_owned() });
        }
        Ok(query)
    }

    fn too_late(&self) -> Error {
        let within = humantime::format_duration(self.timeout);
        Error::Query { detail: format!("there was no answer within {within}; --timeout gives it longer") }
    }
}

/// Has a child print what a query in SQL answers.
pub(super) async fn sql(config: &Config, flags: &SqlFlags) -> Result<ExitCode> {
    // Before there is anything to remove.
    let mut signals = Signals::new().map_err(apart::failed())?;
    let mut child = Apart::start(config, std::env::args_os().skip(1), |command| command).await?;
    let ended = tokio::select! {
        ended = child.wait() => Some(ended?),
        () = tokio::time::sleep(flags.timeout.saturating_add(GRACE)) => None,
        number = signals.next() => {
            child.kill().await;
            return Ok(ExitCode::from(128 + number));
        }
    };
    match ended {
        // Its own errors it has told itself.
        Some(status) => Ok(match apart::outcome(status, config.memory_bytes)? {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }),
        None => {
            child.kill().await;
            Err(flags.too_late())
        }
    }
}

/// The signals to end, from now on.
struct Signals([(u8, Signal); 3]);

impl Signals {
    fn new() -> std::io::Result<Self> {
        let of = |kind: SignalKind, number| signal(kind).map(|signal| (number, signal));
        Ok(Self([
            of(SignalKind::hangup(), 1)?,
            of(SignalKind::interrupt(), 2)?,
            of(SignalKind::terminate(), 15)?,
        ]))
    }

    /// Waits for one; its number.
    async fn next(&mut self) -> u8 {
        let [hangup, interrupt, terminate] = &mut self.0;
        tokio::select! {
            _ = hangup.1.recv() => hangup.0,
            _ = interrupt.1.recv() => interrupt.0,
            _ = terminate.1.recv() => terminate.0,
        }
    }
}

/// The child's work.
pub(super) async fn answer(config: &Config, flags: &SqlFlags, style: Style) -> Result<()> {
    let answered = async {
        let archive = Archive::open_within(&config.storage, config.memory_bytes).await?;
        print_frame(archive.sql(&flags.text()?).await?, style).await
    };
    let mut answered = std::pin::pin!(answered);
    tokio::select! {
        result = &mut answered => result,
        () = tokio::time::sleep(flags.timeout) => {
            super::print_error(&flags.too_late());
            // What is under way (the Delta library's tasks above all) does not bear to be given up: it ends with the process.
            std::process::exit(1)
        }
    }
}
