//! The only place that sleeps: conditions awaited with a deadline.

use std::time::{Duration, Instant};

/// Short enough not to lengthen a test, long enough not to load a busy server.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Waits until `condition` returns a value.
///
/// # Panics
///
/// When the deadline passes; the message names `what`.
pub async fn until<T>(what: &str, deadline: Duration, condition: impl AsyncFnMut() -> Option<T>) -> T {
    within(deadline, condition).await.unwrap_or_else(|| panic!("after {deadline:?} still not true: {what}"))
}

/// Waits until `condition` returns a value, or `None` once the deadline has passed.
pub async fn within<T>(deadline: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition().await {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Watches that `condition` holds for a whole span of time.
///
/// # Panics
///
/// As soon as it does not.
pub async fn throughout(what: &str, span: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let broken = within(span, async || (!condition().await).then_some(())).await;
    assert!(broken.is_none(), "no longer true: {what}");
}

/// Time for others to do something; nothing may depend on how long it is.
pub async fn pause(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}
