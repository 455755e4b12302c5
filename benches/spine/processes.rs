//! What processes cost, read from `/proc`: seconds of processor and bytes of memory.
//!
//! On a machine that others use as well, seconds by the clock say as much about them as about us. Seconds of processor do not.

use std::fs;

use anyhow::Context;

/// Seconds of processor that server, database and load have used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    pub server: f64,
    pub database: f64,
    pub load: f64,
}

impl Spent {
    pub fn since(self, before: Self) -> Self {
        Self {
            server: self.server - before.server,
            database: self.database - before.database,
            load: self.load - before.load,
        }
    }

    /// Seconds for a thousand events.
    #[allow(clippy::cast_precision_loss)]
    pub fn per_thousand(self, events: usize) -> Self {
        let each = 1000.0 / events.max(1) as f64;
        Self { server: self.server * each, database: self.database * each, load: self.load * each }
    }
}

/// Whose time is counted.
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    pub server: Option<u32>,
    pub postmaster: u32,
}

impl Meter {
    pub fn read(self) -> anyhow::Result<Spent> {
        let server = match self.server {
            Some(pid) => Stat::of(pid).context("the server runs")?.own,
            None => 0.0,
        };
        let load = Stat::of(std::process::id()).context("we run")?.own;
        Ok(Spent { server, database: family(self.postmaster)?, load })
    }
}

/// Of one process.
struct Stat {
    parent: u32,
    own: f64,
    /// Of its children that have ended.
    children: f64,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, blanks included.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
        let second = ticks_per_second();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: (ticks(11)? + ticks(12)?) / second,
            children: (ticks(13)? + ticks(14)?) / second,
        })
    }
}

fn ticks_per_second() -> f64 {
    // The kernel tells user space a hundredth of a second on every architecture that we build for (`USER_HZ`).
    100.0
}

/// A process with its children, those that have ended included.
fn family(pid: u32) -> anyhow::Result<f64> {
    let parent = Stat::of(pid).context("PostgreSQL runs")?;
    let mut seconds = parent.own + parent.children;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(stat) = Stat::of(child).filter(|stat| stat.parent == pid) {
            seconds += stat.own;
        }
    }
    Ok(seconds)
}

/// Resident bytes of a process: now, and the most that it ever had.
pub fn resident(pid: u32) -> anyhow::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).context("the server runs")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).context("a line of /proc/PID/status")?;
        let kib = line.split_whitespace().next().context("a number")?;
        anyhow::Ok(kib.parse::<u64>()? * 1024)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}
