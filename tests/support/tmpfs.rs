//! File systems that fill up, or become read-only.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system of one's own; unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts it, of a size as mount takes it.
    pub fn mount(path: &Path, size: &str) -> Self {
        std::fs::create_dir_all(path).unwrap();
        // Whoever runs the tests owns it, as any other folder of a test.
        let owner = std::fs::metadata(path).unwrap().uid();
        let options = format!("size={size},uid={owner},mode=0755");
        run(privileged("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path));
        Self(path.to_owned())
    }

    /// Changes an option: `ro`, `rw`, `size=...`.
    pub fn remount(&self, option: &str) {
        run(privileged("mount").args(["-o", &format!("remount,{option}")]).arg(&self.0));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a sidecar may still have files open.
        privileged("umount").arg("-l").arg(&self.0).status().ok();
    }
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) {
    let status = command.status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}

/// A command that only root may run.
fn privileged(program: &str) -> Command {
    if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
        return Command::new(program);
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", program]);
    sudo
}
