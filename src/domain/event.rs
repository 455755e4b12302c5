//! An event: something that a visitor did, as it was accepted at a door.
//!
//! A door reads its own vocabulary (JSON, protobuf) into a [`Draft`]; [`Event::accept`] checks and derives, once. An [`Event`] is
//! valid from then on and travels as it is: through a queue, into a batch, into a dead letter. Only what cannot be an event
//! is refused (no URL, no session id); everything else is cleaned, clamped or kept in `metadata`.

use chrono::{DateTime, Days, Months, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::campaign::{Campaign, ClickIds};
use super::client::{Device, Geo, TruncatedIp};
use super::id::{EventId, SessionId, SiteId};
use super::month::Month;
use super::page::Page;
use super::refusal::Refusal;
use super::signal::{Signal, SignalSet};
use super::text::{self, MAX_LABEL, MAX_REFERRER, MAX_SHORT, MAX_URL, clean, clean_some};
use super::traffic::{Traffic, is_google_search_host};

/// Running measurements of the visit; a session keeps the maximum of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gauges {
    /// Seconds since the session began.
    pub duration_sec: Option<i32>,
    /// Deepest scroll, 0–100.
    pub scroll_pct: Option<i32>,
    /// Times the pointer rested on a call to action.
    pub cta_hovers: Option<i32>,
    /// Seconds with focus.
    pub focus_dur: Option<i32>,
    /// Seconds with activity.
    pub active_sec: Option<i32>,
}

impl Gauges {
    fn of(meta: &Map<String, Value>) -> Self {
        let gauge = |key: &str, max: f64| {
            let number = text::number(meta.get(key)?)?;
            // A cast from a float saturates; the clamp keeps it inside the gauge's own range first.
            #[allow(clippy::cast_possible_truncation)]
            Some(number.clamp(0.0, max).floor() as i32)
        };
        Self {
            duration_sec: gauge("duration_sec", 1e9),
            scroll_pct: gauge("scroll_pct", 100.0),
            cta_hovers: gauge("cta_hovers", 1e9),
            focus_dur: gauge("focus_dur", 1e9),
            active_sec: gauge("active_sec", 1e9),
        }
    }

    /// The maximum of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            duration_sec: self.duration_sec.max(other.duration_sec),
            scroll_pct: self.scroll_pct.max(other.scroll_pct),
            cta_hovers: self.cta_hovers.max(other.cta_hovers),
            focus_dur: self.focus_dur.max(other.focus_dur),
            active_sec: self.active_sec.max(other.active_sec),
        }
    }
}

/// When and from where an event came in: taken once, at the edge, and carried along from there.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub received_at: DateTime<Utc>,
    pub ip: Option<TruncatedIp>,
    pub device: Option<Device>,
    /// What the edge's headers say of the place; the event's own `meta` comes first.
    pub geo: Geo,
}

impl Arrival {
    /// An arrival of which nothing but the time is known.
    pub fn at(received_at: DateTime<Utc>) -> Self {
        Self { received_at, ip: None, device: None, geo: Geo::default() }
    }
}

/// What a door calls the fields that can be refused.
#[derive(Debug, Clone, Copy)]
pub struct FieldNames {
    pub url: &'static str,
    pub session: &'static str,
}

/// An event as a door has read it: nothing is checked yet.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    pub id: Option<String>,
    pub url: Option<String>,
    pub session: Option<String>,
    pub month_hint: Option<String>,
    pub category: Option<String>,
    pub action: Option<String>,
    pub label: Option<String>,
    pub value: Option<f64>,
    pub referrer: Option<String>,
    /// The client's clock, milliseconds since 1970; used for order only.
    pub client_time_ms: Option<f64>,
    /// `meta`, and whatever else the door found and did not know.
    pub meta: Map<String, Value>,
    /// Imported history: when it really happened. Unlike the client's clock it is believed, within [`IMPORT_MONTHS`].
    pub occurred_at: Option<DateTime<Utc>>,
}

/// History may be imported that is this old.
pub const IMPORT_MONTHS: u32 = 24;
/// And the importer's clock may be ahead of ours by this much.
const IMPORT_SKEW: TimeDelta = TimeDelta::minutes(2);

/// An accepted event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub id: EventId,
    pub site_id: SiteId,
    pub session_id: SessionId,
    /// The tracker's hint of the session's month; see [`Month::for_new_session`].
    pub month_hint: Option<Month>,
    /// The time by which everything is placed, in whole microseconds as PostgreSQL keeps them: the arrival at the edge, or of imported
    /// history when it happened.
    pub received_at: DateTime<Utc>,
    /// Of imported history: its arrival at the edge. Absent from jobs and letters that carry none, old ones included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported_at: Option<DateTime<Utc>>,
    /// The client's time, clamped to the 24 hours before `received_at`.
    pub occurred_at: DateTime<Utc>,
    pub url: String,
    pub referrer: Option<String>,
    pub category: String,
    pub action: String,
    pub label: Option<String>,
    pub value: Option<f64>,
    pub fingerprint: Option<String>,
    pub click_ids: ClickIds,
    pub campaign: Campaign,
    pub traffic: Traffic,
    pub exit_page: String,
    pub language: Option<String>,
    pub gauges: Gauges,
    pub signals: SignalSet,
    pub device: Option<Device>,
    pub geo: Geo,
    pub ip: Option<TruncatedIp>,
    pub metadata: Map<String, Value>,
}

/// Actions that are a call or a WhatsApp message, under any category.
const CONVERSION_ACTIONS: [&str; 10] = [
    "phone_call",
    "call",
    "call_click",
    "phone_click",
    "phone",
    "tel_click",
    "click_to_call",
    "whatsapp",
    "whatsapp_click",
    "whatsapp_message",
];

/// Whether an event of this action is a click on a telephone number or a WhatsApp link, whatever its letter case.
pub fn is_call_action(action: &str) -> bool {
    CONVERSION_ACTIONS.iter().any(|known| known.eq_ignore_ascii_case(action))
}

impl Event {
    /// Checks a draft and derives everything that the event itself can tell.
    pub fn accept(site: SiteId, draft: Draft, arrival: &Arrival, names: FieldNames) -> Result<Self, Refusal> {
        let full_url = draft.url.as_deref().map(str::trim).filter(|url| !url.is_empty());
        let full_url = full_url.ok_or_else(|| Refusal::missing(names.url, "the page's URL"))?;
        let url =
            clean_some(full_url, MAX_URL).ok_or_else(|| Refusal::invalid(names.url, "it has no visible character"))?;
        let session = draft.session.as_deref().and_then(|id| clean_some(id, MAX_LABEL));
        let session = session.ok_or_else(|| Refusal::missing(names.session, "the session's id"))?;

        let arrived_at = arrival.received_at.trunc_subsecs(6);
        let (received_at, imported_at) = match draft.occurred_at.map(|told| told.trunc_subsecs(6)) {
            Some(told) if importable(told, arrived_at) => (told, Some(arrived_at)),
            Some(_) => {
                return Err(Refusal::out_of_range(
                    "occurred_at",
                    "it has to lie between 24 months before receipt and two minutes after",
                ));
            }
            None => (arrived_at, None),
        };
        let id = match draft.id.as_deref().and_then(|id| clean_some(id, MAX_LABEL)) {
            Some(id) => EventId::from_text(site, &id),
            None => EventId::derived(site, &draft.content(), received_at),
        };
        let meta = text::clean_map(draft.meta);
        let short = |key: &str| meta.get(key).and_then(text::scalar).and_then(|text| clean_some(&text, MAX_SHORT));

        let page = Page::read(full_url);
        let referrer_page = draft.referrer.as_deref().map(Page::read);
        let referrer_host = referrer_page.as_ref().and_then(Page::host);
        // Only text that says something is an id; a page's `gclid: false` or "undefined" is no ad click.
        let told = |key: &str| {
            let text = meta.get(key)?.as_str()?;
            clean_some(text, MAX_SHORT).filter(|id| !matches!(id.as_str(), "null" | "undefined" | "false" | "0"))
        };
        let click_ids = ClickIds::of(&page).or(ClickIds::from_lookup(told));
        let campaign = Campaign::of(&page);
        let traffic = Traffic::of(&click_ids, &campaign, page.host(), referrer_host);
        let gauges = Gauges::of(&meta);
        let category = draft.category.as_deref().and_then(|c| clean_some(c, MAX_SHORT));
        let action = draft.action.as_deref().and_then(|a| clean_some(a, MAX_SHORT));
        let label = draft.label.as_deref().and_then(|l| clean_some(l, MAX_LABEL));
        let unknown = || "unknown".to_owned();

        let mut event = Self {
            id,
            site_id: site,
            session_id: SessionId::from_text(site, &session),
            month_hint: draft.month_hint.and_then(|hint| hint.parse().ok()),
            received_at,
            imported_at,
            occurred_at: occurred_at(draft.client_time_ms, received_at),
            referrer: draft.referrer.as_deref().and_then(|referrer| clean_some(referrer, MAX_REFERRER)),
            category: category.unwrap_or_else(unknown),
            action: action.unwrap_or_else(unknown),
            label,
            value: draft.value.filter(|value| value.is_finite()),
            fingerprint: short("fp"),
            click_ids,
            campaign,
            traffic,
            exit_page: meta
                .get("exit_page")
                .and_then(text::scalar)
                .and_then(|page| clean_some(&page, MAX_URL))
                .unwrap_or_else(|| url.clone()),
            language: short("lan"),
            gauges,
            signals: SignalSet::EMPTY,
            device: arrival.device.clone(),
            geo: Geo {
                city: short("city"),
                district: short("district"),
                country: short("country"),
                timezone: short("timezone"),
            }
            .or(&arrival.geo),
            ip: arrival.ip.clone(),
            metadata: meta,
            url,
        };
        event.signals = event.own_signals(referrer_host);
        Ok(event)
    }

    fn own_signals(&self, referrer_host: Option<&str>) -> SignalSet {
        let (category, action) = (self.category.to_ascii_lowercase(), self.action.to_ascii_lowercase());
        let labelled_depth = || self.label.as_deref()?.trim().trim_end_matches('%').trim().parse::<f64>().ok();
        let depth = match action.as_str() {
            "scroll_depth" => self.value.or_else(labelled_depth).unwrap_or(0.0),
            _ => 0.0,
        }
        .max(f64::from(self.gauges.scroll_pct.unwrap_or(0)));
        let raised = [
            (Signal::PrimaryConversion, category == "conversion" || is_call_action(&action)),
            (Signal::Interaction, category == "interaction"),
            (Signal::Scroll50, depth >= 50.0),
            (Signal::Scroll90, depth >= 90.0),
            (Signal::HoverIntent, action == "hover_intent" || self.gauges.cta_hovers.unwrap_or(0) >= 1),
            (Signal::GoogleReferrer, referrer_host.is_some_and(is_google_search_host)),
        ];
        raised.into_iter().filter_map(|(signal, holds)| holds.then_some(signal)).collect()
    }

    /// The field that no door would have let through like this; none for an event that [`Event::accept`] made. For readers of what has travelled.
    pub fn defect(&self) -> Option<&'static str> {
        let text = |text: &str, max: usize| (1..=max).contains(&text.len()) && !text.contains('\0');
        let earliest = self.received_at.checked_sub_days(Days::new(1));
        [
            ("url", text(&self.url, MAX_URL)),
            ("exit_page", text(&self.exit_page, MAX_URL)),
            ("category", text(&self.category, MAX_SHORT)),
            ("action", text(&self.action, MAX_SHORT)),
            ("occurred_at", self.occurred_at <= self.received_at && Some(self.occurred_at) >= earliest),
            ("value", self.value.is_none_or(f64::is_finite)),
            ("received_at", self.imported_at.is_none_or(|arrived| importable(self.received_at, arrived))),
        ]
        .into_iter()
        .find_map(|(field, whole)| (!whole).then_some(field))
    }

    /// When it arrived at the edge, whenever it happened.
    pub fn arrived_at(&self) -> DateTime<Utc> {
        self.imported_at.unwrap_or(self.received_at)
    }

    /// The month in which it arrived, or of imported history happened.
    pub fn arrival_month(&self) -> Month {
        Month::of(self.received_at)
    }

    /// No event weighs less.
    pub const LEAST_WEIGHT: usize = size_of::<Self>() + SHORT_TEXTS;

    /// What it occupies in memory, bytes, or a little more: what the waiting room counts. A small JSON value takes far more memory than wire, so
    /// an event of thousands of them may weigh twenty times what was sent.
    pub fn weight(&self) -> usize {
        let some = |text: &Option<String>| text.as_deref().map_or(0, str::len);
        // What was read out of the address, click ids and campaign, is no longer than it is.
        let long = 2 * self.url.len() + self.exit_page.len() + some(&self.referrer) + some(&self.label);
        Self::LEAST_WEIGHT + long + of_map(&self.metadata)
    }
}

/// Heap of an event's other texts together: dozens of bytes each, and what the allocator needs to know of them.
const SHORT_TEXTS: usize = 512;
/// What the allocator adds to a piece of memory.
const PIECE: usize = 16;

fn of_map(map: &Map<String, Value>) -> usize {
    // A node of the tree has eleven places for keys and values, and is half full at least, but for the first.
    const NODE: usize = 11 * (size_of::<String>() + size_of::<Value>()) + 2 * PIECE;
    let texts = map.iter().map(|(key, value)| key.len() + PIECE + of_value(value)).sum::<usize>();
    texts + map.len().div_ceil(6) * NODE
}

/// What a value has beyond itself.
fn of_value(value: &Value) -> usize {
    match value {
        Value::String(text) => text.capacity() + PIECE,
        Value::Array(items) => {
            items.capacity() * size_of::<Value>() + PIECE + items.iter().map(of_value).sum::<usize>()
        }
        Value::Object(map) => of_map(map),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

impl Draft {
    /// What the event says, for the id of an event without one. Keys of a JSON object are ordered.
    fn content(&self) -> String {
        let Self {
            id: _,
            url,
            session,
            month_hint: _,
            category,
            action,
            label,
            value,
            referrer,
            client_time_ms,
            meta,
            occurred_at,
        } = self;
        let fields = (url, session, category, action, label, value, referrer, client_time_ms, meta);
        let content = serde_json::to_string(&fields).unwrap_or_else(|_| format!("{fields:?}"));
        // The same thing twice within seconds is history, not a retry: a retry tells the same moment.
        occurred_at.map_or(content.clone(), |at| format!("{content}\n{}", at.trunc_subsecs(6).timestamp_micros()))
    }
}

/// Whether something that happened at `at` may be imported at `arrived_at`; the ends of the window are inside.
fn importable(at: DateTime<Utc>, arrived_at: DateTime<Utc>) -> bool {
    let earliest = arrived_at.checked_sub_months(Months::new(IMPORT_MONTHS));
    earliest.is_some_and(|earliest| earliest <= at) && at - arrived_at <= IMPORT_SKEW
}

fn occurred_at(client_time_ms: Option<f64>, received_at: DateTime<Utc>) -> DateTime<Utc> {
    let earliest = received_at - Days::new(1);
    #[allow(clippy::cast_possible_truncation)] // saturates, and the clamp below holds either way
    let client = client_time_ms.filter(|ms| ms.is_finite()).and_then(|ms| DateTime::from_timestamp_millis(ms as i64));
    client.map_or(received_at, |client| client.clamp(earliest, received_at))
}

/// A label for logs: category and action only, never what a visitor typed.
impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} {}", clean(&self.category, 32), clean(&self.action, 32), self.id)
    }
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
