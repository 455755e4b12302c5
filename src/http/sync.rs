//! `POST /api/sync`: the public door, for the tracker in visitors' browsers.
//!
//! Room → size and time → JSON → `s` → the site exists → its origin → rate → each event → the transport. Nothing is processed for a site that does not
//! exist. Once the body is here, the work goes on even if the browser hangs up: a click on a telephone link leaves the page.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use chrono::Utc;
use http::{Method, StatusCode};
use std::net::IpAddr;

use super::answer::{self, Fate, Problem};
use super::body::{self, Held};
use super::client_address::Client;
use super::cors::{Sender, hidden};
use super::trouble::logged;
use super::turn::Asking;
use super::wire::{self, Body, WireEvent};
use super::{PublicState, client_address, early, peer};
use crate::domain::event::Arrival;
use crate::domain::refusal::Refusal;
use crate::domain::site::Site;
use crate::pipeline::Pressure;

/// Where it is, and how it is called in logs and metrics.
pub(super) const ROUTE: &str = "/api/sync";

/// What this address takes.
const ALLOW: &str = "POST, OPTIONS";

/// After so many events of a batch others get a chance to run: a fraction of a millisecond.
const IN_A_ROW: usize = 8;

/// What is known of a request beside its body.
struct Caller {
    sender: Sender,
    address: IpAddr,
    arrival: Arrival,
    /// For its turns with the processors.
    asking: Asking,
}

pub async fn sync(State(state): State<Arc<PublicState>>, request: Request) -> Response {
    let response = answered(&state, request).await;
    if matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        state.pipeline.before_a_refusal().await;
    }
    response
}

async fn answered(state: &Arc<PublicState>, request: Request) -> Response {
    let sender = Sender::of(request.headers());
    if request.method() == Method::OPTIONS {
        return sender.preflight(&state.directory).await;
    }
    if request.method() != Method::POST {
        return sender.shown_to_customers(&state.directory, Problem::method_not_allowed(ALLOW)).await;
    }
    let (parts, body) = request.into_parts();
    let address = state.proxies.client(peer(&parts), &parts.headers);
    let arrival = client_address::arrival(&parts.headers, address, Utc::now());
    let (room, client) = (&state.body_room, Client::of(address));
    let wanted = match state.transport.pressure() {
        Pressure::Full => body::refuse_unread(&parts.headers, body, room, client),
        Pressure::Low | Pressure::High => Ok(body),
    };
    let read = match wanted {
        Ok(body) => body::read(&parts.headers, body, wire::MAX_BODY, state.body_patience, room, client).await,
        Err(problem) => Err(problem),
    };
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(problem) => return sender.shown_to_customers(&state.directory, logged(ROUTE, problem)).await,
    };
    let asking = Asking::of(&parts.headers, bytes.len());
    if let Some(refusal) = early::refusal(state, &sender, asking, &bytes).await {
        return refusal;
    }
    super::to_the_end(take(state.clone(), Caller { sender, address, arrival, asking }, bytes)).await
}

async fn take(state: Arc<PublicState>, caller: Caller, read: Held) -> Response {
    let (bytes, _room) = read.apart();
    let found = find_site(&state, caller.asking, &bytes).await;
    // What was understood is kept, what was read no longer.
    drop(bytes);
    let (body, site) = match found {
        Ok(found) => found,
        Err(problem) => return caller.sender.shown_to_customers(&state.directory, logged(ROUTE, problem)).await,
    };
    if let Err(problem) = caller.sender.admit(&site) {
        return hidden(problem);
    }
    match hand_over(&state, &caller, &site, body).await {
        Ok(response) => caller.sender.shown(response),
        Err(problem) => caller.sender.shown(logged(ROUTE, problem)),
    }
}

/// Reads the body as far as its site, and looks that up.
async fn find_site(state: &PublicState, asking: Asking, bytes: &[u8]) -> Result<(Body, Arc<Site>), Problem> {
    let body = asking.in_turn(|| wire::read(bytes)).await??;
    let events = match &body {
        Body::One(event) => std::slice::from_ref(&**event),
        Body::Batch(events) => events,
    };
    let naming = events.iter().find(|event| event.site.is_ok()).or(events.first());
    let Some(event) = naming else { return Err(Refusal::missing("events", "at least one event").into()) };
    let site = state.directory.site(event.site.as_deref().map_err(Clone::clone)?).await?;
    let site = site.ok_or_else(|| event.unknown_site())?;
    Ok((body, site))
}

async fn hand_over(state: &PublicState, caller: &Caller, site: &Site, body: Body) -> Result<Response, Problem> {
    if let Body::Batch(events) = &body {
        one_site(events, site)?;
    }
    state.limit.check(site.id, caller.address).map_err(Problem::rate_limited)?;
    match body {
        Body::One(event) => {
            let event = caller.asking.in_turn(|| event.accept(site.id, &caller.arrival)).await??;
            let id = event.id;
            let verdicts = state.transport.hand_over(vec![event]).await;
            answer::to_one(id, *verdicts.first().ok_or_else(Problem::internal)?)
        }
        Body::Batch(events) => hand_over_batch(state, caller, site, events).await,
    }
}

async fn hand_over_batch(
    state: &PublicState,
    caller: &Caller,
    site: &Site,
    read: Vec<WireEvent>,
) -> Result<Response, Problem> {
    let mut accepted = Vec::with_capacity(read.len());
    let mut fates = Vec::with_capacity(read.len());
    let turn = caller.asking.turn().await?;
    for (at, wire) in read.into_iter().enumerate() {
        if at % IN_A_ROW == IN_A_ROW - 1 {
            tokio::task::yield_now().await;
        }
        let sent_id = wire.event_id(site.id);
        let checked = match &wire.site {
            Ok(_) => wire.accept(site.id, &caller.arrival),
            Err(refusal) => Err(refusal.clone()),
        };
        fates.push(match checked {
            Ok(event) => {
                let id = event.id;
                accepted.push(event);
                Ok(id)
            }
            Err(refusal) => Err((sent_id, refusal)),
        });
    }
    drop(turn);
    let mut verdicts = match accepted.is_empty() {
        true => Vec::new(),
        false => state.transport.hand_over(accepted).await,
    }
    .into_iter();
    let fate = |fate| match fate {
        Ok(id) => verdicts.next().map(|verdict| Fate::HandedOver(id, verdict)).ok_or_else(Problem::internal),
        Err((id, refusal)) => Ok(Fate::Refused(id, refusal)),
    };
    answer::to_batch(fates.into_iter().map(fate).collect::<Result<_, _>>()?)
}

/// A batch belongs to one site, by whichever of its names.
fn one_site(events: &[WireEvent], site: &Site) -> Result<(), Problem> {
    let names = |text: &str| text == site.public_id || text.parse().is_ok_and(|id| site.id == id);
    let first = events.iter().find_map(|event| event.site.as_deref().ok());
    match events.iter().find(|event| event.site.as_deref().is_ok_and(|text| Some(text) != first && !names(text))) {
        Some(stranger) => Err(stranger.other_site().into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that a call's state takes, whoever makes it.
    fn state<A, F>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// It is moved several times on its way, and each that waits keeps it: 8 and 10 KiB as long as it had room for looking up its site.
    #[test]
    fn a_request_carries_no_room_for_what_is_seldom_needed() {
        let taken = state(|(state, caller, read)| take(state, caller, read));
        let whole = state(|(state, request)| sync(state, request));
        assert!(taken < 3 << 10 && whole < 6 << 10, "{taken} and {whole} bytes");
    }
}
