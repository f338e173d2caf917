//! Queries while rows are archived and files are merged: no row twice, none missing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use arrow::array::AsArray as _;
use arrow::datatypes::Int64Type;
use chrono::{DateTime, TimeZone as _, Utc};
use futures::TryStreamExt as _;
use highwater::Archive;
use highwater::config::{Config, ObjectStorageSettings, SourceConfig};
use highwater::reader::{BinnedQuery, Bins};
use highwater::tables::Entity;
use tokio_postgres::Client;

use crate::support::archive::files;
use crate::support::schema::{Shape, entity_id};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(90);

/// Rows are this far apart, so that they fill some windows of a minute.
const STEP: i64 = 20_000;

fn settings(stage: &Stage) -> ObjectStorageSettings {
    ObjectStorageSettings::new(stage.storage().to_str().unwrap(), "").unwrap()
}

fn time(micros: i64) -> DateTime<Utc> {
    Utc.timestamp_micros(micros).unwrap()
}

fn model() -> Entity {
    Entity { space: "tests".to_owned(), name: "model".to_owned(), version: "1".to_owned() }
}

/// Inserts the rows `first..first + count` of the series, each with a count of 1, in one transaction.
async fn insert(client: &Client, base: i64, first: i64, count: i64) {
    let sql = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
               select 'epoch'::timestamptz + ($1::bigint + n * $2::bigint) * interval '1 microsecond',
                      'tests', 'model', '1', 'age', n % 7, 1 from generate_series($3::bigint, $4::bigint) n";
    client.execute(sql, &[&base, &STEP, &first, &(first + count - 1)]).await.unwrap();
}

/// How many rows an answer has, if they are the first ones of the series, each once.
async fn rows_of_prefix(archive: &Archive, base: i64) -> i64 {
    let sql = format!(
        "select count(*) as n, count(distinct t) as d, coalesce(max(t) + 1, 0) as m, coalesce(sum(c), 0) as c
           from (select (cast(created_at as bigint) - {base}) / {STEP} as t, bin_count as c
                   from psi where space = 'tests' and name = 'model' and version = '1')"
    );
    let batches = archive.sql(&sql).await.unwrap().collect().await.unwrap();
    let value = |name: &str| batches[0].column_by_name(name).unwrap().as_primitive::<Int64Type>().value(0);
    let (rows, distinct, most, counted) = (value("n"), value("d"), value("m"), value("c"));
    assert_eq!((rows, rows, rows), (distinct, most, counted), "rows, different ones, the last, counts");
    rows
}

/// The same by a binned query.
async fn rows_of_bins(archive: &Archive, base: i64) -> i64 {
    let width = Bins::new(Duration::from_millis(700)).unwrap();
    let (start, end) = (time(base), time(base + 100_000 * STEP));
    let query = BinnedQuery::new(model(), start, end, width).unwrap();
    let frame = archive.psi_frame(&query).await.unwrap();
    let mut batches = frame.execute_stream().await.unwrap();
    let (mut rows, mut last) = (0, 0);
    while let Some(batch) = batches.try_next().await.unwrap() {
        rows += batch
            .column_by_name("bin_count")
            .unwrap()
            .as_primitive::<Int64Type>()
            .values()
            .iter()
            .sum::<i64>();
        last = batch.num_rows();
    }
    assert!(rows == 0 || last > 0);
    rows
}

/// A thousand queries, of many tasks at once, while a writer commits, checkpoints come every 100 ms and windows are merged.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_queries_see_every_row_once() {
    const TASKS: usize = 20;
    const QUERIES: usize = 50;
    let stage = Arc::new(Stage::shared(Shape::Named).await);
    let launch = stage.launch().with("HIGHWATER_WINDOW", "1m").with("HIGHWATER_MAX_LAG", "100ms");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let base = (Utc::now() - Duration::from_secs(3600)).timestamp_micros();
    let client = stage.connect().await;
    insert(&client, base, 0, 10).await;
    let archived =
        async || files(&stage.storage().join("psi")).ok().filter(|files| !files.is_empty()).map(drop);
    until("the first rows are archived", DEADLINE, archived).await;

    let archive = Archive::open(&settings(&stage)).await.unwrap();
    let (is_over, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(10)));
    let writer = {
        let (stage, is_over, committed) = (Arc::clone(&stage), Arc::clone(&is_over), Arc::clone(&committed));
        tokio::spawn(async move {
            let client = stage.connect().await;
            while !is_over.load(Ordering::Relaxed) {
                let first = committed.load(Ordering::Relaxed);
                let count = 1 + first % 23;
                insert(&client, base, first, count).await;
                committed.store(first + count, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
        })
    };
    let (moves, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicI64::new(0)));
    let reader = |task: usize| {
        let (archive, moves, most) = (archive.clone(), Arc::clone(&moves), Arc::clone(&most));
        tokio::spawn(async move {
            let mut seen = 0;
            for number in 0..QUERIES {
                // Not before each, so that versions that are not the newest are read, too.
                if number % 5 == 0 {
                    moves.fetch_add(usize::from(archive.refresh().await.unwrap()), Ordering::Relaxed);
                }
                let rows = match (task + number) % 2 {
                    0 => rows_of_prefix(&archive, base).await,
                    _ => rows_of_bins(&archive, base).await,
                };
                assert!(rows >= seen, "{rows} rows after {seen}");
                seen = rows;
            }
            most.fetch_max(seen, Ordering::Relaxed);
        })
    };
    for reader in (0..TASKS).map(reader).collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    is_over.store(true, Ordering::Relaxed);
    writer.await.unwrap();
    let log = sidecar.log();
    let merges = log.matches("merged a window").count();
    let moves = moves.load(Ordering::Relaxed);
    let (most, committed) = (most.load(Ordering::Relaxed), committed.load(Ordering::Relaxed));
    eprintln!(
        "{} queries: {moves} moves to a newer version, {merges} merges, {most} of {committed} rows",
        TASKS * QUERIES
    );
    assert!(moves > 20 && merges > 0 && most > 500, "nothing happened meanwhile: {moves} {merges} {most}");
    // What is at rest is complete.
    let rest = async || {
        archive.refresh().await.unwrap();
        (rows_of_prefix(&archive, base).await == committed).then_some(())
    };
    until("everything is archived", DEADLINE, rest).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

fn config(stage: &Stage) -> Config {
    let source = SourceConfig::new(Some(&stage.cluster().uri_unix(&stage.name)), &|_| None).unwrap();
    let mut config = Config::new(source, settings(stage));
    config.slot.clone_from(&stage.name);
    config
}

/// With the database the answer is complete up to now, whatever is archived by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fresh_rows_are_joined_without_overlap_or_hole() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_WINDOW", "1m").with("HIGHWATER_MAX_LAG", "500ms");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let base = (Utc::now() - Duration::from_secs(3600)).timestamp_micros();
    let client = stage.connect().await;
    insert(&client, base, 0, 5).await;
    let archived =
        async || files(&stage.storage().join("psi")).ok().filter(|files| !files.is_empty()).map(drop);
    until("the first rows are archived", DEADLINE, archived).await;
    let archive = Archive::open(&settings(&stage)).await.unwrap();
    let live = archive.clone().with_database(config(&stage));
    let (mut committed, mut ahead) = (5, 0);
    for round in 0..25 {
        let count = 1 + round % 17;
        insert(&client, base, committed, count).await;
        committed += count;
        // Rows of a transaction that is open are not there yet, and don't hide those that are.
        let mut open = stage.connect().await;
        let open = open.transaction().await.unwrap();
        open.execute(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                      values (now(), 'tests', 'model', '1', 'open', 0, 1)",
            &[],
        )
        .await
        .unwrap();
        assert_eq!(rows_of_bins(&live, base).await, committed, "round {round}");
        ahead += i64::from(rows_of_bins(&archive, base).await < committed);
        open.rollback().await.unwrap();
    }
    eprintln!("in {ahead} of 25 rounds the archive was behind");
    assert!(ahead > 5, "the archive was never behind");

    // A checkpoint without a row of the table moves its watermark, and not its log.
    let target = stage.insert_one(&client, "other", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    assert_eq!(rows_of_bins(&live, base).await, committed);
    let mut typo = config(&stage);
    typo.slot = "typo".to_owned();
    let lost = archive.clone().with_database(typo);
    let query = BinnedQuery::with_points(model(), time(base), time(base + STEP), 10).unwrap();
    let error = lost.binned_psi(&query).await.unwrap_err().to_string();
    assert!(error.contains("no table is archived through it"), "{error}");

    // Nobody archives: all the same. A late row, and rows that are equal in every column.
    sidecar.kill();
    insert(&client, base, committed, 100).await;
    insert(&client, base - 86_400_000_000 * 40, 0, 1).await;
    assert_eq!(rows_of_bins(&live, base).await, committed + 100);
    let late = BinnedQuery::with_points(model(), time(base - 86_400_000_000 * 41), time(base), 10).unwrap();
    assert_eq!(live.binned_psi(&late).await.unwrap()[0].created_at.len(), 1);
    assert!(archive.binned_psi(&late).await.unwrap().is_empty());

    // Another storage than the one that the watermark speaks of is refused.
    let other = Stage::shared(Shape::Named).await;
    let mut others = other.start().await;
    other.assert_archived(DEADLINE).await;
    let wrong = Archive::open(&settings(&other)).await.unwrap().with_database(config(&stage));
    let error = wrong.binned_psi(&late).await.unwrap_err().to_string();
    assert!(error.contains("the archive that the watermark of scouter.psi_drift speaks of"), "{error}");
    assert!(others.terminate(DEADLINE).await.success(), "{}", others.log());
}

/// Rows that are archived and purged after the archive's version was read, and before Postgres is, are in the answer.
#[cfg(feature = "failpoints")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rows_that_are_purged_while_they_are_read_are_not_missing() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "1h").with("HIGHWATER_VERIFY_HOURS", "none");
    launch.must(&["setup"]);
    let _sidecar = launch.start();
    stage.streaming().await;
    let client = stage.connect().await;
    client.batch_execute("update highwater.retention set retention = '0'").await.unwrap();
    let base = (Utc::now() - Duration::from_secs(3600)).timestamp_micros();
    let ask =
        "select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key";
    let purged = async |client: &Client| {
        until("all is archived and purged", DEADLINE, async || {
            client.batch_execute(ask).await.unwrap();
            client.batch_execute("call highwater.purge_all()").await.unwrap();
            let left = client.query_one("select count(*) from scouter.psi_drift", &[]).await.unwrap();
            (left.get::<_, i64>(0) == 0).then_some(())
        })
        .await;
    };
    insert(&client, base, 0, 5).await;
    purged(&client).await;
    let live = Archive::open(&settings(&stage)).await.unwrap().with_database(config(&stage));
    insert(&client, base, 5, 7).await;

    let hits = Arc::new(AtomicUsize::new(0));
    let (runtime, stage, counted) = (tokio::runtime::Handle::current(), Arc::new(stage), Arc::clone(&hits));
    let (place, thread) = (Arc::clone(&stage), std::thread::current().id());
    fail::cfg_callback("before-fresh", move || {
        // Other tests read fresh rows, too.
        if std::thread::current().id() == thread && counted.fetch_add(1, Ordering::Relaxed) == 0 {
            let work = async { purged(&place.connect().await).await };
            tokio::task::block_in_place(|| runtime.block_on(work));
        }
    })
    .unwrap();
    let rows = rows_of_bins(&live, base).await;
    fail::remove("before-fresh");
    assert_eq!(rows, 12);
    assert_eq!(hits.load(Ordering::Relaxed), 2, "it was read again, once");
}

/// Rows that are equal in every column, some archived and some not; entities by their ids.
#[tokio::test(flavor = "multi_thread")]
async fn equal_rows_are_counted_on_both_sides() {
    let stage = Stage::shared(Shape::Entity).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    let id = entity_id(&client, "tests", "model", "1").await;
    // Without a feature rows are not unique.
    let insert = async |value: f64| {
        let sql = "insert into scouter.spc_drift (created_at, entity_id, feature, value) values ('2026-11-01', $1, null, $2)";
        client.execute(sql, &[&id, &value]).await.unwrap();
    };
    insert(1.0).await;
    insert(1.0).await;
    insert(4.0).await;
    stage.assert_archived(DEADLINE).await;
    sidecar.kill();
    insert(1.0).await;
    let live = Archive::open(&settings(&stage)).await.unwrap().with_database(config(&stage));
    let query = BinnedQuery::with_points(model(), time(0), Utc::now(), 10).unwrap();
    let found = live.binned_spc(&query).await.unwrap();
    assert_eq!(found.features[""].values, [7.0 / 4.0]);
    let out = stage.launch().must(&[
        "query",
        "spc",
        "--space",
        "tests",
        "--name",
        "model",
        "--version",
        "1",
        "--from",
        "2026-11-01",
        "--bin",
        "1d",
        "--fresh",
        "--format",
        "csv",
    ]);
    assert_eq!(
        out,
        "created_at,feature,value,count,nulls,nans,min,max\n2026-11-01T00:00:00Z,,1.75,4,0,0,1.0,4.0\n"
    );
}
