//! The real binary as a child process.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use super::wait::{until, within};

/// How the sidecar is started: the binary with settings in its environment, and nothing else of ours.
#[derive(Clone, Debug)]
pub struct Launch {
    program: PathBuf,
    /// Where the owner of the drift tables logs in, if the sidecar does as another role: he makes the schema, and purges.
    owner_uri: Option<String>,
    settings: Vec<(String, String)>,
    /// The settings file, if it has one.
    file: Option<PathBuf>,
    log: PathBuf,
}

/// The binary under test.
pub fn binary() -> PathBuf {
    // Set by cargo for tests and benches; an example finds the binary one folder above itself.
    if let Some(path) = option_env!("CARGO_BIN_EXE_highwater") {
        return PathBuf::from(path);
    }
    let own = std::env::current_exe().expect("own path");
    let path = own.ancestors().skip(1).map(|folder| folder.join("highwater")).find(|path| path.is_file());
    path.expect("no binary `highwater` beside this program: run `cargo build` first")
}

impl Launch {
    /// Archives the database into a folder; the log is appended to a file.
    pub fn new(database_uri: &str, storage: &Path, slot: &str, log: &Path) -> Self {
        Self { program: binary(), owner_uri: None, settings: Vec::new(), file: None, log: log.to_owned() }
            .with("DATABASE_URI", database_uri)
            .with("SCOUTER_STORAGE_URI", &storage.display().to_string())
            .with("HIGHWATER_SLOT", slot)
            .with("HIGHWATER_PUBLICATION", slot)
            .with("HIGHWATER_HTTP", "127.0.0.1:0")
            .with("RUST_BACKTRACE", "1")
    }

    /// The same, where what only the owner of the drift tables may do is done by a login of his own: what comes before `setup`, and
    /// `purge`.
    #[must_use]
    pub fn owned(mut self, uri: &str) -> Self {
        self.owner_uri = Some(uri.to_owned());
        self
    }

    /// The same with a setting added or replaced. Who logs in elsewhere, or as another role, does all by himself.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        if name == "DATABASE_URI" {
            self.owner_uri = None;
        }
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with another build of the sidecar.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        program.clone_into(&mut self.program);
        self
    }

    /// The same with fail points switched on, in the `fail` crate's words.
    #[must_use]
    pub fn failing(self, points: &str) -> Self {
        self.with("FAILPOINTS", points)
    }

    /// The same with a settings file.
    #[must_use]
    pub fn configured(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }

    /// The same with a log file of its own.
    #[must_use]
    pub fn logging_to(mut self, log: &Path) -> Self {
        log.clone_into(&mut self.log);
        self
    }

    /// The settings, as variables.
    pub fn settings(&self) -> impl Iterator<Item = (String, String)> {
        self.settings.clone().into_iter()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let file = self.file.iter().flat_map(|file| ["--config".as_ref(), file.as_os_str()]);
        command.args(file).args(arguments).stdin(Stdio::null());
        // Settings of whoever runs the tests must not reach the sidecar.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["PG", "HIGHWATER_", "SCOUTER_", "AWS_", "AZUR", "GOOGLE_", "DATABASE_", "FAILPOINTS"]
                .iter()
                .any(|p| text.starts_with(p))
            {
                command.env_remove(&name);
            }
        }
        command.envs(self.settings.iter().cloned());
        command
    }

    /// Runs a subcommand to its end; `setup` in both roles, one after the other.
    pub fn output(&self, arguments: &[&str]) -> Output {
        let mut first = Vec::new();
        if let Some(owner) = &self.owner_uri {
            let as_owner = self.clone().with("DATABASE_URI", owner);
            match arguments {
                ["setup"] => {
                    let output = as_owner.output(&["setup", "--as-owner"]);
                    if !output.status.success() {
                        return output;
                    }
                    first = output.stdout;
                }
                ["setup", "--schedule-purge", ..] => {
                    let output = self.output(&["setup"]);
                    let scheduled = as_owner.output(&[&["setup", "--as-owner"], &arguments[1..]].concat());
                    return if output.status.success() { scheduled } else { output };
                }
                ["purge", ..] => return as_owner.output(arguments),
                _ => {}
            }
        }
        let mut command = self.command(arguments);
        command.env_remove("FAILPOINTS");
        let mut output =
            command.output().unwrap_or_else(|error| panic!("{}: {error}", self.program.display()));
        output.stdout.splice(..0, first);
        output
    }

    /// Does what the owner has to do before `setup`, and no more.
    pub fn prepare(&self) {
        let owner = self.owner_uri.as_deref().expect("an owner");
        self.clone().with("DATABASE_URI", owner).must(&["setup", "--as-owner"]);
    }

    /// Runs a subcommand that a fail point must kill.
    pub fn must_crash(&self, arguments: &[&str]) {
        let output = self.command(arguments).output().expect("a process");
        assert!(output.status.code().is_none(), "highwater {arguments:?} did not crash: {output:?}");
    }

    /// Runs a subcommand that must succeed; what it printed.
    pub fn must(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "highwater {arguments:?}: {}\n{text}{errors}", output.status);
        text
    }

    /// What `highwater --watermarks --format json` prints.
    pub fn watermarks(&self) -> serde_json::Value {
        let text = self.must(&["--watermarks", "--format", "json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Starts `highwater run`.
    pub fn start(&self) -> Sidecar {
        self.start_with(&[])
    }

    /// Starts `highwater run` with these flags.
    pub fn start_with(&self, flags: &[&str]) -> Sidecar {
        self.start_command(&[&["run"], flags].concat())
    }

    /// Starts a subcommand.
    pub fn start_command(&self, arguments: &[&str]) -> Sidecar {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("log file");
        let start = log.metadata().map(|metadata| metadata.len()).unwrap_or_default();
        let child = self.spawn(arguments, log);
        Sidecar { child, log: self.log.clone(), log_start: start }
    }

    fn spawn(&self, arguments: &[&str], log: File) -> Child {
        let mut command = self.command(arguments);
        command.stdout(log.try_clone().expect("log file")).stderr(log);
        command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.program.display()))
    }
}

/// A running sidecar; killed when dropped.
#[derive(Debug)]
pub struct Sidecar {
    child: Child,
    log: PathBuf,
    log_start: u64,
}

impl Sidecar {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What this process has logged.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start).unwrap_or_default().min(bytes.len());
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Sends a signal by name, as `kill` knows it.
    pub fn signal(&self, name: &str) {
        // The shell's own `kill`: there in the smallest of images.
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.pid())]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} {} failed", self.pid());
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// Waits for its end.
    pub async fn wait(&mut self, deadline: Duration) -> ExitStatus {
        match within(deadline, async || self.child.try_wait().expect("wait")).await {
            Some(status) => status,
            None => panic!("the sidecar has not ended after {deadline:?}; its log:\n{}", tail(&self.log())),
        }
    }

    /// SIGTERM, and waits for its end.
    pub async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal("TERM");
        self.wait(deadline).await
    }

    /// Waits until its log holds a text.
    pub async fn says(&self, text: &str, deadline: Duration) {
        let found = within(deadline, async || self.log().contains(text).then_some(())).await;
        assert!(found.is_some(), "after {deadline:?} no {text:?} in the log:\n{}", tail(&self.log()));
    }

    /// Waits until it has been stopped by SIGSTOP, whoever sent it.
    pub async fn stopped(&self, deadline: Duration) {
        until("the sidecar is stopped by SIGSTOP", deadline, async || {
            self.status_field("State").filter(|state| state.starts_with('T')).map(drop)
        })
        .await;
    }

    /// Resident memory now, bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.status_kilobytes("VmRSS") * 1024
    }

    /// The most resident memory so far, bytes.
    pub fn resident_bytes_max(&self) -> u64 {
        self.status_kilobytes("VmHWM") * 1024
    }

    fn status_kilobytes(&self, field: &str) -> u64 {
        let value = self.status_field(field).unwrap_or_default();
        value.trim_end_matches("kB").trim().parse().unwrap_or_default()
    }

    fn status_field(&self, field: &str) -> Option<String> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("log of sidecar {}:\n{}", self.pid(), tail(&self.log()));
        }
    }
}

/// The last lines of a log, for a panic's text.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
