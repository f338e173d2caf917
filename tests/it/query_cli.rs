//! `highwater query`, `entities` and `sql`, as their users see them.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::schema::Shape;
use crate::support::stage::Stage;

const DEADLINE: Duration = Duration::from_secs(60);

const ROWS: &str = "
    insert into scouter.custom_drift (created_at, space, name, version, metric, value)
    select '2026-11-01'::timestamptz + n * interval '20 minutes', 'shop', 'ranking', '2.1.0', 'accuracy', n
      from generate_series(0, 5) n;
    insert into scouter.spc_drift (created_at, space, name, version, feature, value)
    values ('2026-11-01', 'shop', 'ranking', '2.1.0', 'age', 4), ('2026-11-01', 'shop', 'ranking', '2.1.0', 'age', null);
    insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
    values ('2026-11-01', 'shop', 'ranking', '2.1.0', 'age', 0, 1), ('2026-11-01', 'shop', 'ranking', '2.1.0', 'age', 1, 3)";

/// What a command prints, and its exit code.
fn said(stage: &Stage, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = stage.launch().output(arguments);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A query for the day of the rows.
fn query<'a>(kind: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let model = ["--space", "shop", "--name", "ranking", "--version", "2.1.0"];
    [&["query", kind], &model[..], &["--from", "2026-11-01", "--to", "2026-11-02"], more].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_is_printed_in_every_format() {
    let stage = Stage::shared(Shape::Named).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    client.batch_execute(ROWS).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    json_is_what_scouter_s_clients_read(&stage);
    tables_csv_and_arrow_have_the_same_rows(&stage);
    plots_are_drawn(&stage);
    entities_and_sql(&stage);
    a_column_of_any_table_is_binned(&stage);
    percentiles_are_those_of_sql(&stage);
    mistakes_are_named(&stage);
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// What of any table's column, by what, and where.
fn percentiles_are_those_of_sql(stage: &Stage) {
    let day = ["--from", "2026-11-01", "--to", "2026-11-02", "--bin", "1h", "--format", "json"];
    let asked = ["query", "custom", "--value", "value", "--stat", "p50,p95,p100,mean"];
    let (code, out, errors) = said(stage, &[&asked[..], &day].concat());
    assert_eq!(code, Some(0), "{errors}");
    // As `percentile_cont` of 0 to 2, and of 3 to 5.
    assert_eq!(
        serde_json::from_str::<Value>(&out).unwrap(),
        json!([{"created_at": "2026-11-01T00:00:00Z", "p50": 1.0, "p95": 1.9, "p100": 2.0, "mean": 1.0},
               {"created_at": "2026-11-01T01:00:00Z", "p50": 4.0, "p95": 4.9, "p100": 5.0, "mean": 4.0}])
    );
}

fn a_column_of_any_table_is_binned(stage: &Stage) {
    let asked = |more: &[&str]| {
        let common = ["--from", "2026-11-01", "--to", "2026-11-02", "--bin", "1h"];
        said(stage, &[&["query"], more, &common[..]].concat())
    };
    let rows = |more: &[&str]| -> Value {
        let (code, out, errors) = asked(&[more, &["--format", "json"]].concat());
        assert_eq!(code, Some(0), "{errors}");
        serde_json::from_str(&out).unwrap()
    };
    assert_eq!(
        rows(&["custom", "--value", "value", "--by", "metric", "--stat", "mean,min,max,count,sum"]),
        json!([
            {"created_at": "2026-11-01T00:00:00Z", "metric": "accuracy", "mean": 1.0, "min": 0.0, "max": 2.0, "count": 3, "sum": 3.0},
            {"created_at": "2026-11-01T01:00:00Z", "metric": "accuracy", "mean": 4.0, "min": 3.0, "max": 5.0, "count": 3, "sum": 12.0},
        ])
    );
    // Of an integer the sum is one; a null does not count.
    assert_eq!(
        rows(&[
            "psi",
            "--value",
            "bin_count",
            "--stat",
            "sum,count",
            "--where",
            "bin_id > 0 -- only",
            "--space",
            "shop"
        ]),
        json!([{"created_at": "2026-11-01T00:00:00Z", "sum": 3, "count": 1}])
    );
    assert_eq!(
        rows(&["spc", "--value", "value", "--stat", "count"]),
        json!([{"created_at": "2026-11-01T00:00:00Z", "count": 1}])
    );
    assert_eq!(
        rows(&["spc", "--value", "feature", "--stat", "max"]),
        json!([{"created_at": "2026-11-01T00:00:00Z", "max": "age"}])
    );
    assert_eq!(rows(&["custom", "--value", "value", "--name", "it's"]), json!([]));
    let (code, out, errors) = asked(&["custom", "--value", "value", "--stat", "mean,min,max", "--plot"]);
    assert!(code == Some(0) && out.contains("custom: mean, min, max of value"), "{out}{errors}");
    for (more, expected) in [
        (
            &["none", "--value", "value"][..],
            "the archive has no table \"none\"; it has custom, psi, spc, quarantine",
        ),
        (
            &["custom", "--value", "worth"],
            "custom has no column \"worth\"; it has created_at, space, name, version, metric, value",
        ),
        (&["custom", "--value", "metric"], "there is no mean of metric, which holds no numbers"),
        (&["custom", "--value", "value", "--by", "mean"], "the answer would have two columns \"mean\""),
        (&["custom", "--value", "value", "--where", "true) union (select 1"], "found: union"),
        (
            &["custom", "--value", "value", "--where", "repeat(metric, 5) = ''"],
            "the function repeat is not there",
        ),
        (&["spc"], "--space is \"missing\", but must be given"),
        (
            &["events"],
            "the table is \"events\", but must be custom, psi or spc; or any table of the archive with --value",
        ),
    ] {
        let (code, _, errors) = asked(more);
        assert!(
            code != Some(0) && errors.to_lowercase().contains(&expected.to_lowercase()),
            "{more:?}: {errors}"
        );
    }
}

fn json_is_what_scouter_s_clients_read(stage: &Stage) {
    let answer = |kind: &str| -> Value {
        let (code, out, errors) = said(stage, &query(kind, &["--bin", "1h", "--format", "json"]));
        assert_eq!(code, Some(0), "{errors}");
        serde_json::from_str(&out).unwrap()
    };
    let stats = |avg: f64| {
        json!({"avg": avg, "lower_bound": avg - 1.0, "upper_bound": avg + 1.0, "count": 3, "nulls": 0, "nans": 0,
               "min": avg - 1.0, "max": avg + 1.0})
    };
    let bins = ["2026-11-01T00:00:00Z", "2026-11-01T01:00:00Z"];
    let accuracy = json!({"metric": "accuracy", "created_at": bins, "stats": [stats(1.0), stats(4.0)]});
    assert_eq!(answer("custom"), json!({"metrics": {"accuracy": accuracy}}));
    assert_eq!(
        answer("spc"),
        json!({"features": {"age": {"created_at": [bins[0]], "values": [4.0], "counts": [1], "nulls": [1], "nans": [0],
                                    "min": [4.0], "max": [4.0]}}})
    );
    let parts = json!({"0": 0.25, "1": 0.75});
    assert_eq!(
        answer("psi"),
        json!([{"feature": "age", "created_at": [bins[0]], "bin_proportions": [parts], "overall_proportions": parts,
                "counts": [4], "rows": [2]}])
    );
}

fn tables_csv_and_arrow_have_the_same_rows(stage: &Stage) {
    let printed = |kind: &str, more: &[&str]| {
        let (code, out, errors) = said(stage, &query(kind, more));
        assert_eq!(code, Some(0), "{errors}");
        out
    };
    let table = printed("spc", &["--bin", "1d"]);
    assert_eq!(
        table,
        "CREATED_AT            FEATURE  VALUE  COUNT  NULLS  NANS  MIN  MAX\n2026-11-01T00:00:00Z  age      4.0    1      1      0     4.0  4.0\n"
    );
    assert_eq!(
        printed("psi", &["--points", "10", "--format", "csv"]),
        "created_at,feature,bin_id,bin_count,proportion,rows\n\
         2026-11-01T00:00:00Z,age,0,1,0.25,1\n2026-11-01T00:00:00Z,age,1,3,0.75,1\n"
    );
    let nothing = printed("custom", &["--metric", "other", "--format", "csv"]);
    assert_eq!(nothing, "created_at,metric,avg,lower_bound,upper_bound,count,nulls,nans,min,max\n");
    let arrow = stage.launch().output(&query("custom", &["--bin", "30m", "--format", "arrow"]));
    let read = arrow::ipc::reader::StreamReader::try_new(&arrow.stdout[..], None).unwrap();
    assert_eq!(read.map(|batch| batch.unwrap().num_rows()).sum::<usize>(), 4);
}

fn plots_are_drawn(stage: &Stage) {
    let (code, drawn, errors) = said(stage, &query("custom", &["--bin", "1h", "--plot"]));
    assert_eq!(code, Some(0), "{errors}");
    assert!(drawn.contains("shop ranking 2.1.0, bins of 1h") && drawn.contains("accuracy"), "{drawn}");
    let file = stage.folder().join("psi.svg");
    let (code, out, errors) = said(stage, &query("psi", &["--bin", "1h", "--plot", file.to_str().unwrap()]));
    assert_eq!((code, out.as_str()), (Some(0), ""), "{errors}");
    let svg = std::fs::read_to_string(file).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("bin 1"), "{svg}");
    let file = stage.folder().join("psi.png");
    let (code, out, errors) = said(stage, &query("psi", &["--bin", "1h", "--plot", file.to_str().unwrap()]));
    assert_eq!((code, out.as_str()), (Some(0), ""), "{errors}");
    assert!(std::fs::read(file).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    let (code, _, errors) = said(stage, &query("spc", &["--plot", "spc.bmp"]));
    assert!(code == Some(1) && errors.contains("a file that ends in .svg or .png"), "{errors}");
}

fn entities_and_sql(stage: &Stage) {
    let (_, entities, _) = said(stage, &["entities", "--format", "csv"]);
    let mut lines: Vec<&str> = entities.lines().collect();
    // The row that shows the test that everything is archived has the time of now.
    assert!(lines.remove(2).starts_with("custom,tests,model,1.0.0,"), "{entities}");
    let wanted = [
        "kind,space,name,version,first,last,rows",
        "custom,shop,ranking,2.1.0,2026-11-01T00:00:00Z,2026-11-01T01:40:00Z,6",
        "psi,shop,ranking,2.1.0,2026-11-01T00:00:00Z,2026-11-01T00:00:00Z,2",
        "spc,shop,ranking,2.1.0,2026-11-01T00:00:00Z,2026-11-01T00:00:00Z,2",
    ];
    assert_eq!(lines, wanted);
    let sql = "select metric, max(value) as most from custom group by 1 order by 1";
    let (code, rows, _) = said(stage, &["sql", sql, "--format", "json"]);
    assert_eq!(code, Some(0));
    assert_eq!(rows, "[{\"metric\":\"accuracy\",\"most\":5.0},{\"metric\":\"last\",\"most\":null}]\n");
}

fn mistakes_are_named(stage: &Stage) {
    let model = ["query", "custom", "--space", "shop", "--version", "2.1.0", "--name"];
    for (arguments, told) in [
        (&["rankin", "--from", "-1d"][..], "did you mean \"shop\", \"ranking\", \"2.1.0\""),
        (&["n", "--from", "now", "--to", "-1d"], "must end after its start"),
        (&["n", "--from", "-1d", "--bin", "0s"], "the bin is 0s, but must be"),
        (&["n", "--from", "-1d", "--points", "0"], "does not fit into 0 bins"),
        (&["n", "--from", "-1d", "--bin", "often"], "--bin"),
        (&["n", "--from", "lately"], "-30d or now"),
    ] {
        let (code, out, errors) = said(stage, &[&model[..], arguments].concat());
        assert!(code != Some(0) && out.is_empty() && errors.contains(told), "{arguments:?}: {out}{errors}");
    }
    for (arguments, told) in [
        (["sql", "select nothing from custom", "--format", "csv"], "nothing"),
        (["check", "--slot", "x", "--format=arrow"], "--format is \"arrow\", but must be table or json"),
    ] {
        let (code, out, errors) = said(stage, &arguments);
        assert!(code != Some(0) && out.is_empty() && errors.contains(told), "{arguments:?}: {out}{errors}");
    }
}
