//! The three Watch RPCs as one: a kind of row, how it is watched, and what a message tells.

use std::fmt::Debug;
use std::future::Future;

use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::{
    self, Call, ChangeKind, Session, StoredEvent, WatchCallsRequest, WatchCallsResponse, WatchEventsRequest,
    WatchEventsResponse, WatchSessionsRequest, WatchSessionsResponse, watch_calls_response, watch_events_response,
    watch_sessions_response,
};
use prost_types::Timestamp;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::support::line::Bearer;

/// What is watched of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The site's UUID as text.
    pub site: String,
    pub month: Option<String>,
}

/// One message of a watch.
#[derive(Debug, Clone, PartialEq)]
pub struct Told<R> {
    pub token: String,
    pub what: What<R>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum What<R> {
    Start,
    End,
    Heartbeat,
    Change { kind: ChangeKind, old: Option<R>, new: Option<R>, committed_at: Option<Timestamp> },
}

/// A kind of row.
pub trait Watched: Clone + PartialEq + Debug + Send + Sync + 'static {
    type Response: Debug + Send + 'static;

    fn open(
        channel: InterceptedService<Channel, Bearer>,
        scope: &Scope,
        token: Option<String>,
    ) -> impl Future<Output = Result<Streaming<Self::Response>, Status>> + Send;

    /// What a message tells; none if it tells nothing that the contract knows.
    fn told(message: Self::Response) -> Option<Told<Self>>;

    /// Its primary key.
    fn key(&self) -> String;

    /// Whether a watcher of this scope may see it.
    fn within(&self, scope: &Scope) -> bool;
}

fn in_place(key: Option<&proto::SessionKey>, scope: &Scope) -> bool {
    key.is_some_and(|key| {
        key.site_id == scope.site && scope.month.as_ref().is_none_or(|month| *month == key.session_month)
    })
}

fn place(key: Option<&proto::SessionKey>) -> String {
    key.map(|key| format!("{} {}", key.site_id, key.session_month)).unwrap_or_default()
}

macro_rules! told {
    ($message:expr, $module:ident) => {{
        let what = match $message.payload? {
            $module::Payload::SnapshotStart(_) => What::Start,
            $module::Payload::SnapshotEnd(_) => What::End,
            $module::Payload::Heartbeat(_) => What::Heartbeat,
            $module::Payload::Change(change) => What::Change {
                kind: change.kind(),
                committed_at: change.committed_at,
                old: change.old,
                new: change.new,
            },
        };
        Some(Told { token: $message.resume_token, what })
    }};
}

impl Watched for StoredEvent {
    type Response = WatchEventsResponse;

    async fn open(
        channel: InterceptedService<Channel, Bearer>,
        scope: &Scope,
        resume_token: Option<String>,
    ) -> Result<Streaming<WatchEventsResponse>, Status> {
        let Scope { site, month: session_month } = scope.clone();
        let request = WatchEventsRequest { site, session_month, resume_token };
        Ok(IngestServiceClient::new(channel).watch_events(request).await?.into_inner())
    }

    fn told(message: WatchEventsResponse) -> Option<Told<Self>> {
        told!(message, watch_events_response)
    }

    fn key(&self) -> String {
        format!("{} {}", place(self.session.as_ref()), self.id)
    }

    fn within(&self, scope: &Scope) -> bool {
        in_place(self.session.as_ref(), scope)
    }
}

impl Watched for Session {
    type Response = WatchSessionsResponse;

    async fn open(
        channel: InterceptedService<Channel, Bearer>,
        scope: &Scope,
        resume_token: Option<String>,
    ) -> Result<Streaming<WatchSessionsResponse>, Status> {
        let Scope { site, month: session_month } = scope.clone();
        let request = WatchSessionsRequest { site, session_month, resume_token };
        Ok(ScoringServiceClient::new(channel).watch_sessions(request).await?.into_inner())
    }

    fn told(message: WatchSessionsResponse) -> Option<Told<Self>> {
        told!(message, watch_sessions_response)
    }

    fn key(&self) -> String {
        let id = self.key.as_ref().map(|key| key.session_id.as_str());
        format!("{} {}", place(self.key.as_ref()), id.unwrap_or_default())
    }

    fn within(&self, scope: &Scope) -> bool {
        in_place(self.key.as_ref(), scope)
    }
}

impl Watched for Call {
    type Response = WatchCallsResponse;

    async fn open(
        channel: InterceptedService<Channel, Bearer>,
        scope: &Scope,
        resume_token: Option<String>,
    ) -> Result<Streaming<WatchCallsResponse>, Status> {
        let request = WatchCallsRequest { site: scope.site.clone(), resume_token };
        Ok(CallsServiceClient::new(channel).watch_calls(request).await?.into_inner())
    }

    fn told(message: WatchCallsResponse) -> Option<Told<Self>> {
        told!(message, watch_calls_response)
    }

    fn key(&self) -> String {
        self.id.clone()
    }

    fn within(&self, scope: &Scope) -> bool {
        self.site_id == scope.site
    }
}
