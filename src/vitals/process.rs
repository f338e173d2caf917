//! What the process takes, from `/proc` (proc(5)), under the names that every Prometheus client uses.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
#[cfg(target_os = "linux")]
use rustix::time::{ClockId, clock_gettime};

/// Tells what the process takes when it is asked. Where there is no `/proc` it tells nothing.
#[derive(Debug)]
pub(crate) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(found) = Found::read() else { return Ok(()) };
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        let bytes = Some(&Unit::Bytes);
        gauge("process_resident_memory", "Resident memory", bytes, found.resident)?;
        gauge("process_virtual_memory", "Virtual memory", bytes, found.virtual_memory)?;
        gauge("process_open_fds", "Open file descriptors", None, found.open_files)?;
        gauge("process_threads", "Threads", None, found.threads)?;
        let started = Some(&Unit::Seconds);
        gauge(
            "process_start_time",
            "Start of the process, in seconds since the epoch",
            started,
            found.started,
        )?;
        let cpu = ConstCounter::new(found.cpu);
        let help = "Processor time in user and system mode";
        cpu.encode(encoder.encode_descriptor("process_cpu", help, started, cpu.metric_type())?)
    }
}

#[cfg(target_os = "linux")]
fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    #[expect(clippy::cast_precision_loss, reason = "seconds of our time are exact")]
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    seconds
}

struct Found {
    resident: f64,
    virtual_memory: f64,
    open_files: f64,
    threads: f64,
    started: f64,
    cpu: f64,
}

impl Found {
    #[cfg(target_os = "linux")]
    fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name in brackets may have anything in it.
        let fields: Vec<f64> = stat
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .map(|field| field.parse().unwrap_or_default())
            .collect();
        // Numbered from 3 in the manual.
        let field = |number: usize| fields.get(number - 3).copied();
        // Not from /proc/stat, which a service may not see (`ProcSubset=pid` of systemd.exec(5)).
        let boot = seconds(ClockId::Realtime) - seconds(ClockId::Boottime);
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let (tick, page) =
            (rustix::param::clock_ticks_per_second() as f64, rustix::param::page_size() as f64);
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let open_files = fs::read_dir("/proc/self/fd").ok()?.count() as f64;
        Some(Self {
            resident: field(24)? * page,
            virtual_memory: field(23)?,
            open_files,
            threads: field(20)?,
            started: boot + field(22)? / tick,
            cpu: (field(14)? + field(15)?) / tick,
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn read() -> Option<Self> {
        None
    }
}
