use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use crate::source::Partition;
use crate::tables::Kind;
use crate::telemetry::{Bar, whole};
use crate::vitals::{OfPartitions, OfTable, Vitals};

/// How often progress is told in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// How far a table is: a bar on the terminal, or told in the log from time to time.
pub(super) struct Progress {
    bar: Option<Bar>,
    table: String,
    begun: Instant,
    told: Instant,
    /// What is done with the partition.
    step: &'static str,
    partition: String,
    /// Rows that Postgres expects of this partition, and of all that follow it.
    current: f64,
    rest: f64,
    read: u64,
    /// Of `read`, those of this partition.
    read_of_current: u64,
    /// Of `read`, those that the archive can't hold, and did not have in its quarantine.
    pub(super) quarantined: u64,
    pub(super) added: u64,
    counted: Counted,
}

/// The same for whoever counts.
struct Counted {
    rows: Counter,
    left: Gauge,
    done: Gauge,
}

impl Counted {
    fn new(vitals: &Vitals, kind: Kind, partitions: usize) -> Self {
        let counters = &vitals.counters;
        let of = |state| {
            let of = OfPartitions { table: kind.name().to_owned(), state };
            counters.copy_partitions.get_or_create(&of).clone()
        };
        let (left, done) = (of("left"), of("done"));
        left.set(i64::try_from(partitions).unwrap_or(i64::MAX));
        done.set(0);
        Self { rows: counters.copied_rows.get_or_create(&OfTable::new(kind.name())).clone(), left, done }
    }
}

impl Progress {
    pub(super) fn new(vitals: &Vitals, kind: Kind, table: &str, partitions: &[Partition]) -> Self {
        let now = Instant::now();
        Self {
            bar: Bar::new("rows"),
            table: table.to_owned(),
            begun: now,
            told: now,
            step: "",
            partition: String::new(),
            current: 0.0,
            rest: partitions.iter().map(|partition| partition.rows_expected).sum(),
            read: 0,
            read_of_current: 0,
            quarantined: 0,
            added: 0,
            counted: Counted::new(vitals, kind, partitions.len()),
        }
    }

    pub(super) fn begin(&mut self, partition: &Partition) {
        partition.name.clone_into(&mut self.partition);
        self.current = partition.rows_expected;
        self.rest -= self.current;
        self.step("looking at");
    }

    pub(super) fn step(&mut self, step: &'static str) {
        self.step = step;
        self.show();
    }

    pub(super) fn end(&mut self) {
        tracing::debug!(table = self.table, partition = self.partition, read = self.read, "partition done");
        self.current = 0.0;
        self.read_of_current = 0;
        self.counted.left.dec();
        self.counted.done.inc();
    }

    pub(super) fn rows(&mut self, rows: u32) {
        self.read += u64::from(rows);
        self.counted.rows.inc_by(u64::from(rows));
        self.read_of_current += u64::from(rows);
        self.show();
    }

    pub(super) const fn read(&self) -> u64 {
        self.read
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    #[expect(clippy::cast_precision_loss, reason = "an estimate, told in per cent")]
    fn show(&mut self) {
        let left = (self.current - self.read_of_current as f64).max(0.0) + self.rest.max(0.0);
        // Of a partition that was never analyzed nothing is known once the server has lost its statistics.
        let all = (self.current > 0.0).then(|| self.read + whole(left));
        if let Some(bar) = &self.bar {
            bar.show(&format!("{} {}", self.step, self.partition), self.read, all);
            return;
        }
        if self.told.elapsed() < LOG_INTERVAL {
            return;
        }
        self.told = Instant::now();
        let seconds = self.begun.elapsed().as_secs_f64();
        let share = all.map(|all| (self.read as f64 / all.max(1) as f64).min(0.99));
        tracing::info!(
            table = self.table,
            partition = self.partition,
            rows = self.read,
            rows_per_second = (self.read as f64 / seconds).round(),
            percent = share.map(|share| (share * 100.0).round()),
            seconds_left = share.map(|share| (seconds / share.max(0.001) - seconds).round()),
            "{}",
            self.step
        );
    }
}
