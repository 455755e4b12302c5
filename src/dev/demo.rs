//! The demo page and what it asks: the visitor's own session, as it is stored. Served by `dev` only.
//!
//! The same routes hang on the public listener below `/demo` (same origin as the API) and on a listener of their own (another origin, as
//! on a customer's site). A visitor proves to be the owner of a session by knowing its random id, which is enough for a demo and for nothing else.

use axum::Router;
use axum::extract::{Query, State};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::domain::id::{SessionId, SiteId};
use crate::domain::month::Month;
use crate::domain::session::{Field, Session};
use crate::store::error::StoreError;
use crate::store::transaction::Purpose;
use crate::store::{Store, events, sessions};

/// The demo's site and where its API is.
#[derive(Clone)]
pub struct Demo {
    pub store: Store,
    pub site_id: SiteId,
    pub public_id: String,
    /// `http://127.0.0.1:8080`
    pub api_base: String,
}

/// Most events that the page is shown.
const SHOWN_EVENTS: i64 = 200;

impl Demo {
    /// The page at `{prefix}/`, its question at `{prefix}/session`; `prefix` is empty or begins with a slash.
    pub fn router(self, prefix: &str) -> Router {
        let page = if prefix.is_empty() { "/".to_owned() } else { prefix.to_owned() };
        let session_url = format!("{prefix}/session");
        let filled = [
            ("{{SITE_PUBLIC_ID}}", self.public_id.clone()),
            ("{{TRACKER_URL}}", format!("{}/tracker.js", self.api_base)),
            ("{{API_URL}}", format!("{}/api/sync", self.api_base)),
            ("{{SESSION_URL}}", session_url.clone()),
        ]
        .iter()
        .fold(include_str!("demo.html").to_owned(), |html, (name, value)| html.replace(name, &escaped(value)));
        Router::new().route(&page, get(async || Html(filled))).route(&session_url, get(session)).with_state(self)
    }
}

/// For an HTML attribute.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;").replace('\'', "&#39;")
}

#[derive(Deserialize)]
struct Asked {
    sid: String,
    sm: Month,
}

async fn session(State(demo): State<Demo>, Query(asked): Query<Asked>) -> Response {
    match demo.find(&asked).await {
        Ok(found) => axum::Json(found).into_response(),
        Err(error) => {
            tracing::warn!(%error, "the demo page cannot be answered");
            (StatusCode::SERVICE_UNAVAILABLE, axum::Json(json!({"found": false}))).into_response()
        }
    }
}

impl Demo {
    async fn find(&self, asked: &Asked) -> Result<Value, StoreError> {
        let id = SessionId::from_text(self.site_id, &asked.sid);
        let tx = self.store.begin(Purpose::Serve).await?;
        let found = sessions::load(&tx, Month::neighbourhood(asked.sm), &[(self.site_id, id)]).await?;
        let Some(session) = found.into_iter().next() else {
            tx.commit().await?;
            return Ok(json!({"found": false}));
        };
        let events = events::of_session(&tx, session.key, SHOWN_EVENTS).await?;
        tx.commit().await?;
        Ok(json!({"found": true, "session": shown(&session), "events": events}))
    }
}

fn shown(session: &Session) -> Value {
    let signals = session.signals();
    let breakdown: Vec<_> =
        signals.iter().map(|signal| json!({"name": signal.name(), "points": signal.points()})).collect();
    json!({
        "id": session.key.id,
        "month": session.key.month,
        "created_at": session.created_at,
        "attribution": session.attribution().name(),
        "traffic_source": session.source.traffic.source,
        "traffic_medium": session.source.traffic.medium,
        "lead_score": session.score().get(),
        "event_count": session.event_count,
        "signals": breakdown,
        "entry_page": session.first(Field::EntryPage),
        "exit_page": session.exit.value,
        "device_type": session.first(Field::DeviceType),
        "browser": session.first(Field::Browser),
    })
}
