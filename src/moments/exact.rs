//! A sum of doubles that does not depend on their order: it is exact, and rounded once, at its end.
//!
//! The sum is a whole number in units that are finer than any double, in digits of 32 bits, of which only those are kept that are
//! used (a small superaccumulator: R. M. Neal, "Fast exact summation using small and large superaccumulators", arXiv:1505.05571).
//! Adding a value touches three digits; carries wait until there are many of them.

use num_bigint::{BigInt, BigUint, Sign};

/// Bits of a digit.
const DIGIT_BITS: u32 = 32;
const DIGIT: i64 = 1 << DIGIT_BITS;

/// Digits that a sum of squares has at most: the square of the largest double has a unit of `2^2046` times that of the smallest, 106
/// bits more, and 64 bits for their number.
const DIGITS_MAX: usize = 144;

/// Each addition adds less than a digit to what may be `2^63` at most.
const PENDING_MAX: u32 = 1 << 30;

/// The bits of a double's fraction, and the largest exponent of a finite one.
const FRACTION_BITS: u32 = 52;
const EXPONENT_MAX: i64 = 1023;
const EXPONENT_MIN: i64 = -1022;

/// The exponent of the smallest double: the unit of a sum. The unit of a sum of squares is its square.
pub(super) const UNIT: i64 = EXPONENT_MIN - FRACTION_BITS as i64;

/// A whole number of units, exactly.
#[derive(Clone, Debug, Default)]
pub(super) struct ExactSum {
    /// The place of the first digit that is kept.
    first: usize,
    /// Each may be more than a digit, or negative, while carries are pending.
    digits: Vec<i64>,
    pending: u32,
}

/// The whole number of units that a finite double is: `magnitude << shift`, and whether it is negative.
fn parts(value: f64) -> (u64, u32, bool) {
    let bits = value.to_bits();
    let (exponent, fraction) = ((bits >> FRACTION_BITS) & 0x7ff, bits & ((1 << FRACTION_BITS) - 1));
    let is_negative = value.is_sign_negative();
    match u32::try_from(exponent).unwrap_or_default() {
        0 => (fraction, 0, is_negative),
        exponent => (fraction | (1 << FRACTION_BITS), exponent - 1, is_negative),
    }
}

impl ExactSum {
    /// Adds a finite value.
    pub(super) fn add(&mut self, value: f64) {
        let (magnitude, shift, is_negative) = parts(value);
        if magnitude > 0 {
            self.add_shifted(magnitude, shift, is_negative);
        }
    }

    /// Adds the square of a finite value, in squared units.
    pub(super) fn add_square(&mut self, value: f64) {
        let (magnitude, shift, _) = parts(value);
        let square = u128::from(magnitude) * u128::from(magnitude);
        let low = u64::try_from(square & u128::from(u64::MAX)).unwrap_or_default();
        let high = u64::try_from(square >> 64).unwrap_or_default();
        if low > 0 {
            self.add_shifted(low, 2 * shift, false);
        }
        if high > 0 {
            self.add_shifted(high, 2 * shift + 64, false);
        }
    }

    fn add_shifted(&mut self, magnitude: u64, shift: u32, is_negative: bool) {
        let (place, shift) = ((shift / DIGIT_BITS) as usize, shift % DIGIT_BITS);
        let shifted = u128::from(magnitude) << shift;
        let digit = |number: u32| {
            let digit = i64::from(
                u32::try_from((shifted >> (number * DIGIT_BITS)) & 0xffff_ffff).unwrap_or_default(),
            );
            if is_negative { -digit } else { digit }
        };
        self.reserve(place, 3);
        for (kept, number) in self.digits.iter_mut().skip(place - self.first).zip(0..3) {
            *kept += digit(number);
        }
        self.pending += 1;
        if self.pending >= PENDING_MAX {
            self.carry();
        }
    }

    /// Makes sure that so many digits from a place on are kept.
    fn reserve(&mut self, place: usize, count: usize) {
        if self.digits.is_empty() {
            self.first = place;
        }
        if place < self.first {
            self.digits.splice(..0, std::iter::repeat_n(0, self.first - place));
            self.first = place;
        }
        let needed = place - self.first + count;
        if self.digits.len() < needed {
            self.digits.resize(needed, 0);
        }
    }

    /// Adds another sum.
    pub(super) fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        other.carry();
        if other.digits.is_empty() {
            return;
        }
        self.reserve(other.first, other.digits.len());
        for (kept, digit) in self.digits.iter_mut().skip(other.first - self.first).zip(&other.digits) {
            *kept += digit;
        }
        self.pending += 1;
        if self.pending >= PENDING_MAX {
            self.carry();
        }
    }

    /// Settles the carries. The digits are in `0..2^32` then, the last one in `-2^31..2^31`, and neither end has a digit too many: equal
    /// sums have equal digits.
    fn carry(&mut self) {
        let mut carry = 0;
        for digit in &mut self.digits {
            let sum = *digit + carry;
            *digit = sum.rem_euclid(DIGIT);
            carry = sum.div_euclid(DIGIT);
        }
        // Less than 2^31 in either direction: what was added is bounded.
        self.digits.push(carry);
        while let [.., before, last] = self.digits.as_mut_slice() {
            if !(-1..=0).contains(last) {
                break;
            }
            let joined = *last * DIGIT + *before;
            if !(-DIGIT / 2..DIGIT / 2).contains(&joined) {
                break;
            }
            *before = joined;
            self.digits.pop();
        }
        let zeros = self.digits.iter().take_while(|digit| **digit == 0).count();
        self.digits.drain(..zeros);
        self.first = if self.digits.is_empty() { 0 } else { self.first + zeros };
        self.pending = 0;
    }

    /// The number, in units times `2^` the second.
    pub(super) fn number(&mut self) -> (BigInt, i64) {
        self.carry();
        let mut bytes = Vec::with_capacity(self.digits.len() * 4);
        for digit in &self.digits {
            bytes.extend(digit_bytes(*digit));
        }
        (
            BigInt::from_signed_bytes_le(&bytes),
            i64::try_from(self.first).unwrap_or_default() * i64::from(DIGIT_BITS),
        )
    }

    /// Writes it: the place of the first digit, how many there are, and the digits. Equal sums are equal bytes.
    pub(super) fn write(&mut self, bytes: &mut Vec<u8>) {
        self.carry();
        let small = |number: usize| u8::try_from(number).unwrap_or(u8::MAX);
        bytes.extend([small(self.first), small(self.digits.len())]);
        for digit in &self.digits {
            bytes.extend(digit_bytes(*digit));
        }
    }

    /// Reads what [`ExactSum::write`] wrote; `None` if it did not.
    pub(super) fn read(bytes: &mut &[u8]) -> Option<Self> {
        let ([first, count], rest) = bytes.split_first_chunk()?;
        let (first, count) = (usize::from(*first), usize::from(*count));
        let (digits, rest) = rest.split_at_checked(count * 4)?;
        if first + count > DIGITS_MAX {
            return None;
        }
        *bytes = rest;
        let mut digits: Vec<i64> =
            digits.as_chunks::<4>().0.iter().map(|digit| i64::from(u32::from_le_bytes(*digit))).collect();
        if let Some(last) = digits.last_mut()
            && *last >= DIGIT / 2
        {
            *last -= DIGIT;
        }
        Some(Self { first, digits, pending: 1 })
    }

    /// What is kept of it outside of the value itself.
    pub(super) const fn size(&self) -> usize {
        self.digits.capacity() * size_of::<i64>()
    }
}

/// A digit as two's complement: the last one may be negative.
fn digit_bytes(digit: i64) -> [u8; 4] {
    let [a, b, c, d, ..] = digit.to_le_bytes();
    [a, b, c, d]
}

/// `numerator / denominator * 2^exponent`, rounded to the nearest double, to the even one of two.
pub(super) fn quotient(numerator: &BigInt, denominator: &BigUint, exponent: i64) -> f64 {
    let shift = wanted(QUOTIENT_BITS, numerator.magnitude(), denominator);
    let scaled = numerator.magnitude() << shift;
    let whole = &scaled / denominator;
    let is_inexact = &whole * denominator != scaled;
    let value = rounded(&whole, is_inexact, exponent - i64::try_from(shift).unwrap_or_default());
    if numerator.sign() == Sign::Minus { -value } else { value }
}

/// The square root of `numerator / denominator * 2^exponent`, of an even exponent, rounded in the same way.
pub(super) fn root(numerator: &BigUint, denominator: &BigUint, exponent: i64) -> f64 {
    let shift = wanted(2 * QUOTIENT_BITS, numerator, denominator).next_multiple_of(2);
    let scaled = numerator << shift;
    let whole = &scaled / denominator;
    let root = whole.sqrt();
    let is_inexact = &root * &root * denominator != scaled;
    rounded(&root, is_inexact, (exponent - i64::try_from(shift).unwrap_or_default()) / 2)
}

/// Bits of a quotient: those of a double, and some by which to round.
const QUOTIENT_BITS: u64 = 66;

/// By how much a numerator is to be shifted for a quotient of so many bits.
fn wanted(bits: u64, numerator: &BigUint, denominator: &BigUint) -> u64 {
    (bits + denominator.bits()).saturating_sub(numerator.bits())
}

/// The double that is nearest to `number * 2^exponent`, or to a little more than that.
fn rounded(number: &BigUint, is_inexact: bool, exponent: i64) -> f64 {
    let dropped = number.bits().saturating_sub(64);
    let top = (number >> dropped).iter_u64_digits().next().unwrap_or_default();
    if top == 0 {
        return 0.0;
    }
    let is_inexact = is_inexact || number.trailing_zeros().is_some_and(|zeros| zeros < dropped);
    let exponent = exponent + i64::try_from(dropped).unwrap_or(i64::MAX / 2);
    // The highest bit is the first of the number's.
    let unused = top.leading_zeros();
    let (top, exponent) = (top << unused, exponent - i64::from(unused));
    let highest = exponent + 63;
    if highest > EXPONENT_MAX {
        return f64::INFINITY;
    }
    // A double below the normal ones has fewer bits.
    let bits = i64::from(FRACTION_BITS) + 1 - (EXPONENT_MIN - highest).max(0);
    let Some(cut) = u32::try_from(64 - bits).ok().filter(|cut| *cut <= 64) else { return 0.0 };
    let (kept, rest) = (u128::from(top) >> cut, u128::from(top) & ((1 << cut) - 1));
    let half = 1_u128 << (cut - 1);
    let is_up = rest > half || (rest == half && (is_inexact || kept & 1 == 1));
    let kept = u64::try_from(kept).unwrap_or_default() + u64::from(is_up);
    scaled(kept, exponent + i64::from(cut))
}

/// `number * 2^exponent`, which is a double, or infinite.
fn scaled(number: u64, exponent: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "it has 53 bits at most, or is the next power of two")]
    let mut value = number as f64;
    let mut exponent = i32::try_from(exponent).unwrap_or(i32::MAX);
    // A power of two beyond the doubles takes several steps, of which only the last one leaves the normal ones.
    while exponent < -1000 {
        value *= 2_f64.powi(-1000);
        exponent += 1000;
    }
    while exponent > 1000 {
        value *= 2_f64.powi(1000);
        exponent -= 1000;
    }
    value * 2_f64.powi(exponent)
}
