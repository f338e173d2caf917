//! The history in object stores: the same answers as from a folder with the same objects, by the binary and by the library.

use std::time::Duration;

use chrono::{DateTime, Utc};
use highwater::Archive;
use highwater::archive::Storage;
use highwater::reader::{BinnedQuery, Bins};
use highwater::tables::Entity;

use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::store::Store;

const DEADLINE: Duration = Duration::from_secs(180);

/// Two models over three days, in files of more than one day and more than one checkpoint.
const ROWS: &str = "
    insert into scouter.custom_drift (created_at, space, name, version, metric, value)
    select '2026-11-01'::timestamptz + n * interval '7 minutes', 'shop', 'model ' || n % 2, '1.0.0', 'accuracy', sqrt(n)
      from generate_series(0, 600) n;
    insert into scouter.spc_drift (created_at, space, name, version, feature, value)
    select '2026-11-01'::timestamptz + n * interval '7 minutes', 'shop', 'model ' || n % 2, '1.0.0', 'größe', sqrt(n)
      from generate_series(0, 600) n;
    insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
    select '2026-11-01'::timestamptz + n * interval '7 minutes', 'shop', 'model ' || n % 2, '1.0.0', 'age', bin, n + bin
      from generate_series(0, 600) n, generate_series(0, 9) bin";

/// What a command of the reader prints.
fn said(launch: &Launch, arguments: &[&str]) -> String {
    let output = launch.output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn answers_as_from_a_folder(store: Store) {
    let stage = Stage::shared(Shape::Named).await;
    let launch = store.launch(stage.launch());
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "first", Some(1.0)).await;
    stage.acknowledged(&client, target, DEADLINE).await;

    let url = format!("{}/", store.uri);
    let archive = Archive::open_in(Storage::from_store(store.objects(), &url).unwrap()).await.unwrap();
    assert!(!archive.refresh().await.unwrap(), "nothing is new");
    client.batch_execute(ROWS).await.unwrap();
    let target = stage.insert_one(&client, "last", Some(1.0)).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());

    let folder = store.download().await;
    let near = stage.launch().with("SCOUTER_STORAGE_URI", folder.path().to_str().unwrap());
    let model = ["--space", "shop", "--name", "model 1", "--version", "1.0.0"];
    let days = ["--from", "2026-11-01T03:00:00Z", "--to", "2026-11-03T12:00:00Z", "--format", "json"];
    for kind in ["custom", "psi", "spc"] {
        let query = [&["query", kind], &model[..], &days[..]].concat();
        let found = said(&launch, &query);
        assert_eq!(found, said(&near, &query), "{kind}");
        assert!(found.len() > 2_000, "{kind}: {found}");
        let counted =
            said(&launch, &["sql", &format!("select count(*) as n from {kind}"), "--format", "csv"]);
        let sql = format!("select count(*) from scouter.{kind}_drift");
        let wanted: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert_eq!(counted, format!("n\n{wanted}\n"), "{kind}");
    }
    assert_eq!(said(&launch, &["entities"]), said(&near, &["entities"]));

    assert!(archive.refresh().await.unwrap(), "an archive that was opened before sees what came since");
    let entity = Entity { space: "shop".into(), name: "model 1".into(), version: "1.0.0".into() };
    let time = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
    let (start, end) = (time("2026-11-01T03:00:00Z"), time("2026-11-03T12:00:00Z"));
    let query = BinnedQuery::new(entity, start, end, Bins::from_minutes(60.0).unwrap()).unwrap();
    let found = archive.binned_psi(&query).await.unwrap();
    let settings =
        highwater::config::ObjectStorageSettings::new(folder.path().to_str().unwrap(), "").unwrap();
    assert_eq!(found, Archive::open(&settings).await.unwrap().binned_psi(&query).await.unwrap());
    assert_eq!(found.iter().map(|feature| feature.created_at.len()).collect::<Vec<_>>(), [57]);
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_of_s3() {
    answers_as_from_a_folder(Store::s3().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_of_azure() {
    answers_as_from_a_folder(Store::azure().await).await;
}
