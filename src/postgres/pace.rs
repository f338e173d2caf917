//! [`Pace`]: how a socket is read while data keeps coming.
//!
//! A walsender tries a `send` per row. If its client always waits for data, then each of them wakes the client, and that
//! costs both sides more than the row itself. So data is left to pile up. How long depends on where it waits meanwhile:
//!
//! - **TCP on one machine**: as long as the receive buffer has room, each `send` is carried through to it at once, in the
//!   sender's time; when it is full, a `send` only appends to the sender's own buffer, at a quarter of the cost. So the
//!   receive buffer is kept small ([`LOCAL_RECEIVE_BUFFER`](super::socket::LOCAL_RECEIVE_BUFFER)), and once little is left the pause is long enough to fill it
//!   several times.
//! - **Unix sockets** hold some 250 small messages, whatever their size; then the sender sleeps, which is worse. The
//!   pause must be shorter than that, shorter too than the milliseconds in which the runtime's clock ticks: hence a timer
//!   of the kernel's. What several pauses bring is handed on at once.
//! - **TCP from elsewhere**: the window must stay as large as the kernel makes it, or distance would limit the rate.
//!
//! Nobody misses these milliseconds: acknowledgements and replies have clocks of their own. `benches/README.md` has what
//! each of them brings.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::socket::Socket;

/// Longest time for which bytes are gathered before they are handed on.
pub(super) const GATHER_MAX: Duration = Duration::from_millis(5);

/// How a kind of connection is read.
#[derive(Clone, Copy, Debug)]
struct Policy {
    pause: Duration,
    /// A read of fewer bytes is followed by a pause.
    little: usize,
    /// How many bytes are worth handing on.
    batch: usize,
}

const LOCAL_TCP: Policy = Policy { pause: Duration::from_millis(20), little: 32 << 10, batch: 0 };
const UNIX: Policy = Policy { pause: Duration::from_micros(200), little: usize::MAX, batch: 64 << 10 };
const REMOTE: Policy = Policy { pause: Duration::from_millis(1), little: usize::MAX, batch: 0 };

/// The policy of a socket, and its pause under way.
#[derive(Debug)]
pub(super) struct Pace {
    policy: Policy,
    /// When the pause ends; `None` without one.
    until: Option<Instant>,
    #[cfg(target_os = "linux")]
    timer: Option<kernel::Timer>,
}

impl Pace {
    /// The pace for this socket. Must be called inside a runtime.
    pub(super) fn new(socket: &Socket) -> Self {
        let policy = match socket {
            #[cfg(unix)]
            Socket::Unix(_) => UNIX,
            _ if socket.is_local() => LOCAL_TCP,
            _ => REMOTE,
        };
        Self {
            policy,
            until: None,
            // Without it, say where a sandbox forbids it, the runtime's clock serves.
            #[cfg(target_os = "linux")]
            timer: kernel::Timer::new().ok(),
        }
    }

    /// Without pauses.
    pub(super) fn hurried() -> Self {
        Self {
            policy: Policy { pause: Duration::ZERO, little: 0, batch: 0 },
            until: None,
            #[cfg(target_os = "linux")]
            timer: None,
        }
    }

    /// How many bytes are worth handing on.
    pub(super) fn batch_bytes(&self) -> usize {
        self.policy.batch
    }

    /// Whether a pause pays after a read of so many bytes.
    pub(super) fn wants_pause(&self, count: usize) -> bool {
        count < self.policy.little
    }

    /// Begins a pause now.
    pub(super) fn start_pause(&mut self) {
        self.until = Some(Instant::now() + self.policy.pause);
        #[cfg(target_os = "linux")]
        if self.timer.as_ref().is_some_and(|timer| timer.start(self.policy.pause).is_err()) {
            self.timer = None;
        }
    }

    /// Waits until the pause is over. May be cancelled, and called again.
    pub(super) async fn pause(&mut self) {
        let Some(until) = self.until else { return };
        #[cfg(target_os = "linux")]
        if let Some(timer) = &mut self.timer
            && Instant::now() < until
            && timer.expired().await.is_err()
        {
            self.timer = None;
        }
        if Instant::now() < until {
            sleep_until(until).await;
        }
        self.until = None;
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use std::io;
    use std::time::Duration;

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    use tokio::io::AsyncReadExt as _;
    use tokio::net::unix::pipe;

    /// A `timerfd(2)`. It is read like a pipe, and the runtime's type for pipes is the only one that takes any
    /// descriptor without `unsafe`.
    #[derive(Debug)]
    pub(super) struct Timer(pipe::Receiver);

    impl Timer {
        pub(super) fn new() -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            pipe::Receiver::from_owned_fd_unchecked(timer).map(Self)
        }

        pub(super) fn start(&self, length: Duration) -> io::Result<()> {
            let it_value = Timespec::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
            let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
            Ok(())
        }

        /// Waits until it has expired since it was last started, once.
        pub(super) async fn expired(&mut self) -> io::Result<()> {
            self.0.read_u64().await.map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pause_lasts_its_length_and_outlives_an_impatient_waiter() {
        let mut pace = Pace::hurried();
        pace.policy.pause = Duration::from_millis(30);
        for _ in ["the kernel's clock", "the runtime's"] {
            pace.pause().await;
            for _ in 0..3 {
                let begin = Instant::now();
                pace.start_pause();
                assert!(tokio::time::timeout(pace.policy.pause / 10, pace.pause()).await.is_err());
                pace.pause().await;
                assert!(begin.elapsed() >= pace.policy.pause);
                // It is over until it is started again.
                assert!(tokio::time::timeout(Duration::ZERO, pace.pause()).await.is_ok());
            }
            #[cfg(target_os = "linux")]
            {
                pace.timer = kernel::Timer::new().ok();
                assert!(pace.timer.is_some());
            }
        }
    }
}
