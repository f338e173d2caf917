//! The life of a row on other versions of PostgreSQL, which come without extensions: first copy, stream, kills, a restart, a lost
//! slot, verification, purge; and slots that standbys keep.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::cluster::Stop;
use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::{until, within};

const DEADLINE: Duration = Duration::from_secs(90);

async fn text(client: &Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get(0)
}

async fn life_of_a_row(major: u32, shape: Shape) {
    let stage = Stage::of_version(major, shape, &[]).await;
    let client = stage.connect().await;
    let version = text(&client, "show server_version").await;
    assert!(version.starts_with(&major.to_string()), "{version}");
    if shape == Shape::Entity {
        create_entities(&client).await;
    }
    // Some rows are past retention, in a partition of their own, and from before the slot.
    let old = "create table scouter.old partition of scouter.custom_drift for values from ('2001-01-01Z') to ('2001-01-02Z')";
    client.batch_execute(old).await.unwrap();
    let load = Load::start(&stage.cluster().uri_tcp(&stage.name), shape);
    load.goes_on(5_000, DEADLINE).await;
    load.stop().await;
    let old = "insert into scouter.custom_drift
               select (jsonb_populate_record(c, jsonb_build_object('created_at', '2001-01-01Z'::timestamptz + n * interval '1 second'))).*
               from (select d as c, row_number() over () as n from scouter.custom_drift d, generate_series(1, 200) where isfinite(created_at) limit 200) as few";
    assert_eq!(client.execute(old, &[]).await.unwrap(), 200);
    stage.launch().must(&["setup"]);
    let has_failover =
        "select coalesce((select to_jsonb(s) ->> 'failover' from pg_replication_slots s), 'none')";
    assert_eq!(text(&client, has_failover).await, if major < 17 { "none" } else { "true" });

    let mut sidecar = stage.start().await;
    let load = Load::start(&stage.cluster().uri_tcp(&stage.name), shape);
    load.goes_on(1_000, DEADLINE).await;
    sidecar.kill();
    sidecar = stage.launch().start();
    load.goes_on(1_000, DEADLINE).await;
    stage.cluster().restart(Stop::Fast);
    load.goes_on(1_000, DEADLINE).await;
    stage.streaming().await;
    // The slot is lost while nobody runs.
    sidecar.kill();
    let client = stage.connect().await;
    let dropped = async || {
        client.batch_execute(&format!("select pg_drop_replication_slot('{}')", stage.name)).await.ok()
    };
    until("the slot is dropped", DEADLINE, dropped).await;
    load.goes_on(1_000, DEADLINE).await;
    sidecar = stage.launch().start();
    sidecar.says("gap", DEADLINE).await;
    load.goes_on(1_000, DEADLINE).await;
    load.stop().await;
    // The new slot stands behind the last row from its beginning.
    let incomplete = "select count(*)::text from highwater.watermark where state <> 'streaming'";
    until("the gap is mended", DEADLINE, async || (text(&client, incomplete).await == "0").then_some(()))
        .await;
    stage.assert_archived(DEADLINE).await;
    stage.launch().must(&["verify"]);
    let purged = async || {
        stage.launch().output(&["purge"]);
        (text(&client, "select coalesce(to_regclass('scouter.old')::text, 'gone')").await == "gone")
            .then_some(())
    };
    until("the old partition is purged", DEADLINE, purged).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn life_of_a_row_on_16() {
    life_of_a_row(16, Shape::Entity).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn life_of_a_row_on_17() {
    life_of_a_row(17, Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn life_of_a_row_on_18() {
    life_of_a_row(18, Shape::Entity).await;
}

/// An idle slot that the server gives up says so, and is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_was_idle_for_too_long() {
    let stage = Stage::of_version(18, Shape::Named, &[("idle_replication_slot_timeout", "1s")]).await;
    let client = stage.connect().await;
    stage.launch().must(&["setup"]);
    stage.insert_one(&client, "before", Some(1.0)).await;
    let lost = async || {
        client.batch_execute("checkpoint").await.unwrap();
        let reason = "select coalesce(invalidation_reason, '') from pg_replication_slots";
        (text(&client, reason).await == "idle_timeout").then_some(())
    };
    until("the slot is invalidated", DEADLINE, lost).await;
    let marks = stage.launch().must(&["--watermarks"]);
    assert!(marks.contains("lost (idle_timeout)") && marks.contains("nobody streams since 20"), "{marks}");
    let check = stage.launch().output(&["check"]);
    let check = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.contains("(idle_timeout)") && check.contains("idle_replication_slot_timeout"), "{check}");
    let mut sidecar = stage.launch().start();
    sidecar.says("idle_timeout", DEADLINE).await;
    stage.insert_one(&client, "after", Some(1.0)).await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

async fn a_promoted_standby_has_the_slot(major: u32) {
    let stage = Stage::of_version(major, Shape::Named, &[]).await;
    let primary = stage.cluster();
    let standby = primary.synchronised_standby().await;
    let hosts = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname={} target_session_attrs=read-write",
        standby.port(),
        primary.port(),
        stage.name
    );
    let launch = stage.launch().with("DATABASE_URI", &hosts);
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let load = Load::start(&primary.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    let replica = standby.connect("postgres").await;
    // A slot is synchronised once it has passed what ran when it was made; on an idle server that takes a record of what runs,
    // and a position past it.
    let client = stage.connect().await;
    let synced = async || {
        let pass = "select pg_log_standby_snapshot(); select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key";
        client.batch_execute(pass).await.unwrap();
        let query = "select count(*) from pg_replication_slots where synced and not temporary and invalidation_reason is null";
        (replica.query_one(query, &[]).await.unwrap().get::<_, i64>(0) == 1).then_some(())
    };
    let is_synced = within(DEADLINE, synced).await.is_some();
    assert!(is_synced, "{}", std::fs::read_to_string(standby.log()).unwrap());
    let load = Load::start(&primary.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    // Nothing may be lost between the two, so that source and archive can be compared.
    let client = stage.connect().await;
    standby.follows(&client, DEADLINE).await;
    primary.stop(Stop::Immediate);
    standby.promote();
    let load = Load::start(&standby.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    let client = standby.connect(&stage.name).await;
    stage.assert_archived_from(&client, DEADLINE).await;
    let log = sidecar.log();
    assert!(!log.contains("gap") && !log.contains("--accept-new-system"), "{log}");
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());

    // The old primary comes back and goes on: its positions are not those that are archived.
    primary.start();
    let load = Load::start(&primary.uri_tcp(&stage.name), stage.shape);
    load.goes_on(6_000, DEADLINE).await;
    load.stop().await;
    let mut refused = stage.launch().with("DATABASE_URI", &primary.uri_unix(&stage.name)).start();
    assert!(!refused.wait(DEADLINE).await.success());
    assert!(refused.log().contains("has lost what is archived"), "{}", refused.log());
    let mut sidecar = launch.start();
    sidecar.says("archiving slot", DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_of_17_has_the_slot() {
    a_promoted_standby_has_the_slot(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_of_18_has_the_slot() {
    a_promoted_standby_has_the_slot(18).await;
}

/// `pg_upgrade` makes another system of the same rows.
async fn goes_on_after_an_upgrade(stage: Stage) {
    let old = stage.cluster();
    if stage.shape == Shape::Entity {
        create_entities(&stage.connect().await).await;
    }
    stage.launch().must(&["setup"]);
    let mut sidecar = stage.start().await;
    let load = Load::start(&old.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    // In this order, as the documentation says.
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    old.stop(Stop::Fast);
    let new = old.upgraded();
    let launch = stage.launch().with("DATABASE_URI", &new.uri_tcp(&stage.name));
    let mut sidecar = launch.start();
    assert!(!sidecar.wait(DEADLINE).await.success());
    assert!(sidecar.log().contains("--accept-new-system"), "{}", sidecar.log());
    let check = launch.output(&["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("is archived from system"), "{check:?}");
    let mut sidecar = launch.start_with(&["--accept-new-system"]);
    let load = Load::start(&new.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    let client = new.connect(&stage.name).await;
    stage.assert_archived_from(&client, DEADLINE).await;
    until("the archive is proved", DEADLINE, async || {
        launch.output(&["verify"]).status.success().then_some(())
    })
    .await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_from_15_to_18() {
    let settings = [("shared_preload_libraries", ""), ("fsync", "off")];
    goes_on_after_an_upgrade(Stage::private(Shape::Named, &settings).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_from_17_to_18_with_the_slot() {
    goes_on_after_an_upgrade(Stage::of_version(17, Shape::Entity, &[]).await).await;
}

/// What an earlier release has made is changed.
#[tokio::test(flavor = "multi_thread")]
async fn setup_has_a_slot_kept_on_standbys() {
    let stage = Stage::of_version(17, Shape::Named, &[]).await;
    let client = stage.connect().await;
    stage.launch().with("HIGHWATER_FAILOVER", "false").must(&["setup"]);
    let failover = "select failover::text from pg_replication_slots";
    assert_eq!(text(&client, failover).await, "false");
    let check = stage.launch().output(&["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("is not kept on standbys"), "{check:?}");
    let mut sidecar = stage.launch().with("HIGHWATER_FAILOVER", "false").start();
    sidecar.says("archiving slot", DEADLINE).await;
    assert!(stage.launch().must(&["setup"]).contains("stop the sidecar"));
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert!(stage.launch().must(&["setup"]).contains("standbys will have it"));
    assert_eq!(text(&client, failover).await, "true");
}
