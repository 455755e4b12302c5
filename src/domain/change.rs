//! Changes of rows, and where they stand: in the log, and among the transactions of the database.
//!
//! A [`Position`] orders changes by their commits; a [`Snapshot`] says which transactions a query saw. With both, what a query has shown
//! and what the log tells meet without a gap and without a double: a change is told if and only if the query did not see its transaction.

use std::fmt;
use std::str::FromStr;

use super::id::SiteId;
use super::month::Month;

/// What can be watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Table {
    Events,
    Sessions,
    Calls,
}

impl Table {
    pub fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Sessions => "sessions",
            Self::Calls => "calls",
        }
    }

    /// Whether it is partitioned by month.
    pub fn has_months(self) -> bool {
        match self {
            Self::Events | Self::Sessions => true,
            Self::Calls => false,
        }
    }
}

/// A place in the log: after everything at or before it. The first number is PostgreSQL's LSN of the commit, the second counts the
/// changes of the transaction from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, serde::Serialize, serde::Deserialize)]
pub struct Position {
    pub lsn: u64,
    pub seq: u32,
}

/// Which history positions and transaction ids belong to. They mean nothing in another: in a restored copy, or after a failover that may
/// have lost commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Lineage {
    /// PostgreSQL's system identifier.
    pub system: u64,
    pub timeline: u32,
    /// The database's oid.
    pub database: u32,
}

/// Which transactions a query saw, by their full ids (`xid8`): PostgreSQL's `pg_snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// All below have ended.
    pub xmin: u64,
    /// None at or above was seen.
    pub xmax: u64,
    /// Between the two: those that were under way and not seen. Ascending.
    pub in_progress: Vec<u64>,
}

/// The text is no `pg_snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a snapshot, expected xmin:xmax:xid,xid,…")]
pub struct NotASnapshot;

impl Snapshot {
    /// Whether it saw what this transaction did.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }
}

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(text: &str) -> Result<Self, NotASnapshot> {
        let mut parts = text.splitn(3, ':');
        let mut number = || parts.next()?.parse().ok();
        let (xmin, xmax) = number().zip(number()).ok_or(NotASnapshot)?;
        let list = parts.next().ok_or(NotASnapshot)?;
        let ids = list.split(',').filter(|id| !id.is_empty()).map(str::parse);
        let mut in_progress = ids.collect::<Result<Vec<u64>, _>>().map_err(|_| NotASnapshot)?;
        in_progress.sort_unstable();
        Ok(Self { xmin, xmax, in_progress })
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self.in_progress.iter().map(u64::to_string).collect();
        write!(f, "{}:{}:{}", self.xmin, self.xmax, list.join(","))
    }
}

/// The full id of a transaction of which only the lower half is known, as the log tells it: the one nearest to `near`.
pub fn full_xid(xid: u32, near: u64) -> u64 {
    let distance = xid.wrapping_sub(near as u32).cast_signed();
    near.saturating_add_signed(distance.into())
}

/// Where a row lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    pub site: SiteId,
    /// Its partition; calls have none.
    pub month: Option<Month>,
}

/// What happened to a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Change<R> {
    Insert { new: R },
    Update { old: R, new: R },
    Delete { old: R },
}

impl<R> Change<R> {
    /// The row before.
    pub fn before(&self) -> Option<&R> {
        match self {
            Self::Insert { .. } => None,
            Self::Update { old, .. } | Self::Delete { old } => Some(old),
        }
    }

    /// The row after.
    pub fn after(&self) -> Option<&R> {
        match self {
            Self::Insert { new } | Self::Update { new, .. } => Some(new),
            Self::Delete { .. } => None,
        }
    }

    /// From the row before and the row after; none if there is neither.
    pub fn of(before: Option<R>, after: Option<R>) -> Option<Self> {
        match (before, after) {
            (None, None) => None,
            (None, Some(new)) => Some(Self::Insert { new }),
            (Some(old), None) => Some(Self::Delete { old }),
            (Some(old), Some(new)) => Some(Self::Update { old, new }),
        }
    }

    /// What of it somebody is told who sees only some rows: one that moves away is deleted there, and one that moves in is new.
    pub fn within<'c, S>(&'c self, seen: impl Fn(&'c R) -> Option<S>) -> Option<Change<S>> {
        Change::of(self.before().and_then(&seen), self.after().and_then(&seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_sees_what_had_ended() {
        let snapshot: Snapshot = "10:20:15,12".parse().expect("a snapshot");
        let seen: Vec<u64> = (5..25).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [5, 6, 7, 8, 9, 10, 11, 13, 14, 16, 17, 18, 19]);
        assert_eq!(snapshot.to_string(), "10:20:12,15");
        assert_eq!("7:7:".parse(), Ok(Snapshot { xmin: 7, xmax: 7, in_progress: Vec::new() }));
        for bad in ["", "1", "1:2", "x:2:", "1:2:x", "1:2:3:4"] {
            assert_eq!(bad.parse::<Snapshot>(), Err(NotASnapshot), "{bad}");
        }
    }

    #[test]
    fn half_an_id_is_completed_by_its_neighbourhood() {
        let wrap = 1u64 << 32;
        assert_eq!(full_xid(5, 3), 5);
        assert_eq!(full_xid(5, wrap - 3), wrap + 5);
        assert_eq!(full_xid(u32::MAX, wrap + 7), wrap - 1);
        assert_eq!(full_xid(9, 7 * wrap + 1000), 7 * wrap + 9);
    }

    #[test]
    fn who_sees_half_of_a_move_is_told_that_half() {
        let moved = Change::Update { old: 1, new: 2 };
        assert_eq!(moved.within(|row| Some(*row)), Some(moved.clone()));
        assert_eq!(moved.within(|row| Some(*row).filter(|row| *row == 1)), Some(Change::Delete { old: 1 }));
        assert_eq!(moved.within(|row| Some(*row).filter(|row| *row == 2)), Some(Change::Insert { new: 2 }));
        assert_eq!(moved.within(|_| None::<i32>), None);
        assert_eq!(Change::Insert { new: 3 }.within(|row| Some(*row).filter(|row| *row == 1)), None);
        assert_eq!(Change::Delete { old: 3 }.within(|row| Some(*row).filter(|row| *row == 1)), None);
    }
}
