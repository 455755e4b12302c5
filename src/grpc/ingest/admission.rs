//! Before the pipeline: may this caller write to the site that an event names, and is it an event at all?
//!
//! A site that is not the caller's ends the whole call, whatever else is wrong with the event; everything else is the event's own affair.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use chrono::{DateTime, Utc};
use tonic::{Code, Request, Status};

use super::super::convert::{self, Envelope};
use super::super::proto::Rejection;
use super::super::{GrpcState, access};
use crate::access::{Admission as Proof, Denied};
use crate::domain::access::Caller;
use crate::domain::event::{Event, FieldNames};
use crate::domain::refusal::Refusal;
use crate::domain::site::Site;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

/// So many checks of a token may fail for want of somebody who can tell before its stream ends.
const UNCHECKED: u32 = 3;

/// Who sends the events of a call.
pub(super) struct Sender {
    pub(super) state: GrpcState,
    caller: Arc<Caller>,
    proof: Proof,
    unchecked: AtomicU32,
}

impl Sender {
    pub(super) fn of<T>(state: &GrpcState, request: &Request<T>) -> Result<Self, Status> {
        let (caller, proof) = (access::caller(request)?, access::admission(request)?);
        Ok(Self { state: state.clone(), caller, proof, unchecked: AtomicU32::new(0) })
    }

    /// The site that an event names, if this sender may write to it; none if there is no such site.
    async fn site(&self, text: &str) -> Result<Option<Arc<Site>>, Status> {
        access::find_site(&self.state, &self.caller, text).await
    }

    /// Whether a call that has lasted for a while may go on: a token can be revoked at any time. False if nobody can tell now.
    pub(super) async fn still_welcome(&self) -> Result<bool, Status> {
        match self.proof.renew().await {
            Ok(()) => {
                self.unchecked.store(0, Ordering::Relaxed);
                Ok(true)
            }
            Err(denied @ Denied::Invalid) => Err(access::denied(denied)),
            // Nobody can tell now, and without a database nothing is stored either; but not for long.
            Err(denied @ (Denied::Database(_) | Denied::Busy | Denied::Provider)) => {
                let times = self.unchecked.fetch_add(1, Ordering::Relaxed) + 1;
                if times < UNCHECKED { Ok(false) } else { Err(access::denied(denied)) }
            }
        }
    }
}

/// An event that goes no further, and what its sender knows it by.
pub(super) struct Refused {
    pub(super) id: String,
    pub(super) why: Rejection,
}

/// Admits the events of one call, and asks for each site once.
pub(super) struct Admission<'s> {
    sender: &'s Sender,
    asked: HashMap<String, Result<Option<Arc<Site>>, Status>>,
}

impl<'s> Admission<'s> {
    pub(super) fn of(sender: &'s Sender) -> Self {
        Self { sender, asked: HashMap::new() }
    }

    /// The event as the domain accepts it, or what is wrong with it. An error is one of the call: a site that is not the sender's, or nobody
    /// who could tell.
    pub(super) async fn admit(
        &mut self,
        event: &[u8],
        received_at: DateTime<Utc>,
    ) -> Result<Result<Event, Refused>, Status> {
        let envelope = Envelope::of(event);
        let refused = |refusal: Refusal| Refused { id: envelope.event_id(), why: refusal.into() };
        let read = convert::read(event, received_at);
        let site = if envelope.site().is_empty() { Ok(None) } else { self.site(envelope.site()).await };
        match (read, site) {
            (_, Err(status)) if status.code() != Code::Unavailable => Err(status),
            (Err(refusal), _) => Ok(Err(refused(refusal))),
            (Ok(_), Err(status)) => Err(status),
            (Ok((draft, arrival)), Ok(Some(site))) => {
                Ok(Event::accept(site.id, draft, &arrival, NAMES).map_err(refused))
            }
            (Ok(_), Ok(None)) => Ok(Err(refused(Refusal::unknown_site("site")))),
        }
    }

    async fn site(&mut self, name: &str) -> Result<Option<Arc<Site>>, Status> {
        if let Some(known) = self.asked.get(name) {
            return known.clone();
        }
        let found = self.sender.site(name).await;
        self.asked.insert(name.to_owned(), found.clone());
        found
    }
}
