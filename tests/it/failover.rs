//! Several hosts, of which one is the primary: found at each connection anew. And passwords that change.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use tokio_postgres::types::PgLsn;

use crate::support::archive::compare;
use crate::support::cluster::Stop;
use crate::support::load::Load;
use crate::support::schema::{KINDS, Shape};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_named_first_takes_over_under_load() {
    let stage = Stage::private(Shape::Named, &[("wal_keep_size", "1GB")]).await;
    let primary = stage.cluster();
    let standby = primary.standby();
    let hosts = |attributes: &str| {
        let (first, second) = (standby.port(), primary.port());
        format!("host=127.0.0.1,127.0.0.1 port={first},{second} user=postgres dbname={} {attributes}", stage.name)
    };
    let launch = stage.launch().with("DATABASE_URI", &hosts("target_session_attrs=read-write"));
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    let load = Load::start(&primary.uri_tcp(&stage.name), stage.shape);
    load.goes_on(2_000, DEADLINE).await;
    let marks = launch.watermarks();
    assert!(marks["tables"][0]["slot_name"] == stage.name.as_str() || marks.to_string().contains("streaming"), "{marks}");

    // An answer that may lack rows is none.
    let fresh = ["query", "custom", "--space", "shop", "--name", "ranking", "--version", "1.0.0", "--from", "-1d", "--fresh"];
    let of_standby = standby.uri_tcp(&stage.name);
    for uri in [of_standby.clone(), format!("{of_standby}?target_session_attrs=any")] {
        let output = launch.clone().with("DATABASE_URI", &uri).output(&fresh);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && errors.contains("standby") && errors.contains("DATABASE_URI"), "{errors}");
    }
    launch.must(&fresh);
    // Reading what the watermarks say is another matter.
    let any = launch.clone().with("DATABASE_URI", &format!("{of_standby}?target_session_attrs=any"));
    until("the standby has the watermarks", DEADLINE, async || {
        any.output(&["--watermarks"]).status.success().then_some(())
    })
    .await;
    let report = launch.clone().with("DATABASE_URI", &of_standby).output(&["check"]);
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    assert!(report.contains("is a standby"), "{report}");

    // Nothing may be lost between the two, so that source and archive can be compared.
    load.stop().await;
    let client = stage.connect().await;
    let end: PgLsn = client.query_one("select pg_current_wal_lsn()", &[]).await.unwrap().get(0);
    let replica = standby.connect(&stage.name).await;
    let replayed = async || {
        let row = replica.query_one("select pg_last_wal_replay_lsn()", &[]).await.unwrap();
        (row.get::<_, PgLsn>(0) >= end).then_some(())
    };
    until("the standby has everything", DEADLINE, replayed).await;
    primary.stop(Stop::Fast);
    standby.promote();
    let load = Load::start(&standby.uri_tcp(&stage.name), stage.shape);
    // It finds the new primary by itself, and that this one has no slot.
    assert!(!sidecar.wait(DEADLINE).await.success());
    assert!(sidecar.log().contains("--accept-new-system"), "{}", sidecar.log());
    let mut sidecar = launch.start_with(&["--accept-new-system"]);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    let client = standby.connect(&stage.name).await;
    for kind in KINDS {
        until("everything is archived", DEADLINE, async || {
            compare(&client, &stage.storage(), stage.shape, kind).await.is_none().then_some(())
        })
        .await;
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_changes_needs_no_restart() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    client.batch_execute("create role keeper superuser login password 'first one'").await.unwrap();
    stage.cluster().hba("local all postgres trust\nlocal all all scram-sha-256\nlocal replication all trust\n");
    stage.cluster().reload();
    let file = stage.folder().join("pgpass");
    let write = |password: &str| {
        std::fs::write(&file, format!("*:*:*:keeper:{password}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write("first one");
    let uri = stage.cluster().uri_unix(&stage.name).replace("postgres@", "keeper@");
    let launch = stage.launch().with("DATABASE_URI", &uri).with("PGPASSFILE", file.to_str().unwrap());
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.assert_archived(DEADLINE).await;
    // First the server knows it, then the file.
    client.batch_execute("alter role keeper password 'second one'").await.unwrap();
    let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'keeper'";
    client.query_one(end, &[]).await.unwrap();
    sidecar.says("28P01", DEADLINE).await;
    write("second one");
    stage.assert_archived(DEADLINE).await;
    let log = sidecar.log();
    assert!(!log.contains("first one") && !log.contains("second one"), "{log}");
    // Whoever waits in front of it is told at once.
    write("third one");
    let output = launch.output(&["--watermarks"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("28P01"), "{output:?}");
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}
