//! The first copy of a full table, beside what the server can give: `psql`'s `\copy` to nowhere, of the same partitions.
//!
//! ```text
//! highwater        the release binary, from its start until the table's state is `streaming`: Parquet, commits, watermarks
//! described table  the same of a table of the same shape and rows that the settings describe
//! baseline         another build of the sidecar, if `BENCH_BASELINE` is the path of one
//! psql             \copy ... to /dev/null (format binary), partition by partition, in one session
//! ```
//!
//! `BENCH_ROWS` (5,000,000), `BENCH_ROUNDS` (3). They take turns over the Unix socket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench prints its table, and panics when something is not as it must be"
)]

#[path = "../measure/mod.rs"]
mod measure;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use measure::process::{Usage, Watched};
use measure::{DATABASE, LIKE_PSI, LOOK_INTERVAL, NAME, RUN_DEADLINE};
use measure::{create_like_psi, load_average, number, text};
use support::cluster::Cluster;
use tokio_postgres::Client;

const DAYS: u64 = 10;

/// Seconds, and what the client used.
type Outcome = (f64, Usage);

#[tokio::main]
async fn main() {
    let (rows, rounds) = (number("BENCH_ROWS", 5_000_000), number("BENCH_ROUNDS", 3));
    let (cluster, client) = measure::new_server().await;
    let rows = fill(&client, rows).await;
    println!(
        "first copy of {rows} PSI rows in {DAYS} partitions, {rounds} rounds; load average {}",
        load_average()
    );
    // The first to read would read from the disk, and set hint bits.
    psql(&cluster);
    let mut outcomes: Vec<(Contender, Vec<Outcome>)> =
        contenders().into_iter().map(|contender| (contender, Vec::new())).collect();
    for round in 1..=rounds {
        for (contender, outcomes) in &mut outcomes {
            let (seconds, usage) = match contender {
                Contender::Psql => psql(&cluster),
                _ => highwater(&cluster, &client, rows, contender).await,
            };
            println!(
                "round {round}: {}: {seconds:.2} s, CPU {:.2} s, {} MB",
                contender.name(),
                usage.cpu().as_secs_f64(),
                usage.peak_bytes >> 20
            );
            outcomes.push((seconds, usage));
        }
    }
    println!(
        "\n| contender | rows/s | s | of psql | CPU s per million rows | peak MB |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    );
    let bare = outcomes.last().map_or(0.0, |(_, outcomes)| median(outcomes, |outcome| outcome.0));
    for (contender, outcomes) in &outcomes {
        let seconds = median(outcomes, |outcome| outcome.0);
        let cpu = median(outcomes, |outcome| outcome.1.cpu().as_secs_f64());
        let peak = median(outcomes, |outcome| (outcome.1.peak_bytes >> 20) as f64);
        let millions = rows as f64 / 1e6;
        println!(
            "| {} | {:.0} | {seconds:.2} | {:.2} | {:.2} | {peak:.0} |",
            contender.name(),
            rows as f64 / seconds,
            seconds / bare,
            cpu / millions
        );
    }
    println!("\nload average {}", load_average());
}

/// Who copies.
enum Contender {
    Highwater,
    Described,
    Baseline(PathBuf),
    Psql,
}

impl Contender {
    const fn name(&self) -> &'static str {
        match self {
            Self::Highwater => "highwater",
            Self::Described => "described table",
            Self::Baseline(_) => "baseline",
            Self::Psql => "psql",
        }
    }
}

/// The bare one last.
fn contenders() -> Vec<Contender> {
    let baseline = text("BENCH_BASELINE").map(PathBuf::from).map(Contender::Baseline);
    [Contender::Highwater, Contender::Described]
        .into_iter()
        .chain(baseline)
        .chain([Contender::Psql])
        .collect()
}

fn median(outcomes: &[Outcome], figure: impl Fn(&Outcome) -> f64) -> f64 {
    measure::median(outcomes.iter().map(figure))
}

/// Fills a partition a day with the rows of 5 models with 20 features of 10 bins; how many there are.
async fn fill(client: &Client, rows: u64) -> u64 {
    create_like_psi(client).await;
    let minutes = rows / DAYS / 1000;
    for day in 1..=DAYS {
        let sql = format!(
            "create table scouter.day_{day} partition of scouter.psi_drift
                 for values from ('2026-01-{day:02} 00:00+00') to ('2026-01-{next:02} 00:00+00');
             insert into scouter.psi_drift (created_at, space, name, version, feature, bin_id, bin_count)
             select '2026-01-{day:02} 00:00+00'::timestamptz + minute * interval '1 minute', 'shop', 'model ' || model,
                    '1.0.0', 'feature_' || feature, bin, 1000 * random()
             from generate_series(0, {minutes} - 1) minute, generate_series(1, 5) model,
                  generate_series(1, 20) feature, generate_series(0, 9) bin;
             create table public.{LIKE_PSI}_{day} partition of public.{LIKE_PSI}
                 for values from ('2026-01-{day:02} 00:00+00') to ('2026-01-{next:02} 00:00+00');
             insert into public.{LIKE_PSI} select * from scouter.day_{day}",
            next = day + 1,
        );
        client.batch_execute(&sql).await.expect("rows");
    }
    for statement in ["vacuum analyze", "checkpoint"] {
        client.batch_execute(statement).await.expect("rest after the rows");
    }
    minutes * DAYS * 1000
}

/// A copy from nothing.
async fn highwater(cluster: &Cluster, client: &Client, rows: u64, contender: &Contender) -> Outcome {
    let folder = measure::new_folder();
    let launch = measure::launch(&cluster.uri_unix(DATABASE), folder.path(), NAME);
    let (launch, kind) = match contender {
        // A schema without drift tables.
        Contender::Described => {
            (measure::describing(launch.with("HIGHWATER_SCHEMA", "public"), folder.path()), LIKE_PSI)
        }
        Contender::Baseline(program) => (launch.program(program), "psi"),
        Contender::Highwater | Contender::Psql => (launch, "psi"),
    };
    launch.must(&["setup"]);
    let start = Instant::now();
    let mut sidecar = launch.start();
    let mut watched = Watched { pid: Some(sidecar.pid()), ..Watched::default() };
    let sql = "select state = 'streaming', row_count from highwater.watermark where kind = $1";
    loop {
        watched.look();
        let row = client.query_one(sql, &[&kind]).await.expect("watermark");
        if row.get(0) {
            assert_eq!(u64::try_from(row.get::<_, i64>(1)), Ok(rows), "rows in the archive");
            break;
        }
        assert!(sidecar.ended().is_none() && start.elapsed() < RUN_DEADLINE, "{}", sidecar.log());
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let seconds = start.elapsed().as_secs_f64();
    watched.look();
    assert!(sidecar.terminate(Duration::from_secs(60)).await.success(), "{}", sidecar.log());
    client.execute("select pg_drop_replication_slot($1)", &[&NAME]).await.expect("slot");
    client
        .batch_execute(&format!("drop publication {NAME}; drop schema highwater cascade"))
        .await
        .expect("schema");
    (seconds, watched.usage)
}

fn psql(cluster: &Cluster) -> Outcome {
    let columns = "created_at, name, space, version, feature, bin_id, bin_count, updated_at, archived";
    let mut command = Command::new(cluster.bin().join("psql"));
    command.args(["--no-psqlrc", "--quiet", "--dbname", &cluster.uri_unix(DATABASE)]);
    for day in 1..=DAYS {
        command.arg(format!("--command=\\copy scouter.day_{day} ({columns}) to /dev/null (format binary)"));
    }
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).spawn().expect("psql");
    let mut watched = Watched { pid: Some(child.id()), ..Watched::default() };
    let status = loop {
        watched.look();
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        std::thread::sleep(LOOK_INTERVAL);
    };
    assert!(status.success(), "{status}");
    (start.elapsed().as_secs_f64(), watched.usage)
}
