use super::*;

#[test]
fn bins_are_aligned_to_the_epoch_also_before_it() {
    let width = Bins::new(Duration::from_secs(7 * 60)).unwrap();
    for (time, start) in [(0, 0), (-1, -420_000_000), (419_999_999, 0), (420_000_000, 420_000_000)] {
        assert_eq!(width.start_of(time), start, "{time}");
    }
    for widest in ["8000y", "2900000d"] {
        let widest: Bins = widest.parse().unwrap();
        assert!(DateTime::from_timestamp_micros(widest.start_of(CALENDAR.start)).is_some());
        assert!(DateTime::from_timestamp_micros(widest.end_of(CALENDAR.end - 1)).is_some());
    }
}

#[test]
fn a_bin_has_a_positive_length() {
    for minutes in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
        assert!(Bins::from_minutes(minutes).is_err(), "{minutes}");
    }
    assert!(Bins::new(Duration::ZERO).is_err());
    assert!(Bins::new(Duration::MAX).is_err());
    assert_eq!(Bins::from_minutes(0.01).unwrap().micros(), 600_000);
    assert_eq!(Bins::from_minutes(86.4).unwrap().micros(), 5_184_000_000);
}

#[test]
fn the_chosen_width_is_round_and_never_gives_too_many_bins() {
    for (start, length, points, width) in [
        (0, 30 * MICROS_PER_DAY, 500, 2 * MICROS_PER_HOUR),
        (1, 30 * MICROS_PER_DAY, 360, 3 * MICROS_PER_HOUR),
        (0, MICROS_PER_HOUR, 60, MICROS_PER_MINUTE),
        (0, 365 * MICROS_PER_DAY, 100, 4 * MICROS_PER_DAY),
        (0, 1000, 1000, 1),
        (0, 3, 2, 2),
    ] {
        assert_eq!(Bins::at_most(points, start, start + length).unwrap().micros(), width, "{points}");
    }
    for points in [1, 2, 3, 7, 100, 1000] {
        for (start, end) in
            [(0, 86_400_000_001), (-5, 5), (-MICROS_PER_DAY * 9000, 1), (CALENDAR.start, CALENDAR.end)]
        {
            let Ok(width) = Bins::at_most(points, start, end) else {
                assert_eq!(points, 1, "{start} {end}");
                continue;
            };
            let bins = width.count((start, end));
            assert!(bins <= i64::from(points), "{bins} {points}");
            assert!(
                bins > i64::from(points) / 4 || width.micros() == 1 || bins == 0 || points < 4,
                "{bins} {points} {width:?}"
            );
        }
    }
    assert!(Bins::at_most(0, 0, 1).is_err());
}

fn time(text: &str) -> i64 {
    text.parse::<DateTime<chrono::Utc>>().unwrap().timestamp_micros()
}

fn text(micros: i64) -> String {
    DateTime::from_timestamp_micros(micros).unwrap().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

#[test]
fn days_weeks_months_and_years_are_those_of_the_calendar() {
    for (bins, zone, at, start, end) in [
        ("1d", "UTC", "2026-11-28T12:00:00Z", "2026-11-28T00:00:00Z", "2026-11-29T00:00:00Z"),
        // A Saturday.
        ("1w", "UTC", "2026-11-28T12:00:00Z", "2026-11-23T00:00:00Z", "2026-11-30T00:00:00Z"),
        ("7d", "UTC", "2026-11-29T23:59:59Z", "2026-11-23T00:00:00Z", "2026-11-30T00:00:00Z"),
        ("1mo", "UTC", "2024-02-29T12:00:00Z", "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"),
        ("3 months", "UTC", "2026-11-28T12:00:00Z", "2026-10-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("1y", "UTC", "1969-12-31T12:00:00Z", "1969-01-01T00:00:00Z", "1970-01-01T00:00:00Z"),
        // Clocks go forward, and back.
        ("1d", "Europe/Berlin", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
        ("1d", "Europe/Berlin", "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
        ("1mo", "Europe/Berlin", "2026-10-25T12:00:00Z", "2026-09-30T22:00:00Z", "2026-10-31T23:00:00Z"),
        ("12h", "Europe/Berlin", "2026-03-29T05:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T10:00:00Z"),
        ("1h", "Asia/Kolkata", "2026-11-28T12:00:00Z", "2026-11-28T11:30:00Z", "2026-11-28T12:30:00Z"),
        // The second 02:xx of the night is an hour of its own.
        ("1h", "Europe/Berlin", "2026-10-25T01:10:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"),
        // Midnight is skipped.
        ("1d", "America/Sao_Paulo", "2018-11-04T12:00:00Z", "2018-11-04T03:00:00Z", "2018-11-05T02:00:00Z"),
    ] {
        let of = bins.parse::<Bins>().unwrap().in_zone(zone).unwrap();
        let at_time = time(at);
        assert_eq!(
            (text(of.start_of(at_time)), text(of.end_of(at_time))),
            (start.into(), end.into()),
            "{bins} {zone} {at}"
        );
    }
    for (written, shown) in
        [("7d", "1w"), ("24h", "1d"), ("12 months", "1y"), ("90m", "1h 30m"), ("5mo", "5mo")]
    {
        assert_eq!(written.parse::<Bins>().unwrap().to_string(), shown);
    }
    for wrong in ["", "1", "0d", "-1d", "1mo 2d", "1y6mo", "x", "d", "99999999999999999999d", "999999y"] {
        assert!(wrong.parse::<Bins>().is_err(), "{wrong}");
    }
    assert!(Bins::from_str("1d").unwrap().in_zone("Europe/Nowhere").is_err());
}

#[test]
fn bins_touch_each_other_in_every_zone() {
    let zones = [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "America/Havana",
        "America/Sao_Paulo",
        "Asia/Kolkata",
        "Australia/Lord_Howe",
        "Africa/Cairo",
        "Pacific/Apia",
        "Antarctica/Troll",
        "Asia/Kathmandu",
    ];
    let mut state = 1_u64;
    for zone in zones {
        for step in ["7s", "15m", "1h", "2h", "5h", "6h", "12h", "36h", "1d", "3d", "1w", "1mo", "5mo", "1y"]
        {
            let bins = step.parse::<Bins>().unwrap().in_zone(zone).unwrap();
            for _ in 0..2_000 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // 1990 to 2037.
                let at = 631_152_000_000_000 + i64::try_from(state >> 14).unwrap() % 1_483_228_800_000_000;
                let (start, end) = bins.of(at);
                assert!(start <= at && at < end, "{step} {zone} {}", text(at));
                assert_eq!(
                    (bins.start_of(start), bins.end_of(start)),
                    (start, end),
                    "{step} {zone} {}",
                    text(at)
                );
                assert_eq!(bins.of(end).0, end, "{step} {zone} {}", text(at));
                assert_eq!(bins.start_of(end - 1), start, "{step} {zone} {}", text(at));
            }
        }
    }
}

#[test]
fn so_long_ago_is_of_the_calendar() {
    for (bins, zone, ago, start, before) in [
        // A week before the day on which clocks went forward, and the one after it.
        ("1d", "Europe/Berlin", "7d", "2026-03-29T22:00:00Z", "2026-03-22T23:00:00Z"),
        ("1d", "Europe/Berlin", "7d", "2026-03-28T23:00:00Z", "2026-03-21T23:00:00Z"),
        ("1d", "UTC", "1y", "2026-03-27T00:00:00Z", "2025-03-27T00:00:00Z"),
        ("1d", "UTC", "365d", "2024-12-31T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("1mo", "UTC", "1y", "2024-02-01T00:00:00Z", "2023-02-01T00:00:00Z"),
        ("1d", "UTC", "1mo", "2026-03-31T00:00:00Z", "2026-02-28T00:00:00Z"),
        ("1d", "UTC", "12h", "2026-03-28T00:00:00Z", "2026-03-27T00:00:00Z"),
        ("1w", "UTC", "10d", "2026-03-23T00:00:00Z", "2026-03-09T00:00:00Z"),
        ("1h", "Europe/Berlin", "1d", "2026-03-30T01:00:00Z", "2026-03-29T01:00:00Z"),
    ] {
        let of = bins.parse::<Bins>().unwrap().in_zone(zone).unwrap();
        assert_eq!(text(of.start_before(time(start), ago.parse().unwrap())), before, "{start} {ago}");
    }
    assert_eq!(zone("europe/berlin"), zone("Europe/Berlin"));
    assert!(zone("utc").is_ok());
}
