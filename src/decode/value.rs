use chrono::{DateTime, NaiveDateTime};

use super::charset::Charset;
use super::numeric;
use super::source_type::SourceType;
use super::unfit::Unfit;
use crate::batch::{Batches, Cell};
use crate::pgoutput::{POSTGRES_EPOCH_MICROS, Value};
use crate::tables::{CALENDAR, ColumnSpec, ColumnType, MICROS_PER_DAY, is_in_calendar};

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Unfit> {
    bytes.try_into().map_err(|_| Unfit::Malformed)
}

/// Bytes of a text column; null is unfit. Not yet checked to be UTF-8.
#[inline]
pub(super) fn text(value: Value<'_>, source_type: SourceType) -> Result<&[u8], Unfit> {
    optional_text(value, source_type)?.ok_or(Unfit::Null)
}

/// Bytes of a text column that may be null.
#[inline]
pub(super) fn optional_text(value: Value<'_>, source_type: SourceType) -> Result<Option<&[u8]>, Unfit> {
    match (value, source_type) {
        (Value::Null, _) => Ok(None),
        (Value::Unchanged, _) => Err(Unfit::NotSent),
        (Value::Long(length), _) => Err(Unfit::Long(length)),
        (Value::Text(bytes) | Value::Binary(bytes), SourceType::Text) => Ok(Some(bytes)),
        _ => Err(Unfit::Type(source_type.oid())),
    }
}

/// A value as a column of the archive has it. What a described column takes is what its source type may become without a loss:
/// integers and floats of any width; and any other type as the text that Postgres prints.
#[inline]
pub(super) fn cell(
    value: Value<'_>,
    source_type: SourceType,
    column: &ColumnSpec,
    charset: &Charset,
    batches: &mut Batches,
) -> Result<Cell, Unfit> {
    if column.nullable && value == Value::Null {
        return Ok(Cell::Null);
    }
    match column.column_type {
        ColumnType::String => match (value, source_type) {
            (Value::Binary(_), SourceType::Uuid | SourceType::Numeric) if column.source_type.is_some() => {
                let text = display_binary(value, source_type).ok_or(Unfit::Malformed)?;
                batches.text(text.as_bytes()).map(Cell::Text).ok_or(Unfit::NotUtf8)
            }
            _ => {
                let bytes = printed(value, source_type, column.source_type.is_some())?;
                let id = charset.utf8(bytes).and_then(|text| batches.text(text));
                id.map(Cell::Text).ok_or(Unfit::NotUtf8)
            }
        },
        ColumnType::Double => {
            optional_double(value, source_type)?.map_or(Err(Unfit::Null), |number| Ok(Cell::Double(number)))
        }
        ColumnType::Int => int(value, source_type).map(Cell::Int),
        ColumnType::Long => integer(value, source_type).map(Cell::Long),
        ColumnType::Timestamp => timestamp(value, source_type).map(Cell::Long),
        ColumnType::Boolean => boolean(value, source_type).map(Cell::Boolean),
        ColumnType::Date => date(value, source_type).map(Cell::Int),
        ColumnType::Decimal { precision, scale } => {
            let number = match present(value, source_type, SourceType::Numeric)? {
                (bytes, true) => numeric::unscaled(bytes, precision, scale),
                (bytes, false) => numeric::unscaled_text(utf8(bytes)?, precision, scale),
            };
            number.map(|number| Cell::Decimal(number.to_ne_bytes()))
        }
        ColumnType::Binary => match present(value, source_type, SourceType::Bytea)? {
            (bytes, true) => Ok(Cell::Binary(batches.binary(bytes))),
            (bytes, false) => unhex(bytes).map(|bytes| Cell::Binary(batches.binary(&bytes))),
        },
    }
}

/// The bytes of a value that is there and of this type; whether they are its binary form, and not its text.
#[inline]
fn present(value: Value<'_>, source_type: SourceType, wanted: SourceType) -> Result<(&[u8], bool), Unfit> {
    match value {
        Value::Null => Err(Unfit::Null),
        Value::Unchanged => Err(Unfit::NotSent),
        Value::Long(length) => Err(Unfit::Long(length)),
        Value::Binary(_) | Value::Text(_) if source_type != wanted => Err(Unfit::Type(source_type.oid())),
        Value::Binary(bytes) => Ok((bytes, true)),
        Value::Text(bytes) => Ok((bytes, false)),
    }
}

/// The bytes of a text, or, if that will do, of what Postgres prints for a value of a type that has no column of its own.
#[inline]
fn printed(value: Value<'_>, source_type: SourceType, takes_all: bool) -> Result<&[u8], Unfit> {
    match (value, source_type) {
        (Value::Binary(bytes), SourceType::Json) if takes_all => Ok(bytes),
        // A version, then the text (`jsonb_send`).
        (Value::Binary(bytes), SourceType::Jsonb) if takes_all => {
            bytes.strip_prefix(&[1]).ok_or(Unfit::Malformed)
        }
        (
            Value::Text(bytes),
            SourceType::Json
            | SourceType::Jsonb
            | SourceType::Uuid
            | SourceType::Numeric
            | SourceType::Other(_),
        ) if takes_all => Ok(bytes),
        _ => text(value, source_type),
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, Unfit> {
    std::str::from_utf8(bytes).map_err(|_| Unfit::Malformed)
}

fn boolean(value: Value<'_>, source_type: SourceType) -> Result<bool, Unfit> {
    match present(value, source_type, SourceType::Bool)? {
        ([0], true) | (b"f", false) => Ok(false),
        ([1], true) | (b"t", false) => Ok(true),
        _ => Err(Unfit::Malformed),
    }
}

/// Days since the epoch.
fn date(value: Value<'_>, source_type: SourceType) -> Result<i32, Unfit> {
    let days = match present(value, source_type, SourceType::Date)? {
        (bytes, true) => match i32::from_be_bytes(array(bytes)?) {
            i32::MAX => return Err(Unfit::Infinity),
            i32::MIN => return Err(Unfit::NegativeInfinity),
            days => i64::from(days) + POSTGRES_EPOCH_MICROS / MICROS_PER_DAY,
        },
        (b"infinity", false) => return Err(Unfit::Infinity),
        (b"-infinity", false) => return Err(Unfit::NegativeInfinity),
        (bytes, false) => match utf8(bytes)? {
            text if text.ends_with(" BC") || text.find('-').is_some_and(|year| year > 4) => {
                return Err(Unfit::OutsideCalendar);
            }
            text => {
                let date = text.parse::<chrono::NaiveDate>().map_err(|_| Unfit::Malformed)?;
                date.signed_duration_since(chrono::NaiveDate::default()).num_days()
            }
        },
    };
    let is_fit = CALENDAR.contains(&days.saturating_mul(MICROS_PER_DAY));
    i32::try_from(days).ok().filter(|_| is_fit).ok_or(Unfit::OutsideCalendar)
}

/// The bytes that `bytea_output = hex` writes as `\x00ff`.
fn unhex(text: &[u8]) -> Result<Vec<u8>, Unfit> {
    let digits = text.strip_prefix(b"\\x").filter(|digits| digits.len() % 2 == 0).ok_or(Unfit::Malformed)?;
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = digits.chunks_exact(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    bytes.collect::<Option<_>>().ok_or(Unfit::Malformed)
}

/// Microseconds since the epoch. A `timestamp` is taken to be UTC, as the drift tables write it.
#[inline]
pub(super) fn timestamp(value: Value<'_>, source_type: SourceType) -> Result<i64, Unfit> {
    if !matches!(source_type, SourceType::TimestampTz | SourceType::Timestamp) {
        return Err(Unfit::Type(source_type.oid()));
    }
    let micros = match value {
        // The extremes of the 64 bits stand for the infinities (manual section 8.5.1.4).
        Value::Binary(bytes) => match i64::from_be_bytes(array(bytes)?) {
            i64::MAX => return Err(Unfit::Infinity),
            i64::MIN => return Err(Unfit::NegativeInfinity),
            micros => micros.checked_add(POSTGRES_EPOCH_MICROS).ok_or(Unfit::OutsideCalendar)?,
        },
        Value::Text(bytes) => timestamp_text(std::str::from_utf8(bytes).map_err(|_| Unfit::Malformed)?)?,
        Value::Null => return Err(Unfit::Null),
        Value::Unchanged => return Err(Unfit::NotSent),
        Value::Long(length) => return Err(Unfit::Long(length)),
    };
    if is_in_calendar(micros) { Ok(micros) } else { Err(Unfit::OutsideCalendar) }
}

/// The ISO form that `DateStyle` ISO prints: `2026-11-22 13:00:00.5+00`, with ` BC` for years before 1.
fn timestamp_text(text: &str) -> Result<i64, Unfit> {
    match text {
        "infinity" => return Err(Unfit::Infinity),
        "-infinity" => return Err(Unfit::NegativeInfinity),
        _ => {}
    }
    let year_digits = text.bytes().take_while(u8::is_ascii_digit).count();
    if year_digits > 4 || text.ends_with(" BC") {
        return Err(Unfit::OutsideCalendar);
    }
    let zoned = DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%#z").map(|time| time.timestamp_micros());
    zoned
        .or_else(|_| {
            let naive = NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f");
            naive.map(|time| time.and_utc().timestamp_micros())
        })
        .map_err(|_| Unfit::Malformed)
}

/// A whole number of any width.
#[inline]
pub(super) fn integer(value: Value<'_>, source_type: SourceType) -> Result<i64, Unfit> {
    if !matches!(source_type, SourceType::Int2 | SourceType::Int4 | SourceType::Int8) {
        return Err(Unfit::Type(source_type.oid()));
    }
    match value {
        Value::Binary(bytes) => match source_type {
            SourceType::Int2 => array(bytes).map(i16::from_be_bytes).map(i64::from),
            SourceType::Int4 => array(bytes).map(i32::from_be_bytes).map(i64::from),
            _ => array(bytes).map(i64::from_be_bytes),
        },
        Value::Text(bytes) => parse(bytes),
        Value::Null => Err(Unfit::Null),
        Value::Unchanged => Err(Unfit::NotSent),
        Value::Long(length) => Err(Unfit::Long(length)),
    }
}

/// A whole number that the archive's 32-bit columns hold.
#[inline]
pub(super) fn int(value: Value<'_>, source_type: SourceType) -> Result<i32, Unfit> {
    i32::try_from(integer(value, source_type)?).map_err(|_| Unfit::TooWide)
}

/// A double; NaN, the infinities and -0 are values like any other.
#[inline]
pub(super) fn optional_double(value: Value<'_>, source_type: SourceType) -> Result<Option<f64>, Unfit> {
    match (value, source_type) {
        (Value::Null, _) => Ok(None),
        (Value::Unchanged, _) => Err(Unfit::NotSent),
        (Value::Long(length), _) => Err(Unfit::Long(length)),
        (Value::Binary(bytes), SourceType::Float8) => array(bytes).map(f64::from_be_bytes).map(Some),
        (Value::Binary(bytes), SourceType::Float4) => {
            array(bytes).map(f32::from_be_bytes).map(f64::from).map(Some)
        }
        (Value::Text(bytes), SourceType::Float8) => parse(bytes).map(Some),
        // Through 32 bits, so that text and binary give the same double.
        (Value::Text(bytes), SourceType::Float4) => parse::<f32>(bytes).map(f64::from).map(Some),
        _ => Err(Unfit::Type(source_type.oid())),
    }
}

fn parse<T: std::str::FromStr>(bytes: &[u8]) -> Result<T, Unfit> {
    std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()).ok_or(Unfit::Malformed)
}

/// A value as text for the quarantine: what `psql` would show, with bytes that are no text as `\xe9`; of a type whose binary
/// form is not known, its bytes as `\x` and hexadecimal digits (the stream is asked for texts then, so that this is rare).
pub(super) fn display(value: Value<'_>, source_type: SourceType, charset: &Charset) -> Option<String> {
    let bytes = match value {
        Value::Text(bytes) | Value::Binary(bytes) => bytes,
        Value::Long(length) => return Some(format!("... (cut; {length} bytes in all)")),
        Value::Null | Value::Unchanged => return None,
    };
    let is_text = matches!(value, Value::Text(_)) || source_type == SourceType::Text;
    let shown = match charset.text(bytes) {
        text if is_text => text.map(str::to_owned),
        _ => display_binary(value, source_type),
    };
    // As many bytes of what can't be shown as it is as there will be digits at most.
    let part = bytes.get(..SHOWN_BYTES_MAX / 4).unwrap_or(bytes);
    let is_cut = shown.is_none() && part.len() < bytes.len();
    let shown = shown.unwrap_or_else(|| if is_text { charset.escaped(part) } else { hex(part) });
    if shown.len() < SHOWN_BYTES_MAX && !is_cut {
        return Some(shown);
    }
    Some(format!("{}... (cut; {} bytes in all)", prefix(&shown, SHOWN_BYTES_MAX), bytes.len()))
}

/// The most bytes that the quarantine keeps of one value. A value may have 1 GiB, and its JSON form six times
/// that, which no column holds.
const SHOWN_BYTES_MAX: usize = 16 << 20;

/// The longest prefix of whole characters within a number of bytes.
fn prefix(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or(0)).unwrap_or_default()
}

/// A value in its binary form as `psql` shows it.
fn display_binary(value: Value<'_>, source_type: SourceType) -> Option<String> {
    let Value::Binary(bytes) = value else { return None };
    match source_type {
        SourceType::Int2 | SourceType::Int4 | SourceType::Int8 => {
            integer(value, source_type).ok().map(|number| number.to_string())
        }
        SourceType::Float4 => array(bytes).map(f32::from_be_bytes).ok().map(|number| {
            display_number(&number.to_string(), &format!("{number:e}"), FLOAT4_PLAIN_EXPONENTS)
        }),
        SourceType::Float8 => array(bytes).map(f64::from_be_bytes).ok().map(|number| {
            display_number(&number.to_string(), &format!("{number:e}"), FLOAT8_PLAIN_EXPONENTS)
        }),
        SourceType::Bool => match bytes {
            [0] => Some("f".to_owned()),
            [1] => Some("t".to_owned()),
            _ => None,
        },
        SourceType::TimestampTz | SourceType::Timestamp => {
            let zone = if source_type == SourceType::TimestampTz { "+00" } else { "" };
            Some(display_timestamp(i64::from_be_bytes(array(bytes).ok()?), zone))
        }
        SourceType::Date => Some(display_date(i32::from_be_bytes(array(bytes).ok()?))),
        SourceType::Numeric => numeric::text(bytes).ok(),
        SourceType::Json => std::str::from_utf8(bytes).ok().map(str::to_owned),
        SourceType::Jsonb => std::str::from_utf8(bytes.strip_prefix(&[1])?).ok().map(str::to_owned),
        SourceType::Uuid => {
            let digits = hex(&array::<16>(bytes).ok()?);
            let groups = [2..10, 10..14, 14..18, 18..22, 22..34].map(|group| digits.get(group));
            groups.into_iter().collect::<Option<Vec<_>>>().map(|groups| groups.join("-"))
        }
        // Shown as bytes are.
        SourceType::Bytea | SourceType::Text | SourceType::Other(_) => None,
    }
}

/// Decimal exponents of the numbers that `float4out` and `float8out` write without one.
const FLOAT4_PLAIN_EXPONENTS: std::ops::Range<i32> = -4..6;
const FLOAT8_PLAIN_EXPONENTS: std::ops::Range<i32> = -4..15;

/// Digits that give the number back, in the form in which `psql` shows them. `scientific` is `1.5e-7` for 0.00000015.
fn display_number(plain: &str, scientific: &str, plain_exponents: std::ops::Range<i32>) -> String {
    match (plain, scientific.split_once('e')) {
        ("inf", _) => "Infinity".to_owned(),
        ("-inf", _) => "-Infinity".to_owned(),
        (_, Some((digits, exponent))) => match exponent.parse::<i32>() {
            Ok(exponent) if !plain_exponents.contains(&exponent) => {
                let sign = if exponent < 0 { '-' } else { '+' };
                format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
            }
            _ => plain.to_owned(),
        },
        _ => plain.to_owned(),
    }
}

/// The form that `DateStyle` ISO prints, in UTC, over PostgreSQL's whole calendar, which is wider than others'.
fn display_timestamp(postgres_micros: i64, zone: &str) -> String {
    match postgres_micros {
        i64::MAX => return "infinity".to_owned(),
        i64::MIN => return "-infinity".to_owned(),
        _ => {}
    }
    let micros = i128::from(postgres_micros) + i128::from(POSTGRES_EPOCH_MICROS);
    let (days, micros) = (micros.div_euclid(86_400_000_000), micros.rem_euclid(86_400_000_000));
    let (year, month, day) = civil(days);
    let (shown_year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let fraction = match fraction {
        0 => String::new(),
        fraction => format!(".{fraction:06}").trim_end_matches('0').to_owned(),
    };
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{shown_year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}{fraction}{zone}{era}")
}

/// As [`display_timestamp`], of a day.
fn display_date(postgres_days: i32) -> String {
    match postgres_days {
        i32::MAX => return "infinity".to_owned(),
        i32::MIN => return "-infinity".to_owned(),
        _ => {}
    }
    let (year, month, day) =
        civil(i128::from(postgres_days) + i128::from(POSTGRES_EPOCH_MICROS / MICROS_PER_DAY));
    let (shown_year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    format!("{shown_year:04}-{month:02}-{day:02}{era}")
}

/// Year, month and day of a day since the epoch, in the proleptic Gregorian calendar with a year 0. Counts from a first
/// of March, so that the day that may be missing comes last.
fn civil(days_since_epoch: i128) -> (i128, i128, i128) {
    const DAYS_PER_ERA: i128 = 146_097;
    let days = days_since_epoch + 719_468;
    let (era, day_of_era) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / (DAYS_PER_ERA - 1)) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i128::from(month <= 2), month, day)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold("\\x".to_owned(), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_binary_times_agree() {
        let zero = Value::Binary(&[0; 8]);
        assert_eq!(timestamp(zero, SourceType::TimestampTz), Ok(POSTGRES_EPOCH_MICROS));
        for text in ["2000-01-01 00:00:00+00", "2000-01-01 00:00:00", "2000-01-01 05:30:00+05:30"] {
            let value = Value::Text(text.as_bytes());
            assert_eq!(timestamp(value, SourceType::TimestampTz), Ok(POSTGRES_EPOCH_MICROS), "{text}");
        }
        let fraction = Value::Text(b"1969-12-31 23:59:59.999999+00");
        assert_eq!(timestamp(fraction, SourceType::TimestampTz), Ok(-1));
    }

    #[test]
    fn times_past_the_calendar_are_unfit() {
        for (text, reason) in [
            ("infinity", Unfit::Infinity),
            ("-infinity", Unfit::NegativeInfinity),
            ("0044-03-15 00:00:00+00 BC", Unfit::OutsideCalendar),
            ("20000-01-01 00:00:00+00", Unfit::OutsideCalendar),
            ("yesterday", Unfit::Malformed),
        ] {
            assert_eq!(
                timestamp(Value::Text(text.as_bytes()), SourceType::TimestampTz),
                Err(reason),
                "{text}"
            );
        }
        let binary = |micros: i64| timestamp(Value::Binary(&micros.to_be_bytes()), SourceType::TimestampTz);
        assert_eq!(binary(i64::MAX), Err(Unfit::Infinity));
        assert_eq!(binary(i64::MIN), Err(Unfit::NegativeInfinity));
        assert_eq!(binary(i64::MAX - 1), Err(Unfit::OutsideCalendar));
        assert_eq!(binary(i64::MIN + 1), Err(Unfit::OutsideCalendar));
    }

    #[test]
    fn numbers_are_checked() {
        assert_eq!(int(Value::Binary(&[0xff; 2]), SourceType::Int2), Ok(-1));
        assert_eq!(int(Value::Text(b"2147483648"), SourceType::Int8), Err(Unfit::TooWide));
        assert_eq!(int(Value::Binary(&[0; 3]), SourceType::Int4), Err(Unfit::Malformed));
        assert_eq!(int(Value::Text(b"1"), SourceType::Float8), Err(Unfit::Type(701)));
        assert_eq!(
            optional_double(Value::Text(b"-0"), SourceType::Float8).map(|v| v.map(f64::to_bits)),
            Ok(Some(1 << 63))
        );
        assert_eq!(
            optional_double(Value::Text(b"-Infinity"), SourceType::Float4),
            Ok(Some(f64::NEG_INFINITY))
        );
    }

    #[test]
    fn a_huge_value_is_cut_and_says_so() {
        let huge = "é".repeat(SHOWN_BYTES_MAX);
        let utf8 = &Charset::Utf8;
        let shown = display(Value::Text(huge.as_bytes()), SourceType::Text, utf8).unwrap();
        assert!(shown.len() < SHOWN_BYTES_MAX + 64 && shown.ends_with("... (cut; 33554432 bytes in all)"));
        let bytes = vec![255; SHOWN_BYTES_MAX];
        let escaped = display(Value::Binary(&bytes), SourceType::Text, utf8).unwrap();
        assert!(escaped.starts_with("\\xff\\xff") && escaped.ends_with("(cut; 16777216 bytes in all)"));
        let hexed = display(Value::Binary(&bytes), SourceType::Other(1700), utf8).unwrap();
        assert!(hexed.starts_with("\\xffff") && hexed.ends_with("(cut; 16777216 bytes in all)"));
    }

    #[test]
    fn unknown_types_are_shown_as_bytes() {
        let shown = |value, source_type| display(value, source_type, &Charset::Utf8);
        assert_eq!(shown(Value::Binary(&[1, 255]), SourceType::Other(1700)).as_deref(), Some("\\x01ff"));
        assert_eq!(shown(Value::Text(b"1.5"), SourceType::Other(1700)).as_deref(), Some("1.5"));
        assert_eq!(shown(Value::Binary(b"caf\xe9"), SourceType::Text).as_deref(), Some("caf\\xe9"));
        assert_eq!(shown(Value::Binary(&[1]), SourceType::Bool).as_deref(), Some("t"));
        assert_eq!(shown(Value::Null, SourceType::Bool), None);
    }
}
