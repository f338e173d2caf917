//! Rows that did not come by the stream: what was there before, and what a gap has left out.

use std::time::Duration;

use rand::RngExt as _;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use crate::support::archive::{archived_rows, compare, damage};
use crate::support::cluster::Stop;
use crate::support::load::{Load, create_entities};
use crate::support::proxy;
use crate::support::schema::{KINDS, Shape, entity_id};
use crate::support::sidecar::{Launch, Sidecar};
use crate::support::stage::Stage;
use crate::support::wait::{until, within};

const DEADLINE: Duration = Duration::from_secs(300);

/// Rows of each table that are there before the slot; `TEST_EARLIER_ROWS=1700000` makes 5 million of three tables.
fn earlier() -> i64 {
    std::env::var("TEST_EARLIER_ROWS")
        .map_or(40_000, |text| text.parse().expect("TEST_EARLIER_ROWS is a number"))
}

/// Steps of a copy at which it is killed, and how often each is passed before. What was finished stays so, and the next
/// step meets the rest.
const STEPS: [(&str, u32); 8] = [
    ("after-encode", 0),
    ("after-partition", 0),
    ("after-upload", 2),
    ("after-delta-commit", 8),
    ("after-copy", 0),
    ("between-tables", 0),
    ("after-partition", 2),
    ("after-copy", 0),
];

/// Fills every table with rows of the last days and hours, some of them such that only the quarantine holds them.
async fn fill(client: &Client, shape: Shape) {
    let entity = match shape {
        Shape::Named => "'old', 'shop', '1.0.0'".to_owned(),
        Shape::Entity => entity_id(client, "shop", "old", "1.0.0").await.to_string(),
    };
    let (columns, earlier) = (shape.entity_columns(), earlier());
    for (table, values) in [
        ("custom_drift (created_at, metric, value", "'m' || n % 7, n * 0.1"),
        ("psi_drift (created_at, feature, bin_id, bin_count", "'f' || n % 5, n % 10, n"),
        ("spc_drift (created_at, feature, value", "nullif('f' || n % 3, 'f0'), nullif(n, 9)"),
    ] {
        let sql = format!(
            "insert into scouter.{table}, {columns})
             select now() - n * interval '280000 seconds' / {earlier}, {values}, {entity}
             from generate_series(1, {earlier}) n;
             insert into scouter.{table}, {columns})
             select case n when 1 then 'infinity'::timestamptz else '0044-03-15 00:00+00 BC' end, {values}, {entity}
             from generate_series(1, 2) n"
        );
        client.batch_execute(&sql).await.unwrap();
    }
}

/// Waits until every table is complete and has a horizon.
async fn complete(client: &Client) {
    let sql =
        "select count(*) from highwater.watermark where state = 'streaming' and archived_before is not null";
    let whole = async || (client.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 3).then_some(());
    until("every table is complete", DEADLINE, whole).await;
}

/// The entities' own counts add up to the rows of the archive.
async fn assert_counted(client: &Client) {
    let sql =
        "select source_table, row_count, coalesce((select sum(row_count) from highwater.entity_watermark e
                  where e.source_table = w.source_table), 0)::bigint from highwater.watermark w";
    for row in client.query(sql, &[]).await.unwrap() {
        let (table, rows, counted): (String, i64, i64) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(rows, counted, "{table}");
    }
}

async fn stage_with_rows() -> Stage {
    let stage = Stage::partitioned(Shape::Named).await;
    fill(&stage.connect().await, Shape::Named).await;
    stage
}

/// Killed at each step of the copy, and at random, while rows keep coming; the server is restarted in its middle.
async fn copied_in_spite_of_kills(shape: Shape) {
    let stage = Stage::private_partitioned(shape).await;
    let client = stage.connect().await;
    if shape == Shape::Entity {
        create_entities(&client).await;
    }
    fill(&client, shape).await;
    let said = stage.launch().must(&["setup"]);
    assert!(said.contains("custom_drift: it holds rows from before the slot"), "{said}");
    let mut load = Some(Load::start(&stage.cluster().uri_unix(&stage.name), shape));
    let launch = stage.launch().with("HIGHWATER_MAX_LAG", "200ms");
    restarted_in_the_middle(&stage, &launch).await;
    let client = stage.connect().await;
    for (step, passes) in STEPS {
        let mut failing = launch.clone().failing(&format!("{step}={passes}*off->return")).start();
        let status = failing.wait(DEADLINE).await;
        assert!(!status.success(), "{step}: ended with {status} instead of a crash");
        // Enough for a test.
        if step == "after-copy"
            && let Some(load) = load.take()
        {
            load.stop().await;
        }
    }
    for _ in 0..5 {
        let mut sidecar = launch.start();
        let life = Duration::from_millis(rand::rng().random_range(100..1_500));
        let ended = within(life, async || sidecar.ended()).await;
        assert!(ended.is_none(), "the sidecar ended by itself: {ended:?}\n{}", sidecar.log());
        sidecar.kill();
    }
    let mut sidecar = launch.start();
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    assert_eq!(archived_rows(&stage.storage().join("quarantine")).len(), 6, "each once");
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_rows_are_copied_once_in_spite_of_kills_with_named_rows() {
    copied_in_spite_of_kills(Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_rows_are_copied_once_in_spite_of_kills_with_entity_rows() {
    copied_in_spite_of_kills(Shape::Entity).await;
}

/// The session that holds the snapshot goes with the server; the copy goes on with another. Killed before its end.
async fn restarted_in_the_middle(stage: &Stage, launch: &Launch) {
    // Slow enough to be in the middle: it would take eight seconds.
    let rate = (3 * earlier() / 8).to_string();
    let mut sidecar = launch.clone().with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", &rate).start();
    for stop in [Stop::Immediate, Stop::Fast] {
        in_the_middle(&stage.connect().await).await;
        stage.cluster().restart(stop);
        stage.cluster().ready(DEADLINE).await;
    }
    in_the_middle(&stage.connect().await).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    sidecar.kill();
}

/// Waits until a copy goes on.
async fn in_the_middle(client: &Client) {
    let sql = "select from pg_stat_progress_copy where command = 'COPY TO' and tuples_processed > 1000";
    let copying = async || client.query_opt(sql, &[]).await.unwrap().map(drop);
    until("a copy goes on", DEADLINE, copying).await;
}

/// A sidecar that has archived what the load wrote, and was stopped in order.
async fn archived_under_load(stage: &Stage) {
    let client = stage.connect().await;
    let mut sidecar = stage.start().await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    until("some rows", DEADLINE, async || (load.committed() > 5_000).then_some(())).await;
    load.stop().await;
    complete(&client).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// Rows that no sidecar sees: of now, and late ones of three weeks ago.
async fn write_unseen(stage: &Stage, client: &Client) {
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    until("rows nobody sees", DEADLINE, async || (load.committed() > 2_000).then_some(())).await;
    load.stop().await;
    let late = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                select now() - interval '21 days' + n * interval '1 second', 's', 'n', '1', 'late', n, n
                from generate_series(1, 100) n";
    client.batch_execute(late).await.unwrap();
}

/// The gap is noticed, and mended while rows keep coming.
async fn heals(stage: &Stage, sidecar: &mut Sidecar, said: &str) {
    let client = stage.connect().await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), stage.shape);
    sidecar.says(said, DEADLINE).await;
    let healed = async || {
        let sql = "select bool_and(state = 'streaming') from highwater.watermark";
        client.query_one(sql, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    };
    sidecar.says("the archive is complete; state streaming", DEADLINE).await;
    until("the gap is mended", DEADLINE, healed).await;
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_slot_is_mended_by_comparing_the_touched_days() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    // Old rows that the gap doesn't touch.
    let mut sidecar = stage.start().await;
    let old = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
               select '2020-02-03 12:00+00'::timestamptz + n * interval '1 second', 's', 'n', '1', 'f', n, n
               from generate_series(1, 500) n";
    client.batch_execute(old).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    archived_under_load(&stage).await;
    client.execute("select pg_drop_replication_slot($1)", &[&stage.name]).await.unwrap();
    write_unseen(&stage, &client).await;
    let mut sidecar = stage.launch().logging_to(&stage.folder().join("mending.log")).start();
    heals(&stage, &mut sidecar, "the slot does not exist").await;
    let log = sidecar.log();
    let compared: Vec<&str> =
        log.lines().filter(|line| line.contains("comparing with the archive")).collect();
    // The oldest day comes first in each line.
    assert!(!compared.is_empty() && !compared.iter().any(|line| line.contains("2020-02-03")), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_the_server_has_invalidated_is_replaced() {
    // More than the load writes while the gap is mended.
    let settings = [("max_slot_wal_keep_size", "96MB"), ("min_wal_size", "32MB"), ("max_wal_size", "48MB")];
    let stage = Stage::private(Shape::Named, &settings).await;
    archived_under_load(&stage).await;
    let client = stage.connect().await;
    write_unseen(&stage, &client).await;
    client.batch_execute("create table filler (text text)").await.unwrap();
    let lost = async || {
        let fill =
            "insert into filler select repeat(md5(n::text), 30) from generate_series(1, 20000) n; checkpoint";
        client.batch_execute(fill).await.unwrap();
        let sql = "select wal_status from pg_replication_slots where slot_name = $1";
        let status: Option<String> = client.query_one(sql, &[&stage.name]).await.unwrap().get(0);
        (status.as_deref() == Some("lost")).then_some(())
    };
    until("the slot is lost", DEADLINE, lost).await;
    let mut sidecar = stage.launch().logging_to(&stage.folder().join("mending.log")).start();
    heals(&stage, &mut sidecar, "wal_status is lost").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_advanced_by_hand_is_noticed_and_mended() {
    let stage = Stage::shared(Shape::Entity).await;
    create_entities(&stage.connect().await).await;
    archived_under_load(&stage).await;
    let client = stage.connect().await;
    stage.insert_one(&client, "skipped", None).await;
    let sql = "select pg_replication_slot_advance(slot_name, pg_current_wal_lsn()) from pg_replication_slots
                where slot_name = $1";
    client.query_one(sql, &[&stage.name]).await.unwrap();
    let mut sidecar = stage.launch().logging_to(&stage.folder().join("mending.log")).start();
    heals(&stage, &mut sidecar, "gap: the slot is ahead of the archive").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_an_attached_partition_arrive() {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    let mut sidecar = stage.start().await;
    stage.insert_one(&client, "first", None).await;
    complete(&client).await;
    let attach = "create table scouter.loaded (like scouter.psi_drift including all);
                  insert into scouter.loaded (created_at, space, name, version, feature, bin_id, bin_count)
                  select '2021-02-03 12:00+00'::timestamptz + n * interval '1 second', 's', 'n', '1', 'f', n, n
                  from generate_series(1, 500) n;
                  alter table scouter.psi_drift attach partition scouter.loaded
                  for values from ('2021-02-03') to ('2021-02-04')";
    client.batch_execute(attach).await.unwrap();
    // By the stream, into the same partition.
    let more = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                values ('2021-02-03 13:00+00', 's', 'n', '1', 'streamed', 1, 1)";
    client.batch_execute(more).await.unwrap();
    heals(&stage, &mut sidecar, "scouter.loaded").await;
    let sql = "select count(*) from highwater.covered_partition where partition_name = 'scouter.loaded'";
    assert_eq!(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 1);
    let difference = compare(&client, &stage.storage(), stage.shape, KINDS[1]).await;
    assert!(difference.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_copy_is_archived_only_when_told_to() {
    let stage = Stage::private(Shape::Named, &[]).await;
    archived_under_load(&stage).await;
    let client = stage.connect().await;
    stage.insert_one(&client, "before the copy", None).await;
    let copy = stage.cluster().promoted_copy();
    stage.cluster().stop(Stop::Fast);
    let client = copy.connect(&stage.name).await;
    // More WAL than the archive has seen of the other history.
    stage.insert_one(&client, "after the copy", None).await;
    let launch = stage.launch().logging_to(&stage.folder().join("copy.log"));
    let launch = launch.with("DATABASE_URI", &copy.uri_unix(&stage.name));
    let mut refused = launch.start();
    assert!(!refused.wait(DEADLINE).await.success());
    assert!(refused.log().contains("--accept-new-system"), "{}", refused.log());
    let mut sidecar = launch.start_with(&["--accept-new-system"]);
    complete(&client).await;
    stage.insert_one(&client, "by the new slot", None).await;
    let there = async || {
        let difference = compare(&client, &stage.storage(), stage.shape, KINDS[0]).await;
        (difference.missing == 0 || difference.extra > 0).then_some(difference)
    };
    let difference = until("everything is archived", DEADLINE, there).await;
    assert!(difference.is_none(), "{difference:?}");
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
    // Without being told again.
    let mut sidecar = launch.start();
    sidecar.says("archiving slot", DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// A standby that was promoted before it had everything: its log goes on where the archive has been already.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_copy_that_is_behind_the_archive() {
    let stage = Stage::private(Shape::Named, &[]).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let copy = stage.cluster().promoted_copy();
    let client = stage.connect().await;
    let ahead = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                 select now() + n * interval '1 second', 's', 'n', '1', 'ahead', n, n from generate_series(1, 50000) n";
    client.batch_execute(ahead).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    stage.cluster().stop(Stop::Fast);

    let client = copy.connect(&stage.name).await;
    let launch = stage.launch().logging_to(&stage.folder().join("copy.log"));
    let launch = launch.with("DATABASE_URI", &copy.uri_unix(&stage.name));
    let is_archived = async |metric: &str| {
        let quoted = format!("{metric:?}");
        let there = async || {
            let rows = archived_rows(&stage.storage().join("custom"));
            rows.iter().any(|row| row.contains(&quoted)).then_some(())
        };
        until(&format!("{metric} is archived"), DEADLINE, there).await;
    };
    for (metric, flags) in [("first", &["--accept-new-system"][..]), ("second", &[]), ("third", &[])] {
        let mut sidecar = launch.start_with(flags);
        stage.insert_one(&client, metric, None).await;
        is_archived(metric).await;
        let state = "select bool_and(state = 'streaming') from highwater.watermark";
        let whole = async || client.query_one(state, &[]).await.unwrap().get::<_, bool>(0).then_some(());
        until("every table is complete", DEADLINE, whole).await;
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    }
    for kind in KINDS {
        let difference = compare(&client, &stage.storage(), stage.shape, kind).await;
        assert_eq!(difference.missing, 0, "{kind:?}: {difference:?}");
    }
    assert_counted(&client).await;
}

/// What an interrupted copy has added is not added again by the stream, should that go on before the copy does.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_goes_on_before_an_interrupted_copy() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    fill(&client, Shape::Named).await;
    stage.launch().must(&["setup"]);
    stage.insert_one(&client, "in the copy and in the stream", None).await;
    let mut failing = stage.launch().failing("after-partition=return").start();
    assert!(!failing.wait(DEADLINE).await.success());
    let publication = &stage.name;
    let without = format!("alter publication {publication} drop table scouter.custom_drift");
    client.batch_execute(&without).await.unwrap();
    let mut sidecar = stage.launch().start();
    let others = "select count(*) from highwater.watermark where state = 'streaming'";
    let others = async || (client.query_one(others, &[]).await.unwrap().get::<_, i64>(0) == 2).then_some(());
    until("the other tables are complete", DEADLINE, others).await;
    let psi = "insert into scouter.psi_drift (space, name, version, feature, bin_id, bin_count)
               values ('s', 'n', 'v', 'streamed', 1, 2) returning pg_current_wal_insert_lsn()";
    let target: PgLsn = client.query_one(psi, &[]).await.unwrap().get(0);
    let passed = async || (stage.confirmed(&client).await > target).then_some(());
    until("the stream has passed", DEADLINE, passed).await;
    stage.launch().must(&["setup"]);
    sidecar.says("the archive is complete; state streaming table=\"scouter.custom_drift\"", DEADLINE).await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
}

/// A row that was taken out of the archive, in a partition that is marked as copied, comes back by a resync.
#[tokio::test(flavor = "multi_thread")]
async fn a_resync_compares_every_row() {
    let stage = stage_with_rows().await;
    let client = stage.connect().await;
    let mut sidecar = stage.start().await;
    stage.insert_one(&client, "to be deleted", None).await;
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    let custom = stage.storage().join("custom");
    damage(&custom, "delete", "to be deleted");
    // That somebody has deleted it is noticed, and such a partition is compared as a whole. Here it is to be forgotten.
    let noticed = "select from highwater.archive_log where kind = 'custom' and version >= removal_version";
    until("it is noticed", DEADLINE, async || client.query_opt(noticed, &[]).await.unwrap()).await;
    let gap = "update highwater.covered_partition set lacks_since = null, lacks_reason = null;
               update highwater.watermark set state = 'gap', row_count = row_count - 1 where kind = 'custom'";
    client.batch_execute(gap).await.unwrap();
    let made_complete = "the archive is complete; state streaming table=\"scouter.custom_drift\"";
    let times = |sidecar: &Sidecar| sidecar.log().matches(made_complete).count();
    let twice = async || (times(&sidecar) == 2).then_some(());
    until("the gap is mended by what the horizon says", DEADLINE, twice).await;
    let rows = async || archived_rows(&custom).iter().filter(|row| row.contains("to be deleted")).count();
    assert_eq!(rows().await, 0, "below the horizon nothing is compared");
    let said = stage.launch().must(&["resync", "custom_drift"]);
    assert!(
        said.contains("scouter.custom_drift is marked as a gap") && said.contains("within seconds"),
        "{said}"
    );
    until("every row is compared", DEADLINE, async || (times(&sidecar) == 3).then_some(())).await;
    assert_eq!(rows().await, 1);
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
}

/// While a copy goes on: a partition is dropped, one is rewritten (which looks empty to the copy's snapshot), one comes.
#[tokio::test(flavor = "multi_thread")]
async fn partitions_that_change_during_a_copy() {
    let stage = stage_with_rows().await;
    let client = stage.connect().await;
    let years = "create table scouter.y1 partition of scouter.psi_drift for values from ('2021-01-01') to ('2022-01-01');
                 create table scouter.y2 partition of scouter.psi_drift for values from ('2022-01-01') to ('2023-01-01');
                 insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                 select y + n * interval '1 second', 's', 'n', '1', 'f', n, n from generate_series(1, 500) n,
                 unnest(array['2021-02-03', '2022-02-03']::timestamptz[]) y";
    client.batch_execute(years).await.unwrap();
    stage.launch().must(&["setup"]);
    let launch = stage.launch().with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", "20000");
    let mut sidecar = launch.start();
    // The custom table is copied first.
    sidecar.says("making the archive complete", DEADLINE).await;
    for statement in ["drop table scouter.y1", "vacuum full scouter.y2"] {
        client.batch_execute(statement).await.unwrap();
    }
    sidecar.says("scouter.y2 was renamed, rewritten", DEADLINE).await;
    sidecar.says("scouter.y1", DEADLINE).await;
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    assert!(sidecar.terminate(DEADLINE).await.success());
    assert_counted(&client).await;
}

/// The copy waits for the lock of somebody who drops the partition, or drops a column that the snapshot sees.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_dropped_while_its_copy_waits() {
    let stage = stage_with_years().await;
    let (client, other) = (stage.connect().await, stage.connect().await);
    stage.launch().must(&["setup"]);
    // Slow enough that somebody can come in between: a snapshot would wait for who came before.
    let launch = stage.launch().with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", "100");
    let mut sidecar = launch.start();
    sidecar.says("making the archive complete", DEADLINE).await;
    other.batch_execute("begin; drop table scouter.y2").await.unwrap();
    let waits = async |query: &str| {
        let sql = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
                       and application_name = 'highwater' and query like $1";
        (client.query_one(sql, &[&query]).await.unwrap().get::<_, i64>(0) > 0).then_some(())
    };
    until("the copy waits", DEADLINE, async || waits("copy %").await).await;
    other.batch_execute("commit").await.unwrap();
    sidecar.says("the partition was dropped before it was copied", DEADLINE).await;
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;

    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    stage.launch().must(&["resync", "custom_drift"]);
    let mut sidecar = launch.start();
    sidecar.says("partition=\"scouter.y1\" days=all", DEADLINE).await;
    other.batch_execute("begin; alter table scouter.custom_drift drop column archived").await.unwrap();
    until("the comparison waits", DEADLINE, async || waits("%").await).await;
    other.batch_execute("commit").await.unwrap();
    sidecar.says("was renamed, rewritten or altered", DEADLINE).await;
    complete(&client).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    assert!(sidecar.terminate(DEADLINE).await.success());
}

/// The entry of a partition is written while the next one is read. When that fails, and the next one is dropped, the first is
/// copied again.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_not_forgotten_when_the_next_one_is_dropped() {
    let stage = stage_with_years().await;
    let (client, other) = (stage.connect().await, stage.connect().await);
    stage.launch().must(&["setup"]);
    // What the sidecar says to the server takes long enough for the drop to come in between.
    let port = proxy::slow(stage.cluster().port(), Duration::from_millis(20)).await;
    let uri = format!("postgresql://postgres@127.0.0.1:{port}/{}", stage.name);
    let launch = stage.launch().with("DATABASE_URI", &uri);
    let mut sidecar = launch.with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", "100").start();
    let locked = "select count(*) from pg_locks where relation = to_regclass('scouter.y3') and granted and pid <> pg_backend_pid()";
    let locked = async || (client.query_one(locked, &[]).await.unwrap().get::<_, i64>(0) > 0).then_some(());
    until("the last one is read", DEADLINE, locked).await;
    let (log, aside) = (stage.storage().join("custom/_delta_log"), stage.storage().join("custom/aside"));
    std::fs::rename(&log, &aside).unwrap();
    let drops = tokio::spawn(async move { other.batch_execute("drop table scouter.y3").await });
    sidecar.says("committing scouter.y2 failed", DEADLINE).await;
    drops.await.unwrap().unwrap();
    std::fs::rename(&aside, &log).unwrap();
    until(
        "the copy is complete, or the process has taken that for a deleted archive",
        DEADLINE,
        async || {
            let is_complete = sidecar.log().contains("the archive is complete");
            (is_complete || sidecar.ended().is_some()).then_some(())
        },
    )
    .await;
    drop(sidecar);
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    assert_counted(&client).await;
}

/// Three partitions of few rows each, which come last.
async fn stage_with_years() -> Stage {
    let stage = Stage::partitioned(Shape::Named).await;
    let years = "create table scouter.y1 partition of scouter.custom_drift for values from ('2031-01-01') to ('2032-01-01');
                 create table scouter.y2 partition of scouter.custom_drift for values from ('2032-01-01') to ('2033-01-01');
                 create table scouter.y3 partition of scouter.custom_drift for values from ('2033-01-01') to ('2034-01-01');
                 insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                 select y + n * interval '1 second', 's', 'n', '1', 'm', n from generate_series(1, 500) n,
                 unnest(array['2031-02-03', '2032-02-03', '2033-02-03']::timestamptz[]) y";
    stage.connect().await.batch_execute(years).await.unwrap();
    stage
}

/// The rows come by another session than the snapshot's. Each of the two is ended while the other goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_loses_one_of_its_sessions_begins_again() {
    let stage = stage_with_rows().await;
    let client = stage.connect().await;
    stage.launch().must(&["setup"]);
    let launch = stage.launch().with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", "20000");
    let mut sidecar = launch.start();
    for session in ["query like 'copy %'", "state = 'idle in transaction' and query not like 'copy %'"] {
        let snapshots = || sidecar.log().matches("taking a snapshot").count();
        let before = snapshots();
        let end = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and application_name = 'highwater' and {session}
               and exists (select from pg_stat_activity
                           where datname = current_database() and application_name = 'highwater' and query like 'copy %')"
        );
        until("a session is ended during a copy", DEADLINE, async || {
            (!client.query(&end, &[]).await.unwrap().is_empty()).then_some(())
        })
        .await;
        until("another snapshot", DEADLINE, async || (snapshots() > before).then_some(())).await;
    }
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    assert!(sidecar.terminate(DEADLINE).await.success());
    assert_counted(&client).await;
}

/// Rights on a table don't reach its partitions.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_read_only_the_roots() {
    let stage = stage_with_rows().await;
    let client = stage.connect().await;
    stage.launch().must(&["setup"]);
    let role = format!("{}_reader", stage.name);
    let grants = format!(
        "create role {role} login replication;
         grant usage on schema scouter, highwater to {role};
         grant select on scouter.custom_drift, scouter.psi_drift, scouter.spc_drift to {role};
         grant select, insert, update, delete on all tables in schema highwater to {role}"
    );
    client.batch_execute(&grants).await.unwrap();
    let uri = stage.cluster().uri_unix(&stage.name).replace("postgres@", &format!("{role}@"));
    let uri = uri.replace("user=postgres", &format!("user={role}"));
    let mut sidecar = stage.launch().with("DATABASE_URI", &uri).start();
    stage.assert_archived(DEADLINE).await;
    complete(&client).await;
    let partition = "create table scouter.coming partition of scouter.psi_drift
                         for values from ('2021-01-01') to ('2022-01-01')";
    client.batch_execute(partition).await.unwrap();
    let covered = "select count(*) from highwater.covered_partition where partition_name = 'scouter.coming'";
    let covered =
        async || (client.query_one(covered, &[]).await.unwrap().get::<_, i64>(0) == 1).then_some(());
    until("the new partition is covered", DEADLINE, covered).await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.ended().is_none(), "{}", sidecar.log());
    let user =
        "select usename::text from pg_stat_replication where application_name = 'highwater' and usename = $1";
    // A new partition makes the stream begin anew.
    let streams = async || (client.query(user, &[&role]).await.unwrap().len() == 1).then_some(());
    until("the role streams", DEADLINE, streams).await;
    drop(sidecar);
    client.batch_execute(&format!("drop owned by {role}")).await.unwrap();
    until("the role is gone", DEADLINE, async || {
        client.batch_execute(&format!("drop role {role}")).await.ok()
    })
    .await;
}
