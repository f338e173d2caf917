//! Deletion of what is archived, and of nothing else.

use std::time::Duration;

use rand::RngExt as _;
use serde_json::Value;
use tokio_postgres::Client;

use crate::support::cluster::Stop;
use crate::support::schema::Shape;
use crate::support::shadow;
use crate::support::sidecar::{Launch, Sidecar};
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// A partition of a day so many days ago.
async fn old_day(client: &Client, name: &str, days: i32) {
    let sql = format!(
        "do $$ declare low timestamptz := date_trunc('day', now(), 'UTC') - {days} * interval '1 day'; begin
             execute format('create table scouter.{name} partition of scouter.psi_drift for values from (%L) to (%L)',
                            low, low + interval '1 day'); end $$"
    );
    client.batch_execute(&sql).await.unwrap();
}

/// Rows of PSI, a minute each from the start of a day on.
async fn fill(client: &Client, days: i32, minutes: i32) {
    let sql = format!(
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select date_trunc('day', now(), 'UTC') - {days} * interval '1 day' + n * interval '1 minute', 's', 'n', '1', 'f', n, n
         from generate_series(0, {minutes} - 1) n"
    );
    client.batch_execute(&sql).await.unwrap();
}

async fn exists(client: &Client, table: &str) -> bool {
    client.query_one("select to_regclass($1) is not null", &[&table]).await.unwrap().get(0)
}

async fn count(client: &Client, from: &str) -> i64 {
    client.query_one(&format!("select count(*) from {from}"), &[]).await.unwrap().get(0)
}

/// What blocks a partition, or whatever there is of the table.
async fn blocked_by(client: &Client, partition: Option<&str>) -> String {
    let sql = "select blocked_by from highwater.explain_purge('scouter.psi_drift')
               where coalesce(partition_name = $1, true) limit 1";
    let row = client.query_opt(sql, &[&partition]).await.unwrap();
    let row = row.unwrap_or_else(|| panic!("nothing is explained of {partition:?}"));
    row.get::<_, Option<String>>(0).unwrap_or_default()
}

async fn purge(client: &Client) {
    client.batch_execute("call highwater.purge_all()").await.unwrap();
}

/// The newest entry of the log about a partition: action, rows, reason.
async fn logged(client: &Client, partition: Option<&str>) -> (String, Option<i64>, String) {
    let sql = "select action, row_count, coalesce(reason, '') from highwater.purge_log
               where partition_name is not distinct from $1 order by last_at desc, id desc limit 1";
    let row = client.query_opt(sql, &[&partition]).await.unwrap();
    let row = row.unwrap_or_else(|| panic!("nothing is logged of {partition:?}"));
    (row.get(0), row.get(1), row.get(2))
}

/// With the sidecar's own verifications off, so that a test decides about them.
fn quiet(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_VERIFY_HOURS", "none")
}

/// A stage with a shadow, partitions of 70 and 71 days ago with rows, and a sidecar that has archived everything.
async fn started(shape: Shape) -> (Stage, Client, Sidecar) {
    let stage = Stage::shared(shape).await;
    let client = stage.connect().await;
    shadow::create(&client, shape).await;
    for (name, days) in [("old", 70), ("older", 71)] {
        old_day(&client, name, days).await;
        fill(&client, days, 500).await;
    }
    quiet(&stage).must(&["setup"]);
    let sidecar = quiet(&stage).start();
    archived(&client).await;
    (stage, client, sidecar)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_archived_and_verified_is_dropped_and_nothing_else() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    // A late row for a day that has no partition: the default partition takes it.
    fill(&client, 80, 3).await;
    fill(&client, 0, 5).await;
    archived(&client).await;

    purge(&client).await;
    assert!(exists(&client, "scouter.old").await, "nobody has verified it");
    assert!(blocked_by(&client, Some("scouter.old")).await.contains("read back"));
    assert_eq!(
        logged(&client, Some("scouter.psi_drift_default")).await,
        ("deleted".into(), Some(3), String::new())
    );

    quiet(&stage).must(&["verify"]);
    let dry_run = quiet(&stage).must(&["purge", "--dry-run"]);
    assert!(
        dry_run.contains("scouter.old: 500 rows past retention") && dry_run.contains("can be dropped"),
        "{dry_run}"
    );
    let done = quiet(&stage).must(&["purge"]);
    assert!(
        done.contains("scouter.old: dropped, 500 rows") && done.contains("scouter.older: dropped"),
        "{done}"
    );
    assert!(!exists(&client, "scouter.old").await && !exists(&client, "scouter.older").await);
    assert_eq!(count(&client, "scouter.psi_drift").await, 5, "rows that are not past retention stay");
    let kept = count(&client, "highwater.verified_partition where partition_name like '%old%'").await;
    assert_eq!(kept, 0, "what is gone is forgotten");

    // A late row for a dropped day goes to the default partition, is archived, and purged from there.
    fill(&client, 70, 1).await;
    archived(&client).await;
    purge(&client).await;
    assert_eq!(count(&client, "scouter.psi_drift").await, 5);
    assert_eq!(shadow::assert_archived(&client, &stage.storage(), stage.shape).await, 1009);
    shadow::assert_gone_is_archived(&client, &stage.storage(), stage.shape).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_came_after_the_verification_makes_it_due_again() {
    let (stage, client, sidecar) = started(Shape::Named).await;
    quiet(&stage).must(&["verify"]);
    fill_late(&client, 70).await;
    assert!(
        blocked_by(&client, Some("scouter.old")).await.contains("1 row of transaction"),
        "not archived yet, or later"
    );
    archived(&client).await;
    let why = blocked_by(&client, Some("scouter.old")).await;
    assert!(why.contains("1 row came after its rows were read back"), "{why}");
    purge(&client).await;
    assert!(exists(&client, "scouter.old").await && !exists(&client, "scouter.older").await);

    // The sidecar, with its own verifications on, reads it back by itself.
    drop(sidecar);
    let sidecar = stage.launch().start();
    sidecar.says("read back from the archive: equal", DEADLINE).await;
    until("the sidecar has verified it, and it is purged", DEADLINE, async || {
        purge(&client).await;
        (!exists(&client, "scouter.old").await).then_some(())
    })
    .await;
    shadow::assert_archived(&client, &stage.storage(), stage.shape).await;
}

/// A late row, into the partition of that day.
async fn fill_late(client: &Client, days: i32) {
    let sql = format!(
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select date_trunc('day', now(), 'UTC') - {days} * interval '1 day' + interval '23 hours', 's', 'n', '1', 'late', 1, 1"
    );
    client.batch_execute(&sql).await.unwrap();
}

/// A row that was deleted in Postgres: the archive has more, which somebody has to accept.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_with_rows_deleted_by_hand_is_purged_when_that_is_accepted() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    client.batch_execute("delete from scouter.old where bin_id = 7").await.unwrap();
    assert_eq!(quiet(&stage).output(&["verify"]).status.code(), Some(1));
    purge(&client).await;
    assert!(exists(&client, "scouter.old").await && !exists(&client, "scouter.older").await);
    assert_eq!(
        quiet(&stage).output(&["verify", "--accept-surplus"]).status.code(),
        Some(1),
        "it still differs"
    );
    purge(&client).await;
    assert!(!exists(&client, "scouter.old").await);
    shadow::assert_archived(&client, &stage.storage(), stage.shape).await;
}

/// What is put in doubt, of which partition (`None`: of all of the table), what is said of it, and what ends the doubt.
type Doubt = (&'static str, Option<&'static str>, &'static str, &'static str);

const DOUBTS: [Doubt; 11] = [
    (
        "update highwater.watermark set state = 'gap'",
        None,
        "state is gap",
        "update highwater.watermark set state = 'streaming'",
    ),
    (
        "update highwater.watermark set state = 'snapshot'",
        None,
        "state is snapshot",
        "update highwater.watermark set state = 'streaming'",
    ),
    (
        "update highwater.watermark set system_identifier = '1' || system_identifier",
        None,
        "this server is system",
        "update highwater.watermark set system_identifier = substr(system_identifier, 2)",
    ),
    (
        "create table keep as select source_table, archived_before from highwater.watermark;
         update highwater.watermark set archived_before = null",
        None,
        "not known yet",
        "update highwater.watermark w set archived_before = k.archived_before from keep k where k.source_table = w.source_table",
    ),
    (
        "update highwater.watermark set archived_before = (archived_before::text::bigint + 1000000)::text::xid8",
        None,
        "its ids were reset",
        "update highwater.watermark w set archived_before = k.archived_before from keep k where k.source_table = w.source_table",
    ),
    (
        "update highwater.watermark set table_oid = 1 where kind = 'psi'",
        None,
        "no row in highwater.watermark",
        "update highwater.watermark set table_oid = 'scouter.psi_drift'::regclass where kind = 'psi'",
    ),
    (
        "create table lapsed as table highwater.covered_partition; delete from highwater.covered_partition",
        Some("scouter.old"),
        "attached with rows in it",
        "insert into highwater.covered_partition table lapsed; drop table lapsed",
    ),
    // Away for a moment, and back: what was written to it meanwhile has not passed the stream.
    (
        "begin; alter table scouter.psi_drift detach partition scouter.psi_drift_default;
         alter table scouter.psi_drift attach partition scouter.psi_drift_default default; commit",
        Some("scouter.psi_drift_default"),
        "away for a while",
        "update highwater.covered_partition set attachment = highwater.attachment(partition_oid)",
    ),
    (
        "create table lapsed as table highwater.verified_partition; delete from highwater.verified_partition",
        Some("scouter.old"),
        "not read back",
        "insert into highwater.verified_partition table lapsed; drop table lapsed",
    ),
    (
        // By hand, because the statement rewrites the table, and then its rows are new.
        "update pg_class set relpersistence = 'u' where relname = 'psi_drift_default'",
        Some("scouter.psi_drift_default"),
        "it is unlogged",
        "update pg_class set relpersistence = 'p' where relname = 'psi_drift_default'",
    ),
    // Nobody archives: what comes now must stay.
    (
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select created_at, 's', 'n', '1', 'new', bin_id, 1 from scouter.old where bin_id < 12",
        Some("scouter.old"),
        "12 rows of transaction",
        "delete from scouter.old where feature = 'new'",
    ),
];

/// Everything that must keep the purge from deleting, and what is said of it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_deleted_while_anything_is_in_doubt() {
    let (stage, client, mut sidecar) = started(Shape::Named).await;
    fill(&client, 80, 3).await;
    archived(&client).await;
    quiet(&stage).must(&["verify"]);
    sidecar.kill();
    let before = count(&client, "scouter.psi_drift").await;
    for (doubt, partition, reason, end) in DOUBTS {
        client.batch_execute(doubt).await.unwrap();
        let why = blocked_by(&client, partition).await;
        assert!(why.contains(reason), "{doubt}: {why}");
        // What is not in doubt may go: keep it.
        let held = stage.connect().await;
        held.batch_execute("begin; lock table scouter.older in access share mode; lock table scouter.old in access share mode;
                            select from scouter.psi_drift_default for update").await.unwrap();
        purge(&client).await;
        client.batch_execute("call highwater.purge('scouter.psi_drift', '60 days')").await.unwrap();
        held.batch_execute("rollback").await.unwrap();
        let after = count(&client, "scouter.psi_drift where feature <> 'new'").await;
        assert_eq!(after, before, "{doubt}");
        let (action, _, logged) = logged(&client, partition).await;
        assert!(action == "blocked" && logged.contains(reason), "{doubt}: {action} {logged}");
        client.batch_execute(end).await.unwrap();
    }
    let text = quiet(&stage).output(&["purge", "--dry-run"]);
    assert!(text.status.code() == Some(0), "{}", String::from_utf8_lossy(&text.stdout));
    purge(&client).await;
    assert_eq!(count(&client, "scouter.psi_drift").await, 0, "without a doubt, all goes");
}

/// A role that does not own the tables, one without rights, and one that a policy hides rows from.
#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_role_deletes_nothing() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    quiet(&stage).must(&["verify"]);
    let role = format!("{}_reader", stage.name);
    client
        .batch_execute(&format!(
            "create role {role}; grant usage on schema highwater, scouter to {role};
             grant select, insert, update, delete on all tables in schema highwater to {role};
             grant select on all tables in schema scouter to {role};
             create policy partly on scouter.old using (bin_id > 1000); alter table scouter.old enable row level security;"
        ))
        .await
        .unwrap();
    let other = stage.connect().await;
    other.batch_execute(&format!("set role {role}")).await.unwrap();
    purge(&other).await;
    let why = logged(&client, Some("scouter.older")).await.2;
    assert!(why.contains(&format!("role {role} does not own it")), "{why}");
    // What is explained to it is what the owner's purge will find.
    let why = blocked_by(&other, Some("scouter.older")).await;
    assert_eq!(why, "");
    assert!(exists(&client, "scouter.older").await && exists(&client, "scouter.old").await);

    // The owner, but under a policy that hides every row.
    other
        .batch_execute(&format!(
            "reset role; alter table scouter.old force row level security; grant create on schema scouter to {role};
             alter table scouter.psi_drift owner to {role}; alter table scouter.old owner to {role}; set role {role}"
        ))
        .await
        .unwrap();
    purge(&other).await;
    let (action, _, why) = logged(&client, Some("scouter.old")).await;
    assert!(action == "blocked" && why.contains("policy"), "{action} {why}");
    let why = blocked_by(&other, Some("scouter.old")).await;
    assert!(why.contains("policy"), "{why}");
    assert!(exists(&client, "scouter.old").await);
    // The owner, who may not look.
    client
        .batch_execute(&format!(
            "alter table scouter.older owner to {role}; revoke select on scouter.older from {role}"
        ))
        .await
        .unwrap();
    let why = blocked_by(&other, Some("scouter.older")).await;
    assert!(why.contains("may not read it"), "{why}");
    purge(&other).await;
    assert!(exists(&client, "scouter.older").await);
    // The owner of all of it, which is no superuser.
    client.batch_execute(&format!("grant select on scouter.older to {role}")).await.unwrap();
    purge(&other).await;
    assert!(!exists(&client, "scouter.older").await, "{:?}", logged(&client, Some("scouter.older")).await);
    client
        .batch_execute(&format!(
            "reassign owned by {role} to postgres; drop owned by {role}; drop role {role}"
        ))
        .await
        .unwrap();
}

/// A transaction's isolation that hides what was committed before our lock must not be used.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_any_isolation_may_purge() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    quiet(&stage).must(&["verify"]);
    let client = {
        client.batch_execute("set default_transaction_isolation = 'serializable'").await.unwrap();
        client
    };
    let error = client
        .query(
            "select highwater.purge_drop('scouter.psi_drift'::regclass, 'scouter.old'::regclass, now())",
            &[],
        )
        .await
        .unwrap_err();
    assert!(format!("{error:?}").contains("read committed"), "{error:?}");
    purge(&client).await;
    assert!(!exists(&client, "scouter.old").await);
}

/// Plain tables, and whatever is not a range of time, lose their rows one by one.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_plain_tables_are_deleted_in_batches() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "create table plain (like scouter.psi_drift including defaults); drop table scouter.psi_drift;
             alter table plain set schema scouter; alter table scouter.plain rename to psi_drift;",
        )
        .await
        .unwrap();
    shadow::create(&client, stage.shape).await;
    client
        .batch_execute(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             select now() - interval '60 days' + (n - 20000) * interval '1 minute', 's', 'n', '1', 'f', n, n from generate_series(1, 23000) n",
        )
        .await
        .unwrap();
    quiet(&stage).must(&["setup"]);
    let _sidecar = quiet(&stage).start();
    archived(&client).await;
    purge(&client).await;
    let (action, rows, _) = logged(&client, Some("scouter.psi_drift")).await;
    assert!(
        action == "deleted" && rows.is_some_and(|rows| (20_000..20_010).contains(&rows)),
        "{action} {rows:?}"
    );
    let left = count(&client, "scouter.psi_drift").await;
    assert_eq!(left, 23_000 - rows.unwrap());
    shadow::assert_archived(&client, &stage.storage(), stage.shape).await;
}

/// A partition that pg_partman, or a person, has detached and kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_detached_partition_is_verified_and_dropped() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    client
        .batch_execute(
            "alter table scouter.psi_drift detach partition scouter.old; grant select on scouter.old to highwater;
             create table scouter.psi_drift_p2020_01_01 (like scouter.psi_drift including defaults);
             insert into scouter.psi_drift_p2020_01_01 (created_at, space, name, version, feature, bin_id, bin_count)
             values ('2020-01-01', 's', 'n', '1', 'f', 1, 1)",
        )
        .await
        .unwrap();
    let why = blocked_by(&client, Some("scouter.old")).await;
    assert!(why.contains("not read back"), "{why}");
    let why = blocked_by(&client, Some("scouter.psi_drift_p2020_01_01")).await;
    assert!(why.contains("attach it again"), "{why}");
    quiet(&stage).must(&["verify"]);
    // Written to it directly, and so never streamed: it must not be dropped.
    client
        .batch_execute(
            "insert into scouter.old (created_at, space, name, version, feature, bin_id, bin_count, updated_at)
             select min(created_at), 's', 'n', '1', 'stray', 1, 1, now() from scouter.old",
        )
        .await
        .unwrap();
    archived(&client).await;
    purge(&client).await;
    assert!(exists(&client, "scouter.old").await);
    let (report, code) = (quiet(&stage).output(&["verify", "--format", "json"]), 1);
    assert_eq!(report.status.code(), Some(code), "the stray row is missing");
    quiet(&stage).output(&["verify", "--repair"]);
    quiet(&stage).must(&["verify"]);
    purge(&client).await;
    assert!(!exists(&client, "scouter.old").await);
    assert!(exists(&client, "scouter.psi_drift_p2020_01_01").await);
    assert_eq!(count(&client, "shadow.psi_drift").await, 1000);
}

/// Rows of other tables that refer to it keep a partition; a dry run says so, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_foreign_keys_refer_to_stays() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    client
        .batch_execute(
            "create table public.note as
                 select created_at, name, space, version, feature, bin_id from scouter.old limit 1;
             alter table public.note add constraint noted foreign key (created_at, name, space, version, feature, bin_id)
                 references scouter.psi_drift (created_at, name, space, version, feature, bin_id)",
        )
        .await
        .unwrap();
    archived(&client).await;
    quiet(&stage).must(&["verify"]);
    let dry_run = String::from_utf8(quiet(&stage).output(&["purge", "--dry-run"]).stdout).unwrap();
    assert!(dry_run.contains("rows of public.note refer to it (foreign key noted)"), "{dry_run}");
    purge(&client).await;
    assert!(exists(&client, "scouter.old").await && !exists(&client, "scouter.older").await);
    client.batch_execute("delete from public.note").await.unwrap();
    purge(&client).await;
    assert!(!exists(&client, "scouter.old").await, "{:?}", logged(&client, Some("scouter.old")).await);
}

/// pg_cron runs the purge; the statement that setup prints for a pg_cron in another database is run as it is.
#[tokio::test(flavor = "multi_thread")]
async fn pg_cron_purges() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    shadow::create(&client, stage.shape).await;
    old_day(&client, "old", 70).await;
    fill(&client, 70, 500).await;
    let output = quiet(&stage).output(&["setup", "--schedule-purge", "* * * * *"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("TODO"), "{text}");
    let statement =
        text.split("superuser: ").nth(1).and_then(|rest| rest.split_once(';')).unwrap().0.to_owned();
    let postgres = stage.cluster().connect("postgres").await;
    postgres.batch_execute("create extension pg_cron").await.unwrap();
    postgres.batch_execute(&statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));

    // The sidecar verifies by itself, pg_cron drops: nobody else does anything.
    let _sidecar = stage.launch().start();
    until("pg_cron has dropped the partition", Duration::from_secs(150), async || {
        (!exists(&client, "scouter.old").await).then_some(())
    })
    .await;
    shadow::assert_archived(&client, &stage.storage(), stage.shape).await;

    // In its own database, setup schedules it, once.
    postgres.batch_execute("drop extension pg_cron").await.unwrap();
    stage.cluster().conf(&[("cron.database_name", &stage.name)]);
    stage.cluster().restart(Stop::Fast);
    let client = stage.connect().await;
    client.batch_execute("create extension pg_cron").await.unwrap();
    let text = quiet(&stage).must(&["setup", "--schedule-purge"]);
    assert!(text.contains("did   scheduled the purge"), "{text}");
    client.batch_execute("select cron.alter_job(jobid, active := false) from cron.job").await.unwrap();
    let text = quiet(&stage).must(&["setup", "--schedule-purge", "*/5 * * * *"]);
    assert!(text.contains("did   scheduled the purge"), "{text}");
    let text = quiet(&stage).must(&["setup", "--schedule-purge", "*/5 * * * *"]);
    assert!(text.contains("left  pg_cron's job highwater-purge"), "{text}");
    let sql = "select count(*), bool_and(active), min(schedule) from cron.job";
    let job = client.query_one(sql, &[]).await.unwrap();
    assert_eq!((job.get(0), job.get(1), job.get(2)), (1_i64, true, "*/5 * * * *"));
    let wrong = quiet(&stage).output(&["setup", "--schedule-purge", "sometimes"]);
    assert!(!wrong.status.success() && String::from_utf8_lossy(&wrong.stderr).contains("sometimes"));
}

/// pg_partman, with the retention that a server has set before.
#[tokio::test(flavor = "multi_thread")]
async fn pg_partman_drops_nothing_after_setup() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    old_day(&client, "psi_drift_p2020_01_01", 2500).await;
    let text = quiet(&stage).must(&["setup"]);
    assert!(text.contains("turned off pg_partman's retention (60 days) of scouter.psi_drift"), "{text}");
    let partitions = count(&client, "pg_inherits").await;
    client.batch_execute("call partman.run_maintenance_proc()").await.unwrap();
    assert!(exists(&client, "scouter.psi_drift_p2020_01_01").await);
    assert!(count(&client, "pg_inherits").await >= partitions);
    let text = quiet(&stage).must(&["setup"]);
    assert!(!text.contains("pg_partman"), "once is enough: {text}");
    let retention = client
        .query_one("select min(retention::text), count(*) from highwater.retention", &[])
        .await
        .unwrap();
    assert_eq!((retention.get(0), retention.get(1)), ("60 days", 3_i64));
    // A retention of one's own stays.
    client
        .batch_execute("update highwater.retention set retention = '90 days' where source_table like '%psi%'")
        .await
        .unwrap();
    let text = quiet(&stage).must(&["setup"]);
    assert!(text.contains("left  retention of scouter.psi_drift: 90 days"), "{text}");
}

/// `--watermarks` says what is purgeable, and what is blocked.
#[tokio::test(flavor = "multi_thread")]
async fn watermarks_show_what_is_purgeable() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    let psi = |document: &Value| {
        let tables = document["tables"].as_array().unwrap();
        tables.iter().find(|table| table["kind"] == "psi").unwrap()["purge"].clone()
    };
    let before = psi(&quiet(&stage).watermarks());
    assert_eq!(
        (&before["deletable_partitions"], &before["blocked_partitions"]),
        (&0.into(), &2.into()),
        "{before}"
    );
    assert!(before["blocked_by"].as_str().unwrap().contains("not read back"), "{before}");
    assert_eq!(before["retention"], "60 days");
    quiet(&stage).must(&["verify"]);
    let after = psi(&quiet(&stage).watermarks());
    assert_eq!(
        (&after["deletable_partitions"], &after["blocked_partitions"]),
        (&2.into(), &0.into()),
        "{after}"
    );
    assert!(after["deletable_bytes"].as_i64().unwrap() > 0 && after["blocked_by"].is_null());
    let text = quiet(&stage).must(&["--watermarks"]);
    assert!(text.contains("RETENTION") && text.contains("60 days"), "{text}");
    purge(&client).await;
    let after = psi(&quiet(&stage).watermarks());
    assert!(after["deletable_partitions"] == 0 && after["purged_at"].is_string(), "{after}");
}

/// The 64-bit id that a row's 32-bit xmin stands for, against the arithmetic of wide numbers.
#[tokio::test(flavor = "multi_thread")]
async fn ids_are_widened_to_the_youngest_that_they_may_be() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    quiet(&stage).must(&["setup"]);
    let mut cases: Vec<(i64, i64)> = Vec::new();
    let mut rng = rand::rng();
    for epoch in [0_i64, 1, 2, 7, 1 << 20] {
        for near in [0, 3, 1 << 28, 1 << 31, (1 << 31) + 3, (1 << 32) - 1] {
            let newest = (epoch << 32) + near;
            let offsets = [-2, -1, 0, 1, 2, 3].map(|offset| newest + offset);
            let random: [i64; 4] = std::array::from_fn(|_| rng.random_range(0..1_i64 << 32));
            cases.extend(offsets.iter().chain(&random).map(|id| (id & 0xFFFF_FFFF, newest)));
        }
    }
    let (ids, newest): (Vec<i64>, Vec<i64>) = cases.iter().copied().unzip();
    let sql = "select highwater.widened(id::text::xid, newest) from unnest($1::bigint[], $2::bigint[]) with ordinality as t (id, newest, n) order by n";
    let rows = client.query(sql, &[&ids, &newest]).await.unwrap();
    assert_eq!(rows.len(), cases.len());
    for ((id, newest), row) in cases.into_iter().zip(rows) {
        // The greatest number up to `newest` with these lower 32 bits; if there is none, the id is of the future.
        let candidate = (0..=newest >> 32).rev().map(|epoch| (epoch << 32) + id).find(|wide| *wide <= newest);
        assert_eq!(row.get::<_, i64>(0), candidate.unwrap_or(newest), "{id} with newest {newest}");
    }
}

/// Around an epoch, and with rows older than 2^31 transactions: nothing that is not archived goes, everything else does.
#[tokio::test(flavor = "multi_thread")]
async fn ids_past_a_wrap_around_are_told_apart() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    shadow::create(&client, stage.shape).await;
    for (name, days) in [("before", 70), ("after", 71), ("mixed", 72)] {
        old_day(&client, name, days).await;
    }
    fill(&client, 70, 100).await;
    fill(&client, 72, 50).await;
    client.batch_execute("vacuum freeze").await.unwrap();
    // Shortly before the third epoch.
    let (client, cluster) = (client, stage.cluster());
    drop(client);
    cluster.reset_ids(2, u32::MAX - 200);
    let client = stage.connect().await;
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    // Well past it: in the first thousand ids after such a wrap-around, PostgreSQL 15.18 prunes rows that an exported
    // snapshot should still see.
    let spend = "do $$ begin for n in 1..2500 loop perform pg_current_xact_id(); commit; end loop; end $$";
    client.batch_execute(spend).await.unwrap();
    let epoch = client.query_one("select pg_current_xact_id()::text::bigint >> 32", &[]).await.unwrap();
    assert_eq!(epoch.get::<_, i64>(0), 3, "the ids have wrapped around");
    fill(&client, 71, 100).await;
    archived(&client).await;
    quiet(&stage).must(&["verify"]);
    sidecar.kill();
    // Not archived: after the wrap-around, their ids are small numbers.
    client
        .batch_execute(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             select created_at, 's', 'n', '1', 'new', bin_id, 1 from scouter.mixed limit 1",
        )
        .await
        .unwrap();
    purge(&client).await;
    assert!(!exists(&client, "scouter.before").await, "{:?}", logged(&client, Some("scouter.before")).await);
    assert!(!exists(&client, "scouter.after").await, "{:?}", logged(&client, Some("scouter.after")).await);
    assert!(exists(&client, "scouter.mixed").await);
    let why = blocked_by(&client, Some("scouter.mixed")).await;
    assert!(why.starts_with("1 row of transaction 12884"), "{why}");
    let _sidecar = quiet(&stage).start();
    archived(&client).await;
    quiet(&stage).must(&["verify"]);
    purge(&client).await;
    assert!(!exists(&client, "scouter.mixed").await);
    shadow::assert_archived(&client, &stage.storage(), stage.shape).await;
}

/// Sub-partitions: what came while the partition above them was away did not pass the stream. Nor did rows of tables that
/// only inherit.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_did_not_pass_the_stream_stay_until_they_are_archived() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "create table scouter.year partition of scouter.psi_drift for values from ('2020-01-01') to ('2021-01-01')
                 partition by list (space);
             create table scouter.year_s partition of scouter.year for values in ('s');
             create table plain (like scouter.custom_drift including defaults); drop table scouter.custom_drift;
             alter table plain set schema scouter; alter table scouter.plain rename to custom_drift;",
        )
        .await
        .unwrap();
    let rows = |into: &str, feature: &str| {
        format!(
            "insert into {into} (created_at, space, name, version, feature, bin_id, bin_count, updated_at)
             select '2020-05-05'::timestamptz + n * interval '1 minute', 's', 'n', '1', '{feature}', n, n, now()
             from generate_series(1, 10) n;"
        )
    };
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    client.batch_execute(&rows("scouter.psi_drift", "streamed")).await.unwrap();
    client
        .batch_execute(
            "create table scouter.heir () inherits (scouter.custom_drift);
             insert into scouter.heir (created_at, space, name, version, metric, value) values ('2020-01-01', 's', 'n', '1', 'm', 1)",
        )
        .await
        .unwrap();
    archived(&client).await;
    // Before the sidecar looks again.
    sidecar.signal("STOP");
    client
        .batch_execute(&format!(
            "begin; alter table scouter.psi_drift detach partition scouter.year; {}
             alter table scouter.psi_drift attach partition scouter.year for values from ('2020-01-01') to ('2021-01-01'); commit;
             update highwater.watermark set archived_before = pg_snapshot_xmin(pg_current_snapshot())",
            rows("scouter.year", "away")
        ))
        .await
        .unwrap();
    purge(&client).await;
    assert_eq!(
        count(&client, "scouter.psi_drift").await,
        20,
        "{:?}",
        logged(&client, Some("scouter.year_s")).await
    );
    assert_eq!(count(&client, "scouter.heir").await, 1);
    sidecar.signal("CONT");
    until("they are archived, and purged", DEADLINE, async || {
        client
            .batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key")
            .await
            .unwrap();
        purge(&client).await;
        (count(&client, "scouter.psi_drift").await == 0).then_some(())
    })
    .await;
    let archived = crate::support::archive::archived_rows(&stage.storage().join("psi"));
    assert_eq!(archived.len(), 20, "{archived:?}");
    assert_eq!(count(&client, "scouter.heir").await, 1, "it is not a partition");
    sidecar.kill();
}

/// What others need or hold stays whole: it is not even detached. And whoever holds what is not purged keeps nobody waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_others_use_stays_attached() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    old_day(&client, "young", 3).await;
    quiet(&stage).must(&["verify"]);
    let attached =
        async || count(&client, "pg_inherits where inhrelid = to_regclass('scouter.old')").await == 1;

    client.batch_execute("create view scouter.of_old as select * from scouter.old").await.unwrap();
    assert!(blocked_by(&client, Some("scouter.old")).await.contains("view scouter.of_old depends on it"));
    purge(&client).await;
    assert!(attached().await && !exists(&client, "scouter.older").await);
    client.batch_execute("drop view scouter.of_old").await.unwrap();

    let other = stage.connect().await;
    for held in ["scouter.psi_drift_default", "scouter.psi_drift"] {
        other.batch_execute(&format!("begin; select from {held}")).await.unwrap();
        purge(&client).await;
        let (action, _, why) = logged(&client, Some("scouter.old")).await;
        assert!(action == "blocked" && why.contains("kept locked by session"), "{held}: {action} {why}");
        assert!(attached().await, "{held}");
        other.batch_execute("commit").await.unwrap();
    }

    other.batch_execute("begin; lock table scouter.young in access exclusive mode").await.unwrap();
    client.batch_execute("set statement_timeout = '30s'").await.unwrap();
    quiet(&stage).must(&["--watermarks"]);
    purge(&client).await;
    assert!(!exists(&client, "scouter.old").await, "{:?}", logged(&client, Some("scouter.old")).await);
    other.batch_execute("commit").await.unwrap();
}

/// What `verify` has found holds the purge back, also where rows are deleted one by one.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_archive_was_found_to_lack_stay() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    fill(&client, 80, 3).await;
    archived(&client).await;
    // The stream does not follow updates.
    client
        .batch_execute("update scouter.psi_drift_default set bin_count = 1000 where bin_id = 1")
        .await
        .unwrap();
    archived(&client).await;
    let found = quiet(&stage).output(&["verify"]);
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(found.status.code() == Some(1) && text.contains("lacks 1 row"), "{text}");
    purge(&client).await;
    assert_eq!(count(&client, "scouter.psi_drift_default").await, 3);
    let (action, _, why) = logged(&client, Some("scouter.psi_drift_default")).await;
    assert!(action == "blocked" && why.contains("--repair"), "{action} {why}");
    // A look at another time proves nothing.
    quiet(&stage).output(&["verify", "--from", "2020-01-01", "--to", "2020-01-02"]);
    purge(&client).await;
    assert_eq!(count(&client, "scouter.psi_drift_default").await, 3);
    quiet(&stage).output(&["verify", "--repair-changed"]);
    purge(&client).await;
    assert_eq!(
        count(&client, "scouter.psi_drift_default").await,
        0,
        "{:?}",
        logged(&client, Some("scouter.psi_drift_default")).await
    );
}

/// Rows that are written into a partition while a `detach ... concurrently` of it waits are not streamed.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_partition_whose_detach_is_pending_stay() {
    let (stage, client, _sidecar) = started(Shape::Named).await;
    client
        .batch_execute(
            "alter table scouter.psi_drift detach partition scouter.psi_drift_default; drop table scouter.psi_drift_default",
        )
        .await
        .unwrap();
    archived(&client).await;
    let (reader, other) = (stage.connect().await, stage.connect().await);
    reader.batch_execute("begin; select from scouter.psi_drift").await.unwrap();
    other.batch_execute("set statement_timeout = '1s'").await.unwrap();
    let pending =
        other.batch_execute("alter table scouter.psi_drift detach partition scouter.old concurrently").await;
    assert!(pending.is_err());
    assert_eq!(count(&client, "pg_inherits where inhdetachpending").await, 1);
    reader.batch_execute("commit").await.unwrap();
    let row = "insert into scouter.old (created_at, space, name, version, feature, bin_id, bin_count)
               select created_at, space, name, version, 'unseen', bin_id, bin_count from scouter.old limit 1";
    client.batch_execute(row).await.unwrap();
    until("it is found to be detached", DEADLINE, async || {
        let from =
            "highwater.covered_partition where partition_name = 'scouter.old' and detached_at is not null";
        (count(&client, from).await == 1).then_some(())
    })
    .await;
    archived(&client).await;
    purge(&client).await;
    assert_eq!(count(&client, "scouter.old").await, 501);
    client
        .batch_execute("alter table scouter.psi_drift detach partition scouter.old finalize")
        .await
        .unwrap();
    archived(&client).await;
    quiet(&stage).output(&["verify"]);
    purge(&client).await;
    assert_eq!(count(&client, "scouter.old").await, 501, "{:?}", logged(&client, Some("scouter.old")).await);
}
