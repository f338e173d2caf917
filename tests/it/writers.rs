//! Two writers: only one may write, whoever wakes up when.

use std::time::Duration;

use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;

const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_wakes_up_after_its_successor_ends_without_harm() {
    // A walsender that is terminated wants to tell its client, who does not listen; the timeout just cuts.
    let stage = Stage::private(Shape::Named, &[("wal_sender_timeout", "3s")]).await;
    stage.launch().must(&["setup"]);
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Named);
    // Its second checkpoint is uploaded, and then it sleeps.
    let sleeper_log = stage.folder().join("sleeper.log");
    let sleeper = stage.launch().logging_to(&sleeper_log).failing("after-upload=1*off->1*return(stop)->off");
    let mut sleeper = sleeper.start();
    sleeper.stopped(DEADLINE).await;

    let mut successor = stage.launch().start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "while asleep", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;

    sleeper.signal("CONT");
    let status = sleeper.wait(DEADLINE).await;
    assert!(!status.success(), "{status}");
    let log = sleeper.log();
    assert!(log.contains("another writer has taken over") || log.contains("replication slot"), "{log}");

    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    assert!(successor.ended().is_none(), "the successor is untouched\n{}", successor.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_sidecars_one_works_and_the_other_names_it() {
    let stage = Stage::shared(Shape::Named).await;
    let mut first = stage.start().await;
    let client = stage.connect().await;
    let holder = stage.holder(&client).await.expect("a holder");
    let mut second = stage.launch().logging_to(&stage.folder().join("second.log")).start();
    second.says(&holder.to_string(), DEADLINE).await;
    stage.assert_archived(DEADLINE).await;
    assert!(first.ended().is_none());

    // Waiting or ended, as it likes; if it waits it takes over as soon as it can.
    first.kill();
    let successor = if second.ended().is_some() { stage.launch().start() } else { second };
    stage.assert_archived(DEADLINE).await;
    drop(successor);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sidecars_started_at_once_double_nothing() {
    let stage = Stage::shared(Shape::Named).await;
    stage.launch().must(&["setup"]);
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Named);
    let mut first = stage.launch().start();
    let mut second = stage.launch().logging_to(&stage.folder().join("second.log")).start();
    stage.streaming().await;
    for _ in 0..5 {
        load.goes_on(1_000, DEADLINE).await;
        // Whoever holds the slot loses it; either may be next.
        stage.cut().await;
    }
    load.stop().await;
    let both_ended = first.ended().is_some() && second.ended().is_some();
    let _third = both_ended.then(|| stage.launch().start());
    stage.assert_archived(DEADLINE).await;
}
