//! What stands where the primary is looked for: several hosts, of which one is it; a pooler; a password that has changed.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::cluster::Stop;
use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_named_first_takes_over_under_load() {
    let stage = Stage::private(Shape::Named, &[("wal_keep_size", "1GB")]).await;
    let primary = stage.cluster();
    let standby = primary.standby();
    let hosts = |attributes: &str| {
        let (first, second) = (standby.port(), primary.port());
        format!(
            "host=127.0.0.1,127.0.0.1 port={first},{second} user=postgres dbname={} {attributes}",
            stage.name
        )
    };
    let launch = stage.launch().with("DATABASE_URI", &hosts("target_session_attrs=read-write"));
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let load = Load::start(&primary.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    let marks = launch.watermarks();
    assert!(
        marks["tables"][0]["slot_name"] == stage.name.as_str() || marks.to_string().contains("streaming"),
        "{marks}"
    );

    answers_of_a_standby(&launch, &standby.uri_tcp(&stage.name)).await;

    // Nothing may be lost between the two, so that source and archive can be compared.
    load.stop().await;
    let client = stage.connect().await;
    standby.follows(&client, DEADLINE).await;
    primary.stop(Stop::Fast);
    standby.promote();
    let load = Load::start(&standby.uri_tcp(&stage.name), stage.shape);
    // It finds the new primary by itself, and that this one has no slot.
    assert!(!sidecar.wait(DEADLINE).await.success());
    assert!(sidecar.log().contains("--accept-new-system"), "{}", sidecar.log());
    let mut sidecar = launch.start_with(&["--accept-new-system"]);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    let client = standby.connect(&stage.name).await;
    stage.assert_archived_from(&client, DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

async fn answers_of_a_standby(launch: &Launch, of_standby: &str) {
    // An answer that may lack rows is none.
    let fresh = [
        "query",
        "custom",
        "--space",
        "shop",
        "--name",
        "ranking",
        "--version",
        "1.0.0",
        "--from",
        "-1d",
        "--fresh",
    ];
    for uri in [of_standby.to_owned(), format!("{of_standby}?target_session_attrs=any")] {
        let output = launch.clone().with("DATABASE_URI", &uri).output(&fresh);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains("standby") && errors.contains("DATABASE_URI"),
            "{errors}"
        );
    }
    launch.must(&fresh);
    // Reading what the watermarks say is another matter.
    let any = launch.clone().with("DATABASE_URI", &format!("{of_standby}?target_session_attrs=any"));
    until("the standby has the watermarks", DEADLINE, async || {
        any.output(&["--watermarks"]).status.success().then_some(())
    })
    .await;
    let report = launch.clone().with("DATABASE_URI", of_standby).output(&["check"]);
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    assert!(report.contains("is a standby"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_changes_needs_no_restart() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    client.batch_execute("create role keeper superuser login password 'first one'").await.unwrap();
    stage
        .cluster()
        .hba("local all postgres trust\nlocal all all scram-sha-256\nlocal replication all trust\n");
    stage.cluster().reload();
    let file = stage.folder().join("pgpass");
    let write = |password: &str| {
        std::fs::write(&file, format!("*:*:*:keeper:{password}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write("first one");
    let uri = stage.cluster().uri_unix(&stage.name).replace("postgres@", "keeper@");
    let launch = stage.launch().with("DATABASE_URI", &uri).with("PGPASSFILE", file.to_str().unwrap());
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.assert_archived(DEADLINE).await;
    // First the server knows it, then the file.
    client.batch_execute("alter role keeper password 'second one'").await.unwrap();
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'keeper'";
    client.query_one(end, &[]).await.unwrap();
    sidecar.says("28P01", DEADLINE).await;
    write("second one");
    stage.assert_archived(DEADLINE).await;
    let log = sidecar.log();
    assert!(!log.contains("first one") && !log.contains("second one"), "{log}");
    // Whoever waits in front of it is told at once.
    write("third one");
    let output = launch.output(&["--watermarks"]);
    assert!(
        !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("28P01"),
        "{output:?}"
    );
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// A pooler in front of a server; stopped when dropped.
struct Pooler(Child);

impl Pooler {
    fn start(stage: &Stage, mode: &str, port: u16) -> Self {
        let folder = stage.folder();
        let users = folder.join("users");
        std::fs::write(&users, "\"postgres\" \"\"\n").unwrap();
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\nauth_file = {}\npool_mode = {mode}\n",
            stage.cluster().port(),
            users.display()
        );
        let settings = settings.replace("* = host", "* = user=postgres host");
        let file = folder.join(format!("{mode}.ini"));
        std::fs::write(&file, settings).unwrap();
        // It refuses to run as root.
        let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new("/usr/sbin/pgbouncer");
        if is_root {
            command = Command::new("runuser");
            command.args(["-u", "postgres", "--", "/usr/sbin/pgbouncer"]);
        }
        let child = command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Self(child.expect("PgBouncer is missing: apt-get install pgbouncer (or run scripts/setup)"))
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// PgBouncer 1.18 knows no replication. SQL sessions come through it in session mode; what streams is told where to go.
#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_between() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    for mode in ["session", "transaction"] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let pooler = Pooler::start(&stage, mode, port);
        let uri = format!("postgresql://postgres@127.0.0.1:{port}/{}", stage.name);
        let launch = stage.launch().with("DATABASE_URI", &uri).logging_to(&stage.folder().join(mode));
        if mode == "session" {
            until("the pooler works", DEADLINE, async || {
                launch.output(&["--watermarks"]).status.success().then_some(())
            })
            .await;
        } else {
            let listens = async || std::net::TcpStream::connect(("127.0.0.1", port)).ok().map(drop);
            until("the pooler listens", DEADLINE, listens).await;
        }
        let mut refused = launch.start();
        assert!(!refused.wait(DEADLINE).await.success());
        assert!(refused.log().contains("connect to the server itself"), "{mode}: {}", refused.log());
        let report = launch.output(&["check"]);
        let text = String::from_utf8_lossy(&report.stdout).into_owned();
        assert!(!report.status.success() && text.contains("connect to the server itself"), "{mode}: {text}");
        drop(pooler);
    }
}
