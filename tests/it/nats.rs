//! More than one machine: edges, a real NATS server and workers, as processes, killed in turn. Whatever was answered is in the tables exactly once.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::stream;
use chrono::Utc;
use futures::future::join_all;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use tokio::task::JoinSet;
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

/// Waits until so many events are stored.
async fn stored(nats: &NatsServer, database: &Database, events: i64) {
    let began = Instant::now();
    loop {
        let there = database.count("SELECT count(*) FROM events").await;
        if there == events {
            return;
        }
        assert!(there < events, "{there} events, and {events} were sent");
        if began.elapsed() > Duration::from_secs(150) {
            panic!("{there} of {events} events are stored\n{}", nats.figures().await);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

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
    let batch = post(&other, &json!({"events": (2..=101).map(event).collect::<Vec<_>>()})).await;
    assert_eq!(batch.status, 202);
    let results = batch.body["results"].as_array().cloned().unwrap_or_default();
    assert!(results.len() == 100 && results.iter().all(|result| result["status"] == "queued"), "{results:?}");
    let after = Utc::now();
    assert_eq!(database.count("SELECT count(*) FROM events").await, 0, "an edge stores nothing that is queued");
    assert_eq!(nats.messages().await, 102, "one message an event");
    assert_eq!(Metrics::of(&one).await.value("opsmantik_nats_published_total", &[]), Some(3.0));

    let mut worker = nats.worker(&database.url).await;
    stored(&nats, &database, 102).await;
    nats.empty().await;
    assert_eq!(
        database
            .count("SELECT count(DISTINCT site_id) FROM events WHERE id = '00000000-0000-0000-0000-000000000001'")
            .await,
        2
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
    stored(&nats, &database, 103).await;
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
    stored(&nats, &database, 1).await;
    assert_eq!(said(&post(&unknown, &event(2)).await), STORED, "nobody is trusted unseen, and nothing is lost");
    let (_, body) = ready(unknown.admin).await;
    assert!(body["warnings"][0].as_str().is_some_and(|why| why.starts_with("queue: NATS is away")), "{body}");
    for server in [&mut known, &mut unknown] {
        server.program.stop(STOP_LIMIT).await;
    }
}

/// Sends events of their own ids to whichever edge, until told; those that were answered 200 or 202.
struct Load {
    edges: Arc<Mutex<Vec<String>>>,
    next: Arc<AtomicU32>,
    done: Arc<AtomicBool>,
    clients: JoinSet<Vec<u32>>,
}

impl Load {
    fn start(edges: &[&Server]) -> Self {
        let edges = Arc::new(Mutex::new(edges.iter().map(|edge| edge.sync_url()).collect::<Vec<_>>()));
        let mut load = Self { edges, next: Arc::default(), done: Arc::default(), clients: JoinSet::new() };
        for _ in 0..12 {
            let (edges, next, done, client) = (load.edges.clone(), load.next.clone(), load.done.clone(), client());
            load.clients.spawn(async move {
                let mut answered = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let url = {
                        let edges = edges.lock().unwrap_or_else(PoisonError::into_inner);
                        edges[n as usize % edges.len()].clone()
                    };
                    let request = client.post(url).header("Origin", ORIGIN).body(numbered(n).to_string());
                    match request.send().await.map(|answer| answer.status().as_u16()) {
                        Ok(200 | 202) => answered.push(n),
                        Ok(status) => assert_eq!(status, 503, "event {n}"),
                        // The edge was killed; nobody knows.
                        Err(_) => {}
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                answered
            });
        }
        load
    }

    fn replace(&self, at: usize, edge: &Server) {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner)[at] = edge.sync_url();
    }

    async fn stop(self) -> HashSet<u32> {
        self.done.store(true, Ordering::Relaxed);
        self.clients.join_all().await.into_iter().flatten().collect()
    }
}

fn numbered(n: u32) -> Value {
    let mut event = event(u128::from(n));
    event["sid"] = format!("visit-{}", n % 37).into();
    event
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_an_edge_and_a_worker_are_killed_in_turn_and_what_was_answered_is_there_exactly_once() {
    let Some(mut nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let url = database.url.as_str();
    let (mut first, second) = tokio::join!(nats.serve("edge", url, &[]), nats.serve("edge", url, &[]));
    let (worker, mut steady) = tokio::join!(nats.worker(url), nats.worker(url));
    let load = Load::start(&[&first, &second]);
    let a_while = || tokio::time::sleep(Duration::from_millis(600));

    a_while().await;
    worker.program.kill().await;
    a_while().await;
    nats.kill().await;
    a_while().await;
    nats.restart().await;
    // Published again, not only stored directly.
    let published =
        async |edge: &Server| Metrics::of(edge).await.value("opsmantik_nats_published_total", &[]).unwrap_or(0.0);
    let (before, began) = (published(&second).await, Instant::now());
    while published(&second).await <= before {
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "the edge does not find NATS again:\n{}",
            second.program.said()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    first.program.kill().await;
    first = nats.serve("edge", url, &[]).await;
    load.replace(0, &first);
    let mut replaced = nats.worker(url).await;
    a_while().await;
    // And one that is asked to stop ends what it took, and leaves the rest.
    steady.program.stop(STOP_LIMIT).await;
    a_while().await;
    let sent = load.next.load(Ordering::Relaxed);
    let answered = load.stop().await;
    assert!(answered.len() > 100, "only {} of {sent} events were answered", answered.len());
    nats.empty().await;

    let ids = database.admin.query("SELECT id FROM events", &[]).await.expect("the test's own query");
    let there: HashSet<u32> =
        ids.iter().filter_map(|row| u32::try_from(row.get::<_, Uuid>(0).as_u128()).ok()).collect();
    assert_eq!(ids.len(), there.len(), "an event is there twice");
    let lost: Vec<_> = answered.difference(&there).collect();
    assert!(lost.is_empty(), "answered and not stored: {lost:?}");
    database.assert_counted().await;
    eprintln!("{sent} events sent, {} answered, {} stored, 0 lost, 0 doubled", answered.len(), there.len());

    // A retry of everything changes nothing but the events that nobody had.
    let again = join_all((0..sent).step_by(100).map(|from| {
        let events: Vec<_> = (from..sent.min(from + 100)).map(numbered).collect();
        let edge = &first;
        async move { post(edge, &json!({"events": events})).await.status }
    }));
    assert!(again.await.iter().all(|status| matches!(status, 200 | 202)));
    stored(&nats, &database, i64::from(sent)).await;
    nats.empty().await;
    database.assert_counted().await;
    for program in [&mut replaced.program, &mut first.program] {
        program.stop(STOP_LIMIT).await;
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
    stored(&nats, &database, 81).await;
    nats.empty().await;
    let began = Instant::now();
    while ready(edge.admin).await.1 != json!({"ready": true}) {
        assert!(began.elapsed() < Duration::from_secs(5), "there is room again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(said(&post(&edge, &event(1001)).await), QUEUED);
    stored(&nats, &database, 82).await;
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
    stored(&nats, &database, 1).await;
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
    stored(&nats, &database, 2).await;
    for program in [&mut worker.program, &mut edge.program] {
        program.stop(STOP_LIMIT).await;
        assert!(!program.said().contains(PASSWORD), "a password was logged");
    }
}
