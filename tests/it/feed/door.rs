//! Whoever writes through the doors: events and calls over gRPC, sent again wherever an answer did not come.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::{
    Call, Event, GetCallRequest, IngestRequest, ProviderCallKey, PushedCall, RecordCallsRequest, get_call_request,
};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use uuid::Uuid;

use super::work::{SITES, Work};
use crate::support::line::Bearer;

pub struct Door {
    pub servers: Vec<SocketAddr>,
    pub token: String,
}

impl Door {
    /// A connection to a server, or none while it is away.
    async fn knock(&self, at: usize) -> Option<InterceptedService<Channel, Bearer>> {
        let address = self.servers[at % self.servers.len()];
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI");
        let endpoint = endpoint.timeout(Duration::from_secs(10)).connect_timeout(Duration::from_secs(5));
        Some(InterceptedService::new(endpoint.connect().await.ok()?, Bearer::new(&self.token)))
    }

    /// Writes until enough has been written by all.
    pub async fn run(self, work: Arc<Work>) {
        let mut round = 0;
        while !work.is_over() {
            round += 1;
            work.pace().await;
            let mut at = round;
            while let Err(status) = self.round(&work, round, at).await {
                // Nothing was promised: the same again, at the other server.
                let passing =
                    [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded, Code::Internal];
                assert!(passing.contains(&status.code()), "{status:?}");
                at += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    async fn round(&self, work: &Work, round: usize, at: usize) -> Result<(), Status> {
        let channel = self.knock(at).await.ok_or_else(|| Status::unavailable("nobody listens"))?;
        let site = SITES[round % 2];
        let events: Vec<Event> = (0..200).map(|n| event(site, round, n)).collect();
        let results =
            IngestServiceClient::new(channel.clone()).ingest(IngestRequest::of(events)).await?.into_inner().results;
        let stored = results.iter().filter(|result| matches!(result.outcome, Some(Outcome::Stored(_)))).count();
        work.add(stored as u64);
        let calls: Vec<PushedCall> = (0..10).map(|n| call(site, round, n)).collect();
        let results =
            CallsServiceClient::new(channel).record_calls(RecordCallsRequest { calls }).await?.into_inner().results;
        work.add(results.len() as u64);
        Ok(())
    }

    /// A call as the server knows it.
    pub async fn call(&self, site: Uuid, id: &str) -> Call {
        let channel = self.knock(0).await.expect("it listens");
        let call = Some(get_call_request::Call::CallId(id.to_owned()));
        let answer = CallsServiceClient::new(channel).get_call(GetCallRequest { site: site.to_string(), call }).await;
        answer.expect("it is there").into_inner().call.expect("a call")
    }
}

/// Ten events a visit.
fn event(site: Uuid, round: usize, n: usize) -> Event {
    let visit = n / 10;
    Event {
        id: Some(Uuid::from_u128(0xd00_0000_0000 + (round * 1_000 + n) as u128).to_string()),
        site: site.to_string(),
        url: format!("https://shop.example/{n}?gclid=g{visit}"),
        session_id: format!("door-{round}-{visit}"),
        category: "interaction".to_owned(),
        action: "view".to_owned(),
        fingerprint: Some(format!("door-fp-{round}-{visit}")),
        ..Event::default()
    }
}

/// Every other one finds its visit by the fingerprint.
fn call(site: Uuid, round: usize, n: usize) -> PushedCall {
    PushedCall {
        site: site.to_string(),
        key: Some(ProviderCallKey { provider: "door".to_owned(), provider_call_id: format!("{round}-{n}") }),
        dialled_number: "+12025550123".to_owned(),
        started_at: Some(prost_types::Timestamp { seconds: Utc::now().timestamp(), nanos: 0 }),
        fingerprint: n.is_multiple_of(2).then(|| format!("door-fp-{round}-{n}")),
        ..PushedCall::default()
    }
}
