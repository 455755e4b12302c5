//! Between the wire's words and the domain's: an event in, scores and placements out.
//!
//! What the contract has as typed fields goes into `meta` under the keys of `/api/sync`, so that [`Event::accept`] derives the same from
//! both doors. A typed field wins over the same key in `metadata`. Only what the domain cannot judge is refused here: size, bytes that are no event, id,
//! depth.
//!
//! [`Event::accept`]: crate::domain::event::Event::accept

use std::net::{IpAddr, SocketAddr};

use chrono::{DateTime, Datelike, Utc};
use prost::Message;
use prost_types::value::Kind;
use serde_json::{Map, Number, Value};

use super::{proto, session};
use crate::domain::client::{Device, TruncatedIp};
use crate::domain::event::{Arrival, Draft};
use crate::domain::id::EventId;
use crate::domain::outcome::Receipt;
use crate::domain::refusal::{Refusal, RefusalReason};
use crate::domain::signal::{Signal, SignalSet};
use crate::domain::stored;

/// Largest event, encoded.
const MAX_EVENT: usize = 64 << 10;
/// Deepest nesting of `metadata`. prost goes 100 messages deep, and an object is three.
const MAX_DEPTH: usize = 32;
/// What prost says of messages that are nested too deeply.
const TOO_DEEP: &str = "recursion limit reached";
/// Longer words of prost are a long way down through a message; nobody is helped by them.
const MAX_DAMAGE: usize = 160;
/// Integers up to here are exact as doubles.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// Click ids that come by parameter name.
const OTHER_CLICK_IDS: [&str; 8] = ["gclid", "wbraid", "gbraid", "gclsrc", "dclid", "fbclid", "ttclid", "msclkid"];
/// The keys of `meta` that mean something else; under `click_ids.others` they must decide nothing.
const MEANINGFUL_KEYS: [&str; 21] = [
    "fp",
    "lan",
    "mem",
    "con",
    "sw",
    "sh",
    "dpr",
    "gpu",
    "con_type",
    "city",
    "district",
    "country",
    "timezone",
    "duration_sec",
    "scroll_pct",
    "cta_hovers",
    "focus_dur",
    "active_sec",
    "exit_page",
    "intent_stamp",
    "intent_action",
];

/// The outside of an event: what is told of one that goes no further, and can be read of one that cannot.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Envelope {
    #[prost(string, optional, tag = "1")]
    id: Option<String>,
    #[prost(string, tag = "2")]
    site: String,
}

impl Envelope {
    /// Of a damaged event: what stands before the damage.
    pub(super) fn of(event: &[u8]) -> Self {
        let mut envelope = Self::default();
        // What is wrong is told by whoever reads the event itself.
        let _ = envelope.merge(event);
        envelope
    }

    /// The event's id as it is answered; empty without one that can be read.
    pub(super) fn event_id(&self) -> String {
        self.id.as_deref().and_then(uuid).map(|id| id.to_string()).unwrap_or_default()
    }

    /// The site as the event names it.
    pub(super) fn site(&self) -> &str {
        self.site.trim()
    }
}

fn uuid(text: &str) -> Option<EventId> {
    text.trim().parse().ok()
}

/// The message in these bytes, if it is one and may be as large.
fn decode(event: &[u8]) -> Result<proto::Event, Refusal> {
    let refused = |reason, message| Refusal { reason, field: "".into(), message };
    if event.len() > MAX_EVENT {
        return Err(refused(RefusalReason::EventTooLarge, format!("the event is over {} KiB", MAX_EVENT >> 10)));
    }
    proto::Event::decode(event).map_err(|damage| {
        let damage = damage.to_string();
        let message = match damage.as_str() {
            deep if deep.ends_with(TOO_DEEP) => "the event is nested too deeply".to_owned(),
            // prost names fields of the contract, and nothing of what was sent.
            short if short.len() <= MAX_DAMAGE => format!("the event cannot be decoded: {short}"),
            _ => "the event cannot be decoded".to_owned(),
        };
        refused(RefusalReason::InvalidField, message)
    })
}

/// The event as the domain wants to see it.
pub(super) fn read(event: &[u8], received_at: DateTime<Utc>) -> Result<(Draft, Arrival), Refusal> {
    let event = decode(event)?;
    let id = match (&event.id, event.id.as_deref().and_then(uuid)) {
        (None, _) => None,
        (Some(_), Some(id)) => Some(id.to_string()),
        (Some(_), None) => return Err(Refusal::invalid("id", "it is no UUID")),
    };
    if event.site.trim().is_empty() {
        return Err(Refusal::missing("site", "the site's public id or UUID"));
    }
    let occurred_at = match event.occurred_at {
        None => None,
        Some(time) => Some(instant(time).ok_or_else(|| Refusal::invalid("occurred_at", "it is no timestamp"))?),
    };

    let mut meta = Meta(object(event.metadata.unwrap_or_default(), 0)?);
    meta.text("fp", event.fingerprint);
    meta.text("intent_stamp", event.intent_stamp);
    meta.text("intent_action", event.intent_action);
    meta.click_ids(event.click_ids.unwrap_or_default());
    meta.client_hints(event.client_hints.unwrap_or_default());
    meta.geo(event.geo.unwrap_or_default());
    meta.gauges(event.gauges.unwrap_or_default());

    let arrival = Arrival {
        ip: event.client_ip.as_deref().and_then(address).map(TruncatedIp::of),
        device: event.user_agent.as_deref().and_then(Device::of_user_agent),
        ..Arrival::at(received_at)
    };
    let draft = Draft {
        id,
        url: Some(event.url),
        session: Some(event.session_id),
        month_hint: event.session_month_hint,
        category: Some(event.category),
        action: Some(event.action),
        label: event.label,
        value: event.value,
        referrer: event.referrer,
        client_time_ms: event.client_time.as_ref().map(milliseconds),
        meta: meta.0,
        occurred_at,
    };
    Ok((draft, arrival))
}

/// `meta` in the making. What is absent leaves a key of `metadata` as it is.
struct Meta(Map<String, Value>);

impl Meta {
    fn text(&mut self, key: &str, text: Option<String>) {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            self.0.insert(key.to_owned(), Value::String(text));
        }
    }

    fn count(&mut self, key: &str, count: Option<u32>) {
        if let Some(count) = count {
            self.0.insert(key.to_owned(), count.into());
        }
    }

    fn measure(&mut self, key: &str, measure: Option<f64>) {
        if let Some(measure) = measure.filter(|measure| measure.is_finite() && *measure >= 0.0) {
            self.0.insert(key.to_owned(), number(measure));
        }
    }

    fn click_ids(&mut self, ids: proto::ClickIds) {
        let proto::ClickIds { gclid, wbraid, gbraid, others } = ids;
        for (name, id) in others {
            let name = name.to_ascii_lowercase();
            let new = !self.0.contains_key(&name) && !MEANINGFUL_KEYS.contains(&name.as_str());
            if new || OTHER_CLICK_IDS.contains(&name.as_str()) {
                self.text(&name, Some(id));
            }
        }
        self.text("gclid", gclid);
        self.text("wbraid", wbraid);
        self.text("gbraid", gbraid);
    }

    fn client_hints(&mut self, hints: proto::ClientHints) {
        let proto::ClientHints {
            language,
            memory_gib,
            processors,
            screen_width,
            screen_height,
            device_pixel_ratio,
            gpu,
            connection_type,
        } = hints;
        self.text("lan", language);
        self.measure("mem", memory_gib);
        self.count("con", processors);
        self.count("sw", screen_width);
        self.count("sh", screen_height);
        self.measure("dpr", device_pixel_ratio);
        self.text("gpu", gpu);
        self.text("con_type", connection_type);
    }

    fn geo(&mut self, geo: proto::Geo) {
        let proto::Geo { city, district, country, timezone } = geo;
        self.text("city", city);
        self.text("district", district);
        self.text("country", country);
        self.text("timezone", timezone);
    }

    fn gauges(&mut self, gauges: proto::Gauges) {
        let proto::Gauges { duration_sec, scroll_pct, cta_hovers, focus_dur, active_sec, exit_page } = gauges;
        self.count("duration_sec", duration_sec);
        self.count("scroll_pct", scroll_pct);
        self.count("cta_hovers", cta_hovers);
        self.count("focus_dur", focus_dur);
        self.count("active_sec", active_sec);
        self.text("exit_page", exit_page);
    }
}

fn object(object: prost_types::Struct, depth: usize) -> Result<Map<String, Value>, Refusal> {
    object.fields.into_iter().map(|(key, value)| Ok((key, json(value, depth + 1)?))).collect()
}

fn json(value: prost_types::Value, depth: usize) -> Result<Value, Refusal> {
    if depth > MAX_DEPTH {
        return Err(Refusal::invalid("metadata", "it is nested too deeply"));
    }
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(flag)) => Value::Bool(flag),
        Some(Kind::NumberValue(value)) => number(value),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::ListValue(list)) => {
            Value::Array(list.values.into_iter().map(|item| json(item, depth + 1)).collect::<Result<_, _>>()?)
        }
        Some(Kind::StructValue(inner)) => Value::Object(object(inner, depth)?),
    })
}

/// A double as JSON: a whole number as an integer, as `/api/sync` would have it; what is not finite is null.
fn number(value: f64) -> Value {
    #[allow(clippy::cast_possible_truncation)] // whole, and within the range in which doubles are exact
    if value.fract() == 0.0 && value.abs() <= MAX_EXACT {
        return Value::from(value as i64);
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// The instant, if the timestamp is within its own type's bounds: the years 1 to 9999, and nanoseconds of one second.
pub(super) fn instant(time: prost_types::Timestamp) -> Option<DateTime<Utc>> {
    let nanos = u32::try_from(time.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    DateTime::from_timestamp(time.seconds, nanos).filter(|instant| (1..=9999).contains(&instant.year()))
}

fn milliseconds(time: &prost_types::Timestamp) -> f64 {
    #[allow(clippy::cast_precision_loss)] // milliseconds of any year that occurs are exact
    let seconds = time.seconds as f64;
    seconds * 1e3 + (f64::from(time.nanos) / 1e6).floor()
}

/// An address, with or without a port.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    text.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

/// A score with its breakdown.
pub(super) fn score(signals: SignalSet) -> proto::Score {
    let breakdown: Vec<proto::SignalPoints> = signals
        .iter()
        .map(|signal| proto::SignalPoints { signal: wire_signal(signal).into(), points: signal.points().into() })
        .collect();
    let value = signals.score().get().into();
    let sum: u32 = breakdown.iter().map(|line| line.points).sum();
    proto::Score { value, capped: sum > value, breakdown }
}

/// An event as it is stored.
pub(super) fn stored_event(event: &stored::Event) -> proto::StoredEvent {
    proto::StoredEvent {
        id: event.id.to_string(),
        session: Some(session::key(event.session)),
        created_at: Some(session::timestamp(event.created_at)),
        url: event.url.clone(),
        category: event.category.clone(),
        action: event.action.clone(),
        label: event.label.clone(),
        value: event.value,
        // That one is a session's, whatever a hand has written.
        score: Some(score(event.signals.without(Signal::ReturningAdsAssisted))),
        metadata: Some(match &event.metadata {
            Value::Object(fields) => wire_object(fields, 0),
            _ => prost_types::Struct::default(),
        }),
        received_at: Some(session::timestamp(event.received_at)),
    }
}

fn wire_object(fields: &Map<String, Value>, depth: usize) -> prost_types::Struct {
    let fields = fields.iter().map(|(key, value)| (key.clone(), wire_value(value, depth + 1)));
    prost_types::Struct { fields: fields.collect() }
}

/// A value on its way out. What lies deeper than any value that comes in here could not be decoded again, and is null.
fn wire_value(value: &Value, depth: usize) -> prost_types::Value {
    let kind = match value {
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => number.as_f64().map_or(Kind::NullValue(0), Kind::NumberValue),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) if depth <= MAX_DEPTH => {
            let values = items.iter().map(|item| wire_value(item, depth + 1)).collect();
            Kind::ListValue(prost_types::ListValue { values })
        }
        Value::Object(fields) if depth <= MAX_DEPTH => Kind::StructValue(wire_object(fields, depth)),
        Value::Null | Value::Array(_) | Value::Object(_) => Kind::NullValue(0),
    };
    prost_types::Value { kind: Some(kind) }
}

/// Where an event came to rest.
pub(super) fn placement(receipt: &Receipt, event_signals: SignalSet) -> proto::Placement {
    proto::Placement {
        session: Some(session::key(receipt.session)),
        event_score: Some(score(event_signals)),
        session_score: Some(score(receipt.signals)),
        attribution: session::attribution(receipt.attribution).into(),
    }
}

/// The signal that the wire names; none for the unspecified one.
pub(super) fn signal(wire: proto::Signal) -> Option<Signal> {
    match wire {
        proto::Signal::Unspecified => None,
        proto::Signal::PrimaryConversion => Some(Signal::PrimaryConversion),
        proto::Signal::Interaction => Some(Signal::Interaction),
        proto::Signal::Scroll50 => Some(Signal::Scroll50),
        proto::Signal::Scroll90 => Some(Signal::Scroll90),
        proto::Signal::HoverIntent => Some(Signal::HoverIntent),
        proto::Signal::GoogleReferrer => Some(Signal::GoogleReferrer),
        proto::Signal::ReturningAdsAssisted => Some(Signal::ReturningAdsAssisted),
    }
}

pub(super) fn wire_signal(signal: Signal) -> proto::Signal {
    match signal {
        Signal::PrimaryConversion => proto::Signal::PrimaryConversion,
        Signal::Interaction => proto::Signal::Interaction,
        Signal::Scroll50 => proto::Signal::Scroll50,
        Signal::Scroll90 => proto::Signal::Scroll90,
        Signal::HoverIntent => proto::Signal::HoverIntent,
        Signal::GoogleReferrer => proto::Signal::GoogleReferrer,
        Signal::ReturningAdsAssisted => proto::Signal::ReturningAdsAssisted,
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
