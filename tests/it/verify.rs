//! `highwater verify` says whether the archive holds what Postgres does, and adds what it lacks.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::archive::{archived_rows, damage};
use crate::support::load::create_entities;
use crate::support::schema::{Shape, entity_id};
use crate::support::sidecar::{Launch, Sidecar};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// The report, and the exit code.
fn verify(launch: &Launch, flags: &[&str]) -> (Value, i32) {
    let arguments: Vec<&str> = ["verify", "--format", "json"].iter().chain(flags).copied().collect();
    let output = launch.output(&arguments);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{error}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    });
    (report, output.status.code().unwrap())
}

fn table<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["tables"].as_array().unwrap().iter().find(|table| table["source_table"] == name).unwrap()
}

/// One row an hour of three days, with one that only the quarantine holds.
async fn fill(client: &Client, shape: Shape) {
    let entity = match shape {
        Shape::Named => "'calm', 'shop', '1.0.0'".to_owned(),
        Shape::Entity => {
            create_entities(client).await;
            entity_id(client, "shop", "calm", "1.0.0").await.to_string()
        }
    };
    let columns = shape.entity_columns();
    for (table, values) in [
        ("custom_drift (created_at, metric, value", "'hour ' || n, n / 3.0"),
        ("psi_drift (created_at, feature, bin_id, bin_count", "'f' || n % 5, n % 10, n"),
        ("spc_drift (created_at, feature, value", "nullif('f' || n % 3, 'f0'), nullif(n, 9)"),
    ] {
        let sql = format!(
            "insert into scouter.{table}, {columns})
             select date_trunc('hour', now()) - n * interval '1 hour', {values}, {entity} from generate_series(1, 72) n;
             insert into scouter.{table}, {columns}) select 'infinity', {values}, {entity} from generate_series(1, 1) n"
        );
        client.batch_execute(&sql).await.unwrap();
    }
}

/// Keeps writing into the last hours, some of it in vain.
async fn write(client: Client, shape: Shape) {
    let entity = match shape {
        Shape::Named => "'busy', 'shop', '1.0.0'".to_owned(),
        Shape::Entity => entity_id(&client, "shop", "busy", "1.0.0").await.to_string(),
    };
    let columns = shape.entity_columns();
    for turn in 0_u64.. {
        let times = format!("select clock_timestamp() - random() * interval '3 hours', '{turn}' || n");
        let end = if turn % 5 == 4 { "rollback" } else { "commit" };
        let sql = format!(
            "begin;
             insert into scouter.custom_drift (created_at, metric, value, {columns})
             {times}, random(), {entity} from generate_series(1, 50) n;
             savepoint s;
             insert into scouter.spc_drift (created_at, feature, value, {columns})
             {times}, random(), {entity} from generate_series(1, 50) n;
             {};
             insert into scouter.psi_drift (created_at, feature, bin_id, bin_count, {columns})
             {times}, n, n, {entity} from generate_series(1, 50) n;
             {end}",
            if turn % 3 == 2 { "rollback to s" } else { "release s" },
        );
        client.batch_execute(&sql).await.unwrap();
    }
}

async fn is_equal_under_load(shape: Shape) {
    let stage = Stage::partitioned(shape).await;
    let client = stage.connect().await;
    fill(&client, shape).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let writing = tokio::spawn(write(stage.connect().await, shape));
    for _ in 0..4 {
        let (report, code) = verify(&stage.launch(), &[]);
        assert_eq!((code, &report["equal"]), (0, &Value::Bool(true)), "{report:#}\n{}", sidecar.log());
        for table in report["tables"].as_array().unwrap() {
            let count = |column: &str| table[column].as_u64().unwrap();
            // One of them is in the quarantine.
            assert!(
                count("postgres_rows") > 72 && count("archive_rows") < count("postgres_rows"),
                "{table:#}"
            );
        }
    }
    writing.abort();
    let (report, _) = verify(&stage.launch(), &[]);
    let sql = "select p.source_table, p.partition_name, p.row_count, p.checksum, p.horizon::text,
                      (select sum(row_count) from highwater.verified_partition o where o.source_table = p.source_table)::bigint
               from highwater.verified_partition p order by 1, 2";
    let recorded = client.query(sql, &[]).await.unwrap();
    let reported: usize = report["tables"]
        .as_array()
        .unwrap()
        .iter()
        .map(|table| table["partitions"].as_array().unwrap().len())
        .sum();
    assert!(recorded.len() == reported && reported > 3, "{} of {reported}: {report:#}", recorded.len());
    for row in &recorded {
        let (name, partition): (&str, &str) = (row.get(0), row.get(1));
        let table = table(&report, name);
        let partitions = table["partitions"].as_array().unwrap();
        let said = partitions.iter().find(|said| said["partition"] == partition).unwrap();
        assert_eq!(
            (&said["row_count"], &said["checksum"]),
            (&row.get::<_, i64>(2).into(), &row.get::<_, &str>(3).into())
        );
        assert_eq!(table["postgres_rows"], row.get::<_, i64>(5), "{report:#}");
        assert!(row.get::<_, &str>(4).parse::<u64>().unwrap() > 3);
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn named_rows_are_equal_while_more_are_written() {
    is_equal_under_load(Shape::Named).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entity_rows_are_equal_while_more_are_written() {
    is_equal_under_load(Shape::Entity).await;
}

/// A stage whose rows are archived, and its sidecar.
async fn archived() -> (Stage, Client, Sidecar) {
    let stage = Stage::partitioned(Shape::Named).await;
    let client = stage.connect().await;
    fill(&client, Shape::Named).await;
    let sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    (stage, client, sidecar)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_deleted_a_row_doubled_and_a_last_bit_are_found_and_mended() {
    let (stage, client, mut sidecar) = archived().await;
    assert_eq!(verify(&stage.launch(), &[]).1, 0);

    let custom = stage.storage().join("custom");
    for (action, metric) in [("delete", "hour 5"), ("double", "hour 30"), ("change", "hour 50")] {
        damage(&custom, action, metric);
    }
    let (report, code) = verify(&stage.launch(), &[]);
    assert_eq!(code, 1, "{report:#}");
    let found = |report: &Value| -> Vec<(u64, u64, u64, u64, u64, u64)> {
        let differences = table(report, "scouter.custom_drift")["differences"].as_array().unwrap().clone();
        let count = |difference: &Value, column: &str| difference[column].as_u64().unwrap();
        let columns = ["postgres_rows", "archive_rows", "missing", "surplus", "doubles", "added"];
        let each = |difference: &Value| columns.map(|column| count(difference, column)).into();
        differences.iter().map(each).collect()
    };
    // Oldest first: the changed bit, the doubled row, the deleted one.
    let expected = [(1, 1, 1, 1, 0, 0), (1, 2, 0, 0, 1, 0), (1, 0, 1, 0, 0, 0)];
    assert_eq!(found(&report), expected, "{report:#}");
    let hour = "select to_char((date_trunc('hour', now()) - interval '5 hours') at time zone 'UTC',
                               'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')";
    let hour: String = client.query_one(hour, &[]).await.unwrap().get(0);
    assert_eq!(table(&report, "scouter.custom_drift")["differences"][2]["hour"], hour);
    assert!(table(&report, "scouter.psi_drift")["differences"].as_array().unwrap().is_empty());
    let taken_back =
        "select count(*) from highwater.verified_partition where source_table = 'scouter.custom_drift'";
    let left: i64 = client.query_one(taken_back, &[]).await.unwrap().get(0);
    let said = table(&report, "scouter.custom_drift")["partitions"].as_array().unwrap().clone();
    let verified = said.iter().filter(|partition| partition["verified"] == true).count();
    assert_eq!(usize::try_from(left).unwrap(), verified, "{report:#}");
    assert!(verified < said.len());
    let text =
        String::from_utf8(stage.launch().output(&["verify", "--table", "custom_drift"]).stdout).unwrap();
    assert!(
        text.contains(&hour) && text.contains("the archive lacks 1 rows") && text.ends_with("NOT equal\n"),
        "{text}"
    );

    // Elsewhere all is well.
    let (report, code) = verify(&stage.launch(), &["--table", "psi_drift", "--table", "scouter.spc_drift"]);
    assert_eq!((code, report["tables"].as_array().unwrap().len()), (0, 2), "{report:#}");
    let (report, code) = verify(&stage.launch(), &["--from", &hour]);
    assert_eq!(found(&report), [(1, 0, 1, 0, 0, 0)], "{report:#}");
    assert_eq!(code, 1);

    // A row that looks changed is added only when that is asked for.
    let (report, code) = verify(&stage.launch(), &["--repair"]);
    let expected = [(1, 1, 1, 1, 0, 0), (1, 2, 0, 0, 1, 0), (1, 0, 1, 0, 0, 1)];
    assert_eq!(found(&report), expected, "{report:#}");
    assert_eq!((code, &table(&report, "scouter.custom_drift")["doubles_removed"]), (1, &1.into()));
    let (report, code) = verify(&stage.launch(), &["--repair-changed"]);
    assert_eq!(found(&report), [(1, 1, 1, 1, 0, 1)], "{report:#}");
    assert_eq!(code, 1);
    // What Postgres has not stays, and nothing else that is too much does; the sidecar goes on.
    stage.insert_one(&client, "after the repair", Some(1.5)).await;
    for _ in 0..2 {
        let (report, code) = verify(&stage.launch(), &["--repair"]);
        assert_eq!(found(&report), [(1, 2, 0, 1, 0, 0)], "{report:#}");
        assert_eq!(code, 1);
    }
    let rows = archived_rows(&custom);
    let of = |metric: &str| rows.iter().filter(|row| row.contains(&format!("{metric:?}"))).count();
    assert_eq!([of("hour 5"), of("hour 30"), of("hour 50"), of("after the repair")], [1, 1, 2, 1]);
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    // 72 of the hours, the one that the stage writes, the changed one, and the one after the repair.
    let mut sidecar = stage.start().await;
    let counted = "select w.row_count = sum(e.row_count) and w.row_count = 75
                   from highwater.watermark w join highwater.entity_watermark e using (source_table)
                   where source_table = 'scouter.custom_drift' group by w.row_count";
    let is_counted = async || client.query_one(counted, &[]).await.unwrap().get::<_, bool>(0).then_some(());
    until("the entities are counted", DEADLINE, is_counted).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// What cannot be read back is not purged, whatever an earlier verification said.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_or_damaged_takes_back_what_was_verified() {
    let (stage, client, mut sidecar) = archived().await;
    assert_eq!(verify(&stage.launch(), &[]).1, 0);
    let state = async || {
        let sql = "select (select count(*) from highwater.verified_partition where source_table = 'scouter.psi_drift'),
                          (select count(*) from highwater.covered_partition where lacks_since is not null)";
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    };
    let (all, none) = state().await;
    assert!(all > 2 && none == 0);
    // Of a day that is over, so that nobody merges it meanwhile.
    let day = "select to_char((now() - interval '2 days') at time zone 'UTC', 'YYYY/MM/DD')";
    let day: String = client.query_one(day, &[]).await.unwrap().get(0);
    let (month, day) = day.split_at("YYYY/MM/".len());
    let mut files = std::fs::read_dir(stage.storage().join("psi").join(month)).unwrap();
    let of_day = |path: &std::path::Path| {
        path.is_file() && path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{day}-"))
    };
    let file = files.find_map(|entry| Some(entry.unwrap().path()).filter(|path| of_day(path))).unwrap();
    let whole = std::fs::read(&file).unwrap();
    let mut cut = whole.clone();
    cut.truncate(whole.len() / 2);
    for damaged in [None, Some(cut)] {
        match &damaged {
            None => std::fs::remove_file(&file).unwrap(),
            Some(bytes) => std::fs::write(&file, bytes).unwrap(),
        }
        let (report, code) = verify(&stage.launch(), &[]);
        let psi = table(&report, "scouter.psi_drift");
        let why = psi["not_compared"].as_str().unwrap_or_else(|| panic!("{report:#}"));
        assert!(
            why.contains("1 files") && why.contains(file.file_name().unwrap().to_str().unwrap()),
            "{why}"
        );
        assert_eq!((code, &table(&report, "scouter.spc_drift")["not_compared"]), (1, &Value::Null));
        // The default partition may hold rows of any time.
        let (verified, lacking) = state().await;
        assert!(verified > 0 && verified <= all - 2 && lacking == all - verified, "{verified} {lacking}");
        std::fs::write(&file, &whole).unwrap();
        assert_eq!(verify(&stage.launch(), &[]).1, 0);
        assert_eq!(state().await, (all, 0));
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_is_killed_is_finished_by_the_next() {
    let (stage, client, mut sidecar) = archived().await;
    let lost = ["hour 5", "hour 30", "hour 31", "hour 50", "hour 70"];
    for metric in lost {
        damage(&stage.storage().join("custom"), "delete", metric);
    }
    let missing = || {
        let (report, code) = verify(&stage.launch(), &["--table", "custom_drift"]);
        assert_eq!(code, 1, "{report:#}");
        let differences = table(&report, "scouter.custom_drift")["differences"].as_array().unwrap().clone();
        assert!(differences.iter().all(|hour| hour["surplus"] == 0), "{report:#}");
        differences.len()
    };
    // What was committed is not added again; what was only uploaded is.
    for (step, passes, left) in [
        ("after-encode", 0, 5),
        ("after-upload", 0, 5),
        ("after-delta-commit", 0, 4),
        ("after-upload", 1, 3),
        ("after-delta-commit", 1, 1),
    ] {
        let failing = stage.launch().failing(&format!("{step}={passes}*off->return"));
        failing.must_crash(&["verify", "--repair"]);
        assert_eq!(missing(), left, "{step} {passes}");
    }
    let (report, _) = verify(&stage.launch(), &["--repair"]);
    assert_eq!(table(&report, "scouter.custom_drift")["differences"][0]["added"], 1, "{report:#}");
    assert_eq!(verify(&stage.launch(), &[]).1, 0);
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    // A repair that was killed has not told how many rows it added: the next session counts.
    let mut sidecar = stage.start().await;
    let counted = "select w.row_count, (select sum(row_count)::bigint from highwater.entity_watermark e
                                        where e.source_table = w.source_table),
                          (select count(*) from scouter.custom_drift where isfinite(created_at))
                   from highwater.watermark w where source_table = 'scouter.custom_drift'";
    let is_counted = async || {
        let row = client.query_one(counted, &[]).await.unwrap();
        let [table, entities, source] = [0, 1, 2].map(|column| row.get::<_, i64>(column));
        (table == source && entities == source).then_some(())
    };
    until("the entities are counted", DEADLINE, is_counted).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_table_or_its_archive_it_says_so() {
    let stage = Stage::shared(Shape::Named).await;
    stage.launch().must(&["setup"]);
    let said = |flags: &[&str]| {
        let output = stage.launch().output(&[&["verify"], flags].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let unknown = said(&["--table", "other"]);
    assert!(unknown.contains("\"other\"") && unknown.contains("scouter.psi_drift"), "{unknown}");
    // Not the storage that the sidecar writes to: nothing is made there, or taken for verified.
    let elsewhere = stage.folder().join("elsewhere");
    let launch = stage.launch().with("SCOUTER_STORAGE_URI", elsewhere.to_str().unwrap());
    let mut sidecar = stage.start().await;
    let output = launch.output(&["verify"]);
    let missing = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && missing.contains("nothing was archived there"), "{missing}");
    assert!(!elsewhere.exists());
    std::fs::create_dir(&elsewhere).unwrap();
    let output = launch.output(&["verify", "--repair"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!elsewhere.join("psi").exists());
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let reversed = said(&["--from", "2026-11-22", "--to", "2026-11-22"]);
    assert!(reversed.contains("later than --from"), "{reversed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_sidecar_it_archives_by_itself() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    // From before the slot, and after it.
    stage.insert_one(&client, "earlier", Some(1.0)).await;
    stage.launch().must(&["setup"]);
    for turn in 0..2 {
        stage.insert_one(&client, &format!("turn {turn}"), Some(1.0)).await;
        let (report, code) = verify(&stage.launch(), &[]);
        assert_eq!(code, 0, "{report:#}");
        assert_eq!(table(&report, "scouter.custom_drift")["archive_rows"], 2 + turn, "{report:#}");
        assert_eq!(stage.holder(&client).await, None);
    }
    // A sidecar goes on from there; one that can't archive is told with its reason.
    let mut sidecar = stage.start().await;
    stage.insert_one(&client, "by the sidecar", None).await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    client.batch_execute("update highwater.watermark set system_identifier = '7'").await.unwrap();
    let output = stage.launch().output(&["verify"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && errors.contains("is archived from system 7"), "{errors}");
}
