//! What the values of a bin are like: their number, mean, spread and bounds, the same to the last bit in whatever order, in however many
//! parts and by whatever way they were added up.
//!
//! ```text
//! exact       sums without rounding, of values and of their squares
//!   Moments     these of some values; can be added to others, written and read
//!     aggregate   as functions of the query engine
//! ```

mod aggregate;
mod exact;
#[cfg(test)]
mod tests;

use num_bigint::{BigInt, BigUint};

pub(crate) use aggregate::{PARTS, moments, summary};
use exact::{ExactSum, UNIT, quotient, root};

/// What values are like. Can be added to that of other values.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    /// Values, NaN and infinities among them.
    count: u64,
    nulls: u64,
    nans: u64,
    positive_infinities: u64,
    negative_infinities: u64,
    /// Of those that are numbers, infinities among them.
    min: f64,
    max: f64,
    /// Of the finite ones.
    sum: ExactSum,
    squares: ExactSum,
}

impl Default for Moments {
    fn default() -> Self {
        Self {
            count: 0,
            nulls: 0,
            nans: 0,
            positive_infinities: 0,
            negative_infinities: 0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            sum: ExactSum::default(),
            squares: ExactSum::default(),
        }
    }
}

/// What comes of [`Moments`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// Values that are not null.
    pub(crate) count: u64,
    /// Rows whose value is null.
    pub(crate) nulls: u64,
    /// Values that are no numbers.
    pub(crate) nans: u64,
    /// The sum, rounded once. NaN if a value is, or if infinities cancel out.
    pub(crate) sum: f64,
    /// The mean, rounded once; NaN as the sum, and where there is no value.
    pub(crate) mean: f64,
    /// The sample standard deviation, rounded once; 0 of one value, else NaN where a value is not finite.
    pub(crate) stddev: f64,
    /// The smallest of the values that are numbers, and the largest; NaN if there is none.
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Moments {
    pub(crate) fn add(&mut self, value: Option<f64>) {
        let Some(value) = value else {
            self.nulls += 1;
            return;
        };
        self.count += 1;
        if value.is_nan() {
            self.nans += 1;
            return;
        }
        // Minus zero is less than zero, so that it does not matter which comes first.
        self.min = if value.total_cmp(&self.min).is_lt() { value } else { self.min };
        self.max = if value.total_cmp(&self.max).is_gt() { value } else { self.max };
        if value == f64::INFINITY {
            self.positive_infinities += 1;
        } else if value == f64::NEG_INFINITY {
            self.negative_infinities += 1;
        } else {
            self.sum.add(value);
            self.squares.add_square(value);
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.nulls += other.nulls;
        self.nans += other.nans;
        self.positive_infinities += other.positive_infinities;
        self.negative_infinities += other.negative_infinities;
        self.min = if other.min.total_cmp(&self.min).is_lt() { other.min } else { self.min };
        self.max = if other.max.total_cmp(&self.max).is_gt() { other.max } else { self.max };
        self.sum.merge(&other.sum);
        self.squares.merge(&other.squares);
    }

    pub(crate) fn summary(&mut self) -> Summary {
        let has_numbers = self.count > self.nans;
        let bound = |value: f64| if has_numbers { value } else { f64::NAN };
        let (min, max) = (bound(self.min), bound(self.max));
        let (sum, mean, stddev) = self.rounded();
        Summary { count: self.count, nulls: self.nulls, nans: self.nans, sum, mean, stddev, min, max }
    }

    /// Values that are not null.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    fn rounded(&mut self) -> (f64, f64, f64) {
        // One value has no spread, whatever it is.
        let spread = if self.count == 1 { 0.0 } else { f64::NAN };
        match (self.nans, self.positive_infinities, self.negative_infinities) {
            (0, 0, 0) => {}
            (0, _, 0) => return (f64::INFINITY, f64::INFINITY, spread),
            (0, 0, _) => return (f64::NEG_INFINITY, f64::NEG_INFINITY, spread),
            _ => return (f64::NAN, f64::NAN, spread),
        }
        if self.count == 0 {
            return (0.0, f64::NAN, f64::NAN);
        }
        let count = BigUint::from(self.count);
        let (sum, shift) = self.sum.number();
        let total = quotient(&sum, &BigUint::from(1_u32), UNIT + shift);
        let mean = quotient(&sum, &count, UNIT + shift);
        (total, mean, self.stddev(&count, &sum, shift))
    }

    /// The square root of `(n q - s^2) / (n (n - 1))`, of which nothing is rounded before the end.
    fn stddev(&mut self, count: &BigUint, sum: &BigInt, shift: i64) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let (squares, squares_shift) = self.squares.number();
        let (scaled, squared) = (BigInt::from(count.clone()) * squares, sum * sum);
        // Both in the smaller unit of the two.
        let unit = squares_shift.min(2 * shift);
        let up = |number: BigInt, from: i64| number << u64::try_from(from - unit).unwrap_or_default();
        let spread = up(scaled, squares_shift) - up(squared, 2 * shift);
        root(spread.magnitude(), &(count * (count - 1_u32)), 2 * UNIT + unit)
    }

    /// Writes it. Equal moments are equal bytes.
    pub(crate) fn write(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(96);
        for number in [self.count, self.nulls, self.nans, self.positive_infinities, self.negative_infinities]
        {
            bytes.extend(number.to_le_bytes());
        }
        for bound in [self.min, self.max] {
            bytes.extend(bound.to_le_bytes());
        }
        self.sum.write(&mut bytes);
        self.squares.write(&mut bytes);
        bytes
    }

    /// Reads what [`Moments::write`] wrote; `None` if it did not.
    pub(crate) fn read(mut bytes: &[u8]) -> Option<Self> {
        let mut word = || {
            let (word, rest) = bytes.split_first_chunk::<8>()?;
            bytes = rest;
            Some(*word)
        };
        let [count, nulls, nans, positive_infinities, negative_infinities] =
            [word()?, word()?, word()?, word()?, word()?].map(u64::from_le_bytes);
        let [min, max] = [word()?, word()?].map(f64::from_le_bytes);
        let sum = ExactSum::read(&mut bytes)?;
        let squares = ExactSum::read(&mut bytes)?;
        let moments =
            Self { count, nulls, nans, positive_infinities, negative_infinities, min, max, sum, squares };
        bytes.is_empty().then_some(moments)
    }

    /// What is kept of it outside of the value itself.
    fn size(&self) -> usize {
        self.sum.size() + self.squares.size()
    }
}
