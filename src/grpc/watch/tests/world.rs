//! A database of a few rows, whose every step is chosen by chance: transactions that are logged before they are shown, a log that is read
//! late, months that come and go, rows that move.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use bytes::Bytes;
use chrono::DateTime;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::super::coverage::Key;
use crate::domain::change::{Change, Lineage, Place, Position, Snapshot};
use crate::domain::id::SiteId;
use crate::domain::month::Month;
use crate::feed::{Entry, Lost, What};
use crate::store::columns::{Relation, Tuple};

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub(super) site: SiteId,
    pub(super) key: Key,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Insert(At, i64),
    Update((At, i64), (At, i64)),
    Delete(At, i64),
    /// All rows of a month, or all rows, go without a word for each.
    Drop(Option<Month>),
}

impl Op {
    fn touches(&self, at: At) -> bool {
        match self {
            Self::Insert(to, _) | Self::Delete(to, _) => *to == at,
            Self::Update((from, _), (to, _)) => [*from, *to].contains(&at),
            Self::Drop(month) => *month == at.key.month,
        }
    }
}

pub(super) struct World {
    pub(super) rng: StdRng,
    /// What queries see: values, and who wrote them.
    pub(super) rows: BTreeMap<At, (i64, u64)>,
    pub(super) months: BTreeSet<Month>,
    pub(super) reached: Position,
    pub(super) floor: Position,
    pub(super) timeline: u32,
    /// So much will still happen.
    pub(super) steps: usize,
    dated: bool,
    running: BTreeMap<u64, Vec<Op>>,
    /// Logged and not shown yet.
    hidden: BTreeMap<u64, Vec<Op>>,
    /// The places of all commits.
    commits: BTreeMap<u64, u64>,
    marks: Vec<(u64, Option<SiteId>, Option<Month>)>,
    next_xid: u64,
    wal: u64,
    log: Vec<Arc<Entry>>,
    read: usize,
}

pub(super) type Shared = Arc<Mutex<World>>;

pub(super) fn site(n: u128) -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(n))
}

pub(super) fn month(n: i32) -> Month {
    "2026-01-01".parse::<Month>().expect("a month").plus(n)
}

pub(super) fn open(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().expect("no test panics with the world in its hands")
}

fn tuple(value: i64, at: At) -> (Place, Tuple) {
    static RELATION: LazyLock<Arc<Relation>> = LazyLock::new(|| {
        let columns = [("id", Type::UUID), ("value", Type::INT8), ("name", Type::BYTEA)];
        Arc::new(Relation { columns: columns.map(|(name, kind)| (name.to_owned(), kind)).into() })
    });
    let values = vec![
        Some(Bytes::copy_from_slice(at.key.id.as_bytes())),
        Some(Bytes::copy_from_slice(&value.to_be_bytes())),
        Some(super::named(at.key).into()),
    ];
    (Place { site: at.site, month: at.key.month }, Tuple { relation: RELATION.clone(), values })
}

impl World {
    pub(super) fn new(seed: u64, dated: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let steps = rng.random_range(20..400);
        Self {
            rng,
            rows: BTreeMap::new(),
            months: (0..4).filter(|n| n % 2 == 0).map(month).collect(),
            reached: Position::default(),
            floor: Position::default(),
            timeline: 1,
            steps,
            dated,
            running: BTreeMap::new(),
            hidden: BTreeMap::new(),
            commits: BTreeMap::new(),
            marks: Vec::new(),
            next_xid: 100,
            wal: 1,
            log: Vec::new(),
            read: 0,
        }
    }

    /// A few things happen; false if nothing will ever happen again.
    pub(super) fn go_on(&mut self) -> bool {
        for _ in 0..self.rng.random_range(0..4) {
            if self.steps == 0 {
                break;
            }
            self.steps -= 1;
            self.step();
        }
        if self.steps == 0 {
            self.running.clear();
            while let Some(xid) = self.hidden.keys().next().copied() {
                self.show(xid);
            }
            self.read_log(usize::MAX);
        }
        self.steps > 0
    }

    fn step(&mut self) {
        match self.rng.random_range(0..12) {
            0..4 => self.begin(),
            4..6 => {
                if let Some(xid) = self.any(|world| &world.running) {
                    self.log(xid);
                }
            }
            6..8 => {
                if let Some(xid) = self.any(|world| &world.hidden) {
                    self.show(xid);
                }
            }
            8..10 => {
                let entries = self.rng.random_range(0..4);
                self.read_log(entries);
            }
            10 => {
                if let Some(xid) = self.any(|world| &world.running) {
                    self.running.remove(&xid);
                }
            }
            _ => {
                let made = month(self.rng.random_range(0..5));
                if !self.is_locked(|op| matches!(op, Op::Drop(Some(gone)) if *gone == made)) {
                    self.months.insert(made);
                }
            }
        }
    }

    fn any(&mut self, of: impl Fn(&Self) -> &BTreeMap<u64, Vec<Op>>) -> Option<u64> {
        let at = self.rng.random_range(0..of(self).len().max(1));
        of(self).keys().nth(at).copied()
    }

    fn is_locked(&self, touched: impl Fn(&Op) -> bool) -> bool {
        self.running.values().chain(self.hidden.values()).flatten().any(touched)
    }

    fn begin(&mut self) {
        let xid = self.next_xid;
        // Some ids are a subtransaction's, or another table's.
        self.next_xid += self.rng.random_range(1..3);
        self.running.insert(xid, Vec::new());
        for _ in 0..self.rng.random_range(0..4) {
            if let Some(op) = self.op() {
                self.running.entry(xid).or_default().push(op);
            }
        }
    }

    fn free_place(&mut self) -> Option<At> {
        let at = self.rng.random_range(0..self.months.len().max(1));
        let month = if self.dated { Some(*self.months.iter().nth(at)?) } else { None };
        let id = match self.rng.random_range(0..14) {
            13 => Uuid::max(),
            n => Uuid::from_u128(n),
        };
        let site = site(if self.rng.random_bool(0.8) { 1 } else { 2 });
        let at = At { site, key: Key { month, id } };
        (!self.rows.contains_key(&at) && !self.is_locked(|op| op.touches(at))).then_some(at)
    }

    fn value(&mut self) -> i64 {
        // A negative one cannot be shown.
        if self.rng.random_bool(0.06) { -1 } else { self.rng.random_range(0..1000) }
    }

    fn op(&mut self) -> Option<Op> {
        let kind = self.rng.random_range(0..20);
        if kind < 7 {
            let at = self.free_place()?;
            return Some(Op::Insert(at, self.value()));
        }
        if kind == 19 && self.rng.random_bool(0.3) {
            let any = month(self.rng.random_range(0..5));
            let gone = self.dated.then_some(any);
            let busy = self.is_locked(|op| match op {
                Op::Insert(at, _) | Op::Delete(at, _) | Op::Update(_, (at, _)) if at.key.month == gone => true,
                Op::Update((at, _), _) => at.key.month == gone,
                Op::Insert(..) | Op::Delete(..) => false,
                Op::Drop(month) => *month == gone,
            });
            let there = gone.is_none_or(|month| self.months.contains(&month));
            return (there && !busy).then_some(Op::Drop(gone));
        }
        let at = self.rng.random_range(0..self.rows.len().max(1));
        let (at, (value, _)) = self.rows.iter().nth(at).map(|(at, row)| (*at, *row))?;
        if self.is_locked(|op| op.touches(at)) {
            return None;
        }
        Some(match kind {
            7..14 => Op::Update((at, value), (at, self.value())),
            14..16 => Op::Update((at, value), (self.free_place()?, self.value())),
            _ => Op::Delete(at, value),
        })
    }

    fn log(&mut self, xid: u64) {
        let ops = self.running.remove(&xid).unwrap_or_default();
        let lsn = self.wal + 10;
        self.wal = lsn + 1;
        let mut changes = Vec::new();
        for op in &ops {
            match *op {
                Op::Insert(at, value) => changes.push(What::Row(Change::Insert { new: tuple(value, at) })),
                Op::Delete(at, value) => changes.push(What::Row(Change::Delete { old: tuple(value, at) })),
                // To another partition: out of one, into the other.
                Op::Update((from, old), (to, new)) if from.key.month != to.key.month => {
                    changes.push(What::Row(Change::Delete { old: tuple(old, from) }));
                    changes.push(What::Row(Change::Insert { new: tuple(new, to) }));
                }
                Op::Update((from, old), (to, new)) => {
                    changes.push(What::Row(Change::Update { old: tuple(old, from), new: tuple(new, to) }));
                }
                Op::Drop(month) => changes.push(What::Anew { site: None, month }),
            }
        }
        self.log.extend(changes.into_iter().zip(1..).map(|(what, seq)| {
            let position = Position { lsn, seq };
            Arc::new(Entry { position, xid, committed_at: DateTime::UNIX_EPOCH, what })
        }));
        self.commits.insert(xid, lsn);
        self.hidden.insert(xid, ops);
    }

    fn show(&mut self, xid: u64) {
        for op in self.hidden.remove(&xid).unwrap_or_default() {
            match op {
                Op::Insert(at, value) => drop(self.rows.insert(at, (value, xid))),
                Op::Update((from, _), (to, value)) => {
                    self.rows.remove(&from);
                    self.rows.insert(to, (value, xid));
                    if from != to {
                        self.marks.push((xid, Some(from.site), from.key.month));
                    }
                }
                Op::Delete(at, _) => {
                    self.rows.remove(&at);
                    self.marks.push((xid, Some(at.site), at.key.month));
                }
                Op::Drop(month) => {
                    self.rows.retain(|at, _| at.key.month != month);
                    if let Some(month) = month {
                        self.months.remove(&month);
                    }
                    self.marks.push((xid, None, month));
                }
            }
        }
    }

    fn read_log(&mut self, entries: usize) {
        self.read = self.read.saturating_add(entries).min(self.log.len());
        if self.read == self.log.len() {
            self.reached = Position { lsn: self.wal, seq: 0 };
        } else if let Some(last) = self.read.checked_sub(1) {
            self.reached = self.reached.max(self.log[last].position);
        }
    }

    /// The log forgets what was read.
    pub(super) fn forget(&mut self) {
        self.floor = self.reached;
    }

    pub(super) fn lineage(&self) -> Lineage {
        Lineage { system: 1, timeline: self.timeline, database: 1 }
    }

    pub(super) fn next(&self, after: Position) -> Result<Option<Arc<Entry>>, Lost> {
        if after < self.floor {
            return Err(Lost::Slow);
        }
        let ours = |entry: &&Arc<Entry>| match &entry.what {
            What::Row(change) => {
                [change.before(), change.after()].iter().flatten().any(|(place, _)| place.site == site(1))
            }
            What::Anew { .. } => true,
        };
        let mut read = self.log[..self.read].iter().filter(|entry| entry.position > after);
        Ok(read.find(ours).cloned())
    }

    pub(super) fn horizon(&self, position: Position) -> u64 {
        let later = self.commits.iter().filter(|(_, lsn)| **lsn >= position.lsn).map(|(xid, _)| *xid);
        later.chain(self.running.keys().copied()).chain([self.next_xid]).min().unwrap_or_default()
    }

    pub(super) fn covers(&self, position: Position, snapshot: &Snapshot) -> bool {
        let told = |lsn: u64| position >= Position { lsn, seq: 1 };
        position <= self.reached && self.commits.iter().all(|(xid, lsn)| !told(*lsn) || snapshot.sees(*xid))
    }

    /// What a query sees now, and a place in the log after all of it.
    pub(super) fn moment(&mut self) -> (Snapshot, u64) {
        let mut in_progress: Vec<u64> = self.running.keys().chain(self.hidden.keys()).copied().collect();
        in_progress.sort_unstable();
        let xmin = in_progress.first().copied().unwrap_or(self.next_xid);
        self.wal += 1;
        (Snapshot { xmin, xmax: self.next_xid, in_progress }, self.wal - 1)
    }

    pub(super) fn vanished(&self, month: Option<Month>, since: u64) -> bool {
        self.marks.iter().any(|(xid, of, at)| {
            *xid >= since && of.is_none_or(|of| of == site(1)) && (month.is_none() || at.is_none() || *at == month)
        })
    }
}
