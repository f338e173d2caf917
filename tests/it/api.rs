//! The history over HTTP: the same answers as those of the command line, tags, and turns.

use std::io::Cursor;
use std::time::Duration;

use arrow::ipc::reader::StreamReader;
use futures::future::join_all;
use serde_json::Value;

use crate::support::http::Site;
use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

const MODEL: &str = "space=shop&name=ranking&version=1.0.0";
const MODEL_FLAGS: [&str; 6] = ["--space", "shop", "--name", "ranking", "--version", "1.0.0"];

/// An archive with a load's rows, and a sidecar that goes on.
async fn archived(stage: &Stage) -> crate::support::sidecar::Sidecar {
    create_entities(&stage.connect().await).await;
    let sidecar = stage.start().await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Entity);
    load.goes_on(3_000, DEADLINE).await;
    load.stop().await;
    stage.assert_archived(DEADLINE).await;
    sidecar
}

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_as_the_command_line_does() {
    let stage = Stage::shared(Shape::Entity).await;
    let sidecar = archived(&stage).await;
    let site = Site::of(&sidecar).await;
    let launch = stage.launch();
    let (from, to) = ("2000-01-01", "2100-01-01");
    for table in ["custom", "psi", "spc"] {
        let path = format!("/api/query/{table}?{MODEL}&from={from}&to={to}&bin=365d");
        let flags = [
            &["query", table, "--from", from, "--to", to, "--bin", "365d", "--format", "json"][..],
            &MODEL_FLAGS,
        ]
        .concat();
        let expected: Value = serde_json::from_str(&launch.must(&flags)).unwrap();
        assert_eq!(site.json(&path).await, expected, "{table}");
        let arrow = site.clone().with("accept", "application/vnd.apache.arrow.stream").get(&path).await;
        let batches: Vec<_> =
            StreamReader::try_new(Cursor::new(&arrow.body), None).unwrap().map(Result::unwrap).collect();
        assert!(batches.iter().map(|batch| batch.num_rows()).sum::<usize>() > 0, "{table}");
    }
    let path = format!(
        "/api/query/custom?from={from}&to={to}&bin=365d&value=value&by=metric&stat=count&stat=max&{MODEL}"
    );
    let found = site.json(&path).await;
    assert!(found["series"].as_array().is_some_and(|series| !series.is_empty()), "{found}");
    let entities: Value = serde_json::from_str(&launch.must(&["entities", "--format", "json"])).unwrap();
    let told = site.json("/api/entities").await;
    assert_eq!(told.as_array().unwrap().len(), entities.as_array().unwrap().len());
    for one in told.as_array().unwrap() {
        let is_it =
            |other: &&Value| ["kind", "space", "name", "version"].iter().all(|key| one[key] == other[key]);
        let other = entities.as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("{one}"));
        assert_eq!(one["rows"], other["rows"]);
    }
    let found = site.json("/api/entities?search=RANK&table=psi&limit=1").await;
    assert_eq!((found.as_array().unwrap().len(), &found[0]["kind"]), (1, &"psi".into()));
    let coverage = site.json("/api/coverage").await;
    assert!(coverage["tables"].as_array().unwrap().iter().any(|table| {
        table["table"] == "custom"
            && table["days"].as_object().unwrap().values().any(|day| day["files"].as_u64() > Some(0))
    }));
    let description = site.json("/api/openapi.json").await;
    for (path, about) in description["paths"].as_object().unwrap() {
        assert!(about["get"]["summary"].is_string());
        if !path.contains('{') {
            assert!([200, 400, 404].contains(&site.get(path).await.status), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_has_not_changed_is_not_sent_again() {
    let stage = Stage::shared(Shape::Entity).await;
    let sidecar = archived(&stage).await;
    let site = Site::of(&sidecar).await;
    let path = format!("/api/query/custom?{MODEL}&from=2000-01-01&to=2100-01-01&bin=365d");
    let first = site.get(&path).await;
    let tag = first.header("etag").to_owned();
    assert!(!tag.is_empty() && first.header("cache-control").contains("no-cache"));
    let again = site.clone().with("if-none-match", &tag);
    let unchanged = again.get(&path).await;
    assert_eq!((unchanged.status, unchanged.body.len(), unchanged.header("etag")), (304, 0, tag.as_str()));
    // Whoever asks without a tag gets the same, which is kept.
    let kept = site.get(&path).await;
    assert_eq!((kept.status, &kept.body, kept.header("etag")), (200, &first.body, tag.as_str()));
    assert_eq!(kept.header("content-type"), first.header("content-type"));
    // Another question, and the same one once more is archived.
    assert_eq!(again.get(&path.replace("365d", "366d")).await.status, 200);
    stage.assert_archived(DEADLINE).await;
    until("the answer is a new one", DEADLINE, async || (again.get(&path).await.status == 200).then_some(()))
        .await;
    // What is not archived yet has no version.
    let fresh = site.get(&format!("{path}&fresh=true")).await;
    assert_eq!((fresh.status, fresh.header("etag")), (200, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_ask_at_once_take_turns_and_the_archive_goes_on() {
    let stage = Stage::shared(Shape::Entity).await;
    let sidecar = archived(&stage).await;
    let site = Site::of(&sidecar).await;
    let client = stage.connect().await;
    let ask = async |number: usize| {
        let mut statuses = Vec::new();
        for turn in 0..10 {
            let bin = 3_600 + number * 100 + turn;
            let answer = site.get(&format!("/api/query/psi?{MODEL}&from=-30d&bin={bin}s")).await;
            if answer.status == 429 {
                assert_eq!(answer.header("retry-after"), "1");
            }
            statuses.push(answer.status);
        }
        statuses
    };
    let asking = join_all((0..50).map(ask));
    let archiving = async {
        for _ in 0..5 {
            let target = stage.insert_one(&client, "beside", Some(1.0)).await;
            stage.acknowledged(&client, target, DEADLINE).await;
        }
    };
    let (statuses, ()) = tokio::join!(asking, archiving);
    let statuses: Vec<u16> = statuses.into_iter().flatten().collect();
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    assert!(statuses.iter().filter(|status| **status == 200).count() >= 50, "{statuses:?}");
    assert_eq!(site.get(&format!("/api/query/psi?{MODEL}&from=-30d")).await.status, 200);
    stage.assert_archived(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_only_reads_answers_without_a_database() {
    let stage = Stage::shared(Shape::Entity).await;
    let mut sidecar = archived(&stage).await;
    let expected = Site::of(&sidecar).await.json("/api/entities").await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    let mut reader = stage
        .launch()
        .with("DATABASE_URI", "postgresql://nobody@127.0.0.1:1/nothing")
        .start_command(&["serve"]);
    let site = Site::of(&reader).await;
    assert_eq!((site.get("/livez").await.status, site.get("/readyz").await.status), (200, 200));
    let found = site.json("/api/entities").await;
    let keys = |all: &Value| -> Vec<String> {
        all.as_array()
            .unwrap()
            .iter()
            .map(|one| format!("{} {} {}", one["kind"], one["name"], one["rows"]))
            .collect()
    };
    assert_eq!(keys(&found), keys(&expected));
    assert_eq!(site.get(&format!("/api/query/custom?{MODEL}&from=2000-01-01&bin=365d")).await.status, 200);
    assert_eq!(site.json("/api/state").await["archives"], false);
    let coverage = site.json("/api/coverage").await;
    assert!(coverage["database"].is_string() && !coverage["tables"].as_array().unwrap().is_empty());
    let text = site.get("/metrics").await.text();
    assert!(
        text.contains("highwater_build_info") && !text.contains("highwater_archive_lag_seconds"),
        "{text}"
    );
    assert!(reader.terminate(DEADLINE).await.success());
    // Nothing there yet is no error.
    let empty = stage.folder().join("empty");
    fs_create(&empty);
    let launch = stage.launch().with("SCOUTER_STORAGE_URI", &empty.display().to_string());
    let launch = launch.with("HIGHWATER_HTTP_SQL", "on");
    let reader = launch.start_command(&["serve"]);
    let site = Site::of(&reader).await;
    assert_eq!(site.json("/api/entities").await, Value::Array(Vec::new()));
    assert_eq!(site.get(&format!("/api/query/custom?{MODEL}&from=-1d")).await.status, 404);
    // A folder that is not there is one that may not be mounted.
    std::fs::remove_dir(&empty).unwrap();
    let away = site.get("/api/entities").await;
    assert!(away.status == 503 && away.text().contains("empty"), "{}", away.text());
    assert_eq!(site.get("/api/sql?query=select+1").await.status, 503);
}

fn fs_create(folder: &std::path::Path) {
    std::fs::create_dir_all(folder).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn scouters_own_routes_answer_in_scouters_own_form() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    create_entities(&client).await;
    client
        .batch_execute(
            "create table scouter.drift_profile (uid text primary key, space text, name text, version text, drift_type text, profile jsonb);
             grant select on scouter.drift_profile to highwater;
             alter table scouter.drift_entities add column if not exists uid text;
             update scouter.drift_entities set uid = 'the-uid' where (space, name, version) = ('shop', 'ranking', '1.0.0');
             insert into scouter.drift_profile values ('p', 'shop', 'ranking', '1.0.0', 'Psi',
                '{\"features\": {\"age\": {\"id\": \"age\", \"bins\": [{\"id\": 0, \"proportion\": 0.5}, {\"id\": 1, \"proportion\": 0.5}]}}}');
             insert into scouter.psi_drift (created_at, entity_id, feature, bin_id, bin_count)
                select now() - interval '30 min', id, f, b, 100 * (b + 1) from scouter.drift_entities, unnest(array['age', 'other']) f, generate_series(0, 1) b
                where uid = 'the-uid';
             insert into scouter.custom_drift (created_at, entity_id, metric, value)
                select now() - interval '30 min', id, 'accuracy', 0.5 from scouter.drift_entities where uid = 'the-uid';
             insert into scouter.spc_drift (created_at, entity_id, feature, value)
                select now() - interval '30 min', id, 'age', 2.5 from scouter.drift_entities where uid = 'the-uid'",
        )
        .await
        .unwrap();
    let sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    // What is not archived yet is in the answer, too, in the same bins.
    client
        .batch_execute(
            "insert into scouter.custom_drift (created_at, entity_id, metric, value)
                select now() - interval '10 min', id, 'accuracy', 0.7 from scouter.drift_entities where uid = 'the-uid'",
        )
        .await
        .unwrap();
    let site = Site::of(&sidecar).await;
    let asked = "uid=the-uid&space=ignored&time_interval=OneHour&max_data_points=2&drift_type=Custom";
    let found = site.json(&format!("/scouter/drift/custom?{asked}")).await;
    let accuracy = &found["metrics"]["accuracy"];
    assert_eq!(accuracy["metric"], "accuracy");
    let means: Vec<f64> =
        accuracy["stats"].as_array().unwrap().iter().map(|stats| stats["avg"].as_f64().unwrap()).collect();
    assert!(means == [0.6] || means == [0.5, 0.7], "{found}");
    let found = site.json(&format!("/scouter/drift/spc?{asked}")).await;
    assert_eq!(found["features"]["age"]["values"], serde_json::json!([2.5]));
    let found = site.json(&format!("/scouter/drift/psi?{asked}")).await;
    let age = &found["features"]["age"];
    let (third, two_thirds) = (1.0_f64 / 3.0, 2.0_f64 / 3.0);
    let psi = (0.5 - third) * (0.5 / third).ln() + (0.5 - two_thirds) * (0.5 / two_thirds).ln();
    for index in [&age["psi"][0], &age["overall_psi"]] {
        assert!((index.as_f64().unwrap() - psi).abs() < 1e-6, "{found}");
    }
    assert!((age["bins"]["1"].as_f64().unwrap() - two_thirds).abs() < 1e-9);
    // It is not in the profile.
    assert_eq!(found["features"].get("other"), None);
    assert_eq!(site.get("/scouter/drift/psi?uid=nobody").await.status, 404);
    assert_eq!(site.get("/scouter/drift/psi?time_interval=OneHour").await.status, 400);
    assert_eq!(site.get("/scouter/drift/psi?space=shop&name=ranking&version=1.1.0").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_is_answered_where_it_is_allowed_and_ends_with_its_request() {
    let stage = Stage::shared(Shape::Entity).await;
    let mut sidecar = archived(&stage).await;
    let site = Site::of(&sidecar).await;
    let path = "/api/sql?query=select+metric,count(*)+as+rows+from+custom+group+by+metric+order+by+metric";
    assert_eq!(site.get(path).await.status, 404);
    assert!(sidecar.terminate(DEADLINE).await.success());
    let sidecar = stage.launch().with("HIGHWATER_HTTP_SQL", "on").with("HIGHWATER_MEMORY", "64MiB").start();
    let site = Site::of(&sidecar).await;
    let rows = site.json(path).await;
    assert!(rows.as_array().unwrap().iter().all(|row| row["rows"].as_u64() > Some(0)), "{rows}");
    let csv = site.clone().with("accept", "text/csv").get(path).await;
    assert!(csv.text().starts_with("metric,rows\n"), "{}", csv.text());
    let wrong = site.get("/api/sql?query=select+nothing+from+custom").await;
    assert!(
        wrong.status == 400 && wrong.json()["detail"].as_str().unwrap().contains("nothing"),
        "{}",
        wrong.text()
    );
    for wrong in ["drop+table+custom", "copy+custom+to+'/tmp/x'", "select+repeat('x',99)"] {
        assert_eq!(site.get(&format!("/api/sql?query={wrong}")).await.status, 400, "{wrong}");
    }
    // Whoever asks goes away: so does the query.
    let endless = "/api/sql?query=select+count(*)+from+custom+a,custom+b,custom+c,custom+d,custom+e,custom+f";
    let asking = tokio::spawn({
        let site = site.clone();
        async move { site.get(endless).await }
    });
    let children = || crate::support::freeze::children(sidecar.pid()).len();
    until("the query runs", DEADLINE, async || (children() == 1).then_some(())).await;
    asking.abort();
    until("it is gone", DEADLINE, async || (children() == 0).then_some(())).await;
    stage.assert_archived(DEADLINE).await;
}
