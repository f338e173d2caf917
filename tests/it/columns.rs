//! The columns of a table change while it is archived: added, dropped, renamed, widened, of another type.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::archive::{archived_rows, assert_portable};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

const SECTION: &str = "[[table]]\nsource = 'public.events'\ntime = 'at'\nexclude = ['inner']\n";

const TABLE: &str = "
    create table public.events (id bigint, at timestamptz not null, n integer, word varchar(5), price numeric(10, 2), \"inner\" text)
        partition by range (at);
    create table public.events_old partition of public.events for values from ('2024-05-01') to ('2024-06-01');
    create table public.events_new partition of public.events default";

fn settings(stage: &Stage) -> PathBuf {
    let file = stage.folder().join("highwater.toml");
    fs::write(&file, SECTION).unwrap();
    file
}

async fn events() -> (Stage, Client, Launch) {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client.batch_execute(TABLE).await.unwrap();
    let launch = stage.launch().configured(&settings(&stage)).with("HIGHWATER_VERIFY_HOURS", "none");
    launch.must(&["setup"]);
    (stage, client, launch)
}

/// Rows of both partitions.
async fn insert(client: &Client, columns: &str, values: &str, ids: std::ops::Range<i64>) {
    let sql = format!(
        "insert into public.events (id, at, {columns})
         select i, case when i % 2 = 0 then timestamptz '2024-05-03 00:00:00Z' + i * interval '1 minute' else now() end, {values}
         from generate_series({}::bigint, {}) i",
        ids.start,
        ids.end - 1
    );
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn rows(stage: &Stage, sql: &str) -> Vec<Value> {
    let answer = stage.launch().must(&["sql", sql, "--format", "json"]);
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

fn verify(launch: &Launch, arguments: &[&str]) -> (Value, i32) {
    let output =
        launch.output(&[&["verify", "--format", "json", "--table", "public.events"], arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    (report["tables"][0].clone(), output.status.code().unwrap())
}

fn assert_equal(launch: &Launch, rows: u64) {
    let (table, code) = verify(launch, &[]);
    assert_eq!(
        (code, table["archive_rows"].as_u64(), table["postgres_rows"].as_u64()),
        (0, Some(rows), Some(rows)),
        "{table:#}"
    );
    assert_eq!(table["quarantined_rows"], 0, "{table:#}");
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn columns_come_and_go_while_rows_do() {
    let (stage, client, launch) = events().await;
    insert(&client, "n, word, price", "i, 'w' || i % 3, i / 4.0", 0..10).await;
    let mut sidecar = launch.start();
    stage.streaming().await;
    insert(&client, "n, word, price", "i, 'w' || i % 3, i / 4.0", 10..20).await;
    archived(&client).await;

    // Added, one with a default, which rows from before have, too; and one that nobody sees.
    client.batch_execute("begin; alter table public.events add column never text; insert into public.events (id, at, never) values (1, now(), 'x'); rollback").await.unwrap();
    client
        .batch_execute(
            "begin;
             alter table public.events add column extra text, add column level integer default 7, add column raw numeric;
             insert into public.events (id, at, n, extra, level) values (20, now(), 20, 'first', 8);
             commit",
        )
        .await
        .unwrap();
    insert(&client, "n, extra", "i, 'e' || i", 21..30).await;
    archived(&client).await;
    let found = rows(&stage, "select id, extra, level, raw from events where id in (3, 20, 21) order by id");
    assert_eq!(
        found,
        [
            json!({"id": 3}),
            json!({"id": 20, "extra": "first", "level": 8}),
            json!({"id": 21, "extra": "e21", "level": 7})
        ]
        .map(|row| json!({"id": row["id"], "extra": row["extra"], "level": row["level"], "raw": null}))
    );
    assert_equal(&launch, 30);
    // Each bit of them counts.
    for (column, other, back) in
        [("extra", "'z'", "'first'"), ("level", "9", "8"), ("extra", "null", "'first'")]
    {
        client
            .batch_execute(&format!("update public.events set {column} = {other} where id = 20"))
            .await
            .unwrap();
        let (table, code) = verify(&launch, &[]);
        assert_eq!(code, 1, "{column} = {other}: {table:#}");
        client
            .batch_execute(&format!("update public.events set {column} = {back} where id = 20"))
            .await
            .unwrap();
    }

    // Widened, renamed and dropped, between rows, over a kill.
    client
        .batch_execute(
            "alter table public.events alter column n type bigint, alter column word type text;
             alter table public.events rename column word to title",
        )
        .await
        .unwrap();
    insert(&client, "n, title, extra", "i * 3000000000, 'a longer word', 'e'", 30..40).await;
    sidecar.kill();
    client.batch_execute("alter table public.events drop column price, drop column raw").await.unwrap();
    insert(&client, "n, title", "i, null", 40..50).await;
    client.batch_execute("alter table public.events add column price text").await.unwrap();
    let sidecar = launch.start();
    stage.streaming().await;
    archived(&client).await;
    let found =
        rows(&stage, "select id, n, word, title, price from events where id in (8, 31, 41) order by id");
    assert_eq!(
        found,
        [
            json!({"id": 8, "n": 8, "word": "w2", "title": null, "price": 2.0}),
            json!({"id": 31, "n": 93_000_000_000_i64, "word": null, "title": "a longer word", "price": null}),
            json!({"id": 41, "n": 41, "word": null, "title": null, "price": null}),
        ]
    );
    // A column of the name of one that is gone, and of another type, is not what it was.
    let (table, code) = verify(&launch, &[]);
    assert_eq!((code, &table["unfit_columns"][0]["column"]), (1, &json!("price")), "{table:#}");
    client.batch_execute("alter table public.events drop column price").await.unwrap();
    assert_equal(&launch, 50);

    // Each row gets a value of its own, which none of the archive has.
    client
        .batch_execute("alter table public.events add column token uuid default gen_random_uuid()")
        .await
        .unwrap();
    insert(&client, "n, title", "i, 'x'", 50..51).await;
    archived(&client).await;
    assert_equal(&launch, 51);
    let found = rows(&stage, "select count(token) as tokens, count(*) as rows from events");
    assert_eq!(found, [json!({"tokens": 1, "rows": 51})]);

    // What is copied anew is compared by what is left; nothing is added.
    launch.must(&["resync", "public.events"]);
    let state = "select state from highwater.watermark where source_table = 'public.events'";
    until("the table is compared", DEADLINE, async || {
        (client.query_one(state, &[]).await.unwrap().get::<_, &str>(0) == "streaming").then_some(())
    })
    .await;
    insert(&client, "n, title", "i, 'x'", 51..52).await;
    archived(&client).await;
    assert_equal(&launch, 52);
    assert_eq!(archived_rows(&stage.storage().join("events")).len(), 52);
    assert_portable(&stage.storage().join("events"));
    client.batch_execute("insert into highwater.retention values ('public.events', interval '30 days') on conflict (source_table) do update set retention = excluded.retention").await.unwrap();
    let purged = launch.must(&["purge"]);
    let left: i64 = client.query_one("select count(*) from public.events", &[]).await.unwrap().get(0);
    assert_eq!(left, 27, "{purged}");
    let log = sidecar.log();
    for column in ["column \"title\" (text)", "column \"token\" (uuid)"] {
        assert_eq!(log.matches(&format!("{column} is archived from now on")).count(), 1, "{log}");
    }
}

/// Before and after the entry that adds the columns, with the row that needs them on its way.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_each_step_of_an_added_column_loses_nothing() {
    let (stage, client, launch) = events().await;
    let mut ids = 0..10;
    let sidecar = launch.start();
    stage.streaming().await;
    insert(&client, "n", "i", ids.clone()).await;
    archived(&client).await;
    drop(sidecar);
    for step in [
        "before-columns",
        "after-columns",
        "after-upload",
        "between-tables",
        "after-delta-commit",
        "before-watermark",
    ] {
        let column = step.replace('-', "_");
        ids = ids.end..ids.end + 4;
        client
            .batch_execute(&format!("alter table public.events add column {column} text default 'd'"))
            .await
            .unwrap();
        insert(&client, &format!("n, {column}"), "i, 'v' || i", ids.clone()).await;
        let mut failing = launch.clone().failing(&format!("{step}=return")).start();
        let status = failing.wait(DEADLINE).await;
        assert!(!status.success(), "{step}: ended with {status} instead of a crash");
    }
    let _sidecar = launch.start();
    stage.streaming().await;
    archived(&client).await;
    assert_equal(&launch, u64::try_from(ids.end).unwrap());
    let found = rows(
        &stage,
        "select before_columns as b, after_columns as a from events where id in (9, 10, 14) order by id",
    );
    assert_eq!(
        found,
        [json!({"b": null, "a": null}), json!({"b": "v10", "a": null}), json!({"b": "d", "a": "v14"})]
    );
}

/// A value that its column in the archive can't hold keeps its row in the quarantine, and what holds it from being purged, until
/// the column is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_the_archive_can_not_hold_is_told_and_nothing_is_purged() {
    let (stage, client, launch) = events().await;
    let _sidecar = launch.start();
    stage.streaming().await;
    insert(&client, "n", "i", 0..10).await;
    archived(&client).await;
    client.batch_execute("alter table public.events alter column n type text").await.unwrap();
    insert(&client, "n", "'t' || i", 10..20).await;
    archived(&client).await;
    let quarantined = rows(
        &stage,
        "select count(*) as rows, min(reason) as reason from quarantine where source_table = 'public.events'",
    );
    // Those of before, too, once they are compared: the server has written all of them anew.
    assert!(quarantined[0]["rows"].as_i64().unwrap() >= 10, "{quarantined:?}");
    let (table, code) = verify(&launch, &[]);
    let unfit = &table["unfit_columns"][0];
    let checked = String::from_utf8_lossy(&launch.output(&["check"]).stdout).into_owned();
    assert!(
        checked.contains("public.events.n") && checked.contains("its archive was made for integer"),
        "{checked}"
    );
    assert_eq!((code, &unfit["column"]), (1, &json!("n")), "{table:#}");
    assert!(
        unfit["problem"].as_str().unwrap().contains("is of type text, and its archive was made for integer"),
        "{unfit}"
    );
    client.batch_execute("insert into highwater.retention values ('public.events', interval '30 days') on conflict (source_table) do update set retention = excluded.retention").await.unwrap();
    let output = launch.output(&["purge"]);
    let left: i64 = client.query_one("select count(*) from public.events", &[]).await.unwrap().get(0);
    assert_eq!(left, 20, "{}", String::from_utf8_lossy(&output.stdout));
    // Nor can it have every name.
    client
        .batch_execute("alter table public.events add column \"a b\" text, add column \"N\" text, add column \"Twin\" text, add column twin text")
        .await
        .unwrap();
    let (table, _) = verify(&launch, &[]);
    let names: Vec<&str> = table["unfit_columns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|unfit| unfit["column"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["n", "a b", "N", "twin"], "{table:#}");
    client.batch_execute("alter table public.events drop column \"a b\", drop column \"N\", drop column \"Twin\", drop column twin").await.unwrap();
    client
        .batch_execute("delete from public.events where id >= 10; alter table public.events alter column n type bigint using n::bigint")
        .await
        .unwrap();
    insert(&client, "n", "i", 20..30).await;
    archived(&client).await;
    assert_equal(&launch, 20);
}

/// What the tables that come with the program have beside their columns is archived, too; what they keep for themselves is not.
#[tokio::test(flavor = "multi_thread")]
async fn drift_tables_may_have_more_columns() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let sidecar = stage.start().await;
    stage.insert_one(&client, "before", Some(1.0)).await;
    client
        .batch_execute(
            "alter table scouter.custom_drift add column if not exists updated_at timestamptz, add column note text, add column weight real;
             insert into scouter.custom_drift (created_at, space, name, version, metric, value, note, weight, updated_at)
             values (now(), 's', 'n', '1', 'after', 2.0, 'a note', 0.5, now())",
        )
        .await
        .unwrap();
    archived(&client).await;
    let found = rows(&stage, "select metric, note, weight from custom order by created_at");
    assert_eq!(
        found,
        [
            json!({"metric": "before", "note": null, "weight": null}),
            json!({"metric": "after", "note": "a note", "weight": 0.5})
        ]
    );
    let output = stage.launch().output(&["verify"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let log = sidecar.log();
    assert!(!log.contains("\"updated_at\""), "{log}");
    let answer = stage.launch().must(&[
        "query",
        "custom",
        "--space",
        "s",
        "--name",
        "n",
        "--version",
        "1",
        "--from",
        "-1d",
        "--format",
        "json",
    ]);
    assert!(answer.contains("after"), "{answer}");
}
