//! Tables whose rows change: each version is archived, and the newest ones are the table.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::archive::assert_portable;
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// As Scouter's table has it, with two partitions, and what was done to it on record by triggers, in order.
const RECORDS: &str = "
    create table scouter.agent_eval_record (
        id bigint not null generated always as identity, created_at timestamptz not null default now(), scheduled_at timestamptz not null default now(),
        uid text not null default gen_random_uuid(), entity_id integer not null, context jsonb, updated_at timestamptz,
        status text not null default 'pending', processing_started_at timestamptz, processing_duration integer, retry_count integer default 0,
        archived boolean default false, trace_id bytea, tags text[] not null default '{}', price numeric,
        primary key (uid, created_at)) partition by range (created_at);
    create table scouter.agent_eval_record_old partition of scouter.agent_eval_record for values from ('2024-05-01') to ('2024-06-01');
    create table scouter.agent_eval_record_new partition of scouter.agent_eval_record default;
    insert into scouter.drift_entities (space, name, version, uid) values ('shop', 'agent', '1', 'uid-1');
    create table public.audit (number bigint generated always as identity, change text, uid text, status text);
    create function public.audit() returns trigger language plpgsql as $$ begin
        insert into public.audit (change, uid, status)
        values (lower(tg_op), case when tg_op = 'DELETE' then old.uid else new.uid end, case when tg_op = 'DELETE' then null else new.status end);
        return null;
    end $$;
    create function public.noise(bytes integer) returns text language sql as
        $$ select string_agg(md5(random()::text), '') from generate_series(1, bytes / 32) $$";

const AUDITED: &str = "create trigger audited after insert or update or delete on scouter.agent_eval_record for each row execute function public.audit()";

const SECTION: &str = "[[table]]\nsource = 'agent_eval_record'\nchanges = 'versions'\nexclude = ['archived']\n\
                       entity = { id = 'entity_id', table = 'drift_entities', columns = ['space', 'name', 'version'] }\n";

fn settings(stage: &Stage, text: &str) -> PathBuf {
    let file = stage.folder().join("highwater.toml");
    fs::write(&file, text).unwrap();
    file
}

fn launch(stage: &Stage, text: &str) -> Launch {
    stage.launch().configured(&settings(stage, text)).with("HIGHWATER_VERIFY_HOURS", "none")
}

async fn records() -> (Stage, Client) {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    client.batch_execute(RECORDS).await.unwrap();
    (stage, client)
}

async fn add(client: &Client, name: &str, count: i32) {
    let sql = format!(
        "insert into scouter.agent_eval_record (created_at, uid, entity_id, context, trace_id, tags, price)
         select case when n % 2 = 0 then timestamptz '2024-05-02 00:00:00Z' + n * interval '1 minute' else now() end, '{name} ' || n,
                (select id from scouter.drift_entities where name = 'agent'), jsonb_build_object('n', n, 'text', public.noise(20000 * (n % 2))),
                decode(md5(n::text), 'hex'), array['t' || n], n / 3.0
         from generate_series(1, {count}) n"
    );
    client.batch_execute(&sql).await.unwrap();
}

fn sql(stage: &Stage, query: &str) -> Vec<Value> {
    let answer = stage.launch().must(&["sql", query, "--format", "json"]);
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// A table's rows, from Postgres and from the newest versions in the archive.
async fn both(stage: &Stage, client: &Client) -> (Vec<Value>, Vec<Value>) {
    let query = "select to_jsonb(r)::text from (
                     select uid, id, status, retry_count, left(context::text, 60) as head, right(context::text, 60) as tail,
                            length(context::text) as length, processing_duration, tags::text, price::text
                     from scouter.agent_eval_record order by uid collate \"C\") r";
    let table = client.query(query, &[]).await.unwrap();
    let table = table.iter().map(|row| serde_json::from_str(row.get(0)).unwrap()).collect();
    let newest = sql(
        stage,
        "select uid, id, status, retry_count, left(context, 60) as head, right(context, 60) as tail,
                character_length(context) as length, processing_duration, tags, price
         from agent_eval_record_latest where space = 'shop' and version = '1' order by uid",
    );
    (table, newest)
}

/// Every table is complete.
async fn complete(client: &Client) {
    until("every table to be complete", DEADLINE, async || {
        let query = "select count(*) from highwater.watermark where state <> 'streaming'";
        (client.query_one(query, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

async fn assert_latest_is_the_table(stage: &Stage, client: &Client) {
    let (table, newest) = both(stage, client).await;
    assert!(!table.is_empty());
    assert_eq!(newest, table);
}

fn verify(launch: &Launch, table: &str) -> (Value, i32) {
    let output = launch.output(&["verify", "--format", "json", "--table", table]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    (report["tables"][0].clone(), output.status.code().unwrap())
}

async fn assert_verified(launch: &Launch, client: &Client) {
    let rows: i64 =
        client.query_one("select count(*) from scouter.agent_eval_record", &[]).await.unwrap().get(0);
    let (table, code) = verify(launch, "scouter.agent_eval_record");
    assert_eq!(
        (code, table["archive_rows"].as_i64(), table["postgres_rows"].as_i64()),
        (0, Some(rows), Some(rows)),
        "{table:#}"
    );
}

/// Changes as `change|uid|status`, in order, by the triggers and by the archive. A delete has no status in either.
async fn assert_audited(stage: &Stage, client: &Client) {
    let rows =
        client.query("select concat_ws('|', change, uid, status) from public.audit order by number", &[]);
    let mut audited: Vec<String> = rows.await.unwrap().iter().map(|row| row.get(0)).collect();
    let found = sql(
        stage,
        "select _change || '|' || uid || case when _change <> 'delete' then '|' || status else '' end as change
         from agent_eval_record where _change <> 'copy' order by _lsn, _seq",
    );
    let found: Vec<String> = found.iter().map(|row| row["change"].as_str().unwrap().to_owned()).collect();
    // Transactions that run side by side are in the order of their commits, which triggers don't know.
    let of = |all: &[String], uid: &str| {
        all.iter().filter(|one| one.split('|').nth(1) == Some(uid)).cloned().collect::<Vec<_>>()
    };
    let uids: std::collections::BTreeSet<&str> =
        audited.iter().filter_map(|one| one.split('|').nth(1)).collect();
    for uid in uids {
        assert_eq!(of(&found, uid), of(&audited, uid), "{uid}");
    }
    assert_eq!(found.len(), audited.len());
    audited.sort_unstable();
    let mut sorted = found;
    sorted.sort_unstable();
    assert_eq!(sorted, audited);
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn every_version_is_archived_and_the_newest_are_the_table() {
    let (stage, client) = records().await;
    add(&client, "old", 20).await;
    let launch = launch(&stage, SECTION);
    let said = launch.must(&["setup"]);
    assert!(said.contains("updates and deletes of scouter.agent_eval_record are published, too"), "{said}");
    assert!(said.contains(&format!("made publication {}_versions", stage.name)), "{said}");
    let mut sidecar = launch.start();
    complete(&client).await;
    assert_latest_is_the_table(&stage, &client).await;
    let copied = sql(
        &stage,
        "select count(*) as n from agent_eval_record where _change = 'copy' and _committed_at is null",
    );
    assert_eq!(copied[0]["n"], 20);

    // Polled and finished, as Scouter does; long contexts are not sent again.
    client.batch_execute(AUDITED).await.unwrap();
    add(&client, "new", 20).await;
    client
        .batch_execute(
            "update scouter.agent_eval_record set status = 'processing', processing_started_at = now(), retry_count = retry_count + 1 where uid like '% 1%';
             begin;
             update scouter.agent_eval_record set status = 'processed', processing_duration = 5 where uid like '% 1';
             update scouter.agent_eval_record set status = 'done', price = null where uid like '% 1';
             savepoint a; update scouter.agent_eval_record set status = 'lost'; rollback to a;
             insert into scouter.agent_eval_record (uid, entity_id, status) select 'brief', max(id), 'brief' from scouter.drift_entities;
             update scouter.agent_eval_record set status = 'briefly' where uid = 'brief';
             delete from scouter.agent_eval_record where uid = 'brief';
             insert into scouter.agent_eval_record (uid, entity_id, status) select 'brief', max(id), 'again' from scouter.drift_entities;
             commit;
             begin; update scouter.agent_eval_record set status = 'never'; delete from scouter.agent_eval_record; rollback;
             delete from scouter.agent_eval_record where uid in ('old 3', 'new 4');
             update scouter.agent_eval_record set context = '{\"short\": true}' where uid = 'old 5'",
        )
        .await
        .unwrap();
    archived(&client).await;
    assert_latest_is_the_table(&stage, &client).await;
    assert_audited(&stage, &client).await;
    assert_verified(&launch, &client).await;
    let unchanged = sql(
        &stage,
        "select count(*) as n from agent_eval_record where _unchanged like '%context%' and context is null",
    );
    assert!(unchanged[0]["n"].as_i64().unwrap() > 5, "{unchanged:?}");
    assert_portable(&stage.storage().join("agent_eval_record"));

    // Each value counts.
    for change in ["status = 'x'", "context = '{}'", "price = 0.1", "tags = '{}'"] {
        // Without the stream's knowledge.
        let hidden = format!(
            "alter publication {0}_versions set (publish = 'insert'); update scouter.agent_eval_record set {change} where uid = 'old 7';
             alter publication {0}_versions set (publish = 'insert, update, delete')",
            stage.name
        );
        sidecar.signal("STOP");
        client.batch_execute(&hidden).await.unwrap();
        sidecar.signal("CONT");
        // The publication was changed: what it let pass is a gap, and is healed.
        archived(&client).await;
        until("the gap to be healed", DEADLINE, async || {
            let (table, newest) = both(&stage, &client).await;
            (table == newest).then_some(())
        })
        .await;
    }
    complete(&client).await;
    assert_verified(&launch, &client).await;

    // Killed under load.
    let writer = stage.connect().await;
    for round in 0..4 {
        let changes = format!(
            "insert into scouter.agent_eval_record (uid, entity_id, status) select 'round {round} ' || n, max(id), 'new' from scouter.drift_entities, generate_series(1, 200) n group by n;
             update scouter.agent_eval_record set status = 'r{round}', retry_count = {round} where uid like 'round %' and hashtext(uid) % 2 = 0;
             delete from scouter.agent_eval_record where uid like 'round %' and hashtext(uid) % 7 = 0"
        );
        writer.batch_execute(&changes).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300 * round)).await;
        sidecar.kill();
        sidecar = launch.start();
    }
    complete(&client).await;
    archived(&client).await;
    assert_latest_is_the_table(&stage, &client).await;
    assert_verified(&launch, &client).await;

    // A lost slot: nobody saw what was done meanwhile.
    sidecar.kill();
    until("the slot to be free", DEADLINE, async || (stage.holder(&client).await.is_none()).then_some(()))
        .await;
    client.batch_execute(&format!("select pg_drop_replication_slot('{}')", stage.name)).await.unwrap();
    client
        .batch_execute("update scouter.agent_eval_record set status = 'unseen' where uid like 'old 1%'")
        .await
        .unwrap();
    let before = sql(&stage, "select count(*) as n from agent_eval_record");
    let sidecar = launch.start();
    until("the gap to be healed", DEADLINE, async || {
        let (table, newest) = both(&stage, &client).await;
        (table == newest).then_some(())
    })
    .await;
    complete(&client).await;
    let unseen: i64 = client
        .query_one("select count(*) from scouter.agent_eval_record where status = 'unseen'", &[])
        .await
        .unwrap()
        .get(0);
    let after = sql(&stage, "select count(*) as n from agent_eval_record");
    assert_eq!(after[0]["n"].as_i64().unwrap() - before[0]["n"].as_i64().unwrap(), unseen);
    // Nothing is added twice.
    launch.must(&["resync", "scouter.agent_eval_record"]);
    complete(&client).await;
    assert_eq!(sql(&stage, "select count(*) as n from agent_eval_record"), after);
    assert_verified(&launch, &client).await;

    // A partition that is purged stays in the archive as it was.
    let (_, newest) = both(&stage, &client).await;
    let purged: i64 =
        client.query_one("select count(*) from scouter.agent_eval_record_old", &[]).await.unwrap().get(0);
    until("the partition to be purged", DEADLINE, async || {
        drop(launch.output(&["purge"]));
        (client
            .query_one("select to_regclass('scouter.agent_eval_record_old') is null", &[])
            .await
            .unwrap()
            .get::<_, bool>(0))
        .then_some(())
    })
    .await;
    assert!(purged > 5);
    assert_eq!(both(&stage, &client).await.1, newest);
    assert_verified(&launch, &client).await;
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_of_rows_is_no_delete_and_keys_and_times_that_change_are() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "create table public.orders (id integer, at timestamptz not null, state text, note text, primary key (id));
             insert into public.orders select n, now() - n * interval '1 day', 'new', 'n' || n from generate_series(1, 100) n",
        )
        .await
        .unwrap();
    let launch = launch(&stage, "[[table]]\nsource = 'public.orders'\ntime = 'at'\nchanges = 'versions'\n");
    let refused = launch.output(&["setup"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("alter table public.orders replica identity full"),
        "{said}"
    );
    client.batch_execute("alter table public.orders replica identity full").await.unwrap();
    launch.must(&["setup"]);
    let sidecar = launch.start();
    complete(&client).await;
    client
        .batch_execute(
            "update public.orders set at = at + interval '3 hours', state = 'moved' where id % 10 = 1;
             update public.orders set id = id + 1000, state = 'renamed' where id % 10 = 2;
             delete from public.orders where id % 10 = 3;
             update public.orders set state = 'paid' where id % 10 = 4",
        )
        .await
        .unwrap();
    archived(&client).await;
    let newest = "select id, state, note from orders_latest order by id";
    let table = async || {
        let rows = client.query(
            "select to_jsonb(r)::text from (select id, state, note from public.orders order by id) r",
            &[],
        );
        rows.await
            .unwrap()
            .iter()
            .map(|row| serde_json::from_str(row.get(0)).unwrap())
            .collect::<Vec<Value>>()
    };
    assert_eq!(sql(&stage, newest), table().await);
    let gone = sql(&stage, "select count(*) as n, count(note) as notes from orders where _change = 'delete'");
    assert_eq!(
        (&gone[0]["n"], &gone[0]["notes"]),
        (&Value::from(30), &Value::from(30)),
        "with all of the row"
    );
    let (report, code) = verify(&launch, "public.orders");
    assert_eq!((code, &report["archive_rows"]), (0, &Value::from(90)), "{report:#}");

    // What a purge deletes stays; what somebody else deletes is gone.
    let before = sql(&stage, newest);
    let left =
        async || client.query_one("select count(*) from public.orders", &[]).await.unwrap().get::<_, i64>(0);
    until("rows to be purged", DEADLINE, async || {
        drop(launch.output(&["purge"]));
        (left().await < 70).then_some(())
    })
    .await;
    archived(&client).await;
    assert_eq!(sql(&stage, newest), before);
    let (report, code) = verify(&launch, "public.orders");
    assert_eq!(code, 0, "{report:#}");
    // Nobody but who may read the key can pass a delete off as a purge.
    client
        .batch_execute("begin; select pg_logical_emit_message(true, 'highwater', 'purge'); delete from public.orders where id = 5; commit")
        .await
        .unwrap();
    archived(&client).await;
    assert_eq!(sql(&stage, newest).len(), before.len() - 1);
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn what_has_no_key_is_refused_and_a_publication_that_is_younger_than_the_log_is_waited_for() {
    let (stage, client) = records().await;
    client
        .batch_execute(
            "create table public.notes (id integer, created_at timestamptz not null, text text);
             create table public.other (id integer primary key, created_at timestamptz not null)",
        )
        .await
        .unwrap();
    let of = |section: &str| launch(&stage, section);
    let refused = |section: &str| {
        let output = of(section).output(&["setup"]);
        assert!(!output.status.success(), "{section}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = refused("[[table]]\nsource = 'public.notes'\nchanges = 'versions'\n");
    assert!(
        said.contains("changes of [[table]] public.notes") && said.contains("must have a primary key"),
        "{said}"
    );
    let said = refused(&SECTION.replace("'archived'", "'archived', 'uid'"));
    assert!(said.contains("uid must be archived"), "{said}");
    client.batch_execute("alter table scouter.agent_eval_record_new replica identity nothing").await.unwrap();
    let said = refused(SECTION);
    assert!(said.contains("alter table scouter.agent_eval_record_new replica identity default;"), "{said}");
    client.batch_execute("alter table scouter.agent_eval_record_new replica identity default").await.unwrap();
    let held: i64 = client
        .query_one("select count(*) from pg_replication_slots where slot_name = $1", &[&stage.name])
        .await
        .unwrap()
        .get(0);
    assert_eq!(held, 0, "what is refused leaves nothing behind");

    // Archived without versions first; the log has rows of before the publication when the table comes.
    let before = of("[[table]]\nsource = 'public.notes'\n");
    before.must(&["setup"]);
    let mut sidecar = before.start();
    complete(&client).await;
    client.batch_execute("insert into public.notes values (1, now(), 'a')").await.unwrap();
    archived(&client).await;
    sidecar.kill();
    client.batch_execute("insert into public.notes values (2, now(), 'b')").await.unwrap();
    add(&client, "old", 5).await;
    let sections = format!("[[table]]\nsource = 'public.notes'\n{SECTION}");
    let both_tables = of(&sections);
    both_tables.must(&["setup"]);
    client.batch_execute("update scouter.agent_eval_record set status = 'early'; insert into public.notes values (3, now(), 'c')").await.unwrap();
    let sidecar = both_tables.start();
    complete(&client).await;
    client
        .batch_execute("update scouter.agent_eval_record set status = 'late' where uid = 'old 2'")
        .await
        .unwrap();
    archived(&client).await;
    assert_latest_is_the_table(&stage, &client).await;
    assert_verified(&both_tables, &client).await;
    assert_eq!(sql(&stage, "select text from notes order by id").len(), 3);
    let log = sidecar.log();
    assert!(
        log.contains("did not exist at this point of the log") && log.contains("can be streamed by now"),
        "{log}"
    );

    // Mode and publication are looked after.
    let said = refused(&SECTION.replace("changes = 'versions'\n", ""));
    assert!(
        said.contains("must be versions, as the archive's table agent_eval_record was made with"),
        "{said}"
    );
    client
        .batch_execute(&format!("alter publication {}_versions set (publish = 'insert')", stage.name))
        .await
        .unwrap();
    let both_tables = of(&sections);
    let checked = String::from_utf8_lossy(&both_tables.output(&["check"]).stdout).into_owned();
    assert!(checked.contains("versions of rows are missed"), "{checked}");
    both_tables.must(&["setup"]);
    let checked = String::from_utf8_lossy(&both_tables.output(&["check"]).stdout).into_owned();
    assert!(checked.contains("publishes inserts, updates and deletes"), "{checked}");
}

/// What a table holds, and its newest versions.
async fn both_of(stage: &Stage, client: &Client, table: &str) -> (Vec<Value>, Vec<Value>) {
    let query = format!(
        "select to_jsonb(r)::text from (select id, length(text) as length, left(text, 40) as head from public.{table} order by id) r"
    );
    let rows = client.query(&query, &[]).await.unwrap();
    let newest = format!(
        "select id, character_length(text) as length, left(text, 40) as head from {table}_latest order by id"
    );
    (rows.iter().map(|row| serde_json::from_str(row.get(0)).unwrap()).collect(), sql(stage, &newest))
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of two tables, in order")]
async fn values_that_the_log_leaves_out_are_found_whatever_becomes_of_their_row() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    client
        .batch_execute(
            "create table public.plain (id integer, at timestamptz not null, text text, primary key (id, at));
             create table public.whole (id integer primary key, at timestamptz not null, text text);
             alter table public.plain alter column text set storage external;
             alter table public.whole alter column text set storage external, replica identity full;
             create table public.later (id integer, at timestamptz not null, primary key (id, at) deferrable);
             create table public.brief (at timestamptz not null);
             insert into public.plain select n, now() - n * interval '1 day', repeat(md5(n::text), 200) from generate_series(1, 10) n;
             insert into public.whole select * from public.plain",
        )
        .await
        .unwrap();
    let section =
        |name: &str| format!("[[table]]\nsource = 'public.{name}'\ntime = 'at'\nchanges = 'versions'\n");
    let refused = launch(&stage, &section("later")).output(&["setup"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("not deferrable"), "{said}");

    let sections = section("plain") + &section("whole");
    let settings =
        |more: &str| launch(&stage, &format!("{sections}{more}")).with("HIGHWATER_MEMORY", "16MiB");
    let launch = settings("");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    complete(&client).await;
    client
        .batch_execute(
            "update public.plain set id = id + 100 where id < 3;
             update public.plain set at = at + interval '1 hour' where id = 3;
             update public.whole set id = id + 100 where id < 3;
             update public.whole set at = at + interval '1 hour' where id = 3;
             update public.whole set text = repeat('x', 3000000) where id = 9;
             delete from public.whole where id = 9",
        )
        .await
        .unwrap();
    archived(&client).await;
    let (table, newest) = both_of(&stage, &client, "whole").await;
    assert_eq!(newest, table, "the log has the row as it was");
    until("what the log leaves out to be copied", DEADLINE, async || {
        let (table, newest) = both_of(&stage, &client, "plain").await;
        (newest == table).then_some(())
    })
    .await;
    assert!(sidecar.log().contains("left long values alone"), "{}", sidecar.log());
    complete(&client).await;
    for table in ["public.plain", "public.whole"] {
        let (report, code) = verify(&launch, table);
        assert_eq!(code, 0, "{report:#}");
    }

    // A table whose section is gone before anything of it was archived is told alone.
    settings("[[table]]\nsource = 'public.brief'\ntime = 'at'\n").must(&["setup"]);
    let launch = settings("");
    sidecar.kill();
    sidecar = launch.start();
    until("the table that nothing describes to be told", DEADLINE, async || {
        sidecar.log().contains("describes the table").then_some(())
    })
    .await;
    stage.streaming().await;
    assert!(!sidecar.log().contains("the slot is ahead of the archive"), "{}", sidecar.log());

    // A row that was deleted unseen is surplus, though its hour has no other.
    sidecar.kill();
    until("the slot to be free", DEADLINE, async || stage.holder(&client).await.is_none().then_some(()))
        .await;
    client.batch_execute(&format!("select pg_drop_replication_slot('{}')", stage.name)).await.unwrap();
    client.batch_execute("delete from public.whole where id = 5").await.unwrap();
    sidecar = launch.start();
    until("the gap to be healed", DEADLINE, async || {
        if !sidecar.log().contains("the slot does not exist") {
            return None;
        }
        let query = "select count(*) from highwater.watermark where state <> 'streaming' and kind <> 'brief'";
        (client.query_one(query, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let (report, code) = verify(&launch, "public.whole");
    let surplus: u64 =
        report["differences"].as_array().unwrap().iter().map(|hour| hour["surplus"].as_u64().unwrap()).sum();
    assert_eq!((code, surplus), (1, 1), "{report:#}");
    sidecar.kill();
}
