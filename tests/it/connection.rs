//! The source connection against real servers: passwords, TLS, and a consumer that is stuck.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use highwater::config::SourceConfig;
use highwater::postgres::{Frame, ReplicationConnection, ReplicationStream, sql};
use highwater::{Error, Lsn};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

use crate::support::cluster::{Cluster, Stop};
use crate::support::wait::until;

/// A cluster that wants a password of everybody but the tests' own superuser.
struct Guarded {
    cluster: Cluster,
    certificates: TempDir,
}

/// The superuser `postgres` stays free to enter: the cluster's own machinery comes as it.
const HBA: &str = "local all postgres trust
local replication postgres trust
local all all scram-sha-256
local replication all scram-sha-256
host all all all scram-sha-256
host replication all all scram-sha-256
";

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A certificate of `localhost`, the authority that signed it, and another authority of the same name.
fn make_certificates(folder: &Path) {
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for authority in ["ca", "other"] {
        let files = format!("-keyout {authority}.key -out {authority}.pem");
        openssl(folder, &format!("req -x509 {KEY} -days 2 {files} -subj /CN=ca"));
    }
    openssl(folder, &format!("req {KEY} -keyout server.key -out server.csr -subj /CN=server"));
    std::fs::write(folder.join("san"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    let signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out server.pem";
    openssl(folder, &format!("x509 -req -in server.csr {signed}"));
}

impl Guarded {
    async fn start(tls: bool, settings: &[(&str, &str)]) -> Self {
        let cluster = Cluster::start_new(&[("fsync", "off"), ("listen_addresses", "localhost")]);
        let certificates = tempfile::tempdir().unwrap();
        make_certificates(certificates.path());
        cluster.conf(settings);
        if tls {
            for name in ["server.pem", "server.key"] {
                cluster.install(name, &std::fs::read(certificates.path().join(name)).unwrap());
            }
            cluster.conf(&[("ssl", "on"), ("ssl_cert_file", "server.pem"), ("ssl_key_file", "server.key")]);
        }
        let role = "set password_encryption = 'scram-sha-256'; create role keeper superuser login replication \
                    password 'correct horse'";
        cluster.connect("postgres").await.batch_execute(role).await.unwrap();
        cluster.hba(HBA);
        cluster.reload();
        let guarded = Self { cluster, certificates };
        // A reload takes effect when the server gets round to it.
        let wrong = guarded.config_with("battery-staple", "localhost", "sslmode=prefer");
        let refused = async || sql::connect(&wrong).await.err().map(drop);
        until("the server wants passwords", Duration::from_secs(30), refused).await;
        let right = guarded.config("localhost", "sslmode=prefer");
        let encrypted = async || {
            let client = sql::connect(&right).await.ok()?;
            let row = client.query_one("show ssl", &[]).await.ok()?;
            (row.get::<_, &str>(0) == if tls { "on" } else { "off" }).then_some(())
        };
        until("the server has its certificate", Duration::from_secs(30), encrypted).await;
        guarded
    }

    fn certificate(&self, name: &str) -> PathBuf {
        self.certificates.path().join(name)
    }

    fn config(&self, host: &str, parameters: &str) -> SourceConfig {
        self.config_with("correct%20horse", host, parameters)
    }

    fn config_with(&self, password: &str, host: &str, parameters: &str) -> SourceConfig {
        let folder = self.certificate("");
        let parameters = parameters.replace("$DIR/", &folder.display().to_string());
        let port = self.cluster.port();
        let uri = format!("postgresql://keeper:{password}@{host}:{port}/postgres?{parameters}");
        SourceConfig::new(Some(&uri), &|_| None).unwrap()
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

#[tokio::test]
async fn passwords_and_tls() {
    let cluster = Guarded::start(true, &[]).await;
    let socket_directory = format!("host={}", cluster.cluster.socket_folder().display());
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

/// Certificates as the manual makes them (section 19.9.5), of version 1 and with a name in the subject only; a client's; and
/// some of the curve P-521.
fn make_old_certificates(folder: &Path) {
    for (curve, name) in [("P-256", "old"), ("P-521", "curve")] {
        let key = format!("-newkey ec -pkeyopt ec_paramgen_curve:{curve} -nodes");
        let files = format!("-keyout {name}-ca.key -out {name}-ca.pem");
        openssl(folder, &format!("req -x509 {key} -sha512 -days 2 {files} -subj /CN={name}-ca"));
        for (who, subject) in [("server", "localhost"), ("client", "keeper")] {
            let files = format!("-keyout {name}-{who}.key -out {name}-{who}.csr");
            openssl(folder, &format!("req {key} {files} -subj /CN={subject}"));
            let signed = format!("-CA {name}-ca.pem -CAkey {name}-ca.key -CAcreateserial -days 2 -sha512");
            openssl(folder, &format!("x509 -req -in {name}-{who}.csr {signed} -out {name}-{who}.pem"));
        }
        let text = Command::new("openssl")
            .args(["x509", "-noout", "-text", "-in", &format!("{name}-server.pem")])
            .current_dir(folder)
            .output()
            .unwrap();
        assert!(String::from_utf8_lossy(&text.stdout).contains("Version: 1 (0x0)"), "not of version 1");
    }
    // A list that names the server's certificate, and one that is empty.
    let settings = "[ca]\ndefault_ca=own\n[own]\ndatabase=index\ncrlnumber=number\ndefault_md=sha256\n";
    std::fs::write(folder.join("ca.conf"), settings).unwrap();
    std::fs::write(folder.join("index"), "").unwrap();
    std::fs::write(folder.join("number"), "01\n").unwrap();
    let list = "ca -config ca.conf -keyfile ca.key -cert ca.pem -crldays 2";
    openssl(folder, &format!("{list} -gencrl -out empty.crl"));
    openssl(folder, &format!("{list} -revoke server.pem"));
    openssl(folder, &format!("{list} -gencrl -out revoked.crl"));
}

#[tokio::test]
async fn certificates_of_version_1_and_p_521() {
    let guarded = Guarded::start(true, &[]).await;
    make_old_certificates(guarded.certificates.path());
    let cluster = &guarded.cluster;
    for name in ["old", "curve"] {
        for file in [format!("{name}-server.pem"), format!("{name}-server.key"), format!("{name}-ca.pem")] {
            cluster.install(&file, &std::fs::read(guarded.certificate(&file)).unwrap());
        }
        let file = |what: &str| format!("{name}-{what}");
        cluster.conf(&[
            ("ssl_cert_file", &file("server.pem")),
            ("ssl_key_file", &file("server.key")),
            ("ssl_ca_file", &file("ca.pem")),
        ]);
        cluster.hba(&format!("{HBA}hostssl all all all cert\n").replacen(
            "host all all",
            "hostssl all all",
            1,
        ));
        cluster.reload();
        let roots = format!("sslrootcert=$DIR/{name}-ca.pem");
        let reloaded = async || {
            let config = guarded.config("localhost", &format!("sslmode=verify-ca&{roots}"));
            sql::connect(&config).await.ok().map(drop)
        };
        until("the server has its new certificate", Duration::from_secs(30), reloaded).await;
        // TLS 1.2 has one list for the curves of certificates and of key exchanges, and rustls exchanges none of P-521.
        let versions: &[&str] = if name == "curve" { &["TLSv1.3"] } else { &["TLSv1.2", "TLSv1.3"] };
        for version in versions {
            for parameters in [
                "sslmode=prefer".to_owned(),
                "sslmode=require&channel_binding=require".to_owned(),
                format!("sslmode=verify-ca&{roots}"),
                format!("sslmode=verify-full&{roots}"),
            ] {
                let parameters = format!("{parameters}&ssl_max_protocol_version={version}");
                let result = both(&guarded.config("localhost", &parameters)).await;
                assert!(
                    result.unwrap_or_else(|error| panic!("{parameters}: {}", error.chain())),
                    "{parameters}"
                );
            }
            // The client's certificate is its login.
            cluster.hba(
                "local all postgres trust\nhostssl all all all cert\nhostssl replication all all cert\n",
            );
            cluster.reload();
            let identity = format!("sslcert=$DIR/{name}-client.pem&sslkey=$DIR/{name}-client.key");
            let by_certificate = guarded.config_with(
                "",
                "localhost",
                &format!("sslmode=require&{identity}&ssl_max_protocol_version={version}&require_auth=none"),
            );
            let accepted = async || sql::connect(&by_certificate).await.ok().map(drop);
            until("the certificate is a login", Duration::from_secs(30), accepted).await;
            assert!(both(&by_certificate).await.unwrap());
            cluster.hba(HBA);
            cluster.reload();
            let again = guarded.config("localhost", "sslmode=require");
            let accepted = async || sql::connect(&again).await.ok().map(drop);
            until("passwords count again", Duration::from_secs(30), accepted).await;
        }
        says_what_is_wrong(&guarded, &roots).await;
    }
}

/// The server has an old certificate, which can't be trusted in these ways.
async fn says_what_is_wrong(guarded: &Guarded, roots: &str) {
    for (host, parameters, words) in [
        ("127.0.0.1", format!("sslmode=verify-full&{roots}"), &["CN=localhost", "127.0.0.1"][..]),
        (
            "localhost",
            "sslmode=verify-ca&sslrootcert=$DIR/other.pem".to_owned(),
            &["version 1", "-extfile", "other.pem"],
        ),
        ("localhost", format!("sslmode=verify-ca&{roots}&sslcrl=$DIR/empty.crl"), &["version 1", "revoked"]),
    ] {
        let error = both(&guarded.config(host, &parameters)).await.unwrap_err().chain();
        assert!(words.iter().all(|word| error.contains(word)), "{parameters}: {error}");
    }
}

#[tokio::test]
async fn what_a_connection_string_asks_for() {
    let guarded = Guarded::start(true, &[]).await;
    make_old_certificates(guarded.certificates.path());
    for (parameters, encrypted) in [
        ("sslmode=allow", false),
        ("sslmode=require&channel_binding=require&require_auth=scram-sha-256", true),
        ("sslmode=require&channel_binding=disable&require_auth=!password,!md5,!none", true),
        ("sslmode=verify-full&sslrootcert=$DIR/ca.pem&sslcrl=$DIR/empty.crl", true),
        (
            "hostaddr=127.0.0.1&keepalives_idle=5&tcp_user_timeout=0&connect_timeout=0&load_balance_hosts=random",
            true,
        ),
        (
            "keepalives=0&sslsni=0&gssencmode=disable&options=-c%20statement_timeout=100&application_name=own",
            true,
        ),
    ] {
        let result = both(&guarded.config("localhost", parameters)).await;
        let found = result.unwrap_or_else(|error| panic!("{parameters}: {}", error.chain()));
        assert_eq!(found, encrypted, "{parameters}");
    }
    for (parameters, words) in [
        ("sslmode=disable&channel_binding=require", "channel_binding"),
        ("sslmode=require&require_auth=password,md5", "scram-sha-256"),
        ("sslmode=verify-full&sslrootcert=$DIR/ca.pem&sslcrl=$DIR/revoked.crl", "evoked"),
        ("sslmode=verify-full&sslrootcert=$DIR/other.pem&sslcrl=$DIR/empty.crl", "CN=server"),
        ("sslmode=require&sslnegotiation=direct", "ALPN"),
    ] {
        let error = both(&guarded.config("localhost", parameters)).await.unwrap_err();
        let text = error.chain();
        // A server before 17 knows no beginning with TLS, and hangs up.
        let is_hung_up = parameters.contains("direct") && matches!(error, Error::Io { .. });
        assert!(text.contains(words) || is_hung_up, "{parameters}: {text}");
        assert!(!text.contains("correct horse"), "{text}");
    }
    // Who is not let in without TLS comes with it, and the other way round.
    for (rule, parameters, encrypted) in
        [("hostssl", "sslmode=allow", true), ("hostnossl", "sslmode=prefer", false)]
    {
        guarded.cluster.hba(&format!("local all postgres trust\n{rule} all all all scram-sha-256\n"));
        guarded.cluster.reload();
        let config = guarded.config("localhost", parameters);
        until("the rule is in force", Duration::from_secs(30), async || {
            let client = sql::connect(&config).await.ok()?;
            let row = client
                .query_one("select ssl from pg_stat_ssl where pid = pg_backend_pid()", &[])
                .await
                .ok()?;
            (row.get::<_, bool>(0) == encrypted).then_some(())
        })
        .await;
    }
    let error = sql::connect(&guarded.config("localhost", "sslmode=require")).await.unwrap_err();
    assert!(matches!(&error, Error::Server { code, .. } if code == "28000"), "{error:?}");
}

#[tokio::test]
async fn a_server_without_tls() {
    let cluster = Guarded::start(false, &[]).await;
    assert!(!both(&cluster.config("localhost", "sslmode=prefer")).await.unwrap());
    let error = both(&cluster.config("localhost", "sslmode=require")).await.unwrap_err();
    assert!(matches!(&error, Error::Setting { accepted, .. } if accepted.contains("has TLS")), "{error:?}");
}

#[tokio::test]
async fn a_stuck_consumer_keeps_the_connection() {
    let cluster = Guarded::start(true, &[("wal_sender_timeout", "2s")]).await;
    for parameters in ["sslmode=disable", "sslmode=require"] {
        stuck(&cluster.config("localhost", parameters)).await;
    }
}

async fn stuck(config: &SourceConfig) {
    let client = sql::connect(config).await.unwrap();
    client
        .batch_execute(
            "drop table if exists public.t; create table public.t (a int, b text); drop publication if exists p; \
             create publication p for table public.t with (publish = 'insert')",
        )
        .await
        .unwrap();
    client.query("select pg_create_logical_replication_slot('s', 'pgoutput')", &[]).await.unwrap();
    let missing =
        ReplicationConnection::connect(config).await.unwrap().start("nope", &["p"], false).await.unwrap_err();
    assert!(matches!(&missing, Error::Slot { transient: false, .. }), "{missing:?}");
    assert!(missing.to_string().contains("highwater setup"));

    let stream =
        ReplicationConnection::connect(config).await.unwrap().start("s", &["p"], false).await.unwrap();
    // Shorter than the time in which nobody takes anything: a server that we don't listen to is not silent.
    let stream = stream.with_silence(Duration::from_secs(3));
    let (chunks, mut queue) = mpsc::channel(1);
    let (durable, watched) = watch::channel(Lsn::ZERO);
    let mut receiver = stream.spawn(chunks, watched);
    let second = ReplicationConnection::connect(config).await.unwrap();
    let rival = tokio::spawn(async move { second.start("s", &["p"], false).await });
    client
        .execute("insert into public.t select i, repeat('x', 100) from generate_series(1, 300000) i", &[])
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
    until("the position is acknowledged", Duration::from_secs(2), async || {
        let text: String = client.query_one(confirmed, &[]).await.unwrap().get(0);
        (text.parse::<Lsn>().unwrap() >= end).then_some(())
    })
    .await;
    receiver.finish().await.unwrap();
    client.query("select pg_drop_replication_slot('s')", &[]).await.unwrap();
}

/// A table, its publication `p` and the slot `s`, and the stream from them.
async fn published(config: &SourceConfig) -> (tokio_postgres::Client, ReplicationStream) {
    let client = sql::connect(config).await.unwrap();
    client
        .batch_execute("create table public.t (a int); create publication p for table public.t")
        .await
        .unwrap();
    client.query("select pg_create_logical_replication_slot('s', 'pgoutput')", &[]).await.unwrap();
    let stream =
        ReplicationConnection::connect(config).await.unwrap().start("s", &["p"], false).await.unwrap();
    (client, stream)
}

#[tokio::test]
async fn a_server_that_hangs_is_noticed() {
    let cluster = Guarded::start(false, &[]).await;
    let (client, stream) = published(&cluster.config("localhost", "")).await;
    let holder = "select active_pid from pg_replication_slots where slot_name = 's'";
    let process: i32 = client.query_one(holder, &[]).await.unwrap().get(0);
    assert_eq!(stream.process_id(), process);

    let (chunks, _queue) = mpsc::channel(64);
    let (_durable, watched) = watch::channel(Lsn::ZERO);
    let mut receiver = stream.with_silence(Duration::from_secs(1)).spawn(chunks, watched);
    // One that has nothing to say answers when it is asked.
    let early = tokio::time::timeout(Duration::from_secs(5), receiver.ended()).await;
    assert!(early.is_err(), "{early:?}");

    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
    };
    signal("-STOP");
    let ended = tokio::time::timeout(Duration::from_secs(30), receiver.ended()).await;
    signal("-CONT");
    let error = ended.unwrap().unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::TimedOut),
        "{error:?}"
    );
    assert!(error.is_transient() && error.chain().contains("has sent nothing"), "{}", error.chain());
}

#[tokio::test]
async fn a_publication_that_is_dropped_under_the_stream() {
    let cluster = Guarded::start(false, &[]).await;
    let config = cluster.config("localhost", "");
    let (client, stream) = published(&config).await;
    client.batch_execute("insert into public.t values (1)").await.unwrap();
    client.batch_execute("drop publication p").await.unwrap();
    client.batch_execute("insert into public.t values (2)").await.unwrap();
    client.batch_execute("create publication p for table public.t").await.unwrap();
    let end = async |stream: ReplicationStream| {
        let (chunks, _queue) = mpsc::channel(64);
        let (_durable, watched) = watch::channel(Lsn::ZERO);
        let mut receiver = stream.spawn(chunks, watched);
        tokio::time::timeout(Duration::from_secs(30), receiver.ended()).await.unwrap().unwrap_err()
    };
    let error = end(stream).await;
    assert!(matches!(&error, Error::Slot { slot, transient: false, .. } if slot == "s"), "{error:?}");
    assert!(error.to_string().contains("pg_drop_replication_slot('s')"), "{error}");
    // The new publication doesn't help.
    let again =
        ReplicationConnection::connect(&config).await.unwrap().start("s", &["p"], false).await.unwrap();
    assert!(matches!(end(again).await, Error::Slot { transient: false, .. }));
}

#[tokio::test]
async fn the_history_of_a_timeline() {
    let cluster = Guarded::start(false, &[]).await;
    cluster.cluster.stop(Stop::Fast);
    cluster.cluster.install("standby.signal", b"");
    cluster.cluster.start();
    let client = cluster.cluster.connect("postgres").await;
    client.query("select pg_promote()", &[]).await.unwrap();
    let config = cluster.config("localhost", "");
    let mut connection = ReplicationConnection::connect(&config).await.unwrap();
    let rows = connection.query("TIMELINE_HISTORY 2").await.unwrap();
    let [row] = rows.as_slice() else { panic!("{rows:?}") };
    let [Some(file), Some(content)] = row.as_slice() else { panic!("{row:?}") };
    assert_eq!(file, "00000002.history");
    assert!(content.starts_with("1\t") && content.contains('/'), "{content:?}");
}
