//! Every door of a server, and clients at all of them at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::{IngestRequest, IngestResult, PushedCall, RecordCallRequest, StreamIngestRequest};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::ledger::Ledger;
use crate::support::calls::KEY;
use crate::support::line::Bearer;
use crate::support::process::Server;
use crate::support::qstash::{CURRENT_KEY, claims, sign};
use crate::world::{Door, Told, World};

pub const ORIGIN: &str = "https://shop.example";
const PUBLIC_URL: &str = "https://collect.example";
/// Nobody waits longer; it is longer than any server of ours takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a server needs so that all doors are open.
pub const OPEN: [(&str, &str); 3] =
    [("CALLER_KEY", KEY), ("PUBLIC_URL", PUBLIC_URL), ("QSTASH_CURRENT_SIGNING_KEY", CURRENT_KEY)];

/// What was said to one event or call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Stored: now, or before.
    Yes,
    /// Not now; whether it was told when to come again.
    Later { told_when: bool },
    /// The connection broke.
    Nothing,
    /// What no door should say to a good event.
    Odd(String),
}

pub type Caller = InterceptedService<Channel, Bearer>;

/// The doors of one server.
#[derive(Clone)]
pub struct Doors {
    http: reqwest::Client,
    sync: String,
    worker: String,
    grpc: Caller,
}

impl Doors {
    pub fn of(server: &Server, token: &str) -> Self {
        Self {
            http: reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().expect("a client"),
            sync: server.sync_url(),
            worker: format!("{}/worker", server.sync_url()),
            grpc: caller(server, token),
        }
    }

    /// Sends events that take this door; what was said to each.
    pub async fn send(&self, door: Door, events: &[Told]) -> Vec<Said> {
        match door {
            Door::Sync => {
                let mut said = Vec::new();
                for event in events {
                    said.extend(self.post(event.wire(), 1).await);
                }
                said
            }
            Door::SyncBatch => {
                let batch = json!({"events": events.iter().map(Told::wire).collect::<Vec<_>>()});
                self.post(batch, events.len()).await
            }
            Door::Worker => {
                let mut said = Vec::new();
                for event in events {
                    said.push(self.deliver(event.job()).await);
                }
                said
            }
            Door::Ingest => self.ingest(events).await,
            Door::Stream => self.stream(events).await,
        }
    }

    /// One request to the public door with so many events.
    async fn post(&self, body: Value, events: usize) -> Vec<Said> {
        let sent = self.http.post(&self.sync).header("Origin", ORIGIN).body(body.to_string()).send().await;
        match answer(sent).await {
            Ok((200, _, body)) if body["results"].is_array() => {
                let results = body["results"].as_array().cloned().unwrap_or_default();
                let mut said: Vec<Said> = results.iter().map(verdict).collect();
                said.resize(events, Said::Odd("a batch has a verdict for each event".to_owned()));
                said
            }
            Ok((200, _, body)) => vec![verdict(&body); events],
            Ok(other) => vec![not_stored(other); events],
            Err(said) => vec![said; events],
        }
    }

    async fn deliver(&self, job: String) -> Said {
        let signature = sign(CURRENT_KEY, &claims(&format!("{PUBLIC_URL}/api/sync/worker"), &job));
        let sent = self.http.post(&self.worker).header("Upstash-Signature", signature).body(job).send().await;
        match answer(sent).await {
            Ok((200, ..)) => Said::Yes,
            Ok(other) => not_stored(other),
            Err(said) => said,
        }
    }

    async fn ingest(&self, events: &[Told]) -> Vec<Said> {
        let request = IngestRequest::of(events.iter().map(Told::message).collect());
        match IngestServiceClient::new(self.grpc.clone()).ingest(request).await {
            Ok(answer) => {
                let mut said: Vec<Said> = answer.into_inner().results.iter().map(outcome).collect();
                said.resize(events.len(), Said::Odd("an answer has a result for each event".to_owned()));
                said
            }
            Err(status) => vec![refusal(&status); events.len()],
        }
    }

    async fn stream(&self, events: &[Told]) -> Vec<Said> {
        let message = |at: usize| StreamIngestRequest::of(at.to_string(), Some(events[at].message()));
        let messages: Vec<_> = (0..events.len()).map(message).collect();
        let mut said = vec![None; events.len()];
        let opened = IngestServiceClient::new(self.grpc.clone()).stream_ingest(tokio_stream::iter(messages)).await;
        let end = match opened {
            Err(status) => refusal(&status),
            Ok(answer) => {
                let mut acknowledgements = answer.into_inner();
                loop {
                    match acknowledgements.message().await {
                        Ok(Some(one)) => {
                            let at = one.message_id.parse::<usize>().unwrap_or(usize::MAX);
                            if let (Some(slot), Some(result)) = (said.get_mut(at), one.result) {
                                *slot = Some(outcome(&result));
                            }
                        }
                        // In order, so nothing is left without an acknowledgement.
                        Ok(None) => {
                            break Said::Odd("the stream ended in order without this acknowledgement".to_owned());
                        }
                        Err(status) => break refusal(&status),
                    }
                }
            }
        };
        said.into_iter().map(|said| said.unwrap_or_else(|| end.clone())).collect()
    }

    pub async fn call(&self, call: PushedCall) -> Said {
        let request = RecordCallRequest { call: Some(call) };
        match CallsServiceClient::new(self.grpc.clone()).record_call(request).await {
            Ok(_) => Said::Yes,
            Err(status) => refusal(&status),
        }
    }
}

/// A channel that shows its token, and connects when it is used.
pub fn caller(server: &Server, token: &str) -> Caller {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    InterceptedService::new(endpoint.timeout(PATIENCE).connect_lazy(), Bearer::new(token))
}

type Answer = (u16, bool, Value);

async fn answer(sent: Result<reqwest::Response, reqwest::Error>) -> Result<Answer, Said> {
    let broken = |error: reqwest::Error| match error.is_timeout() {
        true => Said::Odd(format!("no answer within {PATIENCE:?}")),
        false => Said::Nothing,
    };
    let response = sent.map_err(broken)?;
    let (status, told_when) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
    let body = response.text().await.map_err(broken)?;
    Ok((status, told_when, serde_json::from_str(&body).unwrap_or(Value::String(body))))
}

fn not_stored((status, told_when, body): Answer) -> Said {
    match status {
        503 | 429 => Said::Later { told_when },
        other => Said::Odd(format!("{other} {body}")),
    }
}

/// What the public door says to one event of its answer.
fn verdict(result: &Value) -> Said {
    match result["status"].as_str() {
        Some("stored" | "duplicate") => Said::Yes,
        Some("rejected") if result["error"].as_str().is_some_and(|error| error.ends_with("unavailable")) => {
            Said::Later { told_when: true }
        }
        _ => Said::Odd(result.to_string()),
    }
}

fn outcome(result: &IngestResult) -> Said {
    match &result.outcome {
        Some(Outcome::Stored(_) | Outcome::Duplicate(_)) => Said::Yes,
        other => Said::Odd(format!("{other:?}")),
    }
}

fn refusal(status: &Status) -> Said {
    // What the client's own end says of a connection that broke has its error as a source; what a server says has none.
    if std::error::Error::source(status).is_some() {
        return Said::Nothing;
    }
    match status.code() {
        Code::Unavailable => Said::Later { told_when: status.get_details_retry_info().is_some() },
        _ => Said::Odd(format!("{:?} {}", status.code(), status.message())),
    }
}

/// What is to be sent, by number.
#[derive(Debug, Clone, Default)]
pub struct Work {
    pub events: Vec<u32>,
    pub calls: Vec<u32>,
}

impl Work {
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && self.calls.is_empty()
    }
}

/// Clients at each door, and how many events each of them sends at once.
const CLIENTS: [(Door, usize, usize); 5] =
    [(Door::Sync, 6, 1), (Door::SyncBatch, 2, 10), (Door::Worker, 6, 1), (Door::Ingest, 2, 20), (Door::Stream, 2, 20)];
const CALL_CLIENTS: usize = 2;

/// Sends all of it through every door at once, each event once; what was said is in the ledger. Stops early when `enough`.
pub async fn send(doors: &Doors, world: &Arc<World>, ledger: &Arc<Ledger>, work: &Work, enough: &Arc<AtomicBool>) {
    let mut queues: [Vec<Told>; 5] = Default::default();
    for event in work.events.iter().rev().map(|n| world.event(*n)) {
        queues[event.door as usize].push(event);
    }
    let mut clients = JoinSet::new();
    for (door, count, at_once) in CLIENTS {
        let queue = Arc::new(Mutex::new(std::mem::take(&mut queues[door as usize])));
        for _ in 0..count {
            let (doors, ledger, queue, enough) = (doors.clone(), ledger.clone(), queue.clone(), enough.clone());
            clients.spawn(async move {
                while !enough.load(Ordering::Relaxed) {
                    let events = {
                        let mut queue = queue.lock().await;
                        let left = queue.len().saturating_sub(at_once);
                        queue.split_off(left)
                    };
                    if events.is_empty() {
                        return;
                    }
                    let began = Instant::now();
                    let said = doors.send(door, &events).await;
                    events.iter().zip(said).for_each(|(event, said)| ledger.event(event.n, began, said));
                }
            });
        }
    }
    let calls = Arc::new(Mutex::new(work.calls.clone()));
    for _ in 0..CALL_CLIENTS {
        let (doors, world, ledger) = (doors.clone(), world.clone(), ledger.clone());
        let (calls, enough) = (calls.clone(), enough.clone());
        clients.spawn(async move {
            while !enough.load(Ordering::Relaxed) {
                let Some(n) = calls.lock().await.pop() else { return };
                let began = Instant::now();
                let said = doors.call(world.call(n)).await;
                ledger.call(n, began, said);
            }
        });
    }
    clients.join_all().await;
}

/// Sends all of it, and again what was not answered, until everything is.
pub async fn send_until_answered(
    doors: &Doors,
    world: &Arc<World>,
    ledger: &Arc<Ledger>,
    work: &Work,
    limit: Duration,
) -> Result<(), String> {
    let (began, never) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let mut work = work.clone();
    loop {
        ledger.forget(&work);
        send(doors, world, ledger, &work, &never).await;
        work = ledger.unanswered(&work);
        if work.is_empty() {
            return Ok(());
        }
        if began.elapsed() > limit {
            let (events, calls) = (work.events.len(), work.calls.len());
            return Err(format!("{events} events and {calls} calls are still not answered after {limit:?}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
