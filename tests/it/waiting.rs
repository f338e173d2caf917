//! What is said while something waits for others, and what a stop leaves.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

async fn stage() -> Stage {
    Stage::private(Shape::Named, &[("fsync", "off"), ("max_prepared_transactions", "5")]).await
}

async fn number(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn setup_says_whom_it_waits_for_and_leaves_nothing_behind() {
    let stage = stage().await;
    let client = stage.connect().await;
    let forgotten = stage.connect().await;
    let insert = "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                  values (now(), 's', 'n', '1', 'forgotten', 1)";
    forgotten.batch_execute(&format!("begin; {insert}")).await.unwrap();
    let pid = number(&forgotten, "select pg_backend_pid()::bigint").await;
    let slots = "select count(*) from pg_replication_slots";
    stage.launch().prepare();
    client.batch_execute("grant pg_read_all_stats to highwater").await.unwrap();
    for signal in ["TERM", "KILL"] {
        let mut setup = stage.launch().start_command(&["setup"]);
        setup.says(&format!("process {pid} of postgres"), DEADLINE).await;
        assert!(setup.log().contains("pg_backend_pid"), "its query is shown: {}", setup.log());
        let second = stage.launch().start_command(&["setup"]);
        second.says("waiting for another setup", DEADLINE).await;
        drop(second);
        // What is half-made is told as that.
        let marks = stage.launch().output(&["--watermarks"]);
        let errors = String::from_utf8_lossy(&marks.stderr).into_owned();
        assert!(errors.contains("still making it") && errors.contains("pg_terminate_backend"), "{errors}");
        setup.signal(signal);
        assert!(!setup.wait(DEADLINE).await.success());
        until("the half-made slot is gone", DEADLINE, async || {
            (number(&client, slots).await == 0).then_some(())
        })
        .await;
    }
    forgotten.batch_execute("rollback; begin").await.unwrap();
    forgotten.batch_execute(&format!("{insert}; prepare transaction 'of nobody'")).await.unwrap();
    let mut setup = stage.launch().start_command(&["setup"]);
    setup.says("'of nobody'", DEADLINE).await;
    client.batch_execute("commit prepared 'of nobody'").await.unwrap();
    assert!(setup.wait(DEADLINE).await.success(), "{}", setup.log());
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_acknowledges_all_that_the_server_has() {
    let stage = stage().await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "10min");
    launch.must(&["setup"]);
    let client = stage.connect().await;
    client.batch_execute("create extension pg_walinspect; create table public.other (n int)").await.unwrap();
    for turn in 0..3 {
        let mut sidecar = launch.start();
        sidecar.says("archiving slot", DEADLINE).await;
        if turn > 0 {
            let target = stage.insert_one(&client, &format!("turn {turn}"), Some(1.0)).await;
            client.batch_execute("insert into public.other select generate_series(1, 1000)").await.unwrap();
            stage.sent(&client, target).await;
        }
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
        // As pg_upgrade has it: nothing may be left that could be decoded.
        let left = "select count(*) from
                    (select confirmed_flush_lsn as lsn from pg_replication_slots where confirmed_flush_lsn < pg_current_wal_lsn() offset 0) s,
                    lateral pg_get_wal_records_info(s.lsn, pg_current_wal_lsn()) r
                    where r.resource_manager in ('Transaction', 'Heap', 'Heap2', 'LogicalMessage') and r.record_type not like 'PRUNE%'";
        assert_eq!(number(&client, left).await, 0, "turn {turn}: {}", sidecar.log());
    }
    stage.assert_same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_storage_fails_is_no_success() {
    let stage = stage().await;
    stage.launch().must(&["setup"]);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = nobody.local_addr().unwrap().port();
    drop(nobody);
    let mut sidecar = stage
        .launch()
        .with("SCOUTER_STORAGE_URI", "s3://bucket")
        .with("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{port}"))
        .with("AWS_ALLOW_HTTP", "true")
        .with("AWS_REGION", "us-east-1")
        .with("AWS_ACCESS_KEY_ID", "key")
        .with("AWS_SECRET_ACCESS_KEY", "secret")
        .start();
    sidecar.says("not archiving; rows wait in Postgres", Duration::from_secs(240)).await;
    assert_eq!(sidecar.terminate(DEADLINE).await.code(), Some(1), "{}", sidecar.log());
}
