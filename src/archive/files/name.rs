use std::sync::atomic::{AtomicU64, Ordering};

use chrono::{Months, NaiveDate};

use crate::Lsn;
use crate::tables::{MICROS_PER_DAY, Window};

/// Hands out object names that no other session hands out.
#[derive(Debug)]
pub struct Namer {
    writer: u32,
    sequence: AtomicU64,
}

impl Namer {
    /// A namer for one session.
    #[must_use]
    pub fn new() -> Self {
        Self { writer: rand::random(), sequence: AtomicU64::new(0) }
    }

    /// A name, relative to the table, for rows of a window that stem from commits before `lsn`.
    #[must_use]
    pub fn name(&self, window: Window, lsn: Lsn) -> String {
        self.name_in(&window.to_string(), lsn)
    }

    pub(in crate::archive) fn name_in(&self, window: &str, lsn: Lsn) -> String {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        // The leading zero is what `ObjectName::is_portable` goes by.
        format!("{window}-{:016X}-{:08x}-0{sequence:04x}.parquet", lsn.0, self.writer)
    }

    /// Whether this session gave the name.
    pub(in crate::archive) fn is_ours(&self, name: &ObjectName) -> bool {
        name.writer == self.writer
    }
}

impl Default for Namer {
    fn default() -> Self {
        Self::new()
    }
}

/// What a file holds the rows of; each is merged into the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Span {
    /// A window within a day.
    Window,
    /// A UTC day.
    Day,
    /// A calendar month, UTC.
    Month,
}

/// What the name of a file of ours says:
/// `2026/11/22/13-000000010A0B0C0D-5f3a9c01-00007.parquet`, that is window, LSN, writer, sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectName {
    /// The window as [`Window`] displays it, `2026/11/22/13`; or the month, `2026/11`.
    pub window: String,
    /// First microsecond of the window.
    pub window_start: i64,
    /// How long it is.
    pub span: Span,
    /// Position up to which the file's rows were read.
    pub lsn: Lsn,
    /// The session that wrote it.
    pub writer: u32,
    /// Whether it has only encodings that every engine reads. The first builds wrote others, and names whose sequence has
    /// four digits, or more and no leading zero.
    pub is_portable: bool,
}

impl ObjectName {
    /// Parses a path relative to the table; `None` for names that are not ours.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let mut parts = path.strip_suffix(".parquet")?.rsplitn(4, '-');
        let (sequence, writer, lsn, window) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if sequence.len() < 4
            || writer.len() != 8
            || lsn.len() != 16
            || ![sequence, writer, lsn].into_iter().all(hex)
        {
            return None;
        }
        let (window_start, span) = window_start(window)?;
        Some(Self {
            window: window.to_owned(),
            window_start,
            span,
            lsn: Lsn(u64::from_str_radix(lsn, 16).ok()?),
            writer: u32::from_str_radix(writer, 16).ok()?,
            is_portable: sequence.len() > 4 && sequence.starts_with('0'),
        })
    }
}

impl ObjectName {
    /// The day, or the month, that the file's window is in: its name, and the first microsecond after it. `None` for a month
    /// that is none.
    pub(in crate::archive) fn around(&self, span: Span) -> Option<(String, i64)> {
        let (date, _) =
            self.window.rsplit_once('/').filter(|_| self.span == Span::Window).unwrap_or((&self.window, ""));
        match span {
            Span::Month => {
                let month = if self.span == Span::Month { date } else { date.rsplit_once('/')?.0 };
                let (start, _) = window_start(month)?;
                let end =
                    chrono::DateTime::from_timestamp_micros(start)?.checked_add_months(Months::new(1))?;
                Some((month.to_owned(), end.timestamp_micros()))
            }
            Span::Day if self.span < Span::Month => {
                let (start, _) = window_start(date)?;
                Some((date.to_owned(), start.checked_add(MICROS_PER_DAY)?))
            }
            Span::Day | Span::Window => None,
        }
    }
}

/// Start of a window (microseconds since the epoch) from its displayed form, and how long it is.
fn window_start(window: &str) -> Option<(i64, Span)> {
    let number = |digits: &str, length: usize| {
        let plain = digits.len() == length && digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse::<u32>().ok()).flatten()
    };
    let mut parts = window.split('/');
    let year = i32::try_from(number(parts.next()?, 4)?).ok()?;
    let month = number(parts.next()?, 2)?;
    let (day, clock) = (parts.next(), parts.next());
    if parts.next().is_some() {
        return None;
    }
    let span = match (day, clock) {
        (None, _) => Span::Month,
        (_, None) => Span::Day,
        _ => Span::Window,
    };
    let day = day.map_or(Some(1), |digits| number(digits, 2))?;
    let (hour, minute) = match clock {
        None => (0, 0),
        Some(digits) if digits.len() == 2 => (number(digits, 2)?, 0),
        Some(digits) => (number(digits.get(..2)?, 2)?, number(digits.get(2..)?, 2)?),
    };
    let start = NaiveDate::from_ymd_opt(year, month, day)?.and_hms_opt(hour, minute, 0)?;
    Some((start.and_utc().timestamp_micros(), span))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::WindowWidth;
    use std::time::Duration;

    #[test]
    fn names_parse_back() {
        let namer = Namer::new();
        for minutes in [15, 60, 1440] {
            let width = WindowWidth::new(Duration::from_secs(minutes * 60)).unwrap();
            for micros in [-62_135_596_800_000_000, -1, 1_795_000_000_000_000] {
                let window = Window::of(micros, width);
                let name = namer.name(window, Lsn(0x1_0A0B_0C0D));
                let parsed = ObjectName::parse(&name).unwrap();
                assert_eq!(parsed.window, window.to_string());
                let span = if window.is_day() { Span::Day } else { Span::Window };
                assert_eq!((parsed.window_start, parsed.span), (window.start(), span));
                assert_eq!(parsed.lsn, Lsn(0x1_0A0B_0C0D));
                assert!(namer.is_ours(&parsed) && parsed.is_portable);
            }
        }
    }

    #[test]
    fn names_of_the_first_builds_are_told_apart() {
        for (sequence, is_portable) in [
            ("0007", false),
            ("ffff", false),
            ("10000", false),
            ("00007", true),
            ("0ffff", true),
            ("010000", true),
        ] {
            let name = format!("2026/11/22/13-000000010A0B0C0D-5f3a9c01-{sequence}.parquet");
            assert_eq!(ObjectName::parse(&name).unwrap().is_portable, is_portable, "{sequence}");
        }
        let namer = Namer { writer: 1, sequence: AtomicU64::new(0xffff) };
        for _ in 0..2 {
            assert!(ObjectName::parse(&namer.name_in("2026/11", Lsn(1))).unwrap().is_portable);
        }
    }

    #[test]
    fn a_window_is_in_a_day_and_a_day_in_a_month() {
        let parsed = |window: &str| ObjectName::parse(&Namer::new().name_in(window, Lsn(1))).unwrap();
        let micros = |time: &str| time.parse::<chrono::DateTime<chrono::Utc>>().unwrap().timestamp_micros();
        let day = Some(("2024/02/29".to_owned(), micros("2024-03-01T00:00:00Z")));
        let month = Some(("2024/02".to_owned(), micros("2024-03-01T00:00:00Z")));
        for window in ["2024/02/29/2315", "2024/02/29/23", "2024/02/29"] {
            assert_eq!(parsed(window).around(Span::Day), day, "{window}");
            assert_eq!(parsed(window).around(Span::Month), month, "{window}");
        }
        let whole = parsed("2024/02");
        assert_eq!((whole.span, whole.window_start), (Span::Month, micros("2024-02-01T00:00:00Z")));
        assert_eq!((whole.around(Span::Day), whole.around(Span::Month)), (None, month));
        let last = parsed("9999/12/31").around(Span::Month).unwrap();
        assert_eq!(last.0, "9999/12");
    }

    #[test]
    fn foreign_names_are_not_parsed() {
        for name in [
            "part-00000-6f0e7a2e-0f2c-4f2a-9a1e-2f2f2f2f2f2f-c000.zstd.parquet",
            "2026/11/22-0000000000000001-00000000-0000.json",
            "2026/13/22-0000000000000001-00000000-0000.parquet",
            "2026/11/22/24-0000000000000001-00000000-0000.parquet",
            "2026/11/22/1-0000000000000001-00000000-0000.parquet",
            "2026/11/22/ä3-0000000000000001-00000000-0000.parquet",
            "2026/11/22-+000000000000001-00000000-0000.parquet",
            "",
        ] {
            assert_eq!(ObjectName::parse(name), None, "{name}");
        }
    }
}
