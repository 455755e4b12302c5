//! From accepted events to outcomes: every door hands its events to this one pipeline.
//!
//! ```text
//! submit ─▶ waiting room (bounded in bytes) ─▶ batch of one arrival month ─▶ one transaction ─▶ an outcome an event
//!                    full: Busy                  (writer.rs: retry, isolate)   (store)
//! ```
//!
//! What is waiting when a writer becomes free is its batch: an idle server writes single events at once, a busy one
//! writes large batches, and nobody waits for a timer. Events wait in arrival order. The room is counted in bytes, so memory stays flat.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::domain::event::Event;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::keeper::Nudge;
use crate::store::Store;
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
    /// Within this time an event is stored or called unavailable, retries included.
    pub patience: Duration,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        Self { writers: 4, batch: 256, room_bytes: 32 << 20, patience: Duration::from_secs(8) }
    }
}

/// An event in the waiting room. Whoever drops it without an answer has broken a promise, and its caller hears *unavailable*.
struct Waiting {
    event: Event,
    since: Instant,
    answer: oneshot::Sender<Outcome>,
    _room: OwnedSemaphorePermit,
}

/// The handle to the pipeline; clones share it.
#[derive(Clone)]
pub struct Pipeline {
    door: mpsc::UnboundedSender<Waiting>,
    room: Arc<Semaphore>,
    writers: TaskTracker,
    closing: tokio_util::sync::CancellationToken,
}

/// One permit of the waiting room stands for this many bytes.
const PERMIT_BYTES: usize = 256;

impl Pipeline {
    /// Starts the writers. They end when [`Pipeline::drain`] is called.
    pub fn start(store: Store, keeper: Nudge, config: PipelineConfig) -> Self {
        // The channel needs no bound of its own: nothing enters it without permits of the room.
        let (door, waiting) = mpsc::unbounded_channel();
        let waiting = Arc::new(Mutex::new(waiting));
        let pipeline = Self {
            door,
            room: Arc::new(Semaphore::new((config.room_bytes / PERMIT_BYTES).min(Semaphore::MAX_PERMITS))),
            writers: TaskTracker::new(),
            closing: tokio_util::sync::CancellationToken::new(),
        };
        for _ in 0..config.writers.max(1) {
            let writer = writer::Writer::new(store.clone(), keeper.clone(), config);
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
            let outcome = match answer {
                Ok(answer) => answer.await.unwrap_or(Outcome::Unavailable(Unavailable::Stopping)),
                Err(unavailable) => Outcome::Unavailable(unavailable),
            };
            telemetry::count_outcome(&outcome);
            outcomes.push(outcome);
        }
        outcomes
    }

    fn enter(&self, event: Event) -> Result<oneshot::Receiver<Outcome>, Unavailable> {
        if self.closing.is_cancelled() {
            return Err(Unavailable::Stopping);
        }
        let permits = u32::try_from(event.weight().div_ceil(PERMIT_BYTES)).map_err(|_| Unavailable::Busy)?;
        let room = self.room.clone().try_acquire_many_owned(permits).map_err(|_| Unavailable::Busy)?;
        let (answer, receiver) = oneshot::channel();
        self.door
            .send(Waiting { event, since: Instant::now(), answer, _room: room })
            .map_err(|_| Unavailable::Stopping)?;
        Ok(receiver)
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
            // A caller that hung up does not want its answer; the event is stored all the same.
            let _ = answer.send(outcome);
        }
    }
}
