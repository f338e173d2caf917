//! What a process has used, from /proc.

use std::fs;
use std::time::Duration;

/// The unit of times in /proc, `sysconf(_SC_CLK_TCK)`: 100 on every Linux that there is a server for.
const TICK: Duration = Duration::from_millis(10);

/// CPU time and memory of a process up to now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) user: Duration,
    pub(crate) system: Duration,
    /// The most resident memory so far.
    pub(crate) peak_bytes: u64,
}

impl Usage {
    pub(crate) fn cpu(self) -> Duration {
        self.user + self.system
    }

    /// Of all threads of a process; `None` once it is gone.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name, in parentheses, and may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        // proc(5): utime and stime are fields 14 and 15; `fields` begins with field 3.
        let ticks = |field: usize| fields.get(field - 3)?.parse::<u32>().ok();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        // A process that has ended but was not waited for has times, but no memory any more.
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kilobytes: u64 = peak.trim().trim_end_matches("kB").trim().parse().ok()?;
        Some(Self { user: TICK * ticks(14)?, system: TICK * ticks(15)?, peak_bytes: kilobytes * 1024 })
    }
}

/// The newest usage of a process that may end at any time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watched {
    pub(crate) pid: Option<u32>,
    pub(crate) usage: Usage,
}

impl Watched {
    pub(crate) fn look(&mut self) {
        if let Some(usage) = self.pid.and_then(Usage::of) {
            self.usage = usage;
        }
    }
}
