//! From accepted events to outcomes: every door hands its events to this one pipeline.
//!
//! ```text
//! submit         ─▶ waiting room (bounded in bytes) ─┐
//!                      no space for the site: Busy   ├▶ batch, sites in turn ─▶ one transaction a month ─▶ an outcome an event
//! take_when_room ─▶ a room of its own ───────────────┘   (writer.rs: retry, isolate)   (store)
//!                      full: wait
//! ```
//!
//! An idle server writes single events at once, a busy one writes large batches: what is waiting when nothing is being written is a round, of two
//! batches beside each other, each with its share of the sites that have something, and of three where more waits than fits into one. Who is
//! answered with one round mostly is in the next, so that waits for them for a moment; another batch begins beside a round when it is half full, or
//! after a moment (`tempo.rs`). The rooms are counted in bytes, so memory stays flat.
//! Who can wait for room has one apart: those who wait would else take every place that becomes free, and those who cannot would find none.
//!
//! Sites share it fairly. Each has a lane of its own (`fair_queue.rs`) in which events keep the order of their coming, and gets its turn in
//! every batch; each may hold what it leaves to others (`room.rs`), so that a flood of one is refused while the next one still finds space.
//! A refusal costs next to nothing, and comes before anything else is done where that can be known ([`Pipeline::pressure`]); thousands of them are told
//! a little later (`pace.rs`).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::domain::event::Event;
use crate::domain::id::SiteId;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::keeper::Nudge;
use crate::store::Store;
use crate::store::dead_letters::Undertaker;
use crate::telemetry;
use pace::Pace;
use waiting::WaitingRoom;

mod batch;
mod consequences;
pub mod followers;
mod locked;
mod pace;
mod room;
mod tempo;
mod waiting;
mod writer;

/// Bounds of the pipeline.
#[derive(Debug, Clone, Copy)]
pub struct PipelineConfig {
    /// Concurrent transactions; each takes one database connection.
    pub writers: usize,
    /// Most events in one transaction ...
    pub batch: usize,
    /// ... and most visits: each takes locks, and PostgreSQL has a table of a fixed size for all of them ...
    pub batch_visits: usize,
    /// ... and most bytes, roughly: while it is written, a batch is there several times over.
    pub batch_bytes: usize,
    /// Most bytes of events that wait or are being written, roughly.
    pub room_bytes: usize,
    /// The same for events of those who wait for room.
    pub patient_room_bytes: usize,
    /// Within this time from its coming an event is stored or called unavailable, retries included. Three quarters of it are the longest wait
    /// for a writer; of who can wait for longer, an eighth of it after that.
    pub patience: Duration,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        Self {
            writers: 4,
            batch: 512,
            batch_visits: 256,
            batch_bytes: 3 << 20,
            room_bytes: 32 << 20,
            patient_room_bytes: 16 << 20,
            patience: Duration::from_secs(8),
        }
    }
}

/// How near the waiting room is to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressure {
    /// There is space enough.
    Low,
    /// Some sites may find none: worth asking before much is done for a request.
    High,
    /// Nobody finds any.
    Full,
}

/// Events of one site that somebody brings, before they are understood.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub site: SiteId,
    pub events: usize,
    /// Of all of them, as they came.
    pub bytes: usize,
}

/// How often those who have waited too long are looked for.
const SWEEP: Duration = Duration::from_millis(250);

/// An event that the pipeline has taken and not yet settled. It is settled all the same when this is dropped.
#[derive(Debug)]
pub struct Taken(oneshot::Receiver<Outcome>);

impl Taken {
    /// Waits for the commit.
    pub async fn outcome(self) -> Outcome {
        self.0.await.unwrap_or(Outcome::Unavailable(Unavailable::Stopping))
    }
}

/// The handle to the pipeline; clones share it.
#[derive(Clone)]
pub struct Pipeline {
    room: Arc<WaitingRoom>,
    refusals: Arc<Pace>,
    writers: TaskTracker,
    closing: CancellationToken,
}

impl Pipeline {
    /// Starts the writers. They end when [`Pipeline::drain`] is called.
    pub fn start(store: Store, keeper: Nudge, config: PipelineConfig) -> Self {
        let undertaker = Arc::new(store.clone());
        Self::start_with(store, keeper, undertaker, config)
    }

    /// The same with somebody else who keeps what dies: who replays dead letters has them already.
    pub fn start_with(store: Store, keeper: Nudge, undertaker: Arc<dyn Undertaker>, config: PipelineConfig) -> Self {
        let room = Arc::new(WaitingRoom::new(config));
        let pipeline = Self {
            room: room.clone(),
            refusals: Arc::new(Pace::new()),
            writers: TaskTracker::new(),
            closing: CancellationToken::new(),
        };
        let writer = writer::Writer::new(store, keeper, undertaker, config);
        for _ in 0..config.writers.max(1) {
            pipeline.writers.spawn(write_until_closed(writer.clone(), room.clone()));
        }
        pipeline.writers.spawn(sweep(room, config.patience * 3 / 4, pipeline.closing.clone()));
        pipeline.writers.close();
        pipeline
    }

    /// Stores events; one outcome an event, in the same order. Waits for the commit, never for room: all of them are taken, or none.
    pub async fn submit(&self, events: Vec<Event>) -> Vec<Outcome> {
        let asked = events.len();
        match self.room.take(events) {
            Ok(taken) => {
                let mut outcomes = Vec::with_capacity(asked);
                for taken in taken {
                    outcomes.push(Taken(taken).outcome().await);
                }
                outcomes
            }
            Err(why) => {
                let outcome = Outcome::Unavailable(why);
                // What the writers never saw is counted here, all else where it is answered.
                (0..asked).for_each(|_| telemetry::count_outcome(&outcome));
                vec![outcome; asked]
            }
        }
    }

    /// Takes an event as soon as there is room for it. Whoever asks has at most a few events that wait like this; where too many do, it is told so.
    pub async fn take_when_room(&self, event: Event) -> Result<Taken, Unavailable> {
        let taken = self.room.take_patiently(event).await;
        taken.map(Taken).inspect_err(|why| telemetry::count_outcome(&Outcome::Unavailable(*why)))
    }

    /// How near the room is to its end. Costs nothing, and is asked before a request is read or understood.
    pub fn pressure(&self) -> Pressure {
        self.room.pressure()
    }

    /// Whether [`Pipeline::submit`] would refuse these together now, as far as that can be told before they are understood. To be asked when there is
    /// pressure.
    pub fn refuses(&self, wanted: &[Wanted]) -> bool {
        self.room.refuses(wanted)
    }

    /// Waits until a door may tell one more refusal. To be called when everything else of the request is done and its memory is free.
    pub async fn before_a_refusal(&self) {
        self.refusals.wait().await;
    }

    /// Takes nothing more, finishes what was taken.
    pub async fn drain(&self) {
        self.room.close();
        self.closing.cancel();
        self.writers.wait().await;
    }
}

async fn write_until_closed(writer: writer::Writer, room: Arc<WaitingRoom>) {
    while let Some(mut batch) = room.batch().await {
        let writing = writer.write(std::mem::take(&mut batch.events), batch.since);
        match AssertUnwindSafe(writing).catch_unwind().await {
            Ok(outcomes) => batch.settle(outcomes),
            // Its callers are told as it is dropped. A writer that is gone for one batch would be gone for all.
            Err(_) => tracing::error!("a writer broke, and its batch with it"),
        }
    }
}

async fn sweep(room: Arc<WaitingRoom>, longest: Duration, closing: CancellationToken) {
    let mut tick = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            _ = tick.tick() => room.send_away(longest),
        }
    }
}
