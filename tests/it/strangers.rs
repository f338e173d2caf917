//! What strangers may ask and write: SQL that would end a process, text that would steer a terminal, files that others read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::schema::Shape;
use crate::support::sidecar::binary;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// What the queries may take: the setting, what the documentation adds to it, and the program's own file.
const MEMORY: u64 = 64 << 20;
const RESIDENT_MAX: u64 = MEMORY + (384 << 20) + (128 << 20);

/// Runs a command, and prints how much memory the largest process of it had: kilobytes (getrusage(2)).
const MEASURE: &str = "
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
sys.stderr.write(f'\\nmost {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss} kB\\n')
sys.exit(code)
";

struct Said {
    code: Option<i32>,
    out: String,
    errors: String,
    resident_max: u64,
}

/// Asks the archive.
fn ask(stage: &Stage, sql: &str, more: &[&str]) -> Said {
    let program = binary().display().to_string();
    let output = stage
        .launch()
        .with("HIGHWATER_MEMORY", "64MiB")
        .program(Path::new("python3"))
        .output(&[&["-c", MEASURE, &program, "sql", sql], more].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let errors = text(&output.stderr);
    let most = errors.rsplit_once("most ").and_then(|(_, most)| most.split(' ').next()?.parse::<u64>().ok());
    Said {
        code: output.status.code(),
        out: text(&output.stdout),
        resident_max: most.unwrap_or_else(|| panic!("{errors}")) << 10,
        errors,
    }
}

/// A chain of queries, each of which takes the one before for `c`.
fn chain(levels: usize, step: &str, first: &str) -> String {
    let more: String =
        (1..levels).map(|at| format!(", c{at} as (select {step} from c{} c)", at - 1)).collect();
    format!("with c0 as ({first}){more} select length(t) from c{}", levels - 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn sql_that_kills_ends_its_own_process_with_a_reason() {
    let stage = Stage::shared(Shape::Named).await;
    let _sidecar = stage.start().await;
    let client = stage.connect().await;
    let rows = "insert into scouter.custom_drift (created_at, space, name, version, metric, value)
                select now() - n * interval '1 second', 's', 'n', 'v', 'm' || n % 50, n from generate_series(1, 20000) n";
    client.batch_execute(rows).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    let attacks = [
        ("select repeat('x', 2000000000)".to_owned(), "the function repeat is not there"),
        (
            "select lpad('x', 1000000) from generate_series(1, 100000)".to_owned(),
            "the function lpad is not there",
        ),
        (format!("select {}", vec!["1"; 10_000].join("+")), "operators"),
        (format!("select 1 where {}", vec!["true"; 10_000].join(" and ")), "keywords"),
        (format!("select {}1{}", "(".repeat(10_000), ")".repeat(10_000)), "RecursionLimitExceeded"),
        (format!("select '{}'", "x".repeat(100_000)), "bytes"),
        (format!("select 1 from {}", vec!["custom"; 200].join(", ")), "tables"),
        (
            "with recursive t as (select 1 as n union all select n + 1 from t) select count(*) from t"
                .to_owned(),
            "ecursive",
        ),
        // The clock is looked at while rows come, and not where none do.
        (
            "select count(*) from generate_series(1, 9000000000) a, generate_series(1, 9000000000) b"
                .to_owned(),
            "within 4s",
        ),
        (
            format!(
                "select count(*) from {}",
                [0, 1, 2, 3, 4, 5].map(|at| format!("custom c{at}")).join(", ")
            ),
            "within 4s",
        ),
        // Each level doubles a text: no pool counts it.
        (chain(35, "t || t as t", "select 'xxxxxxxx' as t"), "memory"),
        (chain(25, "t || t as t", "select metric as t from custom"), "memory"),
        (chain(25, "concat(t, t, t) as t", "select metric as t from custom"), "memory"),
        (chain(25, "replace(t, 'm', t || t) as t", "select metric as t from custom"), "memory"),
    ];
    for (sql, reason) in attacks {
        let short: String = sql.chars().take(60).collect();
        // Memory ends before the time does, on a busy machine, too.
        let timeout = if reason == "memory" { "2m" } else { "4s" };
        let said = ask(&stage, &sql, &["--timeout", timeout]);
        eprintln!("{short}: {} MB", said.resident_max >> 20);
        assert_eq!((said.code, said.out.as_str()), (Some(1), ""), "{short}: {}", said.errors);
        assert!(said.errors.contains(reason), "{short}: {}", said.errors);
        assert!(said.resident_max < RESIDENT_MAX, "{short}: {} bytes", said.resident_max);
    }
    what_is_no_attack_is_answered(&stage);
    stopped_it_leaves_nothing(&stage).await;
}

fn what_is_no_attack_is_answered(stage: &Stage) {
    let sorted =
        "select metric, count(*) as n, avg(value) from custom group by metric order by n desc, metric";
    let said = ask(stage, sorted, &["--format", "csv"]);
    assert_eq!((said.code, said.out.lines().count()), (Some(0), 52), "{}", said.errors);
    // Sorted on disk, as far as it does not fit.
    let large =
        "select a.metric, a.value, g.value as n from custom a, generate_series(1, 20) g order by 2, 1, 3";
    let said = ask(stage, large, &["--format", "csv", "--memory", "16MiB"]);
    assert_eq!((said.code, said.out.lines().count()), (Some(0), 20 * 20_001 + 1), "{}", said.errors);
    // However soon its time is over, a query ends with a word of ours.
    for timeout in ["1ms", "60ms", "150ms"] {
        let said = ask(stage, large, &["--timeout", timeout]);
        assert!(said.code == Some(1) && said.errors.contains("within"), "{}", said.errors);
        assert!(!said.errors.contains("panicked"), "{}", said.errors);
    }
    for (wrong, word) in [
        ("select 1 / 0", "zero"),
        ("select cast('x' as int)", "cast"),
        ("select nothing from custom", "nothing"),
    ] {
        let said = ask(stage, wrong, &[]);
        assert!(said.code == Some(1) && said.errors.to_lowercase().contains(word), "{}", said.errors);
        assert!(said.errors.contains("correct the query"), "{}", said.errors);
    }
    // Rows of a table for people are held, so there are not more than people look at.
    let said = ask(stage, "select * from generate_series(1, 100000000)", &["--timeout", "60s"]);
    assert_eq!((said.code, said.out.lines().count()), (Some(0), 10_001), "{}", said.errors);
    assert!(said.errors.contains("the first 10000 rows"), "{}", said.errors);
}

/// Folders of `highwater sql` processes.
fn scratch(process: u32) -> Vec<PathBuf> {
    let begin = format!("highwater-sql-{process}-");
    let all = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    all.filter(|one| one.file_name().to_string_lossy().starts_with(&begin)).map(|one| one.path()).collect()
}

async fn stopped_it_leaves_nothing(stage: &Stage) {
    let endless = "select count(*) from generate_series(1, 9000000000) a, generate_series(1, 9000000000) b";
    for (signal, code) in [("TERM", 143), ("HUP", 129)] {
        let mut process = stage.launch().start_command(&["sql", endless]);
        let id = process.pid();
        until("the query runs", DEADLINE, async || (scratch(id).len() == 1).then_some(())).await;
        process.signal(signal);
        assert_eq!(process.wait(DEADLINE).await.code(), Some(code), "{}", process.log());
        assert_eq!(scratch(id), Vec::<PathBuf>::new());
    }
}

/// Clears the screen, sets the title, hides what follows, reorders it, in the ways that there are.
const STEERING: &str = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}8m\u{202e}evil\u{2066}\u{200b}\r";

fn steers(text: &str) -> bool {
    text.chars().any(|one| {
        (one.is_control() && one != '\n' && one != '\t') || "\u{202e}\u{2066}\u{200b}".contains(one)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_others_wrote_steers_a_terminal() {
    let stage = Stage::shared(Shape::Named).await;
    let launch = stage.launch();
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    let row = "insert into scouter.custom_drift (created_at, space, name, version, metric, value) values ($1::text::timestamptz, $2, $2, $2, $2, 1)";
    client.execute(row, &[&"2026-11-01", &STEERING]).await.unwrap();
    client.execute(row, &[&"2020-01-01", &STEERING]).await.unwrap();
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    // The log has a line for an event.
    let name = stage.name.as_str();
    let table = format!("scouter.\"x\nforged{STEERING}\"");
    let publish = format!(
        "create table {table} (a int); alter publication {name} add table {table};
         insert into {table} values (1)"
    );
    client.batch_execute(&publish).await.unwrap();
    let mut sidecar = stage.launch().start();
    sidecar.says("but is not archived", DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
    let log = sidecar.log();
    assert!(!steers(&log) && !log.lines().any(|line| line.starts_with("forged")), "{log:?}");
    // Whoever archives writes the state tables.
    let state = "update highwater.watermark set kind = kind, system_identifier = system_identifier || $1;";
    client.execute(&state.replace(';', ""), &[&STEERING]).await.unwrap();
    let lacks = "update highwater.covered_partition set lacks_since = now(), lacks_reason = $1 || E'\\nok  everything'";
    client.execute(lacks, &[&STEERING]).await.unwrap();
    let log = "insert into highwater.purge_log (source_table, partition_name, action, reason, cutoff)
               values ('scouter.custom_drift', $1, 'blocked', $1, now())";
    client.execute(log, &[&STEERING]).await.unwrap();
    let model = ["--space", STEERING, "--name", STEERING, "--version", STEERING];
    let query = [&["query", "custom"], &model[..], &["--from", "2026-10-01", "--to", "2026-12-01"]].concat();
    for arguments in [
        vec!["--watermarks"],
        vec!["--watermarks", "--format", "json"],
        vec!["check"],
        vec!["check", "--format", "json"],
        vec!["purge", "--dry-run"],
        vec!["purge"],
        vec!["verify"],
        vec!["entities"],
        query.clone(),
        [&query[..], &["--plot"]].concat(),
        vec!["sql", "select * from custom"],
        vec!["sql", &format!("select {STEERING} from custom")],
        vec!["resync", STEERING],
    ] {
        let output = launch.output(&arguments);
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(!said.iter().any(|text| steers(text)), "{arguments:?}: {said:?}");
        assert!(
            !said.iter().any(|text| text.lines().any(|line| line.starts_with("ok  everything"))),
            "{said:?}"
        );
        if arguments[0] == "entities" || arguments[0] == "--watermarks" {
            assert!(said[0].contains("\\u001b"), "{arguments:?}: it is shown as what it is: {said:?}");
        }
    }
}

/// Everything below a folder, with its mode.
fn modes(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = vec![(folder.to_owned(), fs::metadata(folder).unwrap().permissions().mode() & 0o777)];
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(modes(&path));
        } else {
            found.push((path, entry.metadata().unwrap().permissions().mode() & 0o777));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_archive_is_its_owner_s_unless_a_setting_says_otherwise() {
    for (access, folder, file) in [("owner", 0o700, 0o600), ("umask", 0o755, 0o644)] {
        let stage = Stage::shared(Shape::Named).await;
        let launch = stage.launch().with("HIGHWATER_LOCAL_ACCESS", access);
        launch.must(&["setup"]);
        let mut sidecar = launch.start();
        stage.assert_archived(DEADLINE).await;
        assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
        let found = modes(&stage.storage());
        assert!(
            found.iter().any(|(path, _)| path.extension().is_some_and(|name| name == "parquet")),
            "{found:?}"
        );
        for (path, mode) in found {
            let wanted = if path.is_dir() { folder } else { file };
            assert_eq!(mode, wanted, "{access}: {} has {mode:o}", path.display());
        }
    }
}
