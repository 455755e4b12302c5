//! The JSON vocabulary of `/api/sync`: bytes in, drafts out.
//!
//! Trackers are old, browsers are odd, and a click is worth more than a rule: numbers are taken where text is expected,
//! `null` is absent, an optional field of a wrong type and every unknown key are kept in the event's metadata (where `meta` wins), broken
//! UTF-8 and half a surrogate pair become U+FFFD. Refused is only what cannot be read or has no place to go, and a bad event
//! of a batch is refused alone.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::domain::event::{Arrival, Draft, Event, FieldNames};
use crate::domain::id::{EventId, SiteId};
use crate::domain::refusal::Refusal;
use crate::domain::text::{self, MAX_LABEL};

/// Most bytes of one event.
pub const MAX_EVENT: usize = 64 * 1024;
/// Most bytes of a request.
pub const MAX_BODY: usize = 512 * 1024;
/// Most events of a batch.
pub const MAX_BATCH: usize = 100;

/// A body of `/api/sync`.
#[derive(Debug)]
pub enum Body {
    One(Box<WireEvent>),
    /// 1 to 100 events, each good or bad for itself.
    Batch(Vec<WireEvent>),
}

/// One event as it was read. Site and draft are refused separately, because the site decides who may read the refusal.
#[derive(Debug)]
pub struct WireEvent {
    /// Its `id` as sent, which also a refused event may have.
    pub id: Option<String>,
    /// Its `s`.
    pub site: Result<String, Refusal>,
    draft: Result<Draft, Refusal>,
    names: FieldNames,
    place: Place,
}

/// Where an event stands in its body; refusals name their field by it.
#[derive(Debug, Clone, Copy)]
enum Place {
    Alone,
    InBatch(usize),
}

impl Place {
    fn itself(self) -> Cow<'static, str> {
        match self {
            Self::Alone => "body".into(),
            Self::InBatch(index) => format!("events[{index}]").into(),
        }
    }

    fn of_field(self, refusal: Refusal) -> Refusal {
        match self {
            Self::Alone => refusal,
            Self::InBatch(index) => refusal.within("events", index),
        }
    }
}

impl WireEvent {
    /// The event, checked.
    pub fn accept(self, site: SiteId, arrival: &Arrival) -> Result<Event, Refusal> {
        Event::accept(site, self.draft?, arrival, self.names).map_err(|refusal| self.place.of_field(refusal))
    }

    /// The id by which the sender knows the event, in the form in which it would be stored.
    pub fn event_id(&self, site: SiteId) -> Option<EventId> {
        let id = text::clean_some(self.id.as_deref()?, MAX_LABEL)?;
        Some(EventId::from_text(site, &id))
    }

    /// A refusal of this event's `s`.
    pub fn other_site(&self) -> Refusal {
        self.place.of_field(Refusal::invalid("s", "all events of a batch belong to one site"))
    }

    /// A refusal because no site has this `s`.
    pub fn unknown_site(&self) -> Refusal {
        self.place.of_field(Refusal::unknown_site("s"))
    }

    /// A refusal for want of an id, where the id is all that tells a repeated delivery.
    pub fn without_id(&self) -> Refusal {
        self.place.of_field(Refusal::missing("id", "a delivery can be repeated"))
    }

    fn refused(place: Place, refusal: Refusal) -> Self {
        Self { id: None, site: Err(refusal.clone()), draft: Err(refusal), names: NAMES, place }
    }

    fn read(raw: &str, place: Place) -> Self {
        if !raw.trim_start().starts_with('{') {
            return Self::refused(place, Refusal::invalid(place.itself(), "it must be a JSON object"));
        }
        if raw.len() > MAX_EVENT {
            return Self::too_large(raw, place);
        }
        match parse::<Map<String, Value>>(raw) {
            Ok(map) => Self::of(map, place),
            Err(refusal) => Self::refused(place, Refusal { field: place.itself(), ..refusal }),
        }
    }

    /// Refused, but with what its sender knows it by.
    fn too_large(raw: &str, place: Place) -> Self {
        let refusal = Refusal::too_large(place.itself(), MAX_EVENT);
        let mut few = Map::new();
        if let Ok(fields) = shallow(raw) {
            for key in ["id", "s"] {
                if let Some(Ok(value)) = fields.get(key).map(|raw| serde_json::from_str(raw.get())) {
                    few.insert(key.to_owned(), value);
                }
            }
        }
        Self { draft: Err(refusal), ..Self::of(few, place) }
    }

    fn of(mut map: Map<String, Value>, place: Place) -> Self {
        // What was used is taken out; what is left is kept.
        let site = required(&mut map, "s", "the site's id").map_err(|refusal| place.of_field(refusal));
        let id = optional(&mut map, "id");
        let url_key = if usable(map.get("u")) || !map.contains_key("url") { "u" } else { "url" };
        let url = of_type_text(&mut map, url_key);
        let session = of_type_text(&mut map, "sid");
        let draft = || {
            let mut draft = Draft {
                id: id.clone(),
                url: url?,
                session: session?,
                month_hint: optional(&mut map, "sm"),
                category: optional(&mut map, "ec"),
                action: optional(&mut map, "ea"),
                label: optional(&mut map, "el"),
                value: number(&mut map, "ev"),
                referrer: optional(&mut map, "r"),
                client_time_ms: number(&mut map, "ts"),
                meta: Map::new(),
                // Who imports history comes in through gRPC; here the key is one that nobody knows, and stays in `meta`.
                occurred_at: None,
            };
            let meta = match map.get_mut("meta").map(Value::take) {
                Some(Value::Object(meta)) => meta,
                Some(other) if !other.is_null() => Map::from_iter([("meta".to_owned(), other)]),
                _ => Map::new(),
            };
            map.remove("meta");
            map.retain(|_, value| !value.is_null());
            draft.meta = map;
            draft.meta.extend(meta);
            Ok(draft)
        };
        let draft = draft().map_err(|refusal| place.of_field(refusal));
        Self { id, site, draft, names: FieldNames { url: url_key, ..NAMES }, place }
    }
}

const NAMES: FieldNames = FieldNames { url: "u", session: "sid" };

/// Reads a body: one event, or `{"events": [...]}`.
pub fn read(bytes: &[u8]) -> Result<Body, Refusal> {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return Err(Refusal::json("it is empty"));
    }
    match read_text(text) {
        Err(refusal) => match mended(text) {
            Some(repaired) => read_text(&repaired),
            None => Err(refusal),
        },
        read => read,
    }
}

fn read_text(text: &str) -> Result<Body, Refusal> {
    if !text.starts_with('{') {
        // Something else than an object, or nothing readable at all.
        serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(Refusal::json)?;
        return Err(Refusal::invalid("body", "it must be a JSON object"));
    }
    let fields = shallow(text).map_err(Refusal::json)?;
    let Some(events) = fields.get("events").map(|raw| raw.get()).filter(|raw| *raw != "null") else {
        return Ok(Body::One(Box::new(WireEvent::read(text, Place::Alone))));
    };
    let events = match serde_json::from_str::<Vec<&RawValue>>(events) {
        Ok(events) if (1..=MAX_BATCH).contains(&events.len()) => events,
        _ => return Err(Refusal::invalid("events", "it must be a list of 1 to 100 events")),
    };
    let event = |(index, raw): (usize, &&RawValue)| WireEvent::read(raw.get(), Place::InBatch(index));
    Ok(Body::Batch(events.iter().enumerate().map(event).collect()))
}

/// The keys of an object, values unread. Of a key that is there twice, the last one counts, as in browsers.
fn shallow(text: &str) -> serde_json::Result<HashMap<String, &RawValue>> {
    serde_json::from_str(text)
}

/// Parses; a second time mended if that helps.
fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Refusal> {
    serde_json::from_str(text).or_else(|error| match mended(text) {
        Some(repaired) => serde_json::from_str(&repaired).map_err(Refusal::json),
        None => Err(Refusal::json(error)),
    })
}

/// `text` with what JSON allows and our parser does not made readable: an escaped half of a surrogate pair (`\ud83d` alone, as browsers
/// write a cut emoji) becomes `\ufffd`, a number beyond a double (`1e400`) becomes the text that it was. None if there was nothing of the kind.
fn mended(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let code = |at: usize| {
        let hex = text.get(at..at + 6)?.strip_prefix("\\u")?;
        hex.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u16::from_str_radix(hex, 16).ok())?
    };
    let mut mended = String::new();
    let (mut at, mut kept, mut in_string) = (0, 0, false);
    while at < bytes.len() {
        let begin = at;
        let patch = match (in_string, bytes[at]) {
            (_, b'"') => {
                in_string = !in_string;
                at += 1;
                None
            }
            (true, b'\\') => match (code(at), code(at + 6)) {
                (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => {
                    at += 12;
                    None
                }
                (Some(0xd800..=0xdfff), _) => {
                    at += 6;
                    Some("\\ufffd".to_owned())
                }
                _ => {
                    at += 2;
                    None
                }
            },
            (false, b'-' | b'0'..=b'9') => {
                let end = bytes[at..].iter().position(|b| !matches!(b, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9'));
                at = end.map_or(bytes.len(), |length| at + length);
                let number = &text[begin..at];
                number.parse::<f64>().is_ok_and(f64::is_infinite).then(|| format!("\"{number}\""))
            }
            _ => {
                at += 1;
                None
            }
        };
        if let Some(patch) = patch {
            mended.push_str(&text[kept..begin]);
            mended.push_str(&patch);
            kept = at;
        }
    }
    if kept == 0 {
        return None;
    }
    mended.push_str(text.get(kept..)?);
    Some(mended)
}

fn usable(value: Option<&Value>) -> bool {
    value.and_then(text::scalar).is_some_and(|text| !text.trim().is_empty())
}

/// Takes a text (or a number or boolean, printed). What is neither stays in the map, and so in the metadata.
fn optional(map: &mut Map<String, Value>, key: &str) -> Option<String> {
    let found = map.get(key).and_then(text::scalar)?;
    map.remove(key);
    Some(found)
}

fn number(map: &mut Map<String, Value>, key: &str) -> Option<f64> {
    let found = map.get(key).and_then(text::number)?;
    map.remove(key);
    Some(found)
}

/// As [`optional`], but a list or an object is refused: the field is one that an event cannot do without.
fn of_type_text(map: &mut Map<String, Value>, key: &'static str) -> Result<Option<String>, Refusal> {
    match map.get(key) {
        Some(Value::Array(_) | Value::Object(_)) => Err(Refusal::invalid(key, "it must be text")),
        _ => Ok(optional(map, key)),
    }
}

fn required(map: &mut Map<String, Value>, key: &'static str, what: &str) -> Result<String, Refusal> {
    let found = of_type_text(map, key)?.map(|text| text.trim().to_owned());
    found.filter(|text| !text.is_empty()).ok_or_else(|| Refusal::missing(key, what))
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
