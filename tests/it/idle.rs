//! Little or nothing to archive: the slot must hold no WAL, and a single row must not wait for company.

use std::time::{Duration, Instant};

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_follows_a_busy_database_whose_drift_tables_are_idle() {
    let stage = Stage::shared(Shape::Named).await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    client.batch_execute("create table busy (filler text)").await.unwrap();
    for _ in 0..5 {
        // Some 60 MB of WAL that is not ours.
        let sql = "insert into busy select repeat(md5(n::text), 30) from generate_series(1, 50000) n";
        client.batch_execute(sql).await.unwrap();
    }
    let sql = "select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), confirmed_flush_lsn)::bigint
                 from pg_replication_slots where slot_name = $1";
    let retained = async || client.query_one(sql, &[&stage.name]).await.unwrap().get::<_, i64>(0);
    // Next to nothing: less than one segment of WAL.
    let small = async || (retained().await < 16 << 20).then_some(());
    until("the slot holds next to no WAL", Duration::from_secs(90), small).await;
    let row = client.query_one("select flushed_lsn <= confirmed_flush_lsn from highwater.watermark, pg_replication_slots s where s.slot_name = $1 limit 1", &[&stage.name]).await;
    assert!(row.is_ok(), "{row:?}");
    stage.assert_archived(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_row_is_durable_within_the_bound() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "3s");
    launch.must(&["setup"]);
    let _sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    for number in 0..3 {
        stage.insert_one(&client, "single", Some(f64::from(number))).await;
        let start = Instant::now();
        let rows =
            async || (archived_rows(&stage.storage().join("custom")).len() > number as usize).then_some(());
        until("the row is archived", Duration::from_secs(30), rows).await;
        // The bound, and what a busy machine needs for the commit itself.
        assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    }
}

/// Everybody may ask for a checkpoint, as often as they like: those who wait share one.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_that_many_ask_for_are_made_once_for_all() {
    const REQUESTS: usize = 1000;
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch();
    launch.must(&["setup"]);
    let _sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    let log = stage.storage().join("psi/_delta_log");
    let entries = || std::fs::read_dir(&log).map_or(0, Iterator::count);
    let before = entries();
    let sql = format!(
        "do $$ begin for n in 1..{REQUESTS} loop
             perform pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key; commit; end loop; end $$"
    );
    client.batch_execute(&sql).await.unwrap();
    let last = "select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key)::text from highwater.request_key";
    let target: String = client.query_one(last, &[]).await.unwrap().get(0);
    until("the last request is answered", Duration::from_secs(120), async || {
        let sql = "select bool_and(flushed_lsn >= $1::text::pg_lsn) from highwater.watermark";
        client.query_one(sql, &[&target]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    let made = entries() - before;
    assert!((1..REQUESTS / 2).contains(&made), "{made} entries for {REQUESTS} requests");
}
