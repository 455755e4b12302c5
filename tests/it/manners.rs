//! Manners of the gRPC listener that no service has to think of: bytes that are no message, compression, and metrics of every call.

use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::{ScoreSignalsRequest, Signal, SignalFacts};
use tonic::client::Grpc;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::support::database::{Database, database};
use crate::support::metrics::Metrics;
use crate::support::process::Server;
use crate::support::raw::Raw;

mod frames;

const SCORE_SIGNALS: &str = "opsmantik.v1.ScoringService/ScoreSignals";

struct Door {
    server: Server,
    channel: Channel,
    token: String,
    _database: Database,
}

impl Door {
    async fn open() -> Self {
        let database = database().await;
        let server = Server::start(&database.url).await;
        let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let token = database.token(&Scope::ALL, None).await;
        Self { channel: endpoint.connect().await.expect("it listens"), server, token, _database: database }
    }

    /// A request as every test here makes it.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(Duration::from_secs(20));
        let bearer = format!("Bearer {}", self.token).parse().expect("a token is visible text");
        request.metadata_mut().insert("authorization", bearer);
        request
    }

    /// Sends these bytes where a message is expected.
    async fn raw(&self, rpc: &str, bytes: &[u8]) -> Result<Vec<u8>, Status> {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await.expect("the connection holds");
        let path = format!("/{rpc}").parse().expect("a test's own path");
        Ok(client.unary(self.request(bytes.to_vec()), path, Raw).await?.into_inner())
    }

    /// Waits until calls of this RPC have ended so as often as `times`, and none of it runs any more.
    async fn ended(&self, rpc: &str, code: &str, times: f64) {
        let began = Instant::now();
        loop {
            let metrics = Metrics::of(&self.server).await;
            let running = metrics.value("opsmantik_grpc_in_flight", &[("rpc", rpc)]);
            let ended = metrics.value("opsmantik_grpc_requests_total", &[("rpc", rpc), ("code", code)]);
            if (running, ended) == (Some(0.0), Some(times)) {
                return;
            }
            let late = began.elapsed() > Duration::from_secs(10);
            assert!(!late, "{rpc} {code}: {ended:?} ended, {running:?} run");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn hover() -> ScoreSignalsRequest {
    ScoreSignalsRequest { signals: vec![Signal::HoverIntent.into()], ..ScoreSignalsRequest::default() }
}

#[tokio::test]
async fn bytes_that_are_no_message_are_the_callers_mistake_and_every_end_of_a_call_is_counted() {
    let door = Door::open().await;
    for bytes in [&b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"\x0a\x7f", b"\x0fpassword"] {
        let status = door.raw(SCORE_SIGNALS, bytes).await.expect_err("no message");
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(!status.message().contains("password"), "{status:?}");
    }
    let mut scoring = ScoringServiceClient::new(door.channel.clone());
    let mut request = door.request(hover());
    request.metadata_mut().insert("x-request-id", "order-17".parse().expect("visible"));
    scoring.score_signals(request).await.expect("a good request");
    for rpc in ["opsmantik.v1.ScoringService/Nothing", "nobody.Nowhere/Nothing"] {
        assert_eq!(door.raw(rpc, b"").await.expect_err("no such RPC").code(), Code::Unimplemented);
    }
    door.ended(SCORE_SIGNALS, "invalid_argument", 3.0).await;
    door.ended(SCORE_SIGNALS, "ok", 1.0).await;
    // No label of a caller's making.
    door.ended("unknown", "unimplemented", 2.0).await;
    let seconds =
        Metrics::of(&door.server).await.value("opsmantik_grpc_request_seconds_count", &[("rpc", SCORE_SIGNALS)]);
    assert_eq!(seconds, Some(4.0));

    // A stream is counted by its end, which is here the client's.
    let watch_rpc = "grpc.health.v1.Health/Watch";
    let mut health = HealthClient::new(door.channel.clone());
    let mut watch = health.watch(HealthCheckRequest::default()).await.expect("it is served").into_inner();
    watch.message().await.expect("the first answer").expect("a status");
    let running = Metrics::of(&door.server).await.value("opsmantik_grpc_in_flight", &[("rpc", watch_rpc)]);
    assert_eq!(running, Some(1.0));
    drop(watch);
    door.ended(watch_rpc, "cancelled", 1.0).await;
    // So is a call whose client leaves before it has said all.
    let mut client = Grpc::new(door.channel.clone());
    client.ready().await.expect("the connection holds");
    let path = format!("/{SCORE_SIGNALS}").parse().expect("a test's own path");
    let silent = client.client_streaming(door.request(tokio_stream::pending::<Vec<u8>>()), path, Raw);
    tokio::time::timeout(Duration::from_millis(300), silent).await.expect_err("it waits for the message");
    door.ended(SCORE_SIGNALS, "cancelled", 1.0).await;
    // And one that its own deadline ends.
    let mut short = Request::new(HealthCheckRequest::default());
    short.set_timeout(Duration::from_millis(200));
    let mut watch = health.watch(short).await.expect("it is served").into_inner();
    while let Ok(Some(_)) = watch.message().await {}
    let began = Instant::now();
    // The client's clock may be the faster one; then it hangs up.
    let ends = "opsmantik_grpc_requests_total";
    loop {
        let metrics = Metrics::of(&door.server).await;
        let count = |code| metrics.value(ends, &[("rpc", watch_rpc), ("code", code)]).unwrap_or_default();
        if count("deadline_exceeded") + count("cancelled") == 2.0 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "the deadline ended nothing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let said = door.server.program.said();
    let mut failures = said.lines().filter(|line| line.contains("call ended"));
    let logged = failures.next().expect("a failed call is in the log");
    assert!(logged.contains("invalid_argument") && logged.contains("request.id"), "{logged}");
}

#[tokio::test]
async fn requests_and_answers_may_be_compressed() {
    let door = Door::open().await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        let scoring = ScoringServiceClient::new(door.channel.clone());
        let mut scoring = scoring.send_compressed(encoding).accept_compressed(encoding);
        let request = ScoreSignalsRequest { signals: vec![Signal::HoverIntent.into(); 1000], ..hover() };
        let answer = scoring.score_signals(door.request(request)).await.expect("a good request");
        let told = answer.metadata().get("grpc-encoding").map(|name| name.as_bytes().to_vec());
        assert_eq!(told, Some(encoding.to_string().into_bytes()));
        assert_eq!(answer.into_inner().score.map(|score| score.value), Some(15));
    }
    let mut scoring = ScoringServiceClient::new(door.channel.clone());
    let answer = scoring.score_signals(door.request(hover())).await.expect("a good request");
    assert!(!answer.metadata().contains_key("grpc-encoding"), "who does not ask gets it plain");
}

#[tokio::test]
async fn a_small_message_that_unpacks_to_a_large_one_is_refused_before_it_takes_room() {
    let door = Door::open().await;
    let bomb = SignalFacts { category: "x".repeat(64 << 20), ..SignalFacts::default() };
    let bomb = ScoreSignalsRequest { facts: vec![bomb], ..ScoreSignalsRequest::default() };
    let before = peak_kib(&door.server);
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        let mut scoring = ScoringServiceClient::new(door.channel.clone()).send_compressed(encoding);
        let status = scoring.score_signals(door.request(bomb.clone())).await.expect_err("over 4 MiB");
        assert_eq!(status.code(), Code::ResourceExhausted, "{encoding}: {status:?}");
    }
    let grown = peak_kib(&door.server) - before;
    assert!(grown < 32 << 10, "it took {grown} KiB");
    let mut scoring = ScoringServiceClient::new(door.channel.clone());
    scoring.score_signals(door.request(hover())).await.expect("it serves on");
}

#[tokio::test]
async fn a_crowd_of_empty_items_is_refused_before_it_takes_memory() {
    let door = Door::open().await;
    let before = peak_kib(&door.server);
    let lists = [
        ("opsmantik.v1.IngestService/Ingest", 1, "events"),
        ("opsmantik.v1.CallsService/RecordCalls", 1, "calls"),
        (SCORE_SIGNALS, 2, "facts"),
    ];
    for (rpc, tag, list) in lists {
        let began = Instant::now();
        let status = door.raw(rpc, &[tag << 3 | 2, 0].repeat(2_000_000)).await.expect_err("more than 1000");
        assert!(began.elapsed() < Duration::from_secs(5), "{rpc} took {:?}", began.elapsed());
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let violations = status.get_details_bad_request().expect("violations").field_violations;
        let [violation] = violations.as_slice() else { panic!("one violation: {violations:?}") };
        assert_eq!((violation.field.as_str(), violation.reason.as_str()), (list, "REJECTION_REASON_OUT_OF_RANGE"));
        assert_eq!(violation.description, format!("`{list}` has more than 1000 items"));
    }
    let grown = peak_kib(&door.server) - before;
    assert!(grown < 60 << 10, "it took {grown} KiB");
}

/// The most memory that the server had so far; unknown (0) where there is no `/proc`.
fn peak_kib(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.program.pid())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.split_whitespace().next()).map_or(0, |kib| kib.parse().expect("a number"))
}
