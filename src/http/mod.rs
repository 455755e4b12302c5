//! The HTTP shim: the public door, QStash's door, the tracker and the operator's listener.
//!
//! ```text
//! browser ─▶ sync   ─▶ wire ─▶ domain ─▶ transport (queue, or the pipeline itself)
//! QStash  ─▶ worker ─▶ signature ─▶ delivery ─▶ pipeline
//!                └───────── answer: one mapping from outcomes to answers ─────────┘
//! ```
//!
//! Everything from outside is bounded here: bytes, time, connections, requests of a client. Nothing below knows HTTP.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{ConnectInfo, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use http::header::X_CONTENT_TYPE_OPTIONS;
use http::{HeaderValue, request};

use crate::directory::Directory;
use crate::pipeline::Pipeline;
use crate::queue::Transport;
use crate::store::Store;
use crate::telemetry;
use answer::Problem;
pub use body::BodyRoom;
use client_address::TrustedProxies;
use limit::RateLimit;
use signature::Verifier;

pub mod admin;
pub mod answer;
mod body;
pub mod client_address;
mod cors;
pub mod delivery;
mod early;
pub mod limit;
mod script;
pub mod serve;
mod share;
pub mod signature;
mod sync;
mod trouble;
mod turn;
pub mod wire;
mod worker;
mod write_limit;

/// How long a body may take. 512 KiB in this time is slower than any network that still carries a page.
pub const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of all bodies of `/api/sync` that are being read or worked on: thirty of the largest, sixteen thousand of usual ones ...
const BODY_BYTES: usize = 16 << 20;
/// ... and most bodies that have not wholly come. A body is awaited for as long as a network takes, mostly not at all; each costs some ten KiB.
const BODIES_AWAITED: usize = 3 << 10;
/// The same of deliveries: eight of the largest, eight thousand of usual ones ...
const DELIVERY_BYTES: usize = 8 << 20;
/// ... from one sender, which brings many at once.
const DELIVERIES_AWAITED: usize = 1 << 10;

/// What the public listener needs; its requests share it.
pub struct PublicState {
    pub directory: Directory,
    /// Who takes events from `/api/sync`.
    pub transport: Arc<dyn Transport>,
    /// Who takes events from the worker: what came out of a queue does not go into one again.
    pub pipeline: Pipeline,
    /// For dead letters.
    pub store: Store,
    pub limit: Arc<RateLimit>,
    pub proxies: Arc<TrustedProxies>,
    pub verifier: Arc<Verifier>,
    pub body_patience: Duration,
    pub body_room: BodyRoom,
    /// Apart, so that browsers cannot take it.
    pub delivery_room: BodyRoom,
}

/// The room for bodies of `/api/sync`.
pub fn body_room() -> BodyRoom {
    BodyRoom::new(BODY_BYTES, BODIES_AWAITED)
}

/// The room for bodies of `/api/sync/worker`.
pub fn delivery_room() -> BodyRoom {
    BodyRoom::new(DELIVERY_BYTES, DELIVERIES_AWAITED)
}

/// The routes of the public listener.
pub fn public_router(state: PublicState) -> Router {
    Router::new()
        .route(sync::ROUTE, any(sync::sync))
        .route(worker::ROUTE, any(worker::worker))
        .route("/tracker.js", any(script::script))
        .fallback(async || Problem::not_found())
        .layer(axum::middleware::map_response(secured))
        .layer(axum::middleware::from_fn(measured))
        .with_state(Arc::new(state))
}

async fn secured(mut response: Response) -> Response {
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn measured(request: Request, next: Next) -> Response {
    let began = Instant::now();
    // The route and never the address: what strangers ask for is no label.
    let route = match request.uri().path() {
        sync::ROUTE => sync::ROUTE,
        worker::ROUTE => worker::ROUTE,
        "/tracker.js" => "/tracker.js",
        _ => "other",
    };
    let response = next.run(request).await;
    metrics::counter!(telemetry::HTTP_REQUESTS_TOTAL, "route" => route, "status" => response.status().as_str().to_owned()).increment(1);
    metrics::histogram!(telemetry::HTTP_REQUEST_SECONDS, "route" => route).record(began.elapsed().as_secs_f64());
    response
}

/// The other end of the socket; `serve` puts it there. Nobody's address if a test did not.
fn peer(parts: &request::Parts) -> IpAddr {
    let info = parts.extensions.get::<ConnectInfo<SocketAddr>>();
    info.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |ConnectInfo(peer)| peer.ip())
}

/// Runs to its end even if the client hangs up in between. Code that breaks its promise costs one request, and says so.
async fn to_the_end(work: impl Future<Output = Response> + Send + 'static) -> Response {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request broke the server's own code");
        Problem::internal().into_response()
    })
}
