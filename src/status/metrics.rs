//! What a look has found, as metrics: read when it is asked for, from memory.

use std::fmt;
use std::sync::Arc;

use chrono::DateTime;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::{Look, Observer};
use crate::source::slot::Slot;
use crate::vitals::Phase;
use crate::watermark::{State, Watermark};

#[derive(Debug)]
pub(super) struct Looks(pub(super) Arc<Observer>);

/// What `wal_status` may be (manual section 54.19).
const SLOT_STATES: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];

impl Collector for Looks {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut to = Encoder(encoder);
        let observer = &self.0;
        to.family(
            "build_info",
            "The version that runs",
            None,
            [([("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        )?;
        if !observer.archives() {
            return Ok(());
        }
        let config = &observer.config;
        to.gauge(
            "max_lag",
            "The setting: how far the archive may be behind",
            SECONDS,
            config.max_lag.as_secs_f64(),
        )?;
        let limit = whole(i64::try_from(config.memory_bytes).unwrap_or(i64::MAX));
        to.gauge("buffer_limit", "The setting: memory for rows that are not archived yet", BYTES, limit)?;
        let is_connected = observer.vitals.phase() == Phase::Streaming;
        to.gauge("connected", "1 while the stream is read", None, flag(is_connected))?;
        to.gauge(
            "ready",
            "1 while /readyz would say so, but for the storage",
            None,
            flag(observer.seems_ready()),
        )?;
        let help = "Age of the oldest committed row that is not archived; 0 if all are";
        if let Some(lag) = observer.vitals.lag.seconds() {
            to.gauge("archive_lag", help, SECONDS, lag)?;
        }
        if let Some((archived, received)) = observer.vitals.lag.bytes() {
            to.gauge("archive_lag", "The server's log that is not archived", BYTES, count(archived))?;
            to.gauge("received_lag", "The server's log that was not received", BYTES, count(received))?;
        }
        let look = observer.last_look();
        to.gauge(
            "database_up",
            "1 if the last look at the database was answered",
            None,
            flag(look.is_some()),
        )?;
        let Some(look) = look else { return Ok(()) };
        if let Some(slot) = &look.slot {
            encode_slot(&mut to, slot, &look)?;
        }
        let rows: Vec<&Watermark> = look.rows_of(&config.slot).collect();
        encode_tables(&mut to, &rows)?;
        encode_purge(&mut to, &rows, &look)
    }
}

fn encode_slot(to: &mut Encoder<'_>, slot: &Slot, look: &Look) -> Result<(), fmt::Error> {
    to.gauge("slot_active", "1 while somebody streams from the slot", None, flag(slot.active_pid.is_some()))?;
    let states = SLOT_STATES.map(|state| ([("state", state)], flag(slot.wal_status == state)));
    to.family("slot_state", "1 for the state of the slot (wal_status)", None, states)?;
    if let Some(retained) = slot.retained_wal_bytes {
        to.gauge("slot_retained", "The server's log that the slot keeps", BYTES, whole(retained))?;
    }
    if let Some((bytes, ratio)) = look.safe {
        let help = "What the server may still write before it gives the slot up";
        to.gauge("slot_safe", help, BYTES, whole(bytes))?;
        to.gauge("slot_safe_ratio", "The same as a share of max_slot_wal_keep_size", None, ratio)?;
    }
    if let Some(spilled) = look.spilled_bytes {
        let help = "What decoding has sent to the server's disk";
        to.counters("slot_spill", help, BYTES, [(NONE, spilled)])?;
    }
    Ok(())
}

fn encode_tables(to: &mut Encoder<'_>, rows: &[&Watermark]) -> Result<(), fmt::Error> {
    let states = rows.iter().flat_map(|row| {
        [State::Streaming, State::Snapshot, State::Gap]
            .map(|state| ([("table", row.kind.as_str()), ("state", state.name())], flag(row.state == state)))
    });
    to.family("table_state", "1 for the state of the table", None, states)?;
    let of = |value: fn(&Watermark) -> i64| rows.iter().map(move |row| (of_table(row), whole(value(row))));
    to.family("table_rows", "Rows in the archive", None, of(|row| row.row_count))?;
    to.family("table_files", "Files that hold them", None, of(|row| row.file_count))?;
    to.family("table_size", "Size of these files", BYTES, of(|row| row.byte_count))?;
    to.family("table_gaps", "Gaps that were found so far", None, of(|row| row.gap_count))?;
    let newest =
        rows.iter().filter_map(|row| Some((of_table(row), seconds(row.max_created_at?.timestamp_micros()))));
    to.family("table_newest_row_timestamp", "The newest time of a row in the archive", SECONDS, newest)?;
    let updated = rows.iter().map(|row| (of_table(row), seconds(row.updated_at.timestamp_micros())));
    to.family("table_watermark_timestamp", "When the watermark last moved", SECONDS, updated)
}

fn encode_purge(to: &mut Encoder<'_>, rows: &[&Watermark], look: &Look) -> Result<(), fmt::Error> {
    let summaries = || {
        rows.iter().filter_map(|row| {
            let (_, summary) = look.purges.iter().find(|(table, _)| *table == row.source_table)?;
            Some((of_table(row), summary))
        })
    };
    let deletable = summaries().map(|(of, summary)| (of, whole(summary.deletable_rows_estimate)));
    to.family(
        "purge_deletable_rows",
        "Rows past their retention that can be deleted, as the planner expects",
        None,
        deletable,
    )?;
    let blocked = summaries().map(|(of, summary)| (of, whole(summary.blocked_rows_estimate)));
    to.family(
        "purge_blocked_rows",
        "Rows past their retention that can't be deleted, as the planner expects",
        None,
        blocked,
    )?;
    let purged_at = summaries().filter_map(|(of, summary)| {
        let time = DateTime::parse_from_rfc3339(summary.purged_at.as_deref()?).ok()?;
        Some((of, seconds(time.timestamp_micros())))
    });
    to.family("last_purge_timestamp", "When a purge of the table last ran to its end", SECONDS, purged_at)?;
    let purged = rows.iter().filter_map(|row| {
        let (_, purged) = look.purged.iter().find(|(table, _)| *table == row.source_table)?;
        Some((of_table(row), *purged))
    });
    to.counters(
        "purged_rows",
        "Rows that the purge has deleted, by itself or with their partition",
        None,
        purged,
    )
}

const SECONDS: Option<&Unit> = Some(&Unit::Seconds);
const BYTES: Option<&Unit> = Some(&Unit::Bytes);
const NONE: [(&str, &str); 0] = [];

fn of_table(row: &Watermark) -> [(&str, &str); 1] {
    [("table", &row.kind)]
}

/// A registry that is being told metrics of the moment.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> Result<(), fmt::Error> {
        self.family(name, help, unit, [(NONE, value)])
    }

    /// A gauge for each label set; nothing if there is none.
    fn family<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> Result<(), fmt::Error> {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        values.try_for_each(|(labels, value)| ConstGauge::new(value).encode(metric.encode_family(&labels)?))
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl IntoIterator<Item = (L, i64)>,
    ) -> Result<(), fmt::Error> {
        let mut values = values.into_iter().peekable();
        if values.peek().is_none() {
            return Ok(());
        }
        let mut metric = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        values.try_for_each(|(labels, value)| {
            ConstCounter::new(u64::try_from(value).unwrap_or_default()).encode(metric.encode_family(&labels)?)
        })
    }
}

const fn flag(is_set: bool) -> f64 {
    if is_set { 1.0 } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are doubles")]
const fn whole(value: i64) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "gauges are doubles")]
const fn count(value: u64) -> f64 {
    value as f64
}

/// Seconds since the epoch.
fn seconds(micros: i64) -> f64 {
    whole(micros) / 1e6
}
