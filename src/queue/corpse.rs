//! What a queue brings and what can never be stored of it: a [`Corpse`], which is buried in `dead_letters` with the whole delivery.

use chrono::{DateTime, Utc};

use crate::directory::Directory;
use crate::domain::event::Event;
use crate::domain::id::{DeadLetterId, EventId, SiteId};
use crate::domain::job::{Job, NotAJob};
use crate::domain::outcome::{DeathReason, Unavailable};
use crate::store::Store;
use crate::store::dead_letters::DeadLetter;

/// What of a delivery can never be stored.
#[derive(Debug)]
pub struct Corpse {
    pub reason: DeathReason,
    pub detail: String,
    pub site_id: Option<SiteId>,
    pub event_id: Option<EventId>,
}

impl Corpse {
    pub(crate) fn malformed(detail: impl ToString) -> Self {
        Self { reason: DeathReason::MalformedJob, detail: detail.to_string(), site_id: None, event_id: None }
    }

    pub(crate) fn of_unknown_site(detail: impl ToString) -> Self {
        Self { reason: DeathReason::UnknownSite, ..Self::malformed(detail) }
    }

    /// Puts it into `dead_letters`, with the whole delivery. Once this returns it is durable.
    pub(crate) async fn bury(
        self,
        store: &Store,
        source: &'static str,
        bytes: &[u8],
        received_at: DateTime<Utc>,
    ) -> Result<DeathReason, Unavailable> {
        let Self { reason, detail, site_id, event_id } = self;
        let letter = DeadLetter {
            // The same delivery is one letter, however often it comes.
            id: DeadLetterId::derived(bytes),
            site_id,
            event_id,
            source,
            reason,
            detail,
            payload: String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}"),
            received_at,
        };
        store.bury(&letter).await.map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "a dead letter could not be buried");
            Unavailable::Database
        })?;
        tracing::warn!(source, reason = reason.code(), dead_letter.id = %letter.id, "a delivery can never be stored; it is in dead_letters");
        Ok(reason)
    }
}

/// The event of a job, if it is one and its site exists.
pub(crate) async fn read_job(
    directory: &Directory,
    bytes: &[u8],
    arrived_at: DateTime<Utc>,
) -> Result<Result<Event, Corpse>, Unavailable> {
    let Ok(text) = std::str::from_utf8(bytes) else { return Ok(Err(Corpse::malformed("it is no UTF-8"))) };
    let event = match Job::event_from_json(text, arrived_at) {
        // What lay in the future then, may not any more.
        Err(NotAJob::FromTheFuture) => Job::event_from_json(text, Utc::now()),
        read => read,
    };
    let event = match event {
        Ok(event) => event,
        Err(error) => return Ok(Err(Corpse::malformed(error))),
    };
    if directory.site_by_id(event.site_id).await?.is_some() {
        return Ok(Ok(event));
    }
    let corpse = Corpse::of_unknown_site("no site has the id of the job's event");
    Ok(Err(Corpse { site_id: Some(event.site_id), event_id: Some(event.id), ..corpse }))
}
