//! The rows, the same in every run.

use highwater::tables::Entity;

pub(crate) const MINUTE: i64 = 60_000_000;
pub(crate) const HOUR: i64 = 60 * MINUTE;
pub(crate) const DAY: i64 = 24 * HOUR;
pub(crate) const DAYS: i64 = 30;

/// 2026-10-01, microseconds since the epoch.
pub(crate) const START: i64 = 1_790_812_800_000_000;

const FEATURES: u64 = 20;
const BINS: u64 = 10;

/// Models, each with the counts of all bins of all features so many times a day.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) entities: usize,
    /// Counts of a day; a multiple of 24, so that no hour is empty.
    rounds: i64,
}

/// One row without its model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// Microseconds since the epoch.
    pub(crate) created_at: i64,
    pub(crate) feature: usize,
    pub(crate) bin_id: i32,
    pub(crate) bin_count: i32,
}

impl Rows {
    /// About so many: fewer counts a day first, down to one an hour, then fewer models.
    pub(crate) fn of(count: u64) -> Self {
        let day = FEATURES * BINS * DAYS.unsigned_abs();
        let rounds = (count / (100 * day)).clamp(24, 1440) / 24 * 24;
        let entities = (count / (day * rounds)).clamp(1, 100);
        let (rounds, entities) = (i64::try_from(rounds), usize::try_from(entities));
        Self { entities: entities.expect("models"), rounds: rounds.expect("rounds") }
    }

    pub(crate) fn count(&self) -> u64 {
        self.entities as u64 * (FEATURES * BINS) * (DAYS * self.rounds).unsigned_abs()
    }

    pub(crate) fn entity(&self, number: usize) -> Entity {
        let space = format!("space-{}", number % 5);
        Entity { space, name: format!("model-{number:03}"), version: "1.0.0".to_owned() }
    }

    pub(crate) fn features() -> impl Iterator<Item = String> {
        (0..FEATURES).map(|number| format!("feature_{number:02}"))
    }

    /// A model's rows of an hour, counted from the start, in order.
    pub(crate) fn of_hour(self, entity: usize, hour: i64) -> impl Iterator<Item = Row> {
        let rounds = self.rounds / 24;
        (0..rounds).flat_map(move |round| {
            // Models don't count at the same moment.
            let offset = i64::try_from(mixed(entity as u64) % MINUTE.unsigned_abs()).expect("small");
            let created_at = START + hour * HOUR + round * (HOUR / rounds) + offset;
            (0..FEATURES * BINS).map(move |cell| {
                let seed = mixed(created_at.unsigned_abs() ^ (cell << 52) ^ entity as u64);
                // A bell over the bins, with noise.
                let center = (cell % BINS).abs_diff(BINS / 2);
                let count = (1000 >> center.min(4)) + seed % 200;
                Row {
                    created_at,
                    feature: usize::try_from(cell / BINS).expect("a feature"),
                    bin_id: i32::try_from(cell % BINS).expect("a bin"),
                    bin_count: i32::try_from(count).expect("a count"),
                }
            })
        })
    }
}

/// SplitMix64.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
