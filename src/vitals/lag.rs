use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::now;
use crate::lsn::Lsn;

/// A look of this age says nothing of now: they are made every ten seconds. Microseconds.
const LOOK_AGE_MAX: i64 = 15_000_000;

/// Looks that are kept while nothing is archived: a day of them. Beyond that every second one is forgotten, never the oldest.
const LOOKS_MAX: usize = 8_640;

/// What is committed and not archived yet, as far as it is known here, and so the age of the archive.
///
/// ```text
///    archived        in memory                    received: nothing for us        not received
/// ----------------|------------------------------|---------------------------|------------------> log
///              `durable`   `pending`: commits                             `seen`    `looks`: where the log ended, and when
/// ```
///
/// With rows in memory the oldest row that is not archived is the first of them, since commits are streamed in the order of
/// their records. With none, everything before `seen` is archived, so it is at most as old as the first look that found the
/// log to end behind that. A session that ends takes its memory with it: then `seen` is the durable position again.
#[derive(Debug, Default)]
pub(crate) struct Lag {
    seen: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The first transaction of each checkpoint in memory: where its commit record begins, and when it was committed.
    pending: VecDeque<(Lsn, i64)>,
    durable: Lsn,
    /// Where the server's log ended, and the server's time then; the oldest first. Only those behind what is archived.
    looks: VecDeque<(Lsn, i64)>,
    /// Whether a session holds the slot, so that the stream's position moves.
    is_held: bool,
    /// When the server was last looked at, by its clock; microseconds since the epoch.
    looked_at: Option<i64>,
    /// The newest look, and how much the server's clock is ahead of ours; microseconds.
    end: Option<Lsn>,
    ahead: i64,
}

impl Lag {
    /// A session begins to stream from here: whatever was in memory comes again.
    pub(crate) fn begin(&self, start: Lsn) {
        let mut state = self.state();
        state.pending.clear();
        state.durable = start;
        state.is_held = true;
        self.seen.store(start.0, Ordering::Relaxed);
    }

    /// A session has ended: whatever was in memory is not archived.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        state.pending.clear();
        state.is_held = false;
        self.seen.store(state.durable.0, Ordering::Relaxed);
    }

    /// A checkpoint has got its first rows, of a transaction whose commit record begins here, committed at this time.
    pub(crate) fn received(&self, commit: Lsn, committed_at: i64) {
        self.state().pending.push_back((commit, committed_at));
    }

    /// The stream has brought all that was committed before this.
    #[inline]
    pub(crate) fn seen(&self, lsn: Lsn) {
        self.seen.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// All that was committed before this is archived.
    pub(crate) fn archived(&self, lsn: Lsn) {
        let mut state = self.state();
        state.durable = state.durable.max(lsn);
        while state.pending.front().is_some_and(|(first, _)| *first < lsn) {
            state.pending.pop_front();
        }
        self.forget_covered(&mut state);
    }

    /// Before the first look: the log that ends here now was archived up to some place before that at this time of the server's, and
    /// nobody knows what was committed since.
    pub(crate) fn archived_until(&self, end: Lsn, then: i64) {
        self.state().looks.push_front((end, then));
    }

    /// The server's log ended here, at this time of the server's.
    pub(crate) fn looked(&self, end: Lsn, server_now: i64) {
        let mut state = self.state();
        state.ahead = server_now - now();
        state.end = Some(end);
        state.looked_at = Some(server_now);
        state.looks.push_back((end, server_now));
        self.forget_covered(&mut state);
        if state.looks.len() > LOOKS_MAX {
            let mut place = 0;
            state.looks.retain(|_| {
                place += 1;
                place % 2 == 1
            });
        }
    }

    /// Seconds since the oldest row was committed that is not archived, at most; 0 if all are. `None` before the first look at the
    /// server. While it can't be looked at, or nobody holds the slot, any row since the last look may be the oldest.
    pub(crate) fn seconds(&self) -> Option<f64> {
        let mut state = self.state();
        self.forget_covered(&mut state);
        let looked_at = state.looked_at?;
        let server_now = now() + state.ahead;
        let is_known = state.is_held && server_now - looked_at < LOOK_AGE_MAX;
        let oldest = state.pending.front().or_else(|| state.looks.front()).map(|(_, time)| *time);
        let unknown = (!is_known).then_some(looked_at);
        let age = oldest.into_iter().chain(unknown).min().map_or(0, |oldest| server_now - oldest);
        #[expect(clippy::cast_precision_loss, reason = "microseconds of years are exact")]
        let seconds = age.max(0) as f64 / 1e6;
        Some(seconds)
    }

    /// Bytes of the server's log, where it last was seen to end, that are not archived, and that were not received.
    pub(crate) fn bytes(&self) -> Option<(u64, u64)> {
        let state = self.state();
        let (end, seen) = (state.end?, Lsn(self.seen.load(Ordering::Relaxed)));
        let archived = if state.pending.is_empty() { state.durable.max(seen) } else { state.durable };
        Some((end.bytes_since(archived), end.bytes_since(seen)))
    }

    /// Forgets looks that found nothing which is not archived by now.
    fn forget_covered(&self, state: &mut State) {
        let seen = Lsn(self.seen.load(Ordering::Relaxed));
        let archived = state.pending.front().map_or(seen, |(first, _)| *first);
        while state.looks.front().is_some_and(|(end, _)| *end <= archived) {
            state.looks.pop_front();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lag to the nearest second.
    fn seconds(lag: &Lag) -> i64 {
        #[expect(clippy::cast_possible_truncation, reason = "small")]
        let seconds = lag.seconds().unwrap().round() as i64;
        seconds
    }

    fn ago(seconds: i64) -> i64 {
        now() - seconds * 1_000_000
    }

    #[test]
    fn the_oldest_row_in_memory_counts() {
        let lag = Lag::default();
        assert_eq!(lag.seconds(), None);
        lag.begin(Lsn(100));
        lag.looked(Lsn(100), now());
        lag.received(Lsn(110), ago(50));
        lag.seen(Lsn(120));
        lag.received(Lsn(130), ago(20));
        lag.seen(Lsn(140));
        assert_eq!(seconds(&lag), 50);
        lag.archived(Lsn(120));
        assert_eq!(seconds(&lag), 20);
        lag.archived(Lsn(140));
        assert_eq!(seconds(&lag), 0);
    }

    #[test]
    fn what_the_stream_has_not_brought_counts_from_the_first_look_that_saw_it() {
        let lag = Lag::default();
        lag.begin(Lsn(100));
        lag.looked(Lsn(100), ago(90));
        lag.looked(Lsn(200), ago(60));
        lag.looked(Lsn(300), ago(30));
        lag.looked(Lsn(300), now());
        assert_eq!((seconds(&lag), lag.bytes()), (60, Some((200, 200))));
        lag.seen(Lsn(250));
        assert_eq!((seconds(&lag), lag.bytes()), (30, Some((50, 50))));
        lag.seen(Lsn(300));
        assert_eq!(seconds(&lag), 0);
    }

    #[test]
    fn what_a_session_had_in_memory_is_not_archived_when_it_ends() {
        let lag = Lag::default();
        lag.begin(Lsn(100));
        lag.looked(Lsn(100), ago(120));
        lag.received(Lsn(110), ago(100));
        lag.looked(Lsn(120), ago(90));
        lag.looked(Lsn(120), now());
        lag.seen(Lsn(120));
        lag.end();
        assert_eq!((seconds(&lag), lag.bytes()), (90, Some((20, 20))));
        lag.begin(Lsn(100));
        assert_eq!(seconds(&lag), 90);
        lag.seen(Lsn(130));
        assert_eq!(seconds(&lag), 0);
    }

    #[test]
    fn what_came_while_nobody_was_there_counts_from_the_last_watermark() {
        let lag = Lag::default();
        lag.archived_until(Lsn(200), ago(600));
        lag.looked(Lsn(200), now());
        assert_eq!(seconds(&lag), 600);
        lag.begin(Lsn(100));
        assert_eq!(seconds(&lag), 600);
        lag.received(Lsn(110), ago(500));
        lag.seen(Lsn(200));
        assert_eq!(seconds(&lag), 500);
        lag.archived(Lsn(200));
        assert_eq!(seconds(&lag), 0);
    }

    #[test]
    fn without_a_look_or_a_session_what_came_since_the_last_look_counts() {
        let lag = Lag::default();
        lag.begin(Lsn(100));
        lag.looked(Lsn(100), now());
        assert_eq!(seconds(&lag), 0);
        // Nobody holds the slot.
        lag.end();
        lag.state().looked_at = Some(ago(3));
        assert_eq!(seconds(&lag), 3);
        // Somebody does, and the server is not to be looked at.
        lag.begin(Lsn(100));
        assert_eq!(seconds(&lag), 0);
        lag.state().looked_at = Some(ago(40));
        assert_eq!(seconds(&lag), 40);
        lag.looked(Lsn(100), now());
        assert_eq!(seconds(&lag), 0);
    }

    #[test]
    fn a_clock_that_differs_from_the_servers_changes_nothing() {
        let lag = Lag::default();
        lag.begin(Lsn(100));
        let server = now() + 3_600_000_000;
        lag.looked(Lsn(100), server);
        lag.received(Lsn(110), server - 5_000_000);
        assert_eq!(seconds(&lag), 5);
    }

    #[test]
    fn looks_are_bounded_and_the_oldest_stays() {
        let lag = Lag::default();
        lag.begin(Lsn(1));
        for number in 0..30_000_u64 {
            lag.looked(Lsn(number + 2), ago(30_000 - i64::try_from(number).unwrap()));
        }
        assert!(lag.state().looks.len() <= LOOKS_MAX);
        // The server's clock seems behind by the last look's age.
        assert_eq!(seconds(&lag), 29_999);
    }
}
