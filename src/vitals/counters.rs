use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::storage::OPERATIONS;

/// A table of the archive.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfTable {
    table: String,
}

impl OfTable {
    pub(crate) fn new(table: &str) -> Self {
        Self { table: table.to_owned() }
    }
}

/// How rows came into the archive.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the names of the labels")]
pub(crate) enum Origin {
    /// By the stream.
    stream,
    /// By the first copy of a table.
    copy,
    /// By the comparison after a gap.
    gap,
}

/// A table, and how its rows came.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfOrigin {
    pub(crate) table: String,
    pub(crate) origin: Origin,
}

/// A table, and why rows of it are in the quarantine: the sort of the reason, of which there are few.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfReason {
    pub(crate) table: String,
    pub(crate) reason: &'static str,
}

/// What a store was asked to do.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfOperation {
    pub(crate) operation: &'static str,
}

/// Partitions of a table that is being completed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfPartitions {
    pub(crate) table: String,
    pub(crate) state: &'static str,
}

/// How a verification of a table's partition ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct OfOutcome {
    pub(crate) table: String,
    pub(crate) outcome: &'static str,
}

/// Seconds since the epoch.
type Moment = Gauge<f64, AtomicU64>;

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// What an archiver counts. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    pub(crate) reconnects: Counter,
    pub(crate) received_bytes: Counter,
    pub(crate) received_transactions: Counter,
    pub(crate) received_rows: Family<OfTable, Counter>,
    pub(crate) archived_rows: Family<OfOrigin, Counter>,
    pub(crate) quarantined_rows: Family<OfReason, Counter>,
    pub(crate) buffered_bytes: Gauge,
    pub(crate) backpressure_seconds: Counter<f64>,
    pub(crate) commits: Family<OfTable, Counter>,
    pub(crate) commit_seconds: Histogram,
    pub(crate) checkpoint_age: Histogram,
    pub(crate) last_commit: Family<OfTable, Moment>,
    pub(crate) copied_rows: Family<OfTable, Counter>,
    pub(crate) copy_partitions: Family<OfPartitions, Gauge>,
    pub(crate) merges: Family<OfTable, Counter>,
    pub(crate) merge_failures: Family<OfTable, Counter>,
    pub(crate) vacuumed: Family<OfTable, Counter>,
    pub(crate) last_vacuum: Moment,
    pub(crate) verified: Family<OfOutcome, Counter>,
    pub(crate) last_verified: Family<OfTable, Moment>,
    pub(crate) storage_requests: Family<OfOperation, Counter>,
    pub(crate) storage_errors: Family<OfOperation, Counter>,
    pub(crate) storage_seconds: Histograms<OfOperation>,
    pub(crate) uploaded_bytes: Counter,
    /// Requests that have failed since the last one that did not.
    pub(crate) storage_failing: Gauge,
}

/// From a millisecond to a minute.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 4.0, 9))
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            reconnects: Counter::default(),
            received_bytes: Counter::default(),
            received_transactions: Counter::default(),
            received_rows: Family::default(),
            archived_rows: Family::default(),
            quarantined_rows: Family::default(),
            buffered_bytes: Gauge::default(),
            backpressure_seconds: Counter::default(),
            commits: Family::default(),
            commit_seconds: seconds(),
            // From a tenth of a second to hours.
            checkpoint_age: Histogram::new(exponential_buckets(0.1, 3.0, 12)),
            last_commit: Family::default(),
            copied_rows: Family::default(),
            copy_partitions: Family::default(),
            merges: Family::default(),
            merge_failures: Family::default(),
            vacuumed: Family::default(),
            last_vacuum: Moment::default(),
            verified: Family::default(),
            last_verified: Family::default(),
            storage_requests: Family::default(),
            storage_errors: Family::default(),
            storage_seconds: Family::new_with_constructor(seconds),
            uploaded_bytes: Counter::default(),
            storage_failing: Gauge::default(),
        }
    }
}

impl Counters {
    /// These tables will be counted: from now on they are told with zeros. A counter that first appears with its first event has never
    /// increased, for those who look at its increase.
    pub(crate) fn expect<'a>(&self, tables: impl Iterator<Item = &'a str>, reasons: &[&'static str]) {
        for table in tables {
            for reason in reasons.iter().copied() {
                self.quarantined_rows.get_or_create(&OfReason { table: table.to_owned(), reason }).inc_by(0);
            }
            for outcome in ["equal", "different", "failed"] {
                self.verified.get_or_create(&OfOutcome { table: table.to_owned(), outcome }).inc_by(0);
            }
            let of = OfTable::new(table);
            for counter in [&self.received_rows, &self.commits, &self.merges, &self.merge_failures] {
                counter.get_or_create(&of).inc_by(0);
            }
        }
    }

    /// Has the registry tell them.
    pub(super) fn register(&self, registry: &mut Registry) {
        self.register_stream(registry);
        self.register_upkeep(registry);
        self.register_storage(registry);
    }

    /// Those of a row's way.
    fn register_stream(&self, to: &mut Registry) {
        to.register(
            "reconnects",
            "Sessions that have failed, after each of which the next one began",
            self.reconnects.clone(),
        );
        to.register_with_unit(
            "received",
            "What the stream has brought",
            Unit::Bytes,
            self.received_bytes.clone(),
        );
        to.register(
            "received_transactions",
            "Transactions that the stream has brought",
            self.received_transactions.clone(),
        );
        to.register(
            "received_rows",
            "Rows that the stream has brought and that were not archived before",
            self.received_rows.clone(),
        );
        to.register("archived_rows", "Rows that were added to the archive", self.archived_rows.clone());
        to.register(
            "quarantined_rows",
            "Rows that went to the quarantine, by table and sort of reason",
            self.quarantined_rows.clone(),
        );
        to.register_with_unit(
            "buffered",
            "Memory of the rows that are not handed on for archiving yet",
            Unit::Bytes,
            self.buffered_bytes.clone(),
        );
        to.register_with_unit(
            "backpressure",
            "Time for which the stream was not read because the archive was behind",
            Unit::Seconds,
            self.backpressure_seconds.clone(),
        );
        to.register("commits", "Log entries with rows, by table", self.commits.clone());
        to.register_with_unit(
            "commit_duration",
            "How long the log entry of a table took",
            Unit::Seconds,
            self.commit_seconds.clone(),
        );
        to.register_with_unit(
            "checkpoint_age",
            "Age of a checkpoint's oldest row when it was archived",
            Unit::Seconds,
            self.checkpoint_age.clone(),
        );
        to.register_with_unit(
            "last_commit_timestamp",
            "When rows of the table were last added to its log",
            Unit::Seconds,
            self.last_commit.clone(),
        );
    }

    /// Those of copies, merges and verifications.
    fn register_upkeep(&self, to: &mut Registry) {
        to.register(
            "copied_rows",
            "Rows that a copy, or the comparison after a gap, has read from Postgres",
            self.copied_rows.clone(),
        );
        to.register(
            "copy_partitions",
            "Partitions of the table that is being completed, by state (done or left)",
            self.copy_partitions.clone(),
        );
        to.register("merges", "Merges of small files into larger ones", self.merges.clone());
        to.register(
            "merge_failures",
            "Merges that have failed; they are tried again",
            self.merge_failures.clone(),
        );
        to.register(
            "vacuumed_objects",
            "Objects that no log names any more and that were removed",
            self.vacuumed.clone(),
        );
        to.register_with_unit(
            "last_vacuum_timestamp",
            "When unused objects were last looked for; 0 if they were not yet",
            Unit::Seconds,
            self.last_vacuum.clone(),
        );
        to.register(
            "verified_partitions",
            "Partitions that were read back from the archive, by outcome (equal, different or failed)",
            self.verified.clone(),
        );
        to.register_with_unit(
            "last_verified_timestamp",
            "When a partition of the table was last found equal",
            Unit::Seconds,
            self.last_verified.clone(),
        );
    }

    /// Those of the object store.
    pub(crate) fn register_storage(&self, to: &mut Registry) {
        for operation in OPERATIONS {
            self.storage_errors.get_or_create(&OfOperation { operation }).inc_by(0);
        }
        to.register(
            "storage_requests",
            "Requests to the storage, by operation",
            self.storage_requests.clone(),
        );
        to.register(
            "storage_errors",
            "Requests to the storage that have failed",
            self.storage_errors.clone(),
        );
        to.register_with_unit(
            "storage_request_duration",
            "How long the storage took to answer",
            Unit::Seconds,
            self.storage_seconds.clone(),
        );
        to.register_with_unit(
            "uploaded",
            "What was uploaded to the storage",
            Unit::Bytes,
            self.uploaded_bytes.clone(),
        );
        to.register(
            "storage_failing",
            "Requests to the storage that have failed since the last one that did not",
            self.storage_failing.clone(),
        );
    }
}
