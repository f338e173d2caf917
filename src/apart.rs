//! SQL of anybody, in a process of its own.
//!
//! What a query makes outside of DataFusion's pool nobody counts, and planning doesn't look at the clock. So the query runs in a child
//! process, which is this program again, for which the system bounds the memory; its death is an error message of ours. Only for
//! the program itself: what embeds it is another program.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use tokio::process::{Child, Command};

use crate::archive::Storage;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::tables::Kind;

/// The hidden flag of the child.
const APART: &str = "--apart";

/// How the folders begin that it uses.
const SCRATCH: &str = "highwater-sql-";

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

/// The error of a child that could not be started or waited for.
pub(crate) fn failed() -> impl FnOnce(std::io::Error) -> Error {
    Error::io("running the query in a process of its own")
}

/// The child, and what it has on disk. Both are gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Apart {
    /// Before the folder that it uses.
    pub(crate) child: Child,
    _scratch: Scratch,
}

impl Apart {
    /// Starts this program again with these arguments; `with` may say more of how.
    ///
    /// # Errors
    ///
    /// There is no place for its files, or it can't be started.
    pub(crate) async fn start(
        config: &Config,
        arguments: impl IntoIterator<Item = OsString>,
        with: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<Self> {
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
        let more =
            folders.iter().filter(|name| Kind::built_in().iter().all(|kind| kind.name() != *name)).count();
        let mut command = Command::new(std::env::current_exe().map_err(failed())?);
        command
            .arg(APART)
            .args(arguments)
            .env("TMPDIR", &scratch.path)
            .env(TABLES, more.to_string())
            .kill_on_drop(true);
        let child = with(&mut command).spawn().map_err(failed())?;
        Ok(Self { child, _scratch: scratch })
    }

    /// Waits for its end.
    pub(crate) async fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.map_err(failed())
    }

    /// Ends it.
    pub(crate) async fn kill(&mut self) {
        // Gone already at worst.
        let _ = self.child.kill().await;
    }
}

/// What the end of the child means: whether it has answered, or told on stderr why not.
///
/// # Errors
///
/// [`Error::Query`] if it could not tell why.
pub(crate) fn outcome(status: ExitStatus, memory: usize) -> Result<bool> {
    use std::os::unix::process::ExitStatusExt as _;
    let memory = format!("{} MiB", memory >> 20);
    let detail = match (status.code(), status.signal()) {
        (Some(0), _) => return Ok(true),
        (Some(1), _) => return Ok(false),
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

/// A folder for what the child sends to disk. Its maker holds a lock on it (flock(2)) for as long as it lives, so that what nobody has
/// locked was left behind, whichever container it was made in.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes one, and removes those of processes that had no time to.
    fn new(folder: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        sweep(folder)?;
        loop {
            let path = folder.join(format!("{SCRATCH}{}-{:016x}", std::process::id(), rand::random::<u64>()));
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            // Between the two lines another process may have taken it for one that was left, and have removed it.
            match lock(&path) {
                Ok(Some(lock)) if path.is_dir() => return Ok(Self { path, _lock: lock }),
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// Removes what processes that were killed have left in the folder for temporary files.
pub(crate) fn sweep_temporary() {
    // Whoever needs the folder is told what is wrong with it.
    let _ = sweep(&std::env::temp_dir());
}

fn sweep(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)?.flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(SCRATCH));
        if is_ours && let Ok(Some(_lock)) = lock(&entry.path()) {
            // Somebody else's at worst.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// A lock on the folder, unless somebody else has it.
fn lock(path: &Path) -> std::io::Result<Option<File>> {
    let folder = File::open(path)?;
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(folder = %self.path.display(), "what a query had sent to disk is left behind ({error})");
        }
    }
}

/// The child: before it has any thread.
pub(crate) fn runtime(config: &Config) -> std::io::Result<tokio::runtime::Runtime> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_is_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (left, used) =
            (folder.path().join("highwater-sql-12345-0"), Scratch::new(folder.path()).unwrap());
        std::fs::create_dir_all(left.join("deep")).unwrap();
        std::fs::create_dir(folder.path().join("somebody-elses")).unwrap();
        let next = Scratch::new(folder.path()).unwrap();
        assert!(!left.exists() && used.path.is_dir() && next.path.is_dir());
        drop((used, next));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
