//! The server, and one run against it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use highwater::Lsn;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use super::contender::{Contender, Running, Task, Transport};
use super::measure::process::Watched;
use super::measure::{
    DATABASE, LIKE_PSI, LOOK_INTERVAL, NAME, RUN_DEADLINE, create_like_psi, describing, launch, new_folder,
    new_server,
};
use super::support::cluster::Cluster;
use super::{Outcome, Wish};

/// Rows of a transaction: what five models with 20 features of 10 bins write in a minute.
const TRANSACTION_ROWS: u64 = 5 * 20 * 10;

/// A slot that stands between the rows of both tables.
const DESCRIBED_SLOT: &str = "bench_described";

/// A server whose slot has the rows still before it.
#[derive(Debug)]
pub(crate) struct Source {
    cluster: Cluster,
    client: Client,
    rows: u64,
    /// Beyond the last transaction; one more row lies beyond it, so that every reader sees that it is passed.
    end: Lsn,
    /// The same of the rows of the described table, which come behind the others.
    described_end: Lsn,
    max_lag: String,
    baseline: Option<PathBuf>,
}

impl Source {
    /// A new server with rows to drain.
    pub(crate) async fn new(wish: &Wish) -> Self {
        let (cluster, client) = new_server().await;
        create_like_psi(&client).await;
        let sql = format!("create table public.{LIKE_PSI}_default partition of public.{LIKE_PSI} default");
        client.batch_execute(&sql).await.expect("a partition");
        let folder = new_folder();
        let launch = launch(&cluster.uri_unix(DATABASE), folder.path(), NAME);
        // This slot is only copied.
        describing(launch, folder.path()).must(&["setup"]);
        let transactions = wish.rows.div_ceil(TRANSACTION_ROWS).max(1);
        let end = write_all(&client, "scouter.psi_drift", transactions).await;
        let sql = "select pg_create_logical_replication_slot($1, 'pgoutput')";
        client.execute(sql, &[&DESCRIBED_SLOT]).await.expect("slot");
        let described_end = write_all(&client, &format!("public.{LIKE_PSI}"), transactions).await;
        client.batch_execute("checkpoint").await.expect("checkpoint");
        let rows = transactions * TRANSACTION_ROWS;
        let (max_lag, baseline) = (wish.max_lag.clone(), wish.baseline.clone());
        Self { cluster, client, rows, end, described_end, max_lag, baseline }
    }

    /// Lets a contender drain a copy of the slot.
    pub(crate) async fn run(&self, contender: Contender, transport: Transport) -> Outcome {
        let folder = new_folder();
        let slot = "bench_copy";
        let end = self.end_of(contender);
        let task = Task {
            cluster: &self.cluster,
            database: DATABASE,
            transport,
            slot,
            publication: NAME,
            end,
            max_lag: &self.max_lag,
            baseline: self.baseline.as_deref(),
            folder: folder.path(),
        };
        let copy = "select from pg_copy_logical_replication_slot($1, $2)";
        let of = if contender == Contender::Described { DESCRIBED_SLOT } else { NAME };
        self.client.execute(copy, &[&of, &slot]).await.expect("copy of the slot");
        self.forget_archive(slot).await;
        let outcome = self.watch(Running::start(contender, &task), slot, end).await;
        if contender.is_sidecar() {
            let sql = "select row_count from highwater.watermark where kind = $1";
            let archived: i64 =
                self.client.query_one(sql, &[&contender.kind()]).await.expect("watermark").get(0);
            assert_eq!(u64::try_from(archived), Ok(self.rows + TRANSACTION_ROWS), "rows in the archive");
        }
        self.client.execute("select pg_drop_replication_slot($1)", &[&slot]).await.expect("slot");
        outcome
    }

    fn end_of(&self, contender: Contender) -> Lsn {
        if contender == Contender::Described { self.described_end } else { self.end }
    }

    /// The watermark rows as `highwater setup` leaves them, for a copy of the slot.
    async fn forget_archive(&self, slot: &str) {
        let sql = "update highwater.watermark w
                      set slot_name = s.slot_name, flushed_lsn = s.confirmed_flush_lsn, archived_before = null,
                          max_created_at = null, row_count = 0, file_count = 0, byte_count = 0
                     from pg_replication_slots s where s.slot_name = $1";
        self.client.execute(sql, &[&slot]).await.expect("watermarks");
        self.client
            .batch_execute("truncate highwater.entity_watermark, highwater.archive_log")
            .await
            .expect("watermarks");
    }

    /// Follows a run to its end.
    async fn watch(&self, mut running: Running, slot: &str, end: Lsn) -> Outcome {
        let start = Instant::now();
        let (mut client, mut sender) = (Watched::default(), Watched::default());
        client.pid = Some(running.pid());
        let mut sent = None;
        loop {
            client.look();
            sender.look();
            let state = self.slot_state(slot).await;
            sender.pid = state.active_pid.or(sender.pid);
            if sent.is_none() && state.sent >= end {
                sent = Some(start.elapsed());
            }
            let is_over = match &mut running {
                Running::Sidecar(sidecar) => {
                    assert!(sidecar.ended().is_none(), "the sidecar has ended:\n{}", sidecar.log());
                    state.confirmed >= end
                }
                Running::Program(child) => child.try_wait().expect("wait").is_some_and(|status| {
                    assert!(status.success(), "{status}");
                    true
                }),
            };
            if is_over {
                break;
            }
            assert!(start.elapsed() < RUN_DEADLINE, "not at the end after {RUN_DEADLINE:?}");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let wall = start.elapsed();
        if let Running::Sidecar(sidecar) = &mut running {
            client.look();
            sender.look();
            assert!(sidecar.terminate(Duration::from_secs(60)).await.success(), "{}", sidecar.log());
        }
        self.released(slot, end).await;
        let (client, sender) = (client.usage, sender.usage);
        Outcome { rows: self.rows, wall, sent: sent.unwrap_or(wall), client, sender }
    }

    async fn slot_state(&self, slot: &str) -> SlotState {
        let sql = "select s.active_pid, s.confirmed_flush_lsn, r.sent_lsn
                     from pg_replication_slots s left join pg_stat_replication r on r.pid = s.active_pid
                    where s.slot_name = $1";
        let row = self.client.query_one(sql, &[&slot]).await.expect("slot");
        let lsn =
            |column: usize| row.get::<_, Option<PgLsn>>(column).map_or(Lsn::ZERO, |lsn| Lsn(lsn.into()));
        let pid: Option<i32> = row.get(0);
        SlotState { active_pid: pid.and_then(|pid| u32::try_from(pid).ok()), confirmed: lsn(1), sent: lsn(2) }
    }

    /// Waits until no walsender holds the slot, and makes sure that everything was acknowledged.
    async fn released(&self, slot: &str, end: Lsn) {
        let released = async || self.slot_state(slot).await.active_pid.is_none().then_some(());
        super::support::wait::until("the slot is released", Duration::from_secs(30), released).await;
        let confirmed = self.slot_state(slot).await.confirmed;
        assert!(confirmed >= end, "acknowledged only up to {confirmed}, not {end}");
    }
}

/// A slot, and how far its walsender has sent.
#[derive(Debug)]
struct SlotState {
    active_pid: Option<u32>,
    confirmed: Lsn,
    sent: Lsn,
}

/// So many transactions, and the position behind them; one more lies behind that.
async fn write_all(client: &Client, table: &str, transactions: u64) -> Lsn {
    write_rows(client, table, transactions).await;
    let end: PgLsn =
        client.query_one("select pg_current_wal_insert_lsn()", &[]).await.expect("position").get(0);
    write_rows(client, table, 1).await;
    Lsn(end.into())
}

/// A transaction for each of so many minutes up to now, with the same numbers every time.
async fn write_rows(client: &Client, table: &str, transactions: u64) {
    // Each by itself: a block commits only where no transaction has been begun for it.
    for sql in ["set synchronous_commit = off", "select setseed(0.5)"] {
        client.batch_execute(sql).await.expect("settings");
    }
    let sql = format!(
        "do $$
         declare base timestamptz := date_trunc('minute', now());
         begin
            for minute in reverse {transactions}..1 loop
                insert into {table} (created_at, space, name, version, feature, bin_id, bin_count)
                select base - minute * interval '1 minute' + interval '1 second' * {offset}, 'shop', 'model ' || model,
                       '1.0.0', 'feature_' || feature, bin, 1000 * random()
                  from generate_series(1, 5) model, generate_series(1, 20) feature, generate_series(0, 9) bin
                 order by model, feature, bin;
                commit;
            end loop;
         end $$",
        // The last row of all must not equal one that is there.
        offset = u8::from(transactions == 1),
    );
    client.batch_execute(&sql).await.expect("rows");
}
