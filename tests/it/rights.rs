//! What others could gain by us: the role that archives, and a login without any grant.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio_postgres::Client;

use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// What there is in schema `highwater`: the same query that the program compares with.
const OBJECTS: &str = include_str!("../../src/setup/objects.sql");

/// The migrations, by version.
fn migrations() -> BTreeMap<u32, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let files = fs::read_dir(folder).expect("migrations").map(|file| file.expect("a file").path());
    let version = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix('V')?.split_once("__")?.0.parse().ok()
    };
    files.filter_map(|path| Some((version(&path)?, fs::read_to_string(&path).ok()?))).collect()
}

async fn objects(client: &Client) -> BTreeMap<String, String> {
    let rows = client.query(OBJECTS, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// `src/setup/objects.txt` is what the migrations make, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_objects_is_what_the_migrations_make() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let begin = "create schema highwater; set search_path = pg_catalog;
                 create table highwater.migration (version int4 primary key, name varchar(255), applied_on varchar(255), checksum varchar(255))";
    client.batch_execute(begin).await.unwrap();
    // Each object and digest, with the versions that have it so.
    let mut list: BTreeMap<(String, String), Vec<u32>> = BTreeMap::new();
    for (version, sql) in migrations() {
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("V{version}: {error:?}"));
        for found in objects(&client).await {
            list.entry(found).or_default().push(version);
        }
    }
    let newest = migrations().into_keys().max().unwrap();
    let mut text = String::new();
    for ((object, digest), versions) in list {
        let (first, last) = (versions[0], versions[versions.len() - 1]);
        let last = if last == newest { "-".to_owned() } else { last.to_string() };
        text.push_str(&format!("{first} {last} {digest} {object}\n"));
    }
    if text != include_str!("../../src/setup/objects.txt") {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/objects.txt");
        fs::write(&place, &text).unwrap();
        panic!(
            "the migrations make other objects: see the difference, then cp {} src/setup/objects.txt",
            place.display()
        );
    }
}

/// A session of another role.
async fn session_of(stage: &Stage, role: &str) -> Client {
    let (client, connection) =
        tokio_postgres::connect(&stage.cluster().uri_of(role, &stage.name), tokio_postgres::NoTls)
            .await
            .unwrap();
    tokio::spawn(async move { connection.await.ok() });
    client
}

/// The findings of `check`: id, severity, message.
fn findings(launch: &Launch) -> Vec<(String, String, String)> {
    let output = launch.output(&["check", "--format", "json"]);
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let all = report["findings"].as_array().unwrap();
    all.iter().map(|one| (text(one, "id"), text(one, "severity"), text(one, "message"))).collect()
}

/// What the check says of the schema: severity, message.
fn finding(launch: &Launch, id: &str) -> (String, String) {
    let all = findings(launch);
    let found = all.iter().find(|(found, ..)| found == id).unwrap_or_else(|| panic!("no {id}: {all:?}"));
    (found.1.clone(), found.2.clone())
}

/// By each of these the role became who runs the purge, when it owned the schema.
const ATTACKS: [&str; 13] = [
    "create or replace function highwater.cutoff(retention interval) returns timestamptz language plpgsql as
     $$ begin alter role highwater superuser; return now(); end $$",
    "create function highwater.trap() returns trigger language plpgsql as $$ begin alter role highwater superuser; return new; end $$",
    "create trigger trap before update on highwater.retention for each row execute function public.trap()",
    "drop table highwater.retention",
    "alter table highwater.retention rename to retained",
    "create view highwater.trap as select 1",
    "alter table highwater.purge_log alter role_name set default public.trap()",
    "create rule trap as on update to highwater.watermark do also select 1",
    "alter procedure highwater.purge_all() owner to highwater",
    "insert into highwater.purge_log (source_table, action, cutoff) values ('t', 'dropped', now())",
    "update highwater.retention set retention = '0'",
    "delete from highwater.watermark",
    "insert into highwater.purgeable values (1, 1)",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_role_that_archives_can_change_nothing_that_the_purge_runs() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let mut sidecar = stage.start().await;
    let role = session_of(&stage, "highwater").await;
    for attack in ATTACKS {
        let refused = role.batch_execute(attack).await.expect_err(attack);
        assert_eq!(
            refused.code().map(|code| code.code().to_owned()),
            Some("42501".to_owned()),
            "{attack}: {refused:?}"
        );
    }
    for id in ["state-schema", "schema-owner", "schema-objects"] {
        assert_eq!(finding(&stage.launch(), id).0, "ok", "{id}");
    }
    // It may write the state, false as it may be; so it reaches what the owner has published, and no other table.
    let lie = "
        insert into highwater.watermark (source_table, kind, slot_name, system_identifier, timeline_id, table_oid, state, flushed_lsn, archived_before)
            select 'public.users', kind, slot_name, system_identifier, timeline_id, 'public.users'::regclass, 'streaming', flushed_lsn, '1'
            from highwater.watermark limit 1;
        insert into highwater.retention (source_table, retention) values ('public.users', '0 s');
        insert into highwater.covered_partition (source_table, partition_oid, partition_name)
            select t, 'public.users'::regclass, 'users' from (values ('public.users'), ('scouter.psi_drift')) as tables (t);
        update highwater.covered_partition set attachment = highwater.attachment(partition_oid) where partition_name = 'users';
        insert into highwater.verified_partition (source_table, partition_oid, partition_name, row_count, checksum, horizon)
            select t, 'public.users'::regclass, 'users', 1, '', '4611686018427387904' from (values ('public.users'), ('scouter.psi_drift')) as tables (t);
        update highwater.watermark set archived_before = '1' where source_table = 'public.users';
        update highwater.retention set retention = '0 s'";
    // A table that looks like one that was a partition is none, if its owner has not seen it as one.
    let backup = "create table scouter.backup (like scouter.psi_drift including defaults);
                  insert into scouter.backup (created_at, space, name, version, feature, bin_id, bin_count)
                  values ('2001-01-01Z', 's', 'n', '1', 'f', 1, 1)";
    client.batch_execute(backup).await.unwrap();
    let claim = "
        insert into highwater.covered_partition (source_table, partition_oid, partition_name, attachment, detached_at)
            values ('scouter.psi_drift', 'scouter.backup'::regclass, 'scouter.backup', 'x', now());
        insert into highwater.verified_partition (source_table, partition_oid, partition_name, row_count, checksum, horizon)
            values ('scouter.psi_drift', 'scouter.backup'::regclass, 'scouter.backup', 1, '', '4611686018427387904')";
    role.batch_execute(claim).await.unwrap();
    client.batch_execute("create table public.users (created_at timestamptz, secret text); insert into public.users values ('2001-01-01Z', 's')").await.unwrap();
    let (lie, forbidden) = lie.rsplit_once(';').unwrap();
    role.batch_execute(lie).await.unwrap();
    role.batch_execute(forbidden).await.unwrap_err();
    client
        .batch_execute("update highwater.watermark set archived_before = pg_current_xact_id()")
        .await
        .unwrap();
    client.batch_execute("call highwater.purge_all()").await.unwrap();
    let users = "select count(*) from public.users";
    assert_eq!(client.query_one(users, &[]).await.unwrap().get::<_, i64>(0), 1);
    let backup = "select count(*) from scouter.backup";
    assert_eq!(client.query_one(backup, &[]).await.unwrap().get::<_, i64>(0), 1);
    let why = "select reason from highwater.purge_log where source_table = 'public.users'";
    let why: String = client.query_one(why, &[]).await.unwrap().get(0);
    assert!(why.contains("its owner has not given"), "{why}");
    // And to purge is the owner's.
    let output = stage
        .launch()
        .with("DATABASE_URI", &stage.cluster().uri_of("highwater", &stage.name))
        .output(&["purge"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("must be the owner of") && said.contains("(postgres)"),
        "{said}"
    );
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// As installations were before: the role that archives owns the schema, and has made something of it.
#[expect(clippy::too_many_lines, reason = "one take-over, in order")]
#[tokio::test(flavor = "multi_thread")]
async fn an_installation_of_the_old_kind_is_taken_over_unless_it_was_changed() {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    stage.launch().must(&["setup"]);
    let give_away = "
        do $$ declare statement text; begin
            for statement in
                select format('alter table %s owner to highwater', oid::regclass) from pg_class where relnamespace = 'highwater'::regnamespace and relkind = 'r'
                union all select format('alter routine %s owner to highwater', oid::regprocedure) from pg_proc where pronamespace = 'highwater'::regnamespace
            loop execute statement; end loop; end $$;
        alter schema highwater owner to highwater";
    client.batch_execute(give_away).await.unwrap();
    let (severity, message) = finding(&stage.launch(), "schema-owner");
    assert!(severity == "error" && message.contains("schema highwater belongs to highwater"), "{message}");
    let role = session_of(&stage, "highwater").await;
    let owner = stage.launch().with("DATABASE_URI", &stage.cluster().uri_unix(&stage.name));
    let original: String = client
        .query_one("select pg_get_functiondef('highwater.cutoff(interval)'::regprocedure)", &[])
        .await
        .unwrap()
        .get(0);
    for (trap, release, named) in [
        (ATTACKS[0], original.as_str(), "highwater.cutoff(interval) was changed"),
        (
            "create function highwater.trap() returns trigger language plpgsql as $$ begin alter role highwater superuser; return new; end $$;
             create trigger trap before insert or update on highwater.migration for each row execute function highwater.trap()",
            "drop function highwater.trap() cascade",
            "trigger trap of table highwater.migration",
        ),
        (
            "create table highwater.mine () inherits (highwater.retention)",
            "drop table highwater.mine",
            "child highwater.mine of table highwater.retention",
        ),
        (
            "alter table highwater.purge_log alter role_name set default 'x'",
            "alter table highwater.purge_log alter role_name set default current_user",
            "table highwater.purge_log was changed",
        ),
    ] {
        role.batch_execute(trap).await.unwrap();
        let (severity, message) = finding(&stage.launch(), "schema-objects");
        assert!(severity == "error" && message.contains(named), "{named}: {message}");
        let output = owner.output(&["setup", "--as-owner"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(named), "{named}: {said}");
        role.batch_execute(release).await.unwrap();
    }
    // One that is laid while the schema is being taken over.
    role.batch_execute("begin; lock table highwater.archive_log in access share mode").await.unwrap();
    let mut setup = owner.start_command(&["setup", "--as-owner"]);
    let waits =
        "select count(*) from pg_locks where not granted and relation = 'highwater.archive_log'::regclass";
    until("the setup waits", DEADLINE, async || {
        (client.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) > 0).then_some(())
    })
    .await;
    let trap = "create function highwater.trap() returns trigger language plpgsql as $$ begin alter role highwater superuser; return new; end $$;
                create trigger trap before insert on highwater.migration for each row execute function highwater.trap()";
    role.batch_execute(trap).await.unwrap();
    role.batch_execute("commit").await.unwrap();
    assert!(!setup.wait(DEADLINE).await.success(), "{}", setup.log());
    assert!(setup.log().contains("trigger trap of table highwater.migration"), "{}", setup.log());
    role.batch_execute("drop function highwater.trap() cascade").await.unwrap();
    let said = owner.must(&["setup", "--as-owner"]);
    assert!(
        said.contains("gave schema highwater and") && said.contains("let highwater write the state"),
        "{said}"
    );
    let superuser = "select rolsuper from pg_roles where rolname = 'highwater'";
    assert!(!client.query_one(superuser, &[]).await.unwrap().get::<_, bool>(0));
    for id in ["state-schema", "schema-owner", "schema-objects"] {
        assert_eq!(finding(&stage.launch(), id).0, "ok", "{id}");
    }
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    // Whoever may make triggers on it could as well own it.
    client.batch_execute("grant trigger on highwater.retention to highwater").await.unwrap();
    let (severity, message) = finding(&stage.launch(), "schema-owner");
    assert!(severity == "error" && message.contains("highwater may make triggers on"), "{message}");
    client.batch_execute("create role thief; grant trigger, update on highwater.retention to thief; grant create on schema highwater to thief").await.ok();
    let said = owner.must(&["setup", "--as-owner"]);
    for taken in
        ["from highwater: trigger on", "from thief: trigger, update on", "from thief: create on highwater"]
    {
        assert!(said.contains(taken), "{taken}: {said}");
    }
    client.batch_execute("drop owned by thief; drop role thief").await.unwrap();
    assert_eq!(finding(&stage.launch(), "schema-owner").0, "ok");
}

/// The owner is no superuser, and does it by hand.
#[tokio::test(flavor = "multi_thread")]
async fn the_owner_may_run_a_script_instead() {
    let stage = Stage::partitioned(Shape::Entity).await;
    let client = stage.connect().await;
    let owner = format!("{}_owner", stage.name);
    let give = format!(
        "create role {owner} login; grant create on database {} to {owner}; alter schema scouter owner to {owner};
         grant usage on schema partman to {owner} with grant option; grant all on all tables in schema partman to {owner} with grant option;
         do $$ declare name text; begin
            for name in select oid::regclass from pg_class where relnamespace = 'scouter'::regnamespace and relkind in ('r', 'p')
            loop execute format('alter table %s owner to {owner}', name); end loop; end $$",
        stage.name
    );
    client.batch_execute(&give).await.unwrap();
    // The role that archives can't do it, and says who can.
    let uri = stage.cluster().uri_of("highwater", &stage.name);
    let archiver = stage.launch().with("DATABASE_URI", &uri);
    client.batch_execute("grant usage on schema scouter to highwater").await.unwrap();
    let output = archiver.output(&["setup"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success()
            && said.contains("setup --as-owner --sidecar-role highwater")
            && said.contains(&owner),
        "{said}"
    );
    let script = stage.folder().join("owner.sql");
    fs::write(&script, archiver.must(&["setup", "--print-sql"])).unwrap();
    let run = std::process::Command::new("psql")
        .args(["-X", "-q", "-f"])
        .arg(&script)
        .arg(stage.cluster().uri_of(&owner, &stage.name))
        .output()
        .expect("psql");
    assert!(run.status.success(), "{run:?}");
    let said = archiver.output(&["setup"]);
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    // Its retention is the owner's to turn off.
    assert!(text.contains("TODO  pg_partman drops partitions"), "{text}");
    let as_owner = stage.launch().with("DATABASE_URI", &stage.cluster().uri_of(&owner, &stage.name));
    let said = as_owner.must(&["setup", "--as-owner"]);
    assert!(
        said.contains("turned off pg_partman's retention") && said.contains("schema highwater is up to date"),
        "{said}"
    );
    archiver.must(&["setup"]);
    for id in ["state-schema", "schema-owner", "schema-objects", "publication"] {
        assert_eq!(finding(&archiver, id).0, "ok", "{id}");
    }
    let mut sidecar = archiver.start();
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    client
        .batch_execute(&format!(
            "reassign owned by {owner} to postgres; drop owned by {owner}; drop role {owner}"
        ))
        .await
        .unwrap();
}

/// A login without any grant, in a database where anybody may create in `public`.
#[tokio::test(flavor = "multi_thread")]
async fn operators_and_locks_of_others_gain_and_stop_nothing() {
    let stage = Stage::private(Shape::Named, &[("fsync", "off")]).await;
    let client = stage.connect().await;
    let open = "create role mallory login; grant create on schema public to public; set search_path = pg_catalog;
                create table scouter.old partition of scouter.psi_drift for values from ('2001-01-01Z') to ('2001-01-02Z');
                insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                values ('2001-01-01 10:00Z', 's', 'n', '1', 'f', 1, 1)";
    client.batch_execute(open).await.unwrap();
    let mallory = session_of(&stage, "mallory").await;
    let operators = "
        create function public.seize() returns void language plpgsql as $$ begin
            if (select rolsuper from pg_catalog.pg_roles where rolname = current_user) then alter role mallory superuser; end if; end $$;
        create function public.join(name, text) returns text language sql as $$ select public.seize(); select $1::text operator(pg_catalog.||) $2 $$;
        create function public.join(text, name) returns text language sql as $$ select public.seize(); select $1 operator(pg_catalog.||) $2::text $$;
        create function public.join(oid, text) returns text language sql as $$ select public.seize(); select $1::text operator(pg_catalog.||) $2 $$;
        create function public.same(name, text) returns boolean language sql as $$ select public.seize(); select $1::text operator(pg_catalog.=) $2 $$;
        create function public.same(oid, bigint) returns boolean language sql as $$ select public.seize(); select $1::bigint operator(pg_catalog.=) $2 $$;
        create function public.xor(bigint, bigint) returns bigint language sql as $$ select public.seize(); select $1 operator(pg_catalog.#) $2 $$;
        create function public.less(interval, interval) returns boolean language sql as $$ select public.seize(); select false $$;
        create operator public.|| (function = public.join, leftarg = name, rightarg = text);
        create operator public.|| (function = public.join, leftarg = text, rightarg = name);
        create operator public.|| (function = public.join, leftarg = oid, rightarg = text);
        create operator public.= (function = public.same, leftarg = name, rightarg = text);
        create operator public.= (function = public.same, leftarg = oid, rightarg = bigint);
        create operator public.# (function = public.xor, leftarg = bigint, rightarg = bigint);
        create operator public.< (function = public.less, leftarg = interval, rightarg = interval);
        create domain public.oid as pg_catalog.oid; create domain public.text as pg_catalog.text";
    mallory.batch_execute(operators).await.unwrap();
    // Whoever runs the commands may have put `public` first.
    let path = format!("alter database {} set search_path = public, pg_catalog", stage.name);
    client.batch_execute(&path).await.unwrap();
    let launch = stage.launch();
    let superuser = launch.clone().with("DATABASE_URI", &stage.cluster().uri_unix(&stage.name));
    launch.must(&["setup"]);
    let mut sidecar = launch.start();
    stage.streaming().await;
    until("the first copy is verified", DEADLINE, async || {
        launch.output(&["verify"]).status.success().then_some(())
    })
    .await;
    for command in ["check", "verify", "setup", "entities", "--watermarks"] {
        superuser.output(&[command]);
    }
    // A lock whose key anybody can know keeps nobody from purging, ...
    let root = "select 'scouter.psi_drift'::pg_catalog.regclass::pg_catalog.oid";
    let root: u32 = client.query_one(root, &[]).await.unwrap().get(0);
    let lock = 7_523_094_288_207_667_311 ^ i64::from(root);
    mallory.batch_execute(&format!("select pg_catalog.pg_advisory_lock({lock})")).await.unwrap();
    let purger = stage.connect().await;
    until("the old partition is purged, by a session with the hostile path", DEADLINE, async || {
        purger.batch_execute("call highwater.purge_all()").await.unwrap();
        let gone = "select pg_catalog.to_regclass('scouter.old') is null";
        purger.query_one(gone, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    superuser.output(&["purge", "--dry-run"]);
    superuser.output(&["purge"]);
    // ... and a setup says who has the other one, and ends.
    let setup_lock = i64::from_be_bytes(*b"highwatr");
    mallory.batch_execute(&format!("select pg_catalog.pg_advisory_lock({setup_lock})")).await.unwrap();
    let output = launch.clone().output(&["setup"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("of role mallory") && said.contains("pg_terminate_backend"),
        "{said}"
    );
    let seized = "select rolsuper from pg_catalog.pg_roles where rolname = 'mallory'";
    assert!(!client.query_one(seized, &[]).await.unwrap().get::<_, bool>(0), "mallory is a superuser");
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}
