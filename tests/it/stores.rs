//! The sidecar against object stores, killed in the middle: source and archive are equal.

use std::time::Duration;

use rand::RngExt as _;

use crate::support::archive;
use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::store::Store;
use crate::support::wait::within;

const DEADLINE: Duration = Duration::from_secs(180);

async fn killed_in_the_middle(store: Store) {
    let stage = Stage::shared(Shape::Named).await;
    let launch = store.launch(stage.launch());
    launch.must(&["setup"]);
    let report = launch.output(&["check"]);
    assert!(String::from_utf8_lossy(&report.stdout).contains("can be written"), "{report:?}");
    for _ in 0..3 {
        // Few rows: the late ones among them have a file for each of their days, and the stores are slow.
        let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
        load.goes_on(300, DEADLINE).await;
        load.stop().await;
        // Wherever it is by then: reading, claiming, encoding, uploading, committing.
        let mut sidecar = launch.start();
        let life = Duration::from_millis(rand::rng().random_range(300..4_000));
        let ended = within(life, async || sidecar.ended()).await;
        assert!(ended.is_none(), "the sidecar ended by itself: {ended:?}\n{}", sidecar.log());
        sidecar.kill();
    }
    let mut sidecar = launch.start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "last", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let folder = store.download().await;
    archive::assert_same(&client, folder.path(), stage.shape).await;
    let marks = launch.watermarks();
    let counted: u64 =
        marks["tables"].as_array().unwrap().iter().filter_map(|table| table["row_count"].as_u64()).sum();
    assert!(counted > 900, "{marks}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_killed_in_the_middle() {
    killed_in_the_middle(Store::s3().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azure_killed_in_the_middle() {
    killed_in_the_middle(Store::azure().await).await;
}
