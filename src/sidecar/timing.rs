//! When a checkpoint is due.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::committer::Work;
use crate::tables::{Window, WindowWidth};

/// How long a row may wait before its checkpoint is cut: three quarters of the bound, which leaves a quarter
/// for encoding, upload and commit; or until the current window ends, so that its files can be merged soon.
pub(super) fn time_to_cut(max_lag: Duration, window: WindowWidth, now_micros: i64) -> Duration {
    let rest = Window::of(now_micros, window).end() - now_micros;
    (max_lag * 3 / 4).min(Duration::from_micros(u64::try_from(rest).unwrap_or_default()))
}

/// Waits until then, and until the committer can take something, or is gone. The room is not kept.
pub(super) async fn has_room_at(work: &mpsc::Sender<Work>, at: Instant) {
    sleep_until(at).await;
    drop(work.reserve().await);
}

pub(super) fn now() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_waits_for_three_quarters_of_the_bound_or_the_end_of_the_window() {
        let hour = WindowWidth::new(Duration::from_secs(3600)).unwrap();
        let minute = Duration::from_secs(60);
        assert_eq!(time_to_cut(minute, hour, 0), Duration::from_secs(45));
        assert_eq!(time_to_cut(minute, hour, 3_590_000_000), Duration::from_secs(10));
        assert_eq!(time_to_cut(minute * 240, hour, 1), Duration::from_micros(3_599_999_999));
    }
}
