//! [`Lsn`]: a position in the write-ahead log.

use std::fmt;
use std::str::FromStr;

/// A byte position in PostgreSQL's write-ahead log, printed as the server prints `pg_lsn`
/// (two hexadecimal halves, `16/B374D848`; manual section 8.20).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The position that no record has; the server's `InvalidXLogRecPtr`.
    pub const ZERO: Self = Self(0);

    /// Bytes of log from `earlier` to `self`, 0 if `self` is not past it.
    #[must_use]
    pub const fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text was not two hexadecimal numbers of at most 32 bits with a slash between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a log position: expected two hexadecimal numbers such as 16/B374D848")]
pub struct ParseLsnError;

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, ParseLsnError> {
        let (high, low) = text.split_once('/').ok_or(ParseLsnError)?;
        let half = |digits: &str| {
            let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(digits, 16).ok().filter(|_| plain).ok_or(ParseLsnError)
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_as_the_server_does() {
        for (text, value) in [("0/0", 0), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)] {
            assert_eq!(text.parse(), Ok(Lsn(value)));
            assert_eq!(Lsn(value).to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_not_a_position() {
        for text in ["", "/", "1", "1/", "/1", "+1/2", "1/-2", "1/2/3", "100000000/0", "g/0", " 1/2"] {
            assert_eq!(text.parse::<Lsn>(), Err(ParseLsnError), "{text:?}");
        }
    }
}
