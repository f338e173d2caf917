//! The binary form of `numeric` (`numeric_send` in the server's `numeric.c`): a count of digits, the weight of the first one, a
//! sign, how many decimals are shown, and the digits, to the base 10,000.

use super::unfit::Unfit;

const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xC000;
const INFINITY: u16 = 0xD000;
const NEGATIVE_INFINITY: u16 = 0xF000;

/// Decimal digits of one digit to the base 10,000.
const DIGITS: i32 = 4;

struct Numeric<'a> {
    /// The power of 10,000 that the first digit stands for.
    weight: i32,
    sign: u16,
    decimals: usize,
    digits: &'a [u8],
}

impl<'a> Numeric<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Unfit> {
        let (head, digits) = bytes.split_first_chunk::<8>().ok_or(Unfit::Malformed)?;
        let [a, b, c, d, e, f, g, h] = *head;
        let numeric = Self {
            weight: i32::from(i16::from_be_bytes([c, d])),
            sign: u16::from_be_bytes([e, f]),
            decimals: usize::from(u16::from_be_bytes([g, h])),
            digits,
        };
        let is_whole = digits.len() == 2 * usize::from(u16::from_be_bytes([a, b]));
        if is_whole && numeric.digits().all(|digit| digit < 10_000) {
            Ok(numeric)
        } else {
            Err(Unfit::Malformed)
        }
    }

    fn digits(&self) -> impl Iterator<Item = u16> {
        self.digits.chunks_exact(2).map(|pair| match pair {
            [high, low] => u16::from_be_bytes([*high, *low]),
            _ => 0,
        })
    }

    /// The digit that stands for that power of 10,000.
    fn digit(&self, power: i32) -> u16 {
        let place = usize::try_from(self.weight - power).ok();
        place.and_then(|place| self.digits().nth(place)).unwrap_or(0)
    }
}

/// The number without its point, at so many decimals, if it has no more, and no more digits in all than `precision`.
pub(super) fn unscaled(bytes: &[u8], precision: u8, scale: i8) -> Result<i128, Unfit> {
    let numeric = Numeric::parse(bytes)?;
    match numeric.sign {
        NAN => return Err(Unfit::NotANumber),
        INFINITY => return Err(Unfit::Infinity),
        NEGATIVE_INFINITY => return Err(Unfit::NegativeInfinity),
        _ => {}
    }
    let mut sum = 0_i128;
    for (digit, place) in numeric.digits().zip(0_i32..) {
        let exponent = DIGITS * (numeric.weight - place) + i32::from(scale);
        let power = 10_i128.checked_pow(exponent.unsigned_abs());
        let digit = i128::from(digit);
        let part = match power {
            Some(power) if exponent >= 0 => digit.checked_mul(power),
            Some(power) if digit % power == 0 => Some(digit / power),
            _ if digit == 0 => Some(0),
            _ => None,
        };
        sum = part.and_then(|part| sum.checked_add(part)).ok_or(Unfit::TooManyDigits)?;
    }
    let signed = if numeric.sign == NEGATIVE { -sum } else { sum };
    within(signed, precision)
}

/// As [`unscaled`], of the text that `numeric_out` writes.
pub(super) fn unscaled_text(text: &str, precision: u8, scale: i8) -> Result<i128, Unfit> {
    match text {
        "NaN" => return Err(Unfit::NotANumber),
        "Infinity" => return Err(Unfit::Infinity),
        "-Infinity" => return Err(Unfit::NegativeInfinity),
        _ => {}
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let scale = usize::try_from(scale).map_err(|_| Unfit::Malformed)?;
    let (kept, rest) = fraction.split_at_checked(scale.min(fraction.len())).ok_or(Unfit::Malformed)?;
    if rest.bytes().any(|digit| digit != b'0') {
        return Err(Unfit::TooManyDigits);
    }
    let digits = format!("{whole}{kept:0<scale$}");
    let unsigned = digits.strip_prefix('-').unwrap_or(&digits);
    if whole.is_empty() || !unsigned.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Unfit::Malformed);
    }
    within(digits.parse().map_err(|_| Unfit::TooManyDigits)?, precision)
}

fn within(number: i128, precision: u8) -> Result<i128, Unfit> {
    let limit = 10_u128.checked_pow(u32::from(precision)).ok_or(Unfit::TooManyDigits)?;
    if number.unsigned_abs() < limit { Ok(number) } else { Err(Unfit::TooManyDigits) }
}

/// The number as `numeric_out` writes it.
pub(super) fn text(bytes: &[u8]) -> Result<String, Unfit> {
    use std::fmt::Write as _;
    let numeric = Numeric::parse(bytes)?;
    let mut text = match numeric.sign {
        NAN => return Ok("NaN".to_owned()),
        INFINITY => return Ok("Infinity".to_owned()),
        NEGATIVE_INFINITY => return Ok("-Infinity".to_owned()),
        NEGATIVE => "-".to_owned(),
        _ => String::new(),
    };
    // Writing to a String can't fail.
    let _ = write!(text, "{}", numeric.digit(numeric.weight.max(0)));
    for power in (0..numeric.weight).rev() {
        let _ = write!(text, "{:04}", numeric.digit(power));
    }
    if numeric.decimals > 0 {
        text.push('.');
        let point = text.len();
        let mut power = -1;
        while text.len() < point + numeric.decimals {
            let _ = write!(text, "{:04}", numeric.digit(power));
            power -= 1;
        }
        text.truncate(point + numeric.decimals);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(weight: i16, sign: u16, decimals: u16, digits: &[u16]) -> Vec<u8> {
        let count = u16::try_from(digits.len()).unwrap();
        let head = [count, weight.cast_unsigned(), sign, decimals];
        head.iter().chain(digits).flat_map(|part| part.to_be_bytes()).collect()
    }

    #[test]
    fn numbers_are_what_the_server_writes() {
        for (bytes, shown, unscaled_at_4) in [
            (sent(0, 0, 0, &[]), "0", Ok(0)),
            (sent(0, 0, 2, &[]), "0.00", Ok(0)),
            (sent(0, 0, 2, &[12, 3400]), "12.34", Ok(123_400)),
            (sent(1, NEGATIVE, 1, &[1, 2, 5000]), "-10002.5", Ok(-100_025_000)),
            (sent(2, 0, 0, &[7]), "700000000", Ok(7_000_000_000_000)),
            (sent(-2, 0, 8, &[7]), "0.00000007", Err(Unfit::TooManyDigits)),
            (sent(-1, 0, 3, &[10]), "0.001", Ok(10)),
            (sent(0, NAN, 0, &[]), "NaN", Err(Unfit::NotANumber)),
            (sent(0, INFINITY, 0, &[]), "Infinity", Err(Unfit::Infinity)),
            (sent(0, NEGATIVE_INFINITY, 0, &[]), "-Infinity", Err(Unfit::NegativeInfinity)),
        ] {
            assert_eq!(text(&bytes).as_deref(), Ok(shown));
            assert_eq!(unscaled(&bytes, 20, 4), unscaled_at_4, "{shown}");
            assert_eq!(unscaled_text(shown, 20, 4), unscaled_at_4, "{shown}");
        }
        assert_eq!(unscaled(&sent(0, 0, 0, &[100]), 2, 0), Err(Unfit::TooManyDigits));
        assert_eq!(unscaled(&sent(i16::MAX, 0, 0, &[1]), 38, 0), Err(Unfit::TooManyDigits));
        assert_eq!(unscaled_text("99999999999999999999999999999999999999", 38, 0), Ok(10_i128.pow(38) - 1));
    }

    #[test]
    fn what_is_no_number_is_malformed() {
        for bytes in [&[][..], &[0; 7], &sent(0, 0, 0, &[10_000]), &sent(0, 0, 0, &[1])[..9]] {
            assert_eq!((text(bytes), unscaled(bytes, 9, 0)), (Err(Unfit::Malformed), Err(Unfit::Malformed)));
        }
        for wrong in ["", "1e5", "+1", "1.é"] {
            assert!(unscaled_text(wrong, 9, 1).is_err(), "{wrong:?}");
        }
    }
}
