//! Killed at random moments, or at each step of a commit: source and archive stay equal.

use std::time::Duration;

use rand::RngExt as _;

use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::within;

const DEADLINE: Duration = Duration::from_secs(240);

/// Enough for kills to hit every phase of a checkpoint, few enough for a test.
const KILLS: u32 = 25;

/// Fail points in the order in which a commit passes them.
const STEPS: [&str; 7] = [
    "after-encode",
    "after-upload",
    "between-tables",
    "after-delta-commit",
    "before-watermark",
    "after-watermark",
    "before-ack",
];

async fn stage_under_load(shape: Shape) -> (Stage, Load) {
    let stage = Stage::partitioned(shape).await;
    if shape == Shape::Entity {
        create_entities(&stage.connect().await).await;
    }
    stage.launch().must(&["setup"]);
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), shape);
    (stage, load)
}

async fn killed_at_random(shape: Shape) {
    let (stage, load) = stage_under_load(shape).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "200ms");
    for _ in 0..KILLS {
        let mut sidecar = launch.start();
        // From before the first connection to several checkpoints later.
        let life = Duration::from_millis(rand::rng().random_range(20..1_500));
        let ended = within(life, async || sidecar.ended()).await;
        assert!(ended.is_none(), "the sidecar ended by itself: {ended:?}\n{}", sidecar.log());
        sidecar.kill();
    }
    let _sidecar = launch.start();
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_with_named_rows() {
    killed_at_random(Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_with_entity_rows() {
    killed_at_random(Shape::Entity).await;
}

/// Each step, at its first and at its third passing: with an empty archive and in the middle of a stream.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_commit() {
    for shape in [Shape::Named, Shape::Entity] {
        let (stage, load) = stage_under_load(shape).await;
        let launch = stage.launch().with("HIGHWATER_MAX_LAG", "200ms");
        for (step, passes) in STEPS.iter().flat_map(|step| [(step, 0), (step, 2)]) {
            let mut failing = launch.clone().failing(&format!("{step}={passes}*off->return")).start();
            let status = failing.wait(Duration::from_secs(60)).await;
            assert!(!status.success(), "{step}: ended with {status} instead of a crash");
        }
        let _sidecar = launch.start();
        load.stop().await;
        stage.assert_archived(DEADLINE).await;
    }
}

/// The server crashes, recovers, and the sidecar finds its way back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_crashes_and_the_sidecar_stays() {
    use crate::support::cluster::Stop;

    let stage = Stage::private(Shape::Named, &[]).await;
    let mut sidecar = stage.start().await;
    let load = Load::start(&stage.cluster().uri_tcp(&stage.name), Shape::Named);
    for _ in 0..3 {
        load.goes_on(3_000, Duration::from_secs(60)).await;
        stage.cluster().restart(Stop::Immediate);
    }
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.ended().is_none());
}
