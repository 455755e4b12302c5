//! `IngestService`: events in, a result for each. The RPCs that stream are not served by this version.
//!
//! The events of one call are checked one by one, the good ones go to the pipeline together, and the answer waits for the commit. One
//! event that could be neither stored nor refused makes the whole call UNAVAILABLE: sending all of it again is harmless.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::Utc;
use tonic::{Request, Response, Status, Streaming};

use super::proto::ingest_result::Outcome as Verdict;
use super::proto::ingest_service_server::IngestService;
use super::proto::{
    IngestRequest, IngestResponse, IngestResult, Rejection, RejectionReason, StreamIngestRequest, StreamIngestResponse,
    WatchEventsRequest, WatchEventsResponse,
};
use super::{GrpcState, convert, proto, status};
use crate::domain::event::{Event, FieldNames};
use crate::domain::outcome::{Outcome, Unavailable};
use crate::domain::refusal::Refusal;
use crate::domain::signal::SignalSet;
use crate::domain::site::Site;

/// Most events of one request.
const MAX_EVENTS: usize = 1000;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

pub(super) struct Ingest {
    state: GrpcState,
}

impl Ingest {
    pub(super) fn new(state: GrpcState) -> Self {
        Self { state }
    }

    /// Stores what can be stored; one result an event, in the same order.
    async fn store(&self, events: Vec<proto::Event>) -> Result<Vec<IngestResult>, Unavailable> {
        let received_at = Utc::now();
        let mut sites = Sites { state: &self.state, asked: HashMap::new() };
        let mut accepted = Vec::with_capacity(events.len());
        let mut items = Vec::with_capacity(events.len());
        for event in events {
            let readable_id = convert::readable_id(&event).map(|id| id.to_string()).unwrap_or_default();
            let item = match sites.accept(event, received_at).await? {
                Ok(event) => {
                    let item = Item::Accepted { id: event.id.to_string(), signals: event.signals };
                    accepted.push(event);
                    item
                }
                Err(refusal) => Item::Refused { id: readable_id, refusal },
            };
            items.push(item);
        }
        let mut outcomes = self.state.pipeline.submit(accepted).await.into_iter();
        items.into_iter().map(|item| item.result(&mut outcomes)).collect()
    }
}

#[tonic::async_trait]
impl IngestService for Ingest {
    type StreamIngestStream = tokio_stream::Empty<Result<StreamIngestResponse, Status>>;
    type WatchEventsStream = tokio_stream::Empty<Result<WatchEventsResponse, Status>>;

    async fn ingest(&self, request: Request<IngestRequest>) -> Result<Response<IngestResponse>, Status> {
        let events = request.into_inner().events;
        let violation = match events.len() {
            0 => Some((RejectionReason::Missing, "`events` is required: at least one event".to_owned())),
            1..=MAX_EVENTS => None,
            _ => Some((RejectionReason::OutOfRange, format!("`events` has more than {MAX_EVENTS} items"))),
        };
        if let Some((reason, message)) = violation {
            return Err(status::bad_request(vec![Rejection::of(reason, "events", message)]));
        }
        let results = self.store(events).await.map_err(status::unavailable)?;
        Ok(Response::new(IngestResponse { results }))
    }

    async fn stream_ingest(
        &self,
        _: Request<Streaming<StreamIngestRequest>>,
    ) -> Result<Response<Self::StreamIngestStream>, Status> {
        status::unimplemented("StreamIngest")
    }

    async fn watch_events(&self, _: Request<WatchEventsRequest>) -> Result<Response<Self::WatchEventsStream>, Status> {
        status::unimplemented("WatchEvents")
    }
}

/// The sites that one call names, each asked for once.
struct Sites<'s> {
    state: &'s GrpcState,
    asked: HashMap<String, Option<Arc<Site>>>,
}

impl Sites<'_> {
    /// The event as the domain accepts it, or what is wrong with it.
    async fn accept(
        &mut self,
        event: proto::Event,
        received_at: chrono::DateTime<Utc>,
    ) -> Result<Result<Event, Refusal>, Unavailable> {
        let (site, draft, arrival) = match convert::read(event, received_at) {
            Ok(read) => read,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let site = match self.asked.get(&site) {
            Some(known) => known.clone(),
            None => {
                let found = self.state.directory.site(&site).await?;
                self.asked.insert(site, found.clone());
                found
            }
        };
        Ok(match site {
            Some(site) => Event::accept(site.id, draft, &arrival, NAMES),
            None => Err(Refusal::unknown_site("site")),
        })
    }
}

/// One event of the request, before its outcome is known.
enum Item {
    Accepted { id: String, signals: SignalSet },
    Refused { id: String, refusal: Refusal },
}

impl Item {
    /// The result of this item; an accepted one takes the next outcome.
    fn result(self, outcomes: &mut impl Iterator<Item = Outcome>) -> Result<IngestResult, Unavailable> {
        let (event_id, verdict) = match self {
            Self::Refused { id, refusal } => (id, Verdict::Rejected(refusal.into())),
            Self::Accepted { id, signals } => {
                let outcome = outcomes.next();
                debug_assert!(outcome.is_some(), "one outcome an event");
                let verdict = match outcome.unwrap_or(Outcome::Unavailable(Unavailable::Stopping)) {
                    Outcome::Stored(receipt) => Verdict::Stored(convert::placement(&receipt, signals)),
                    Outcome::Duplicate(receipt) => Verdict::Duplicate(convert::placement(&receipt, signals)),
                    Outcome::Dead(reason) => Verdict::Rejected(reason.into()),
                    Outcome::Unavailable(why) => return Err(why),
                };
                (id, verdict)
            }
        };
        Ok(IngestResult { event_id, outcome: Some(verdict) })
    }
}
