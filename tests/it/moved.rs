//! Rows that pg_partman moves out of the default partition, by delete and insert, come by the stream once more. They don't stay
//! double, a row that is twice in Postgres stays twice, and nothing is lost.

use std::time::Duration;

use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::reader::{read_by_python, rendered_by_postgres};
use crate::support::archive::{archived_rows, compare, compare_rows};
use crate::support::schema::{KINDS, Shape};
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::{pause, until};

const DEADLINE: Duration = Duration::from_secs(90);

/// Rows of a day for which there is no partition: 12 in each table, and in `spc_drift` one that is there twice.
async fn fill(client: &Client, day: i32) {
    let time = format!(
        "date_trunc('day', now(), 'UTC') - {day} * interval '1 day' + n * interval '1 hour', 's', 'n', '1'"
    );
    let sql = format!(
        "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
         select {time}, 'moved ' || n, n / 3.0 from generate_series(1, 12) n;
         insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select {time}, 'moved', n, n from generate_series(1, 12) n;
         insert into scouter.spc_drift (created_at, space, name, version, feature, value)
         select {time}, null, least(n, 11) from generate_series(1, 11) n, generate_series(1, 1 + n / 11)"
    );
    client.batch_execute(&sql).await.unwrap();
}

/// The load: new rows, and late ones. (None for the default partition: pg_partman fails if rows come to what it empties.)
fn write(client: Client) -> JoinHandle<()> {
    tokio::spawn(async move {
        for turn in 0_u64.. {
            let sql = format!(
                "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                 select clock_timestamp() - random() * interval '3 hours', 's', 'busy', '1', '{turn} ' || n, random()
                 from generate_series(1, 20) n;
                 insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                 values (now() - random() * interval '3 days', 's', 'late', '1', '{turn}', 1, 1)"
            );
            client.batch_execute(&sql).await.unwrap();
            // A verification reads all of it, several times.
            pause(20).await;
        }
    })
}

/// Waits until all that is committed now is archived.
async fn archived(stage: &Stage, client: &Client, metric: &str) {
    let target = stage.insert_one(client, metric, None).await;
    stage.acknowledged(client, target, DEADLINE).await;
}

/// Copies that the archive has too many, in each table.
async fn extra(stage: &Stage, client: &Client) -> [u64; 3] {
    let mut extra = [0; 3];
    for (place, kind) in extra.iter_mut().zip(KINDS) {
        *place = compare(client, &stage.storage(), stage.shape, kind).await.extra;
    }
    extra
}

/// Has pg_partman move the rows of a day. How many copies the archive then has too many.
///
/// If the new partition is noticed before the stream has brought its rows, they are compared instead, and none is doubled: then
/// another day is moved.
async fn move_days(stage: &Stage, client: &Client, first: i32) -> [u64; 3] {
    for day in first..first + 6 {
        fill(client, day).await;
        archived(stage, client, &format!("before {day}")).await;
        for kind in KINDS {
            let call = format!(
                "call partman.partition_data_proc('scouter.{}', p_wait := 0, p_quiet := true)",
                kind.table()
            );
            client.batch_execute(&call).await.unwrap();
        }
        // Of the same checkpoint, and so of the same file as the moved rows.
        let late = format!(
            "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
             select date_trunc('day', now(), 'UTC') - {day} * interval '1 day' + interval '90 minutes', 's', 'a', '1', 'late {day}', 1"
        );
        client.batch_execute(&late).await.unwrap();
        archived(stage, client, &format!("after {day}")).await;
        let extra = extra(stage, client).await;
        // What a new partition holds is compared with the archive, once it is noticed.
        let covered = "select count(*) from highwater.watermark w join pg_inherits i on i.inhparent = w.table_oid
                       where w.state <> 'streaming' or not exists (
                           select from highwater.covered_partition p
                           where p.partition_oid = i.inhrelid and p.attachment = highwater.attachment(i.inhrelid))";
        until("every partition is covered", DEADLINE, async || {
            (client.query_one(covered, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
        })
        .await;
        if extra[0] > 0 && extra[2] > 0 {
            // What was to be added is added before the stream goes on; a stop before that would end with 1.
            archived(stage, client, &format!("covered {day}")).await;
            return extra;
        }
    }
    panic!("no row was doubled");
}

/// The report of a verification that could compare every table: at first a new partition may be looked at. And the exit code.
async fn verify(launch: &Launch, flags: &[&str]) -> (Value, i32) {
    let arguments: Vec<&str> = ["verify", "--format", "json"].iter().chain(flags).copied().collect();
    until("every table is compared", DEADLINE, async || {
        let output = launch.output(&arguments);
        let report: Value = serde_json::from_slice(&output.stdout).ok()?;
        let tables = report["tables"].as_array()?;
        let is_compared = tables.iter().all(|table| table["not_compared"].is_null());
        is_compared.then(|| (report.clone(), output.status.code().unwrap()))
    })
    .await
}

/// A number of each table, or the sum of one of its hours'.
fn counts(report: &Value, column: &str) -> Vec<u64> {
    let tables = report["tables"].as_array().unwrap();
    let hours = |table: &Value| {
        let differences = table["differences"].as_array().unwrap();
        differences.iter().map(|hour| hour[column].as_u64().unwrap()).sum()
    };
    tables.iter().map(|table| table[column].as_u64().unwrap_or_else(|| hours(table))).collect()
}

/// What the watermarks say: rows, entities' rows, copies removed; by table.
async fn watermarks(client: &Client) -> Vec<[i64; 3]> {
    let sql =
        "select w.row_count, (select coalesce(sum(e.row_count), 0)::bigint from highwater.entity_watermark e
                                    where e.source_table = w.source_table), w.doubles_removed
               from highwater.watermark w order by w.source_table";
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| [row.get(0), row.get(1), row.get(2)]).collect()
}

/// With the sidecar's own verifications off, so that a test decides about them.
fn quiet(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_VERIFY_HOURS", "none")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_partman_moves_under_load_is_found_and_a_repair_mends_it() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    let writing = write(stage.connect().await);
    let doubled = move_days(&stage, &client, 20).await;

    let (report, code) = verify(&stage.launch(), &[]).await;
    assert_eq!((code, &report["equal"]), (1, &Value::Bool(false)), "{report:#}");
    assert_eq!(counts(&report, "doubles"), doubled, "{report:#}");
    for column in ["missing", "surplus", "doubles_removed"] {
        assert_eq!(counts(&report, column), [0; 3], "{column}: {report:#}");
    }

    // Killed before the entry, and after it, but before the watermark knows of it.
    quiet(&stage).failing("before-removal=return").must_crash(&["verify", "--repair"]);
    assert_eq!(extra(&stage, &client).await, doubled);
    quiet(&stage).failing("after-delta-commit=return").must_crash(&["verify", "--repair"]);
    assert_eq!(extra(&stage, &client).await, [0, doubled[1], doubled[2]]);
    sidecar.kill();
    sidecar = quiet(&stage).start();
    stage.streaming().await;
    sidecar.says("archiving slot", DEADLINE).await;
    let custom = watermarks(&client).await[0];
    assert_eq!((custom[0], custom[2]), (custom[1], doubled[0].cast_signed()), "{custom:?}");

    let text = String::from_utf8(stage.launch().output(&["verify", "--repair"]).stdout).unwrap();
    assert!(text.contains(&format!("; {} surplus copies removed", doubled[2])), "{text}");
    assert!(
        text.contains("copies too many of rows that Postgres has") && text.contains("verify again"),
        "{text}"
    );
    let (report, code) = verify(&stage.launch(), &[]).await;
    assert_eq!((code, &report["equal"]), (0, &Value::Bool(true)), "{report:#}");
    writing.abort();
    let _ = writing.await;
    stage.assert_archived(DEADLINE).await;
    for kind in KINDS {
        let source = rendered_by_postgres(&stage, kind).await;
        let read = read_by_python(&stage.storage().join(kind.folder()), "deltalake");
        let difference = compare_rows(&source, &read);
        assert!(difference.is_none(), "{}: {difference}", kind.table());
    }

    // Without a restart, the counts are right.
    let said = watermarks(&client).await;
    let shown = quiet(&stage).watermarks();
    for ((place, kind), [rows, of_entities, removed]) in KINDS.iter().enumerate().zip(said) {
        let sql = format!("select count(*) from scouter.{}", kind.table());
        let source: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert_eq!(
            (rows, of_entities, removed),
            (source, source, doubled[place].cast_signed()),
            "{}",
            kind.table()
        );
        assert_eq!(shown["tables"][place]["doubles_removed"], removed);
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sidecar_removes_them_by_itself_and_the_partition_is_purged() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    let doubled = move_days(&stage, &client, 70).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());

    for step in ["before-removal", "after-removal"] {
        let mut failing = stage.launch().failing(&format!("{step}=return")).start();
        let status = failing.wait(DEADLINE).await;
        assert!(status.code().is_none(), "{step}: ended with {status}\n{}", failing.log());
    }
    let mut sidecar = stage.launch().start();
    sidecar.says("read back from the archive: equal", DEADLINE).await;
    // Nothing has to be accepted.
    let gone = "select count(*) from scouter.custom_drift where created_at < now() - interval '60 days'";
    until("the partitions are dropped", DEADLINE, async || {
        client.batch_execute("call highwater.purge_all()").await.unwrap();
        (client.query_one(gone, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let sql = "select count(*) filter (where action = 'dropped' and row_count = 13) from highwater.purge_log
               where source_table = 'scouter.custom_drift'";
    assert!(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0);
    let mut rows = archived_rows(&stage.storage().join("custom"));
    rows.retain(|row| row.contains("\"moved "));
    let all = rows.len();
    rows.sort_unstable();
    rows.dedup();
    assert_eq!((rows.len(), all % 12), (all, 0), "each is there once");
    until("what was removed is counted", DEADLINE, async || {
        let said = watermarks(&client).await;
        let is_counted =
            |(said, doubled): (&[i64; 3], u64)| said[2] == doubled.cast_signed() && said[0] == said[1];
        said.iter().zip(doubled).all(is_counted).then_some(())
    })
    .await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// A row that went to the quarantine, because its entity was not there yet, is archived when it is moved. It may stay in both.
#[tokio::test(flavor = "multi_thread")]
async fn a_quarantined_row_that_is_moved_is_no_surplus() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    let insert = "insert into scouter.psi_drift (created_at, entity_id, feature, bin_id, bin_count)
                  values (date_trunc('hour', now()), 999, 'f', 1, 1)";
    client.batch_execute(insert).await.unwrap();
    sidecar.says("went to its quarantine table", DEADLINE).await;
    let entity =
        "insert into scouter.drift_entities (id, space, name, version) values (999, 'late', 'model', '1')";
    client.batch_execute(entity).await.unwrap();
    let moved = "begin; create temp table kept on commit drop as table scouter.psi_drift; delete from scouter.psi_drift;
                 insert into scouter.psi_drift table kept; commit";
    for (turn, doubles) in [0, 1].into_iter().enumerate() {
        client.batch_execute(moved).await.unwrap();
        archived(&stage, &client, &format!("turn {turn}")).await;
        let (report, code) = verify(&stage.launch(), &["--table", "psi_drift"]).await;
        assert_eq!(counts(&report, "doubles"), [doubles], "{report:#}");
        assert_eq!(
            (code, counts(&report, "surplus"), counts(&report, "missing")),
            (i32::from(doubles > 0), vec![0], vec![0]),
            "{report:#}"
        );
    }
    verify(&stage.launch(), &["--repair"]).await;
    assert_eq!(verify(&stage.launch(), &[]).await.1, 0);
    assert_eq!(archived_rows(&stage.storage().join("psi")).len(), 1);
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}
