//! The archiver inside another program: it archives, it stops however it is told to, and leaves nothing
//! behind.

use std::time::Duration;

use axum::Router;
use highwater::config::{Config, HttpSettings, ObjectStorageSettings, SourceConfig};
use highwater::http::Server;
use highwater::{Archiver, Error};
use reqwest::Method;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::support::archive::archived_rows;
use crate::support::http::Site;
use crate::support::schema::Shape;
use crate::support::stage::Stage;
use crate::support::wait::{throughout, until};

const DEADLINE: Duration = Duration::from_secs(60);

/// How soon an archiver that was dropped, or has stopped, must have let go of everything.
const SOON: Duration = Duration::from_secs(10);

/// Settings as an embedding server has them, and everything set up in the database.
async fn prepare(stage: &Stage) -> Config {
    let source = SourceConfig::new(Some(&stage.cluster().uri_unix(&stage.name)), &|_| None).unwrap();
    let storage = stage.storage().display().to_string();
    let mut config = Config::new(source, ObjectStorageSettings::new(&storage, "us-east-1").unwrap());
    config.slot.clone_from(&stage.name);
    config.publication.clone_from(&stage.name);
    config.max_lag = Duration::from_secs(1);
    config.check().unwrap();
    highwater::setup::setup(&config).await.unwrap();
    config
}

async fn let_go(stage: &Stage, tasks_before: usize) {
    let client = stage.connect().await;
    let idle = async || stage.holder(&client).await.is_none().then_some(());
    until("nobody holds the slot", SOON, idle).await;
    let sessions = "select count(*) from pg_stat_activity
                     where datname = current_database() and pid <> pg_backend_pid()
                       and application_name like '%highwater%'";
    let gone = async || {
        let count: i64 = client.query_one(sessions, &[]).await.unwrap().get(0);
        (count == 0).then_some(())
    };
    until("no session is left", SOON, gone).await;
    drop(client);
    let ended = async || (Handle::current().metrics().num_alive_tasks() <= tasks_before).then_some(());
    until("no task is left", SOON, ended).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_archives_and_stops_when_told_to() {
    let stage = Stage::shared(Shape::Named).await;
    let config = prepare(&stage).await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    // A stop by a message, and one by the end of the sender.
    for (number, by_message) in [(1, true), (2, false)] {
        let (shutdown, watcher) = watch::channel(());
        let archiver = Archiver::start(config.clone(), watcher);
        stage.streaming().await;
        stage.assert_archived(DEADLINE).await;
        if by_message {
            shutdown.send(()).unwrap();
        } else {
            drop(shutdown);
        }
        tokio::time::timeout(SOON, archiver.wait()).await.expect("it ends soon").unwrap();
        let_go(&stage, tasks).await;
        assert_eq!(archived_rows(&stage.storage().join("custom")).len(), number);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_archives_what_has_arrived() {
    let stage = Stage::shared(Shape::Named).await;
    let mut config = prepare(&stage).await;
    config.max_lag = Duration::from_secs(3_600);
    let (shutdown, watcher) = watch::channel(());
    let archiver = Archiver::start(config, watcher);
    stage.streaming().await;
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "pending", Some(1.0)).await;
    stage.sent(&client, target).await;
    // Sent is not yet received; the row stays pending for the whole of this.
    throughout("nothing is archived before its time", Duration::from_secs(2), async || {
        archived_rows(&stage.storage().join("custom")).is_empty()
    })
    .await;
    shutdown.send(()).unwrap();
    archiver.wait().await.unwrap();
    stage.assert_same().await;
    assert!(stage.confirmed(&client).await > target, "acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_before_the_first_connection_is_a_stop() {
    let stage = Stage::shared(Shape::Named).await;
    let mut config = prepare(&stage).await;
    config.source = SourceConfig::new(Some("postgresql://nobody@127.0.0.1:1/nowhere"), &|_| None).unwrap();
    let (shutdown, watcher) = watch::channel(());
    shutdown.send_replace(());
    let archiver = Archiver::start(config, watcher);
    tokio::time::timeout(SOON, archiver.wait()).await.expect("it ends soon").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_it_leaves_no_task_and_no_connection() {
    let stage = Stage::shared(Shape::Named).await;
    let config = prepare(&stage).await;
    let tasks = Handle::current().metrics().num_alive_tasks();
    let (_shutdown, watcher) = watch::channel(());
    let archiver = Archiver::start(config.clone(), watcher.clone());
    stage.streaming().await;
    stage.assert_archived(DEADLINE).await;
    drop(archiver);
    let_go(&stage, tasks).await;

    // Also while its storage hangs, when there is something that it would try for ever.
    let archiver = Archiver::start(config.clone(), watcher.clone());
    stage.streaming().await;
    // Past its start, which needs the storage: from here on only a checkpoint can hang.
    stage.assert_archived(DEADLINE).await;
    let (storage, aside) = (stage.storage(), stage.folder().join("aside"));
    std::fs::rename(&storage, &aside).unwrap();
    std::fs::write(&storage, "not a folder").unwrap();
    let client = stage.connect().await;
    let target = stage.insert_one(&client, "waits for storage", None).await;
    stage.sent(&client, target).await;
    drop(client);
    drop(archiver);
    let_go(&stage, tasks).await;
    std::fs::remove_file(&storage).unwrap();
    std::fs::rename(&aside, &storage).unwrap();

    // Nothing was lost by it.
    let _archiver = Archiver::start(config, watcher);
    stage.streaming().await;
    stage.assert_archived(DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_person_can_mend_ends_it() {
    let stage = Stage::shared(Shape::Named).await;
    let mut config = prepare(&stage).await;
    config.slot = format!("{}_other", stage.name);
    let (_shutdown, watcher) = watch::channel(());
    let ended =
        tokio::time::timeout(SOON, Archiver::start(config, watcher).wait()).await.expect("it ends soon");
    assert!(matches!(ended, Err(Error::Slot { transient: false, .. })), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn its_routes_can_be_nested_into_a_server() {
    let stage = Stage::shared(Shape::Named).await;
    let config = prepare(&stage).await;
    let (_shutdown, watcher) = watch::channel(());
    let archiver = Archiver::start(config, watcher);
    stage.streaming().await;
    stage.assert_archived(DEADLINE).await;
    let routes = Router::new()
        .route("/own", axum::routing::get(async || "the server's own"))
        .nest("/history/of", highwater::http::router(&archiver));
    let settings = HttpSettings { listen: Some("127.0.0.1:0".parse().unwrap()), ..HttpSettings::default() };
    let server = Server::bind(&settings).await.unwrap().unwrap();
    let site = Site::new(&format!("http://{}", server.address()));
    let serving = tokio::spawn(server.serve(routes, std::future::pending()));
    assert_eq!(site.get("/own").await.text(), "the server's own");
    assert_eq!(site.get("/livez").await.status, 404);
    assert_eq!(site.get("/history/of/livez").await.text(), "ok\n");
    // The database is looked at every few seconds.
    until("the row is told", DEADLINE, async || {
        let state = site.json("/history/of/api/state").await;
        (state["watermarks"]["tables"][0]["row_count"] == 1).then_some(())
    })
    .await;
    // The page is found from wherever one comes, and so is what it loads.
    for path in ["/history/of", "/history/of/ui", "/history/of/ui/"] {
        let page = site.get(path).await;
        assert!(page.status == 200 && page.text().contains("app.js"), "{path}: {}", page.text());
    }
    assert_eq!(site.get("/history/of/ui/app.js").await.status, 200);
    assert_eq!(site.ask(Method::POST, "/history/of/status").await.status, 405);
    serving.abort();
}
