//! More than one machine: edges, a real NATS server and workers, as processes. What is queued is stored once, and nothing is lost while one of them is
//! full, poisoned, away or unfit.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use async_nats::jetstream::stream;
use chrono::Utc;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use opsmantik::domain::month::Month;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{Answer, ORIGIN, event};
use crate::support::cluster::cluster;
use crate::support::database::{Database, connect, database};
use crate::support::events::Spec;
use crate::support::metrics::Metrics;
use crate::support::nats::{NatsServer, PASSWORD, Worker};
use crate::support::process::{Server, client, run};

const STOP_LIMIT: Duration = Duration::from_secs(15);

async fn shop() -> Database {
    let database = database().await;
    database.site("shop").await;
    database
}

async fn post(server: &Server, body: &Value) -> Answer {
    Answer::of(client().post(server.sync_url()).header("Origin", ORIGIN).body(body.to_string())).await
}

/// Of one event: how it was answered.
fn said(answer: &Answer) -> (u16, &str) {
    (answer.status, answer.body["status"].as_str().unwrap_or_default())
}

const QUEUED: (u16, &str) = (202, "queued");
const STORED: (u16, &str) = (200, "stored");

async fn ready(admin: std::net::SocketAddr) -> (u16, Value) {
    let answer = Answer::of(client().get(format!("http://{admin}/readyz"))).await;
    (answer.status, answer.body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_queue_and_a_worker_stores_each_event_once_as_it_arrived() {
    let Some(nats) = NatsServer::start().await else { return };
    let database = shop().await;
    database.site("other").await;
    let trace = [("RUST_LOG", "trace")];
    let (mut one, mut other) =
        tokio::join!(nats.serve("edge", &database.url, &trace), nats.serve("edge", &database.url, &[]));
    let before = Utc::now();
    for edge in [&one, &other, &one] {
        assert_eq!(said(&post(edge, &event(1)).await), QUEUED, "a copy is as safe as the first");
    }
    // An id is unique within its site only: this is another event, and NATS must not take it for a copy.
    let mut foreign = event(1);
    (foreign["s"], foreign["u"]) = ("other".into(), "https://other.example/".into());
    let request = client().post(one.sync_url()).header("Origin", "https://other.example").body(foreign.to_string());
    assert_eq!(said(&Answer::of(request).await), QUEUED);
    // And within the month of its session: so is this one.
    let mut earlier = event(1);
    let last_month = Month::containing(Utc::now().date_naive()).previous();
    (earlier["sid"], earlier["sm"]) = ("earlier".into(), last_month.first_day().to_string().into());
    assert_eq!(said(&post(&one, &earlier).await), QUEUED);
    let batch = post(&other, &json!({"events": (2..=101).map(event).collect::<Vec<_>>()})).await;
    assert_eq!(batch.status, 202);
    let results = batch.body["results"].as_array().cloned().unwrap_or_default();
    assert!(results.len() == 100 && results.iter().all(|result| result["status"] == "queued"), "{results:?}");
    let after = Utc::now();
    assert_eq!(database.count("SELECT count(*) FROM events").await, 0, "an edge stores nothing that is queued");
    assert_eq!(nats.messages().await, 103, "one message an event");
    assert_eq!(Metrics::of(&one).await.value("opsmantik_nats_published_total", &[]), Some(4.0));

    let mut worker = nats.worker(&database.url).await;
    nats.stored(&database, 103).await;
    nats.empty().await;
    assert_eq!(
        database.count("SELECT count(*) FROM events WHERE id = '00000000-0000-0000-0000-000000000001'").await,
        3
    );
    for row in database.rows("SELECT created_at FROM events").await {
        let arrived: chrono::DateTime<Utc> = row["created_at"].as_str().and_then(|at| at.parse().ok()).expect("a time");
        assert!(before <= arrived && arrived <= after, "{arrived} is not the arrival at the edge");
    }
    assert_eq!(ready(worker.admin).await, (200, json!({"ready": true})));
    // Again, after NATS has forgotten it: acknowledged messages are gone.
    database.assert_counted().await;

    worker.program.stop(STOP_LIMIT).await;
    assert_eq!(said(&post(&one, &event(200)).await), QUEUED, "it waits for the next worker");
    let mut all = nats.serve("all", &database.url, &[]).await;
    nats.stored(&database, 104).await;
    for server in [&mut one, &mut other, &mut all] {
        server.program.stop(STOP_LIMIT).await;
        assert!(!server.program.said().contains(PASSWORD), "a password was logged");
    }
    nats.empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tls_address_is_reached_by_tls_only_and_by_a_certificate_that_is_known() {
    let key = KeyPair::generate().expect("a key");
    let mut ours = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
    ours.not_after = rcgen::date_time_ymd(2099, 12, 31);
    let certificate = ours.self_signed(&key).expect("a certificate").pem();
    let Some(nats) = NatsServer::with_tls(&certificate, &key.serialize_pem()).await else { return };
    let database = shop().await;
    let file = nats.certificate();
    let trusted = [("SSL_CERT_FILE", file.as_str())];
    let (mut known, mut unknown) =
        tokio::join!(nats.serve("all", &database.url, &trusted), nats.serve("edge", &database.url, &[]));
    assert_eq!(ready(known.admin).await, (200, json!({"ready": true})));
    assert_eq!(said(&post(&known, &event(1)).await), QUEUED);
    nats.stored(&database, 1).await;
    assert_eq!(said(&post(&unknown, &event(2)).await), STORED, "nobody is trusted unseen, and nothing is lost");
    let (_, body) = ready(unknown.admin).await;
    assert!(body["warnings"][0].as_str().is_some_and(|why| why.starts_with("queue: NATS is away")), "{body}");
    for server in [&mut known, &mut unknown] {
        server.program.stop(STOP_LIMIT).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_is_buried_and_taken_out_of_the_stream() {
    let Some(nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let mut worker = nats.worker(&database.url).await;
    let jetstream = nats.jetstream().await;
    let stranger = Spec::new(1, "s", Utc::now()).event(SiteId::from_uuid(Uuid::from_u128(99)));
    let stranger = Job::new(stranger).to_json().expect("a job");
    for poison in [&b"hello\0"[..], b"\xff\xfe", br#"{"v":9,"event":{}}"#, stranger.as_bytes()] {
        let sent = jetstream.publish("opsmantik.events.x", poison.to_vec().into()).await;
        sent.expect("NATS takes it").await.expect("the stream takes it");
    }
    nats.empty().await;
    let letters =
        database.rows("SELECT reason, source, payload, tries FROM dead_letters ORDER BY reason, payload").await;
    let reasons: Vec<_> = letters.iter().filter_map(|letter| letter["reason"].as_str()).collect();
    assert_eq!(reasons, ["malformed_job", "malformed_job", "malformed_job", "unknown_site"]);
    assert!(letters.iter().all(|letter| letter["source"] == "nats" && letter["tries"] == 1), "{letters:?}");
    assert_eq!(letters[3]["payload"], stranger.as_str(), "the letter holds the whole message");
    worker.program.stop(STOP_LIMIT).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_stream_deletes_nothing_and_the_edge_stores_what_it_refuses() {
    let Some(nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let mut edge = nats.serve("edge", &database.url, &[("NATS_MAX_BYTES", "1048576")]).await;
    let fat = |n: u128| {
        let mut event = event(n);
        event["meta"]["note"] = "x".repeat(20_000).into();
        event
    };
    let mut statuses = HashSet::new();
    for batch in 0..8 {
        let events: Vec<_> = (1..=10).map(|n| fat(batch * 10 + n)).collect();
        let answer = post(&edge, &json!({"events": events})).await;
        let results = answer.body["results"].as_array().cloned().unwrap_or_default();
        assert_eq!(results.len(), 10, "{} {}", answer.status, answer.body);
        statuses.extend(results.iter().filter_map(|result| result["status"].as_str().map(str::to_owned)));
    }
    assert_eq!(statuses, ["queued", "stored"].map(str::to_owned).into());
    let directly = database.count("SELECT count(*) FROM events").await;
    let queued = nats.state().await;
    assert!(queued.bytes <= 1 << 20, "{queued:?}");
    assert_eq!(directly + i64::try_from(queued.messages).expect("a count"), 80, "none is missing");
    let began = Instant::now();
    let (status, body) = loop {
        let (status, body) = ready(edge.admin).await;
        if body["warnings"].is_array() || began.elapsed() > Duration::from_secs(5) {
            break (status, body);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(status, 200);
    assert!(body.to_string().contains("nearly full"), "{body}");
    assert_eq!(said(&post(&edge, &event(1000)).await), STORED, "an edge adds nothing to it");

    let mut worker = nats.worker(&database.url).await;
    nats.stored(&database, 81).await;
    nats.empty().await;
    let began = Instant::now();
    while ready(edge.admin).await.1 != json!({"ready": true}) {
        assert!(began.elapsed() < Duration::from_secs(5), "there is room again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(said(&post(&edge, &event(1001)).await), QUEUED);
    nats.stored(&database, 82).await;
    database.assert_counted().await;
    for program in [&mut worker.program, &mut edge.program] {
        program.stop(STOP_LIMIT).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_away_events_stay_in_the_stream_and_are_stored_when_it_is_back() {
    let Some(nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let (mut edge, mut worker) = tokio::join!(nats.serve("edge", &database.url, &[]), nats.worker(&database.url));
    assert_eq!(said(&post(&edge, &event(1)).await), QUEUED);
    nats.stored(&database, 1).await;
    let admin = connect(&cluster().await.url("postgres")).await;
    let name = database.name.clone();
    let allow = async |yes: bool| {
        admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS {yes}")).await.expect("altered");
    };
    allow(false).await;
    let kill = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    admin.batch_execute(&kill).await.expect("ended");
    // The edge knows the site, and NATS takes the events.
    for id in 2..=40 {
        assert_eq!(said(&post(&edge, &event(id)).await), QUEUED);
    }
    let redelivered = async || {
        let page = client().get(format!("http://{}/metrics", worker.admin)).send().await.expect("it answers");
        page.text().await.expect("a whole answer").contains(r#"opsmantik_nats_deliveries_total{outcome="again"}"#)
    };
    let began = Instant::now();
    while !redelivered().await {
        assert!(began.elapsed() < Duration::from_secs(10), "no delivery failed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(nats.messages().await, 39, "none was acknowledged");
    allow(true).await;
    let back = connect(&database.url).await;
    let began = Instant::now();
    while back.query_one("SELECT count(*) FROM events", &[]).await.expect("it is back").get::<_, i64>(0) < 40 {
        assert!(began.elapsed() < Duration::from_secs(12), "events do not come again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    nats.empty().await;
    for program in [&mut worker.program, &mut edge.program] {
        program.stop(STOP_LIMIT).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_would_lose_events_is_refused_and_a_nats_that_is_away_is_waited_for() {
    let Some(mut nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let jetstream = nats.jetstream().await;
    let lossy = stream::Config {
        name: "lossy".to_owned(),
        subjects: vec!["lossy.events.*".to_owned()],
        retention: stream::RetentionPolicy::WorkQueue,
        discard: stream::DiscardPolicy::New,
        max_age: Duration::from_secs(3600),
        ..stream::Config::default()
    };
    jetstream.create_stream(lossy).await.expect("a stream");
    let url = nats.url();
    let env =
        [("DATABASE_URL", database.url.as_str()), ("QUEUE", "nats"), ("NATS_URL", &url), ("NATS_STREAM", "lossy")];
    let addresses = ["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR"].map(|name| (name, "127.0.0.1:0"));
    for role in ["edge", "worker"] {
        let ended = run(&["serve", "--role", role], &[&env[..], &addresses].concat()).await;
        let complaint = ended.complaint();
        assert!(complaint.contains("the stream `lossy` has `max_age` 3600 s"), "{complaint}");
        assert!(!complaint.contains(PASSWORD), "{complaint}");
    }
    let inline = run(&["serve", "--role", "worker"], &env[..1]).await;
    assert!(inline.complaint().contains("ROLE is wrong: only QUEUE=nats"), "{inline:?}");

    nats.kill().await;
    let (mut edge, mut worker) =
        tokio::join!(nats.serve("edge", &database.url, &[]), Worker::start(&database.url, &url));
    let (status, body) = ready(edge.admin).await;
    assert_eq!(status, 200, "what comes is stored: {body}");
    assert!(body["warnings"][0].as_str().is_some_and(|why| why.starts_with("queue: NATS is away")), "{body}");
    let (status, body) = ready(worker.admin).await;
    assert_eq!(status, 503, "a worker has nothing but its queue: {body}");
    assert!(body["reasons"][0].as_str().is_some_and(|why| why.starts_with("queue: NATS is away")), "{body}");
    assert_eq!(said(&post(&edge, &event(1)).await), STORED);

    nats.restart().await;
    let began = Instant::now();
    while ready(edge.admin).await.1 != json!({"ready": true}) || ready(worker.admin).await.0 != 200 {
        assert!(began.elapsed() < Duration::from_secs(10), "they do not find NATS");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(said(&post(&edge, &event(2)).await), QUEUED);
    nats.stored(&database, 2).await;
    for program in [&mut worker.program, &mut edge.program] {
        program.stop(STOP_LIMIT).await;
        let said = program.said();
        assert!(!said.contains(PASSWORD), "a password was logged");
        assert_eq!(said.matches("NATS is away").count(), 1, "said once, however often it is tried: {said}");
    }
}
