//! Months of one model, read back: our archive beside DuckDB on the same files, and beside Scouter's layout.
//!
//! ```text
//! highwater      `Archive::binned_psi`: a file a day, of all models, sorted by model, made by the crate's own encoder and commits
//! duckdb         the same files, those of the days asked for: it need not read the log
//! one pass       Scouter's layout, a file for each model and hour, by DataFusion at its best: hours outside the range
//!                left out, one pass over the rows, the schema known
//! scouter        the same files as Scouter's server reads them: the schema asked of every file, all hours, two passes
//! ```
//!
//! All answer the same question, and their answers are compared before anything is timed: the share of each PSI bin within its
//! feature and bin of time, and over the whole range, of one model, in the bins that `BinnedQuery::with_points` chooses for
//! 500 points. They take turns. *Cold* is everything from opening (a new archive, connection, session) to the answer, *warm* the
//! same query again. The page cache of the system holds the files in both: what differs is what a process knows of them.
//!
//! First on the local disk; then, without DuckDB, which can't be put behind such a store, with a wait before every request, as
//! object storage has it. There requests and bytes are counted.
//!
//! `BENCH_ROWS` (57,600,000: 100 models, 30 days, 20 features of 10 bins, every 15 minutes), `BENCH_ROUNDS` (5),
//! `BENCH_DELAY_MS` (30). The files stay in `target/history-<rows>` for the next run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench prints its table, and panics when something is not as it must be"
)]

mod answer;
mod contender;
mod duckdb;
mod layout;
mod rows;
mod scouter;
mod store;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use highwater::reader::BinnedQuery;

use answer::Answer;
use contender::{Contender, Cost, Highwater, Place};
use duckdb::DuckDb;
use layout::Layout;
use rows::Rows;
use scouter::{Reading, Scouter};

/// Hours that are asked for, up to the end of the rows.
const SPANS: [(&str, i64); 4] = [("1 h", 1), ("1 day", 24), ("7 days", 7 * 24), ("30 days", 30 * 24)];

/// Points of a plot, as a server asks for them.
const POINTS: u32 = 500;

type Contenders<'a> = Vec<Box<dyn Contender + 'a>>;

/// What was measured, by span and contender.
type Costs = BTreeMap<(usize, usize), Vec<Cost>>;

#[tokio::main]
async fn main() {
    let rows = Rows::of(number("BENCH_ROWS", 57_600_000));
    let rounds = number("BENCH_ROUNDS", 5);
    let delay = Duration::from_millis(number("BENCH_DELAY_MS", 30));
    let layout = Layout::of(&rows).await;
    println!(
        "{} PSI rows: {} models, {} days; {rounds} rounds; load average {}",
        rows.count(),
        rows.entities,
        rows::DAYS,
        load_average()
    );
    println!("{layout}");

    let disk = Place::disk();
    let mut contenders: Contenders<'_> = vec![
        Box::new(Highwater::new(&layout, &disk)),
        Box::new(DuckDb::start(&layout)),
        Box::new(Scouter::new(&layout, &disk, Reading::OnePass)),
        Box::new(Scouter::new(&layout, &disk, Reading::AsScouter)),
    ];
    compare(&rows, &mut contenders).await;
    let costs = measure(&rows, &mut contenders, rounds).await;
    report("Local disk", &contenders, &costs);

    let place = Place::behind(delay);
    let mut contenders: Contenders<'_> = vec![
        Box::new(Highwater::new(&layout, &place)),
        Box::new(Scouter::new(&layout, &place, Reading::OnePass)),
        Box::new(Scouter::new(&layout, &place, Reading::AsScouter)),
    ];
    let costs = measure(&rows, &mut contenders, rounds).await;
    report(&format!("{} ms a request", delay.as_millis()), &contenders, &costs);
    println!("\nload average {}", load_average());
}

/// The query of a round: another model each time, so that nobody answers from what the last one left behind.
fn query(rows: &Rows, hours: i64, round: usize) -> BinnedQuery {
    let time = |micros| DateTime::<Utc>::from_timestamp_micros(micros).expect("a time");
    let entity = rows.entity((round * 37 + 11) % rows.entities);
    let end = rows::START + rows::DAYS * rows::DAY;
    BinnedQuery::with_points(entity, time(end - hours * rows::HOUR), time(end), POINTS).expect("a query")
}

/// Panics unless all contenders have the same answers.
async fn compare(rows: &Rows, contenders: &mut Contenders<'_>) {
    for (span, hours) in SPANS {
        for round in 0..2 {
            let query = query(rows, hours, round);
            let mut first: Option<Answer> = None;
            for contender in contenders.iter_mut() {
                contender.open(&query).await;
                contender.run(&query).await;
                let found = contender.answer(&query).await;
                contender.close().await;
                match &first {
                    None => first = Some(found),
                    Some(first) => first.assert_is(&found, &format!("{} over {span}", contender.name())),
                }
            }
            let shares = first.map_or(0, |answer| answer.len());
            assert!(shares >= 400, "{shares} shares are no test");
            println!("equal over {span}: {shares} shares, bins of {} s", query.bins().micros() / 1_000_000);
        }
    }
}

async fn measure(rows: &Rows, contenders: &mut Contenders<'_>, rounds: u64) -> Costs {
    let mut costs = Costs::new();
    for round in 0..usize::try_from(rounds).expect("rounds") {
        for (span, (_, hours)) in SPANS.into_iter().enumerate() {
            let query = query(rows, hours, round);
            for (index, contender) in contenders.iter_mut().enumerate() {
                costs
                    .entry((span, index))
                    .or_default()
                    .push(contender::cost(contender.as_mut(), &query).await);
            }
        }
        eprintln!("round {} of {rounds}; load average {}", round + 1, load_average());
    }
    costs
}

/// Prints medians, and how many times as long as ours each took.
fn report(title: &str, contenders: &Contenders<'_>, costs: &Costs) {
    println!("\n{title}:\n");
    println!(
        "| range | reader | cold ms | warm ms | cold / ours | warm / ours | requests, cold | warm | KB read, cold |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (span, (name, _)) in SPANS.into_iter().enumerate() {
        let ours = &costs[&(span, 0)];
        for (index, contender) in contenders.iter().enumerate() {
            let costs = &costs[&(span, index)];
            let middle = |costs: &[Cost], of: fn(&Cost) -> f64| median(costs.iter().map(of));
            let (cold, warm) = (middle(costs, |cost| cost.cold), middle(costs, |cost| cost.warm));
            let counted = |of: fn(&Cost) -> Option<u64>| {
                let values: Option<Vec<u64>> = costs.iter().map(of).collect();
                values.map_or("".to_owned(), |values| {
                    format!("{:.0}", median(values.into_iter().map(|value| value as f64)))
                })
            };
            println!(
                "| {name} | {} | {:.1} | {:.1} | {:.2} | {:.2} | {} | {} | {} |",
                contender.name(),
                cold * 1e3,
                warm * 1e3,
                cold / middle(ours, |cost| cost.cold),
                warm / middle(ours, |cost| cost.warm),
                counted(|cost| cost.counted.map(|counted| counted.cold_requests)),
                counted(|cost| cost.counted.map(|counted| counted.warm_requests)),
                counted(|cost| cost.counted.map(|counted| counted.cold_bytes / 1000)),
            );
        }
    }
}

/// A number from the environment, with or without underscores.
fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map_or(default, |text| {
        text.replace('_', "").parse().unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

/// The middle value, or the mean of the two in the middle.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// How busy the machine was, to be printed beside the figures.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
