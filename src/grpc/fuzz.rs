//! What the fuzz targets reach of this door's inside; see `fuzz/`. Nothing of the program calls it.

use chrono::{DateTime, Utc};
use prost::Message;
use serde_json::{Map, Value};

use super::{calls, convert, proto};
use crate::domain::event::{Arrival, Draft, Event};
use crate::domain::id::{SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::push::Push;
use crate::domain::refusal::Refusal;
use crate::domain::stored;

/// The event's id and site as they are answered, whatever else these bytes are.
pub fn envelope(bytes: &[u8]) -> (String, String) {
    let envelope = convert::Envelope::of(bytes);
    (envelope.event_id(), envelope.site().to_owned())
}

pub fn read_event(bytes: &[u8], received_at: DateTime<Utc>) -> Result<(Draft, Arrival), Refusal> {
    convert::read(bytes, received_at)
}

pub fn wire_object(fields: &Map<String, Value>) -> prost_types::Struct {
    convert::wire_object(fields, 0)
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

/// A pushed call, as far as the domain. None: these bytes are no message.
pub fn read_push(bytes: &[u8], site: SiteId, received_at: DateTime<Utc>) -> Option<Result<Push, Refusal>> {
    let call = proto::PushedCall::decode(bytes).ok()?;
    let hash = |_: &_| [7; 32];
    Some(calls::asked::draft(call).and_then(|draft| Push::accept(site, draft, Some("TR"), received_at, hash)))
}
