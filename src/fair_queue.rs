//! A queue in which everybody waits in a lane of their own, served by deficit round robin.
//!
//! Whoever is served gets up to a *quantum* of weight in a row, then it is the next one's turn; what was taken beyond it is paid for in later
//! turns. Who had nothing waiting is served before those who always have (as `fq_codel` does it), but only for one quantum. And where keys cost
//! nothing newcomers may never end, so all of them together get a quantum, then the others do: neither can more than double the wait of the other.
//!
//! The promise: what stands first in its lane, with nothing heavier than a quantum before it, waits for no more than two quanta for each other
//! lane that was there when it came to stand there, and two more; however many lanes come after it, and whatever they bring. One of the two is
//! for the lane itself, one for the other kind's turns. Each such turn may go beyond its quantum by its last item. Within a lane the
//! order of coming holds, and with one lane this is a plain queue.
//!
//! A lane can be held: what waits in it keeps its place and is not served until the lane is let go.
//!
//! Memory grows with what waits, not with who ever came: a lane without anything in it is gone within a round.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

/// Items of type `T` by whom they belong to.
#[derive(Debug)]
pub(crate) struct FairQueue<K, T> {
    lanes: HashMap<K, Lane<T>>,
    /// Lanes that have just begun, and the others. Every lane is in one of them, once; one that is held may be in neither.
    fresh: VecDeque<K>,
    ring: VecDeque<K>,
    held: HashSet<K>,
    quantum: i64,
    /// Above zero, what newcomers may take before the ring has its turn; below, what the ring may take before newcomers have theirs.
    newcomers: i64,
    all: Load,
    /// What may be served: all but what waits in lanes that are held.
    ready: Load,
}

/// How much waits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub items: usize,
    pub weight: usize,
}

impl Load {
    fn add(&mut self, other: Self) {
        self.items += other.items;
        self.weight += other.weight;
    }

    fn take(&mut self, other: Self) {
        self.items -= other.items;
        self.weight -= other.weight;
    }
}

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<Heavy<T>>,
    load: Load,
    /// What may still be taken in this turn; below zero, what is owed to the others.
    credit: i64,
    /// Whether it is in one of the lists.
    listed: bool,
}

impl<T> Lane<T> {
    /// What was used up is there again when it stands at the end of the ring.
    fn end_turn(&mut self, quantum: i64) {
        if self.credit <= 0 {
            self.credit += quantum;
        }
    }
}

#[derive(Debug)]
struct Heavy<T> {
    weight: usize,
    item: T,
}

impl<K: Copy + Eq + Hash, T> FairQueue<K, T> {
    /// With turns of so much weight.
    pub fn new(quantum: usize) -> Self {
        let quantum = signed(quantum).max(1);
        Self {
            lanes: HashMap::new(),
            fresh: VecDeque::new(),
            ring: VecDeque::new(),
            held: HashSet::new(),
            quantum,
            newcomers: quantum,
            all: Load::default(),
            ready: Load::default(),
        }
    }

    /// Whether nothing waits, be its lane held or not.
    pub fn is_empty(&self) -> bool {
        self.all.items == 0
    }

    /// How much waits.
    pub fn all(&self) -> Load {
        self.all
    }

    /// How much of it may be served.
    pub fn ready(&self) -> Load {
        self.ready
    }

    /// How much waits in a lane, be it held or not.
    pub fn waiting(&self, key: K) -> Load {
        self.lanes.get(&key).map_or(Load::default(), |lane| lane.load)
    }

    pub fn push(&mut self, key: K, weight: usize, item: T) {
        let held = self.held.contains(&key);
        let lane = self.lanes.entry(key).or_insert_with(|| {
            if !held {
                self.fresh.push_back(key);
            }
            Lane { waiting: VecDeque::new(), load: Load::default(), credit: self.quantum, listed: !held }
        });
        lane.waiting.push_back(Heavy { weight, item });
        let load = Load { items: 1, weight };
        lane.load.add(load);
        self.all.add(load);
        if !held {
            self.ready.add(load);
        }
    }

    /// Serves nothing more of a lane until it is let go, whatever comes into it.
    pub fn hold(&mut self, key: K) {
        if !self.held.insert(key) {
            return;
        }
        if let Some(lane) = self.lanes.get_mut(&key) {
            self.ready.take(lane.load);
            // It does not keep the first place: when it is let go the others have their turn.
            for list in [&mut self.fresh, &mut self.ring] {
                if list.front() == Some(&key) {
                    list.pop_front();
                    lane.listed = false;
                }
            }
        }
    }

    /// Lets a lane go. What waits in it has its turn after those of the others.
    pub fn release(&mut self, key: K) {
        if !self.held.remove(&key) {
            return;
        }
        if let Some(lane) = self.lanes.get_mut(&key) {
            self.ready.add(lane.load);
            if !std::mem::replace(&mut lane.listed, true) {
                lane.end_turn(self.quantum);
                self.ring.push_back(key);
            }
        }
    }

    /// Lets a lane go that was held though it had its turn: it is the next one to have it, before those that have just begun as well.
    pub fn release_next(&mut self, key: K) {
        self.release(key);
        if self.ring.back() == Some(&key) {
            self.ring.rotate_right(1);
            self.newcomers = self.newcomers.min(0);
        }
    }

    /// The lane that [`FairQueue::pop`] would serve.
    pub fn next_lane(&mut self) -> Option<K> {
        self.turn()
    }

    /// The weight of what [`FairQueue::pop`] would bring.
    pub fn next_weight(&mut self) -> Option<usize> {
        let key = self.turn()?;
        self.lanes.get(&key)?.waiting.front().map(|next| next.weight)
    }

    pub fn pop(&mut self) -> Option<(K, T)> {
        let key = self.turn()?;
        let is_fresh = self.is_newcomers_turn();
        let lane = self.lanes.get_mut(&key)?;
        let Heavy { weight, item } = lane.waiting.pop_front()?;
        lane.credit -= signed(weight);
        let load = Load { items: 1, weight };
        lane.load.take(load);
        self.ready.take(load);
        self.share(is_fresh, signed(weight));
        self.took(load);
        Some((key, item))
    }

    /// Takes out what is of no use any more.
    pub fn remove_where(&mut self, mut useless: impl FnMut(&T) -> bool) -> Vec<(K, T)> {
        let (mut removed, mut all) = (Vec::new(), Load::default());
        for (key, lane) in &mut self.lanes {
            if lane.waiting.iter().any(|heavy| useless(&heavy.item)) {
                let mut gone = Load::default();
                for heavy in std::mem::take(&mut lane.waiting) {
                    if useless(&heavy.item) {
                        gone.add(Load { items: 1, weight: heavy.weight });
                        removed.push((*key, heavy.item));
                    } else {
                        lane.waiting.push_back(heavy);
                    }
                }
                lane.load.take(gone);
                if !self.held.contains(key) {
                    self.ready.take(gone);
                }
                all.add(gone);
            }
        }
        self.took(all);
        removed
    }

    /// Forgets all that waits.
    pub fn clear(&mut self) {
        self.took(self.all);
    }

    fn took(&mut self, load: Load) {
        self.all.take(load);
        if self.is_empty() {
            let quantum = self.quantum;
            *self = Self { quantum, newcomers: quantum, held: std::mem::take(&mut self.held), ..Self::new(0) };
        }
    }

    /// Whose turn it is. That lane has something in it, and is the first of its list.
    fn turn(&mut self) -> Option<K> {
        loop {
            let is_fresh = self.is_newcomers_turn();
            let list = if is_fresh { &mut self.fresh } else { &mut self.ring };
            let key = *list.front()?;
            let lane = self.lanes.get_mut(&key)?;
            if self.held.contains(&key) {
                list.pop_front();
                lane.listed = false;
                if lane.waiting.is_empty() {
                    self.lanes.remove(&key);
                }
            } else if lane.waiting.is_empty() {
                list.pop_front();
                if is_fresh && !self.ring.is_empty() {
                    // Had it left at once, it could come back as a fresh one before those in the ring had their turn.
                    lane.waiting = VecDeque::new();
                    lane.end_turn(self.quantum);
                    self.ring.push_back(key);
                } else {
                    self.lanes.remove(&key);
                }
            } else if lane.credit <= 0 {
                lane.end_turn(self.quantum);
                list.pop_front();
                self.ring.push_back(key);
            } else {
                return Some(key);
            }
        }
    }

    fn is_newcomers_turn(&self) -> bool {
        !self.fresh.is_empty() && (self.newcomers > 0 || self.ring.is_empty())
    }

    /// Counts what was served, while those on the other side wait as well or may come.
    fn share(&mut self, is_fresh: bool, weight: i64) {
        let newcomers = self.newcomers;
        self.newcomers = match is_fresh {
            // Nobody waits for them to be through.
            true if self.ring.is_empty() => self.quantum,
            true if newcomers > weight => newcomers - weight,
            true => newcomers - weight - self.quantum,
            false if newcomers > 0 || newcomers + weight < 0 => (newcomers + weight).min(self.quantum),
            false => self.quantum,
        };
    }
}

fn signed(weight: usize) -> i64 {
    i64::try_from(weight).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
#[path = "fair_queue_tests.rs"]
mod tests;
