//! Settings that a role, a database or a server brings: none of them changes what is archived.

use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::{archived_rows, compare};
use crate::support::cluster::Stop;
use crate::support::schema::{KINDS, Shape};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(90);

/// Each as hostile as it can be while a login is possible at all.
const HOSTILE: [(&str, &str); 22] = [
    ("timezone", "America/New_York"),
    ("datestyle", "SQL, DMY"),
    ("intervalstyle", "sql_standard"),
    ("lock_timeout", "1ms"),
    ("statement_timeout", "5ms"),
    ("idle_in_transaction_session_timeout", "100ms"),
    ("idle_session_timeout", "500ms"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("search_path", "hostile, pg_catalog"),
    ("row_security", "on"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-15"),
    ("lc_messages", "C"),
    ("client_min_messages", "debug5"),
    ("standard_conforming_strings", "off"),
    ("synchronous_commit", "off"),
    ("quote_all_identifiers", "on"),
    ("transform_null_equals", "on"),
    ("client_encoding", "SQL_ASCII"),
    ("role", "nobody"),
];

/// A role that owns the drift tables and may replicate, and functions that are found before the server's own.
const OWNER: &str = "
    create role nobody;
    create role keeper login replication in role nobody;
    create schema hostile;
    grant usage on schema hostile to public;
    create function hostile.now() returns timestamptz language sql as $$ select 'epoch'::timestamptz $$;
    create function hostile.pg_current_wal_insert_lsn() returns pg_lsn language sql as $$ select '0/1'::pg_lsn $$;
    create function hostile.md5(bytea) returns text language sql as $$ select repeat('0', 32) $$;
    drop table scouter.psi_drift;
    create table scouter.psi_drift (
        created_at timestamp not null, space text not null, name text not null, version text not null,
        feature text not null, bin_id integer not null, bin_count integer not null) partition by range (created_at);
    create table scouter.psi_default partition of scouter.psi_drift default;
    do $$
    declare name text; low timestamp := date_trunc('day', now() at time zone 'UTC') - interval '70 days';
    begin
        execute format('create table scouter.psi_old partition of scouter.psi_drift for values from (%L) to (%L)',
                       low, low + interval '1 day');
        for name in select c.oid::regclass from pg_class c where relnamespace = 'scouter'::regnamespace and relkind in ('r', 'p') loop
            execute format('alter table %s owner to keeper', name);
        end loop;
        execute format('grant create on database %I to keeper', current_database());
        alter schema scouter owner to keeper;
    end $$;";

async fn insert(client: &Client, first: i32) {
    let sql = format!(
        "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
             select now() - n * interval '1 minute', 's', 'n', '1', 'm', n / 3.0 from generate_series({first}, {first} + 99) n;
         insert into scouter.spc_drift (created_at, space, name, version, feature, value)
             select now() - n * interval '1 minute', 's', 'n', '1', 'back\\slash', n / 7.0
             from generate_series({first}, {first} + 99) n;
         insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             select date_trunc('day', now() at time zone 'UTC') - d * interval '1 day' + n * interval '1 minute',
                    's', 'n', '1', 'f', n, n
             from generate_series({first}, {first} + 99) n, (values (0), (70)) days (d)"
    );
    client.batch_execute(&sql).await.unwrap();
}

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_settings_of_role_and_database_change_nothing() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off"), ("timezone", "America/New_York")]).await;
    // Sessions that are open already stay as they are.
    let client = stage.connect().await;
    client.batch_execute(OWNER).await.unwrap();
    insert(&client, 1).await;
    for (name, value) in HOSTILE {
        let value = if name == "search_path" { value.to_owned() } else { format!("'{value}'") };
        let database = format!("alter database {} set {name} = {value}", stage.name);
        let role = format!("alter role keeper set {name} = {value}");
        if name != "role" {
            client.batch_execute(&database).await.unwrap();
        }
        client.batch_execute(&role).await.unwrap();
    }
    let uri = stage.cluster().uri_unix(&stage.name).replace("postgres@", "keeper@");
    let launch = stage.launch().with("DATABASE_URI", &uri);
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    let whole = "select count(*) from highwater.watermark where state = 'streaming'";
    until("the first copy is over", DEADLINE, async || (count(&client, whole).await == 3).then_some(()))
        .await;
    insert(&client, 101).await;

    // The watermarks move, and the partition that is past its retention is read back without being asked.
    let verified =
        "select count(*) from highwater.verified_partition where partition_name = 'scouter.psi_old'";
    until("the old partition is verified", DEADLINE, async || {
        (count(&client, verified).await == 1).then_some(())
    })
    .await;
    launch.must(&["verify"]);
    let psi = archived_rows(&stage.storage().join("psi")).len();
    assert_eq!(psi, 400, "rows of psi");
    until("the old partition is purged", DEADLINE, async || {
        launch.output(&["purge"]);
        (count(&client, "select count(*) from pg_class where relname = 'psi_old'").await == 0).then_some(())
    })
    .await;
    let fresh =
        ["query", "custom", "--space", "s", "--name", "n", "--version", "1", "--from", "-2d", "--bin", "7d"];
    insert(&client, 201).await;
    let answer = launch.must(&[&fresh[..], &["--fresh"]].concat());
    assert!(answer.contains('m'), "{answer}");

    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let log = sidecar.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    let mut sidecar = launch.start();
    insert(&client, 301).await;
    for kind in [KINDS[0], KINDS[2]] {
        until("everything is archived", DEADLINE, async || {
            compare(&client, &stage.storage(), stage.shape, kind).await.is_none().then_some(())
        })
        .await;
    }
    launch.must(&["verify"]);
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// A session that can't write its watermarks leaves the archive alone, however often it is tried.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_fails_the_same_way_writes_no_claims() {
    let stage = Stage::private(Shape::Named, &[]).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let entries = || std::fs::read_dir(stage.storage().join("custom/_delta_log")).unwrap().count();
    let before = entries();
    let client = stage.connect().await;
    client.batch_execute("begin; lock table highwater.watermark in access exclusive mode").await.unwrap();
    let sidecar = stage.launch().start();
    sidecar.says("not archiving", DEADLINE).await;
    assert_eq!(entries(), before);
    client.batch_execute("rollback").await.unwrap();
    stage.assert_archived(DEADLINE).await;
    stage.cluster().stop(Stop::Immediate);
}
