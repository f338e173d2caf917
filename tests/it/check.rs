//! The preflight against a real server: a healthy one, then each thing broken in turn.

use highwater::check::Severity::{Error, Warning};
use highwater::check::{Report, Severity, check};
use highwater::config::{Config, ObjectStorageSettings, SourceConfig};
use tempfile::TempDir;

use crate::support::cluster::{CRON_DATABASE, Cluster};

/// Settings for a role on the cluster, with an archive in a folder that ends with the second value.
fn config(cluster: &Cluster, user: &str) -> (Config, TempDir) {
    let uri = format!("postgresql://{user}@127.0.0.1:{}/{CRON_DATABASE}", cluster.port());
    let archive = tempfile::tempdir().unwrap();
    let source = SourceConfig::new(Some(&uri), &|_| None).unwrap();
    let storage = ObjectStorageSettings::new(&archive.path().display().to_string(), "us-east-1").unwrap();
    (Config::new(source, storage), archive)
}

/// Runs statements one by one: a publication can't be altered in the transaction that made it, nor a slot be
/// made in one that has written.
async fn sql(cluster: &Cluster, statements: &str) {
    let client = cluster.connect(CRON_DATABASE).await;
    for statement in statements.split(';') {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
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
    alter table scouter.psi_drift owner to archiver;
    alter table scouter.spc_drift owner to archiver;
    grant create on schema partman to archiver;
    grant create on schema scouter to archiver;
    grant all on all tables in schema partman to archiver;
    set role archiver;
    select partman.create_parent('scouter.psi_drift', 'created_at', 'native', '1 day');
    reset role;
    create extension pg_cron;
    grant usage on schema cron to archiver";

/// What `highwater setup --schedule-purge` does.
const SCHEDULE: &str = "set role archiver;
    select cron.schedule('highwater-purge', '17 * * * *', 'call highwater.purge_all()');
    reset role";

fn seen(report: &Report) -> Vec<(&'static str, Severity)> {
    let bad = report.findings().iter().filter(|finding| finding.severity != Severity::Ok);
    bad.map(|finding| (finding.id, finding.severity)).collect()
}

#[expect(clippy::too_many_lines, reason = "a table of cases")]
#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_server_passes_and_each_broken_thing_is_found() {
    let cluster = Cluster::start_new(&[
        ("fsync", "off"),
        ("max_slot_wal_keep_size", "10GB"),
        ("max_replication_slots", "3"),
    ]);
    sql(&cluster, HEALTHY).await;
    let (config, _archive) = config(&cluster, "archiver");
    let report = check(&config).await;
    assert_eq!(
        seen(&report),
        [("state-schema", Error), ("slot", Error), ("pg-cron", Warning)],
        "the publication alone is not enough: {report:#?}"
    );
    highwater::setup::setup(&config).await.unwrap();
    assert_eq!(seen(&check(&config).await), [("pg-cron", Warning)], "nobody purges yet");
    let key = "select blocked_by from highwater.purge_key('scouter.psi_drift'::regclass, now())";
    let blocked: String =
        cluster.connect(CRON_DATABASE).await.query_one(key, &[]).await.unwrap().get("blocked_by");
    assert!(blocked.contains("no sidecar has archived it yet"), "{blocked}");
    let scheduled = highwater::setup::schedule_purge(&config, "17 * * * *").await.unwrap();
    assert!(scheduled.todo.is_empty() && scheduled.done.len() == 1, "{scheduled:?}");
    let report = check(&config).await;
    assert_eq!(seen(&report), [], "{report:#?}");

    let day = |ago| (chrono::Utc::now() - chrono::Duration::days(ago)).date_naive();
    let coming: Vec<String> = (1..=4)
        .map(|days| format!("scouter.psi_drift_p{}", day(-days).to_string().replace('-', "_")))
        .collect();
    for (break_it, expected, mend_it) in [
        ("alter role archiver noreplication", vec![("role", Error)], "alter role archiver replication"),
        (
            "revoke select on scouter.spc_drift from archiver",
            vec![("select", Error), ("purge-rights", Warning)],
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
            "alter table scouter.spc_drift enable row level security, force row level security",
            vec![("row-security", Error), ("purge-rights", Warning)],
            "alter table scouter.spc_drift disable row level security, no force row level security",
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
        (
            "update partman.part_config set parent_table = 'scouter.gone' where parent_table = 'scouter.psi_drift'",
            vec![("partman-table", Warning)],
            "update partman.part_config set parent_table = 'scouter.psi_drift' where parent_table = 'scouter.gone'",
        ),
        (
            "set role archiver; select cron.schedule('make', '@daily', 'call partman.run_maintenance_proc()'); reset role;
             insert into cron.job_run_details (jobid, database, username, command, status, return_message)
             select jobid, database, username, command, 'failed', 'no such table' from cron.job where jobname = 'make'",
            vec![("partman-run", Warning)],
            "delete from cron.job_run_details; delete from cron.job where jobname = 'make'",
        ),
        (
            "insert into scouter.psi_drift values (now() + interval '1 year', 1, 'f', 1, 1, false)",
            vec![("default-partition", Warning)],
            "delete from scouter.psi_drift",
        ),
        (
            &format!("drop table {}", coming.join(", ")),
            vec![("next-partition", Warning)],
            "update partman.part_config set infinite_time_partitions = true;
             set role archiver; select partman.run_maintenance('scouter.psi_drift'); reset role",
        ),
        (
            "update highwater.watermark set system_identifier = '7'",
            vec![("system", Error)],
            "update highwater.watermark set system_identifier = (select system_identifier::text from pg_control_system())",
        ),
        (
            "drop extension pg_cron",
            vec![("pg-cron", Warning)],
            &format!("create extension pg_cron; grant usage on schema cron to archiver; {SCHEDULE}"),
        ),
        ("delete from cron.job", vec![("pg-cron", Warning)], SCHEDULE),
        (
            "update cron.job set active = false",
            vec![("pg-cron", Warning)],
            "update cron.job set active = true",
        ),
        (
            "insert into cron.job_run_details (jobid, database, username, command, status, return_message)
             select jobid, database, username, command, 'failed', 'no space left' from cron.job",
            vec![("pg-cron", Warning)],
            "delete from cron.job_run_details",
        ),
        (
            "insert into scouter.psi_drift values ('2020-01-01', 1, 'f', 1, 1, false)",
            vec![("purge", Warning)],
            "delete from scouter.psi_drift",
        ),
        (
            "create table scouter.old partition of scouter.psi_drift for values from ('2020-01-01') to ('2020-01-02');
             insert into scouter.old select '2020-01-01', n, 'f', 1, 1, false from generate_series(1, 20000) n;
             analyze scouter.old; alter table scouter.old owner to archiver",
            vec![("purge-share", Warning), ("purge", Warning)],
            "drop table scouter.old",
        ),
        // Small beside the rest, but a week ago it was not there.
        (
            &format!(
                "create table scouter.late partition of scouter.psi_drift for values from ('{0}') to ('{1}');
                 create table scouter.rest partition of scouter.psi_drift for values from ('{2}') to ('{3}');
                 insert into scouter.late select '{0}', n, 'f', 1, 1, false from generate_series(1, 20000) n;
                 insert into scouter.rest select '{2}', n, 'f', 1, 1, false from generate_series(1, 180000) n;
                 analyze scouter.late; alter table scouter.late owner to archiver; alter table scouter.rest owner to archiver",
                day(63), day(62), day(40), day(39)
            ),
            vec![("purge-share", Warning), ("purge", Warning)],
            "drop table scouter.late, scouter.rest",
        ),
        (
            "alter table scouter.psi_drift detach partition scouter.psi_drift_default",
            vec![("purge-default", Warning)],
            "alter table scouter.psi_drift attach partition scouter.psi_drift_default default",
        ),
        (
            "delete from cron.job; update highwater.retention set purged_at = now()",
            vec![],
            &format!("{SCHEDULE}; update highwater.retention set purged_at = null"),
        ),
        (
            "insert into highwater.purge_log (at, source_table, partition_name, action, cutoff, reason)
             values (now() - interval '2 days', 'scouter.psi_drift', 'scouter.old', 'blocked', now(), 'locked');
             update highwater.retention set purged_at = now()",
            vec![("purge-blocked", Warning)],
            "truncate highwater.purge_log; update highwater.retention set purged_at = null",
        ),
        (
            "alter table scouter.psi_drift owner to postgres; grant select on scouter.psi_drift to archiver",
            vec![("purge-owner", Warning)],
            "alter table scouter.psi_drift owner to archiver",
        ),
        (
            "create table scouter.notes (note text); alter publication highwater add table scouter.notes",
            vec![("publication-extra", Warning)],
            "drop table scouter.notes",
        ),
        (
            "select pg_drop_replication_slot('highwater');
          select pg_create_logical_replication_slot('highwater', 'test_decoding')",
            vec![("slot", Error)],
            "select pg_drop_replication_slot('highwater')",
        ),
        // Gone, though the archive was fed from it; then as if it had never been.
        ("select 1", vec![("slot", Error)], "delete from highwater.watermark"),
        (
            "select 1",
            vec![("slot", Error)],
            "select pg_create_logical_replication_slot('highwater', 'pgoutput')",
        ),
        (
            "alter table highwater.watermark rename to moved",
            vec![("state-schema", Error)],
            "alter table highwater.moved rename to watermark",
        ),
        (
            "select pg_drop_replication_slot('highwater');
          select pg_create_physical_replication_slot('a'), pg_create_physical_replication_slot('b'),
                 pg_create_physical_replication_slot('c')",
            vec![("replication-slots", Error), ("slot", Error)],
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots;
          select pg_create_logical_replication_slot('highwater', 'pgoutput')",
        ),
        (
            "alter schema scouter rename to moved",
            vec![("tables", Error), ("partman-table", Warning)],
            "alter schema moved rename to scouter",
        ),
    ] {
        sql(&cluster, break_it).await;
        let report = check(&config).await;
        assert_eq!(seen(&report), expected, "after {break_it}: {report:#?}");
        sql(&cluster, mend_it).await;
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
    let cluster = Cluster::start_new(&[
        ("fsync", "off"),
        ("max_replication_slots", "0"),
        ("max_wal_senders", "0"),
        ("wal_level", "minimal"),
    ]);
    sql(&cluster, "create role archiver login").await;
    let (config, _archive) = config(&cluster, "archiver");
    let report = check(&config).await;
    let errors: Vec<_> =
        seen(&report).into_iter().filter(|(_, severity)| *severity == Severity::Error).collect();
    let ids: Vec<_> = errors.iter().map(|(id, _)| *id).collect();
    assert_eq!(
        ids,
        [
            "wal-level",
            "replication-slots",
            "wal-senders",
            "role",
            "state-schema",
            "slot",
            "tables",
            "publication"
        ],
        "{report:#?}"
    );
    assert!(seen(&report).contains(&("wal-limit", Severity::Warning)));
}
