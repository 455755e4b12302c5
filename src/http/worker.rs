//! `POST /api/sync/worker`: deliveries from QStash.
//!
//! Delivery is at least once and in any order; exactly-once is ours, by the event's id. The signature comes first, over the raw bytes. What can never
//! be stored is buried in `dead_letters` and only then answered 489, which stops QStash; while it cannot be buried either, QStash keeps it
//! (503) and hears when to come again, so that its few retries outlast a night without a database. So a delivery waits for room a while
//! before it is refused. What it says is read in [`delivery`](super::delivery).

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use futures::future::join_all;
use http::Method;
use http::header::RETRY_AFTER;
use tokio::time::{Instant, timeout_at};

use super::answer::{self, Problem};
use super::client_address::Client;
use super::delivery;
use super::trouble::logged;
use super::{PublicState, body, peer};
use crate::domain::event::Event;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::pipeline::{Pipeline, Taken};
use crate::telemetry;

/// Where it is, and how it is called in logs and metrics.
pub(super) const ROUTE: &str = "/api/sync/worker";

/// Most bytes of a delivery: QStash's own limit.
const MAX_DELIVERY: usize = 1 << 20;

/// When QStash is to come again, by how often it came again before. It takes `Retry-After` for its own back-off and has three retries
/// ([`crate::queue::qstash`]): the first is for a restart, the second for a repair, the last for the next morning. After that the message would lie in
/// QStash's own dead letter queue.
const COME_AGAIN: [Duration; 3] =
    [Duration::from_secs(15), Duration::from_secs(15 * 60), Duration::from_secs(8 * 3600)];

/// How long a delivery waits until all its events have room. A refusal costs it one of its few retries, and hours: what lasts a moment is outwaited.
/// What lasts longer is what the retries are for, and a delivery that waits keeps its place among the bodies and connections.
const ROOM_WITHIN: Duration = Duration::from_secs(5);

pub async fn worker(State(state): State<Arc<PublicState>>, request: Request) -> Response {
    if request.method() != Method::POST {
        return Problem::method_not_allowed("POST").into_response();
    }
    let (parts, body) = request.into_parts();
    let retried = parts.headers.get("upstash-retried").and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0);
    let client = Client::of(state.proxies.client(peer(&parts), &parts.headers));
    let room = &state.delivery_room;
    let read = body::read(&parts.headers, body, MAX_DELIVERY, state.body_patience, room, client).await;
    let bytes = match read {
        Ok(bytes) => bytes,
        // Bodies that others never end have been given up by then, and its few retries are for longer troubles.
        Err(problem) => return patient(logged(ROUTE, problem), 0),
    };
    let signature = parts.headers.get("upstash-signature").and_then(|value| value.to_str().ok());
    if let Err(error) = state.verifier.verify(signature, &bytes) {
        tracing::warn!(http.route = ROUTE, %error, "a delivery was refused");
        return Problem::signature().into_response();
    }
    let response =
        super::to_the_end(async move { take(&state, &bytes).await.unwrap_or_else(|problem| logged(ROUTE, problem)) })
            .await;
    patient(response, retried)
}

/// Spreads the retries of a delivery that cannot be stored now: what a browser is told, a few seconds, would use them all up within one outage.
fn patient(mut response: Response, retried: usize) -> Response {
    if let Some(wait) = response.headers_mut().get_mut(RETRY_AFTER) {
        *wait = COME_AGAIN[retried.min(COME_AGAIN.len() - 1)].as_secs().into();
    }
    response
}

async fn take(state: &PublicState, bytes: &[u8]) -> Result<Response, Problem> {
    let now = Utc::now();
    let (events, corpse) = delivery::read(&state.directory, bytes, now).await?;
    let answer = answer::to_delivery(&store(&state.pipeline, events).await?);
    match (corpse, answer) {
        // To be delivered again: the corpse will be there again, too.
        (Some(_), Err(problem)) if problem.is_server_side() => Err(problem),
        (Some(corpse), _) => {
            let reason = corpse.reason;
            corpse.bury(&state.store, "worker", bytes, now).await?;
            Err(Problem::undeliverable(reason))
        }
        (None, answer) => answer,
    }
}

/// Stores events as soon as there is room for them; one outcome an event, in the same order. What got in before one that did not is stored all the
/// same: it is a duplicate when the delivery comes again.
///
/// Deliveries have the room of those who can wait, so [`Pipeline::pressure`], which is of the other one, does not refuse them. What waits is
/// bounded here too: by the room for bodies, and by how many may ask for room at once.
async fn store(pipeline: &Pipeline, events: Vec<Event>) -> Result<Vec<Outcome>, Unavailable> {
    let deadline = Instant::now() + ROOM_WITHIN;
    let mut taken = Vec::with_capacity(events.len());
    for event in events {
        let asked = timeout_at(deadline, pipeline.take_when_room(event)).await;
        taken.push(asked.unwrap_or_else(|_| {
            telemetry::count_outcome(&Outcome::Unavailable(Unavailable::Busy));
            Err(Unavailable::Busy)
        })?);
    }
    Ok(join_all(taken.into_iter().map(Taken::outcome)).await)
}
