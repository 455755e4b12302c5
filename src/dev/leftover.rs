//! Clears what a cluster's last owner left behind when it was killed.
//!
//! Called by the new owner, who holds the lock: a server that still runs on this
//! data has nobody it belongs to. It is stopped, and its data taken over. A pid file
//! that names a process which has nothing to do with our data (the number was given
//! out again, as happens in every container that restarts) is put aside, and that
//! process is left in peace.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::progress::Progress;

const STOP_LIMIT: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);

/// Stops a server without an owner, if one runs on `data`; fails with its pid if it will not end.
pub(super) fn clear(data: &Path, progress: Progress) -> Result<(), i32> {
    let pid_file = data.join("postmaster.pid");
    let Ok(text) = fs::read_to_string(&pid_file) else {
        return Ok(());
    };
    let pid: Option<i32> = text.lines().next().and_then(|line| line.trim().parse().ok());
    let Some(pid) = pid.filter(|pid| *pid > 1) else {
        return Ok(());
    };
    match who_is(pid, data) {
        Who::Ours => stop(pid, data, progress).then_some(()).ok_or(pid),
        // PostgreSQL sees for itself that a number is nobody's, but believes in one that is alive.
        Who::Stranger => {
            progress.say(format!("  {} names process {pid}, which is another program: put aside", pid_file.display()));
            // Where this fails PostgreSQL refuses to start, and says why.
            let _ = fs::remove_file(&pid_file);
            Ok(())
        }
        Who::Unknown => Ok(()),
    }
}

fn stop(pid: i32, data: &Path, progress: Progress) -> bool {
    let step = progress.step(format!("stopping the server that a killed process left behind (process {pid})"));
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGKILL] {
        send(pid, signal);
        let limit = Instant::now() + STOP_LIMIT;
        while Instant::now() < limit {
            if who_is(pid, data) != Who::Ours {
                step.done();
                return true;
            }
            std::thread::sleep(POLL);
        }
    }
    false
}

/// Sends a signal; to whom it cannot be sent is already gone.
pub(super) fn send(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

#[derive(Debug, PartialEq, Eq)]
enum Who {
    /// The server on our data.
    Ours,
    /// A living process that is no PostgreSQL at all.
    Stranger,
    /// Nobody, or somebody of whom we cannot tell: PostgreSQL is asked to judge.
    Unknown,
}

/// Goes by what the process was started with: we name the data there, and unlike its working
/// folder everybody may read it. A process that is dead but not yet reaped shows nothing.
fn who_is(pid: i32, data: &Path) -> Who {
    let line = if cfg!(target_os = "linux") {
        fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
    } else {
        let listed = Command::new("ps").args(["-o", "args=", "-p", &pid.to_string()]).output();
        listed.map(|output| output.stdout).unwrap_or_default()
    };
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let line = line.trim();
    if line.is_empty() {
        Who::Unknown
    } else if line.contains(&format!(" -D {} ", data.display())) {
        Who::Ours
    } else if line.contains("postgres") {
        Who::Unknown
    } else {
        Who::Stranger
    }
}
