//! What others write into the archive: nothing is purged that they took away, and nothing stops that need not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio_postgres::Client;

use crate::support::archive::{archived_rows, assert_same, files};
use crate::support::schema::Shape;
use crate::support::sidecar::Launch;
use crate::support::stage::{Stage, archived};
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// Writes into a table as anybody might, by Python's `deltalake`; the version that this has made.
fn act(stage: &Stage, table: &str, action: &[&str]) -> u64 {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/reader/bin/python");
    assert!(python.exists(), "{} is missing: run `scripts/setup reader`", python.display());
    let mut command = Command::new(python);
    command.arg(root.join("tests/it/foreign.py")).arg(stage.storage().join(table)).args(action);
    // Beside a sidecar an entry may come in between, which some actions don't put up with.
    for _ in 0..10 {
        let output = command.output().unwrap();
        if output.status.success() {
            return String::from_utf8_lossy(&output.stdout).trim().lines().last().unwrap().parse().unwrap();
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            ["onflict", "oncurrent", "Failed to commit"].iter().any(|text| errors.contains(text)),
            "{action:?}: {errors}"
        );
    }
    panic!("{action:?}: conflicts every time");
}

/// With the sidecar's own verifications off, so that a test decides about them.
fn quiet(stage: &Stage) -> Launch {
    stage.launch().with("HIGHWATER_VERIFY_HOURS", "none")
}

/// A stage with a partition that is past retention, and rows of today.
async fn staged() -> (Stage, Client) {
    let stage = Stage::shared(Shape::Named).await;
    let client = stage.connect().await;
    let sql = "do $$ declare low timestamptz := date_trunc('day', now(), 'UTC') - 70 * interval '1 day'; begin
                   execute format('create table scouter.old partition of scouter.psi_drift for values from (%L) to (%L)',
                                  low, low + interval '1 day'); end $$";
    client.batch_execute(sql).await.unwrap();
    insert(&client, 70, 500).await;
    insert(&client, 0, 5).await;
    quiet(&stage).must(&["setup"]);
    (stage, client)
}

/// Rows of so many days ago.
async fn insert(client: &Client, days: i32, rows: i32) {
    let sql = format!(
        "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
         select date_trunc('day', now(), 'UTC') - {days} * interval '1 day' + random() * interval '20 hours', 's', 'n', '1', 'f' || n % 3, n, n
         from generate_series(0, {rows} - 1) n"
    );
    client.batch_execute(&sql).await.unwrap();
}

async fn text(client: &Client, sql: &str) -> String {
    let row = client.query_opt(sql, &[]).await.unwrap();
    row.and_then(|row| row.get::<_, Option<String>>(0)).unwrap_or_default()
}

async fn blocked_by(client: &Client) -> String {
    text(client, "select blocked_by from highwater.explain_purge('scouter.psi_drift') where partition_name = 'scouter.old'").await
}

/// Waits until the purge of the old partition is blocked for a reason, and tries it.
async fn is_blocked(client: &Client, reason: &str) {
    let sql = "call highwater.purge_all()";
    until(&format!("the purge is blocked: {reason}"), DEADLINE, async || {
        let found = blocked_by(client).await;
        found.contains(reason).then_some(())
    })
    .await;
    client.batch_execute(sql).await.unwrap();
    let kept = text(client, "select to_regclass('scouter.old')::text").await;
    assert_eq!(kept, "scouter.old", "it was dropped");
}

async fn drops(client: &Client) {
    client.batch_execute("call highwater.purge_all()").await.unwrap();
    let kept = text(client, "select to_regclass('scouter.old')::text").await;
    assert_eq!(kept, "", "{}", blocked_by(client).await);
}

/// Everything that was committed is archived, below the horizon, and as in Postgres.
async fn settled(stage: &Stage, client: &Client) {
    stage.assert_archived(DEADLINE).await;
    archived(client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_somebody_removes_are_not_purged_until_they_are_back() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    let mut rows = 0;
    for (turn, action) in [
        &["restore", "0"][..],
        &["delete", "space = 's'"],
        &["delete"],
        &["overwrite"],
        &["replace", "bin_id < 3"],
        &["update", "bin_id = 3"],
        &["merge"],
    ]
    .into_iter()
    .enumerate()
    {
        rows += 1;
        insert(&client, 0, 1).await;
        settled(&stage, &client).await;
        quiet(&stage).must(&["verify"]);
        // Every other time nobody runs while it happens.
        let is_down = turn % 2 == 1;
        if is_down {
            sidecar.kill();
        }
        let before = act(&stage, "psi", &["version"]);
        let version = act(&stage, "psi", action);
        assert!(version > before, "{action:?}");
        if is_down {
            let sql = "update highwater.archive_log set looked_at = looked_at - interval '2 days'";
            client.batch_execute(sql).await.unwrap();
            is_blocked(&client, "HIGHWATER_PURGE_TRUST is 1 day").await;
            sidecar = quiet(&stage).start();
        }
        is_blocked(&client, &format!("version {version} of the log of psi")).await;
        let back = version - 1;
        sidecar.says(&format!(".restore({back}, protocol_downgrade_allowed=True)"), DEADLINE).await;
        let check = quiet(&stage).output(&["check"]);
        let check = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(check.contains(&format!(".restore({back}")), "{action:?}: {check}");
        // What was archived since is lacking then, and nothing else.
        insert(&client, 0, 1).await;
        archived(&client).await;
        act(&stage, "psi", &["restore", &back.to_string()]);
        is_blocked(&client, "not by Highwater").await;
        let mut repaired = String::new();
        until("a repair has added what was archived since", DEADLINE, async || {
            let output = quiet(&stage).output(&["verify", "--repair"]);
            repaired.push_str(&String::from_utf8_lossy(&output.stdout));
            repaired.push_str(&String::from_utf8_lossy(&output.stderr));
            quiet(&stage).output(&["verify"]).status.success().then_some(())
        })
        .await;
        quiet(&stage).must(&["verify"]);
        assert_eq!(blocked_by(&client).await, "", "{action:?}: {repaired}");
    }
    settled(&stage, &client).await;
    // The row counts, and those of the entities, are right after the next start.
    sidecar.kill();
    sidecar = quiet(&stage).start();
    stage.streaming().await;
    quiet(&stage).must(&["verify"]);
    let rows_archived = 500 + 5 + 2 * rows;
    let sql = "select w.row_count::text || ' ' || (select sum(e.row_count) from highwater.entity_watermark e where e.source_table = w.source_table)
               from highwater.watermark w where source_table = 'scouter.psi_drift'";
    assert_eq!(text(&client, sql).await, format!("{rows_archived} {rows_archived}"));
    drops(&client).await;
    drop(sidecar);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_take_nothing_away_are_passed_over() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    stage.streaming().await;
    for turn in 0..2 {
        for action in [
            "compact",
            "z_order",
            "properties",
            "constraint",
            "column",
            "comment",
            "name",
            "metadata",
            "append",
            "checkpoint",
            "vacuum",
            "repair",
        ] {
            let down = turn == 1;
            if down {
                sidecar.kill();
            }
            insert(&client, 0, 3).await;
            act(&stage, "psi", &[action]);
            insert(&client, 0, 3).await;
            if down {
                sidecar = quiet(&stage).start();
            }
            assert_eq!(sidecar.ended(), None, "{action}: {}", sidecar.log());
        }
        // Not `settled`: files of others have the columns that were added.
        archived(&client).await;
        let log = sidecar.log();
        assert!(!log.contains("not by Highwater") && !log.contains("unusable"), "{log}");
    }
    quiet(&stage).must(&["verify"]);
    drops(&client).await;
}

async fn breaks_alone(action: &str) {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    let version = act(&stage, "psi", &[action]);
    insert(&client, 0, 7).await;
    sidecar.says("this table is not archived", DEADLINE).await;
    let back = version - 1;
    sidecar.says(&format!(".restore({back}, protocol_downgrade_allowed=True)"), DEADLINE).await;
    is_blocked(&client, "its state is gap").await;
    // The others go on, also over a restart.
    for is_restarted in [false, true] {
        if is_restarted {
            sidecar.kill();
            sidecar = quiet(&stage).start();
            sidecar.says("this table is not archived", DEADLINE).await;
        }
        stage.streaming().await;
        let target = stage.insert_one(&client, "goes on", Some(1.0)).await;
        stage.acknowledged(&client, target, DEADLINE).await;
        insert(&client, 0, 1).await;
    }
    let verified = quiet(&stage).output(&["verify"]);
    let verified =
        format!("{}{}", String::from_utf8_lossy(&verified.stdout), String::from_utf8_lossy(&verified.stderr));
    assert!(verified.contains("scouter.custom_drift") && verified.contains("not compared"), "{verified}");
    act(&stage, "psi", &["restore", &back.to_string()]);
    sidecar.says("the stream begins anew with it", DEADLINE * 2).await;
    settled(&stage, &client).await;
    quiet(&stage).must(&["verify"]);
    drops(&client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_a_feature_that_is_not_ours_stops_alone() {
    breaks_alone("feature").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_lost_a_column_stops_alone() {
    breaks_alone("drop").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_removed_before_the_log_names_them_are_written_again() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    sidecar.kill();
    let sidecar = quiet(&stage).failing("after-upload=1*return(stop)").start();
    stage.streaming().await;
    insert(&client, 0, 100).await;
    sidecar.stopped(DEADLINE).await;
    act(&stage, "psi", &["vacuum"]);
    sidecar.signal("CONT");
    sidecar.says("files were removed before its log named them", DEADLINE).await;
    settled(&stage, &client).await;
    quiet(&stage).must(&["verify"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_gone_soon_are_written_again_and_old_ones_block_the_purge() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    quiet(&stage).must(&["verify"]);
    let table = stage.storage().join("psi");
    for file in files(&table).unwrap() {
        fs::remove_file(file).unwrap();
    }
    sidecar.says("what Postgres still has is written again", DEADLINE).await;
    settled(&stage, &client).await;
    assert_same(&client, &stage.storage(), Shape::Named).await;
    quiet(&stage).must(&["verify"]);

    // The log says that the files are old.
    sidecar.kill();
    for entry in fs::read_dir(table.join("_delta_log")).unwrap() {
        let entry = entry.unwrap().path();
        let text = fs::read_to_string(&entry).unwrap();
        fs::write(&entry, text.replace("\"modificationTime\":1", "\"modificationTime\":")).unwrap();
    }
    sidecar = quiet(&stage).start();
    stage.streaming().await;
    let all: Vec<(PathBuf, Vec<u8>)> =
        files(&table).unwrap().into_iter().map(|file| (file.clone(), fs::read(file).unwrap())).collect();
    for (place, (file, bytes)) in all.iter().enumerate() {
        match place % 2 {
            0 => fs::remove_file(file).unwrap(),
            _ => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
        }
    }
    is_blocked(&client, "are gone, or not as they were written").await;
    let check = quiet(&stage).output(&["check"]);
    assert!(String::from_utf8_lossy(&check.stdout).contains("are gone, or not as they were written"));
    for (file, bytes) in &all {
        fs::write(file, bytes).unwrap();
    }
    quiet(&stage).must(&["verify"]);
    assert!(!sidecar.log().contains("is written again"), "{}", sidecar.log());
    settled(&stage, &client).await;
    drops(&client).await;
}

/// A mount that is away for a while takes nothing with it: what Postgres has forgotten stays named by the log.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_away_for_a_while_are_not_forgotten() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    quiet(&stage).must(&["verify"]);
    drops(&client).await;
    let table = stage.storage().join("psi");
    let aside = stage.folder().join("aside");
    fs::create_dir(&aside).unwrap();
    let before = archived_rows(&table).len();
    assert!(before > 500, "{before}");
    for entry in fs::read_dir(&table).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "_delta_log" {
            fs::rename(entry.path(), aside.join(entry.file_name())).unwrap();
        }
    }
    let check = || {
        let output = quiet(&stage).output(&["check"]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let away = "error    archive-files";
    until("the files are missed", 2 * DEADLINE, async || check().contains(away).then_some(())).await;
    // Everything else goes on, over a restart, too; and whatever wants to be done about the files has been done by then.
    stage.insert_one(&client, "beside", Some(1.0)).await;
    archived(&client).await;
    sidecar.kill();
    sidecar = quiet(&stage).start();
    stage.streaming().await;
    stage.insert_one(&client, "after the restart", Some(1.0)).await;
    archived(&client).await;
    assert!(check().contains(away), "{}", check());
    for entry in fs::read_dir(&aside).unwrap() {
        let entry = entry.unwrap();
        fs::rename(entry.path(), table.join(entry.file_name())).unwrap();
    }
    until("they are there again", 2 * DEADLINE, async || (!check().contains(away)).then_some(())).await;
    assert!(!sidecar.log().contains("taken out of the log"), "{}", sidecar.log());
    quiet(&stage).must(&["verify"]);
    assert_eq!(archived_rows(&table).len(), before);
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// Whoever goes back as he was told has gone back.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_taken_back_is_forgotten() {
    let (stage, client) = staged().await;
    let sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    quiet(&stage).must(&["verify"]);
    let before = act(&stage, "psi", &["version"]);
    let removal = act(&stage, "psi", &["delete", "space = 's'"]);
    is_blocked(&client, &format!("version {removal} of the log of psi")).await;
    let back = removal - 1;
    let advice = format!(".restore({back}");
    let check = || String::from_utf8_lossy(&quiet(&stage).output(&["check"]).stdout).into_owned();
    assert!(check().contains(&advice), "from {before}: {}", check());
    let restored = act(&stage, "psi", &["restore", &back.to_string()]);
    until("it is forgotten", DEADLINE, async || (!check().contains(".restore(")).then_some(())).await;
    until("the return is noted", DEADLINE, async || {
        blocked_by(&client).await.contains(&format!("version {restored} of the log of psi")).then_some(())
    })
    .await;
    assert!(!blocked_by(&client).await.contains(".restore("), "{}", blocked_by(&client).await);
    quiet(&stage).must(&["verify"]);
    drops(&client).await;
    drop(sidecar);
}

/// Adds a file to a table's log by hand, as anybody may who can write there; the version of the entry.
fn add_by_hand(stage: &Stage, table: &str, name: &str, bytes: Option<&[u8]>) -> PathBuf {
    let folder = stage.storage().join(table);
    if let Some(bytes) = bytes {
        fs::write(folder.join(name), bytes).unwrap();
    }
    let size = bytes.map_or(1_000, <[u8]>::len);
    let add = format!(
        r#"{{"add":{{"path":"{name}","partitionValues":{{}},"size":{size},"modificationTime":1,"dataChange":true,"stats":"{{\"numRecords\":5}}"}}}}"#
    );
    append_entry(&folder, &add)
}

/// Puts an entry behind the last one of a log.
fn append_entry(folder: &Path, entry: &str) -> PathBuf {
    loop {
        let log = folder.join("_delta_log");
        let versions = fs::read_dir(&log).unwrap().filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".json").and_then(|version| version.parse::<u64>().ok())
        });
        let path = log.join(format!("{:020}.json", versions.max().unwrap() + 1));
        match fs::File::create_new(&path) {
            Ok(mut file) => {
                std::io::Write::write_all(&mut file, entry.as_bytes()).unwrap();
                return path;
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_none_stops_its_own_table_only() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    let mut whole = b"PAR1 and more".to_vec();
    whole.extend(0x7fff_ffff_u32.to_le_bytes());
    whole.extend(b"PAR1");
    let psi = stage.storage().join("psi");
    for (turn, bytes) in
        [Some(&b"no Parquet file"[..]), Some(&whole), None, Some(b"")].into_iter().enumerate()
    {
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
        let name = format!("hostile-{turn}.parquet");
        // At last an entry that is none.
        let entry = match bytes {
            Some(b"") => append_entry(&psi, "no entry"),
            bytes => add_by_hand(&stage, "psi", &name, bytes),
        };
        sidecar = quiet(&stage).start();
        if let Some(bytes) = bytes {
            sidecar.says(if bytes.is_empty() { "following its log" } else { &name }, DEADLINE).await;
            sidecar
                .says("this table is not archived, and its purge is blocked; the others go on", DEADLINE)
                .await;
        }
        insert(&client, 0, 3).await;
        let target = stage.insert_one(&client, &format!("beside {turn}"), Some(1.0)).await;
        let flushed =
            "select coalesce(max(flushed_lsn), '0/0') from highwater.watermark where kind = 'custom'";
        until("the other table is archived", DEADLINE, async || {
            let lsn: tokio_postgres::types::PgLsn = client.query_one(flushed, &[]).await.unwrap().get(0);
            (lsn > target).then_some(())
        })
        .await;
        let state = async || text(&client, "select state from highwater.watermark where kind = 'psi'").await;
        // Whoever takes the file, or the entry, out again has the table archived.
        match bytes {
            Some(b"") => {
                assert_eq!(state().await, "gap");
                let count = |table| quiet(&stage).output(&["sql", &format!("select count(*) from {table}")]);
                assert!(count("custom").status.success(), "the others can be read: {:?}", count("custom"));
                let said = String::from_utf8(count("psi").stderr).unwrap();
                assert!(!count("psi").status.success() && said.contains("archive table psi"), "{said}");
                fs::remove_file(&entry).unwrap();
            }
            _ => {
                // One that is gone may come back: nothing stops for it.
                assert_eq!(state().await, if bytes.is_some() { "gap" } else { "streaming" });
                let remove = format!(
                    r#"{{"remove":{{"path":"{name}","deletionTimestamp":1,"dataChange":true,"partitionValues":{{}},"size":1}}}}"#
                );
                append_entry(&psi, &remove);
            }
        }
        until("the table is complete again", DEADLINE * 2, async || {
            (state().await == "streaming").then_some(())
        })
        .await;
        settled(&stage, &client).await;
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

/// All tables need the quarantine.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_quarantine_that_is_none_stops_nothing() {
    let (stage, client) = staged().await;
    let mut sidecar = quiet(&stage).start();
    settled(&stage, &client).await;
    let quarantined = async |feature: &str| {
        let sql =
            "insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
                   values ('infinity', 'a', 'b', 'c', $1, 1, 1)";
        client.execute(sql, &[&feature]).await.unwrap();
    };
    quarantined("before").await;
    settled(&stage, &client).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    add_by_hand(&stage, "quarantine", "hostile.parquet", Some(b"no Parquet file"));
    // A comparison of all rows looks for those of the quarantine.
    quiet(&stage).must(&["resync", "scouter.psi_drift"]);
    sidecar = quiet(&stage).start();
    sidecar.says("the quarantine file hostile.parquet", DEADLINE).await;
    quarantined("after").await;
    settled(&stage, &client).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let quarantine = stage.storage().join("quarantine");
    let remove = r#"{"remove":{"path":"hostile.parquet","deletionTimestamp":1,"dataChange":true,"partitionValues":{},"size":1}}"#;
    append_entry(&quarantine, remove);
    let rows = archived_rows(&quarantine);
    assert_eq!(rows.len(), 2, "each once: {rows:?}");
}
