use std::sync::Mutex;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use http::StatusCode;
use tokio::net::TcpListener;

use super::*;
use crate::domain::event::{Arrival, Draft, FieldNames};
use crate::domain::id::{SessionId, SiteId};
use crate::domain::outcome::{DeathReason, Outcome};

/// What the stand-in for QStash answers.
#[derive(Clone, Copy)]
enum Mood {
    Accept,
    Answer(StatusCode, &'static str),
    Hang,
    /// An answer without an end.
    Endless,
    /// A batch in which every second message is refused.
    EverySecond,
}

#[derive(Debug, Clone)]
struct Seen {
    path: String,
    headers: http::HeaderMap,
    body: String,
}

struct Qstash {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _stop: tokio_util::sync::DropGuard,
}

impl Qstash {
    async fn start(mood: Mood) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket"));
        let router = Router::new().fallback(answer).with_state((mood, seen.clone()));
        let stop = tokio_util::sync::CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = axum::serve(listener, router) => {}
                () = stopped.cancelled() => {}
            }
        });
        Self { url, seen, _stop: stop.drop_guard() }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no test panics with it").clone()
    }
}

type Desk = (Mood, Arc<Mutex<Vec<Seen>>>);

async fn answer(State((mood, seen)): State<Desk>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let body = String::from_utf8_lossy(&bytes).into_owned();
    let count = serde_json::from_str::<Value>(&body).ok().and_then(|v| v.as_array().map(Vec::len));
    seen.lock().expect("no test panics with it").push(Seen {
        path: parts.uri.path().to_owned(),
        headers: parts.headers,
        body,
    });
    let named = |n: usize| json!({"messageId": format!("msg_{n}"), "url": "https://c.example"});
    match (mood, count) {
        (Mood::Accept, None) => (StatusCode::CREATED, named(0).to_string()).into_response(),
        (Mood::Accept, Some(count)) => {
            (StatusCode::OK, Value::from_iter((0..count).map(named)).to_string()).into_response()
        }
        (Mood::EverySecond, count) => {
            let one = |n: usize| if n.is_multiple_of(2) { named(n) } else { json!({"error": "no"}) };
            (StatusCode::OK, Value::from_iter((0..count.unwrap_or(0)).map(one)).to_string()).into_response()
        }
        (Mood::Answer(status, body), _) => (status, body).into_response(),
        (Mood::Hang, _) => std::future::pending().await,
        (Mood::Endless, _) => {
            let spaces = bytes::Bytes::from_static(&[b' '; 1 << 16]);
            axum::body::Body::from_stream(futures::stream::repeat(Ok::<_, std::convert::Infallible>(spaces)))
                .into_response()
        }
    }
}

/// A fallback that keeps what it gets, and tells it from QStash by its verdict.
#[derive(Default)]
struct Kept(Mutex<Vec<Event>>);

const KEPT: Verdict = Verdict::Final(Outcome::Dead(DeathReason::MalformedJob));

#[async_trait]
impl Transport for Kept {
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict> {
        let verdicts = vec![KEPT; events.len()];
        self.0.lock().expect("no test panics with it").extend(events);
        verdicts
    }
}

impl Kept {
    fn labels(&self) -> Vec<String> {
        let events = self.0.lock().expect("no test panics with it");
        events.iter().filter_map(|event| event.label.clone()).collect()
    }
}

fn event(n: usize) -> Event {
    let draft = Draft {
        id: Some(Uuid::from_u128(n as u128).to_string()),
        url: Some("https://a.example/".into()),
        session: Some("s".into()),
        label: Some(n.to_string()),
        ..Draft::default()
    };
    let names = FieldNames { url: "u", session: "sid" };
    Event::accept(SiteId::from_uuid(Uuid::from_u128(7)), draft, &Arrival::at(Utc::now()), names).expect("a whole draft")
}

fn events(count: usize) -> Vec<Event> {
    (0..count).map(event).collect()
}

fn transport(url: &str) -> (QstashTransport, Arc<Kept>) {
    let kept = Arc::new(Kept::default());
    let config = QstashConfig {
        url: url.to_owned(),
        token: "t0ken".parse().unwrap_or_else(|never| match never {}),
        destination: "https://c.example/api/sync/worker".to_owned(),
    };
    (QstashTransport::new(config, kept.clone()).expect("a client"), kept)
}

#[tokio::test]
async fn one_event_is_published_as_a_job_that_can_be_told_from_every_other() {
    let qstash = Qstash::start(Mood::Accept).await;
    let (transport, kept) = transport(&qstash.url);
    assert_eq!(transport.hand_over(events(1)).await, [Verdict::Queued]);
    assert!(kept.labels().is_empty());
    let seen = qstash.seen().pop().expect("one request");
    assert_eq!(seen.path, "/v2/publish/https://c.example/api/sync/worker");
    assert_eq!(seen.headers["authorization"], "Bearer t0ken");
    assert_eq!(seen.headers["content-type"], "application/json");
    assert_eq!(seen.headers["upstash-retries"], "3");
    let name = seen.headers["upstash-deduplication-id"].to_str().unwrap_or_default();
    assert!(name.len() == 32 && name.bytes().all(|b| b.is_ascii_hexdigit()), "{name}");
    let delivered = Job::event_from_json(&seen.body, Utc::now()).expect("our own job");
    assert_eq!(delivered.label.as_deref(), Some("0"));
    transport.hand_over(events(1)).await;
    let mut elsewhere = event(0);
    elsewhere.session_id = SessionId::from_uuid(Uuid::from_u128(7));
    transport.hand_over(vec![elsewhere]).await;
    let seen = qstash.seen();
    assert_eq!(seen[1].headers["upstash-deduplication-id"], name, "the same event, the same message");
    assert_ne!(seen[2].headers["upstash-deduplication-id"], name, "with another month's session it is another event");
}

#[tokio::test]
async fn many_events_are_published_together_and_not_too_many() {
    let qstash = Qstash::start(Mood::Accept).await;
    let (transport, kept) = transport(&qstash.url);
    let verdicts = transport.hand_over(events(BATCH + 2)).await;
    assert_eq!(verdicts, vec![Verdict::Queued; BATCH + 2]);
    assert!(kept.labels().is_empty());
    let mut seen = qstash.seen();
    seen.sort_by_key(|seen| std::cmp::Reverse(seen.body.len()));
    assert_eq!(seen.iter().map(|seen| seen.path.as_str()).collect::<Vec<_>>(), ["/v2/batch", "/v2/batch"]);
    let messages: Vec<Value> = serde_json::from_str(&seen[0].body).unwrap_or_default();
    assert_eq!(messages.len(), BATCH);
    assert_eq!(messages[0]["destination"], "https://c.example/api/sync/worker");
    assert_eq!(messages[0]["headers"]["Upstash-Retries"], "3");
    assert_ne!(messages[0]["headers"]["Upstash-Deduplication-Id"], messages[1]["headers"]["Upstash-Deduplication-Id"]);
    let body = messages[1]["body"].as_str().unwrap_or_default();
    assert_eq!(Job::event_from_json(body, Utc::now()).ok().and_then(|event| event.label).as_deref(), Some("1"));
}

#[tokio::test]
async fn what_qstash_does_not_take_is_kept_by_the_fallback() {
    for (status, body) in [
        (500, "broken"),
        (429, r#"{"error":"quota"}"#),
        (401, ""),
        (302, r#"{"messageId":"msg"}"#),
        (200, "<html>hello</html>"),
        (200, "{}"),
        (200, r#"{"messageId":""}"#),
        (200, r#"{"messageId":5}"#),
        (200, "[]"),
    ] {
        let status = StatusCode::from_u16(status).unwrap_or_default();
        let qstash = Qstash::start(Mood::Answer(status, body)).await;
        let (transport, kept) = transport(&qstash.url);
        assert_eq!(transport.hand_over(events(1)).await, [KEPT], "{status} {body}");
        assert_eq!(transport.hand_over(events(2)).await, [KEPT; 2], "{status} {body}");
        assert_eq!(kept.labels(), ["0", "0", "1"]);
    }
    // Nobody listens.
    let (transport, kept) = transport("http://127.0.0.1:9");
    assert_eq!(transport.hand_over(events(1)).await, [KEPT]);
    assert_eq!(kept.labels(), ["0"]);
}

#[tokio::test]
async fn a_message_that_is_refused_in_a_batch_falls_back_alone() {
    let qstash = Qstash::start(Mood::EverySecond).await;
    let (transport, kept) = transport(&qstash.url);
    let verdicts = transport.hand_over(events(4)).await;
    assert_eq!(verdicts, [Verdict::Queued, KEPT, Verdict::Queued, KEPT]);
    assert_eq!(kept.labels(), ["1", "3"]);
}

#[tokio::test]
async fn a_qstash_that_hangs_costs_a_bounded_time() {
    let qstash = Qstash::start(Mood::Hang).await;
    let (transport, kept) = transport(&qstash.url);
    let began = Instant::now();
    let many = join_all((0..CONCURRENCY + 1).map(|n| transport.hand_over(vec![event(n)]))).await;
    assert!(many.iter().all(|verdicts| verdicts[..] == [KEPT]));
    let took = began.elapsed();
    assert!(took >= WHOLE - Duration::from_millis(100) && took < WHOLE * 2, "{took:?}");
    assert_eq!(qstash.seen().len(), CONCURRENCY, "one had to wait, and did not wait long");
    assert_eq!(kept.labels().len(), CONCURRENCY + 1);
    // So many failures in a row have opened the breaker.
    let began = Instant::now();
    assert_eq!(transport.hand_over(events(1)).await, [KEPT]);
    assert!(began.elapsed() < Duration::from_millis(500), "nobody is sent into the next time-out");
    assert_eq!(qstash.seen().len(), CONCURRENCY);
}

#[tokio::test]
async fn an_answer_without_an_end_is_not_read_to_its_end() {
    let qstash = Qstash::start(Mood::Endless).await;
    let (transport, kept) = transport(&qstash.url);
    let began = Instant::now();
    assert_eq!(transport.hand_over(events(1)).await, [KEPT]);
    assert!(began.elapsed() < WHOLE / 2, "{:?}", began.elapsed());
    assert_eq!(kept.labels(), ["0"]);
}

#[tokio::test]
async fn a_failure_does_not_tell_the_token() {
    let (transport, _) = transport("http://127.0.0.1:9");
    let prepared = Prepared::of(0, &event(0)).expect("an event can be written");
    let error = transport.request(&[prepared]).await.expect_err("nobody listens");
    let chain = format!("{error} {error:?} {:?}", transport.config);
    assert!(!chain.contains("t0ken"), "{chain}");
}
