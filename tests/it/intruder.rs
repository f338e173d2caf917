//! What somebody sends into the database who may log in, and no more: it neither stops the archive nor takes its memory.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::archive::{archived_rows, files};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(120);

/// Bytes of what is too long.
const LONG: u32 = 150_000_000;

/// Bytes of a value that is too long.
const LONG_VALUE: u32 = 50_000_000;

/// What the sidecar may take: much less than with one of these in its memory, and in its buffers.
const RESIDENT_MAX: u64 = 200 << 20;

async fn intruder(stage: &Stage) -> Client {
    let name = format!("mallory_{}", stage.name);
    stage.connect().await.batch_execute(&format!("create role {name} login")).await.unwrap();
    let client = stage.connect().await;
    client.batch_execute(&format!("set session authorization {name}")).await.unwrap();
    client
}

async fn forget_intruder(stage: &Stage, client: Client) {
    drop(client);
    let name = format!("mallory_{}", stage.name);
    stage.cluster().connect("postgres").await.batch_execute(&format!("drop role {name}")).await.unwrap();
}

fn small(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_MEMORY", "32MiB")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_somebody_else_is_not_held() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = small(&stage);
    launch.must(&["setup"]);
    let client = stage.connect().await;
    let mallory = intruder(&stage).await;
    stage.insert_one(&client, "before", Some(1.0)).await;
    for is_transactional in [true, false] {
        let sql = format!("select pg_logical_emit_message({is_transactional}, 'x', repeat('x', {LONG}))");
        mallory.batch_execute(&sql).await.unwrap();
    }
    let mut sidecar = launch.start();
    stage.assert_archived(DEADLINE).await;
    let most = sidecar.resident_bytes_max();
    eprintln!("most resident memory: {} MB", most >> 20);
    assert!(most < RESIDENT_MAX, "{most} bytes");
    // One that is on its way while the sidecar stops is not waited for.
    mallory
        .batch_execute(&format!("select pg_logical_emit_message(true, 'x', repeat('x', {LONG}))"))
        .await
        .unwrap();
    assert!(sidecar.terminate(Duration::from_secs(30)).await.success(), "{}", sidecar.log());
    forget_intruder(&stage, mallory).await;
}

/// `highwater verify` as JSON: whether all is equal, and what it says of `custom_drift`.
fn verified(launch: &Launch) -> (bool, serde_json::Value) {
    let output = launch.output(&["verify", "--format", "json"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    let tables = report["tables"].as_array().unwrap();
    let custom = tables.iter().find(|table| table["kind"] == "custom").unwrap().clone();
    (report["equal"] == true, custom)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_too_long_is_in_the_quarantine_by_name_and_the_others_are_archived() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = small(&stage).with("HIGHWATER_VERIFY_HOURS", "none");
    let client = stage.connect().await;
    let free = "do $$ declare name text; begin
                    for name in select conname from pg_constraint where conrelid = 'scouter.custom_drift'::regclass and contype = 'u'
                    loop execute format('alter table scouter.custom_drift drop constraint %I', name); end loop; end $$;
                alter table scouter.custom_drift drop column if exists updated_at, add column updated_at text";
    client.batch_execute(free).await.unwrap();
    let long_row = async |metric: &str| {
        let sql = format!(
            "insert into scouter.custom_drift (created_at, space, name, version, metric, value, updated_at)
             values (now() - interval '1 hour', 'tests', 'long', '1', {metric}, 7, {{}})"
        );
        // A column that is not archived may be of any length.
        for note in ["null", &format!("repeat('n', {LONG_VALUE})")] {
            client.batch_execute(&sql.replace("{}", note)).await.unwrap();
        }
    };
    // By the first copy, then by the stream.
    long_row(&format!("repeat('x', {LONG_VALUE})")).await;
    long_row("'short'").await;
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    sidecar.says("archiving slot", DEADLINE).await;
    long_row(&format!("repeat('y', {LONG_VALUE})")).await;
    stage.insert_one(&client, "after", Some(1.0)).await;
    let quarantine = stage.storage().join("quarantine");
    until("the long rows are in the quarantine", DEADLINE, async || {
        (archived_rows(&quarantine).len() == 4).then_some(())
    })
    .await;
    for row in archived_rows(&quarantine) {
        assert!(row.contains(&format!("metric has {LONG_VALUE} bytes")), "{row}");
        assert!(row.contains("scouter.custom_drift") && row.contains(r#"\"name\":\"long\""#), "{row}");
        assert!(
            row.contains(&format!("... (cut; {LONG_VALUE} bytes in all)")) && row.len() < 10_000,
            "{row}"
        );
    }
    let custom = || archived_rows(&stage.storage().join("custom"));
    until("the rows around them are archived", DEADLINE, async || (custom().len() == 3).then_some(())).await;
    let most = sidecar.resident_bytes_max();
    eprintln!("most resident memory: {} MB", most >> 20);
    assert!(most < RESIDENT_MAX, "{most} bytes");

    // The quarantine has only a part of them, so they stay in Postgres until its owner says that this will do.
    let (is_equal, report) = verified(&launch);
    assert!(!is_equal, "{report:#}");
    let cut: u64 =
        report["differences"].as_array().unwrap().iter().map(|one| one["cut"].as_u64().unwrap()).sum();
    assert_eq!(cut, 4, "{report:#}");
    let lacks =
        "select lacks_reason from highwater.covered_partition where source_table = 'scouter.custom_drift'";
    let why: Option<String> = client.query_one(lacks, &[]).await.unwrap().get(0);
    assert!(
        why.as_ref().is_some_and(|why| why.contains("too long") && why.contains("HIGHWATER_MEMORY")),
        "{why:?}"
    );
    let accept = "update highwater.retention set accepts_quarantine = true where source_table = 'scouter.custom_drift'";
    client.batch_execute(accept).await.unwrap();
    let (is_equal, report) = verified(&launch);
    assert!(is_equal, "{report:#}");
    let why: Option<String> = client.query_one(lacks, &[]).await.unwrap().get(0);
    assert_eq!(why, None);
    assert_eq!((&report["archive_rows"], &report["postgres_rows"]), (&3.into(), &7.into()), "{report:#}");
    // A comparison of everything finds them in the quarantine.
    sidecar.kill();
    launch.must(&["resync", "scouter.custom_drift"]);
    let mut sidecar = launch.start();
    sidecar.says("the archive is complete", DEADLINE).await;
    assert_eq!((archived_rows(&quarantine).len(), custom().len()), (4, 3), "each once");
    let most = sidecar.resident_bytes_max();
    assert!(most < RESIDENT_MAX, "{most} bytes");
    assert!(sidecar.terminate(Duration::from_secs(30)).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_ask_for_checkpoints_get_one_a_second() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "60s");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    sidecar.says("archiving slot", DEADLINE).await;
    let client = stage.connect().await;
    let mallory = intruder(&stage).await;
    // Who does not know the key gets none. (What was sent before something that is acknowledged has arrived.)
    mallory.batch_execute("select key from highwater.request_key").await.unwrap_err();
    for guess in ["checkpoint", "checkpoint ", "checkpoint 1"] {
        stage.insert_one(&client, "row", Some(1.0)).await;
        mallory
            .batch_execute(&format!("select pg_logical_emit_message(true, 'highwater', '{guess}')"))
            .await
            .unwrap();
    }
    let target = stage.insert_one(&client, "row", Some(1.0)).await;
    stage.sent(&client, target).await;
    assert_eq!(archived_rows(&stage.storage().join("custom")).len(), 0);
    let begun = Instant::now();
    for _ in 0..56 {
        stage.insert_one(&client, "row", Some(1.0)).await;
        client
            .batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let custom = stage.storage().join("custom");
    until("the last request is answered", DEADLINE, async || {
        (archived_rows(&custom).len() == 60).then_some(())
    })
    .await;
    let made = files(&custom).unwrap().len() as u64;
    assert!(made <= begun.elapsed().as_secs() + 2, "{made} files in {:?}", begun.elapsed());
    assert!(sidecar.terminate(Duration::from_secs(30)).await.success(), "{}", sidecar.log());
    forget_intruder(&stage, mallory).await;
}
