//! What `/metrics` tells, under load, and that the documentation, the dashboard and the alerts speak of the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::http::{Site, promtool};
use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The names of the families of a text in Prometheus' format.
fn families(text: &str) -> BTreeSet<String> {
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    names.map(str::to_owned).collect()
}

/// The names of ours that a text has, whatever it is, without what a histogram adds.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let ours = words.filter(|word| {
        ["highwater_", "process_"].iter().any(|prefix| word.starts_with(prefix) && word.len() > prefix.len())
    });
    let plain = |word: &str| {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
        family.filter(|family| family.ends_with("_seconds")).unwrap_or(word).to_owned()
    };
    ours.map(plain).collect()
}

/// The value of a metric with its labels, in a text in Prometheus' format.
fn value(text: &str, metric: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {metric} in\n{text}")).parse().unwrap()
}

/// Makes sure that the page of metrics has all that are told, and no others.
fn assert_documented(text: &str) {
    let page = read("docs/metrics.md");
    let documented: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
        .map(str::to_owned)
        .collect();
    let rare: BTreeSet<String> = page
        .lines()
        .filter(|line| line.contains("*(absent until it happens)*"))
        .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
        .map(str::to_owned)
        .collect();
    let told = families(text);
    let missing: Vec<_> = documented.difference(&told).filter(|name| !rare.contains(*name)).collect();
    let undocumented: Vec<_> = told.difference(&documented).collect();
    assert!(
        missing.is_empty() && undocumented.is_empty(),
        "not told: {missing:?}; not documented: {undocumented:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_under_load_are_true_documented_and_well_formed() {
    let stage = Stage::private_partitioned(Shape::Entity).await;
    stage.cluster().conf(&[("max_slot_wal_keep_size", "1GB")]);
    stage.cluster().reload();
    let client = stage.connect().await;
    create_entities(&client).await;
    // Rows that are copied, of which one does not fit.
    stage.insert_one(&client, "copied", Some(1.0)).await;
    client
        .batch_execute("insert into scouter.custom_drift (created_at, entity_id, metric, value) values (now(), 999999, 'lost', 1)")
        .await
        .unwrap();
    let sidecar = stage.start().await;
    let site = Site::of(&sidecar).await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Entity);
    load.goes_on(5_000, DEADLINE).await;
    let text = until("it has archived", DEADLINE, async || {
        let text = site.get("/metrics").await.text();
        text.contains("highwater_archived_rows_total{table=\"psi\",origin=\"stream\"}").then_some(text)
    })
    .await;
    let lag = value(&text, "highwater_archive_lag_seconds");
    assert!((0.0..30.0).contains(&lag), "{lag}");
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    // The watermarks are looked at after a moment.
    let text = until("all is archived, and seen", DEADLINE, async || {
        let text = site.get("/metrics").await.text();
        let is_whole = !text.contains("state=\"snapshot\"} 1") && text.contains("state=\"streaming\"} 1");
        (is_whole && value(&text, "highwater_archive_lag_seconds") == 0.0).then_some(text)
    })
    .await;
    for (table, name) in [("custom", "custom_drift"), ("psi", "psi_drift"), ("spc", "spc_drift")] {
        let of = |origin: &str| {
            let metric = format!("highwater_archived_rows_total{{table=\"{table}\",origin=\"{origin}\"}}");
            if text.contains(&metric) { value(&text, &metric) } else { 0.0 }
        };
        let sql = format!(
            "select count(*)::float8 from scouter.{name} join scouter.drift_entities e on e.id = entity_id"
        );
        let rows: f64 = client.query_one(&sql, &[]).await.unwrap().get(0);
        assert_eq!(of("stream") + of("copy"), rows, "{table}");
        let received = value(&text, &format!("highwater_received_rows_total{{table=\"{table}\"}}"));
        assert_eq!(received, of("stream"), "{table}");
        assert_eq!(
            value(&text, &format!("highwater_table_state{{table=\"{table}\",state=\"streaming\"}}")),
            1.0
        );
    }
    assert_eq!(value(&text, "highwater_quarantined_rows_total{table=\"custom\",reason=\"entity\"}"), 1.0);
    assert!(value(&text, "process_resident_memory_bytes") > 1e6);
    assert_eq!(promtool(&["check", "metrics"], &text), Ok(()));
    let open =
        site.clone().with("accept", "application/openmetrics-text; version=1.0.0").get("/metrics").await;
    assert!(open.header("content-type").starts_with("application/openmetrics-text; version=1.0.0"));
    assert!(open.text().ends_with("# EOF\n"));
    assert_documented(&text);
}

#[test]
fn the_dashboard_and_the_alerts_name_metrics_that_there_are() {
    let documented = named(&read("docs/metrics.md"));
    for path in
        ["deploy/grafana/highwater.json", "deploy/prometheus/alerts.yml", "deploy/prometheus/alerts_test.yml"]
    {
        let text = read(path);
        let unknown: Vec<String> = named(&text).difference(&documented).cloned().collect();
        assert!(unknown.is_empty(), "{path} names {unknown:?}");
    }
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus");
    let path = |name: &str| rules.join(name).display().to_string();
    assert_eq!(promtool(&["check", "rules", &path("alerts.yml")], ""), Ok(()));
    assert_eq!(promtool(&["test", "rules", &path("alerts_test.yml")], ""), Ok(()));
}
