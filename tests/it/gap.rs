//! Rows that may be missing are never hidden: the watermark says so, and its horizon stands still.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::sidecar::{Launch, Sidecar};
use crate::support::stage::Stage;
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(40);

const STATES: &str = "select state, archived_before::text from highwater.watermark
                       where source_table = 'scouter.custom_drift'";

/// State and horizon of the custom table.
async fn mark(client: &Client) -> (String, Option<String>) {
    let row = client.query_one(STATES, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn states(client: &Client) -> Vec<String> {
    let sql = "select distinct state from highwater.watermark order by 1";
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Waits until a row with this metric is archived.
async fn archived(stage: &Stage, metric: &str) {
    let quoted = format!("{metric:?}");
    let there = async || {
        let rows = archived_rows(&stage.storage().join("custom"));
        rows.iter().any(|row| row.contains(&quoted)).then_some(())
    };
    until(&format!("{metric} is archived"), DEADLINE, there).await;
}

/// A sidecar that must end by itself, and say certain things.
async fn refuses(launch: &Launch, words: &[&str]) {
    let mut sidecar = launch.start();
    let status = sidecar.wait(DEADLINE).await;
    assert!(!status.success(), "{status}");
    let log = sidecar.log();
    for word in words {
        assert!(log.contains(word), "no {word:?} in:\n{log}");
    }
}

/// A sidecar that has archived a row and knows a horizon, then stopped in order.
async fn archived_once(stage: &Stage) -> String {
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    stage.insert_one(&client, "first", None).await;
    let known = async || mark(&client).await.1;
    let horizon = until("a horizon is known", DEADLINE, known).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    // The stop itself may have moved it once more.
    mark(&client).await.1.unwrap_or(horizon)
}

/// What comes is archived, and for a while the horizon is seen to stand still.
async fn archives_with_a_frozen_horizon(stage: &Stage, sidecar: &mut Sidecar, horizon: &str) {
    let client = stage.connect().await;
    stage.insert_one(&client, "after the gap", None).await;
    archived(stage, "after the gap").await;
    let mut number = 0;
    throughout("a gap with a frozen horizon", Duration::from_secs(14), async || {
        number += 1;
        stage.insert_one(&client, &format!("later {number}"), None).await;
        mark(&client).await == ("gap".to_owned(), Some(horizon.to_owned()))
    })
    .await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    assert_eq!(states(&client).await, ["gap"], "of every table of the slot");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_advanced_by_hand_is_a_gap() {
    let stage = Stage::shared(Shape::Named).await;
    let horizon = archived_once(&stage).await;
    let client = stage.connect().await;
    stage.insert_one(&client, "skipped", None).await;
    let sql = "select pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) from pg_replication_slots
                where slot_name = $1";
    client.query_one(sql, &[&stage.name]).await.unwrap();

    let mut sidecar = stage.launch().start();
    let marked = async || (mark(&client).await.0 == "gap").then_some(());
    until("the gap is marked", DEADLINE, marked).await;
    sidecar.says("gap: the slot is ahead of the archive", DEADLINE).await;
    archives_with_a_frozen_horizon(&stage, &mut sidecar, &horizon).await;
    let rows = archived_rows(&stage.storage().join("custom"));
    assert!(!rows.iter().any(|row| row.contains("\"skipped\"")), "nobody could have archived it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_slot_ends_the_sidecar_and_a_new_one_keeps_the_gap() {
    let stage = Stage::shared(Shape::Named).await;
    let horizon = archived_once(&stage).await;
    let client = stage.connect().await;
    client.execute("select pg_drop_replication_slot($1)", &[&stage.name]).await.unwrap();
    stage.insert_one(&client, "skipped", None).await;
    refuses(&stage.launch(), &[&stage.name, "does not exist", "highwater setup"]).await;
    assert_eq!(states(&client).await, ["gap"]);

    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("made replication slot"), "{said}");
    assert_eq!(states(&client).await, ["gap"]);
    // Setup again changes nothing.
    stage.launch().must(&["setup"]);
    assert_eq!(states(&client).await, ["gap"]);
    let mut sidecar = stage.launch().start();
    archives_with_a_frozen_horizon(&stage, &mut sidecar, &horizon).await;
}

/// The new slot is made before any sidecar has noticed that the old one is gone.
#[tokio::test(flavor = "multi_thread")]
async fn setup_marks_the_gap_of_a_slot_that_it_replaces() {
    let stage = Stage::shared(Shape::Named).await;
    archived_once(&stage).await;
    let client = stage.connect().await;
    client.execute("select pg_drop_replication_slot($1)", &[&stage.name]).await.unwrap();
    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("marked a gap in scouter.custom_drift"), "{said}");
    assert_eq!(states(&client).await, ["gap"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_system_is_refused() {
    let stage = Stage::shared(Shape::Named).await;
    archived_once(&stage).await;
    let client = stage.connect().await;
    client.execute("update highwater.watermark set system_identifier = '4711'", &[]).await.unwrap();
    let row = client.query_one("select system_identifier::text from pg_control_system()", &[]).await.unwrap();
    refuses(&stage.launch(), &["system 4711", row.get(0)]).await;
    assert_eq!(states(&client).await, ["streaming"], "nothing is known of this system's rows");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_storage_in_the_place_of_a_full_one_is_refused() {
    let stage = Stage::shared(Shape::Named).await;
    archived_once(&stage).await;
    let other = stage.folder().join("other").display().to_string();
    let launch = stage.launch().with("SCOUTER_STORAGE_URI", &other);
    refuses(&launch, &[&other, "scouter.custom_drift", "watermark"]).await;
    // With the right one it goes on.
    let _sidecar = stage.launch().start();
    stage.assert_archived(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_held_rows_waits_for_its_first_copy() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    stage.insert_one(&client, "older than the slot", None).await;
    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("custom_drift: it holds rows from before the slot"), "{said}");
    assert_eq!(mark(&client).await, ("snapshot".to_owned(), None));
    assert_eq!(states(&client).await, ["snapshot", "streaming"], "the other tables were empty");

    let _sidecar = stage.launch().start();
    stage.insert_one(&client, "streamed", None).await;
    archived(&stage, "streamed").await;
    let streaming = "select count(*) from highwater.watermark
                      where state = 'streaming' and archived_before is not null";
    let known =
        async || (client.query_one(streaming, &[]).await.unwrap().get::<_, i64>(0) == 2).then_some(());
    until("the empty tables have a horizon", DEADLINE, known).await;
    assert_eq!(mark(&client).await, ("snapshot".to_owned(), None));
    assert_eq!(archived_rows(&stage.storage().join("custom")).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_added_to_the_publication_later() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "alter table scouter.psi_drift set schema public;
             alter table scouter.spc_drift set schema public",
        )
        .await
        .unwrap();
    let _sidecar = stage.start().await;
    client
        .batch_execute(
            "alter table psi_drift set schema scouter;
             alter table spc_drift set schema scouter;
             insert into scouter.spc_drift (space, name, version, feature, value)
             values ('s', 'n', '1', 'old', 1)",
        )
        .await
        .unwrap();
    // While the sidecar runs.
    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("psi_drift") && said.contains("spc_drift"), "{said}");
    let sql = "select source_table, state from highwater.watermark order by 1";
    let rows = client.query(sql, &[]).await.unwrap();
    let rows: Vec<(&str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        rows,
        [
            ("scouter.custom_drift", "streaming"),
            ("scouter.psi_drift", "streaming"),
            ("scouter.spc_drift", "snapshot")
        ]
    );
    client
        .batch_execute(
            "insert into scouter.psi_drift (space, name, version, feature, bin_id, bin_count)
             values ('s', 'n', '1', 'new', 1, 1);
             insert into scouter.spc_drift (space, name, version, feature, value)
             values ('s', 'n', '1', 'new', 2)",
        )
        .await
        .unwrap();
    for kind in ["psi", "spc"] {
        let there = async || (archived_rows(&stage.storage().join(kind)).len() == 1).then_some(());
        until("the new rows are archived", DEADLINE, there).await;
        assert!(archived_rows(&stage.storage().join(kind))[0].contains("\"new\""));
    }
}
