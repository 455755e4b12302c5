//! What a delivery says: bytes in, events out, and what of it can never be stored.
//!
//! A delivery is our own [`Job`](crate::domain::job::Job), or the tracker's JSON from another producer, with an `id` in every event. Read when QStash brings it, and again when
//! it is replayed from a dead letter.

use chrono::{DateTime, Utc};

use super::wire::{self, Body};
use crate::directory::Directory;
use crate::domain::event::{Arrival, Event};
use crate::domain::outcome::Unavailable;
use crate::queue::corpse::{Corpse, read_job};

/// The events of a delivery, and what of it is dead already. One corpse is enough: it is buried with the whole delivery.
pub async fn read(
    directory: &Directory,
    bytes: &[u8],
    arrived_at: DateTime<Utc>,
) -> Result<(Vec<Event>, Option<Corpse>), Unavailable> {
    if is_job(bytes) {
        let event = read_job(directory, bytes, arrived_at).await?;
        return Ok(match event {
            Ok(event) => (vec![event], None),
            Err(corpse) => (Vec::new(), Some(corpse)),
        });
    }
    let read = match wire::read(bytes) {
        Ok(Body::One(event)) => vec![*event],
        Ok(Body::Batch(events)) => events,
        Err(refusal) => return Ok((Vec::new(), Some(Corpse::malformed(refusal)))),
    };
    let (mut events, mut corpse) = (Vec::with_capacity(read.len()), None);
    for wire in read {
        let site = match &wire.site {
            Ok(text) => directory.site_for_sure(text).await?,
            Err(refusal) => {
                corpse = corpse.or(Some(Corpse::malformed(refusal)));
                continue;
            }
        };
        let Some(site) = site else {
            corpse = corpse.or(Some(Corpse::of_unknown_site(wire.unknown_site())));
            continue;
        };
        let id = wire.event_id(site.id);
        let accepted = match id {
            Some(_) => wire.accept(site.id, &Arrival::at(arrived_at)),
            None => Err(wire.without_id()),
        };
        match accepted {
            Ok(event) => events.push(event),
            Err(refusal) => {
                let dead = Corpse { site_id: Some(site.id), event_id: id, ..Corpse::malformed(refusal) };
                corpse = corpse.or(Some(dead));
            }
        }
    }
    Ok((events, corpse))
}

/// A job has a version and an event; a tracker's event has neither at its top.
fn is_job(bytes: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Marks<'a> {
        #[serde(borrow)]
        v: Option<&'a serde_json::value::RawValue>,
        #[serde(borrow)]
        event: Option<&'a serde_json::value::RawValue>,
    }
    serde_json::from_slice::<Marks<'_>>(bytes).is_ok_and(|marks| marks.v.is_some() && marks.event.is_some())
}
