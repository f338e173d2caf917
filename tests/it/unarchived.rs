//! What can't be archived is named wherever somebody looks, and is not purged; what only looks as if it could not be is archived.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::archive::archived_rows;
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

fn verify(launch: &Launch, flags: &[&str]) -> (Value, i32) {
    let arguments: Vec<&str> = ["verify", "--format", "json"].iter().chain(flags).copied().collect();
    let output = launch.output(&arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
    (report, output.status.code().unwrap())
}

fn table<'a>(report: &'a Value, kind: &str) -> &'a Value {
    report["tables"].as_array().unwrap().iter().find(|table| table["kind"] == kind).unwrap()
}

fn names<'a>(list: &'a Value, key: &str) -> Vec<&'a str> {
    list.as_array().unwrap().iter().map(|one| one[key].as_str().unwrap()).collect()
}

async fn archived(stage: &Stage, client: &Client) {
    let lsn = client.query_one("select pg_current_wal_insert_lsn()", &[]).await.unwrap().get(0);
    client.batch_execute("select pg_logical_emit_message(true, 'highwater', 'checkpoint ' || key) from highwater.request_key").await.unwrap();
    stage.acknowledged(client, lsn, DEADLINE).await;
}

/// A day of PSI, so many days ago, as `for values` wants it.
fn day(days: u64) -> String {
    let day = chrono::Utc::now().date_naive() - chrono::Days::new(days);
    format!("from ('{day} 00:00+00') to ('{} 00:00+00')", day + chrono::Days::new(1))
}

/// Ten rows of PSI, so many days ago.
async fn fill(client: &Client, days: i32) {
    let sql = format!(
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select date_trunc('day', now(), 'UTC') - {days} * interval '1 day' + n * interval '1 minute', 's', 'n', '1', 'f{days}', n, n
         from generate_series(1, 10) n"
    );
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{days}: {error:?}"));
}

async fn is_there(client: &Client, relation: &str) -> bool {
    client.query_one("select to_regclass($1) is not null", &[&relation]).await.unwrap().get(0)
}

fn quiet(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_VERIFY_HOURS", "none")
}

/// A foreign table, an unlogged one, one of another access method, and a child by inheritance.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn parts_that_are_not_archived_are_named_and_never_purged() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let (folder, port) = (stage.cluster().socket_folder().display(), stage.cluster().port());
    let sql = format!(
        "create extension postgres_fdw;
         create server loop foreign data wrapper postgres_fdw options (host '{folder}', port '{port}', dbname '{}');
         create user mapping for postgres server loop options (user 'postgres');
         create access method heap2 type table handler heap_tableam_handler;
         create schema elsewhere;
         create table elsewhere.cold (like scouter.psi_drift including defaults);
         alter table scouter.psi_drift drop constraint psi_drift_created_at_name_space_version_feature_bin_id_key;
         create foreign table scouter.cold partition of scouter.psi_drift for values {} server loop options (schema_name 'elsewhere');
         create unlogged table scouter.quick partition of scouter.psi_drift for values {};
         create table scouter.columnar partition of scouter.psi_drift for values {} using heap2;
         create table scouter.old partition of scouter.psi_drift for values {};
         drop table scouter.spc_drift;
         create table scouter.spc_drift (created_at timestamptz not null, space text, name text, version text, feature text, value float8);
         create table scouter.spc_child () inherits (scouter.spc_drift);
         insert into scouter.spc_child values (now(), 's', 'n', '1', 'f', 1);
         insert into scouter.spc_drift values (now(), 's', 'n', '1', 'f', 2)",
        stage.name,
        day(70),
        day(71),
        day(72),
        day(73)
    );
    client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}"));
    for days in 69..=73 {
        fill(&client, days).await;
    }
    let parts = ["scouter.cold", "scouter.columnar", "scouter.quick"];
    let setup = quiet(&stage).output(&["setup"]);
    let said = String::from_utf8_lossy(&setup.stderr);
    for part in [&parts[..], &["scouter.spc_child"]].concat() {
        assert!(said.contains(&format!("rows of {part} are not archived")), "{part}: {said}");
    }
    assert!(said.contains("alter table scouter.quick set logged") && said.contains("ERROR"), "{said}");
    let sidecar = quiet(&stage).start();
    sidecar.says("rows of scouter.spc_child are not archived: it is a child by inheritance", DEADLINE).await;
    sidecar.says("rows of scouter.cold are not archived: it is a foreign table", DEADLINE).await;
    archived(&stage, &client).await;
    // Also what comes by the stream, while it runs.
    for days in [70, 71, 73] {
        fill(&client, days).await;
    }
    client
        .batch_execute("insert into scouter.spc_child values (now(), 's', 'n', '1', 'f', 3)")
        .await
        .unwrap();
    archived(&stage, &client).await;

    let check = quiet(&stage).output(&["check"]);
    let check = String::from_utf8_lossy(&check.stdout);
    let (report, code) = verify(&quiet(&stage), &[]);
    assert_eq!((code, &report["equal"]), (1, &Value::Bool(false)), "{report:#}\n{}", sidecar.log());
    let (psi, spc) = (table(&report, "psi"), table(&report, "spc"));
    assert_eq!(names(&psi["parts_not_compared"], "part"), parts, "{report:#}");
    assert_eq!(names(&spc["parts_not_compared"], "part"), ["scouter.spc_child"], "{report:#}");
    assert_eq!((&spc["postgres_rows"], &spc["archive_rows"]), (&1.into(), &1.into()), "{report:#}");
    assert_eq!((&psi["postgres_rows"], &psi["archive_rows"]), (&30.into(), &30.into()), "{report:#}");
    let text = quiet(&stage).output(&["verify"]);
    let text = String::from_utf8_lossy(&text.stdout);
    for part in [&parts[..], &["scouter.spc_child"]].concat() {
        assert!(check.contains(part), "{part}: {check}");
        assert!(
            text.contains(&format!("{part} was not compared: it ")) && text.ends_with("NOT equal\n"),
            "{text}"
        );
    }

    // What is archived is purged all the same.
    until("the ordinary partition is purged", DEADLINE, async || {
        client.batch_execute("call highwater.purge_all()").await.unwrap();
        archived(&stage, &client).await;
        (!is_there(&client, "scouter.old").await).then_some(())
    })
    .await;
    for part in [&parts[..], &["scouter.spc_child"]].concat() {
        assert!(is_there(&client, part).await, "{part}");
    }
    let said = sidecar.log().matches("are not archived").count();
    assert_eq!(said, 4, "once each: {}", sidecar.log());

    // As the remedies say.
    client
        .batch_execute(
            "alter table scouter.quick set logged; alter table scouter.columnar set access method heap;
             alter table scouter.psi_drift detach partition scouter.cold; alter table scouter.spc_child no inherit scouter.spc_drift",
        )
        .await
        .unwrap();
    until("all that is left is archived", DEADLINE, async || {
        archived(&stage, &client).await;
        let rows = archived_rows(&stage.storage().join("psi"));
        let of = |days: i32| rows.iter().filter(|row| row.contains(&format!("\"f{days}\""))).count();
        (of(71) == 20 && of(72) == 10).then_some(())
    })
    .await;
    let done = async || {
        let (report, code) = verify(&quiet(&stage), &[]);
        (code == 0 && report["equal"] == true).then_some(())
    };
    until("it is equal", DEADLINE, done).await;
}

/// Domains, an enum, `citext` and their like have the form of what they are made from.
#[tokio::test(flavor = "multi_thread")]
async fn domains_enums_and_citext_are_archived_as_what_they_are() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let insert = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                  select now() - n * interval '1 minute', 'Space', 'two', ' v1 ', 'Größe', n, n from generate_series(1, 50) n;
                  insert into scouter.spc_drift (space, name, version, feature, value)
                  select 's', 'n', '1', case when n % 2 = 0 then 'x' end, n / 3.0 from generate_series(1, 50) n";
    client
        .batch_execute(&format!(
            "create extension citext; create type scouter.mood as enum ('one', 'two');
             create domain scouter.label as text check (value <> ''); create domain scouter.inner as scouter.label;
             create domain scouter.small as int2; create domain scouter.measure as float4; create domain scouter.padded as char(8);
             alter table scouter.psi_drift alter space type citext, alter name type scouter.mood using name::scouter.mood,
                 alter feature type scouter.inner, alter bin_id type scouter.small, alter version type scouter.padded;
             alter table scouter.spc_drift alter value type scouter.measure, alter space type varchar(20), alter name type name;
             {insert}"
        ))
        .await
        .unwrap();
    quiet(&stage).must(&["setup"]);
    let sidecar = quiet(&stage).start();
    stage.streaming().await;
    archived(&stage, &client).await;
    client
        .batch_execute(&insert.replace("now()", "now() - interval '2 hours'").replace("n / 3.0", "n / 7.0"))
        .await
        .unwrap();
    archived(&stage, &client).await;
    let (report, code) = verify(&quiet(&stage), &[]);
    assert_eq!((code, &report["equal"]), (0, &Value::Bool(true)), "{report:#}\n{}", sidecar.log());
    for kind in ["psi", "spc"] {
        let table = table(&report, kind);
        assert_eq!(
            (&table["postgres_rows"], &table["archive_rows"]),
            (&100.into(), &100.into()),
            "{report:#}"
        );
    }
    let rows = archived_rows(&stage.storage().join("psi"));
    let whole = rows.iter().filter(|row| row.contains(r#""Space"|"two"|" v1     "|"Größe""#)).count();
    assert_eq!(whole, 100, "{rows:#?}");
    assert_eq!(archived_rows(&stage.storage().join("quarantine")), Vec::<String>::new());
    let check = quiet(&stage).output(&["check"]);
    assert!(!String::from_utf8_lossy(&check.stdout).contains("has the type"), "{check:?}");
}

/// A column of a type that the archive has nothing for: every row of the table goes to quarantine.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "one life of a table, in order")]
async fn a_table_that_only_the_quarantine_holds_is_not_equal_and_not_purged_unless_accepted() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let insert = async |metric: &str| {
        let sql = format!(
            "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
             select now() - interval '70 days' + n * interval '1 minute', 's', 'n', '1', '{metric}', 1.5 from generate_series(1, 20) n"
        );
        client.batch_execute(&sql).await.unwrap();
    };
    client
        .batch_execute(
            "alter table scouter.custom_drift add column tags jsonb default '{\"a\": [1]}', alter value type numeric(8, 2)",
        )
        .await
        .unwrap();
    insert("before").await;
    let setup = quiet(&stage).output(&["setup"]);
    let said = String::from_utf8_lossy(&setup.stderr).into_owned();
    let what = "column value is of type numeric(8,2); to have them archived: alter table scouter.custom_drift alter column value \
                type double precision";
    assert!(said.contains(what) && said.contains("ERROR"), "{said}");
    let sidecar = quiet(&stage).start();
    sidecar.says(what, DEADLINE).await;
    archived(&stage, &client).await;
    insert("streamed").await;
    archived(&stage, &client).await;
    let quarantine = archived_rows(&stage.storage().join("quarantine"));
    assert_eq!(quarantine.len(), 40, "{}", sidecar.log());
    for metric in ["before", "streamed"] {
        let readable = |row: &&String| {
            row.contains(metric)
                && row.contains(r#"\"value\":\"1.50\""#)
                && row.contains(r#"{\\\"a\\\": [1]}"#)
        };
        assert_eq!(quarantine.iter().filter(readable).count(), 20, "{metric}: {quarantine:#?}");
    }
    assert!(!sidecar.log().contains("not archiving"), "{}", sidecar.log());

    let (report, code) = verify(&quiet(&stage), &[]);
    let custom = table(&report, "custom");
    assert_eq!((code, names(&custom["unfit_columns"], "column")), (1, vec!["value"]), "{report:#}");
    assert_eq!((&custom["quarantined_rows"], &custom["archive_rows"]), (&40.into(), &0.into()), "{report:#}");
    let text = quiet(&stage).output(&["verify"]);
    let text = String::from_utf8_lossy(&text.stdout);
    assert!(text.contains("40 for its quarantine") && text.contains("--accept-quarantine"), "{text}");
    assert_eq!(verify(&quiet(&stage), &["--accept-quarantine"]).1, 0);
    let count = async || -> i64 {
        client.query_one("select count(*) from scouter.custom_drift", &[]).await.unwrap().get(0)
    };
    client.batch_execute("call highwater.purge_all()").await.unwrap();
    assert_eq!(count().await, 40);
    let why = client
        .query_one("select blocked_by from highwater.explain_purge('scouter.custom_drift')", &[])
        .await
        .unwrap();
    let why: &str = why.get(0);
    assert!(
        why.contains("column value is of type numeric(8,2), so only the quarantine holds its rows"),
        "{why}"
    );

    // Mended, the rows are archived; and what was in the quarantine counts no more.
    client
        .batch_execute("alter table scouter.custom_drift alter value type double precision, drop column tags")
        .await
        .unwrap();
    until("the rows are archived", DEADLINE, async || {
        (archived_rows(&stage.storage().join("custom")).len() == 40).then_some(())
    })
    .await;
    let done = async || {
        let (report, code) = verify(&quiet(&stage), &[]);
        (code == 0 && table(&report, "custom")["archive_rows"] == 40).then_some(())
    };
    until("it is equal", DEADLINE, done).await;

    // Broken while the sidecar runs: the stream, which had gone back to numbers, brings texts again.
    client.batch_execute("alter table scouter.custom_drift alter value type numeric(8, 3)").await.unwrap();
    insert("later").await;
    until("the row is quarantined, with its text", DEADLINE, async || {
        archived(&stage, &client).await;
        let rows = archived_rows(&stage.storage().join("quarantine"));
        let readable =
            rows.iter().filter(|row| row.contains("later") && row.contains(r#"\"value\":\"1.500\""#));
        (readable.count() == 20).then_some(())
    })
    .await;
    client.batch_execute("call highwater.purge_all()").await.unwrap();
    assert_eq!(count().await, 60);
    client.batch_execute("update highwater.retention set accepts_quarantine = true").await.unwrap();
    // The table was rewritten, so it is compared anew first.
    let accepted = async || (verify(&quiet(&stage), &[]).1 == 0).then_some(());
    until("it is accepted once and for all", DEADLINE, accepted).await;
    until("the rows are purged", DEADLINE, async || {
        archived(&stage, &client).await;
        client.batch_execute("call highwater.purge_all()").await.unwrap();
        (count().await == 0).then_some(())
    })
    .await;
}
