//! The preflight against a real server: a healthy one, then each thing broken in turn.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use highwater::check::Severity::{Error, Warning};
use highwater::check::{Report, Severity, check};
use highwater::config::{Config, ObjectStorageSettings, SourceConfig};

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A throw-away cluster that ends with the value.
struct Cluster {
    directory: tempfile::TempDir,
    port: u16,
}

impl Cluster {
    fn start(options: &str) -> Self {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let cluster = Self { directory, port };
        let (data, path) = (cluster.data(), cluster.directory.path().display().to_string());
        as_server_user(&format!("{BIN}/initdb -D {data} -U postgres -A trust --no-sync"));
        let options = format!("-p {port} -k {path} -c listen_addresses=127.0.0.1 -c fsync=off {options}");
        as_server_user(&format!("{BIN}/pg_ctl -D {data} -w -l {path}/log -o '{options}' start"));
        cluster
    }

    fn data(&self) -> String {
        format!("{}/data", self.directory.path().display())
    }

    /// Runs statements one by one, each in its own transaction.
    fn sql(&self, text: &str) {
        let mut psql = Command::new("psql")
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-p"])
            .args([&self.port.to_string(), "-d", "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        psql.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(psql.wait().unwrap().success(), "{text}");
    }

    fn config(&self, user: &str) -> Config {
        let uri = format!("postgresql://{user}@127.0.0.1:{}/postgres", self.port);
        let archive = self.directory.path().join("archive").display().to_string();
        let source = SourceConfig::new(Some(&uri), &|_| None).unwrap();
        Config::new(source, ObjectStorageSettings::new(&archive, "us-east-1").unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        as_server_user(&format!("{BIN}/pg_ctl -D {} -m immediate stop", self.data()));
    }
}

/// The server refuses to run as root.
fn as_server_user(command: &str) {
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout.starts_with(b"0\n");
    let mut shell = if is_root {
        let mut runuser = Command::new("runuser");
        runuser.args(["-u", "postgres", "--", "sh", "-c", command]);
        runuser
    } else {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]);
        shell
    };
    let status =
        shell.current_dir(Path::new("/")).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command}");
}

const HEALTHY: &str = "
    create schema scouter;
    create table scouter.drift_entities (id int primary key, uid text, space text, name text, version text);
    create table scouter.psi_drift (created_at timestamptz not null, entity_id int, feature text, bin_id int,
                                    bin_count int, archived bool) partition by range (created_at);
    create table scouter.spc_drift (created_at timestamp, space text, name varchar, version text, feature text,
                                    value float8);
    create role archiver login replication;
    grant usage on schema scouter to archiver;
    grant select on all tables in schema scouter to archiver;
    create schema highwater authorization archiver;
    create publication highwater for table scouter.psi_drift, scouter.spc_drift, scouter.drift_entities
        with (publish = 'insert', publish_via_partition_root = true);
    create schema partman;
    create extension pg_partman schema partman;
    grant usage on schema partman to archiver;
    grant select on partman.part_config to archiver;
    select partman.create_parent('scouter.psi_drift', 'created_at', 'native', '1 day');
    create extension pg_cron;
    select pg_create_logical_replication_slot('highwater', 'pgoutput');";

fn seen(report: &Report) -> Vec<(&'static str, Severity)> {
    let bad = report.findings().iter().filter(|finding| finding.severity != Severity::Ok);
    bad.map(|finding| (finding.id, finding.severity)).collect()
}

#[expect(clippy::too_many_lines, reason = "a table of cases")]
#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_server_passes_and_each_broken_thing_is_found() {
    let cluster = Cluster::start(
        "-c wal_level=logical -c max_slot_wal_keep_size=10GB -c shared_preload_libraries=pg_cron \
         -c cron.database_name=postgres -c max_replication_slots=3",
    );
    cluster.sql(HEALTHY);
    let config = cluster.config("archiver");
    let report = check(&config).await;
    assert_eq!(seen(&report), [], "{report:#?}");

    for (break_it, expected, mend_it) in [
        ("alter role archiver noreplication", vec![("role", Error)], "alter role archiver replication"),
        (
            "revoke select on scouter.spc_drift from archiver",
            vec![("select", Error)],
            "grant select on scouter.spc_drift to archiver",
        ),
        (
            "alter schema highwater owner to postgres",
            vec![("state-schema", Error)],
            "alter schema highwater owner to archiver",
        ),
        (
            "alter table scouter.psi_drift alter bin_id type numeric",
            vec![("column", Error)],
            "alter table scouter.psi_drift alter bin_id type int",
        ),
        (
            "alter table scouter.spc_drift rename value to val",
            vec![("column", Error)],
            "alter table scouter.spc_drift rename val to value",
        ),
        (
            "alter table scouter.spc_drift rename space to spaces",
            vec![("shape", Error)],
            "alter table scouter.spc_drift rename spaces to space",
        ),
        (
            "alter table scouter.spc_drift enable row level security",
            vec![("row-security", Error)],
            "alter table scouter.spc_drift disable row level security",
        ),
        (
            "alter publication highwater rename to other",
            vec![("publication", Error)],
            "alter publication other rename to highwater",
        ),
        (
            "alter publication highwater set (publish = 'insert, update')",
            vec![("publication-options", Error)],
            "alter publication highwater set (publish = 'insert')",
        ),
        (
            "alter publication highwater set (publish = 'insert, truncate')",
            vec![("publication-options", Warning)],
            "alter publication highwater set (publish = 'insert')",
        ),
        (
            "alter publication highwater set (publish_via_partition_root = false)",
            vec![("publication-options", Error)],
            "alter publication highwater set (publish_via_partition_root = true)",
        ),
        (
            "alter publication highwater drop table scouter.drift_entities",
            vec![("publication-table", Error)],
            "alter publication highwater add table scouter.drift_entities",
        ),
        (
            "alter publication highwater drop table scouter.spc_drift;
          alter publication highwater add table scouter.spc_drift where (value > 0)",
            vec![("publication-filter", Error)],
            "alter publication highwater drop table scouter.spc_drift;
          alter publication highwater add table scouter.spc_drift (created_at, space, name, version)",
        ),
        (
            "select 1",
            vec![("publication-columns", Error)],
            "alter publication highwater drop table scouter.spc_drift;
          alter publication highwater add table scouter.spc_drift
              (created_at, space, name, version, feature, value)",
        ),
        (
            "update partman.part_config set retention = '30 days', retention_keep_table = false",
            vec![("partman-retention", Error)],
            "update partman.part_config set retention = null",
        ),
        (
            "revoke select on partman.part_config from archiver",
            vec![("partman", Warning)],
            "grant select on partman.part_config to archiver",
        ),
        ("drop extension pg_cron", vec![("pg-cron", Warning)], "create extension pg_cron"),
        (
            "select pg_drop_replication_slot('highwater');
          select pg_create_logical_replication_slot('highwater', 'test_decoding')",
            vec![("slot", Error)],
            "select pg_drop_replication_slot('highwater')",
        ),
        (
            "create table highwater.watermark (slot_name text);
          create table highwater.entity_watermark (x int);
          insert into highwater.watermark values ('highwater');
          grant select, insert, update on all tables in schema highwater to archiver",
            vec![("slot", Error)],
            "drop table highwater.watermark, highwater.entity_watermark",
        ),
        (
            "select pg_create_physical_replication_slot('a'), pg_create_physical_replication_slot('b'),
                 pg_create_physical_replication_slot('c')",
            vec![("replication-slots", Error)],
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots",
        ),
        (
            "alter schema scouter rename to moved",
            vec![("tables", Error)],
            "alter schema moved rename to scouter",
        ),
    ] {
        cluster.sql(break_it);
        let report = check(&config).await;
        assert_eq!(seen(&report), expected, "after {break_it}: {report:#?}");
        cluster.sql(mend_it);
    }
    let report = check(&config).await;
    assert_eq!(seen(&report), [], "all is mended: {report:#?}");

    let mut broken = config.clone();
    broken.source = SourceConfig::new(Some("postgresql://archiver@127.0.0.1:1/postgres"), &|_| None).unwrap();
    broken.storage = ObjectStorageSettings::new("/proc/nowhere", "us-east-1").unwrap();
    assert_eq!(seen(&check(&broken).await), [("connection", Error), ("storage", Error)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_server_is_told_what_it_lacks() {
    let cluster = Cluster::start("-c max_replication_slots=0 -c max_wal_senders=0 -c wal_level=minimal");
    cluster.sql("create role archiver login");
    let report = check(&cluster.config("archiver")).await;
    let errors: Vec<_> =
        seen(&report).into_iter().filter(|(_, severity)| *severity == Severity::Error).collect();
    let ids: Vec<_> = errors.iter().map(|(id, _)| *id).collect();
    assert_eq!(
        ids,
        ["wal-level", "replication-slots", "wal-senders", "role", "state-schema", "tables", "publication"],
        "{report:#?}"
    );
    assert!(seen(&report).contains(&("wal-limit", Severity::Warning)));
}
