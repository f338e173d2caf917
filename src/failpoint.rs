//! Named points on the commit path where a crash test may stop the process. Compiled to nothing without
//! the feature `failpoints`.

/// Does what the environment (`FAILPOINTS`, see the `fail` crate) asks for at this point: `return` aborts
/// the process, as a power cut would; `return(stop)` halts it until it gets `SIGCONT`, as a paused machine.
#[cfg(feature = "failpoints")]
pub(crate) fn hit(name: &str) {
    fail::fail_point!(name, |argument: Option<String>| match argument.as_deref() {
        Some("stop") => stop(),
        _ => std::process::abort(),
    });
}

/// Reads `FAILPOINTS`. To be called once, at the start of the process.
#[cfg(feature = "failpoints")]
pub(crate) fn setup() {
    // Dropping it would switch the points off.
    std::mem::forget(fail::FailScenario::setup());
}

/// Does nothing: the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn setup() {}

/// Does nothing: the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn hit(_name: &str) {}

#[cfg(feature = "failpoints")]
fn stop() {
    // A signal needs an unsafe call or another program; this is the other program.
    let sent = std::process::Command::new("kill").args(["-STOP", &std::process::id().to_string()]).status();
    if !sent.is_ok_and(|status| status.success()) {
        std::process::abort();
    }
}
