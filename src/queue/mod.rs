//! Who owns an event between the edge and the tables.
//!
//! The edge hands accepted events to a [`Transport`]. *Queued* and *durable* are different answers: a queue that took an event owns it from
//! then on and will deliver it to a worker; the pipeline ([`inline`]) answers once the event is committed. What a queue does not take goes to the
//! pipeline, event by event.

use async_trait::async_trait;

use crate::domain::event::Event;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::pipeline::{Pressure, Wanted};

mod breaker;
pub mod corpse;
pub mod inline;
pub mod nats;
pub mod qstash;

/// What a transport says of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The pipeline's outcome: the event is durable, dead or refused.
    Final(Outcome),
    /// A queue owns the event now and will bring it to the worker.
    Queued,
}

/// Takes accepted events from the edge.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Hands events over; one verdict an event, in the same order. Never fails as a whole, never drops an event in silence.
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict>;

    /// How near it is to taking nothing more. Asked before a request is read or understood, so that a refusal costs next to nothing.
    fn pressure(&self) -> Pressure {
        Pressure::Low
    }

    /// Whether these events would not be taken now, as far as that can be told before they are understood. To be asked when there is pressure.
    fn refuses(&self, _wanted: Wanted) -> bool {
        false
    }
}

/// By what a queue may tell that two messages are the same event: a retry has the same. The site is in it, and the session, since an id counts once
/// for a site and the month of its session. Copies that differ in it are one event all the same once they are stored.
fn identity(event: &Event) -> String {
    format!("{}/{}/{}", event.site_id, event.session_id, event.id)
}

/// Hands to `fallback` what the queue did not take, and says of each event who has it.
async fn fall_back(events: Vec<Event>, queued: &[bool], fallback: &dyn Transport) -> Vec<Verdict> {
    let left: Vec<Event> =
        events.into_iter().zip(queued).filter(|(_, queued)| !**queued).map(|(event, _)| event).collect();
    let stored = if left.is_empty() { Vec::new() } else { fallback.hand_over(left).await };
    let mut stored = stored.into_iter();
    let verdict = |queued: &bool| match queued {
        true => Verdict::Queued,
        false => stored.next().unwrap_or(Verdict::Final(Outcome::Unavailable(Unavailable::Stopping))),
    };
    queued.iter().map(verdict).collect()
}
