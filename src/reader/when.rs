//! Times as people type them.

use std::str::FromStr;

use chrono::{DateTime, Duration, NaiveDate, NaiveTime, Utc};
use chrono_tz::Tz;

use super::bins::from_local;

/// A time: RFC 3339, or a day, which stands for its start.
pub(crate) fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    let day = text.parse::<NaiveDate>().ok().and_then(|day| day.and_hms_opt(0, 0, 0));
    day.map(|time| time.and_utc()).ok_or_else(|| {
        "not a time: write 2026-11-22T13:00:00Z, or 2026-11-22 for the start of that day".to_owned()
    })
}

/// A time of a query, as it was written: what it means depends on the zone and on the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// RFC 3339.
    At(DateTime<Utc>),
    /// The start of a day.
    Day(NaiveDate),
    /// So long ago; `now` is no time ago.
    Ago(Duration),
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || "not a time: write 2026-11-22T13:00:00Z, 2026-11-22, -30d or now".to_owned();
        if text == "now" {
            return Ok(Self::Ago(Duration::zero()));
        }
        if let Some(ago) = text.strip_prefix('-') {
            let ago = humantime::parse_duration(ago).ok().and_then(|ago| Duration::from_std(ago).ok());
            return ago.map(Self::Ago).ok_or_else(refused);
        }
        if let Ok(day) = text.parse() {
            return Ok(Self::Day(day));
        }
        DateTime::parse_from_rfc3339(text).map(|time| Self::At(time.to_utc())).map_err(|_| refused())
    }
}

impl When {
    /// The time. A day begins at midnight in the zone.
    ///
    /// # Errors
    ///
    /// [`Error::Query`](crate::Error::Query) if it was before all calendars.
    pub(crate) fn time(self, zone: Tz, now: DateTime<Utc>) -> crate::Result<DateTime<Utc>> {
        let found = match self {
            Self::At(time) => Some(time),
            Self::Day(day) => DateTime::from_timestamp_micros(from_local(zone, day.and_time(NaiveTime::MIN))),
            Self::Ago(ago) => now.checked_sub_signed(ago),
        };
        found.ok_or_else(|| crate::Error::Query {
            detail: "a time of the query is before all calendars".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_may_be_relative_and_days_those_of_a_zone() {
        let now = "2026-11-22T13:00:00Z".parse().unwrap();
        let text = |typed: &str, zone: &str| {
            let time = typed.parse::<When>()?.time(zone.parse().unwrap(), now);
            time.map(|time| time.to_rfc3339()).map_err(|error| error.to_string())
        };
        for (typed, zone, time) in [
            ("-30d", "UTC", "2026-10-23T13:00:00+00:00"),
            ("-1h 30m", "Europe/Berlin", "2026-11-22T11:30:00+00:00"),
            ("now", "UTC", "2026-11-22T13:00:00+00:00"),
            ("2026-11-22", "UTC", "2026-11-22T00:00:00+00:00"),
            ("2026-11-22", "Europe/Berlin", "2026-11-21T23:00:00+00:00"),
            ("2026-07-22", "Europe/Berlin", "2026-07-21T22:00:00+00:00"),
            ("2026-11-22T13:00:00+01:00", "Asia/Kolkata", "2026-11-22T12:00:00+00:00"),
        ] {
            assert_eq!(text(typed, zone).as_deref(), Ok(time), "{typed} {zone}");
        }
        for wrong in ["", "-", "-x", "30d", "-999999999999y", "yesterday"] {
            assert!(text(wrong, "UTC").unwrap_err().contains("-30d"), "{wrong}");
        }
        assert!(text("-290000y", "UTC").unwrap_err().contains("calendars"));
    }

    #[test]
    fn times_are_rfc_3339_or_days() {
        let text = |typed: &str| moment(typed).map(|time| time.to_rfc3339());
        assert_eq!(text("2026-11-22").as_deref(), Ok("2026-11-22T00:00:00+00:00"));
        assert_eq!(text("2026-11-22T13:00:00+02:00").as_deref(), Ok("2026-11-22T11:00:00+00:00"));
        for wrong in ["", "yesterday", "2026-13-01", "2026-11-22 13:00"] {
            assert!(moment(wrong).unwrap_err().contains("2026-11-22T13:00:00Z"), "{wrong}");
        }
    }
}
