//! A subscriber's place in the log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::reader::{Shared, State};
use super::{Entry, Lost, Step};
use crate::domain::change::{Lineage, Position, Snapshot, Table};
use crate::domain::id::SiteId;
use crate::telemetry;

/// A subscriber is told no more often that the log went on without anything for it.
const MOVES: Duration = Duration::from_millis(500);

/// A place in the log, and what comes after it of one table and one site.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
    table: Table,
    site: SiteId,
    position: Position,
    wake: Arc<Notify>,
    moved_at: Option<Instant>,
}

impl Subscription {
    pub(super) fn new(shared: Arc<Shared>, table: Table, site: SiteId, position: Position, wake: Arc<Notify>) -> Self {
        Self { shared, table, site, position, wake, moved_at: None }
    }

    /// The history that positions and transaction ids of this log belong to.
    pub fn lineage(&self) -> Lineage {
        self.shared.lineage
    }

    /// Where it stands: everything at or before this was told or passed over.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to another place: what comes after it is told next. False, and it stays, when the log no longer holds all of that. A place
    /// that the log has not reached yet is waited for.
    pub fn seek(&mut self, after: Position) -> bool {
        let held = self.shared.state().log.holds(self.table, self.site, after);
        if held {
            self.position = after;
        }
        held
    }

    /// A transaction id below which every transaction has ended, with its commit at or before [`Self::position`]: what a query sees of
    /// transactions below was told, or was there before.
    pub fn horizon(&self) -> u64 {
        self.shared.state().told.horizon(self.position)
    }

    /// Whether a query with this snapshot saw every transaction whose commit lies at or before [`Self::position`]. If it did not, it came
    /// a moment too early: PostgreSQL writes a commit to its log before it shows it to queries.
    pub fn covers(&self, snapshot: &Snapshot) -> bool {
        let state = self.shared.state();
        // What lies between is not known yet.
        self.position <= state.log.reached() && state.told.is_covered_by(snapshot, self.position)
    }

    /// The next entry if it is there already.
    pub fn try_next(&mut self) -> Result<Option<Arc<Entry>>, Lost> {
        let shared = self.shared.clone();
        let state = shared.state();
        self.take(&state)
    }

    /// Waits for the next step. Can be dropped at any time and asked again.
    pub async fn next(&mut self) -> Result<Step, Lost> {
        let (shared, wake) = (self.shared.clone(), self.wake.clone());
        loop {
            // Before the look: what comes after it is not missed.
            let (woken, beat) = (wake.notified(), shared.beat.notified());
            {
                let state = shared.state();
                if let Some(entry) = self.take(&state)? {
                    return Ok(Step::Entry(entry));
                }
                let reached = state.log.reached();
                if reached > self.position && self.moved_at.is_none_or(|at| at.elapsed() >= MOVES) {
                    self.position = reached;
                    self.moved_at = Some(Instant::now());
                    return Ok(Step::Moved);
                }
            }
            tokio::select! {
                () = woken => {}
                () = beat => {}
                () = shared.ended() => {}
            }
        }
    }

    fn take(&mut self, state: &State) -> Result<Option<Arc<Entry>>, Lost> {
        if state.over {
            return Err(Lost::Away);
        }
        if !state.log.holds(self.table, self.site, self.position) {
            metrics::counter!(telemetry::FEED_CUT_OFF_TOTAL).increment(1);
            return Err(Lost::Slow);
        }
        let entry = state.log.first_after(self.table, self.site, self.position).cloned();
        if let Some(entry) = &entry {
            self.position = entry.position;
        }
        Ok(entry)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.leave(self.table, self.site);
    }
}
