//! The worker's side: fetches, hands to the pipeline, and acknowledges after the commit.
//!
//! A worker takes a bounded number of events at a time and asks for more when they are settled, so the database sets the pace and the rest waits
//! in the stream. What cannot be stored now comes again after a pause; while nothing can be stored, it asks for single events. What never can be
//! stored is buried in `dead_letters` first and only then taken out of the stream. A worker that dies leaves what it had to the others.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{AckKind, Message};
use chrono::Utc;
use futures::{FutureExt, StreamExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::stream::{ACK_WAIT, CONSUMER};
use super::{ANSWER, Nats, Status};
use crate::directory::Directory;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::pipeline::Pipeline;
use crate::queue::corpse::read_job;
use crate::store::Store;
use crate::telemetry;

/// Requests for events under way at once: while the events of one are being stored, another brings the next.
const PULLS: usize = 4;
/// Events of one request.
const PULL: usize = 128;
/// Events that one worker has at a time.
pub(super) const AT_ONCE: usize = PULLS * PULL;
/// How long a request waits for events.
const PULL_FOR: Duration = Duration::from_secs(2);
/// NATS ends a request in time, unless it was restarted and has forgotten it.
const FORGOTTEN: Duration = Duration::from_millis(2500);
/// Pause before the next request when this one came to nothing.
const PAUSE: Duration = Duration::from_millis(500);
/// First pause before an event comes again; the next ones are longer.
const AGAIN: Duration = Duration::from_millis(500);
/// Longest such pause while the database is away: what waits is stored soon after it is back ...
const AGAIN_AT_MOST: Duration = Duration::from_secs(5);
/// ... and while a month is missing, which only a person may be able to mend.
const AGAIN_AT_MOST_FOR_A_MONTH: Duration = Duration::from_secs(60);

/// Stores what is in the stream.
#[derive(Clone)]
pub struct Worker {
    nats: Nats,
    pipeline: Pipeline,
    directory: Directory,
    store: Store,
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    /// It is in the tables.
    Stored,
    /// It never will be; it lies in `dead_letters`.
    Buried,
    /// It has to come again.
    Again(Unavailable),
}

/// What became of a request for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pulled {
    /// Events were settled, or there were none.
    Fine,
    /// None of them could be.
    NothingStored,
    /// NATS cut it short, or is away.
    NoAnswer,
}

impl Worker {
    pub fn new(nats: Nats, pipeline: Pipeline, directory: Directory, store: Store) -> Self {
        Self { nats, pipeline, directory, store }
    }

    /// Works until `stop`, then finishes and acknowledges what it took.
    pub async fn run(self, stop: CancellationToken) {
        let worker = Arc::new(self);
        let mut pulls = JoinSet::new();
        for _ in 0..PULLS {
            pulls.spawn(worker.clone().keep_pulling(stop.clone()));
        }
        while let Some(ended) = pulls.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task that fetches events broke");
            }
        }
        worker.nats.flush().await;
    }

    async fn keep_pulling(self: Arc<Self>, stop: CancellationToken) {
        let (mut consumer, mut events) = (None, PULL);
        while !stop.is_cancelled() {
            if consumer.is_none() {
                consumer = self.consumer().await;
            }
            let pulled = match &consumer {
                Some(consumer) => self.pull(consumer, events, &stop).await,
                None => Pulled::NoAnswer,
            };
            // One that comes to nothing is enough to learn that the database is still away.
            events = if pulled == Pulled::NothingStored { 1 } else { PULL };
            if pulled == Pulled::NoAnswer {
                consumer = None;
            }
            if pulled != Pulled::Fine {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = sleep(PAUSE) => {}
                }
            }
        }
    }

    /// The consumer that all workers share, by the connection that there is now. It ends with that.
    async fn consumer(&self) -> Option<Consumer<pull::Config>> {
        if matches!(&*self.nats.status.borrow(), Status::Away(_) | Status::Unfit(_)) {
            return None;
        }
        let connection = self.nats.connection()?;
        let found = connection.jetstream.get_consumer_from_stream(CONSUMER, &self.nats.config.stream).await;
        found.inspect_err(|error| tracing::debug!(%error, "the consumer cannot be found now")).ok()
    }

    /// Fetches up to `events` and settles them.
    async fn pull(
        self: &Arc<Self>,
        consumer: &Consumer<pull::Config>,
        events: usize,
        stop: &CancellationToken,
    ) -> Pulled {
        let mut messages = match consumer.batch().max_messages(events).expires(PULL_FOR).messages().await {
            Ok(messages) => messages,
            Err(error) => {
                tracing::debug!(%error, "no events can be fetched now");
                return Pulled::NoAnswer;
            }
        };
        let forgotten = Instant::now() + FORGOTTEN;
        let (mut handled, mut answered) = (JoinSet::new(), true);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                next = messages.next() => match next {
                    Some(Ok(message)) => {
                        let worker = self.clone();
                        handled.spawn(async move { worker.handle(message).await });
                    }
                    Some(Err(error)) => {
                        tracing::debug!(error, "fetching events was cut short");
                        answered = false;
                        break;
                    }
                    None => break,
                },
                () = sleep_until(forgotten) => {
                    answered = false;
                    break;
                }
            }
        }
        // What has come and was not begun is another worker's at once, and not after the wait for an acknowledgement.
        while let Some(Some(Ok(message))) = messages.next().now_or_never() {
            self.answer(&message, AckKind::Nak(None)).await;
        }
        drop(messages);
        let (mut settled, mut unsettled) = (0, 0);
        while let Some(done) = handled.join_next().await {
            let done = done.unwrap_or_else(|error| {
                tracing::error!(%error, "a delivery broke the server's own code; it comes again");
                false
            });
            if done { settled += 1 } else { unsettled += 1 }
        }
        match (answered, settled, unsettled) {
            (false, ..) => Pulled::NoAnswer,
            (true, 0, 1..) => Pulled::NothingStored,
            (true, ..) => Pulled::Fine,
        }
    }

    /// Settles one delivery and says so to NATS: whether it is done with.
    async fn handle(&self, message: Message) -> bool {
        let settling = self.settle(&message);
        tokio::pin!(settling);
        let deed = loop {
            tokio::select! {
                deed = &mut settling => break deed,
                // Nobody else needs to try meanwhile.
                () = sleep(ACK_WAIT / 3) => self.answer(&message, AckKind::Progress).await,
            }
        };
        let (kind, outcome) = match deed {
            Deed::Stored => (AckKind::Ack, "stored"),
            Deed::Buried => (AckKind::Term, "buried"),
            Deed::Again(why) => {
                let deliveries = message.info().map_or(1, |info| info.delivered);
                (AckKind::Nak(Some(pause(why, deliveries))), "again")
            }
        };
        metrics::counter!(telemetry::NATS_DELIVERIES_TOTAL, "outcome" => outcome).increment(1);
        self.answer(&message, kind).await;
        !matches!(deed, Deed::Again(_))
    }

    /// Says to NATS what became of a delivery. What it does not hear comes again, which changes nothing.
    ///
    /// It goes by the connection that the delivery came by, and with that.
    async fn answer(&self, message: &Message, kind: AckKind) {
        match timeout(ANSWER, message.ack_with(kind)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error, "NATS does not hear of a delivery; it comes again"),
            Err(_) => tracing::debug!("NATS does not hear of a delivery in time; it comes again"),
        }
    }

    async fn settle(&self, message: &Message) -> Deed {
        let (payload, now) = (&message.payload, Utc::now());
        let settled = match read_job(&self.directory, payload, now).await {
            Ok(Ok(event)) => match self.pipeline.take_when_room(event).await {
                Ok(taken) => Ok(taken.outcome().await),
                Err(why) => Err(why),
            },
            Ok(Err(corpse)) => corpse.bury(&self.store, "nats", payload, now).await.map(Outcome::Dead),
            Err(why) => Err(why),
        };
        match settled {
            Ok(Outcome::Stored(_) | Outcome::Duplicate(_)) => Deed::Stored,
            // The pipeline buries before it says so.
            Ok(Outcome::Dead(_)) => Deed::Buried,
            Ok(Outcome::Unavailable(why)) | Err(why) => Deed::Again(why),
        }
    }
}

/// How long an event that cannot be stored now stays in the stream before it comes again.
fn pause(why: Unavailable, deliveries: i64) -> Duration {
    let at_most = match why {
        // Another worker may have the room, now.
        Unavailable::Stopping => return Duration::ZERO,
        Unavailable::Busy | Unavailable::Database => AGAIN_AT_MOST,
        Unavailable::Partition => AGAIN_AT_MOST_FOR_A_MONTH,
    };
    let doublings = u32::try_from(deliveries.clamp(1, 16) - 1).unwrap_or(0);
    (AGAIN * 2u32.pow(doublings)).min(at_most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_comes_again_later_and_later_and_never_very_late() {
        let seconds = |why, deliveries| pause(why, deliveries).as_secs_f64();
        assert_eq!([1, 2, 3, 5, 10_000].map(|n| seconds(Unavailable::Database, n)), [0.5, 1.0, 2.0, 5.0, 5.0]);
        assert_eq!([1, 8, 1_000].map(|n| seconds(Unavailable::Partition, n)), [0.5, 60.0, 60.0]);
        assert_eq!(seconds(Unavailable::Stopping, 9), 0.0);
    }
}
