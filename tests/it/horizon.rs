//! The horizon `archived_before`: soon past every archived transaction, never past one that is not.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::schema::{KINDS, Shape};
use crate::support::stage::Stage;
use crate::support::wait::{throughout, until};

/// On a server that writes nothing else, the next position is recorded after ten seconds or so.
const IDLE_DEADLINE: Duration = Duration::from_secs(40);

/// Several checkpoints, and several positions recorded with nothing to archive.
const WATCH: Duration = Duration::from_secs(15);

/// Its own server: a transaction of any database holds the horizon of all.
async fn stage() -> Stage {
    Stage::private(Shape::Named, &[("fsync", "off"), ("max_prepared_transactions", "5")]).await
}

/// The lowest horizon of the three tables; 0 while one has none.
async fn horizon(client: &Client) -> u64 {
    let sql = "select min(coalesce(archived_before::text::bigint, 0)), count(*) from highwater.watermark";
    let row = client.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(1), 3, "a watermark for each table");
    u64::try_from(row.get::<_, i64>(0)).unwrap()
}

/// The highest horizon of the three.
async fn furthest(client: &Client) -> u64 {
    let sql = "select max(coalesce(archived_before::text::bigint, 0)) from highwater.watermark";
    u64::try_from(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0)).unwrap()
}

/// The id of the open transaction.
async fn transaction_id(client: &Client) -> u64 {
    let row = client.query_one("select pg_current_xact_id()::text", &[]).await.unwrap();
    row.get::<_, String>(0).parse().unwrap()
}

/// Inserts a row of every kind in one transaction; its id.
async fn insert_everywhere(client: &Client, series: &str) -> u64 {
    client.batch_execute("begin").await.unwrap();
    let id = insert_rows(client, series).await;
    client.batch_execute("commit").await.unwrap();
    id
}

async fn insert_rows(client: &Client, series: &str) -> u64 {
    for kind in KINDS {
        let columns = kind.value_columns();
        let numbers = vec!["1"; columns.len() - 1].join(", ");
        let sql = format!(
            "insert into scouter.{} (created_at, space, name, version, {})
             values (clock_timestamp(), 's', 'n', '1', $1, {numbers})",
            kind.table(),
            columns.join(", ")
        );
        client.execute(&sql, &[&series]).await.unwrap();
    }
    transaction_id(client).await
}

/// Waits until the horizon is past a transaction, on a server that writes nothing else.
async fn passes(client: &Client, id: u64) {
    let passed = async || (horizon(client).await > id).then_some(());
    until("the horizon is past the transaction", IDLE_DEADLINE, passed).await;
}

/// Watches that no horizon passes an unfinished transaction while newer ones are archived.
async fn stays_before(client: &Client, id: u64) {
    let mut number = 0;
    throughout("the horizon is not past the unfinished transaction", WATCH, async || {
        number += 1;
        insert_everywhere(client, &format!("newer {number}")).await;
        furthest(client).await <= id
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_passes_an_archived_transaction_also_on_an_idle_server() {
    let stage = stage().await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    for number in 0..2 {
        let id = insert_everywhere(&client, &format!("row {number}")).await;
        // Nothing else is written from here on but what the sidecar writes itself.
        passes(&client, id).await;
        stage.assert_same().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_follows_a_stream_of_rows_within_seconds() {
    let stage = stage().await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    let first = insert_everywhere(&client, "first").await;
    let mut number = 0;
    until("the horizon is past the first of many transactions", Duration::from_secs(10), async || {
        number += 1;
        insert_everywhere(&client, &format!("row {number}")).await;
        (horizon(&client).await > first).then_some(())
    })
    .await;
}

/// An old transaction with savepoints stays open while newer ones are archived.
#[tokio::test(flavor = "multi_thread")]
async fn it_never_passes_an_open_transaction() {
    let stage = stage().await;
    let mut sidecar = stage.start().await;
    let (client, long) = (stage.connect().await, stage.connect().await);
    insert_everywhere(&client, "before").await;
    long.batch_execute("begin").await.unwrap();
    let id = insert_rows(&long, "long").await;
    long.batch_execute("savepoint a").await.unwrap();
    insert_rows(&long, "released").await;
    long.batch_execute("release a; savepoint b").await.unwrap();
    insert_rows(&long, "taken back").await;
    long.batch_execute("rollback to b; savepoint c").await.unwrap();
    insert_rows(&long, "open savepoint").await;

    stays_before(&client, id).await;
    let row = client.query_one("select max(row_count) from highwater.watermark", &[]).await.unwrap();
    assert!(row.get::<_, i64>(0) > 5, "newer transactions were archived in the meantime");

    // Committed, but nobody is there to archive it.
    sidecar.kill();
    long.batch_execute("commit").await.unwrap();
    assert!(furthest(&client).await <= id);
    let _sidecar = stage.launch().start();
    passes(&client, id).await;
    stage.assert_same().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_never_passes_a_prepared_transaction() {
    let stage = stage().await;
    let _sidecar = stage.start().await;
    let (client, other) = (stage.connect().await, stage.connect().await);
    other.batch_execute("begin").await.unwrap();
    let id = insert_rows(&other, "prepared").await;
    other.batch_execute("prepare transaction 'waiting'").await.unwrap();
    // Its session ends; the transaction doesn't.
    drop(other);
    stays_before(&client, id).await;
    client.batch_execute("commit prepared 'waiting'").await.unwrap();
    passes(&client, id).await;
    stage.assert_same().await;
}
