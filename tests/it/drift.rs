//! How far a model has moved, as scipy and Evidently have it of the same rows.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::http::Site;
use crate::support::schema::Shape;
use crate::support::stage::Stage;

const DEADLINE: Duration = Duration::from_secs(60);

/// Five days of reference, and five that are compared with them.
const DAYS: std::ops::Range<i64> = 1..11;
const MODEL: [&str; 6] = ["--space", "shop", "--name", "ranking", "--version", "1.0.0"];
const RANGE: [&str; 6] = ["--from", "2026-01-06", "--to", "2026-01-11", "--bin", "1d"];

fn day(number: i64) -> String {
    format!("2026-01-{number:02}")
}

/// By version, series and day.
type Rows<T> = BTreeMap<String, BTreeMap<String, BTreeMap<String, T>>>;

/// Counts of bins, of which some are empty on some days, and all but one on others.
fn counts(rng: &mut StdRng) -> Rows<BTreeMap<String, i64>> {
    let mut rows = Rows::new();
    for (version, shift) in [("1.0.0", 0), ("2.0.0", 20)] {
        for (feature, bins) in [("age", 6), ("income", 3), ("still", 1)] {
            for number in DAYS {
                let moved = if feature == "age" && number > 7 { 40 } else { 0 };
                let of_bin = |bin: i64| {
                    let is_empty = bins > 1 && rng.random_bool(0.15);
                    let count = 60 + 10 * bin + shift * bin % 30 + moved * bin + rng.random_range(0..20);
                    (bin.to_string(), if is_empty && bin > 0 { 0 } else { count })
                };
                let counts: BTreeMap<String, i64> = (0..bins).map(of_bin).collect();
                rows.entry(version.to_owned())
                    .or_default()
                    .entry(feature.to_owned())
                    .or_default()
                    .insert(day(number), counts);
            }
        }
    }
    rows
}

fn values(rng: &mut StdRng) -> Rows<Vec<f64>> {
    let mut rows = Rows::new();
    for (version, mean) in [("1.0.0", 0.5), ("2.0.0", 0.55)] {
        for metric in ["accuracy", "loss"] {
            for number in DAYS {
                let moved = if metric == "loss" && number > 8 { 0.2 } else { 0.0 };
                // Some are equal, which ks has to bear.
                let value = |_: i32| f64::from(rng.random_range(0..1_000)) / 5_000.0 + mean + moved;
                rows.entry(version.to_owned())
                    .or_default()
                    .entry(metric.to_owned())
                    .or_default()
                    .insert(day(number), (0..40).map(value).collect());
            }
        }
    }
    rows
}

async fn insert(client: &Client, counts: &Rows<BTreeMap<String, i64>>, values: &Rows<Vec<f64>>) {
    let psi = "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
               select $1::text::timestamptz + interval '5 hours', 'shop', 'ranking', $2, $3, $4::int, $5::bigint::int";
    let custom = "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                  select $1::text::timestamptz + n * interval '20 minutes', 'shop', 'ranking', $2, $3, value
                  from unnest($4::float8[]) with ordinality u(value, n)";
    for (version, features) in counts {
        for (feature, days) in features {
            for (day, counts) in days {
                for (bin, count) in counts {
                    let bin: i32 = bin.parse().unwrap();
                    client.execute(psi, &[day, version, feature, &bin, count]).await.unwrap();
                }
            }
        }
    }
    for (version, metrics) in values {
        for (metric, days) in metrics {
            for (day, values) in days {
                client.execute(custom, &[day, version, metric, values]).await.unwrap();
            }
        }
    }
}

/// What Python finds different.
fn compared(given: &Value) -> (bool, String) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut child = Command::new(folder.join("target/drift/bin/python"))
        .arg(folder.join("tests/it/drift.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python with scipy and Evidently: run `scripts/setup reader`");
    child.stdin.take().unwrap().write_all(given.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

/// Shares of bins by feature, as Python reads them; stored as the model's profile, and in a file.
async fn profile(stage: &Stage, client: &Client) -> Value {
    let share = |bins: i64| -> BTreeMap<String, f64> {
        (0..bins).map(|bin| (bin.to_string(), (2.0 * bin as f64 + 1.0) / (bins * bins) as f64)).collect()
    };
    let profile: BTreeMap<&str, BTreeMap<String, f64>> =
        [("age", share(6)), ("income", share(3)), ("still", share(1))].into();
    let bins = |shares: &BTreeMap<String, f64>| {
        shares
            .iter()
            .map(|(bin, share)| json!({"id": bin.parse::<i64>().unwrap(), "proportion": share}))
            .collect::<Vec<_>>()
    };
    let features: BTreeMap<&str, Value> =
        profile.iter().map(|(name, shares)| (*name, json!({"bins": bins(shares)}))).collect();
    let document = json!({ "features": features });
    client
        .batch_execute(&format!(
            "create table scouter.drift_profile (space text, name text, version text, drift_type text, profile jsonb);
             grant select on scouter.drift_profile to highwater;
             insert into scouter.drift_profile values ('shop', 'ranking', '1.0.0', 'Psi', $${document}$$)"
        ))
        .await
        .unwrap();
    std::fs::write(stage.folder().join("profile.json"), document.to_string()).unwrap();
    json!(profile)
}

/// The answers to questions of all measures and references.
fn answers(stage: &Stage) -> Vec<Value> {
    let from_file = format!("profile:{}", stage.folder().join("profile.json").display());
    let mut answers = Vec::new();
    let mut ask = |table: &str, against: &str, more: &[&str]| {
        let reference = match against {
            "window" => "2026-01-01..2026-01-06",
            "previous" => "previous",
            "ago" => "-5d",
            "version" => "version:2.0.0",
            "file" => &from_file,
            other => other,
        };
        let arguments =
            [&["drift", table, "--against", reference, "--format", "json"][..], &MODEL, &RANGE, more]
                .concat();
        let answer: Value = serde_json::from_str(&stage.launch().must(&arguments)).unwrap();
        let against = if against == "file" { "profile" } else { against };
        answers.push(
            json!({"table": table, "against": against, "arguments": arguments.join(" "), "answer": answer}),
        );
    };
    for against in ["window", "previous", "ago", "version"] {
        for measure in ["psi", "js", "hellinger", "tvd", "chi2"] {
            ask("psi", against, &["--measure", measure]);
        }
        ask("psi", against, &["--smoothing", "none"]);
        ask("psi", against, &["--smoothing", "evidently"]);
        ask("psi", against, &["--smoothing", "count", "--threshold", "chi2:0.001"]);
        ask("custom", against, &[]);
        ask("custom", against, &["--measure", "ks"]);
    }
    for against in ["window", "version"] {
        ask("psi", against, &["--measure", "js", "--threshold", "sd:3"]);
        ask("custom", against, &["--threshold", "sd:2"]);
    }
    for against in ["profile", "file"] {
        ask("psi", against, &[]);
        ask("psi", against, &["--measure", "chi2", "--threshold", "0.25"]);
    }
    answers
}

async fn it_is_the_same_over_http(stage: &Stage, site: &Site) {
    let path = "/api/drift/psi?space=shop&name=ranking&version=1.0.0&from=2026-01-06&to=2026-01-11&bin=1d&against=profile&top=2";
    let told: Value = serde_json::from_str(
        &stage.launch().must(
            &[
                &["drift", "psi", "--against", "profile", "--top", "2", "--format", "json"][..],
                &MODEL,
                &RANGE,
            ]
            .concat(),
        ),
    )
    .unwrap();
    let answer = site.get(path).await;
    assert_eq!((answer.status, answer.json()), (200, told));
    let unchanged = site.clone().with("if-none-match", answer.header("etag")).get(path).await;
    assert_eq!(unchanged.status, 304);
    for (more, status, said) in [
        ("&measure=ks", 400, "psi has no ks"),
        ("&against=profile:/etc/passwd", 400, "command line only"),
        ("&against=x", 400, "not a reference"),
        ("&threshold=x", 400, "not a threshold"),
        ("&top=0", 400, "top"),
        ("&version=9", 400, "twice"),
    ] {
        let path = format!(
            "{}{more}",
            path.replace("&against=profile", if more.contains("against") { "" } else { "&against=previous" })
        );
        let answer = site.get(&path).await;
        assert!(answer.status == status && answer.text().contains(said), "{path}: {}", answer.text());
    }
    assert_eq!(site.get(&path.replace("psi?", "quarantine?")).await.status, 404);
    assert_eq!(site.get(&path.replace("1.0.0", "9").replace("profile", "previous")).await.status, 404);
    let fresh = site.get(&format!("{path}&fresh=true")).await;
    assert_eq!((fresh.status, fresh.header("etag"), fresh.json()), (200, "", answer.json()));
}

fn what_moved_is_found(stage: &Stage) {
    let asked = |more: &[&str]| {
        stage.launch().must(
            &[&["drift", "psi", "--against", "2026-01-01..2026-01-06"][..], &MODEL, &RANGE, more].concat(),
        )
    };
    assert_eq!(asked(&["--summary", "--top", "1", "--format", "csv"]).lines().count(), 2);
    let summary = asked(&["--summary", "--top", "1", "--feature", "age", "--format", "csv"]);
    let lines: Vec<&str> = summary.lines().collect();
    assert_eq!(
        lines[0],
        "feature,highest,highest_at,bins,bins_over,since,until,largest_step,largest_step_at"
    );
    assert!(lines.len() == 2 && lines[1].starts_with("age,") && lines[1].contains("2026-01-0"), "{summary}");
    let js: Vec<String> = asked(&["--measure", "js", "--feature", "age", "--format", "csv"])
        .lines()
        .skip(1)
        .map(|line| line.split(',').nth(2).unwrap().to_owned())
        .collect();
    let drawn = asked(&["--feature", "age", "--plot"]);
    assert!(
        drawn.contains("psi against 2026-01-01T00:00:00Z..2026-01-06T00:00:00Z: shop ranking 1.0.0")
            && drawn.contains("age: psi"),
        "{drawn}"
    );
    let picture = stage.folder().join("drift.svg");
    asked(&["--plot", picture.to_str().unwrap()]);
    assert!(std::fs::read_to_string(picture).unwrap().contains("income"));
    // The same in SQL.
    let sql = "with c as (select bin_id, sum(bin_count) filter (where created_at < '2026-01-06') as n,
                             sum(bin_count) filter (where created_at between '2026-01-06' and '2026-01-07') as m
                      from psi where version = '1.0.0' and feature = 'age' group by bin_id)
               select js(array_agg(n order by bin_id), array_agg(m order by bin_id)) as js, psi(array_agg(n), array_agg(n)) as psi,
                      tvd(array_agg(n), null) as none from c";
    let answer = stage.launch().must(&["sql", sql, "--format", "csv"]);
    let row: Vec<&str> = answer.lines().nth(1).unwrap().split(',').collect();
    assert!(
        (row[0].parse::<f64>().unwrap() - js[0].parse::<f64>().unwrap()).abs() < 1e-12,
        "{answer} {js:?}"
    );
    assert!(row[1].parse::<f64>().unwrap().abs() < 1e-12 && row[2].is_empty(), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_those_of_scipy_and_evidently() {
    let seed = rand::random();
    eprintln!("drift: seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let stage = Stage::shared(Shape::Named).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    let (counts, values) = (counts(&mut rng), values(&mut rng));
    insert(&client, &counts, &values).await;
    let profile = profile(&stage, &client).await;
    stage.assert_archived(DEADLINE).await;
    let answers = answers(&stage);
    let (is_equal, text) =
        compared(&json!({"psi": counts, "custom": values, "profile": profile, "answers": answers}));
    assert!(is_equal, "{text}");
    it_is_the_same_over_http(&stage, &Site::of(&sidecar).await).await;
    what_moved_is_found(&stage);
    assert!(sidecar.terminate(DEADLINE).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_answer_is_told() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let mut rng = StdRng::seed_from_u64(1);
    insert(&client, &counts(&mut rng), &values(&mut rng)).await;
    let _sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let empty = stage.folder().join("empty.json");
    std::fs::write(&empty, "{}").unwrap();
    let no_profile = format!("profile:{}", empty.display());
    let refused = |table: &str, more: &[&str]| {
        let output = stage.launch().output(&[&["drift", table][..], &MODEL, &RANGE, more].concat());
        assert!(!output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    };
    for (table, more, said) in [
        ("psi", &["--measure", "ks"][..], "psi has no ks"),
        ("custom", &["--measure", "psi"], "custom has no psi: it has smd and ks"),
        ("quarantine", &[], "none of custom, psi, spc"),
        ("psi", &["--threshold", "sd:3"], "sd needs a reference of several bins"),
        ("psi", &["--measure", "tvd", "--threshold", "chi2:0.05"], "tvd has no rule of chance"),
        ("psi", &["--threshold", "high"], "not a threshold"),
        ("psi", &["--measure", "js", "--smoothing", "count"], "js has no use for smoothing"),
        ("psi", &["--threshold", "chi2:1e-17"], "not a threshold"),
        (
            "psi",
            &["--against", "2026-01-01..2026-01-02", "--threshold", "sd:3"],
            "needs a reference of several bins",
        ),
        ("psi", &["--against", "-0d"], "not a reference"),
        ("psi", &["--top", "0"], "0"),
        ("psi", &["--against", "profile:/dev/zero"], "more than 64 MiB"),
        ("psi", &["--against", "yesterday"], "not a reference"),
        ("psi", &["--against", "2020-01-01..2020-02-01"], "the reference has no psi rows"),
        ("psi", &["--against", "version:9"], "the reference has no psi rows"),
        ("psi", &["--against", &no_profile], "no psi profile of Scouter"),
        ("psi", &["--against", "profile:/nowhere"], "/nowhere"),
        ("psi", &["--against", "profile"], "no psi profile of this model"),
        ("custom", &["--against", &no_profile, "--measure", "ks"], "a profile has no values"),
    ] {
        let text = refused(table, more);
        assert!(text.contains(said), "{table} {more:?}: {text}");
    }
    // A model that nobody knows is told as by `query`, and what has no rows in the range has no answer.
    let drift = |version: &str, more: &[&str]| {
        let model = ["--space", "shop", "--name", "ranking", "--version", version];
        stage.launch().output(&[&["drift", "psi", "--format", "csv"][..], &model, more].concat())
    };
    let unknown = String::from_utf8(drift("9", &RANGE).stderr).unwrap();
    assert!(unknown.contains("did you mean") && unknown.contains("1.0.0"), "{unknown}");
    let nothing = drift("1.0.0", &["--from", "2020-01-01", "--to", "2020-02-01", "--bin", "1d"]);
    assert!(nothing.status.success() && nothing.stdout.iter().filter(|byte| **byte == b'\n').count() == 1);
    for (sql, said) in [
        (
            "select psi(array_agg(value), array_agg(value) filter (where value > 0.6)) from custom",
            "two lists of one length",
        ),
        ("select psi(array_agg(metric), array_agg(metric)) from custom", "two lists of numbers"),
        ("select psi(1, 2)", "two lists of numbers"),
    ] {
        let output = stage.launch().output(&["sql", sql]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(said), "{sql}: {text}");
    }
}
