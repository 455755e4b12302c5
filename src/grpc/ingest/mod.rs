//! `IngestService`: events in, a result for each; and [`super::watch`], as they are stored.
//!
//! Who may send what is settled in `admission.rs`, the stream lives in `stream.rs`. The events of one `Ingest` are checked one by one, the
//! good ones go to the pipeline together, and the answer waits for the commit. One event that could be neither stored nor refused makes
//! the whole call UNAVAILABLE: sending all of it again is harmless.

use std::collections::HashMap;
use std::pin::Pin;

use chrono::Utc;
use futures::Stream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::proto::ingest_result::Outcome as Verdict;
use super::proto::ingest_service_server::IngestService;
use super::proto::{
    IngestRequest, IngestResponse, IngestResult, Rejection, RejectionReason, StreamIngestRequest, StreamIngestResponse,
    WatchEventsRequest,
};
use super::{GrpcState, convert, status, watch};
use crate::domain::outcome::{Outcome, Unavailable};
use crate::domain::signal::SignalSet;
use crate::pipeline::{Pressure, Wanted};
use admission::{Admission, Refused, Sender};

mod admission;
mod stream;

/// Most events of one request.
const MAX_EVENTS: usize = 1000;

pub(super) struct Ingest {
    state: GrpcState,
}

impl Ingest {
    pub(super) fn new(state: GrpcState) -> Self {
        Self { state }
    }

    /// Stores what can be stored of these encoded events; one result each, in the same order. Nothing is stored before every event's site has been checked.
    async fn store(&self, sender: &Sender, events: Vec<Vec<u8>>) -> Result<Vec<IngestResult>, Status> {
        if self.refuses(&events).await {
            return Err(status::unavailable(Unavailable::Busy));
        }
        let received_at = Utc::now();
        let mut admission = Admission::of(sender);
        let mut accepted = Vec::with_capacity(events.len());
        let mut items = Vec::with_capacity(events.len());
        for event in events {
            items.push(match admission.admit(&event, received_at).await? {
                Ok(event) => {
                    let item = Ok((event.id.to_string(), event.signals));
                    accepted.push(event);
                    item
                }
                Err(refused) => Err(refused),
            });
        }
        let mut outcomes = self.state.pipeline.submit(accepted).await.into_iter();
        let mut result = |item: Result<(String, SignalSet), Refused>| match item {
            Err(refused) => Ok(refused.into()),
            Ok((id, signals)) => {
                let outcome = outcomes.next();
                debug_assert!(outcome.is_some(), "one outcome an event");
                settled(id, signals, outcome.unwrap_or(Outcome::Unavailable(Unavailable::Stopping)))
            }
        };
        items.into_iter().map(&mut result).collect::<Result<_, _>>().map_err(status::unavailable)
    }
}

impl Ingest {
    /// Whether the pipeline would not take these events now, as far as that can be told before any of them is understood.
    async fn refuses(&self, events: &[Vec<u8>]) -> bool {
        let pipeline = &self.state.pipeline;
        match pipeline.pressure() {
            Pressure::Low => false,
            Pressure::Full => true,
            Pressure::High => match self.wanted(events).await {
                Some(wanted) => pipeline.refuses(&wanted),
                // What is wrong with it has to be read to be told.
                None => false,
            },
        }
    }

    /// Whose events these are, how many and how large; none if one of them names no site that there is.
    async fn wanted(&self, events: &[Vec<u8>]) -> Option<Vec<Wanted>> {
        let mut by_name: HashMap<String, (usize, usize)> = HashMap::new();
        for event in events {
            let (events, bytes) = by_name.entry(convert::Envelope::of(event).site().to_owned()).or_default();
            *events += 1;
            *bytes += event.len();
        }
        let mut wanted = Vec::with_capacity(by_name.len());
        for (name, (events, bytes)) in by_name {
            let site = self.state.directory.site(&name).await.ok()??.id;
            wanted.push(Wanted { site, events, bytes });
        }
        Some(wanted)
    }
}

/// The result of an event that the pipeline took.
fn settled(event_id: String, signals: SignalSet, outcome: Outcome) -> Result<IngestResult, Unavailable> {
    let verdict = match outcome {
        Outcome::Stored(receipt) => Verdict::Stored(convert::placement(&receipt, signals)),
        Outcome::Duplicate(receipt) => Verdict::Duplicate(convert::placement(&receipt, signals)),
        Outcome::Dead(reason) => Verdict::Rejected(reason.into()),
        Outcome::Unavailable(why) => return Err(why),
    };
    Ok(IngestResult { event_id, outcome: Some(verdict) })
}

impl From<Refused> for IngestResult {
    fn from(refused: Refused) -> Self {
        Self { event_id: refused.id, outcome: Some(Verdict::Rejected(refused.why)) }
    }
}

#[tonic::async_trait]
impl IngestService for Ingest {
    type StreamIngestStream = Pin<Box<dyn Stream<Item = Result<StreamIngestResponse, Status>> + Send>>;
    type WatchEventsStream = watch::Answers<watch::Events>;

    async fn ingest(&self, request: Request<IngestRequest>) -> Result<Response<IngestResponse>, Status> {
        let sender = Sender::of(&self.state, &request)?;
        let events = request.into_inner().events;
        let violation = match events.len() {
            0 => Some((RejectionReason::Missing, "`events` is required: at least one event".to_owned())),
            1..=MAX_EVENTS => None,
            _ => Some((RejectionReason::OutOfRange, format!("`events` has more than {MAX_EVENTS} items"))),
        };
        if let Some((reason, message)) = violation {
            return Err(status::bad_request(vec![Rejection::of(reason, "events", message)]));
        }
        let stored = self.store(&sender, events).await;
        if stored.as_ref().is_err_and(|status| status.code() == Code::Unavailable) {
            self.state.pipeline.before_a_refusal().await;
        }
        let results = stored?;
        Ok(Response::new(IngestResponse { results }))
    }

    async fn stream_ingest(
        &self,
        request: Request<Streaming<StreamIngestRequest>>,
    ) -> Result<Response<Self::StreamIngestStream>, Status> {
        let sender = Sender::of(&self.state, &request)?;
        let deadline = request.extensions().get::<super::call::Deadline>().copied();
        Ok(Response::new(Box::pin(stream::acknowledge(sender, request.into_inner(), deadline))))
    }

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        watch::begin::<watch::Events, _>(&self.state, request).await
    }
}
