//! The source connection against real servers: throw-away clusters, each with its own directory and port.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use highwater::config::SourceConfig;
use highwater::postgres::{Frame, ReplicationConnection, sql};
use highwater::{Error, Lsn};
use tokio::sync::{mpsc, watch};

const BIN: &str = "/usr/lib/postgresql/15/bin";

struct Cluster {
    dir: tempfile::TempDir,
    port: u16,
}

/// Runs a program as a user that the server accepts; it refuses to be root.
fn run(program: &str, arguments: &[&str]) {
    let output =
        Command::new("runuser").args(["-u", "postgres", "--", program]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Cluster {
    fn start(extra: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("hw").tempdir_in("/tmp").unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let cluster = Self { dir, port };
        let root = cluster.dir.path();
        std::fs::write(root.join("pw"), "correct horse").unwrap();
        openssl(
            root,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=ca",
        );
        openssl(
            root,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout other.key -out other.pem -subj /CN=ca",
        );
        openssl(
            root,
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout server.key -out server.csr -subj /CN=server",
        );
        std::fs::write(root.join("san"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
            .unwrap();
        openssl(
            root,
            "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.pem",
        );
        let path = root.to_str().unwrap();
        assert!(Command::new("chown").args(["-R", "postgres", path]).status().unwrap().success());
        let data = cluster.data();
        let data = data.to_str().unwrap();
        run(
            &format!("{BIN}/initdb"),
            &[
                "-D",
                data,
                "-U",
                "postgres",
                "-A",
                "scram-sha-256",
                "--no-sync",
                &format!("--pwfile={path}/pw"),
            ],
        );
        let settings = format!(
            "port={port}\nunix_socket_directories='{path}'\nlisten_addresses='localhost'\nwal_level=logical\nfsync=off\n{extra}\n"
        );
        let file = cluster.data().join("postgresql.auto.conf");
        std::fs::write(file, settings.replace("$DIR", path)).unwrap();
        run(&format!("{BIN}/pg_ctl"), &["-D", data, "-w", "-l", &format!("{path}/log"), "start"]);
        cluster
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn config(&self, host: &str, parameters: &str) -> SourceConfig {
        self.config_with("correct%20horse", host, parameters)
    }

    fn config_with(&self, password: &str, host: &str, parameters: &str) -> SourceConfig {
        let parameters = parameters.replace("$DIR", self.dir.path().to_str().unwrap());
        let uri = format!("postgresql://postgres:{password}@{host}:{}/postgres?{parameters}", self.port);
        SourceConfig::new(Some(&uri), &|_| None).unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new("runuser")
            .args([
                "-u",
                "postgres",
                "--",
                &format!("{BIN}/pg_ctl"),
                "-D",
                self.data().to_str().unwrap(),
                "-m",
                "immediate",
                "stop",
            ])
            .output();
    }
}

async fn both(config: &SourceConfig) -> Result<bool, Error> {
    let client = sql::connect(config).await?;
    let statement = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    let over_sql: bool = client.query_one(statement, &[]).await.unwrap().get(0);
    let mut replication = ReplicationConnection::connect(config).await?;
    let rows = replication.query("select ssl, null from pg_stat_ssl where pid = pg_backend_pid()").await?;
    assert_eq!(rows, [vec![Some(if over_sql { "t" } else { "f" }.to_owned()), None]]);
    assert!(
        matches!(replication.query("select 1/0").await, Err(Error::Server { code, .. }) if code == "22012")
    );
    assert_eq!(replication.query("").await?.len(), 0);
    Ok(over_sql)
}

const TLS: &str = "ssl=on\nssl_cert_file='$DIR/server.pem'\nssl_key_file='$DIR/server.key'";

#[tokio::test]
async fn passwords_and_tls() {
    let cluster = Cluster::start(TLS);
    let socket_directory = format!("host={}", cluster.dir.path().display());
    assert!(!both(&cluster.config("", &socket_directory)).await.unwrap());
    for (host, parameters, encrypted) in [
        ("localhost", "", true),
        ("localhost", "sslmode=disable", false),
        ("127.0.0.1", "sslmode=prefer", true),
        ("127.0.0.1", "sslmode=require", true),
        ("127.0.0.1", "sslmode=verify-ca&sslrootcert=$DIR/ca.pem", true),
        ("127.0.0.1", "sslmode=verify-ca&sslrootcert=$DIR/server.pem", true),
        ("localhost", "sslmode=verify-full&sslrootcert=$DIR/ca.pem", true),
    ] {
        let result = both(&cluster.config(host, parameters)).await;
        assert_eq!(result.unwrap(), encrypted, "{host} {parameters}");
    }
    for (host, parameters) in [
        ("127.0.0.1", "sslmode=verify-full&sslrootcert=$DIR/ca.pem"),
        ("localhost", "sslmode=verify-full&sslrootcert=$DIR/other.pem"),
        ("localhost", "sslmode=verify-ca&sslrootcert=$DIR/other.pem"),
        ("localhost", "sslmode=require&sslrootcert=$DIR/other.pem"),
        ("localhost", "sslmode=verify-full"),
    ] {
        let error = both(&cluster.config(host, parameters)).await.unwrap_err();
        let refused =
            matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::InvalidData);
        assert!(refused && error.chain().contains("certificate"), "{host} {parameters}: {}", error.chain());
    }
    let wrong = cluster.config_with("battery-staple", "localhost", "");
    for error in
        [sql::connect(&wrong).await.unwrap_err(), ReplicationConnection::connect(&wrong).await.unwrap_err()]
    {
        assert!(matches!(&error, Error::Server { code, .. } if code == "28P01"), "{error:?}");
        assert!(!format!("{error:?} {}", error.chain()).contains("battery"), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_without_tls() {
    let cluster = Cluster::start("");
    assert!(!both(&cluster.config("localhost", "sslmode=prefer")).await.unwrap());
    let error = both(&cluster.config("localhost", "sslmode=require")).await.unwrap_err();
    assert!(matches!(&error, Error::Protocol { detail, .. } if detail.contains("no TLS")), "{error:?}");
}

#[tokio::test]
async fn a_stuck_consumer_keeps_the_connection() {
    let cluster = Cluster::start(&format!("{TLS}\nwal_sender_timeout='2s'"));
    for parameters in ["sslmode=disable", "sslmode=require"] {
        stuck(&cluster.config("localhost", parameters)).await;
    }
}

async fn stuck(config: &SourceConfig) {
    let client = sql::connect(config).await.unwrap();
    client
        .batch_execute(
            "drop table if exists t; create table t (a int, b text); drop publication if exists p; \
             create publication p for table t with (publish = 'insert')",
        )
        .await
        .unwrap();
    client.query("select pg_create_logical_replication_slot('s', 'pgoutput')", &[]).await.unwrap();
    let missing = ReplicationConnection::connect(config).await.unwrap().start("nope", "p").await.unwrap_err();
    assert!(matches!(&missing, Error::Slot { transient: false, .. }), "{missing:?}");
    assert!(missing.to_string().contains("highwater setup"));

    let stream = ReplicationConnection::connect(config).await.unwrap().start("s", "p").await.unwrap();
    let (chunks, mut queue) = mpsc::channel(1);
    let (durable, watched) = watch::channel(Lsn::ZERO);
    let mut receiver = stream.spawn(chunks, watched);
    let second = ReplicationConnection::connect(config).await.unwrap();
    let rival = tokio::spawn(async move { second.start("s", "p").await });
    client
        .execute("insert into t select i, repeat('x', 100) from generate_series(1, 300000) i", &[])
        .await
        .unwrap();

    let held = tokio::time::timeout(Duration::from_secs(30), receiver.ended());
    let rival = tokio::select! {
        ended = held => panic!("{ended:?}"),
        rival = rival => rival.unwrap().unwrap_err(),
    };
    assert!(matches!(&rival, Error::Slot { transient: true, .. }), "{rival:?}");
    assert!(
        rival.to_string().contains("active for PID ") && rival.to_string().contains("highwater"),
        "{rival}"
    );

    // Everything arrives, once, after ten seconds in which nobody took anything.
    let (mut inserts, mut end) = (0, Lsn::ZERO);
    let all = async {
        while end == Lsn::ZERO {
            let chunk = queue.recv().await.unwrap();
            for frame in chunk.frames() {
                if let Frame::XLogData { wal_end, message, .. } = frame.unwrap() {
                    match message[0] {
                        b'I' => inserts += 1,
                        b'C' => end = wal_end,
                        _ => {}
                    }
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
    assert_eq!(inserts, 300_000);
    durable.send(end).unwrap();
    let confirmed = "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = 's'";
    let reached = async {
        loop {
            let text: String = client.query_one(confirmed, &[]).await.unwrap().get(0);
            if text.parse::<Lsn>().unwrap() >= end {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), reached).await.unwrap();
    receiver.finish().await.unwrap();
    client.query("select pg_drop_replication_slot('s')", &[]).await.unwrap();
}
