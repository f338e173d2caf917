//! Rows that may be missing are never hidden: the watermark says so, and its horizon stands still.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::sidecar::{Launch, Sidecar};
use crate::support::stage::Stage;
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(90);

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

/// A stage whose sidecar has archived a row and goes on.
async fn archiving() -> (Stage, Sidecar, Client) {
    let stage = Stage::shared(Shape::Named).await;
    let sidecar = stage.start().await;
    let client = stage.connect().await;
    stage.insert_one(&client, "first", None).await;
    archived(&stage, "first").await;
    (stage, sidecar, client)
}

/// Takes the custom table out of the publication.
async fn unpublish(stage: &Stage, client: &Client) {
    let sql = format!("alter publication {} drop table scouter.custom_drift", stage.name);
    client.batch_execute(&sql).await.unwrap();
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
    // Setup again changes nothing.
    stage.launch().must(&["setup"]);
    assert_eq!(states(&client).await, ["gap"]);
    stage.insert_one(&client, "before any sidecar", None).await;
    let _sidecar = stage.launch().start();
    becomes(&client, "streaming").await;
    stage.assert_archived(DEADLINE).await;
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
    let output = launch.output(&["check"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("has 0 rows in its table custom, though"), "{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
    // With the right one it goes on.
    let _sidecar = stage.launch().start();
    stage.assert_archived(DEADLINE).await;
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
    let sidecar = stage.start().await;
    // By then it has looked at what is to be copied.
    sidecar.says("archiving slot", DEADLINE).await;
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
    for (kind, count) in [("psi", 1), ("spc", 2)] {
        let there = async || (archived_rows(&stage.storage().join(kind)).len() == count).then_some(());
        until("the rows are archived, the earlier ones too", DEADLINE, there).await;
    }
    stage.assert_archived(DEADLINE).await;
    until("all are complete", DEADLINE, async || (states(&client).await == ["streaming"]).then_some(()))
        .await;
}

/// Waits until the custom table is in a state.
async fn becomes(client: &Client, state: &str) {
    let is_it = async || (mark(client).await.0 == state).then_some(());
    until(&format!("the state is {state}"), DEADLINE, is_it).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_taken_out_of_the_publication_is_a_gap_that_setup_does_not_hide() {
    let (stage, sidecar, client) = archiving().await;
    unpublish(&stage, &client).await;
    stage.insert_one(&client, "unseen", None).await;
    // Put back before the sidecar looks: setup is what notices.
    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("marked a gap in scouter.custom_drift"), "{said}");
    archived(&stage, "unseen").await;
    becomes(&client, "streaming").await;
    stage.insert_one(&client, "seen again", None).await;
    stage.assert_archived(DEADLINE).await;
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sidecar_notices_a_table_that_is_not_published_any_more() {
    let stage = Stage::shared(Shape::Named).await;
    let sidecar = stage.start().await;
    let client = stage.connect().await;
    unpublish(&stage, &client).await;
    // Rows of another table move the watermarks.
    let psi = "insert into scouter.psi_drift (space, name, version, feature, bin_id, bin_count)
               values ('s', 'n', 'v', 'f', 1, 2)";
    client.batch_execute(psi).await.unwrap();
    becomes(&client, "gap").await;
    sidecar.says("the publication does not send the table's inserts", DEADLINE).await;
    let psi = "select state from highwater.watermark where source_table = 'scouter.psi_drift'";
    assert_eq!(client.query_one(psi, &[]).await.unwrap().get::<_, String>(0), "streaming");
    // Not mended before it is published again: until then more rows would pass.
    stage.insert_one(&client, "unseen", None).await;
    throughout("the gap stays", Duration::from_secs(12), async || mark(&client).await.0 == "gap").await;
    stage.launch().must(&["setup"]);
    archived(&stage, "unseen").await;
    becomes(&client, "streaming").await;
    stage.assert_archived(DEADLINE).await;
}

/// Rows without a column that is archived, and partitions that are not in it, pass as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_sends_less_than_is_archived_is_a_gap() {
    let (stage, sidecar, client) = archiving().await;
    let name = &stage.name;
    let columns = "scouter.custom_drift (created_at, space, name, version, metric)";
    client
        .batch_execute(&format!("alter publication {name} drop table scouter.custom_drift; alter publication {name} add table {columns}"))
        .await
        .unwrap();
    // The watermark moves.
    let psi = "insert into scouter.psi_drift (space, name, version, feature, bin_id, bin_count)
               values ('s', 'n', 'v', 'f', 1, 2)";
    client.batch_execute(psi).await.unwrap();
    becomes(&client, "gap").await;
    throughout("the gap stays", Duration::from_secs(12), async || mark(&client).await.0 == "gap").await;
    unpublish(&stage, &client).await;
    stage.launch().must(&["setup"]);
    becomes(&client, "streaming").await;
    stage.insert_one(&client, "seen again", None).await;
    stage.assert_archived(DEADLINE).await;
    drop(sidecar);
}

/// What a migration script does: the sidecar only ever sees a publication that is as it should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_changed_and_restored_at_once_is_a_gap() {
    let (stage, sidecar, client) = archiving().await;
    let counted = "select gap_count from highwater.watermark where source_table = 'scouter.custom_drift'";
    let gaps = async || client.query_one(counted, &[]).await.unwrap().get::<_, i64>(0);
    let ways = [
        ("drop table scouter.custom_drift", "add table scouter.custom_drift"),
        ("set (publish = 'delete')", "set (publish = 'insert')"),
    ];
    for (turn, (away, back)) in ways.iter().enumerate() {
        let before = gaps().await;
        let (name, metric) = (&stage.name, format!("unseen {turn}"));
        let sql = format!(
            "begin; alter publication {name} {away};
             insert into scouter.custom_drift (space, name, version, metric, value) values ('s', 'n', 'v', '{metric}', 1);
             alter publication {name} {back}; commit"
        );
        client.batch_execute(&sql).await.unwrap();
        // The watermark moves.
        stage.insert_one(&client, "seen", None).await;
        archived(&stage, &metric).await;
        becomes(&client, "streaming").await;
        assert_eq!(gaps().await, before + 1);
    }
    sidecar.says("the publication was changed", DEADLINE).await;
    stage.assert_archived(DEADLINE).await;
}

/// By its oid a table is known whatever it is called, and a partition whatever it is published as.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_renamed_table_and_of_partitions_published_as_themselves_are_archived() {
    let (stage, sidecar, client) = archiving().await;
    let via_root = async |value: bool| {
        let sql = format!("alter publication {} set (publish_via_partition_root = {value})", stage.name);
        client.batch_execute(&sql).await.unwrap();
    };
    via_root(false).await;
    stage.insert_one(&client, "as a partition", None).await;
    archived(&stage, "as a partition").await;
    via_root(true).await;

    client.batch_execute("alter table scouter.custom_drift rename to custom_drift_old").await.unwrap();
    let renamed = "insert into scouter.custom_drift_old (space, name, version, metric) values ('s', 'n', 'v', 'renamed')";
    client.batch_execute(renamed).await.unwrap();
    archived(&stage, "renamed").await;
    client.batch_execute("alter table scouter.custom_drift_old rename to custom_drift").await.unwrap();
    stage.insert_one(&client, "named back", None).await;
    archived(&stage, "named back").await;
    // The change of the publication was a gap.
    becomes(&client, "streaming").await;
    stage.assert_same().await;
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_without_its_publication_is_refused_by_setup_with_the_way_out() {
    let stage = Stage::shared(Shape::Named).await;
    archived_once(&stage).await;
    let client = stage.connect().await;
    client.batch_execute(&format!("drop publication {}", stage.name)).await.unwrap();
    stage.insert_one(&client, "unseen", None).await;
    refuses(&stage.launch().logging_to(&stage.folder().join("refused.log")), &["publication"]).await;
    let output = stage.launch().output(&["setup"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("pg_drop_replication_slot"), "{said}");
    client.execute("select pg_drop_replication_slot($1)", &[&stage.name]).await.unwrap();
    stage.launch().must(&["setup"]);
    becomes(&client, "gap").await;
    let sidecar = stage.launch().start();
    archived(&stage, "unseen").await;
    becomes(&client, "streaming").await;
    stage.assert_archived(DEADLINE).await;
    drop(sidecar);
}

/// Whose answer was lost is tried again, and counted once.
#[tokio::test(flavor = "multi_thread")]
async fn entities_are_counted_once_when_sql_is_slow() {
    let stage = Stage::shared(Shape::Named).await;
    stage.launch().must(&["setup"]);
    let client = stage.connect().await;
    // Longer than the sidecar waits for a statement; it goes on in the server, and takes effect.
    let slow = "create function slow() returns trigger language plpgsql as
                    'begin if pg_sleep(case when (select count(*) from public.slept) = 0 then 33 else 0 end) is not null
                     then insert into public.slept values (1); end if; return null; end';
                create table public.slept (n int); grant select, insert on public.slept to highwater;
                create trigger slow after insert on highwater.entity_watermark for each row execute function slow()";
    client.batch_execute(slow).await.unwrap();
    let sidecar = stage.launch().start();
    stage.streaming().await;
    for number in 0..10 {
        stage.insert_one(&client, &format!("metric {number}"), None).await;
    }
    let counted = async || {
        let sql = "select sum(row_count)::bigint from highwater.entity_watermark having count(*) > 0";
        client.query_opt(sql, &[]).await.unwrap().map(|row| row.get::<_, i64>(0))
    };
    until("the entities are counted", DEADLINE * 2, counted).await;
    let target = stage.insert_one(&client, "last", None).await;
    stage.acknowledged(&client, target, DEADLINE * 2).await;
    let whole = async || (counted().await? >= 11).then_some(());
    until("every row is counted", DEADLINE * 2, whole).await;
    assert_eq!(counted().await, Some(11), "{}", sidecar.log());
}
