//! Odd values arrive as they are, or in quarantine with their text; nothing is dropped.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::archived_rows;
use crate::support::schema::{Shape, entity_id};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

fn odd_texts() -> Vec<String> {
    let odd = [
        "",
        " ",
        "/",
        "../../etc",
        "a/b\\c",
        "it's",
        "say \"so\"",
        "line\nbreak\r\n\ttab",
        "🦀 größe 漢字 \u{202e}rtl",
        "null",
        "NULL",
        "\\N",
        "%2F?&=#",
        "\u{1}\u{7f}",
        "a|b,c;d",
        "{\"json\": [1]}",
    ];
    // Repetitive, since an index entry of the table must fit on a page once compressed.
    odd.into_iter().map(str::to_owned).chain(["long ".repeat(1_000), "ü".repeat(5_000)]).collect()
}

async fn insert_custom(client: &Client, created_at: &str, text: &str, value: Option<f64>) {
    let sql = format!(
        "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
         values ({created_at}, $1, $2, $3, $4, $5)"
    );
    client.execute(&sql, &[&text, &format!("{text}2"), &text, &text, &value]).await.expect("insert");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_texts_numbers_and_times_arrive_unchanged() {
    let stage = Stage::shared(Shape::Named).await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    for text in odd_texts() {
        insert_custom(&client, "clock_timestamp()", &text, Some(1.0)).await;
    }
    let numbers = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        -0.0,
        0.0,
        5e-324,
        -2.2e-308,
        f64::MIN_POSITIVE,
        f64::MAX,
        f64::MIN,
        0.1 + 0.2,
    ];
    for number in numbers.into_iter().map(Some).chain([None]) {
        insert_custom(&client, "clock_timestamp()", "number", number).await;
    }
    let times = [
        "1970-01-01 00:00:00+00",
        "1969-12-31 23:59:59.999999+00",
        "1900-02-28 12:00:00.000001+00",
        "0001-01-01 00:00:00+00",
        "9999-12-31 23:59:59.999999+00",
        "2000-01-01 00:00:00+00",
        "2024-02-29 23:59:59.9995+00",
    ];
    for time in times {
        insert_custom(&client, &format!("'{time}'"), "time", Some(2.0)).await;
    }
    let sql = "insert into scouter.spc_drift (space, name, version, feature, value)
               values ('s', 'n', '1', null, null), ('s', 'n', '1', null, null), ('s', 'n', '1', '', 'NaN')";
    client.execute(sql, &[]).await.unwrap();
    let sql = "insert into scouter.psi_drift (space, name, version, feature, bin_id, bin_count)
               values ('s', 'n', '1', 'f', -2147483648, 2147483647)";
    client.execute(sql, &[]).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    assert_eq!(archived_rows(&stage.storage().join("quarantine")), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn times_that_the_archive_cannot_hold_go_to_quarantine_with_their_text() {
    let stage = Stage::shared(Shape::Named).await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    let times = ["infinity", "-infinity", "20000-01-01 00:00:00+00", "0044-03-15 12:00:00+00 BC"];
    for time in times {
        insert_custom(&client, &format!("'{time}'"), &format!("at {time}"), Some(f64::NAN)).await;
    }
    stage.assert_archived(DEADLINE).await;
    let rows = archived_rows(&stage.storage().join("quarantine"));
    assert_eq!(rows.len(), times.len(), "{rows:#?}");
    for time in times {
        let metric = format!("at {time}");
        let matching = rows.iter().filter(|row| row.contains(&metric) && row.contains("custom_drift"));
        assert_eq!(matching.count(), 1, "{metric}: {rows:#?}");
    }
    // With the time itself, as Postgres writes it.
    for text in ["infinity", "-infinity", "20000-01-01", "BC"] {
        assert!(rows.iter().any(|row| row.contains(text)), "{text}: {rows:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entity_that_does_not_exist_goes_to_quarantine() {
    let stage = Stage::shared(Shape::Entity).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    let known = entity_id(&client, "s/1", "n\n2", "3").await;
    let sql = "insert into scouter.psi_drift (entity_id, feature, bin_id, bin_count)
               values ($1, 'known', 1, 1), (987654, 'unknown', 2, 2)";
    client.execute(sql, &[&known]).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    let rows = archived_rows(&stage.storage().join("quarantine"));
    assert_eq!(rows.len(), 1, "{rows:#?}");
    assert!(
        rows[0].contains("psi_drift") && rows[0].contains("987654") && rows[0].contains("unknown"),
        "{rows:#?}"
    );

    // Counted once only, whatever happens afterwards.
    sidecar.kill();
    let _sidecar = stage.launch().start();
    stage.assert_archived(DEADLINE).await;
    assert_eq!(archived_rows(&stage.storage().join("quarantine")).len(), 1);
}

/// The entity is made in the same transaction as its first rows, so no look-up from outside can see it.
#[tokio::test(flavor = "multi_thread")]
async fn an_entity_made_in_the_transaction_of_its_rows_is_found() {
    let stage = Stage::shared(Shape::Entity).await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    for number in 0..20 {
        let sql = format!(
            "with entity as (
                 insert into scouter.drift_entities (space, name, version, drift_type)
                 values ('s', 'n', '{number}', 'psi') returning id)
             insert into scouter.psi_drift (entity_id, feature, bin_id, bin_count)
             select id, 'f', {number}, 1 from entity"
        );
        client.batch_execute(&sql).await.unwrap();
    }
    stage.assert_archived(DEADLINE).await;
    assert_eq!(archived_rows(&stage.storage().join("quarantine")), Vec::<String>::new());
}

/// The watermarks say what is in the archive, while the sidecar runs and after.
#[tokio::test(flavor = "multi_thread")]
async fn the_watermarks_count_what_was_archived() {
    let stage = Stage::shared(Shape::Named).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    for number in 0..7 {
        stage.insert_one(&client, "accuracy", Some(f64::from(number))).await;
    }
    stage.assert_archived(DEADLINE).await;
    let counted = async || {
        let marks = stage.launch().watermarks();
        let table = marks["tables"].as_array()?.iter().find(|table| table["kind"] == "custom")?.clone();
        (table["row_count"] == 8).then_some(table)
    };
    let table = until("eight rows are counted", DEADLINE, counted).await;
    assert_eq!(table["state"], "streaming");
    assert!(table["source_table"].as_str().is_some_and(|name| name.ends_with("custom_drift")), "{table}");
    assert!(sidecar.terminate(DEADLINE).await.success());
    let marks = stage.launch().watermarks();
    assert_eq!(marks["slot"]["name"], stage.name.as_str());
    let entity = marks["entities"].as_array().and_then(|entities| entities.first()).expect("an entity");
    assert_eq!((entity["name"].as_str(), entity["row_count"].as_u64()), (Some("model"), Some(8)));
}
