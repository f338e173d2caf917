//! `highwater sql`: SQL of anybody, in a process of its own.
//!
//! What a query makes outside of DataFusion's pool nobody counts, and planning doesn't look at the clock. So the query runs in
//! a child process, for which the system bounds the memory; its death is an error message of ours.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::Style;
use super::query::print_frame;
use super::watermarks::bytes;
use crate::archive::Storage;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::reader::Archive;
use crate::tables::Kind;

/// The hidden flag of the child.
pub(super) const APART: &str = "--apart";

/// How old a folder is that a process has left for sure.
const LEFT_FOR: Duration = Duration::from_secs(3_600);

/// How the folders begin that it uses.
const SCRATCH: &str = "highwater-sql-";

/// How long the child may take past its deadline to end by itself, and to remove what it sent to disk.
const GRACE: Duration = Duration::from_secs(5);

/// Memory of the program itself, its threads and what a scan holds outside of DataFusion's pool.
#[cfg(target_os = "linux")]
const BASE_BYTES: u64 = 384 << 20;

/// Memory of each open table beyond those that come with the program: the Delta library has threads of its own for each.
#[cfg(target_os = "linux")]
const TABLE_BYTES: u64 = 32 << 20;

/// Tells the child how many such tables there are.
const TABLES: &str = "HIGHWATER_SQL_TABLES";

/// Threads of the child: each takes a stack of the bounded memory.
const WORKERS_MAX: usize = 16;
const BLOCKING_MAX: usize = 32;

#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub(super) struct SqlFlags {
    /// A query over the tables custom, psi, spc and quarantine
    #[arg(value_name = "QUERY")]
    query: String,

    /// How long the answer may take
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "10m")]
    timeout: Duration,
}

impl SqlFlags {
    fn too_late(&self) -> Error {
        let within = humantime::format_duration(self.timeout);
        Error::Query { detail: format!("there was no answer within {within}; --timeout gives it longer") }
    }
}

/// Has a child print what a query in SQL answers.
pub(super) async fn sql(config: &Config, flags: &SqlFlags) -> Result<ExitCode> {
    let failed = |source| Error::io("running the query in a process of its own")(source);
    // Before there is anything to remove.
    let mut signals = Signals::new().map_err(failed)?;
    let folder = std::env::temp_dir();
    let scratch = Scratch::new(&folder).map_err(Error::io(format!(
        "making a folder in {} (TMPDIR), for what does not fit the memory",
        folder.display()
    )))?;
    // What is wrong with the storage is the child's to tell.
    let folders = match Storage::open_existing(&config.storage) {
        Ok(storage) => storage.folders().await.unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    let more = folders.iter().filter(|name| Kind::built_in().iter().all(|kind| kind.name() != *name)).count();
    let mut child = tokio::process::Command::new(std::env::current_exe().map_err(failed)?)
        .arg(APART)
        .args(std::env::args_os().skip(1))
        .env("TMPDIR", &scratch.0)
        .env(TABLES, more.to_string())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let ended = tokio::select! {
        ended = child.wait() => Some(ended.map_err(failed)?),
        () = tokio::time::sleep(flags.timeout.saturating_add(GRACE)) => None,
        number = signals.next() => {
            // Gone already at worst.
            let _ = child.kill().await;
            return Ok(ExitCode::from(128 + number));
        }
    };
    match ended {
        Some(status) => outcome(status, config.memory_bytes),
        None => {
            let _ = child.kill().await;
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

/// What the end of the child means. Its own errors it has told itself.
fn outcome(status: ExitStatus, memory: usize) -> Result<ExitCode> {
    use std::os::unix::process::ExitStatusExt as _;
    let memory = bytes(i64::try_from(memory).unwrap_or(i64::MAX));
    let detail = match (status.code(), status.signal()) {
        (Some(0), _) => return Ok(ExitCode::SUCCESS),
        (Some(1), _) => return Ok(ExitCode::FAILURE),
        // SIGKILL; the others are an allocation that failed, and a stack that was too small.
        (_, Some(9)) => "the process of the query was killed, perhaps for want of memory".to_owned(),
        (Some(101), _) => "the query engine failed in this query; another form of it may do".to_owned(),
        (_, Some(6 | 7 | 11)) => format!(
            "the query wanted more memory than {memory}, and its process ended; --memory gives it more, if it is a \
             query that needs it"
        ),
        _ => format!("the process of the query ended ({status})"),
    };
    Err(Error::Query { detail })
}

/// A folder for what the child sends to disk, which a child that dies leaves behind.
struct Scratch(PathBuf);

impl Scratch {
    /// Makes one, and removes those of processes that had no time to.
    fn new(folder: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        for entry in std::fs::read_dir(folder)?.flatten() {
            let name = entry.file_name();
            let process =
                name.to_str().and_then(|name| name.strip_prefix(SCRATCH)?.split('-').next()?.parse().ok());
            // Processes of a container have numbers of their own, so being old is asked for, too.
            let age =
                entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
            if process.is_some_and(|process| !is_alive(process)) && age.is_some_and(|age| age > LEFT_FOR) {
                // Somebody else's at worst.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = folder.join(format!("{SCRATCH}{}-{:016x}", std::process::id(), rand::random::<u64>()));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

#[cfg(not(target_os = "linux"))]
fn is_alive(_: i32) -> bool {
    true
}

#[cfg(target_os = "linux")]
fn is_alive(process: i32) -> bool {
    use rustix::process::{Pid, test_kill_process};
    let gone = Pid::from_raw(process).map(test_kill_process);
    !matches!(gone, None | Some(Err(rustix::io::Errno::SRCH)))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let path: &Path = &self.0;
        if let Err(error) = std::fs::remove_dir_all(path) {
            tracing::warn!(folder = %path.display(), "what a query had sent to disk is left behind ({error})");
        }
    }
}

/// The child: before it has any thread.
pub(super) fn runtime(config: &Config) -> std::io::Result<tokio::runtime::Runtime> {
    bound(config)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(WORKERS_MAX))
        .max_blocking_threads(BLOCKING_MAX)
        .enable_all()
        .build()
}

/// Bounds the memory of this process (setrlimit(2): `RLIMIT_DATA`), and has it end with the one that started it.
#[cfg(target_os = "linux")]
fn bound(config: &Config) -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, set_parent_process_death_signal, setrlimit};
    set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let tables = std::env::var(TABLES).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let base = BASE_BYTES.saturating_add(tables.saturating_mul(TABLE_BYTES));
    let wanted = u64::try_from(config.memory_bytes).unwrap_or(u64::MAX).saturating_add(base);
    let Rlimit { maximum, .. } = getrlimit(Resource::Data);
    let current = Some(maximum.map_or(wanted, |maximum| maximum.min(wanted)));
    Ok(setrlimit(Resource::Data, Rlimit { current, maximum })?)
}

#[cfg(not(target_os = "linux"))]
fn bound(_: &Config) -> std::io::Result<()> {
    Ok(())
}

/// The child's work.
pub(super) async fn answer(config: &Config, flags: &SqlFlags, style: Style) -> Result<()> {
    let answered = async {
        let archive = Archive::open_within(&config.storage, config.memory_bytes).await?;
        print_frame(archive.sql(&flags.query).await?, style).await
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
