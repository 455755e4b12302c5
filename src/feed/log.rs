//! The log in memory: entries in order, bounded by bytes, found by table and site.
//!
//! It forgets its oldest when it is full, and remembers for each place how far it forgot: so a subscriber whose own entries are all there
//! is not sent away because of what others' sites do. Pure: no clock, no task, no lock.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{Entry, What};
use crate::domain::change::{Position, Table};
use crate::domain::id::SiteId;

/// What an entry is found by. Without a site: it is for every site's subscribers.
pub(super) type Key = (Table, Option<SiteId>);

/// How many places are remembered of which something was forgotten, before all are treated alike.
const FORGOTTEN_PLACES: usize = 10_000;

#[derive(Debug)]
pub(super) struct Log {
    room: usize,
    bytes: usize,
    entries: VecDeque<Kept>,
    by_key: HashMap<Key, VecDeque<Arc<Entry>>>,
    /// The last entry that was forgotten of a key.
    forgotten: HashMap<Key, Position>,
    /// Of what lies at or before, nothing is known to be kept.
    floor: Position,
    reached: Position,
}

#[derive(Debug)]
struct Kept {
    position: Position,
    keys: [Option<Key>; 2],
    bytes: usize,
}

impl Log {
    /// An empty log that begins after `start` and holds about so many bytes.
    pub fn new(start: Position, room: usize) -> Self {
        Self {
            room,
            bytes: 0,
            entries: VecDeque::new(),
            by_key: HashMap::new(),
            forgotten: HashMap::new(),
            floor: start,
            reached: start,
        }
    }

    /// Everything at or before this was told.
    pub fn reached(&self) -> Position {
        self.reached
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends an entry; tells under which keys it is found.
    pub fn push(&mut self, table: Table, entry: Entry, bytes: usize) -> [Option<Key>; 2] {
        let keys = keys(table, &entry.what);
        let position = entry.position;
        let entry = Arc::new(entry);
        for key in keys.iter().flatten() {
            self.by_key.entry(*key).or_default().push_back(entry.clone());
        }
        self.entries.push_back(Kept { position, keys, bytes });
        self.bytes += bytes;
        self.reached = self.reached.max(position);
        while self.bytes > self.room && self.entries.len() > 1 {
            self.forget_oldest();
        }
        keys
    }

    /// All commits before this place were told.
    pub fn reach(&mut self, lsn: u64) {
        self.reached = self.reached.max(Position { lsn, seq: 0 });
    }

    /// Whether everything of this table and site after a place is kept, or is yet to come.
    pub fn holds(&self, table: Table, site: SiteId, after: Position) -> bool {
        let forgotten = |site| self.forgotten.get(&(table, site)).is_some_and(|last| *last > after);
        self.floor <= after && !forgotten(Some(site)) && !forgotten(None)
    }

    /// The first entry of this table and site after a place, among those that are kept.
    pub fn first_after(&self, table: Table, site: SiteId, after: Position) -> Option<&Arc<Entry>> {
        let first = |site| {
            let entries = self.by_key.get(&(table, site))?;
            entries.get(entries.partition_point(|entry| entry.position <= after))
        };
        match (first(Some(site)), first(None)) {
            (Some(own), Some(all)) => Some(if own.position < all.position { own } else { all }),
            (own, all) => own.or(all),
        }
    }

    fn forget_oldest(&mut self) {
        let Some(oldest) = self.entries.pop_front() else { return };
        self.bytes -= oldest.bytes;
        for key in oldest.keys.into_iter().flatten() {
            if let Some(entries) = self.by_key.get_mut(&key) {
                entries.pop_front();
                if entries.is_empty() {
                    self.by_key.remove(&key);
                }
            }
            self.forgotten.insert(key, oldest.position);
        }
        if self.forgotten.len() > FORGOTTEN_PLACES {
            self.forgotten.clear();
            self.floor = self.floor.max(oldest.position);
        }
    }
}

/// A row that moves between sites is found by both.
fn keys(table: Table, what: &What) -> [Option<Key>; 2] {
    match what {
        What::Anew { site, .. } => [Some((table, *site)), None],
        What::Row(change) => {
            let site = |row: Option<&(crate::domain::change::Place, _)>| row.map(|(place, _)| place.site);
            let (before, after) = (site(change.before()), site(change.after()));
            let key = |site| (table, Some(site));
            [before.map(key), after.filter(|site| Some(*site) != before).map(key)]
        }
    }
}
