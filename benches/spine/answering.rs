//! The reference of `sync`: the server's own public listener in front of a transport that answers *stored* and stores nothing.
//!
//! Everything before the transport is the product's code: reading, parsing, the site's look-up, origin, acceptance, the answer. The bench
//! runs itself as this process. No such transport is in the product.

use std::sync::Arc;

use anyhow::Context;
use async_trait::async_trait;
use axum::Router;
use opsmantik::directory::Directory;
use opsmantik::domain::attribution::Attribution;
use opsmantik::domain::event::Event;
use opsmantik::domain::id::SessionKey;
use opsmantik::domain::outcome::{Outcome, Receipt};
use opsmantik::http::client_address::TrustedProxies;
use opsmantik::http::limit::RateLimit;
use opsmantik::http::serve::{Limits, serve};
use opsmantik::http::signature::Verifier;
use opsmantik::http::{BODY_PATIENCE, PublicState, body_room, delivery_room, public_router};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::queue::{Transport, Verdict};
use opsmantik::store::Store;
use opsmantik::telemetry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Set for the process that is to be this.
pub const VARIABLE: &str = "OPSMANTIK_BENCH_ANSWERING";

/// Answers as if it had stored.
struct Answering;

#[async_trait]
impl Transport for Answering {
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict> {
        let receipt = |event: &Event| Receipt {
            session: SessionKey { site_id: event.site_id, month: event.arrival_month(), id: event.session_id },
            signals: event.signals,
            attribution: Attribution::OrganicReferral,
        };
        events.iter().map(|event| Verdict::Final(Outcome::Stored(receipt(event)))).collect()
    }
}

/// Serves until the process is told to end.
pub async fn run() -> anyhow::Result<()> {
    telemetry::start_logging();
    telemetry::prometheus();
    let store = Store::new(&std::env::var("DATABASE_URL")?, 4).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let stop = CancellationToken::new();
    tokio::spawn(telemetry::fold_samples(stop.clone()));
    tracing::info!(http.addr = %address, "listening");
    let serving = tokio::spawn(serve(listener, router(store), Limits::default(), stop.clone()));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    terminate.recv().await;
    stop.cancel();
    serving.await.context("the listener")
}

fn router(store: Store) -> Router {
    public_router(PublicState {
        directory: Directory::new(store.clone()),
        transport: Arc::new(Answering),
        pipeline: Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default()),
        store,
        limit: Arc::new(RateLimit::new(0)),
        proxies: Arc::new(TrustedProxies::new(Vec::new())),
        verifier: Arc::new(Verifier::without_keys()),
        body_patience: BODY_PATIENCE,
        body_room: body_room(),
        delivery_room: delivery_room(),
    })
}
