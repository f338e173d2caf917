//! A table of all types lives under load, while all that can happen to it does: its columns change, the sidecar is killed, the slot is
//! lost, partitions are purged. In the end every row that was ever committed is in the archive, once, whoever reads it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::described::{create, fill, monday};
use super::reader::read_columns;
use crate::support::archive::{assert_portable, compare_rows};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(90);

const SECTION: &str = "[[table]]\nsource = 'log.events'\ntime = 'Happened'\nsort = ['small']\nexclude = ['span']\nretention = 14\n";

/// Keeps what was ever inserted, by what no statement of this test changes.
const WITNESS: &str = "
    create table log.witness (id bigint, happened timestamp, words text, token uuid);
    create function log.witness() returns trigger language plpgsql as $$ begin
        insert into log.witness values (new.id, new.\"Happened\", new.words, new.token);
        return null;
    end $$;
    create trigger witness after insert on log.events for each row execute function log.witness()";

/// One after the other, with rows of each shape; the last of each pair makes the next round possible.
const CHANGES: [&str; 9] = [
    "alter table log.events add column extra text",
    "begin; alter table log.events add column never text, drop column tree; insert into log.events (\"Happened\", never) values (now(), 'x'); rollback",
    "begin; alter table log.events add column level integer default 7; insert into log.events (\"Happened\", words, token, level) values (now(), 'with level', gen_random_uuid(), 8); commit",
    "alter table log.events alter column tiny type integer, alter column label type text",
    "alter table log.events rename column loose to loosely",
    "alter table log.events drop column host",
    "alter table log.events add column host text default 'somewhere'",
    "alter table log.events rename column extra to more",
    "alter table log.events drop column level",
];

const INSERT: &str = "
    insert into log.events (\"Happened\", flag, big, high, price, words, token, mood, day, seen, raw, doc, tags)
    select case n % 20 when 0 then $1::timestamp + n * interval '1 minute' when 1 then now() - interval '8 days' else now() end, n % 2 = 0, n, n / 7.0,
           n * 1.5, 'w' || n % 50, gen_random_uuid(), 'wild', date '2026-01-01' + n % 300, now(), decode(md5(n::text), 'hex'), '{}', array['t']
    from generate_series(1, $2::integer) n";

/// Inserts until it is told to stop; how many rows there are then.
async fn write(client: Client, stop: Arc<AtomicBool>, written: Arc<AtomicU32>) {
    let old = (monday() - chrono::Duration::weeks(5)).and_hms_opt(0, 1, 0).unwrap();
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let count = if turn % 40 == 0 { 2_000 } else { 1 + turn % 17 };
        match client.execute(INSERT, &[&old, &count]).await {
            Ok(_) => drop(written.fetch_add(u32::try_from(count).unwrap(), Ordering::Relaxed)),
            // A plan of before the change.
            Err(error) => eprintln!("an insert was refused: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn verify(launch: &Launch) -> (Value, i32) {
    let output = launch.output(&["verify", "--format", "json", "--table", "log.events"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    (report["tables"][0].clone(), output.status.code().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn under_load_with_kills_changes_a_gap_and_a_purge_nothing_is_lost_and_nothing_doubled() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    create(&client, 6).await;
    client.batch_execute(WITNESS).await.unwrap();
    fill(&client, -5, 1..=300).await;
    fill(&client, -1, 301..=500).await;
    let file = stage.folder().join("highwater.toml");
    fs::write(&file, SECTION).unwrap();
    let launch = stage.launch().configured(&file).with("HIGHWATER_VERIFY_HOURS", "none");
    launch.must(&["setup"]);
    let mut sidecar = launch.start();

    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let writer = tokio::spawn(write(stage.connect().await, Arc::clone(&stop), Arc::clone(&written)));
    for (turn, change) in CHANGES.into_iter().enumerate() {
        tokio::time::sleep(Duration::from_millis(800)).await;
        client.batch_execute(change).await.unwrap_or_else(|error| panic!("{change}: {error}"));
        if turn % 3 == 1 {
            sidecar.kill();
            sidecar = launch.start();
        }
        if turn == 4 {
            // A resync, under way when the sidecar is killed next.
            launch.must(&["resync", "log.events"]);
        }
        if turn == 6 {
            sidecar.kill();
            until("the slot to be free", DEADLINE, async || {
                stage.holder(&client).await.is_none().then_some(())
            })
            .await;
            client
                .batch_execute(&format!("select pg_drop_replication_slot('{}')", stage.name))
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
            sidecar = launch.start();
        }
        drop(launch.output(&["purge"]));
    }
    stop.store(true, Ordering::Relaxed);
    writer.await.unwrap();
    assert!(written.load(Ordering::Relaxed) > 5_000, "{written:?}");

    // What is past its retention goes once it is verified.
    let old = format!("log.events_{}", (monday() - chrono::Duration::weeks(5)).format("%Y%m%d"));
    until("the old week to be purged", DEADLINE, async || {
        archived(&client).await;
        drop(launch.output(&["verify", "--table", "log.events"]));
        drop(launch.output(&["purge"]));
        let gone: bool = client.query_one("select to_regclass($1) is null", &[&old]).await.unwrap().get(0);
        gone.then_some(())
    })
    .await;
    archived(&client).await;
    let (table, code) = verify(&launch);
    assert_eq!((code, table["quarantined_rows"].as_u64()), (0, Some(0)), "{table:#}");
    drop(sidecar);

    let witnessed = witnessed(&client).await;
    let folder = stage.storage().join("events");
    assert_portable(&folder);
    for engine in ["deltalake", "polars", "duckdb"] {
        let read = read_columns(&folder, engine, Some("id,Happened,words,token"));
        let difference = compare_rows(&witnessed, &read);
        assert!(difference.is_none(), "{engine}: {difference}");
    }
}

/// What was ever inserted, as `reader.py` prints it.
async fn witnessed(client: &Client) -> Vec<String> {
    let query =
        "select id, (extract(epoch from happened) * 1000000)::bigint, words, token::text from log.witness";
    let rows = client.query(query, &[]).await.unwrap();
    let text = |value: Value| value.to_string();
    rows.iter()
        .map(|row| {
            let (id, time): (i64, i64) = (row.get(0), row.get(1));
            let (words, token): (Option<&str>, Option<&str>) = (row.get(2), row.get(3));
            // Python writes JSON in ASCII.
            let words = words.map(|words| words.chars().map(escaped).collect::<String>());
            let words = words.map_or("null".to_owned(), |words| format!("\"{words}\""));
            format!("{id}|{time}|{words}|{}", text(json!(token)))
        })
        .collect()
}

/// As Python's `json.dumps` has it.
fn escaped(c: char) -> String {
    if c.is_ascii() {
        return c.to_string();
    }
    c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
}
