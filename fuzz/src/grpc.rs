//! Of the internal door, the conversion, and what of it is reached from outside here.

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::domain::event::{Arrival, Draft, Event};
use crate::domain::id::SessionKey;
use crate::domain::month::Month;
use crate::domain::refusal::Refusal;
use crate::domain::stored;

#[path = "../../src/grpc/convert.rs"]
mod convert;
#[path = "../../src/grpc/session.rs"]
mod session;

/// The wire's words.
#[allow(clippy::all, clippy::pedantic)] // generated
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/opsmantik.v1.rs"));
}

/// The event's id and site as they are answered, whatever else these bytes are.
pub fn envelope(bytes: &[u8]) -> (String, String) {
    let envelope = convert::Envelope::of(bytes);
    (envelope.event_id(), envelope.site().to_owned())
}

pub fn read_event(bytes: &[u8], received_at: DateTime<Utc>) -> Result<(Draft, Arrival), Refusal> {
    convert::read(bytes, received_at)
}

/// The event as a reader is shown it once it is stored.
pub fn stored(event: &Event) -> proto::StoredEvent {
    let month = Month::for_new_session(event.month_hint, event.received_at);
    convert::stored_event(&stored::Event {
        id: event.id,
        session: SessionKey { site_id: event.site_id, month, id: event.session_id },
        created_at: event.received_at,
        received_at: event.arrived_at(),
        url: event.url.clone(),
        category: event.category.clone(),
        action: event.action.clone(),
        label: event.label.clone(),
        value: event.value,
        signals: event.signals,
        metadata: Value::Object(event.metadata.clone()),
    })
}
