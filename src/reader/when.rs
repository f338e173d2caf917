//! Times as people type them.

use chrono::{DateTime, NaiveDate, Utc};

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

/// A time of a query: as [`moment`] reads it, `now`, or `-30d`, which is so long ago.
pub(crate) fn time(text: &str) -> Result<DateTime<Utc>, String> {
    time_at(text, Utc::now())
}

fn time_at(text: &str, now: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    let refused = || "not a time: write 2026-11-22T13:00:00Z, 2026-11-22, -30d or now".to_owned();
    if text == "now" {
        return Ok(now);
    }
    match text.strip_prefix('-') {
        Some(ago) => {
            let ago =
                humantime::parse_duration(ago).ok().and_then(|ago| chrono::Duration::from_std(ago).ok());
            ago.and_then(|ago| now.checked_sub_signed(ago)).ok_or_else(refused)
        }
        None => moment(text).map_err(|_| refused()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_may_be_relative() {
        let now = "2026-11-22T13:00:00Z".parse().unwrap();
        let text = |typed: &str| time_at(typed, now).map(|time| time.to_rfc3339());
        assert_eq!(text("-30d").as_deref(), Ok("2026-10-23T13:00:00+00:00"));
        assert_eq!(text("-1h 30m").as_deref(), Ok("2026-11-22T11:30:00+00:00"));
        assert_eq!(text("now").as_deref(), Ok("2026-11-22T13:00:00+00:00"));
        assert_eq!(text("2026-11-22").as_deref(), Ok("2026-11-22T00:00:00+00:00"));
        for wrong in ["", "-", "-x", "30d", "-999999999y", "yesterday"] {
            assert!(text(wrong).unwrap_err().contains("-30d"), "{wrong}");
        }
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
