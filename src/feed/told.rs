//! What the log has told, in terms of transactions: whether a query saw all of it, and which transactions are over for good.
//!
//! PostgreSQL writes a commit to its log before it shows it to queries, and with synchronous replication that may be long before. So what
//! the log told is kept by transaction until the database itself was seen to show it; from then on every later query sees it.

use std::collections::{BTreeMap, VecDeque};

use crate::domain::change::{Position, Snapshot};

/// As many moments are remembered, about one a second.
const MOMENTS: usize = 4096;

#[derive(Debug)]
pub(super) struct Told {
    /// What the database was last seen to show; at first, what lay before the slot.
    shown: Snapshot,
    /// Transactions that were told and that `shown` does not see, with their commits' places.
    unseen: BTreeMap<u64, u64>,
    /// At or after the place, every transaction below the id has ended, and its commit lies before the place. Both ascend.
    horizons: VecDeque<(u64, u64)>,
}

impl Told {
    /// `before` is what the slot's snapshot saw, `start` the slot's place.
    pub fn new(before: Snapshot, start: u64) -> Self {
        let horizons = VecDeque::from([(start, before.xmin)]);
        Self { shown: before, unseen: BTreeMap::new(), horizons }
    }

    /// The log tells a transaction.
    pub fn tell(&mut self, xid: u64, lsn: u64) {
        if !self.shown.sees(xid) {
            self.unseen.insert(xid, lsn);
        }
    }

    /// The database showed this, and its log was written up to `written` a moment later.
    pub fn show(&mut self, snapshot: Snapshot, written: u64) {
        // Answers that overtake each other, or come from another server than the log, teach nothing.
        let Some((last, horizon)) = self.horizons.back().copied() else { return };
        if !sees_all_of(&snapshot, &self.shown) || written < last {
            return;
        }
        if snapshot.xmin > horizon {
            self.horizons.push_back((written, snapshot.xmin));
        }
        if self.horizons.len() > MOMENTS {
            // Not the first: who is far behind still needs one that is right.
            self.horizons.remove(1);
        }
        self.unseen.retain(|xid, _| !snapshot.sees(*xid));
        self.shown = snapshot;
    }

    /// Whether a query with this snapshot saw everything that was told up to a place.
    pub fn is_covered_by(&self, snapshot: &Snapshot, position: Position) -> bool {
        let told = |lsn: u64| position >= Position { lsn, seq: 1 };
        sees_all_of(snapshot, &self.shown)
            && !snapshot.in_progress.iter().any(|xid| self.unseen.get(xid).is_some_and(|lsn| told(*lsn)))
            && !self.unseen.range(snapshot.xmax..).any(|(_, lsn)| told(*lsn))
    }

    /// All transactions below have ended, with their commits at or before a place.
    pub fn horizon(&self, position: Position) -> u64 {
        let reached = self.horizons.partition_point(|(lsn, _)| *lsn <= position.lsn);
        let moment = reached.checked_sub(1).and_then(|at| self.horizons.get(at));
        moment.map_or(0, |(_, xmin)| *xmin)
    }
}

/// Whether `later` sees every transaction that `earlier` sees.
fn sees_all_of(later: &Snapshot, earlier: &Snapshot) -> bool {
    if later.in_progress.iter().any(|xid| earlier.sees(*xid)) {
        return false;
    }
    // From its xmax on the later sees nothing; so the earlier must see nothing there either.
    let Some(beyond) = earlier.xmax.checked_sub(later.xmax) else { return true };
    let unseen = earlier.in_progress.iter().filter(|xid| **xid >= later.xmax).count();
    u64::try_from(unseen).is_ok_and(|unseen| unseen == beyond)
}
