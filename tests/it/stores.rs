//! The sidecar against object stores, killed in the middle: source and archive are equal.

use std::time::Duration;

use crate::support::archive;
use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::store::Store;
use crate::support::wait::{until, within};

const DEADLINE: Duration = Duration::from_secs(90);

async fn killed_in_the_middle(store: Store) {
    let stage = Stage::shared(Shape::Named).await;
    let launch = store.launch(stage.launch());
    launch.must(&["setup"]);
    let report = launch.output(&["check"]);
    assert!(String::from_utf8_lossy(&report.stdout).contains("can be written"), "{report:?}");
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    for _ in 0..3 {
        let mut sidecar = launch.start();
        let says =
            within(DEADLINE, async || sidecar.log().contains("archived a checkpoint").then_some(())).await;
        assert!(says.is_some(), "{}", sidecar.log());
        // Wherever it is by now: encoding, uploading, committing.
        let before = load.committed();
        until("the load goes on", DEADLINE, async || (load.committed() > before + 500).then_some(())).await;
        sidecar.kill();
    }
    let mut sidecar = launch.start();
    load.stop().await;
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "last", None).await;
    let acknowledged = async || (stage.confirmed(&client).await > target).then_some(());
    until("everything is acknowledged", DEADLINE, acknowledged).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let folder = store.download().await;
    archive::assert_same(&client, folder.path(), stage.shape).await;
    let marks = launch.watermarks();
    let counted: u64 =
        marks["tables"].as_array().unwrap().iter().filter_map(|table| table["row_count"].as_u64()).sum();
    assert!(counted > 1_000, "{marks}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_killed_in_the_middle() {
    killed_in_the_middle(Store::s3().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azure_killed_in_the_middle() {
    killed_in_the_middle(Store::azure().await).await;
}
