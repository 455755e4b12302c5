//! What the pages of a snapshot have shown so far, and what that means for a change that the log tells. Pure.
//!
//! Keys are shown in their order, so what was shown is everything before an [`Edge`]. A change of a shown key is news if and only if its
//! page did not see the transaction. Once the log has passed all that a page could see, every later change there is news, and what the page
//! saw is forgotten.

use std::collections::VecDeque;

use uuid::Uuid;

use crate::domain::change::Snapshot;
use crate::domain::month::Month;

/// A row's key within a site. Calls have no month.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) month: Option<Month>,
    pub(super) id: Uuid,
}

/// A place between keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Edge {
    Before(Key),
    /// After all keys.
    End,
}

impl Edge {
    /// Before all keys of a month, and without one before all keys.
    pub(super) const fn before_month(month: Option<Month>) -> Self {
        Self::Before(Key { month, id: Uuid::nil() })
    }

    /// Right after a key; none if it is the last of its month.
    pub(super) fn after(key: Key) -> Option<Self> {
        let id = key.id.as_u128().checked_add(1)?;
        Some(Self::Before(Key { month: key.month, id: Uuid::from_u128(id) }))
    }

    pub(super) fn is_after(self, key: Key) -> bool {
        match self {
            Self::Before(edge) => key < edge,
            Self::End => true,
        }
    }
}

/// What a change of a key is to somebody who was shown the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No page has shown the key; one that comes will, with the change.
    Unshown,
    /// The key's page saw it.
    Seen,
    News,
}

#[derive(Debug)]
struct Part {
    end: Edge,
    snapshot: Snapshot,
    lsn: u64,
}

#[derive(Debug)]
pub(super) struct Coverage {
    /// Before this, every change that the log still tells is news.
    settled: Edge,
    /// Behind it, part by part, what the pages saw.
    recent: VecDeque<Part>,
}

impl Coverage {
    pub(super) fn from(edge: Edge) -> Self {
        Self { settled: edge, recent: VecDeque::new() }
    }

    /// All before it is shown.
    pub(super) fn edge(&self) -> Edge {
        self.recent.back().map_or(self.settled, |part| part.end)
    }

    /// What lies between the edge and `end` was shown as `snapshot` saw it. Whatever that sees has its commit before `lsn`.
    pub(super) fn extend(&mut self, end: Edge, snapshot: Snapshot, lsn: u64) {
        match self.recent.back_mut() {
            Some(last) if last.snapshot == snapshot => (last.end, last.lsn) = (end, last.lsn.min(lsn)),
            _ => self.recent.push_back(Part { end, snapshot, lsn }),
        }
    }

    pub(super) fn verdict(&self, key: Key, xid: u64) -> Verdict {
        if self.settled.is_after(key) {
            return Verdict::News;
        }
        match self.recent.get(self.recent.partition_point(|part| !part.end.is_after(key))) {
            None => Verdict::Unshown,
            Some(part) if part.snapshot.sees(xid) => Verdict::Seen,
            Some(_) => Verdict::News,
        }
    }

    /// The log has told everything up to `lsn`, and all transactions below `horizon`.
    pub(super) fn settle(&mut self, lsn: u64, horizon: u64) {
        while let Some(part) = self.recent.front().filter(|part| part.snapshot.xmax <= horizon || part.lsn < lsn) {
            self.settled = part.end;
            self.recent.pop_front();
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        self.recent.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u128) -> Key {
        Key { month: None, id: Uuid::from_u128(id) }
    }

    fn before(id: u128) -> Edge {
        Edge::Before(key(id))
    }

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a snapshot")
    }

    #[test]
    fn a_change_is_news_where_its_page_did_not_see_it() {
        let mut coverage = Coverage::from(before(0));
        coverage.extend(before(10), snapshot("6:8:6"), 100);
        coverage.extend(before(20), snapshot("9:9:"), 200);
        let verdicts = |coverage: &Coverage, id| [5, 6, 7, 8, 9].map(|xid| coverage.verdict(key(id), xid));
        use Verdict::{News, Seen, Unshown};
        assert_eq!(verdicts(&coverage, 0), [Seen, News, Seen, News, News]);
        assert_eq!(verdicts(&coverage, 9)[1..3], [News, Seen]);
        assert_eq!(verdicts(&coverage, 10), [Seen, Seen, Seen, Seen, News]);
        assert_eq!(verdicts(&coverage, 20), [Unshown; 5]);
        assert_eq!(coverage.edge(), before(20));
        coverage.settle(100, 7);
        assert_eq!(verdicts(&coverage, 9)[2], Seen, "neither the place nor the horizon is passed");
        coverage.settle(101, 7);
        assert_eq!((verdicts(&coverage, 9)[2], verdicts(&coverage, 10)[2]), (News, Seen));
        coverage.settle(101, 9);
        assert!(coverage.is_settled() && coverage.edge() == before(20));
        assert_eq!(verdicts(&coverage, 19), [News; 5]);
        assert_eq!(verdicts(&coverage, 20), [Unshown; 5]);
    }

    #[test]
    fn the_end_is_after_every_key() {
        let last = Key { month: None, id: Uuid::max() };
        assert_eq!(Edge::after(last), None);
        assert!(Edge::End.is_after(last) && !Edge::Before(last).is_after(last));
        assert_eq!(Edge::after(key(4)), Some(before(5)));
        let month = |text: &str| text.parse::<Month>().ok();
        assert!(Edge::before_month(None) < Edge::before_month(month("2026-01-01")));
        assert!(Edge::before_month(month("2026-02-01")).is_after(Key { month: month("2026-01-01"), id: Uuid::max() }));
    }
}
