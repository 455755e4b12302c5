//! Before the pipeline: may this caller write to the site that an event names, and is it an event at all?
//!
//! A site that is not the caller's ends the whole call, whatever else is wrong with the event; everything else is the event's own affair.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use tonic::{Code, Request, Status};

use super::super::proto::Rejection;
use super::super::{GrpcState, access, convert, proto};
use crate::access::Denied;
use crate::domain::access::{Caller, Scope};
use crate::domain::event::{Event, FieldNames};
use crate::domain::refusal::Refusal;
use crate::domain::site::Site;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

/// Who sends the events of a call.
pub(super) struct Sender {
    pub(super) state: GrpcState,
    caller: Arc<Caller>,
    bearer: String,
}

impl Sender {
    pub(super) fn of<T>(state: &GrpcState, request: &Request<T>) -> Result<Self, Status> {
        let caller = access::caller(request)?;
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        // The access layer has read it: a scheme of six letters, a space, the token.
        let bearer = header.split_at_checked(7).map_or("", |(_, token)| token.trim()).to_owned();
        Ok(Self { state: state.clone(), caller, bearer })
    }

    /// The site that an event names, if this sender may write to it; none if there is no such site.
    async fn site(&self, text: &str) -> Result<Option<Arc<Site>>, Status> {
        access::find_site(&self.state, &self.caller, text).await
    }

    /// Whether a call that has lasted for a while may go on: a token can be revoked at any time.
    pub(super) async fn still_welcome(&self) -> Result<(), Status> {
        match self.state.gate.admit(&self.bearer).await {
            Ok(caller) if caller.has(Scope::IngestWrite) => Ok(()),
            Ok(_) => Err(Status::permission_denied(format!("the token has no scope `{}`", Scope::IngestWrite))),
            Err(Denied::Invalid) => Err(Status::unauthenticated("the bearer token is not valid any more")),
            Err(Denied::Unavailable(error)) => {
                // Nobody can tell, and without a database nothing is stored either.
                tracing::warn!(%error, "cannot check the token of a stream");
                Ok(())
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
        event: proto::Event,
        received_at: DateTime<Utc>,
    ) -> Result<Result<Event, Refused>, Status> {
        let id = convert::readable_id(&event).map(|id| id.to_string()).unwrap_or_default();
        let refused = |refusal: Refusal| Refused { id, why: refusal.into() };
        let name = event.site.trim().to_owned();
        let read = convert::read(event, received_at);
        let site = if name.is_empty() { Ok(None) } else { self.site(name).await };
        match (read, site) {
            (_, Err(status)) if status.code() != Code::Unavailable => Err(status),
            (Err(refusal), _) => Ok(Err(refused(refusal))),
            (Ok(_), Err(status)) => Err(status),
            (Ok((_, draft, arrival)), Ok(Some(site))) => {
                Ok(Event::accept(site.id, draft, &arrival, NAMES).map_err(refused))
            }
            (Ok(_), Ok(None)) => Ok(Err(refused(Refusal::unknown_site("site")))),
        }
    }

    async fn site(&mut self, name: String) -> Result<Option<Arc<Site>>, Status> {
        if let Some(known) = self.asked.get(&name) {
            return known.clone();
        }
        let found = self.sender.site(&name).await;
        self.asked.insert(name, found.clone());
        found
    }
}
