//! A whole catch-up, beside readers of the same WAL that keep nothing: how far is the sidecar, with Parquet and commits,
//! from what the walsender can give?
//!
//! Every run drains a copy of one slot, so all see the same WAL; the contenders take turns, so a machine that is busier
//! for a while is so for all of them. Each is a process of its own, so its CPU time and memory are its own.
//!
//! ```text
//! highwater        the release binary, from its start until the slot's confirmed position passes the end
//! scraped          the same, whose metrics are scraped 200 times a second
//! described table  the same with the same rows of a table that the settings describe
//! pg_recvlogical   PostgreSQL's own client, binary pgoutput to /dev/null
//! our receiver     the sidecar's receiver alone: frames are cut and thrown away
//! plain recv       a blocking `recv` in a loop
//! ```
//!
//! `BENCH_ROWS` (2,000,000), `BENCH_ROUNDS` (3), `BENCH_MAX_LAG` (1s) and `BENCH_ONLY` (a part of the contenders' names,
//! as in `highwater, Unix`) change what is run. `BENCH_BASELINE`, the path of another build of the sidecar, lets it run in
//! turns with this one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench prints its table, and panics when something is not as it must be"
)]

mod contender;
mod drain;
mod report;
mod source;

#[path = "../measure/mod.rs"]
mod measure;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::path::PathBuf;

use contender::{Contender, Transport};
use measure::{load_average, number, text};
use report::{Outcome, Report};
use source::Source;

/// What the environment asks for.
#[derive(Debug)]
struct Wish {
    rows: u64,
    rounds: usize,
    max_lag: String,
    only: String,
    baseline: Option<PathBuf>,
}

impl Wish {
    fn from_env() -> Self {
        Self {
            rows: number("BENCH_ROWS", 2_000_000),
            rounds: usize::try_from(number("BENCH_ROUNDS", 3)).expect("few rounds"),
            max_lag: text("BENCH_MAX_LAG").unwrap_or_else(|| "1s".to_owned()),
            only: text("BENCH_ONLY").unwrap_or_default(),
            baseline: text("BENCH_BASELINE").map(PathBuf::from),
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // This program is its own child for the bare drains.
    if let [command, reading, uri, slot, end] = &arguments[..]
        && command == drain::COMMAND
    {
        return drain::run(reading, uri, slot, end.parse().expect("a position"));
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(compare(&Wish::from_env()));
}

async fn compare(wish: &Wish) {
    println!("catch-up of {} PSI rows, {} rounds; load average {}", wish.rows, wish.rounds, load_average());
    let source = Source::new(wish).await;
    let chosen: Vec<(Contender, Transport)> = Contender::ALL
        .into_iter()
        .flat_map(|contender| Transport::ALL.map(|transport| (contender, transport)))
        .filter(|(contender, _)| *contender != Contender::Baseline || wish.baseline.is_some())
        .filter(|(contender, transport)| format!("{contender}, {transport}").contains(&wish.only))
        .collect();
    // The first to read the WAL would read it from the disk.
    source.run(Contender::PlainRecv, Transport::Unix).await;
    let mut report = Report::default();
    for round in 1..=wish.rounds {
        for (contender, transport) in &chosen {
            let outcome = source.run(*contender, *transport).await;
            println!("round {round}: {contender}, {transport}: {outcome}");
            report.add(*contender, *transport, outcome);
        }
    }
    println!("\n{report}\nload average {}", load_average());
}
