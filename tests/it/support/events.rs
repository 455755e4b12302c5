//! Events from a few words.

use chrono::{DateTime, Utc};
use opsmantik::domain::client::TruncatedIp;
use opsmantik::domain::event::{Arrival, Draft, Event, FieldNames};
use opsmantik::domain::id::SiteId;
use serde_json::json;
use uuid::Uuid;

pub const NAMES: FieldNames = FieldNames { url: "u", session: "sid" };

pub fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a test's own instant")
}

/// What a test says of an event; everything else has a default.
#[derive(Debug, Clone)]
pub struct Spec {
    pub id: u32,
    pub session: String,
    pub at: DateTime<Utc>,
    pub month_hint: Option<String>,
    pub url: String,
    pub fingerprint: Option<String>,
    pub action: String,
    pub label: Option<String>,
}

impl Spec {
    pub fn new(id: u32, session: &str, at: DateTime<Utc>) -> Self {
        Self {
            id,
            session: session.to_owned(),
            at,
            month_hint: None,
            url: format!("https://a.example/page-{id}"),
            fingerprint: None,
            action: "view".to_owned(),
            label: None,
        }
    }

    pub fn url(mut self, url: &str) -> Self {
        url.clone_into(&mut self.url);
        self
    }

    pub fn fingerprint(mut self, fingerprint: &str) -> Self {
        self.fingerprint = Some(fingerprint.to_owned());
        self
    }

    pub fn hint(mut self, month: &str) -> Self {
        self.month_hint = Some(month.to_owned());
        self
    }

    pub fn action(mut self, action: &str) -> Self {
        action.clone_into(&mut self.action);
        self
    }

    /// A click on a telephone number.
    pub fn clicks(mut self, number: &str) -> Self {
        self.label = Some(format!("tel:{number}"));
        self.action("phone_call")
    }

    pub fn event(&self, site: SiteId) -> Event {
        let mut meta = json!({"scroll_pct": self.id % 101, "exit_page": format!("/exit-{}", self.id)});
        if let Some(fingerprint) = &self.fingerprint {
            meta["fp"] = json!(fingerprint);
        }
        let draft = Draft {
            id: Some(Uuid::from_u128(u128::from(self.id)).to_string()),
            url: Some(self.url.clone()),
            session: Some(self.session.clone()),
            month_hint: self.month_hint.clone(),
            category: Some("interaction".to_owned()),
            action: Some(self.action.clone()),
            label: self.label.clone(),
            meta: meta.as_object().cloned().unwrap_or_default(),
            ..Draft::default()
        };
        let mut arrival = Arrival::at(self.at);
        arrival.ip = Some(TruncatedIp::of([203, 0, 113, 7].into()));
        Event::accept(site, draft, &arrival, NAMES).expect("a whole draft")
    }
}
