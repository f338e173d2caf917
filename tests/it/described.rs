//! A table is archived because it is described: any columns, any time column, an entity or none.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::archive::{archived_rows, assert_portable};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// A table of columns of all types, partitioned by week of another column than `created_at`, without an entity.
const WIDE: &str = r#"
    create schema log;
    create type log.mood as enum ('calm', 'wild');
    create domain log.percent as numeric(5, 2) check (value <= 100);
    create domain log.label as varchar(20);
    create table log.events (
        id bigint generated always as identity, "Happened" timestamp not null, flag boolean, tiny smallint, small integer, big bigint,
        low real, high double precision, price numeric(20, 4), share log.percent, loose numeric, words text, code char(5), label log.label,
        who name, token uuid, mood log.mood, day date, seen timestamptz, raw bytea, doc json, tree jsonb, tags text[], host inet,
        lasting interval, span int4range, primary key (id, "Happened")
    ) partition by range ("Happened")"#;

/// Rows of odd and of random values.
const ROWS: &str = r#"
    insert into log.events ("Happened", flag, tiny, small, big, low, high, price, share, loose, words, code, label, who, token, mood, day,
                            seen, raw, doc, tree, tags, host, lasting, span)
    select $1::timestamp + n * interval '7 minutes',
           case n % 3 when 0 then n % 2 = 0 end, nullif(n % 5, 0) - 3, n * -7, n * 1234567890123::bigint,
           case n % 4 when 0 then 'NaN' when 1 then n / 7.0 when 2 then -0.0 end, case n % 4 when 0 then 'Infinity' when 1 then 1e-300 * n when 2 then n / 3.0 end,
           case when n % 2 = 0 then n * 12345.6789 when n % 3 = 0 then -0.0001 else 0 end, nullif(n % 100, 50) / 3.0, n * 1.5e20 / 7,
           repeat('ä€😀 ' || n, n % 4), 'c' || n % 10, nullif('l' || n % 3, 'l0'), 'who', gen_random_uuid(),
           case n % 3 when 0 then 'calm' when 1 then 'wild' end::log.mood, date '0001-01-01' + n * 10000 % 3600000, timestamptz '1901-02-03 04:05:06.789+05:30' + n * interval '1 day',
           decode(md5(n::text), 'hex'), json_build_object('n', n, 'ü', 'x'), jsonb_build_array(n, null, 'y'), array['a', null, n::text],
           inet '10.0.0.1' + n, n * interval '3 hours 1 second', int4range(n, n + 5)
    from generate_series($2::int, $3::int) n"#;

pub(crate) async fn create(client: &Client, weeks: i64) {
    client.batch_execute(WIDE).await.unwrap();
    let monday = monday();
    for week in -weeks..=1 {
        let (low, high) =
            (monday + chrono::Duration::weeks(week), monday + chrono::Duration::weeks(week + 1));
        let name = format!("events_{}", low.format("%Y%m%d"));
        let sql = format!(
            "create table log.{name} partition of log.events for values from ('{low}') to ('{high}')"
        );
        client.batch_execute(&sql).await.unwrap();
    }
    client.batch_execute("create table log.events_default partition of log.events default").await.unwrap();
}

/// The beginning of this week.
pub(crate) fn monday() -> chrono::NaiveDate {
    use chrono::Datelike as _;
    let today = chrono::Utc::now().date_naive();
    today - chrono::Days::new(today.weekday().num_days_from_monday().into())
}

pub(crate) async fn fill(client: &Client, week: i64, rows: std::ops::RangeInclusive<i32>) {
    let start = (monday() + chrono::Duration::weeks(week)).and_hms_opt(0, 1, 0).unwrap();
    client.execute(ROWS, &[&start, rows.start(), rows.end()]).await.unwrap();
}

fn settings(stage: &Stage, text: &str) -> PathBuf {
    let file = stage.folder().join("highwater.toml");
    fs::write(&file, text).unwrap();
    file
}

fn launch(stage: &Stage, text: &str) -> Launch {
    stage.launch().configured(&settings(stage, text))
}

fn verify(launch: &Launch) -> (Value, i32) {
    let output = launch.output(&["verify", "--format", "json"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    (report, output.status.code().unwrap())
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn a_table_of_all_types_is_copied_streamed_compared_and_purged() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    create(&client, 6).await;
    fill(&client, -5, 1..=500).await;
    fill(&client, -1, 501..=900).await;
    let launch = launch(
        &stage,
        "[[table]]\nsource = 'log.events'\ntime = 'Happened'\nsort = ['small']\nexclude = ['span']\nretention = 14\n",
    )
    .with("HIGHWATER_VERIFY_HOURS", "none");
    // Without the settings file it is not a table of ours.
    let done = launch.must(&["setup"]);
    assert!(done.contains("made the watermark of log.events: it holds rows"), "{done}");
    assert!(done.contains("set the retention of log.events to 14 days"), "{done}");
    let mut sidecar = launch.start();
    stage.streaming().await;
    fill(&client, 0, 901..=1500).await;
    client
        .batch_execute(
            "begin; insert into log.events (\"Happened\", words) values (now(), 'in vain'); rollback",
        )
        .await
        .unwrap();
    sidecar.kill();
    fill(&client, 0, 1501..=1700).await;
    let sidecar = launch.start();
    stage.streaming().await;
    fill(&client, -5, 1701..=1720).await;
    archived(&client).await;

    let folder = stage.storage().join("events");
    assert_portable(&folder);
    let rows = archived_rows(&folder);
    assert_eq!(rows.len(), 1720);
    let (report, code) = verify(&launch);
    let table = report["tables"]
        .as_array()
        .unwrap()
        .iter()
        .find(|table| table["source_table"] == "log.events")
        .unwrap();
    assert_eq!(
        (code, table["archive_rows"].as_u64(), table["postgres_rows"].as_u64()),
        (0, Some(1720), Some(1720)),
        "{report:#}"
    );
    assert_eq!(table["quarantined"].as_u64().unwrap_or(0), 0, "{report:#}");

    // Every bit counts: a value that the archive has and Postgres no more is a difference.
    for (column, other) in [
        ("flag", "not coalesce(flag, false)"),
        ("big", "big + 1"),
        ("price", "price + 0.0001"),
        ("share", "share - 1"),
        ("loose", "loose * 10"),
        ("token", "gen_random_uuid()"),
        ("mood", "'wild'"),
        ("day", "day + 1"),
        ("seen", "seen + interval '1 microsecond'"),
        ("raw", "raw || '\\x00'"),
        ("doc", "'{}'"),
        ("tree", "'[]'"),
        ("tags", "tags || 'z'::text"),
        ("host", "'::1'"),
        ("lasting", "'1 s'"),
        ("tiny", "null"),
    ] {
        let id = 33;
        client.batch_execute(&format!("begin; create temp table kept on commit drop as select {column} from log.events where id = {id}; commit")).await.unwrap();
        let sql = format!(
            "update log.events set {column} = {other} where id = {id} returning (select {column} from log.events where id = {id})::text"
        );
        let before: Option<String> = client.query_one(&sql, &[]).await.unwrap().get(0);
        let (report, code) = verify(&launch);
        assert_eq!(code, 1, "{column}: {report:#}");
        let kind: String = client.query_one("select format_type(atttypid, atttypmod) from pg_attribute where attrelid = 'log.events'::regclass and attname = $1", &[&column]).await.unwrap().get(0);
        let back = before.map_or("null".to_owned(), |text| format!("'{}'", text.replace('\'', "''")));
        client
            .batch_execute(&format!("update log.events set {column} = {back}::{kind} where id = {id}"))
            .await
            .unwrap();
    }
    // An update has another transaction than the row that is archived.
    archived(&client).await;
    let (report, code) = verify(&launch);
    assert_eq!(code, 0, "{report:#}");

    // The reader knows it without the settings.
    let sum =
        "select count(*) as rows, sum(price) as price, min(day) as day, count(flag) as flags from events";
    let output = stage.launch().must(&["sql", sum, "--format", "json"]);
    let answer: Value = serde_json::from_str(&output).unwrap();
    let price: String =
        client.query_one("select sum(price)::text from log.events", &[]).await.unwrap().get(0);
    assert_eq!(answer[0]["rows"], 1720);
    assert_eq!(
        answer[0]["price"].to_string().trim_matches('"').parse::<f64>().unwrap(),
        price.parse::<f64>().unwrap()
    );

    // What is past its retention goes, a week at a time, by its own time column.
    let before = count(&client, "select count(*) from log.events").await;
    let old = count(
        &client,
        &format!(
            "select count(*) from log.events where \"Happened\" < '{}'",
            monday() - chrono::Days::new(14)
        ),
    )
    .await;
    launch.must(&["purge"]);
    let left = count(&client, "select count(*) from log.events").await;
    assert_eq!(before - left, old, "the weeks that are past their retention");
    assert_eq!(archived_rows(&folder).len(), 1720);
    let (report, code) = verify(&launch);
    assert_eq!(code, 0, "{report:#}");
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn entities_are_named_in_the_row_or_by_an_id_with_what_else_the_entity_table_has() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "create table scouter.agent_eval_task (created_at timestamptz not null, entity_id integer not null, task_id text not null,
                 passed boolean not null, value double precision not null, expected jsonb not null, archived boolean default false);
             insert into scouter.drift_entities (space, name, version, uid) values ('shop', 'agent', '1', 'uid-1'), ('shop', 'agent', '2', 'uid-2');
             create table public.requests (at timestamptz not null, route text not null, status integer);
             insert into scouter.agent_eval_task select now() - n * interval '1 hour', (select min(id) from scouter.drift_entities where name = 'agent') + n % 2,
                 'task ' || n % 3, n % 2 = 0, n, jsonb_build_object('n', n) from generate_series(1, 50) n",
        )
        .await
        .unwrap();
    let launch = launch(
        &stage,
        "[[table]]\nsource = 'agent_eval_task'\nsort = ['task_id']\nexclude = ['archived']\n\
         entity = { id = 'entity_id', table = 'drift_entities', columns = ['space', 'name', 'version', 'uid'] }\n\
         [[table]]\nsource = 'public.requests'\ntime = 'at'\nentity = ['route']\n",
    );
    launch.must(&["setup"]);
    let sidecar = launch.start();
    stage.streaming().await;
    client
        .batch_execute(
            "insert into public.requests select now(), '/' || n % 4, 200 + n from generate_series(1, 40) n;
             insert into scouter.agent_eval_task values (now(), 99, 'nobody', true, 0, '{}', false);
             insert into scouter.drift_entities (space, name, version, uid) values ('shop', 'late', '1', 'uid-3');
             insert into scouter.agent_eval_task select now(), max(id), 'late', true, 1, '{}', false from scouter.drift_entities",
        )
        .await
        .unwrap();
    archived(&client).await;
    let rows = archived_rows(&stage.storage().join("agent_eval_task"));
    assert_eq!(rows.len(), 51, "one names nobody");
    assert!(rows.iter().any(|row| row.contains("uid-3") && row.contains("late")), "{:?}", rows.first());
    let (report, code) = verify(&launch);
    assert_eq!(code, 0, "{report:#}");
    let output = stage.launch().must(&["entities", "--format", "json"]);
    let entities: Value = serde_json::from_str(&output).unwrap();
    let found = |kind: &str| entities.as_array().unwrap().iter().filter(|one| one["kind"] == kind).count();
    assert_eq!((found("agent_eval_task"), found("requests")), (3, 4), "{entities:#}");
    let checked = String::from_utf8_lossy(&launch.output(&["check"]).stdout).into_owned();
    assert!(checked.contains("public\".\"requests\"") || checked.contains("public.requests"), "{checked}");
    assert!(!checked.contains("drop table"), "what is described may be in the publication: {checked}");
    let watermarks = launch.watermarks();
    assert!(watermarks.to_string().contains("public.requests"), "{watermarks:#}");
    drop(sidecar);
}

/// Scouter's append-only tables need no section: with the names and the uid of the model, and without what it writes later.
#[tokio::test(flavor = "multi_thread")]
async fn scouter_s_other_tables_are_archived_without_a_word() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    client.batch_execute(SCOUTER).await.unwrap();
    let done = stage.launch().must(&["setup"]);
    for table in ["agent_eval_task", "agent_eval_workflow", "trace_baggage", "observability_metric"] {
        assert!(
            done.contains(&format!("made the watermark of scouter.{table}: it holds rows")),
            "{table}: {done}"
        );
    }
    assert!(
        done.contains("set the retention of scouter.agent_eval_task to 90 days"),
        "as Scouter keeps it: {done}"
    );
    let sidecar = stage.launch().start();
    stage.streaming().await;
    client
        .batch_execute(
            "insert into scouter.agent_eval_task (created_at, start_time, record_uid, entity_id, task_id, task_type, passed, value, operator, expected,
                                                  actual, condition, stage)
             select now(), now(), 'r' || n, 1, 'late', 'llm', true, n, '=', '{}', '{}', false, 1 from generate_series(1, 20) n;
             update scouter.agent_eval_task set archived = true, updated_at = now()",
        )
        .await
        .unwrap();
    archived(&client).await;
    let tasks = archived_rows(&stage.storage().join("agent_eval_task"));
    assert_eq!(tasks.len(), 50);
    assert!(tasks.iter().all(|row| row.contains("uid-1") && row.contains("agent")), "{:?}", tasks.first());
    let output = stage.launch().output(&["verify", "--format", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (output.status.code(), report["tables"].as_array().map(Vec::len)),
        (Some(0), Some(7)),
        "{report:#}"
    );
    let sql = "select count(*) as rows, sum(pass_rate) as rate from agent_eval_workflow where uid = 'uid-1'";
    let answer: Value =
        serde_json::from_str(&stage.launch().must(&["sql", sql, "--format", "json"])).unwrap();
    assert_eq!((&answer[0]["rows"], &answer[0]["rate"]), (&Value::from(30), &Value::from(15.0)), "{answer}");
    // Under its new name it is the same table still.
    client.batch_execute("alter table scouter.agent_eval_task rename to genai_eval_task").await.unwrap();
    let again = stage.launch().must(&["setup"]);
    assert!(!again.contains("made the watermark of scouter.genai_eval_task"), "{again}");
    let checked = String::from_utf8_lossy(&stage.launch().output(&["check"]).stdout).into_owned();
    assert!(!checked.contains("is in the publication, but is not archived"), "{checked}");
    drop(sidecar);
}

/// As Scouter's migrations make them.
const SCOUTER: &str = "
    insert into scouter.drift_entities (space, name, version, uid) values ('shop', 'agent', '1', 'uid-1');
    create table scouter.agent_eval_task (
        created_at timestamptz not null, start_time timestamptz not null, end_time timestamptz, record_uid text not null, entity_id integer not null,
        task_id text not null, task_type text not null, passed boolean not null, value double precision not null, assertion jsonb, operator text not null,
        expected jsonb not null, actual jsonb not null, message text, condition boolean not null, stage integer not null,
        updated_at timestamptz not null default now(), archived boolean default false, primary key (record_uid, task_id, created_at))
        partition by range (created_at);
    create table scouter.agent_eval_task_default partition of scouter.agent_eval_task default;
    create table scouter.agent_eval_workflow (
        id bigint not null, created_at timestamptz not null, record_uid text not null, entity_id integer not null, total_tasks integer not null,
        passed_tasks integer not null, failed_tasks integer not null, pass_rate double precision not null, duration_ms bigint, execution_plan jsonb not null,
        updated_at timestamptz not null default now(), archived boolean default false, primary key (created_at, id)) partition by range (created_at);
    create table scouter.agent_eval_workflow_default partition of scouter.agent_eval_workflow default;
    create table scouter.observability_metric (
        created_at timestamptz not null, request_count integer not null, error_count integer not null, route_metrics jsonb not null,
        updated_at timestamptz default now(), entity_id integer not null, unique (created_at, entity_id));
    create table scouter.trace_baggage (
        created_at timestamptz not null, trace_id bytea not null, scope text, key text, value text not null,
        primary key (created_at, trace_id, scope, key));
    insert into scouter.agent_eval_task (created_at, start_time, record_uid, entity_id, task_id, task_type, passed, value, operator, expected, actual,
                                         condition, stage)
    select now() - n * interval '1 hour', now(), 'r' || n, 1, 't' || n % 3, 'llm', n % 2 = 0, n, '=', '{}', jsonb_build_object('n', n), true, 0
    from generate_series(1, 30) n;
    insert into scouter.agent_eval_workflow (id, created_at, record_uid, entity_id, total_tasks, passed_tasks, failed_tasks, pass_rate, execution_plan)
    select n, now() - n * interval '1 hour', 'r' || n, 1, 2, 1, 1, 0.5, '[]' from generate_series(1, 30) n;
    insert into scouter.observability_metric (created_at, request_count, error_count, route_metrics, entity_id)
    select now() - n * interval '1 hour', n, 0, '{}', 1 from generate_series(1, 10) n;
    insert into scouter.trace_baggage
    select now() - n * interval '1 hour', decode(md5(n::text), 'hex'), 's', 'k', 'v' || n from generate_series(1, 10) n";

/// A table that is described later is copied, and leaves the others alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_may_be_described_later() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client.batch_execute("create table public.late (created_at timestamptz not null, n integer); insert into public.late select now(), n from generate_series(1, 30) n").await.unwrap();
    let mut sidecar = stage.start().await;
    stage.insert_one(&client, "m", Some(1.0)).await;
    archived(&client).await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    let launch = launch(&stage, "[[table]]\nsource = 'public.late'\n");
    let done = launch.must(&["setup"]);
    assert!(done.contains("public.late") && !done.contains("copied\nscouter"), "{done}");
    let mut sidecar = launch.start();
    stage.streaming().await;
    client.batch_execute("insert into public.late values (now(), 31)").await.unwrap();
    archived(&client).await;
    assert_eq!(archived_rows(&stage.storage().join("late")).len(), 31);
    assert_eq!(archived_rows(&stage.storage().join("custom")).len(), 1);
    let (report, code) = verify(&launch);
    assert_eq!(code, 0, "{report:#}");
    // What is archived stays so without its section: the archive itself says what it is.
    assert!(sidecar.terminate(DEADLINE).await.success());
    client.batch_execute("insert into public.late values (now(), 32)").await.unwrap();
    let sidecar = stage.launch().start();
    stage.streaming().await;
    archived(&client).await;
    assert_eq!(archived_rows(&stage.storage().join("late")).len(), 32);
    let (report, code) = verify(&stage.launch());
    assert_eq!(code, 0, "{report:#}");
    // However many there are, a query has its memory.
    for number in 1..=40 {
        let copy = stage.storage().join(format!("late_{number}"));
        let status =
            std::process::Command::new("cp").arg("-a").arg(stage.storage().join("late")).arg(&copy).status();
        assert!(status.unwrap().success());
    }
    let query = ["sql", "select count(*) as n from late_40", "--memory", "16MiB", "--format", "json"];
    let answer: Value = serde_json::from_str(&stage.launch().must(&query)).unwrap();
    assert_eq!(answer[0]["n"], 32);
    drop(sidecar);
}

/// A described table whose log is none any more is left out alone, and archived again once the log can be read.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_table_leaves_the_others_standing() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute("create table public.frail (created_at timestamptz not null, n integer)")
        .await
        .unwrap();
    let launch = launch(&stage, "[[table]]\nsource = 'public.frail'\n");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    client.batch_execute("insert into public.frail values (now(), 1)").await.unwrap();
    archived(&client).await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    let log = stage.storage().join("frail/_delta_log");
    let entries: Vec<PathBuf> = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path()).collect();
    let last =
        entries.iter().filter(|path| path.extension().is_some_and(|ending| ending == "json")).max().unwrap();
    let whole = fs::read(last).unwrap();
    fs::write(last, "no entry").unwrap();
    let sidecar = launch.start();
    let lsn = stage.insert_one(&client, "stands", Some(1.0)).await;
    stage.acknowledged(&client, lsn, DEADLINE).await;
    assert_eq!(archived_rows(&stage.storage().join("custom")).len(), 1);
    let state = "select state from highwater.watermark where source_table = 'public.frail'";
    assert_eq!(client.query_one(state, &[]).await.unwrap().get::<_, String>(0), "gap");
    client.batch_execute("insert into public.frail values (now(), 2)").await.unwrap();
    fs::write(last, whole).unwrap();
    until("the table is whole again", Duration::from_secs(120), async || {
        let is_streaming = client.query_one(state, &[]).await.unwrap().get::<_, String>(0) == "streaming";
        is_streaming.then_some(())
    })
    .await;
    archived(&client).await;
    assert_eq!(archived_rows(&stage.storage().join("frail")).len(), 2);
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_archived_as_described_is_refused_with_its_name() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client.batch_execute("create table public.t (created_at timestamptz, \"a b\" text, n integer, x double precision, other date)").await.unwrap();
    for (section, expected) in [
        (
            "source = 'public.none'",
            "source of [[table]] public.none is \"public.none\", but must be a plain or partitioned table",
        ),
        ("source = 'public.t'", "the column of [[table]] public.t is \"a b\", but must be excluded"),
        ("source = 'public.t'\nexclude = ['a b', 'c']", "exclude of [[table]] public.t is \"c\""),
        (
            "source = 'public.t'\nexclude = ['a b']\ntime = 'other'",
            "time of [[table]] public.t is \"other\", but must be a column of type timestamptz or timestamp: created_at",
        ),
        ("source = 'public.t'\nexclude = ['a b']\nsort = ['x']", "sort of [[table]] public.t is \"x\""),
        (
            "source = 'public.t'\nexclude = ['a b']\nentity = ['n']",
            "entity of [[table]] public.t is \"n\", but must be columns of the table that hold texts",
        ),
    ] {
        let output = launch(&stage, &format!("[[table]]\n{section}\n")).output(&["setup"]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(expected), "{section}: {errors}");
    }
}
