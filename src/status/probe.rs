use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

/// An answer that is younger is new enough for whoever asks.
const NEW_FOR: Duration = Duration::from_secs(1);

/// How long one who asks waits for an answer. The health checks promise theirs within a second.
const PATIENCE: Duration = Duration::from_millis(700);

/// Something that is asked by one task again and again, and sooner if somebody wants to know: so what does not answer is asked
/// once at a time, whoever waits, and those who wait don't wait for long.
#[derive(Debug)]
pub(super) struct Probe<T> {
    wanted: Notify,
    answer: watch::Sender<Option<Answer<T>>>,
}

/// What was answered, and when.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) at: Instant,
    /// Or why there was no answer.
    pub(super) result: Result<Arc<T>, String>,
}

impl<T> Clone for Answer<T> {
    fn clone(&self) -> Self {
        Self { at: self.at, result: self.result.clone() }
    }
}

impl<T> Default for Probe<T> {
    fn default() -> Self {
        Self { wanted: Notify::new(), answer: watch::channel(None).0 }
    }
}

impl<T> Probe<T> {
    /// Tells what was answered, and waits until it is to be asked again: after this interval, or because somebody wants to know.
    pub(super) async fn answered(&self, result: Result<Arc<T>, String>, interval: Duration) {
        let at = Instant::now();
        self.answer.send_replace(Some(Answer { at, result }));
        // Whoever wanted to know before this has an answer now.
        while timeout(interval, self.wanted.notified()).await.is_ok() && at.elapsed() < NEW_FOR {}
    }

    /// The newest answer, however old.
    pub(super) fn last(&self) -> Option<Answer<T>> {
        self.answer.borrow().clone()
    }

    /// An answer that is new; or why there is none.
    pub(super) async fn fresh(&self) -> Result<Arc<T>, String> {
        let mut answers = self.answer.subscribe();
        let is_new =
            |answer: &Option<Answer<T>>| answer.as_ref().is_some_and(|answer| answer.at.elapsed() < NEW_FOR);
        if !is_new(&answers.borrow_and_update()) {
            self.wanted.notify_one();
            let waited = timeout(PATIENCE, answers.wait_for(is_new)).await;
            if waited.is_err() {
                let silent = self.last().map(|answer| answer.at.elapsed().as_secs());
                return Err(match silent {
                    Some(seconds) => format!("no answer; the last one is {seconds} s old"),
                    None => "no answer yet".to_owned(),
                });
            }
        }
        self.last().map_or_else(|| Err("no answer yet".to_owned()), |answer| answer.result)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Asks again and again.
    fn kept<T: Send + Sync + 'static, F: Future<Output = T> + Send>(
        mut ask: impl FnMut(u32) -> F + Send + 'static,
    ) -> (Arc<Probe<T>>, Arc<AtomicU32>, tokio::task::JoinHandle<()>) {
        let (probe, asked) = (Arc::new(Probe::default()), Arc::new(AtomicU32::new(0)));
        let (kept, counted) = (Arc::clone(&probe), Arc::clone(&asked));
        let keeper = tokio::spawn(async move {
            loop {
                let answer = ask(counted.fetch_add(1, Ordering::Relaxed)).await;
                kept.answered(Ok(Arc::new(answer)), Duration::from_secs(60)).await;
            }
        });
        (probe, asked, keeper)
    }

    #[tokio::test]
    async fn many_who_ask_share_one_answer() {
        let (probe, asked, keeper) = kept(|number| async move { number });
        let answers = futures::future::join_all((0..100).map(|_| probe.fresh())).await;
        assert!(
            answers.iter().all(|answer| answer.as_ref().is_ok_and(|number| **number == 0)),
            "{answers:?}"
        );
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        keeper.abort();
    }

    #[tokio::test]
    async fn what_hangs_is_told_soon_and_asked_once() {
        let (probe, asked, keeper) = kept(|_| std::future::pending::<()>());
        for _ in 0..2 {
            let begun = Instant::now();
            assert_eq!(probe.fresh().await, Err("no answer yet".to_owned()));
            assert!(begun.elapsed() < Duration::from_secs(1));
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        keeper.abort();
    }
}
