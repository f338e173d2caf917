//! Texts that are not UTF-8: their own rows go to quarantine, with their bytes shown, and nothing else is kept by them.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// A partition of 70 days ago, past its retention.
const OLD: &str =
    "do $$ declare low timestamptz := date_trunc('day', now(), 'UTC') - interval '70 days'; begin
    execute format('create table scouter.old partition of scouter.psi_drift for values from (%L) to (%L)',
                   low, low + interval '1 day'); end $$";

/// Rows of PSI and of custom metrics, of a text each (as a literal), for an entity (the values of its columns). Of each the one
/// is 70 days old.
async fn insert(client: &Client, shape: Shape, entity: &str, text: &str, turn: i32) {
    let columns = shape.entity_columns();
    let sql = format!(
        "insert into scouter.psi_drift (created_at, {columns}, feature, bin_id, bin_count)
         select date_trunc('day', now(), 'UTC') - interval '70 days' + {turn} * interval '1 minute', {entity}, {text}, 1, {turn};
         insert into scouter.custom_drift (created_at, {columns}, metric, value)
         select now() - {turn} * interval '1 minute', {entity}, {text}, {turn}"
    );
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

async fn archived(stage: &Stage, client: &Client) {
    let lsn = client.query_one("select pg_current_wal_insert_lsn()", &[]).await.unwrap().get(0);
    client.batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key").await.unwrap();
    stage.acknowledged(client, lsn, DEADLINE).await;
}

fn rows_with(stage: &Stage, folder: &str, text: &str) -> usize {
    archived_rows(&stage.storage().join(folder)).iter().filter(|row| row.contains(text)).count()
}

fn quiet(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_VERIFY_HOURS", "none")
}

async fn verified_and_purged(stage: &Stage, client: &Client, odd: u64) {
    let output = quiet(stage).output(&["verify", "--format", "json"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    assert_eq!((output.status.code(), &report["equal"]), (Some(0), &true.into()), "{report:#}");
    let psi = report["tables"].as_array().unwrap().iter().find(|table| table["kind"] == "psi").unwrap();
    assert_eq!(psi["quarantined_rows"], odd, "{report:#}");
    let count = |column: &str| psi[column].as_u64().unwrap();
    assert_eq!(count("postgres_rows"), count("archive_rows") + odd, "{report:#}");
    until("the old partition is purged", DEADLINE, async || {
        client.batch_execute("call highwater.purge_all()").await.unwrap();
        let gone = client.query_one("select to_regclass('scouter.old') is null", &[]).await.unwrap();
        archived(stage, client).await;
        gone.get::<_, bool>(0).then_some(())
    })
    .await;
}

/// `good` and `bad` are literals of texts that can be, and can't be, written in UTF-8; `shown` is what the quarantine has of the bad
/// one. They come by the first copy, by the stream, and after a restart.
async fn a_bad_text_keeps_nothing_but_its_row(encoding: &str, good: &str, bad: &[&str], shown: &str) {
    let shape = Shape::Named;
    let stage = Stage::encoded(shape, encoding).await;
    let client = stage.connect().await;
    client.batch_execute(OLD).await.unwrap();
    // A name that is not ASCII must not stop anything, either.
    client
        .batch_execute("alter table scouter.psi_drift add column \"größe\" text default 'groß'")
        .await
        .unwrap();
    let entity = format!("'s', {good}, '1'");
    let mut turn = 0;
    let mut all = async || {
        for text in [&[good][..], bad].concat() {
            turn += 1;
            insert(&client, shape, &entity, text, turn).await;
        }
        for text in bad {
            turn += 1;
            insert(&client, shape, &format!("'s', 'n', {text}"), "'plain'", turn).await;
        }
    };
    all().await;
    quiet(&stage).must(&["setup"]);
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    archived(&stage, &client).await;
    all().await;
    archived(&stage, &client).await;
    sidecar.kill();
    all().await;
    let sidecar = quiet(&stage).start();
    stage.streaming().await;
    archived(&stage, &client).await;

    for folder in ["psi", "custom"] {
        assert_eq!(rows_with(&stage, folder, "café"), 3, "{folder}: {}", sidecar.log());
    }
    let odd = 3 * 2 * bad.len();
    let quarantine = archived_rows(&stage.storage().join("quarantine"));
    assert_eq!(quarantine.len(), 2 * odd, "{quarantine:#?}");
    assert_eq!(rows_with(&stage, "quarantine", shown), 2 * odd, "{quarantine:#?}");
    if odd > 0 {
        // Of a bad row, the texts that can be read are.
        assert_eq!(rows_with(&stage, "quarantine", "café"), odd, "{quarantine:#?}");
        assert_eq!(rows_with(&stage, "quarantine", "größe"), odd, "{quarantine:#?}");
    }
    assert!(!sidecar.log().contains("not archiving"), "{}", sidecar.log());
    verified_and_purged(&stage, &client, odd as u64).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_an_sql_ascii_database() {
    a_bad_text_keeps_nothing_but_its_row(
        "SQL_ASCII",
        r"E'caf\xc3\xa9'",
        &[r"E'caf\xe9\x5c'"],
        r"caf\\\\xe9\\\\\\\\",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_win1252_database() {
    a_bad_text_keeps_nothing_but_its_row("WIN1252", r"E'caf\xe9'", &[r"E'caf\x81'"], r"caf\\\\x81").await;
}

/// Every byte of LATIN1 is a character.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_latin1_database() {
    a_bad_text_keeps_nothing_but_its_row("LATIN1", r"E'caf\xe9'", &[], "").await;
}

/// Names of entities, in another table than the rows.
#[tokio::test(flavor = "multi_thread")]
async fn an_entity_whose_name_is_null_or_not_utf8_keeps_only_its_own_rows() {
    let shape = Shape::Entity;
    let stage = Stage::encoded(shape, "SQL_ASCII").await;
    let client = stage.connect().await;
    client.batch_execute(OLD).await.unwrap();
    client
        .batch_execute(
            r"alter table scouter.drift_entities alter name drop not null, alter version drop not null;
              insert into scouter.drift_entities (id, space, name, version)
              values (1, 's', 'fine', '1'), (2, 's', E'caf\xe9', '1'), (3, 's', 'n', null)",
        )
        .await
        .unwrap();
    let mut turn = 0;
    let mut all = async || {
        for entity in ["1", "2", "3"] {
            turn += 1;
            insert(&client, shape, entity, "'f'", turn).await;
        }
    };
    all().await;
    quiet(&stage).must(&["setup"]);
    let sidecar = quiet(&stage).start();
    stage.streaming().await;
    archived(&stage, &client).await;
    all().await;
    // Those that the stream brings with the first of their rows.
    let sql = r"insert into scouter.drift_entities (id, space, name, version) values (4, 's', E'b\xe4d', '1'), (5, null, 'n', '1')";
    client.batch_execute("alter table scouter.drift_entities alter space drop not null").await.unwrap();
    client.batch_execute(sql).await.unwrap();
    for (turn, entity) in [(20, "4"), (21, "5")] {
        insert(&client, shape, entity, "'f'", turn).await;
    }
    archived(&stage, &client).await;
    let quarantine = archived_rows(&stage.storage().join("quarantine"));
    for (reason, rows) in [
        (r"entity_id names an entity in drift_entities whose name has bytes that are not UTF-8: caf\\xe9", 4),
        ("entity_id names an entity in drift_entities whose version is null", 4),
        (r"entity_id names an entity in drift_entities whose name has bytes that are not UTF-8: b\\xe4d", 2),
        ("entity_id names an entity in drift_entities whose space is null", 2),
    ] {
        assert_eq!(rows_with(&stage, "quarantine", reason), rows, "{reason}: {quarantine:#?}");
    }
    assert_eq!((quarantine.len(), rows_with(&stage, "psi", "fine")), (12, 2), "{quarantine:#?}");
    assert!(!sidecar.log().contains("not archiving"), "{}", sidecar.log());
    verified_and_purged(&stage, &client, 6).await;

    // The name is mended: rows from then on are archived.
    client.batch_execute("update scouter.drift_entities set version = '3' where id = 3").await.unwrap();
    insert(&client, shape, "3", "'f'", 30).await;
    archived(&stage, &client).await;
    assert_eq!(rows_with(&stage, "custom", r#""s"|"n"|"3""#), 1);
}
