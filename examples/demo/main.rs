//! Shows Highwater at work, from nothing: a throw-away PostgreSQL, drift of several models, the sidecar,
//! a kill -9 in the middle, and the proof that not a row was lost or doubled. `make demo` runs it.
//!
//! `DEMO_SECONDS` sets how long drift is written (30 unless told); with `DEMO_KEEP=1` it ends with a page, and stays up.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a program that talks to the terminal, and may panic"
)]

#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use support::archive::{compare, files};
use support::cluster::{CRON_DATABASE, Cluster};
use support::http::Site;
use support::schema::{self, KINDS, Partitions, Shape};
use support::sidecar::{Launch, Sidecar};
use support::wait::{until, within};
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::Client;

const SLOT: &str = "highwater";

/// The models: the last one drifts.
const MODELS: [(&str, &str, &str); 3] =
    [("shop", "ranking", "2.1.0"), ("bank", "fraud", "0.9.3"), ("bank", "credit", "1.4.0")];
const DRIFTING: usize = 2;

const FEATURES: [&str; 3] = ["age", "income", "balance"];
const BINS: u32 = 10;

/// How often rows are written: the pace of real writers.
const PACE: Duration = Duration::from_millis(100);

/// Exit code after Ctrl-C, as shells know it.
const EXIT_INTERRUPTED: u8 = 130;

#[tokio::main]
async fn main() -> ExitCode {
    // Whatever ends it, the server, the sidecar and their files go with it.
    tokio::select! {
        is_proved = show() => if is_proved { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        () = interrupted() => {
            println!("\nInterrupted. The server, the sidecar and all files were removed.");
            ExitCode::from(EXIT_INTERRUPTED)
        }
    }
}

async fn interrupted() {
    let mut terminate = signal(SignalKind::terminate()).expect("a handler");
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// A headline.
fn step(number: u32, text: &str) {
    println!("\n[{number}/7] {text}\n");
}

/// What a program printed, moved in under its headline.
fn quote(text: &str) {
    for line in text.trim_end().lines() {
        println!("{}", format!("    {line}").trim_end());
    }
}

/// The whole show; whether it proved what it set out to.
async fn show() -> bool {
    let seconds = std::env::var("DEMO_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    println!(
        "Highwater copies every row that is inserted into the drift tables of a PostgreSQL database into\n\
         Delta Lake, exactly once. This demo shows it in about {} seconds, kills it half-way, and compares\n\
         all rows. It runs on a server of its own, and removes everything at its end.",
        seconds + 15
    );
    let stage = Stage::build().await;
    let (mut sidecar, mut generator) = stage.archive_drift(Duration::from_secs(seconds)).await;
    let is_clean = stage.finish(&mut sidecar, &mut generator).await;
    stage.show_archive();
    let is_proved = stage.prove(&sidecar, is_clean).await;
    stage.keep().await;
    is_proved
}

/// The server with its drift tables, and how the sidecar is started beside it.
struct Stage {
    client: Client,
    launch: Launch,
    storage: PathBuf,
    // The last: its folder, with the archive in it, goes with the server.
    _cluster: Cluster,
}

impl Stage {
    async fn build() -> Self {
        step(
            1,
            "A throw-away PostgreSQL with pg_cron and pg_partman, and drift tables as Scouter makes them",
        );
        let cluster = Cluster::start_new(&[]);
        let client = cluster.connect(CRON_DATABASE).await;
        schema::create(&client, Shape::Entity, Partitions::Partman).await;
        let sql = "create extension pg_cron;
            select cron.schedule('partition-maintenance', '0 * * * *', 'call partman.run_maintenance_proc()')";
        client.batch_execute(sql).await.expect("pg_cron");
        let sql = "select 'PostgreSQL ' || current_setting('server_version') || ', ' ||
                          string_agg(extname || ' ' || extversion, ', ' order by extname)
                   from pg_extension where extname like 'pg\\_%'";
        println!("    {}", client.query_one(sql, &[]).await.expect("extensions").get::<_, String>(0));
        println!("    scouter.custom_drift, scouter.psi_drift, scouter.spc_drift: a partition for each day");

        step(2, "`highwater setup` makes the publication, the replication slot and its own tables");
        let folder = cluster.socket_folder().join("demo");
        std::fs::create_dir(&folder).expect("a folder");
        let (storage, log) = (folder.join("archive"), folder.join("sidecar.log"));
        let launch = Launch::new(&cluster.uri_unix(CRON_DATABASE), &storage, SLOT, &log)
            .with("HIGHWATER_MAX_LAG", "2s");
        quote(&launch.must(&["setup"]));
        Self { client, launch, storage, _cluster: cluster }
    }

    /// Writes drift while the sidecar runs, and kills the sidecar half-way.
    async fn archive_drift(&self, length: Duration) -> (Sidecar, Generator) {
        step(3, "`highwater` archives, at most 2 seconds behind, while three models report their drift");
        println!("    bank/credit drifts: its balances move to higher bins, and its accuracy falls.\n");
        let mut sidecar = self.launch.start();
        let mut generator = Generator::new(&self.client).await;
        let (start, mut shown) = (Instant::now(), Instant::now());
        let mut was_killed = false;
        while start.elapsed() < length {
            let progress = start.elapsed().as_secs_f64() / length.as_secs_f64();
            generator.write(&self.client, progress).await;
            if !was_killed && progress > 0.5 {
                was_killed = true;
                sidecar.kill();
                println!("    --- kill -9 of the sidecar; those who write rows notice nothing ---");
            } else if was_killed && progress > 0.7 && sidecar.ended().is_some() {
                sidecar = self.launch.start();
                println!("    --- the sidecar is started again ---");
            }
            if shown.elapsed() > length / 10 {
                shown = Instant::now();
                let archived = self.archived_rows().await;
                println!(
                    "    {}   {:6} rows written {archived:6} archived",
                    generator.picture(),
                    generator.rows
                );
            }
            within(PACE, async || None::<()>).await;
        }
        if sidecar.ended().is_some() {
            sidecar = self.launch.start();
        }
        (sidecar, generator)
    }

    async fn archived_rows(&self) -> i64 {
        let sql = "select coalesce(sum(row_count), 0)::bigint from highwater.watermark";
        self.client.query_one(sql, &[]).await.expect("watermarks").get(0)
    }

    /// Waits until everything is archived, and ends the sidecar; whether it ended well.
    async fn finish(&self, sidecar: &mut Sidecar, generator: &mut Generator) -> bool {
        step(4, "`highwater verify` compares the archive with Postgres, while the sidecar goes on");
        quote(&self.launch.must(&["verify"]));
        step(5, "The rest is archived, and the sidecar is told to end (SIGTERM)");
        let sql = "select pg_current_wal_insert_lsn()";
        let target: tokio_postgres::types::PgLsn =
            self.client.query_one(sql, &[]).await.expect("position").get(0);
        generator.write(&self.client, 1.0).await;
        let sql = "select confirmed_flush_lsn > $1 from pg_replication_slots where slot_name = $2";
        until("everything is acknowledged", Duration::from_secs(60), async || {
            self.client.query_one(sql, &[&target, &SLOT]).await.expect("slot").get::<_, bool>(0).then_some(())
        })
        .await;
        let status = sidecar.terminate(Duration::from_secs(30)).await;
        println!("    {} rows were written; the sidecar ended with {status}", generator.rows);
        status.success()
    }

    fn show_archive(&self) {
        step(6, "`highwater --watermarks` says how far the archive reaches");
        quote(&self.launch.must(&["--watermarks"]));
        println!("\n    The files, which any reader of Delta Lake or Parquet opens:\n");
        for kind in KINDS {
            show_files(&self.storage.join(kind.folder()), kind.folder());
        }
    }

    /// Shows where the page is; it stays up if that is wanted.
    async fn keep(&self) {
        let is_kept = std::env::var_os("DEMO_KEEP").is_some_and(|value| value != "0");
        if !is_kept {
            println!("\nDEMO_KEEP=1 keeps it up, with a page that shows the state and the history.");
            return;
        }
        let address = match std::net::TcpListener::bind("127.0.0.1:9808") {
            Ok(_) => "127.0.0.1:9808",
            Err(_) => "127.0.0.1:0",
        };
        let sidecar = self.launch.clone().with("HIGHWATER_HTTP", address).start();
        let site = Site::of(&sidecar).await;
        println!("\nThe page is at {}/ until you press Ctrl-C. Models go on reporting.", site.url);
        let mut generator = Generator::new(&self.client).await;
        let start = Instant::now();
        while start.elapsed() < FOR_EVER {
            generator.write(&self.client, (start.elapsed().as_secs_f64() / 600.0).min(1.0)).await;
            within(PACE * 10, async || None::<()>).await;
        }
    }

    async fn prove(&self, sidecar: &Sidecar, is_clean: bool) -> bool {
        step(7, "The proof: all rows of the source against all rows of the archive, bit by bit");
        let mut is_same = true;
        for kind in KINDS {
            let difference = compare(&self.client, &self.storage, Shape::Entity, kind).await;
            is_same &= difference.is_none();
            println!("    {:13} {difference}", kind.table());
        }
        match (is_same, is_clean) {
            (true, true) => {
                println!("\nThe same rows, once each, in spite of the kill.");
            }
            (false, _) => println!("\nFAILED: they differ. The sidecar's log:\n{}", sidecar.log()),
            (true, false) => println!("\nFAILED: the sidecar ended badly. Its log:\n{}", sidecar.log()),
        }
        is_same && is_clean
    }
}

/// How long the page stays up that nobody ends.
const FOR_EVER: Duration = Duration::from_hours(24 * 365);

/// At most this many files are listed of each table.
const SHOWN_FILES: usize = 3;

fn show_files(table: &Path, name: &str) {
    let files = files(table).expect("a Delta table");
    let size = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
    let bytes: u64 = files.iter().map(|path| size(path)).sum();
    println!("    {name}/: {} files, {} KiB", files.len(), bytes.div_ceil(1024));
    for path in files.iter().take(SHOWN_FILES) {
        let name = path.strip_prefix(table).unwrap_or(path);
        println!("        {} ({} KiB)", name.display(), size(path).div_ceil(1024));
    }
    if files.len() > SHOWN_FILES {
        println!("        and {} more", files.len() - SHOWN_FILES);
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
        format!("bank/credit  balance {bins}  accuracy {:.2}", self.accuracy)
    }
}
