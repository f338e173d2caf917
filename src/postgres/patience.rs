//! How often a server hears of us, and how long it may be silent: what its `wal_sender_timeout` says of both.

use std::time::Duration;

/// Longest time between two reports, so that the server's monitoring views are never old.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long the server may say nothing while we read before it is asked for an answer, and how long it then has
/// for it. TCP's own checks don't see a walsender that hangs, or a load balancer that has lost its server.
const SILENCE: Duration = Duration::from_secs(30);

/// How often to report to a server that gives up after `wal_sender_timeout` (zero: never): two reports may be
/// late.
pub(super) fn status_interval(wal_sender_timeout: Duration) -> Duration {
    match wal_sender_timeout / 3 {
        Duration::ZERO => STATUS_INTERVAL_MAX,
        third => third.min(STATUS_INTERVAL_MAX),
    }
}

/// How long a server may be silent. One that decodes a long transaction of which nothing is published reads our
/// messages only every half `wal_sender_timeout`; it must not be taken for dead, or it would begin the
/// transaction again and again.
pub(super) fn silence(wal_sender_timeout: Duration) -> Duration {
    SILENCE.max(wal_sender_timeout.saturating_mul(3) / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_may_be_silent_for_longer_than_it_needs_to_read_a_request() {
        for (timeout, seconds) in [(0, 30), (2, 30), (60, 45), (300, 225)] {
            let timeout = Duration::from_secs(timeout);
            assert_eq!(silence(timeout).as_secs(), seconds, "{timeout:?}");
            assert!(silence(timeout) > timeout / 2);
        }
    }

    #[test]
    fn reports_are_three_times_as_frequent_as_the_server_demands() {
        for (timeout, interval) in [(0, 10_000), (2_000, 666), (60_000, 10_000), (15_000, 5_000)] {
            let found = status_interval(Duration::from_millis(timeout));
            assert_eq!(found.as_millis(), interval, "{timeout}");
        }
    }
}
