//! The door over a real socket, with a database that is away: what must work all the same, and what must say so.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;
use uuid::Uuid;

use super::proto::calls_service_client::CallsServiceClient;
use super::proto::ingest_result::Outcome;
use super::proto::ingest_service_client::IngestServiceClient;
use super::proto::scoring_service_client::ScoringServiceClient;
use super::proto::{
    Event, IngestRequest, RejectionReason, ScoreSignalsRequest, Signal, WatchCallsRequest, WatchEventsRequest,
    WatchSessionsRequest,
};
use super::*;
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::id::TokenId;
use crate::keeper::Nudge;
use crate::pipeline::PipelineConfig;
use crate::store::Store;

struct Door {
    channel: Channel,
    stop: CancellationToken,
    served: JoinHandle<anyhow::Result<()>>,
}

const TOKEN: &str = "om_test";

/// A gate that lets one token do everything.
fn gate(store: &Store) -> Gate {
    let caller = Caller::Token {
        id: TokenId::from_uuid(Uuid::from_u128(1)),
        scopes: Scope::ALL.to_vec(),
        reach: Reach::AllSites,
    };
    Gate::new(store.clone()).knowing(TOKEN, caller)
}

#[allow(clippy::result_large_err)] // the shape of an interceptor
fn with_token(mut request: Request<()>) -> Result<Request<()>, Status> {
    let value = format!("Bearer {TOKEN}").parse().expect("a token is visible text");
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}

/// A server whose database refuses connections.
async fn door() -> Door {
    let stop = CancellationToken::new();
    let store = Store::new("postgres://nobody@127.0.0.1:1/none", 2).await.expect("the URL is one");
    let state = GrpcState {
        feed: crate::feed::Feed::unfit("no feed here"),
        pipeline: Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default()),
        directory: Directory::new(store.clone()),
        gate: gate(&store),
        calls: Calls::new(store.clone()),
        caller_key: Some(CallerKey::new(&"k".repeat(32)).expect("long enough")),
        store: store.clone(),
        stop: stop.clone(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let listener = Listener::new(listener, Protection::Loopback).expect("on loopback");
    let served = tokio::spawn(serve(listener, state, Health::of(store), stop.clone()));
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address is a URI");
    Door { channel: endpoint.connect().await.expect("the server listens"), stop, served }
}

fn event() -> Event {
    Event {
        id: Some(Uuid::from_u128(1).to_string()),
        site: "demo".to_owned(),
        url: "https://a.example/".to_owned(),
        session_id: "s".to_owned(),
        ..Event::default()
    }
}

#[tokio::test]
async fn signals_are_scored_without_a_database_and_the_request_id_comes_back() {
    let door = door().await;
    let mut scoring = ScoringServiceClient::with_interceptor(door.channel.clone(), with_token);
    let message = ScoreSignalsRequest { signals: vec![Signal::HoverIntent.into()], ..ScoreSignalsRequest::default() };

    let mut request = Request::new(message.clone());
    request.metadata_mut().insert("x-request-id", "order-17".parse().expect("visible"));
    let answer = scoring.score_signals(request).await.expect("a good request");
    assert_eq!(answer.metadata().get("x-request-id").map(|id| id.as_bytes()), Some("order-17".as_bytes()));
    let score = answer.into_inner().score.expect("always set");
    let lines: Vec<_> = score.breakdown.iter().map(|line| (line.signal(), line.points)).collect();
    assert_eq!((score.value, lines, score.capped), (15, vec![(Signal::HoverIntent, 15)], false));

    let answer = scoring.score_signals(message).await.expect("a good request");
    assert!(answer.metadata().contains_key("x-request-id"), "made when there was none");
}

#[tokio::test]
async fn a_bad_request_names_its_fields_in_the_status_details() {
    let door = door().await;
    let mut scoring = ScoringServiceClient::with_interceptor(door.channel.clone(), with_token);
    let many = ScoreSignalsRequest { signals: vec![99; 1000], ..ScoreSignalsRequest::default() };
    let status = scoring.score_signals(many).await.expect_err("no such signals");
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_details_bad_request().expect("violations");
    assert_eq!(details.field_violations.len(), 16, "trailers are bounded");
    assert_eq!(details.field_violations[0].field, "signals[0]");
    assert_eq!(details.field_violations[0].reason, "REJECTION_REASON_INVALID");

    let mut ingest = IngestServiceClient::with_interceptor(door.channel.clone(), with_token);
    for (events, reason) in
        [(vec![], "REJECTION_REASON_MISSING"), (vec![event(); 1001], "REJECTION_REASON_OUT_OF_RANGE")]
    {
        let status = ingest.ingest(IngestRequest::of(events)).await.expect_err("not 1 to 1000 events");
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().expect("violations").field_violations;
        let [violation] = violations.as_slice() else { panic!("one violation: {violations:?}") };
        assert_eq!((violation.field.as_str(), violation.reason.as_str()), ("events", reason));
    }
    let huge = Event { label: Some("x".repeat(5 << 20)), ..event() };
    let status = ingest.ingest(IngestRequest::of(vec![huge])).await.expect_err("over 4 MiB");
    assert_eq!(status.code(), Code::OutOfRange);
}

#[tokio::test]
async fn without_a_database_events_are_refused_or_unavailable_and_never_lost_in_silence() {
    let door = door().await;
    let mut ingest = IngestServiceClient::with_interceptor(door.channel.clone(), with_token);
    let status = ingest.ingest(IngestRequest::of(vec![event()])).await.expect_err("no database");
    assert_eq!(status.code(), Code::Unavailable);
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert_eq!(delay, Some(Duration::from_secs(5)));
    assert!(!status.message().contains("127.0.0.1"), "inner errors stay inside: {}", status.message());

    let events = vec![
        Event { site: String::new(), ..event() },
        Event { id: Some("no uuid".to_owned()), ..event() },
        Event { label: Some("x".repeat(70_000)), ..event() },
    ];
    let results = ingest.ingest(IngestRequest::of(events)).await.expect("all are refused").into_inner().results;
    let told: Vec<_> = results
        .iter()
        .map(|result| match &result.outcome {
            Some(Outcome::Rejected(rejection)) => {
                (result.event_id.is_empty(), rejection.reason(), rejection.field.as_str())
            }
            other => panic!("not rejected: {other:?}"),
        })
        .collect();
    assert_eq!(
        told,
        [
            (false, RejectionReason::Missing, "site"),
            (true, RejectionReason::Invalid, "id"),
            (false, RejectionReason::TooLarge, ""),
        ]
    );
}

#[tokio::test]
async fn a_watch_is_refused_for_what_is_wrong_with_it() {
    let door = door().await;
    let mut events = IngestServiceClient::with_interceptor(door.channel.clone(), with_token);
    let mut sessions = ScoringServiceClient::with_interceptor(door.channel.clone(), with_token);
    let mut calls = CallsServiceClient::with_interceptor(door.channel.clone(), with_token);
    let nowhere = [
        calls.watch_calls(WatchCallsRequest::default()).await.map(drop),
        sessions.watch_sessions(WatchSessionsRequest::default()).await.map(drop),
        events.watch_events(WatchEventsRequest::default()).await.map(drop),
    ];
    let request =
        WatchEventsRequest { site: "a".to_owned(), session_month: Some("soon".to_owned()), ..Default::default() };
    let never = events.watch_events(request).await.map(drop);
    for (answer, field) in nowhere.into_iter().chain([never]).zip(["site", "site", "site", "session_month"]) {
        let status = answer.expect_err("nothing to watch");
        let named = status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
        assert_eq!((status.code(), named.as_deref()), (Code::InvalidArgument, Some(field)));
    }
    let request = WatchEventsRequest { site: "a".to_owned(), ..Default::default() };
    let status = events.watch_events(request).await.expect_err("no database");
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn nobody_is_answered_without_a_token_but_health() {
    let door = door().await;
    let anonymous = ScoringServiceClient::new(door.channel.clone()).score_signals(ScoreSignalsRequest::default()).await;
    assert_eq!(anonymous.expect_err("no token").code(), Code::Unauthenticated);
    let unknown = ScoringServiceClient::with_interceptor(door.channel.clone(), |mut request: Request<()>| {
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer om_{}", "A".repeat(43)).parse().expect("visible"));
        Ok(request)
    });
    let mut unknown = unknown;
    let status = unknown.score_signals(ScoreSignalsRequest::default()).await.expect_err("who knows");
    assert_eq!(status.code(), Code::Unavailable, "without a database nobody can tell");
}

#[tokio::test]
async fn a_stream_ends_with_its_callers_deadline() {
    let door = door().await;
    let mut request = Request::new(tokio_stream::pending());
    request.set_timeout(Duration::from_millis(300));
    let mut ingest = IngestServiceClient::with_interceptor(door.channel.clone(), with_token);
    let began = std::time::Instant::now();
    let mut stream = ingest.stream_ingest(request).await.expect("a stream").into_inner();
    let end = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("it ends");
    assert_eq!(end.expect_err("the deadline has passed").code(), Code::DeadlineExceeded);
    assert!(began.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn health_follows_the_database_and_a_watch_does_not_hold_up_the_stop() {
    let door = door().await;
    let mut health = HealthClient::new(door.channel.clone());
    let ask = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for name in ["", "opsmantik.v1.IngestService", "opsmantik.v1.ScoringService", "opsmantik.v1.CallsService"] {
        let answer = health.check(ask(name)).await.expect("a known name").into_inner();
        assert_eq!(answer.status(), ServingStatus::NotServing, "{name}");
    }
    assert_eq!(health.check(ask("nobody")).await.expect_err("no such service").code(), Code::NotFound);

    let mut watch = health.watch(ask("")).await.expect("a known name").into_inner();
    door.stop.cancel();
    let stopped = tokio::time::timeout(Duration::from_secs(5), door.served).await;
    stopped.expect("well before the grace ends").expect("no panic").expect("a clean stop");
    while let Ok(Some(told)) = watch.message().await {
        assert_eq!(told.status(), ServingStatus::NotServing);
    }
}

#[tokio::test]
async fn both_reflections_list_every_service() {
    use tonic_reflection::pb::{v1, v1alpha};
    let door = door().await;
    let expected = [
        "grpc.health.v1.Health",
        "opsmantik.v1.CallsService",
        "opsmantik.v1.IngestService",
        "opsmantik.v1.ScoringService",
    ];
    macro_rules! listed {
        ($version:ident) => {{
            use $version::server_reflection_request::MessageRequest;
            use $version::server_reflection_response::MessageResponse;
            let list = $version::ServerReflectionRequest {
                message_request: Some(MessageRequest::ListServices(String::new())),
                ..Default::default()
            };
            let mut client = $version::server_reflection_client::ServerReflectionClient::with_interceptor(
                door.channel.clone(),
                with_token,
            );
            let mut answers =
                client.server_reflection_info(tokio_stream::once(list)).await.expect("it is served").into_inner();
            match answers.message().await.expect("an answer").and_then(|answer| answer.message_response) {
                Some(MessageResponse::ListServicesResponse(list)) => {
                    list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
                }
                other => panic!("no list: {other:?}"),
            }
        }};
    }
    for names in [listed!(v1), listed!(v1alpha)] {
        for name in expected {
            assert!(names.iter().any(|listed| listed == name), "{name} in {names:?}");
        }
    }
}

#[tokio::test]
async fn an_address_that_others_reach_is_refused_in_plaintext_unless_the_operator_says_so() {
    let address = |text: &str| text.parse::<SocketAddr>().expect("a test's own address");
    let loopback = ["127.0.0.1:50051", "127.8.9.1:1", "[::1]:50051", "[::ffff:127.0.0.1]:50051"];
    let exposed = ["0.0.0.0:50051", "[::]:50051", "192.0.2.1:50051", "[2001:db8::1]:50051"];
    for own in loopback {
        assert!(check_address(address(own), &Protection::Loopback).is_ok(), "{own}");
    }
    let files = TlsFiles { cert: "/cert".into(), key: "/key".into(), client_ca: None };
    for exposed in exposed {
        let refused = check_address(address(exposed), &Protection::Loopback).expect_err("others reach it").to_string();
        assert!(refused.contains("plaintext") && refused.contains("GRPC_PLAINTEXT=true"), "{refused}");
        assert!(check_address(address(exposed), &Protection::Elsewhere).is_ok(), "the operator says so");
        assert!(check_address(address(exposed), &Protection::Tls(files.clone())).is_ok(), "nobody can read along");
    }

    let socket = TcpListener::bind("0.0.0.0:0").await.expect("a free port");
    let refused = Listener::new(socket, Protection::Loopback).err().expect("others reach it");
    assert!(refused.is::<ExposedAddress>());
}
