//! The purge under load: with everything that fails meanwhile, and beside writers and readers who must not notice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::load::Load;
use crate::support::schema::Shape;
use crate::support::shadow;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::tmpfs::Tmpfs;
use crate::support::wait::{pause, until, within};

const DEADLINE: Duration = Duration::from_secs(300);

/// How often something is broken. `TEST_PURGE_TURNS` for more.
const TURNS: u32 = 4;

/// How many partitions come and go.
const PARTITIONS: usize = 10;

/// A task that does one thing over and over until it is told to stop.
struct Worker {
    stop: Arc<AtomicBool>,
    task: JoinHandle<u64>,
}

impl Worker {
    fn start<F: Future<Output = u64> + Send + 'static>(work: impl FnOnce(Arc<AtomicBool>) -> F) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        Self { task: tokio::spawn(work(Arc::clone(&stop))), stop }
    }

    /// What it has counted.
    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("a worker panicked")
    }
}

fn goes_on(stop: &AtomicBool) -> bool {
    !stop.load(Ordering::Relaxed)
}

/// Rows that are committed in two phases, some after seconds, with a savepoint that is taken back.
async fn prepare(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut turn = 0;
    while goes_on(&stop) {
        let row = |text: &str| {
            format!(
                "insert into scouter.spc_drift (created_at, space, name, version, feature, value)
                 select clock_timestamp() - random() * interval '20 days', 's', 'n', '1', '{text} {turn} ' || n, n
                 from generate_series(1, 20) n;"
            )
        };
        let sql = format!(
            "begin; {} savepoint a; {} rollback to a; savepoint b; {} release b; prepare transaction 'two {turn}'",
            row("prepared"),
            row("taken back"),
            row("under a savepoint")
        );
        client.batch_execute(&sql).await.expect("prepare");
        pause(if turn % 5 == 0 { 2500 } else { 100 }).await;
        let end = if turn % 7 == 6 { "rollback" } else { "commit" };
        client.batch_execute(&format!("{end} prepared 'two {turn}'")).await.expect("second phase");
        turn += 1;
    }
    turn
}

/// Transactions that stay open for seconds while others come and go.
async fn linger(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut turn = 0;
    while goes_on(&stop) {
        for step in 0..3 {
            let begin = if step == 0 { "begin;" } else { "" };
            let sql = format!(
                "{begin} savepoint s{step};
                 insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                 select clock_timestamp() - random() * interval '40 days', 's', 'n', '1', 'long {turn} {step} ' || n, n
                 from generate_series(1, 10) n"
            );
            client.batch_execute(&sql).await.expect("insert");
            pause(900).await;
        }
        client.batch_execute("rollback to s2; commit").await.expect("commit");
        turn += 1;
    }
    turn
}

/// Makes partitions of past days, and writes a few rows into each once it is covered; how many were made.
async fn partition(client: Client, stop: Arc<AtomicBool>, mut rng: StdRng) -> u64 {
    let mut made = 0;
    let (mut days, mut filled) = (Vec::new(), BTreeSet::new());
    while goes_on(&stop) {
        // Older than all that the load writes: a partition that is first seen with rows in it would be a gap.
        let day = rng.random_range(2001..4000);
        let sql = format!(
            "do $$ declare low timestamptz := date_trunc('day', now(), 'UTC') - {day} * interval '1 day'; begin
                 execute format('create table scouter.day_{made} partition of scouter.psi_drift for values from (%L) to (%L)',
                                low, low + interval '1 day'); end $$"
        );
        // The default partition may hold rows of that day.
        if days.len() < PARTITIONS && client.batch_execute(&sql).await.is_ok() {
            made += 1;
        }
        let covered = "select partition_name from highwater.covered_partition where partition_name like 'scouter.day_%'";
        for row in client.query(covered, &[]).await.expect("covered partitions") {
            let name: String = row.get(0);
            if filled.insert(name.clone()) {
                let sql = format!(
                    "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                     select (regexp_match(pg_get_expr(relpartbound, oid), $$'([^']*)'$$))[1]::timestamptz + n * interval '1 minute',
                            's', 'n', '1', 'of a partition', n, n
                     from generate_series(1, 100) n, pg_class where oid = to_regclass('{name}')"
                );
                client.batch_execute(&sql).await.expect("rows of a partition");
            }
        }
        // A late row for a day of which the partition may be verified, being dropped, or gone.
        if days.len() < PARTITIONS {
            days.push(day);
        }
        let late = days[rng.random_range(0..days.len())];
        let sql = format!(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             select now() - {late} * interval '1 day', 's', 'n', '1', 'late', {}, 1
             where exists (select from highwater.purge_log where action = 'dropped')",
            rng.random_range(0..i32::MAX)
        );
        client.batch_execute(&sql).await.expect("a late row");
        pause(500).await;
    }
    made
}

/// Calls the purge again and again.
async fn purge(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut calls = 0;
    while goes_on(&stop) {
        client.batch_execute("call highwater.purge_all()").await.expect("purge");
        calls += 1;
    }
    calls
}

/// Verifies the partitions again and again; how often that came to an end.
async fn verify(client: Client, launch: Launch, stop: Arc<AtomicBool>) -> u64 {
    let mut done = 0;
    while goes_on(&stop) {
        let due = "select to_char(b.low at time zone 'UTC', 'YYYY-MM-DD'), to_char(b.low at time zone 'UTC' + interval '1 day', 'YYYY-MM-DD')
                   from highwater.covered_partition p join pg_class c on c.oid = p.partition_oid,
                        lateral (select (regexp_match(pg_get_expr(c.relpartbound, c.oid), $$'([^']*)'$$))[1]::timestamptz as low) b
                   where c.relname like 'day_%' and not exists
                       (select from highwater.verified_partition v where v.partition_oid = c.oid)
                   order by random() limit 1";
        let Some(row) = client.query_opt(due, &[]).await.expect("what is due") else {
            pause(100).await;
            continue;
        };
        let (from, to): (String, String) = (row.get(0), row.get(1));
        let launch = launch.clone();
        let run = move || launch.output(&["verify", "--table", "psi_drift", "--from", &from, "--to", &to]);
        let output = tokio::task::spawn_blocking(run).await.expect("verify");
        // Where somebody has dropped what is read, or storage fails, it says so; but rows never differ.
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains("lacks") && !text.contains("that Postgres has not"), "{text}");
        done += u64::from(output.status.success());
    }
    done
}

/// Late rows, long transactions, savepoints, two-phase commits, partitions that come and go; the purge with no retention at
/// all, in a loop; and a sidecar that is killed, stopped, cut off and without storage.
#[expect(clippy::too_many_lines, reason = "one story")]
#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_no_row_is_deleted_that_is_not_archived() {
    let settings = [("fsync", "off"), ("max_prepared_transactions", "20"), ("wal_sender_timeout", "10s")];
    let stage = Stage::private(Shape::Named, &settings).await;
    let storage = stage.folder().join("fragile");
    let tmpfs = Tmpfs::mount(&storage, "1g");
    let launch = stage
        .launch()
        .with("SCOUTER_STORAGE_URI", &storage.display().to_string())
        .with("HIGHWATER_VERIFY_HOURS", "none");
    let client = stage.connect().await;
    shadow::create(&client, stage.shape).await;
    launch.must(&["setup"]);
    client.batch_execute("update highwater.retention set retention = '0'").await.unwrap();
    let seed =
        std::env::var("LOAD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    let mut rng = StdRng::seed_from_u64(seed);
    let load = Load::start_writers(&stage.cluster().uri_tcp(&stage.name), stage.shape, seed, 1);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let (first, second, third) = (stage.connect().await, stage.connect().await, stage.connect().await);
    let (fourth, fifth) = (stage.connect().await, stage.connect().await);
    let days = StdRng::seed_from_u64(seed.wrapping_add(100));
    let writers = [
        Worker::start(|stop| prepare(first, stop)),
        Worker::start(|stop| linger(second, stop)),
        Worker::start(|stop| partition(third, stop, days)),
    ];
    let purger = Worker::start(|stop| purge(fourth, stop));
    let verifier = Worker::start(|stop| verify(fifth, launch.clone(), stop));

    let turns = std::env::var("TEST_PURGE_TURNS").ok().and_then(|turns| turns.parse().ok()).unwrap_or(TURNS);
    let mut gone = 0;
    for turn in 0..turns {
        let calm = rng.random_range(1000..5000);
        pause(calm).await;
        match turn % 4 {
            0 => {
                sidecar.kill();
                pause(calm).await;
                gone = shadow::assert_gone_is_archived(&client, &storage, stage.shape).await;
                sidecar = launch.start();
            }
            1 => {
                tmpfs.remount("ro");
                pause(calm).await;
                gone = shadow::assert_gone_is_archived(&client, &storage, stage.shape).await;
                tmpfs.remount("rw");
            }
            2 => {
                sidecar.signal("STOP");
                pause(calm).await;
                gone = shadow::assert_gone_is_archived(&client, &storage, stage.shape).await;
                sidecar.signal("CONT");
            }
            _ => stage.cut().await,
        }
        eprintln!("turn {turn}: {gone} rows are gone");
    }
    let committed = load.stop().await;
    for writer in writers {
        writer.stop().await;
    }
    // In peace, all that is past retention goes.
    let target = stage.insert_one(&client, "last", None).await;
    stage.acknowledged(&client, target, DEADLINE).await;
    until("the archive is complete", DEADLINE, async || {
        let sql = "select bool_and(state = 'streaming') from highwater.watermark";
        client.query_one(sql, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    let emptied = within(DEADLINE, async || {
        client
            .batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key")
            .await
            .unwrap();
        let sql = "select count(*) from pg_inherits where inhrelid::regclass::text like 'scouter.day_%'";
        (client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    if emptied.is_none() {
        let sql = "select string_agg(x::text, E'\\n') from highwater.explain_purge('scouter.psi_drift') x";
        panic!("not all is purged:\n{}", client.query_one(sql, &[]).await.unwrap().get::<_, String>(0));
    }
    let (calls, verified) = (purger.stop().await, verifier.stop().await);
    let rows = shadow::assert_archived(&client, &storage, stage.shape).await;
    let gone = shadow::assert_gone_is_archived(&client, &storage, stage.shape).await;
    let sql = "select count(*) filter (where action = 'dropped'),
                      coalesce(sum(row_count) filter (where action = 'deleted'), 0)::bigint from highwater.purge_log";
    let row = client.query_one(sql, &[]).await.unwrap();
    let (dropped, deleted) = (row.get::<_, i64>(0), row.get::<_, i64>(1));
    eprintln!(
        "{committed} rows of the load, {rows} in all; {calls} purges, {verified} verifications, {dropped} partitions dropped, \
         {deleted} rows deleted, {gone} gone"
    );
    assert!(rows >= committed && deleted > 1000, "{rows} {dropped} {deleted}");
    drop(sidecar);
}

/// Inserts 50 times a second, now and then late; the longest that one took.
async fn insert(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut longest = Duration::ZERO;
    let mut turn = 0_u32;
    while goes_on(&stop) {
        let late = if turn.is_multiple_of(10) { "- interval '200 days'" } else { "" };
        let sql = format!(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             values (clock_timestamp() {late}, 's', 'n', '1', 'meanwhile', {turn}, 1)"
        );
        let begun = Instant::now();
        client.batch_execute(&sql).await.expect("insert");
        longest = longest.max(begun.elapsed());
        turn += 1;
        pause(20).await;
    }
    longest.as_millis().try_into().unwrap()
}

/// Inserts late rows into a partition that is about to be dropped; the longest that one took.
async fn insert_late(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut longest = Duration::ZERO;
    let mut turn = 0_u32;
    while goes_on(&stop) {
        let sql = format!(
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             values (date_trunc('day', now(), 'UTC') - interval '70 days', 's', 'n', '1', 'meanwhile', {turn}, 1)"
        );
        let begun = Instant::now();
        client.batch_execute(&sql).await.expect("a late insert");
        longest = longest.max(begun.elapsed());
        turn += 1;
        // The first pass over the partition finds nothing that stands in the way.
        pause(if turn == 1 { 150 } else { 20 }).await;
    }
    longest.as_millis().try_into().unwrap()
}

/// Reads the newest rows through the partitioned table; the longest that one took.
async fn read(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut longest = Duration::ZERO;
    while goes_on(&stop) {
        let begun = Instant::now();
        let sql = "select count(*) from scouter.psi_drift where created_at > now() - interval '1 hour'";
        client.query_one(sql, &[]).await.expect("select");
        longest = longest.max(begun.elapsed());
        pause(50).await;
    }
    longest.as_millis().try_into().unwrap()
}

/// Partitions and a default partition with many rows (`TEST_PURGE_ROWS`) go while others write and read.
#[tokio::test(flavor = "multi_thread")]
async fn those_who_write_and_read_do_not_notice() {
    let rows =
        std::env::var("TEST_PURGE_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(200_000_u64);
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    // Half of them in ten partitions, half in the default partition.
    let share = rows / 20;
    for day in 70..90 {
        let partition = if day < 80 {
            format!(
                "execute format('create table scouter.day_{day} partition of scouter.psi_drift for values from (%L) to (%L)',
                                low, low + interval '1 day');"
            )
        } else {
            String::new()
        };
        let sql = format!(
            "do $$ declare low timestamptz := date_trunc('day', now(), 'UTC') - {day} * interval '1 day'; begin {partition}
                 insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                 select low + (n / 100) * interval '1 ms', 's', 'n', '1', 'f' || n % 10, n / 10 % 10, n from generate_series(1, {share}) n; end $$"
        );
        client.batch_execute(&sql).await.unwrap();
    }
    let launch = stage.launch().with("HIGHWATER_VERIFY_HOURS", "none");
    launch.must(&["setup"]);
    let _sidecar = launch.start();
    let streaming =
        "select bool_and(state = 'streaming' and archived_before is not null) from highwater.watermark";
    until("the earlier rows are archived", Duration::from_secs(1200), async || {
        client.query_one(streaming, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    launch.must(&["verify"]);
    let (writer, late, reader) = (stage.connect().await, stage.connect().await, stage.connect().await);
    let (writer, reader) =
        (Worker::start(|stop| insert(writer, stop)), Worker::start(|stop| read(reader, stop)));
    let late = Worker::start(|stop| insert_late(late, stop));
    let begun = Instant::now();
    client.batch_execute("call highwater.purge_all()").await.unwrap();
    let took = begun.elapsed();
    let (inserted, selected, late) = (writer.stop().await, reader.stop().await, late.stop().await);
    let sql = "select count(*) from scouter.psi_drift
               where feature <> 'meanwhile' and created_at < date_trunc('day', now(), 'UTC') - interval '70 days'";
    assert_eq!(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 0, "all of them are gone");
    eprintln!(
        "{rows} rows purged in {took:?}; the longest insert took {inserted} ms, a late one {late} ms, a select {selected} ms"
    );
    assert!(
        inserted.max(selected).max(late) < 1000,
        "insert {inserted} ms, late {late} ms, select {selected} ms"
    );
}
