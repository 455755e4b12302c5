//! A queue in which everybody waits in a lane of their own, served by deficit round robin.
//!
//! Whoever is served gets up to a *quantum* of weight in a row, then it is the next one's turn; what was taken beyond it is paid for in later
//! turns. Who had nothing waiting is served before those who always have (as `fq_codel` does it), but only for one quantum: nobody waits
//! for more than two quanta of each other lane. Within a lane the order of coming holds, and with one lane this is a plain queue.
//!
//! Memory grows with what waits, not with who ever came: a lane without anything in it is gone within a round.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Items of type `T` by whom they belong to.
#[derive(Debug)]
pub(crate) struct FairQueue<K, T> {
    lanes: HashMap<K, Lane<T>>,
    /// Lanes that have just begun, and the others. Every lane is in one of them, once.
    fresh: VecDeque<K>,
    ring: VecDeque<K>,
    quantum: i64,
    items: usize,
    weight: usize,
}

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<Heavy<T>>,
    /// What may still be taken in this turn; below zero, what is owed to the others.
    credit: i64,
}

#[derive(Debug)]
struct Heavy<T> {
    weight: usize,
    item: T,
}

impl<K: Copy + Eq + Hash, T> FairQueue<K, T> {
    /// With turns of so much weight.
    pub fn new(quantum: usize) -> Self {
        Self {
            lanes: HashMap::new(),
            fresh: VecDeque::new(),
            ring: VecDeque::new(),
            quantum: signed(quantum).max(1),
            items: 0,
            weight: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.items == 0
    }

    pub fn len(&self) -> usize {
        self.items
    }

    /// Of all that waits.
    pub fn weight(&self) -> usize {
        self.weight
    }

    pub fn push(&mut self, key: K, weight: usize, item: T) {
        let lane = self.lanes.entry(key).or_insert_with(|| {
            self.fresh.push_back(key);
            Lane { waiting: VecDeque::new(), credit: self.quantum }
        });
        lane.waiting.push_back(Heavy { weight, item });
        self.items += 1;
        self.weight += weight;
    }

    /// The weight of what [`FairQueue::pop`] would bring.
    pub fn next_weight(&mut self) -> Option<usize> {
        let key = self.turn()?;
        self.lanes.get(&key)?.waiting.front().map(|next| next.weight)
    }

    pub fn pop(&mut self) -> Option<(K, T)> {
        let key = self.turn()?;
        let lane = self.lanes.get_mut(&key)?;
        let Heavy { weight, item } = lane.waiting.pop_front()?;
        lane.credit -= signed(weight);
        self.took(1, weight);
        Some((key, item))
    }

    /// Takes out what is of no use any more.
    pub fn remove_where(&mut self, mut useless: impl FnMut(&T) -> bool) -> Vec<(K, T)> {
        let (mut removed, mut weight) = (Vec::new(), 0);
        for (key, lane) in &mut self.lanes {
            if lane.waiting.iter().any(|heavy| useless(&heavy.item)) {
                for heavy in std::mem::take(&mut lane.waiting) {
                    if useless(&heavy.item) {
                        weight += heavy.weight;
                        removed.push((*key, heavy.item));
                    } else {
                        lane.waiting.push_back(heavy);
                    }
                }
            }
        }
        self.took(removed.len(), weight);
        removed
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.took(self.items, self.weight);
    }

    fn took(&mut self, items: usize, weight: usize) {
        self.items -= items;
        self.weight -= weight;
        if self.items == 0 {
            *self = Self { quantum: self.quantum, ..Self::new(0) };
        }
    }

    /// Whose turn it is. That lane has something in it, and is the first of its list.
    fn turn(&mut self) -> Option<K> {
        loop {
            let is_fresh = !self.fresh.is_empty();
            let list = if is_fresh { &mut self.fresh } else { &mut self.ring };
            let key = *list.front()?;
            let lane = self.lanes.get_mut(&key)?;
            if lane.waiting.is_empty() {
                list.pop_front();
                if is_fresh && !self.ring.is_empty() {
                    // Had it left at once, it could come back as a fresh one before those in the ring had their turn.
                    lane.waiting = VecDeque::new();
                    self.ring.push_back(key);
                } else {
                    self.lanes.remove(&key);
                }
            } else if lane.credit <= 0 {
                lane.credit += self.quantum;
                list.pop_front();
                self.ring.push_back(key);
            } else {
                return Some(key);
            }
        }
    }
}

fn signed(weight: usize) -> i64 {
    i64::try_from(weight).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
