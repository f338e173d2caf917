//! Shows Highwater at work, from nothing: a throw-away PostgreSQL, drift of several models, the sidecar,
//! a kill -9 in the middle, and the proof that not a row was lost or doubled. `make demo` runs it.
//!
//! `DEMO_SECONDS` sets how long drift is written (30 unless told).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a program that talks to the terminal, and may panic"
)]

#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use support::archive::{compare, files};
use support::cluster::{CRON_DATABASE, Cluster};
use support::schema::{self, KINDS, Partitions, Shape};
use support::sidecar::Launch;
use support::wait::{until, within};
use tokio_postgres::Client;

const SLOT: &str = "highwater";

/// The models: the last one drifts.
const MODELS: [(&str, &str, &str); 3] =
    [("shop", "ranking", "2.1.0"), ("bank", "fraud", "0.9.3"), ("bank", "credit", "1.4.0")];
const DRIFTING: usize = 2;

const FEATURES: [&str; 3] = ["age", "income", "balance"];
const BINS: u32 = 10;

fn say(text: &str) {
    println!("\n== {text}");
}

#[tokio::main]
async fn main() -> ExitCode {
    let seconds = std::env::var("DEMO_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    say("A throw-away PostgreSQL with pg_cron and pg_partman, and drift tables as Scouter makes them.");
    let cluster = Cluster::start_new(&[]);
    let client = cluster.connect(CRON_DATABASE).await;
    schema::create(&client, Shape::Entity, Partitions::Partman).await;
    let sql = "create extension pg_cron;
        select cron.schedule('partition-maintenance', '0 * * * *', 'call partman.run_maintenance_proc()')";
    client.batch_execute(sql).await.expect("pg_cron");
    let sql =
        "select string_agg(extname || ' ' || extversion, ', ') from pg_extension where extname like 'pg\\_%'";
    let extensions: String = client.query_one(sql, &[]).await.expect("extensions").get(0);
    println!("   {extensions}; {}", cluster.uri_unix(CRON_DATABASE));

    let folder = tempfile::tempdir().expect("temporary folder");
    let storage = folder.path().join("archive");
    let log = folder.path().join("sidecar.log");
    let launch =
        Launch::new(&cluster.uri_unix(CRON_DATABASE), &storage, SLOT, &log).with("HIGHWATER_MAX_LAG", "2s");

    say("`highwater setup` makes its tables, the publication and the replication slot.");
    println!("{}", launch.must(&["setup"]).trim_end());

    say("The sidecar runs. bank/credit will drift: its balances move to higher bins, its accuracy falls.");
    let mut sidecar = launch.start();
    let mut generator = Generator::new(&client).await;
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let (mut killed, mut shown) = (false, Instant::now());
    while start.elapsed() < length {
        let progress = start.elapsed().as_secs_f64() / length.as_secs_f64();
        generator.write(&client, progress).await;
        if !killed && progress > 0.5 {
            killed = true;
            println!("   kill -9 of the sidecar, whatever it is doing; the writers do not notice");
            sidecar.kill();
        } else if killed && progress > 0.6 && sidecar.ended().is_some() {
            println!("   the sidecar is started again");
            sidecar = launch.start();
        }
        if shown.elapsed() > length / 8 {
            shown = Instant::now();
            println!("   {}", generator.picture());
        }
        // The pace of real writers.
        within(Duration::from_millis(100), async || None::<()>).await;
    }
    if sidecar.ended().is_some() {
        sidecar = launch.start();
    }
    let rows = generator.rows;
    say(&format!("{rows} rows were written. The sidecar archives the rest, and is told to end (SIGTERM)."));
    let target: tokio_postgres::types::PgLsn =
        client.query_one("select pg_current_wal_insert_lsn()", &[]).await.expect("lsn").get(0);
    generator.write(&client, 1.0).await;
    let sql = "select confirmed_flush_lsn > $1 from pg_replication_slots where slot_name = $2";
    until("everything is acknowledged", Duration::from_secs(60), async || {
        client.query_one(sql, &[&target, &SLOT]).await.expect("slot").get::<_, bool>(0).then_some(())
    })
    .await;
    let status = sidecar.terminate(Duration::from_secs(30)).await;
    println!("   it ended with {status}");

    say("`highwater --watermarks`: how far the archive reaches.");
    println!("{}", launch.must(&["--watermarks"]).trim_end());

    say("The files. Any reader of Delta Lake or Parquet opens them.");
    show_files(&storage);

    say("The proof: every row of the source against every row of the archive, bit by bit.");
    let mut same = status.success();
    for kind in KINDS {
        let difference = compare(&client, &storage, Shape::Entity, kind).await;
        same &= difference.is_none();
        println!("   {:13} {difference}", kind.table());
    }
    if !same {
        println!("\nThey differ, or the sidecar failed. Its log:\n{}", sidecar.log());
        return ExitCode::FAILURE;
    }
    println!("\nThe same rows, once each, in spite of the kill. Server and files are removed now.");
    ExitCode::SUCCESS
}

/// At most this many files are listed of each table.
const SHOWN_FILES: usize = 4;

fn show_files(storage: &Path) {
    for kind in KINDS {
        let table = storage.join(kind.folder());
        let files = files(&table).expect("a Delta table");
        let size = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
        let bytes: u64 = files.iter().map(|path| size(path)).sum();
        println!("   {}/: {} files, {} KiB", kind.folder(), files.len(), bytes.div_ceil(1024));
        for path in files.iter().take(SHOWN_FILES) {
            let name = path.strip_prefix(&table).unwrap_or(path);
            println!("      {} ({} KiB)", name.display(), size(path).div_ceil(1024));
        }
        if files.len() > SHOWN_FILES {
            println!("      and {} more", files.len() - SHOWN_FILES);
        }
    }
}

/// Writes what servers report of their models.
struct Generator {
    entities: Vec<i32>,
    rng: StdRng,
    rows: u64,
    accuracy: f64,
    bins: [i32; BINS as usize],
}

impl Generator {
    async fn new(client: &Client) -> Self {
        let mut entities = Vec::new();
        for (space, name, version) in MODELS {
            entities.push(schema::entity_id(client, space, name, version).await);
        }
        Self { entities, rng: StdRng::seed_from_u64(7), rows: 0, accuracy: 0.0, bins: [0; BINS as usize] }
    }

    /// One report of every model, a transaction each.
    async fn write(&mut self, client: &Client, progress: f64) {
        for model in 0..self.entities.len() {
            let drift = if model == DRIFTING { progress } else { 0.0 };
            let sql = self.report(self.entities[model], drift, model == DRIFTING);
            client.batch_execute(&sql).await.expect("the drift of a model");
        }
    }

    fn report(&mut self, entity: i32, drift: f64, is_shown: bool) -> String {
        let accuracy = 0.94 - 0.3 * drift + self.rng.random_range(-0.01..0.01);
        let latency: f64 = self.rng.random_range(8.0..14.0);
        let mut psi = Vec::new();
        for feature in FEATURES {
            // A bell over the bins; drift moves its middle upwards.
            let middle = 3.5 + if feature == "balance" { 4.0 * drift } else { 0.0 };
            for bin in 0..BINS {
                let distance = f64::from(bin) - middle;
                let expected = 800.0 * (-distance * distance / 4.0).exp();
                let count = (expected * self.rng.random_range(0.9..1.1)).round() as i32;
                psi.push(format!("({entity}, '{feature}', {bin}, {count})"));
                if is_shown && feature == "balance" {
                    self.bins[bin as usize] = count;
                }
            }
        }
        let spc: Vec<String> = FEATURES
            .iter()
            .map(|feature| {
                format!("({entity}, '{feature}', {})", self.rng.random_range(-2.0..2.0) + 3.0 * drift)
            })
            .collect();
        if is_shown {
            self.accuracy = accuracy;
        }
        self.rows += 2 + psi.len() as u64 + spc.len() as u64;
        format!(
            "begin;
             insert into scouter.custom_drift (entity_id, metric, value)
             values ({entity}, 'accuracy', {accuracy}), ({entity}, 'latency_ms', {latency});
             insert into scouter.psi_drift (entity_id, feature, bin_id, bin_count) values {};
             insert into scouter.spc_drift (entity_id, feature, value) values {};
             commit",
            psi.join(","),
            spc.join(",")
        )
    }

    /// The drifting model now: its bins as a small picture, and its accuracy.
    fn picture(&self) -> String {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let most = self.bins.iter().copied().max().unwrap_or_default().max(1);
        let bar = |count: &i32| BARS[usize::try_from(count * 7 / most).unwrap_or_default()];
        let bins: String = self.bins.iter().map(bar).collect();
        format!("bank/credit 1.4.0   balance {bins}   accuracy {:.3}", self.accuracy)
    }
}
