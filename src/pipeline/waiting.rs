//! The waiting room of the pipeline: what was taken and is not settled yet, in two rooms and one queue.
//!
//! ```text
//! submit ─▶ room (by site) ──────────────────┐
//!   no space for this site: Busy             ├▶ one queue, a lane a site ─▶ batch ─▶ settled: its space is free
//! take_when_room ─▶ asking ─▶ patient room ──┘
//!   a lane a site; too many: Busy
//! ```
//!
//! While events of a site are being written, its others wait in their lane: two batches with the same visits would wait for each other's locks,
//! and write the same sessions twice. So a writer beside another has other sites, and finds together what came in of one.
//!
//! Space is taken from admission until the outcome, so it bounds what is being written, too. Who cannot wait for space (`submit`) comes in as a
//! whole or not at all: half a request that was written has cost the writers time, and its sender nothing but another try. Nobody of these
//! waits longer than a bound for a writer; then the answer is Busy, and the writer's time is for those who still listen. Who can
//! wait for space (`take_when_room`) has a room apart, and as many ask for a place in it as fit into a second one.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use super::room::Room;
use super::tempo::{Due, Tempo, Written};
use super::{PipelineConfig, Pressure, Wanted};
use crate::domain::event::Event;
use crate::domain::id::SiteId;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::fair_queue::FairQueue;
use crate::telemetry;

/// What a site gets in one turn, bytes: a hundred and more usual events, so that a visit's events mostly stay together.
const QUANTUM: usize = 256 << 10;
/// The same where they wait for space: there nothing is kept together, so turns may be short.
const ASKING_QUANTUM: usize = 16 << 10;
/// Whoever waits for space may fill at least this, however small the room is that they wait for.
const SMALLEST_ASKING: usize = 4 << 20;
/// What an event costs beside itself while it waits: its place, its answer, and what its caller keeps of it.
const OVERHEAD: usize = 512;

/// An event that waits. Whoever drops it without an answer has broken a promise, and its caller hears *stopping*.
struct Waiting {
    event: Event,
    counted: usize,
    since: Instant,
    patient: bool,
    answer: oneshot::Sender<Outcome>,
}

/// An event whose caller waits for space for it.
struct Asking {
    waiting: Box<Waiting>,
    counted: usize,
    taken: oneshot::Sender<()>,
}

/// The waiting room; shared by those who come and the writers.
pub(super) struct WaitingRoom {
    inside: Mutex<Inside>,
    /// Rung when there is something to write, and when the room closes.
    bell: Notify,
    full: AtomicBool,
    pressed: AtomicBool,
    config: PipelineConfig,
}

struct Inside {
    queue: FairQueue<SiteId, Box<Waiting>>,
    tempo: Tempo,
    room: Room<SiteId>,
    patient: Room<SiteId>,
    asking: FairQueue<SiteId, Asking>,
    asking_room: Room<SiteId>,
    closed: bool,
}

/// Space that was taken.
#[derive(Debug, Clone, Copy)]
struct Place {
    site: SiteId,
    counted: usize,
    patient: bool,
}

/// What a writer writes next. Its space is free when it is settled or dropped.
pub(super) struct Batch {
    /// To be taken out and written.
    pub events: Vec<Event>,
    /// When the oldest of them came; an eighth of the patience is left at least.
    pub since: Instant,
    answers: Vec<oneshot::Sender<Outcome>>,
    places: Vec<Place>,
    /// Whose lanes are held until it is settled.
    sites: BTreeSet<SiteId>,
    bytes: usize,
    /// More was waiting than it could hold.
    full: bool,
    begun: Instant,
    room: Arc<WaitingRoom>,
}

impl WaitingRoom {
    pub fn new(config: PipelineConfig) -> Self {
        let inside = Inside {
            queue: FairQueue::new(QUANTUM),
            tempo: Tempo::new(config),
            room: Room::of(config.room_bytes),
            patient: Room::of(config.patient_room_bytes),
            asking: FairQueue::new(ASKING_QUANTUM),
            asking_room: Room::of(config.patient_room_bytes.max(SMALLEST_ASKING)),
            closed: false,
        };
        Self {
            inside: Mutex::new(inside),
            bell: Notify::new(),
            full: AtomicBool::new(false),
            pressed: AtomicBool::new(false),
            config,
        }
    }

    pub fn pressure(&self) -> Pressure {
        match (self.full.load(Ordering::Relaxed), self.pressed.load(Ordering::Relaxed)) {
            (true, _) => Pressure::Full,
            (false, true) => Pressure::High,
            (false, false) => Pressure::Low,
        }
    }

    /// Whether [`WaitingRoom::take`] would refuse these, as far as that can be told before they are understood.
    pub fn refuses(&self, wanted: &[Wanted]) -> bool {
        let sites: Vec<(SiteId, usize)> = wanted.iter().map(|wanted| (wanted.site, about(wanted))).collect();
        !self.inside().admits(&sites)
    }

    /// Takes all of these events, or none.
    pub fn take(&self, events: Vec<Event>) -> Result<Vec<oneshot::Receiver<Outcome>>, Unavailable> {
        let weights: Vec<usize> = events.iter().map(weight).collect();
        let mut sites: Vec<(SiteId, usize)> = Vec::new();
        for (event, weight) in events.iter().zip(&weights) {
            match sites.iter_mut().find(|(site, _)| *site == event.site_id) {
                Some((_, sum)) => *sum += weight,
                None => sites.push((event.site_id, *weight)),
            }
        }
        let mut inside = self.inside();
        if inside.closed {
            return Err(Unavailable::Stopping);
        }
        if !inside.admits(&sites) {
            return Err(Unavailable::Busy);
        }
        let since = Instant::now();
        let gathered = inside.tempo.gathers();
        let receivers = events.into_iter().zip(weights).map(|(event, weight)| {
            let (answer, receiver) = oneshot::channel();
            inside.seat(Waiting { event, counted: weight, since, patient: false, answer });
            receiver
        });
        let receivers = receivers.collect();
        self.look(&inside);
        let ring = inside.wakes(gathered);
        drop(inside);
        if ring {
            self.bell.notify_one();
        }
        Ok(receivers)
    }

    /// Takes an event as soon as there is space for it, those of other sites being as near to it.
    pub async fn take_patiently(&self, event: Event) -> Result<oneshot::Receiver<Outcome>, Unavailable> {
        let (answer, receiver) = oneshot::channel();
        let (site, weight) = (event.site_id, weight(&event));
        let taken = {
            let mut inside = self.inside();
            if inside.closed {
                return Err(Unavailable::Stopping);
            }
            let counted = inside.patient.counted(weight);
            let waiting = Waiting { event, counted, since: Instant::now(), patient: true, answer };
            if inside.asking.is_empty() && inside.patient.fits(counted) {
                let gathered = inside.tempo.gathers();
                inside.seat(waiting);
                if inside.wakes(gathered) {
                    self.bell.notify_one();
                }
                None
            } else {
                let counted = inside.asking_room.counted(weight);
                if !inside.asking_room.admits(site, counted) {
                    return Err(Unavailable::Busy);
                }
                let (taken, heard) = oneshot::channel();
                inside.asking_room.enter(site, counted);
                inside.asking.push(site, weight, Asking { waiting: Box::new(waiting), counted, taken });
                Some(heard)
            }
        };
        if let Some(heard) = taken {
            heard.await.map_err(|_| Unavailable::Stopping)?;
        }
        Ok(receiver)
    }

    /// The next batch, as soon as it is due. None: the room is closed and empty.
    pub async fn batch(self: &Arc<Self>) -> Option<Batch> {
        loop {
            let rung = self.bell.notified();
            let (batch, due) = {
                let mut inside = self.inside();
                if inside.queue.is_empty() && inside.closed {
                    // The others want to know as well.
                    self.bell.notify_one();
                    return None;
                }
                let batch = match inside.due() {
                    Due::Now => self.gather(&mut inside),
                    Due::At(_) | Due::Never => None,
                };
                (batch, inside.due())
            };
            match (batch, due) {
                (Some(batch), due) => {
                    // Somebody else has to see to what is left.
                    if due != Due::Never {
                        self.bell.notify_one();
                    }
                    return Some(batch);
                }
                (None, Due::At(at)) => drop(tokio::time::timeout_at(at.into(), rung).await),
                (None, Due::Now) => {}
                (None, Due::Never) => rung.await,
            }
        }
    }

    fn gather(self: &Arc<Self>, inside: &mut Inside) -> Option<Batch> {
        let (mut taken, mut bytes, mut sites, mut visits) = (Vec::new(), 0, BTreeSet::new(), HashSet::new());
        let share = inside.tempo.share(inside.queue.ready(), inside.queue.all());
        let (mut claimed, mut aside) = (0, Vec::new());
        let most = inside.tempo.batch();
        let room = |events: usize, bytes: usize, visits: usize| {
            events < most && visits < self.config.batch_visits && bytes < self.config.batch_bytes
        };
        while taken.is_empty() || room(taken.len(), bytes, visits.len()) {
            let Some(site) = inside.queue.next_lane() else { break };
            if !sites.contains(&site) {
                // All that waits of a site is claimed with it. With more than half of that beyond the share it is another's.
                let waiting = inside.queue.waiting(site).items;
                if claimed > 0 && claimed + waiting / 2 > share {
                    aside.push(site);
                    inside.queue.hold(site);
                    continue;
                }
                sites.insert(site);
                claimed += waiting;
            }
            let Some((_, waiting)) = inside.queue.pop() else { break };
            bytes += waiting.counted;
            visits.insert((site, waiting.event.session_id));
            taken.push(*waiting);
        }
        // More of these sites than it could hold; what waits of the others is no work that it was too small for.
        let full = inside.queue.ready().items > 0;
        // In their order, they are the first of the next batch: else a flood that begins anew with each would be before them for ever.
        aside.into_iter().rev().for_each(|site| inside.queue.release_next(site));
        sites.iter().for_each(|site| inside.queue.hold(*site));
        // Who could wait for room may have waited for longer than the patience, and must not cost the others theirs.
        let begun = Instant::now();
        let since = taken.iter().map(|waiting| waiting.since).min()?;
        let since = begun.checked_sub(self.config.patience * 7 / 8).map_or(since, |earliest| since.max(earliest));
        let left = inside.queue.ready().items;
        inside.tempo.taken(left);
        let mut batch = Batch {
            events: Vec::with_capacity(taken.len()),
            since,
            answers: Vec::with_capacity(taken.len()),
            places: Vec::with_capacity(taken.len()),
            sites,
            bytes,
            full,
            begun,
            room: self.clone(),
        };
        for waiting in taken {
            batch.places.push(waiting.place());
            batch.events.push(waiting.event);
            batch.answers.push(waiting.answer);
        }
        Some(batch)
    }

    /// Sends away those who have waited for a writer longer than they should, and cannot wait.
    pub fn send_away(&self, longest: Duration) {
        let gone = {
            let mut inside = self.inside();
            if inside.queue.is_empty() {
                return;
            }
            let gone = inside.queue.remove_where(|waiting| !waiting.patient && waiting.since.elapsed() > longest);
            gone.iter().for_each(|(_, waiting)| inside.leave(waiting.place()));
            if !gone.is_empty() {
                let left = inside.queue.ready().items;
                inside.tempo.gather_anew(left);
            }
            self.look(&inside);
            gone
        };
        for (_, waiting) in gone {
            answer(waiting.answer, Outcome::Unavailable(Unavailable::Busy));
        }
    }

    /// Takes nothing more. Who waits for space is told, what has been taken is written.
    pub fn close(&self) {
        let mut inside = self.inside();
        inside.closed = true;
        inside.asking.clear();
        drop(inside);
        self.bell.notify_one();
    }

    fn settle(&self, places: &[Place], sites: &BTreeSet<SiteId>, written: Option<Written>) {
        let mut inside = self.inside();
        let writing = inside.tempo.settled(places.len());
        sites.iter().for_each(|site| inside.queue.release(*site));
        if let Some(written) = written {
            inside.room.wrote(written.bytes, written.took, writing, written.full);
            inside.tempo.fit(&written);
        }
        places.iter().for_each(|place| inside.leave(*place));
        inside.let_in();
        let ready = inside.queue.ready().items;
        inside.tempo.gather(ready);
        self.look(&inside);
        let ring = inside.tempo.gathers() || inside.closed;
        drop(inside);
        if ring {
            self.bell.notify_one();
        }
    }

    fn look(&self, inside: &Inside) {
        self.full.store(inside.room.is_full(), Ordering::Relaxed);
        self.pressed.store(inside.room.is_pressed(), Ordering::Relaxed);
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        // Whoever broke while holding it broke between two whole states: nothing here can panic halfway.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    /// Counts and queues what was admitted.
    fn seat(&mut self, waiting: Waiting) {
        let site = waiting.event.site_id;
        let room = if waiting.patient { &mut self.patient } else { &mut self.room };
        room.enter(site, waiting.counted);
        self.queue.push(site, waiting.counted, Box::new(waiting));
        self.tempo.gather(self.queue.ready().items);
    }

    /// Whether a writer has to hear of what was seated just now. If a batch `gathered` before, somebody waits for its moment already.
    fn wakes(&self, gathered: bool) -> bool {
        !gathered || self.due() == Due::Now
    }

    /// When the next batch is to be taken.
    fn due(&self) -> Due {
        self.tempo.due(Instant::now(), self.queue.ready(), self.closed)
    }

    fn leave(&mut self, place: Place) {
        let room = if place.patient { &mut self.patient } else { &mut self.room };
        room.leave(place.site, place.counted);
    }

    /// Whether there is room for so much of each of these sites. Together they may be more than there is, so each is asked for with those before
    /// it inside.
    fn admits(&mut self, sites: &[(SiteId, usize)]) -> bool {
        let room = &mut self.room;
        let counted: Vec<(SiteId, usize)> = sites.iter().map(|(site, sum)| (*site, room.counted(*sum))).collect();
        let goes_in = |(site, counted): &&(SiteId, usize)| {
            let admitted = room.admits(*site, *counted);
            if admitted {
                room.enter(*site, *counted);
            }
            admitted
        };
        let inside = counted.iter().take_while(goes_in).count();
        counted[..inside].iter().for_each(|(site, counted)| self.room.leave(*site, *counted));
        inside == counted.len()
    }

    /// Lets in those who wait for space, each site in its turn, as many as fit.
    fn let_in(&mut self) {
        while let Some(weight) = self.asking.next_weight() {
            let counted = self.patient.counted(weight);
            if !self.patient.fits(counted) {
                return;
            }
            let Some((site, asking)) = self.asking.pop() else { return };
            self.asking_room.leave(site, asking.counted);
            // Who has gone in the meantime is not written.
            if asking.taken.send(()).is_ok() {
                self.seat(Waiting { since: Instant::now(), ..*asking.waiting });
            }
        }
    }
}

impl Waiting {
    fn place(&self) -> Place {
        Place { site: self.event.site_id, counted: self.counted, patient: self.patient }
    }
}

impl Batch {
    /// Tells everybody; one outcome an event, in order.
    pub fn settle(mut self, outcomes: Vec<Outcome>) {
        debug_assert_eq!(outcomes.len(), self.answers.len(), "one outcome an event");
        let places = std::mem::take(&mut self.places);
        // Before the answers, so that whoever hears one finds the space free.
        let (bytes, took, full) = (self.bytes, self.begun.elapsed(), self.full);
        self.room.settle(&places, &self.sites, Some(Written { events: self.answers.len(), bytes, took, full }));
        for (sender, outcome) in std::mem::take(&mut self.answers).into_iter().zip(outcomes) {
            answer(sender, outcome);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        if !self.places.is_empty() {
            self.room.settle(&self.places, &self.sites, None);
        }
    }
}

fn answer(sender: oneshot::Sender<Outcome>, outcome: Outcome) {
    telemetry::count_outcome(&outcome);
    // A caller that hung up does not want its answer; the event is stored all the same.
    let _ = sender.send(outcome);
}

fn weight(event: &Event) -> usize {
    event.weight() + OVERHEAD
}

/// About what events will weigh: most of what came is kept as it came.
fn about(wanted: &Wanted) -> usize {
    wanted.events.saturating_mul(Event::LEAST_WEIGHT + OVERHEAD).saturating_add(wanted.bytes)
}

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod tests;
