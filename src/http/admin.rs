//! The operator's listener: `/healthz`, `/readyz`, `/metrics`.
//!
//! *Healthy* means the process runs: a supervisor that restarts a healthy server because the database is away helps nobody. *Ready* means that an
//! event sent now would be stored: the database answers, every leaf is as it must be, the next months are there, and the last events could be
//! written. What is in the way of the change feed, or of a queue that an edge can do without, is a warning beside it, since events can be stored
//! all the same. A worker has nothing but its queue.

use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use chrono::Utc;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::json;
use tokio::time::timeout;

use super::answer::{Problem, json_response};
use crate::domain::month::Month;
use crate::feed::Feed;
use crate::queue::nats::Nats;
use crate::store::Store;
use crate::telemetry;

/// A readiness that comes later than this is none.
const PATIENCE: Duration = Duration::from_secs(2);
/// This month and the next have to be there. The keeper makes more, and has that long to do it.
const MONTHS_NEEDED: i32 = 1;

/// What the operator's listener looks at.
#[derive(Clone)]
pub struct AdminState {
    pub store: Store,
}

/// The queue as readiness sees it.
#[derive(Clone)]
pub struct QueueState {
    pub nats: Nats,
    /// Whether nothing is stored without it.
    pub needed: bool,
}

/// The routes of the operator's listener. With a [`Feed`] or a [`QueueState`] as an extension, `/readyz` tells what is in its way.
pub fn admin_router(state: AdminState) -> Router {
    Router::new()
        .route("/healthz", get(async || json_response(StatusCode::OK, &json!({"ok": true}))))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed("GET, HEAD"))
        .layer(axum::middleware::map_response(super::secured))
        .with_state(state)
}

async fn readyz(
    State(state): State<AdminState>,
    feed: Option<Extension<Feed>>,
    queue: Option<Extension<QueueState>>,
) -> Response {
    let (mut reasons, mut warnings) = (reasons(&state.store).await, Vec::new());
    if let Some(Extension(queue)) = queue
        && let Some(why) = queue.nats.obstacle(queue.needed)
    {
        if queue.needed { &mut reasons } else { &mut warnings }.push(format!("queue: {why}"));
    }
    if !reasons.is_empty() {
        return json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"ready": false, "reasons": reasons}));
    }
    if let Some(Extension(feed)) = feed
        && let Some(why) = feed.obstacle().await
    {
        warnings.push(format!("feed: Watch cannot be served: {why}"));
    }
    let mut body = json!({"ready": true});
    if !warnings.is_empty() {
        body["warnings"] = json!(warnings);
    }
    json_response(StatusCode::OK, &body)
}

async fn reasons(store: &Store) -> Vec<String> {
    let readiness = match timeout(PATIENCE, store.readiness(Month::of(Utc::now()), MONTHS_NEEDED)).await {
        Err(_) => return vec![format!("database: no answer within {} s", PATIENCE.as_secs())],
        Ok(Err(error)) if error.is_missing_schema() => return vec![format!("schema: {}", error.detail)],
        Ok(Err(error)) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "not ready: the database is away");
            return vec!["database: away, see the log".to_owned()];
        }
        Ok(Ok(readiness)) => readiness,
    };
    let faults = readiness.faults.into_iter().map(|fault| format!("storage: {fault}"));
    let missing = readiness.missing_months.iter().map(|month| format!("partition: the month {month} is missing"));
    let trouble = store.write_trouble().map(|why| format!("storage: events could not be written a moment ago: {why}"));
    faults.chain(missing).chain(trouble).collect()
}

async fn metrics() -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::prometheus().render()).into_response()
}
