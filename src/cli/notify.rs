//! What systemd is told (sd_notify(3), systemd.service(5): `Type=notify`, `WatchdogSec=`). Without `NOTIFY_SOCKET` nobody is told.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;

/// The tasks run, and the address is open. Whether the archive is as it should be is another question, which `/readyz` answers: a server
/// that is being started is no reason to start us again.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// A last checkpoint is being archived.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Says that the tasks run, as often as the service wants to hear it, for as long as they do.
pub(super) async fn watchdog(is_alive: impl Fn() -> bool) {
    let mut micros = 0;
    if !sd_notify::watchdog_enabled(false, &mut micros) {
        return;
    }
    loop {
        if is_alive() {
            tell(&[NotifyState::Watchdog]);
        }
        sleep(Duration::from_micros(micros / 3)).await;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
