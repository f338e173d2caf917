use std::str::FromStr;

/// What of a bin's values is asked for. Nulls don't count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stat {
    /// The mean of numbers; of booleans the share of those that are true. Of the exact sum, rounded once.
    Mean,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// How many there are.
    Count,
    /// The sum of numbers; of booleans the number of those that are true.
    Sum,
    /// The value below which a part of the numbers is: exact, and between two values in proportion (`percentile_cont` of SQL). All values of a
    /// bin are held in memory for it.
    Quantile(Quantile),
}

/// A part of all values, in thousandths of a percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantile(u32);

const THOUSANDTHS: u32 = 1_000;

impl Quantile {
    /// From 0 to 1.
    pub(super) fn share(self) -> f64 {
        f64::from(self.0) / f64::from(100 * THOUSANDTHS)
    }
}

/// Those that have no number.
const PLAIN: [(&str, Stat); 5] = [
    ("mean", Stat::Mean),
    ("min", Stat::Min),
    ("max", Stat::Max),
    ("count", Stat::Count),
    ("sum", Stat::Sum),
];

impl Stat {
    /// Its name, and that of its column in an answer.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Quantile(Quantile(thousandths)) => {
                let percent = f64::from(thousandths) / f64::from(THOUSANDTHS);
                format!("p{percent}")
            }
            _ => PLAIN
                .iter()
                .find(|(_, stat)| *stat == self)
                .map(|(name, _)| (*name).to_owned())
                .unwrap_or_default(),
        }
    }
}

impl FromStr for Stat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((_, stat)) = PLAIN.iter().find(|(name, _)| *name == text) {
            return Ok(*stat);
        }
        let percent = text.strip_prefix('p').and_then(|percent| percent.parse::<f64>().ok());
        let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
        let thousandths = percent.map(|percent| (percent * f64::from(THOUSANDTHS)).round() as u32);
        thousandths.map(|thousandths| Self::Quantile(Quantile(thousandths))).ok_or_else(|| {
            format!("{text:?} is none of mean, min, max, count, sum, and no p50, p95 or p99.9")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["mean", "min", "max", "count", "sum", "p0", "p50", "p99.9", "p100"] {
            assert_eq!(name.parse::<Stat>().unwrap().name(), name);
        }
        for wrong in ["", "p", "p-1", "p101", "pNaN", "median", "50"] {
            assert!(wrong.parse::<Stat>().is_err(), "{wrong}");
        }
    }
}
