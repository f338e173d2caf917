//! Ending in order: the server first, or the sidecar.

use std::time::Duration;

use crate::support::archive::archived_rows;
use crate::support::cluster::Stop;
use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// A server that shuts down waits for its walsenders' clients to confirm everything, for ever if need be.
#[tokio::test(flavor = "multi_thread")]
async fn a_fast_stop_of_the_server_ends_within_seconds_with_rows_pending() {
    let stage = Stage::private(Shape::Named, &[]).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "10min");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    for number in 0..1_000 {
        stage.insert_one(&client, &format!("metric {number}"), Some(1.0)).await;
    }
    drop(client);
    let mut stop = stage.cluster().stopping(Stop::Fast).spawn().unwrap();
    let status = until("pg_ctl stop ends", Duration::from_secs(20), async || stop.try_wait().unwrap()).await;
    assert!(status.success());
    assert_eq!(archived_rows(&stage.storage().join("custom")).len(), 1_000);
    assert!(sidecar.ended().is_none(), "the sidecar waits for the server\n{}", sidecar.log());

    stage.cluster().start();
    stage.streaming().await;
    let client = stage.connect().await;
    let begun = async || (sidecar.log().matches("archiving slot").count() == 2).then_some(());
    until("the sidecar has come back", DEADLINE, begun).await;
    let target = stage.insert_one(&client, "after the restart", None).await;
    stage.sent(&client, target).await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    stage.assert_same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_archives_and_acknowledges_what_has_arrived() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "10min");
    launch.must(&["setup"]);
    for signal in ["TERM", "INT"] {
        let mut sidecar = launch.start();
        // Before it just stops.
        sidecar.says("archiving slot", DEADLINE).await;
        let client = stage.connect().await;
        let mut target = stage.insert_one(&client, signal, Some(1.0)).await;
        for number in 0..100 {
            target = stage.insert_one(&client, &format!("{signal} {number}"), Some(1.0)).await;
        }
        stage.sent(&client, target).await;
        sidecar.signal(signal);
        assert_eq!(sidecar.wait(DEADLINE).await.code(), Some(0), "{}", sidecar.log());
        assert!(stage.confirmed(&client).await > target, "acknowledged");
        stage.assert_same().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_exits_at_once() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "10min");
    launch.must(&["setup"]);
    // The last checkpoint hangs, as if storage did.
    let mut sidecar = launch.clone().failing("after-encode=sleep(600000)").start();
    stage.streaming().await;
    let client = stage.connect().await;
    stage.insert_one(&client, "pending", None).await;
    sidecar.signal("TERM");
    let pending = crate::support::wait::within(Duration::from_secs(2), async || sidecar.ended()).await;
    if pending.is_none() {
        sidecar.signal("TERM");
    }
    sidecar.wait(Duration::from_secs(2)).await;

    let mut sidecar = launch.start();
    stage.streaming().await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    drop(client);
    let _sidecar = stage.launch().start();
    stage.assert_archived(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopped_in_order_under_load_nothing_is_missing_or_doubled() {
    let stage = Stage::shared(Shape::Named).await;
    stage.launch().must(&["setup"]);
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Named);
    for _ in 0..5 {
        let mut sidecar = stage.launch().start();
        stage.streaming().await;
        load.goes_on(2_000, DEADLINE).await;
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    }
    load.stop().await;
    let _sidecar = stage.launch().start();
    stage.assert_archived(DEADLINE).await;
}
