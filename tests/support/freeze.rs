//! Processes that hang: they are there, hold their connections, and do nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Stops a process and all that it has started (SIGSTOP); they go on when this is dropped.
#[derive(Debug)]
pub struct Frozen(Vec<u32>);

impl Frozen {
    /// The server whose data is there.
    pub fn server(data: &Path) -> Self {
        let pid = fs::read_to_string(data.join("postmaster.pid")).expect("a server");
        Self::of(pid.lines().next().and_then(|line| line.trim().parse().ok()).expect("a process id"))
    }

    /// A process, and what it has started.
    pub fn of(root: u32) -> Self {
        let mut all = vec![root];
        let mut next = 0;
        while let Some(process) = all.get(next).copied() {
            all.extend(children(process));
            next += 1;
        }
        for process in &all {
            signal("STOP", *process);
        }
        Self(all)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for process in &self.0 {
            signal("CONT", *process);
        }
    }
}

/// The processes that a process has started and that have not ended.
pub fn children(process: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of_thread =
        |thread: fs::DirEntry| fs::read_to_string(thread.path().join("children")).unwrap_or_default();
    threads
        .flat_map(|thread| {
            of_thread(thread).split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

fn signal(name: &str, process: u32) {
    // One that has ended meanwhile hangs no more.
    Command::new("sh").args(["-c", &format!("kill -{name} {process} 2>/dev/null")]).status().ok();
}
