//! From accepted events to outcomes: every door hands its events to this one pipeline.
//!
//! ```text
//! submit         ─▶ waiting room (bounded in bytes) ─┐
//!                      full: Busy                    ├▶ batch of one arrival month ─▶ one transaction ─▶ an outcome an event
//! take_when_room ─▶ a room of its own ───────────────┘   (writer.rs: retry, isolate)   (store)
//!                      full: wait
//! ```
//!
//! What is waiting when a writer becomes free is its batch: an idle server writes single events at once, a busy one
//! writes large batches, and nobody waits for a timer. Events wait in arrival order. The rooms are counted in bytes, so memory stays flat.
//! Who can wait for room has one apart: those who wait would else take every place that becomes free, and those who cannot would find none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::domain::event::Event;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::keeper::Nudge;
use crate::store::Store;
use crate::store::dead_letters::Undertaker;
use crate::telemetry;

mod batch;
mod writer;

/// Bounds of the pipeline.
#[derive(Debug, Clone, Copy)]
pub struct PipelineConfig {
    /// Concurrent transactions; each takes one database connection.
    pub writers: usize,
    /// Most events in one transaction.
    pub batch: usize,
    /// Most bytes of events that wait or are being written, roughly.
    pub room_bytes: usize,
    /// The same for events of those who wait for room.
    pub patient_room_bytes: usize,
    /// Within this time an event is stored or called unavailable, retries included.
    pub patience: Duration,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        Self {
            writers: 4,
            batch: 256,
            room_bytes: 32 << 20,
            patient_room_bytes: 8 << 20,
            patience: Duration::from_secs(8),
        }
    }
}

/// An event in the waiting room. Whoever drops it without an answer has broken a promise, and its caller hears *unavailable*.
struct Waiting {
    event: Event,
    since: Instant,
    answer: oneshot::Sender<Outcome>,
    _room: OwnedSemaphorePermit,
}

/// An event that the pipeline has taken and not yet settled. It is settled all the same when this is dropped.
#[derive(Debug)]
pub struct Taken(oneshot::Receiver<Outcome>);

impl Taken {
    /// Waits for the commit.
    pub async fn outcome(self) -> Outcome {
        self.0.await.unwrap_or(Outcome::Unavailable(Unavailable::Stopping))
    }
}

/// A bound on bytes that wait or are being written.
#[derive(Clone)]
struct Room {
    permits: Arc<Semaphore>,
    all: u32,
}

impl Room {
    fn of(bytes: usize) -> Self {
        let all = u32::try_from(bytes / PERMIT_BYTES).unwrap_or(u32::MAX).max(1);
        Self { permits: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// The permits that an event needs; one that is larger than the room gets the whole of it.
    fn needed(&self, event: &Event) -> u32 {
        u32::try_from(event.weight().div_ceil(PERMIT_BYTES)).map_or(self.all, |needed| needed.min(self.all))
    }

    fn try_enter(&self, event: &Event) -> Result<OwnedSemaphorePermit, Unavailable> {
        self.permits.clone().try_acquire_many_owned(self.needed(event)).map_err(|_| Unavailable::Busy)
    }

    /// In the order of asking, so that nobody waits forever.
    async fn enter(&self, event: &Event) -> Result<OwnedSemaphorePermit, Unavailable> {
        self.permits.clone().acquire_many_owned(self.needed(event)).await.map_err(|_| Unavailable::Stopping)
    }
}

/// The handle to the pipeline; clones share it.
#[derive(Clone)]
pub struct Pipeline {
    door: mpsc::UnboundedSender<Waiting>,
    room: Room,
    patient_room: Room,
    writers: TaskTracker,
    closing: tokio_util::sync::CancellationToken,
}

/// One permit of the waiting room stands for this many bytes.
const PERMIT_BYTES: usize = 256;

impl Pipeline {
    /// Starts the writers. They end when [`Pipeline::drain`] is called.
    pub fn start(store: Store, keeper: Nudge, config: PipelineConfig) -> Self {
        let undertaker = Arc::new(store.clone());
        Self::start_with(store, keeper, undertaker, config)
    }

    /// The same with somebody else who keeps what dies: who replays dead letters has them already.
    pub fn start_with(store: Store, keeper: Nudge, undertaker: Arc<dyn Undertaker>, config: PipelineConfig) -> Self {
        // The channel needs no bound of its own: nothing enters it without permits of the room.
        let (door, waiting) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(waiting));
        let pipeline = Self {
            door,
            room: Room::of(config.room_bytes),
            patient_room: Room::of(config.patient_room_bytes),
            writers: TaskTracker::new(),
            closing: tokio_util::sync::CancellationToken::new(),
        };
        for _ in 0..config.writers.max(1) {
            let writer = writer::Writer::new(store.clone(), keeper.clone(), undertaker.clone(), config);
            pipeline.writers.spawn(write_until_closed(writer, waiting.clone(), config, pipeline.closing.clone()));
        }
        pipeline.writers.close();
        pipeline
    }

    /// Stores events; one outcome an event, in the same order. Waits for the commit, never for room.
    pub async fn submit(&self, events: Vec<Event>) -> Vec<Outcome> {
        let answers: Vec<_> = events.into_iter().map(|event| self.enter(event)).collect();
        let mut outcomes = Vec::with_capacity(answers.len());
        for answer in answers {
            outcomes.push(match answer {
                Ok(taken) => taken.outcome().await,
                Err(unavailable) => Outcome::Unavailable(unavailable),
            });
        }
        outcomes
    }

    /// Takes an event as soon as there is room for it. Whoever asks has at most a few events that wait like this: they are outside the room.
    pub async fn take_when_room(&self, event: Event) -> Result<Taken, Unavailable> {
        let room = tokio::select! {
            biased;
            () = self.closing.cancelled() => Err(Unavailable::Stopping),
            room = self.patient_room.enter(&event) => room,
        };
        Self::counted(room.and_then(|room| self.admit(event, room)))
    }

    fn enter(&self, event: Event) -> Result<Taken, Unavailable> {
        let room = if self.closing.is_cancelled() { Err(Unavailable::Stopping) } else { self.room.try_enter(&event) };
        Self::counted(room.and_then(|room| self.admit(event, room)))
    }

    fn admit(&self, event: Event, room: OwnedSemaphorePermit) -> Result<Taken, Unavailable> {
        let (answer, receiver) = oneshot::channel();
        self.door
            .send(Waiting { event, since: Instant::now(), answer, _room: room })
            .map_err(|_| Unavailable::Stopping)?;
        Ok(Taken(receiver))
    }

    /// What the writers never saw is counted here, all else where it is answered.
    fn counted(taken: Result<Taken, Unavailable>) -> Result<Taken, Unavailable> {
        taken.inspect_err(|why| telemetry::count_outcome(&Outcome::Unavailable(*why)))
    }

    /// Takes nothing more, finishes what was taken.
    pub async fn drain(&self) {
        self.closing.cancel();
        self.writers.wait().await;
    }
}

async fn write_until_closed(
    writer: writer::Writer,
    waiting: Arc<Mutex<mpsc::UnboundedReceiver<Waiting>>>,
    config: PipelineConfig,
    closing: tokio_util::sync::CancellationToken,
) {
    loop {
        let mut batch = Vec::new();
        {
            let mut waiting = waiting.lock().await;
            tokio::select! {
                biased;
                taken = waiting.recv_many(&mut batch, config.batch) => if taken == 0 { return },
                () = closing.cancelled() => return,
            }
        }
        let since = batch.iter().map(|waiting| waiting.since).min().unwrap_or_else(Instant::now);
        let (events, answers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|waiting| (waiting.event, (waiting.answer, waiting._room))).unzip();
        let outcomes = writer.write(events, since).await;
        debug_assert_eq!(outcomes.len(), answers.len(), "one outcome an event");
        for ((answer, _room), outcome) in answers.into_iter().zip(outcomes) {
            telemetry::count_outcome(&outcome);
            // A caller that hung up does not want its answer; the event is stored all the same.
            let _ = answer.send(outcome);
        }
    }
}
