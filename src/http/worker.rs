//! `POST /api/sync/worker`: deliveries from QStash.
//!
//! Delivery is at least once and in any order; exactly-once is ours, by the event's id. The signature comes first, over the raw bytes. What can never
//! be stored is buried in `dead_letters` and only then answered 489, which stops QStash; while it cannot be buried either, QStash keeps it
//! (503) and hears when to come again, so that its few retries outlast a night without a database. What a delivery says is read in
//! [`delivery`](super::delivery).

use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use http::Method;
use http::header::RETRY_AFTER;

use super::answer::{self, Problem};
use super::client_address::Client;
use super::delivery;
use super::{PublicState, body, early, peer};
use crate::domain::outcome::Unavailable;
use crate::pipeline::Pressure;

/// Most bytes of a delivery: QStash's own limit.
const MAX_DELIVERY: usize = 1 << 20;

/// When QStash is to come again, by how often it came again before. It takes `Retry-After` for its own back-off and has three retries
/// ([`crate::queue::qstash`]): the first is for a restart, the second for a repair, the last for the next morning. After that the message would lie in
/// QStash's own dead letter queue.
const COME_AGAIN: [Duration; 3] =
    [Duration::from_secs(15), Duration::from_secs(15 * 60), Duration::from_secs(8 * 3600)];

pub async fn worker(State(state): State<PublicState>, request: Request) -> Response {
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
        Err(problem) => return patient(problem.into_response(), 0),
    };
    let signature = parts.headers.get("upstash-signature").and_then(|value| value.to_str().ok());
    if let Err(error) = state.verifier.verify(signature, &bytes) {
        tracing::warn!(http.route = "/api/sync/worker", %error, "a delivery was refused");
        return Problem::signature().into_response();
    }
    if state.pipeline.pressure() == Pressure::Full {
        return patient(logged(Unavailable::Busy.into()), retried);
    }
    let response = super::to_the_end(async move { take(&state, &bytes).await.unwrap_or_else(logged) }).await;
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
    let outcomes = match events.is_empty() {
        true => Vec::new(),
        false => state.pipeline.submit(events).await,
    };
    let answer = answer::to_delivery(&outcomes);
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

fn logged(problem: Problem) -> Response {
    if problem.is_server_side() {
        early::note("/api/sync/worker", &problem);
    }
    problem.into_response()
}
