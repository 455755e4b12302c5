//! What is sent: events and calls that are a function of a seed and their number, so that a retry, and another run, send the very same.
//!
//! An event always takes the same door. Half of the visits come through doors that are told the time (a job of QStash, the gRPC services): of
//! these everything is compared with an undisturbed run, the calls that match them included. The other half mixes in the public door,
//! which takes its own time.

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::domain::event::{Arrival, Draft};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use opsmantik::grpc::proto;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::calls::CALLER;
use crate::support::events::NAMES;

pub const SITE: SiteId = SiteId::from_uuid(Uuid::from_u128(0xfa));
/// Its domain is `shop.example`.
pub const PUBLIC_ID: &str = "shop";
/// Events begin so long before the row, and go on for [`SPAN`] minutes: all of that time is over.
const BEGAN: TimeDelta = TimeDelta::hours(6);
const SPAN: i64 = 120;
/// Calls are of the first minutes. An event of a call's time has it matched again, which is the slow part of a run.
const CALLS_SPAN: i64 = 50;
/// One call comes with so many events.
pub const CALLS_IN: u32 = 15;
/// Visits of one round.
const VISITS: u32 = 24;
/// Browsers whose visits may follow each other, of a few rounds in a row.
const BROWSERS: u32 = 24;
const ROUNDS_IN_COMMON: u32 = 3;
/// Numbers that are called, of a round.
const NUMBERS: u32 = 3;

/// How an event comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    Sync,
    SyncBatch,
    Worker,
    Ingest,
    Stream,
}

impl Door {
    pub const ALL: [Self; 5] = [Self::Sync, Self::SyncBatch, Self::Worker, Self::Ingest, Self::Stream];
    /// Those that are told when an event happened.
    const TIMED: [Self; 3] = [Self::Worker, Self::Ingest, Self::Stream];

    pub fn takes_its_own_time(self) -> bool {
        matches!(self, Self::Sync | Self::SyncBatch)
    }
}

#[derive(Debug, Clone)]
pub struct World {
    seed: u64,
    base: DateTime<Utc>,
    /// Events of one round, which have their visits in common.
    each: u32,
}

/// An event, before it takes the form of its door.
#[derive(Debug, Clone)]
pub struct Told {
    pub n: u32,
    pub door: Door,
    visit: String,
    month: String,
    at: DateTime<Utc>,
    url: String,
    fingerprint: String,
    category: &'static str,
    action: &'static str,
    label: Option<String>,
    value: Option<f64>,
}

/// A number that is dialled. Rounds have their own, and nearly their own browsers, or each would have the calls of all before it matched again.
fn number(round: u32, lot: &mut StdRng) -> String {
    format!("+120255501{:02}", (round * NUMBERS + lot.random_range(0..NUMBERS)) % 100)
}

fn browser(round: u32, n: u32) -> String {
    format!("f{}-{}", round / ROUNDS_IN_COMMON, n % BROWSERS)
}

impl World {
    pub fn new(seed: u64, each: u32) -> Self {
        Self { seed, base: Utc::now() - BEGAN, each }
    }

    /// What is drawn for one event or call.
    fn lot(&self, n: u32, kind: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ (u64::from(n) << 8) ^ (kind << 56))
    }

    pub fn event(&self, n: u32) -> Told {
        let mut lot = self.lot(n, 1);
        let (round, visit) = (n.saturating_sub(1) / self.each, lot.random_range(0..VISITS));
        let timed = visit % 2 == 0;
        let doors: &[Door] = if timed { &Door::TIMED } else { &Door::ALL };
        let door = *doors.choose(&mut lot).expect("there are doors");
        let at = self.base + TimeDelta::milliseconds(lot.random_range(0..SPAN * 60_000));
        // A paid visit makes followers of later ones of its browser; where arrival is the server's own, no two visits share one.
        let fingerprint = if timed { browser(round, round * 7 + visit) } else { format!("e{round}-{visit}") };
        let paid = visit % 3 == 0 && lot.random_bool(0.5);
        let query = if paid { format!("?gclid=g{n}&utm_source=s{n}") } else { String::new() };
        let (category, action, label, value) = match lot.random_range(0..6) {
            0 => ("conversion", "phone_call", Some(format!("tel:{}", number(round, &mut lot))), None),
            1 => ("interaction", "scroll_depth", None, Some(f64::from(lot.random_range(0..100)))),
            2 => ("interaction", "hover_intent", Some(format!("button {n}")), None),
            _ => ("interaction", "view", None, None),
        };
        Told {
            n,
            door,
            visit: format!("visit-{round}-{visit}"),
            month: self.base.format("%Y-%m-01").to_string(),
            at,
            url: format!("https://shop.example/p{n}{query}"),
            fingerprint,
            category,
            action,
            label,
            value,
        }
    }

    /// Call `n`, which may have been preceded by visits of these events' time.
    pub fn call(&self, n: u32) -> proto::PushedCall {
        let mut lot = self.lot(n, 2);
        let at = self.base + TimeDelta::seconds(lot.random_range(0..CALLS_SPAN * 60));
        let (round, caller) = (n.saturating_sub(1) / (self.each / CALLS_IN), lot.random_range(0..BROWSERS));
        proto::PushedCall {
            site: PUBLIC_ID.to_owned(),
            key: Some(proto::ProviderCallKey { provider: "faults".to_owned(), provider_call_id: n.to_string() }),
            dialled_number: number(round, &mut lot),
            caller_number: Some(CALLER.to_owned()),
            started_at: Some(timestamp(at)),
            fingerprint: lot.random_bool(0.4).then(|| browser(round, caller)),
            ..proto::PushedCall::default()
        }
    }
}

fn timestamp(at: DateTime<Utc>) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.timestamp(), nanos: at.timestamp_subsec_nanos().cast_signed() }
}

impl Told {
    pub fn id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.n))
    }

    /// As the tracker tells it.
    pub fn wire(&self) -> Value {
        let mut event = json!({"id": self.id(), "s": PUBLIC_ID, "u": self.url, "sid": self.visit, "sm": self.month,
            "ec": self.category, "ea": self.action, "ts": self.at.timestamp_millis(), "meta": {"fp": self.fingerprint}});
        if let Some(label) = &self.label {
            event["el"] = json!(label);
        }
        if let Some(value) = self.value {
            event["ev"] = json!(value);
        }
        event
    }

    /// As it waits in a queue.
    pub fn job(&self) -> String {
        let draft = Draft {
            id: Some(self.id().to_string()),
            url: Some(self.url.clone()),
            session: Some(self.visit.clone()),
            month_hint: Some(self.month.clone()),
            category: Some(self.category.to_owned()),
            action: Some(self.action.to_owned()),
            label: self.label.clone(),
            value: self.value,
            meta: json!({"fp": self.fingerprint}).as_object().cloned().unwrap_or_default(),
            ..Draft::default()
        };
        let event = opsmantik::domain::event::Event::accept(SITE, draft, &Arrival::at(self.at), NAMES);
        Job::new(event.expect("a whole draft")).to_json().expect("it is text")
    }

    /// As an internal service tells it.
    pub fn message(&self) -> proto::Event {
        proto::Event {
            id: Some(self.id().to_string()),
            site: PUBLIC_ID.to_owned(),
            url: self.url.clone(),
            session_id: self.visit.clone(),
            session_month_hint: Some(self.month.clone()),
            category: self.category.to_owned(),
            action: self.action.to_owned(),
            label: self.label.clone(),
            value: self.value,
            fingerprint: Some(self.fingerprint.clone()),
            occurred_at: Some(timestamp(self.at)),
            ..proto::Event::default()
        }
    }
}
