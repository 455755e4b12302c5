//! `opsmantik partitions`: the months.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Context;
use chrono::{DateTime, Utc};
use clap::Subcommand;
use serde::Serialize;

use super::Database;
use super::output::{Voice, print_json};
use crate::domain::month::Month;
use crate::keeper;
use crate::store::partitions::{Leaf, LeafState};
use crate::store::retention::Step;

/// List, make and drop monthly partitions.
#[derive(Debug, Subcommand)]
pub(super) enum Partitions {
    /// List the months with their leaves, estimated rows and size; those that are missing, and what is left of dropped ones
    List {
        #[command(flatten)]
        database: Database,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make and mend months: those that a running server keeps, or the ones given
    Ensure {
        #[command(flatten)]
        database: Database,
        /// A month, `2026-11-01` or `2026-11`; may be given more than once
        #[arg(long = "month", value_name = "MONTH")]
        months: Vec<Month>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Drop old months with their sessions and events, for good; without --yes only show what would be dropped
    ///
    /// Reading and writing go on meanwhile: a month is detached concurrently, events before sessions, and dropped when nobody uses it any
    /// more. Calls stay, with the match, the score and the evidence that they have. The current month, the one before it and those to come
    /// are never dropped.
    ///
    /// A run that was interrupted, however, is finished by running it again. Run it as the role that owns the tables (the one that
    /// migrated), on a direct connection, not through a transaction pooler. An event that arrives for a dropped month makes the month
    /// again, with that event only. Exit code 0: what was asked for is gone, or was shown; 1: not all of it; 2: not a valid command.
    Drop(Drop),
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true)))]
pub(super) struct Drop {
    #[command(flatten)]
    database: Database,
    /// A month to drop, `2025-01-01` or `2025-01`; may be given more than once
    #[arg(long = "month", value_name = "MONTH", group = "which")]
    months: Vec<Month>,
    /// Drop all months but the current one and those before it, so many in total: 13 keeps this month and the twelve before it
    #[arg(long, value_name = "N", group = "which", value_parser = keep_months)]
    keep_months: Option<u16>,
    /// Drop them. Without it nothing is changed
    #[arg(long)]
    yes: bool,
    /// How long to wait for transactions that are in the way, in total
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wait: u32,
    /// Print JSON; progress goes to standard error
    #[arg(long)]
    json: bool,
}

fn keep_months(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0 | 1) => Err("the current month and the one before it are always kept: 2 or more".to_owned()),
        Ok(months) => Ok(months),
        Err(_) => Err("a number of months".to_owned()),
    }
}

/// A month with its leaves, as a script reads it.
#[derive(Debug, Serialize)]
struct MonthOfData {
    month: Month,
    /// `whole`; `incomplete` (a leaf is missing); `missing` (the keeper should have made it); `leaving` (a detaching was interrupted);
    /// `detached` (only left-overs are there).
    state: &'static str,
    /// The attached leaves.
    sessions_leaf: Option<String>,
    events_leaf: Option<String>,
    sessions_rows: i64,
    events_rows: i64,
    bytes: i64,
    leaves: Vec<Leaf>,
}

impl MonthOfData {
    fn of(month: Month, leaves: Vec<Leaf>) -> Self {
        let attached = |table: &str| {
            let found = leaves.iter().find(|leaf| leaf.table == table && leaf.state == LeafState::Attached);
            found.map(|leaf| leaf.name.clone())
        };
        let rows = |table: &str| leaves.iter().filter(|leaf| leaf.table == table).map(|leaf| leaf.rows).sum();
        let (sessions_leaf, events_leaf) = (attached("sessions"), attached("events"));
        let state = match (&sessions_leaf, &events_leaf) {
            (Some(_), Some(_)) => "whole",
            _ if leaves.iter().any(|leaf| leaf.state == LeafState::Pending) => "leaving",
            (None, None) if leaves.is_empty() => "missing",
            (None, None) => "detached",
            _ => "incomplete",
        };
        Self {
            month,
            state,
            sessions_rows: rows("sessions"),
            events_rows: rows("events"),
            bytes: leaves.iter().map(|leaf| leaf.bytes).sum(),
            sessions_leaf,
            events_leaf,
            leaves,
        }
    }

    fn print(&self) -> anyhow::Result<()> {
        let Self { month, sessions_rows, events_rows, .. } = self;
        let state = if self.state == "whole" { String::new() } else { format!("  {}", self.state.to_uppercase()) };
        say!("{month}  ~{sessions_rows} sessions  ~{events_rows} events  {}{state}", size(self.bytes))?;
        for leaf in self.leaves.iter().filter(|leaf| leaf.state != LeafState::Attached) {
            let Leaf { name, state, .. } = leaf;
            let whose = if leaf.ours { "" } else { ", not made like ours" };
            say!("            {name} is {}{whose}", state.name())?;
        }
        for (table, leaf) in [("sessions", &self.sessions_leaf), ("events", &self.events_leaf)] {
            if leaf.is_none() && self.state == "incomplete" {
                say!("            there is none of {table}")?;
            }
        }
        Ok(())
    }
}

fn size(bytes: i64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes / (1 << 10)) } else { format!("{} MiB", bytes / (1 << 20)) }
}

fn by_month(leaves: Vec<Leaf>) -> BTreeMap<Month, Vec<Leaf>> {
    let mut months: BTreeMap<Month, Vec<Leaf>> = BTreeMap::new();
    for leaf in leaves {
        months.entry(leaf.month).or_default().push(leaf);
    }
    months
}

impl Partitions {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { database, json } => {
                let mut months = by_month(database.store().await?.leaves().await?);
                for kept in keeper::kept(Utc::now()) {
                    months.entry(kept).or_default();
                }
                let months: Vec<_> = months.into_iter().map(|(month, leaves)| MonthOfData::of(month, leaves)).collect();
                if json {
                    return print_json(&months);
                }
                months.iter().try_for_each(MonthOfData::print)
            }
            Self::Ensure { database, months, json } => {
                let store = database.store().await?;
                let mut made = Vec::new();
                if months.is_empty() {
                    made = keeper::keep(&store, Utc::now()).await?;
                }
                for month in months {
                    made.extend(store.ensure_month(month).await?);
                }
                match (json, made.is_empty()) {
                    (true, _) => print_json(&made),
                    (false, true) => say!("nothing was missing"),
                    (false, false) => say!("made {}", made.join(", ")),
                }
            }
            Self::Drop(drop) => drop.run().await,
        }
    }
}

/// A month that goes, as a script reads it.
#[derive(Debug, Serialize)]
struct Doomed {
    #[serde(flatten)]
    month: MonthOfData,
    /// Calls that are matched to its visits. They stay, and keep their match.
    matched_calls: i64,
    dropped: bool,
}

#[derive(Debug, Serialize)]
struct Told {
    dry_run: bool,
    months: Vec<Doomed>,
    /// Months that were named and are not there.
    absent: Vec<Month>,
    /// Tables that have the name of a leaf, and are not made like one.
    left_alone: Vec<String>,
}

impl Drop {
    /// The months that are meant, or why one of them may not be dropped.
    fn meant(&self, there: &BTreeMap<Month, Vec<Leaf>>, now: DateTime<Utc>) -> anyhow::Result<BTreeSet<Month>> {
        if let Some(keep) = self.keep_months {
            let last = keeper::last_to_go(keep, now);
            return Ok(there.keys().copied().filter(|month| *month <= last).collect());
        }
        for month in &self.months {
            keeper::may_drop(*month, now).with_context(|| format!("{month} cannot be dropped"))?;
        }
        Ok(self.months.iter().copied().collect())
    }

    async fn run(self) -> anyhow::Result<()> {
        let store = self.database.store().await?;
        let mut there = by_month(store.leaves().await?);
        let meant = self.meant(&there, Utc::now())?;
        let mut told = Told { dry_run: !self.yes, months: Vec::new(), absent: Vec::new(), left_alone: Vec::new() };
        let calls = store.matched_calls(&meant.iter().copied().collect::<Vec<_>>()).await?;
        for month in meant {
            let (ours, strange): (Vec<_>, Vec<_>) =
                there.remove(&month).unwrap_or_default().into_iter().partition(|leaf| leaf.ours);
            told.left_alone.extend(strange.into_iter().map(|leaf| leaf.name));
            if ours.is_empty() {
                told.absent.push(month);
                continue;
            }
            let matched_calls = calls.get(&month).copied().unwrap_or_default();
            told.months.push(Doomed { month: MonthOfData::of(month, ours), matched_calls, dropped: false });
        }
        if !self.json {
            // What was asked for is done, whoever reads.
            Voice::default().heed(told.print())?;
        }
        if self.yes && !told.months.is_empty() {
            let mut dropper = store.dropper(Instant::now() + Duration::from_secs(self.wait.into())).await?;
            let mut waiting = None;
            for doomed in &mut told.months {
                dropper.drop_month(doomed.month.month, |step| tell(step, &mut waiting)).await?;
                doomed.dropped = true;
            }
        }
        match (self.json, self.yes) {
            (true, _) => print_json(&told),
            (false, true) => say!("{} months dropped", told.months.len()),
            (false, false) => say!("nothing was changed: this was a dry run, --yes drops them"),
        }
    }
}

/// Progress, for people. What is waited for is told once.
fn tell(step: Step, waiting: &mut Option<String>) {
    match step {
        Step::Detached(leaf) => note!("detached {leaf}"),
        Step::Finished(leaf) => note!("finished detaching {leaf}"),
        Step::Dropped(leaf) => note!("dropped {leaf}"),
        Step::Waiting { at, for_what } => {
            let line = format!("{at}: waiting for {for_what}");
            if waiting.as_ref() != Some(&line) {
                note!("{line}");
                *waiting = Some(line);
            }
            return;
        }
    }
    *waiting = None;
}

impl Told {
    fn print(&self) -> anyhow::Result<()> {
        for doomed in &self.months {
            doomed.month.print()?;
            if doomed.matched_calls > 0 {
                say!(
                    "            {} calls are matched to its visits: they stay, and keep their match",
                    doomed.matched_calls
                )?;
            }
        }
        for month in &self.absent {
            say!("{month}  is not there")?;
        }
        for name in &self.left_alone {
            say!("{name} is left alone: it has the name of a leaf and is not made like one")?;
        }
        Ok(())
    }
}
