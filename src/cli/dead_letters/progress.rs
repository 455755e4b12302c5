//! How far a replay has come: count, rate, and when it will have ended. On standard error, in place on a terminal, a line now and then in a log.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::dev::progress::write_stderr;

const REDRAW: Duration = Duration::from_millis(250);
const LOG: Duration = Duration::from_secs(5);

pub(super) struct Progress {
    total: u64,
    began: Instant,
    told: Option<Instant>,
    terminal: bool,
}

impl Progress {
    /// Of so many letters.
    pub(super) fn of(total: u64) -> Self {
        let progress = Self { total, began: Instant::now(), told: None, terminal: std::io::stderr().is_terminal() };
        write_stderr(&format!("{total} letters are chosen\n"));
        progress
    }

    /// Tells how far it is, if it has not just been told.
    pub(super) fn tell(&mut self, done: u64, failed: u64) {
        let pause = if self.terminal { REDRAW } else { LOG };
        if self.told.unwrap_or(self.began).elapsed() < pause {
            return;
        }
        self.told = Some(Instant::now());
        let line = line(done, self.total, failed, self.began.elapsed());
        write_stderr(&if self.terminal { format!("\r\x1b[2K{line}") } else { format!("{line}\n") });
    }

    /// Takes the line away, so that something else can be said.
    pub(super) fn clear(&self) {
        if self.terminal && self.told.is_some() {
            write_stderr("\r\x1b[2K");
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}

#[allow(clippy::cast_precision_loss)] // for people
fn line(done: u64, total: u64, failed: u64, elapsed: Duration) -> String {
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left = total.saturating_sub(done);
    let when = match left as f64 / rate {
        _ if left == 0 => "almost done".to_owned(),
        seconds if seconds < 100.0 => format!("{seconds:.0} s left"),
        seconds if seconds < 6000.0 => format!("{:.0} min left", seconds / 60.0),
        seconds if seconds.is_finite() => format!("{:.1} h left", seconds / 3600.0),
        _ => "no end in sight yet".to_owned(),
    };
    // What died meanwhile is chosen as well.
    let total = total.max(done);
    let percent = done as f64 * 100.0 / (total as f64).max(1.0);
    format!("{done} of {total} letters ({percent:.1} %), {failed} failed again, {rate:.0}/s, {when}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_rate_and_end_are_told() {
        let after = Duration::from_secs(10);
        assert_eq!(
            line(50_000, 1_000_000, 3, after),
            "50000 of 1000000 letters (5.0 %), 3 failed again, 5000/s, 3 min left"
        );
        assert!(line(0, 10, 0, after).ends_with("no end in sight yet"));
        assert!(line(9, 10, 0, after).ends_with(" 1 s left"));
        assert!(line(12, 10, 0, after).starts_with("12 of 12 letters (100.0 %)"));
        assert!(line(10, 100_000, 0, after).ends_with("27.8 h left"));
    }
}
