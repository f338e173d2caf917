//! What was measured, as a table of medians.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::contender::{Contender, Transport};
use super::measure::median;
use super::measure::process::Usage;

/// What one run took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) rows: u64,
    /// Until everything was acknowledged (highwater: archived, committed and acknowledged).
    pub(crate) wall: Duration,
    /// Until the walsender had sent everything.
    pub(crate) sent: Duration,
    pub(crate) client: Usage,
    pub(crate) sender: Usage,
}

impl Outcome {
    fn rows_per_second(&self) -> f64 {
        self.rows as f64 / self.wall.as_secs_f64()
    }

    /// CPU seconds per million rows, which are microseconds per row.
    fn per_row(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.rows as f64
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, wall, sent) = (self.rows_per_second(), self.wall.as_secs_f64(), self.sent.as_secs_f64());
        let cpu = |usage: Usage| (self.per_row(usage.user), self.per_row(usage.system));
        let ((user, system), (sender_user, sender_system)) = (cpu(self.client), cpu(self.sender));
        write!(
            f,
            "{rate:.0} rows/s, {wall:.2} s (sent after {sent:.2} s), CPU us/row {user:.2} + {system:.2}, \
             walsender {sender_user:.2} + {sender_system:.2}, {} MB",
            self.client.peak_bytes >> 20
        )
    }
}

/// All runs.
#[derive(Debug, Default)]
pub(crate) struct Report {
    outcomes: BTreeMap<(Contender, Transport), Vec<Outcome>>,
}

impl Report {
    pub(crate) fn add(&mut self, contender: Contender, transport: Transport, outcome: Outcome) {
        self.outcomes.entry((contender, transport)).or_default().push(outcome);
    }

    fn median_of(&self, key: (Contender, Transport), figure: impl Fn(&Outcome) -> f64) -> Option<f64> {
        self.outcomes.get(&key).map(|outcomes| median(outcomes.iter().map(figure)))
    }

    fn rate(&self, contender: Contender, transport: Transport) -> Option<f64> {
        self.median_of((contender, transport), Outcome::rows_per_second)
    }

    fn ratio(&self, f: &mut fmt::Formatter<'_>, transport: Transport) -> fmt::Result {
        let Some(own) = self.rate(Contender::Highwater, transport) else { return Ok(()) };
        let against = |name: &str, other: Option<f64>, f: &mut fmt::Formatter<'_>| match other {
            Some(other) => writeln!(f, "highwater, {transport}: {:.2} times {name}", own / other),
            None => Ok(()),
        };
        let drains = [Contender::Receiver, Contender::PlainRecv];
        let best = |rates: &mut dyn Iterator<Item = f64>| rates.reduce(f64::max);
        let same = best(&mut drains.iter().filter_map(|drain| self.rate(*drain, transport)));
        against(&format!("the best bare drain over {transport}"), same, f)?;
        against("the baseline", self.rate(Contender::Baseline, transport), f)?;
        against("pg_recvlogical", self.rate(Contender::PgRecvlogical, transport), f)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "medians; CPU in seconds per million rows, user + system")?;
        writeln!(
            f,
            "| contender | over | rows/s | s | slowest to fastest | CPU | walsender CPU | peak MB |"
        )?;
        writeln!(f, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for (key @ (contender, transport), outcomes) in &self.outcomes {
            let figure = |figure: &dyn Fn(&Outcome) -> f64| median(outcomes.iter().map(figure));
            let seconds = outcomes.iter().map(|outcome| outcome.wall.as_secs_f64());
            let slowest = seconds.clone().fold(0.0, f64::max);
            let fastest = seconds.fold(f64::INFINITY, f64::min);
            writeln!(
                f,
                "| {contender} | {transport} | {:.0} | {:.2} | {slowest:.2} to {fastest:.2} | {:.2} + {:.2} = {:.2} | {:.2} + {:.2} = {:.2} | {:.0} |",
                self.rate(key.0, key.1).unwrap_or_default(),
                figure(&|outcome| outcome.wall.as_secs_f64()),
                figure(&|outcome| outcome.per_row(outcome.client.user)),
                figure(&|outcome| outcome.per_row(outcome.client.system)),
                figure(&|outcome| outcome.per_row(outcome.client.cpu())),
                figure(&|outcome| outcome.per_row(outcome.sender.user)),
                figure(&|outcome| outcome.per_row(outcome.sender.system)),
                figure(&|outcome| outcome.per_row(outcome.sender.cpu())),
                figure(&|outcome| (outcome.client.peak_bytes >> 20) as f64),
            )?;
        }
        Transport::ALL.iter().try_for_each(|transport| self.ratio(f, *transport))
    }
}
