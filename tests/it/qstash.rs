//! The whole way through QStash: the real server in front of a stand-in that keeps the documented contract.
//!
//! Whatever QStash does (repeats, reorders, waits a month, refuses, hangs, loses its answer), the tables hold each event exactly once, as it
//! arrived at the edge.

use std::time::{Duration, Instant};

use axum::Router;
use chrono::{DateTime, TimeDelta, Utc};
use clap::Parser;
use futures::future::join_all;
use opsmantik::config::{Mode, Settings};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::month::Month;
use opsmantik::server::{Listeners, Server};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::{Answer, ORIGIN, event};
use crate::support::cluster::cluster;
use crate::support::database::{Database, connect, database};
use crate::support::qstash::{Attempt, CURRENT_KEY, Fate, Mood, NEXT_KEY, Qstash, TOKEN};

mod judge;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// The server with `QUEUE=qstash`, one site (`shop`), and QStash.
struct Rig {
    database: Database,
    qstash: Qstash,
    public: String,
    admin: String,
    client: reqwest::Client,
    server: Server,
}

impl Rig {
    async fn start() -> Self {
        let qstash = Qstash::start().await;
        let url = qstash.url.clone();
        Self::publishing_to(qstash, &url).await
    }

    async fn publishing_to(qstash: Qstash, url: &str) -> Self {
        let database = database().await;
        database.site("shop").await;
        let nowhere = "127.0.0.1:0".parse().expect("an address");
        let line = ["x", "--queue=qstash", "--rate-limit=0", "--trusted-proxies="];
        let mut settings = Line::try_parse_from(line).expect("flags of a test").settings;
        (settings.http_addr, settings.grpc_addr, settings.admin_addr) = (nowhere, nowhere, nowhere);
        let listeners = Listeners::bind(&settings).await.expect("free ports");
        let public = format!("http://{}", listeners.http.local_addr().expect("a bound socket"));
        let secret = |text: &str| text.parse().ok();
        settings.database_url = secret(&database.url);
        settings.public_url = Some(public.clone());
        settings.qstash_url = Some(url.to_owned());
        settings.qstash_token = secret(TOKEN);
        settings.qstash_current_signing_key = secret(CURRENT_KEY);
        settings.qstash_next_signing_key = secret(NEXT_KEY);
        let server = Server::start(&settings, Mode::Serve, &database.url, listeners, Router::new()).await;
        let server = server.expect("the server starts");
        let admin = format!("http://{}", server.admin_addr);
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("a client");
        Self { database, qstash, public, admin, client, server }
    }

    fn worker(&self) -> String {
        format!("{}/api/sync/worker", self.public)
    }

    async fn post(&self, body: &Value) -> Answer {
        let url = format!("{}/api/sync", self.public);
        let answer = Answer::of(self.client.post(url).header("Origin", ORIGIN).body(body.to_string())).await;
        assert!(!format!("{:?} {}", answer.headers, answer.body).contains(TOKEN));
        answer
    }

    async fn count(&self) -> i64 {
        self.database.count("SELECT count(*) FROM events").await
    }

    async fn site(&self) -> SiteId {
        let id = self.database.rows("SELECT id FROM sites WHERE public_id = 'shop'").await[0]["id"].clone();
        id.as_str().and_then(|id| id.parse().ok()).expect("the rig's own site")
    }
}

fn queued(answer: &Answer) -> bool {
    (answer.status, &answer.body["status"], &answer.body["score"]) == (202, &json!("queued"), &Value::Null)
}

fn stored(answer: &Answer) -> bool {
    (answer.status, &answer.body["status"]) == (200, &json!("stored"))
}

fn instant(value: &Value) -> DateTime<Utc> {
    value.as_str().and_then(|text| text.parse().ok()).expect("a timestamptz")
}

fn said(attempts: &[Attempt], status: &str) -> usize {
    attempts.iter().filter(|attempt| attempt.status == 200 && attempt.body["status"] == status).count()
}

#[tokio::test]
async fn events_are_queued_at_once_and_stored_once_as_they_arrived_however_often_they_are_delivered() {
    let rig = Rig::start().await;
    let before = Utc::now();
    for id in [1, 2, 3, 1] {
        let answer = rig.post(&event(id)).await;
        assert!(queued(&answer), "{} {}", answer.status, answer.body);
        assert_eq!(answer.body["id"], json!(Uuid::from_u128(id)));
    }
    let batch = rig.post(&json!({"events": (4..9).map(event).collect::<Vec<_>>()})).await;
    assert_eq!(batch.status, 202);
    assert!(batch.body["results"].as_array().is_some_and(|results| {
        results.len() == 5 && results.iter().all(|result| result["status"] == "queued" && result["score"].is_null())
    }));
    let after = Utc::now();
    assert_eq!(rig.count().await, 0, "nothing is stored behind QStash's back");
    assert_eq!(rig.qstash.messages().len(), 8, "one message an event, however often the browser sends it");

    tokio::time::sleep(Duration::from_millis(50)).await;
    let attempts = rig.qstash.deliver_all(3, 7).await;
    assert_eq!((said(&attempts, "stored"), said(&attempts, "duplicate")), (8, 16), "{attempts:?}");
    let events = rig.database.rows("SELECT * FROM events ORDER BY id").await;
    let ids: Vec<_> = events.iter().filter_map(|row| row["id"].as_str()).collect();
    assert_eq!(ids, (1..9).map(|id| Uuid::from_u128(id).to_string()).collect::<Vec<_>>());
    for event in &events {
        let created_at = instant(&event["created_at"]);
        assert!(before <= created_at && created_at <= after, "{created_at} is not the arrival at the edge");
    }
    let sessions = rig.database.rows("SELECT event_count, gclid, lead_score FROM sessions").await;
    assert_eq!(sessions, [json!({"event_count": 8, "gclid": "G", "lead_score": 10})]);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_delivery_that_comes_after_a_months_end_lands_in_the_month_of_its_session() {
    let rig = Rig::start().await;
    let month = Month::of(Utc::now());
    let last_month = month.previous().to_string();
    rig.database.ensure_month(&last_month).await;
    let late = |id, session: &str, hint: &str| {
        let mut event = event(id);
        (event["sid"], event["sm"]) = (session.into(), hint.into());
        event
    };
    // One visit began in the last minute of last month; its second event arrives now. Another one begins now.
    for event in [
        late(1, "over", &last_month),
        late(2, "over", &last_month),
        late(3, "new", &month.to_string()),
        late(4, "old", ""),
    ] {
        assert!(queued(&rig.post(&event).await));
    }
    let month_began: DateTime<Utc> = format!("{month}T00:00:00Z").parse().expect("a month is its first day");
    let edge = month_began - TimeDelta::seconds(30);
    for at in [0, 3] {
        rig.qstash.rewrite(at, |job| {
            job["event"]["received_at"] = json!(edge);
            job["event"]["occurred_at"] = json!(edge);
        });
    }
    for at in [1, 2, 3, 0, 0] {
        assert_eq!(rig.qstash.attempt(at).await.status, 200);
    }
    let rows = rig.database.rows("SELECT session_month, created_at FROM events ORDER BY id").await;
    let months: Vec<_> = rows.iter().filter_map(|row| row["session_month"].as_str()).collect();
    assert_eq!(months, [&last_month, &last_month, &month.to_string(), &last_month]);
    assert_eq!((instant(&rows[0]["created_at"]), instant(&rows[3]["created_at"])), (edge, edge));
    assert_eq!(rig.database.count("SELECT count(*) FROM sessions").await, 3, "one visit is one session");
    rig.server.stop().await;
}

#[tokio::test]
async fn what_qstash_does_not_take_is_stored_directly_and_nothing_is_lost_or_doubled() {
    let rig = Rig::start().await;
    let refused = |status, text: &str| Mood::Answer(status, text.to_owned());
    let mut id = 0;
    for mood in [
        refused(500, "broken"),
        refused(429, r#"{"error":"quota"}"#),
        refused(401, &format!(r#"{{"error":"{TOKEN} is no token"}}"#)),
        refused(200, "<html>hello</html>"),
        refused(200, r#"{"messageId":""}"#),
        Mood::Hang,
        Mood::AcceptAndHang,
    ] {
        id += 2;
        rig.qstash.mood(mood.clone());
        let began = Instant::now();
        let answer = rig.post(&event(id)).await;
        assert!(stored(&answer), "{mood:?}: {} {}", answer.status, answer.body);
        assert!(began.elapsed() < Duration::from_secs(5), "{mood:?}");
        assert_eq!(rig.database.count("SELECT count(*) FROM events").await, i64::try_from(id / 2).unwrap_or(0));
        // It is asked again as soon as it is well; that also keeps the breaker out of this test.
        rig.qstash.mood(Mood::Accept);
        assert!(queued(&rig.post(&event(1001)).await), "{mood:?}");
    }
    assert_eq!(
        rig.qstash.messages().len(),
        2,
        "the one that was taken before its answer was lost, and the one between"
    );
    let delivered = rig.qstash.deliver_all(2, 3).await;
    assert_eq!((said(&delivered, "stored"), said(&delivered, "duplicate")), (1, 3), "{delivered:?}");
    assert_eq!(rig.count().await, 8);
    assert_eq!(rig.database.count("SELECT sum(event_count)::bigint FROM sessions").await, 8);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_qstash_that_is_away_costs_nothing_but_the_queue() {
    let away = {
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        format!("http://{}", socket.local_addr().expect("a bound socket"))
    };
    let rig = Rig::publishing_to(Qstash::start().await, &away).await;
    for id in 1..=7 {
        let answer = rig.post(&event(id)).await;
        assert!(stored(&answer), "{} {}", answer.status, answer.body);
    }
    assert_eq!(rig.count().await, 7);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_flood_while_qstash_hangs_is_answered_in_bounded_time_and_stored_once() {
    let rig = Rig::start().await;
    rig.qstash.mood(Mood::AcceptAndHang);
    let began = Instant::now();
    let events: Vec<Value> = (1..=200).map(event).collect();
    let answers = join_all(events.iter().map(|event| rig.post(event))).await;
    let took = began.elapsed();
    assert!(answers.iter().all(stored), "each is in the tables when it is answered");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(rig.count().await, 200);
    // The breaker is open: nobody waits for a QStash that does not answer.
    let began = Instant::now();
    assert!(stored(&rig.post(&event(201)).await));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let taken = rig.qstash.messages().len();
    assert!((1..=200).contains(&taken), "{taken}");
    assert_eq!(said(&rig.qstash.deliver_all(1, 11).await, "duplicate"), taken);
    assert_eq!(rig.count().await, 201);
    assert_eq!(rig.database.count("SELECT sum(event_count)::bigint FROM sessions").await, 201);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_batch_is_one_request_and_the_message_that_is_refused_falls_back_alone() {
    let rig = Rig::start().await;
    rig.qstash.mood(Mood::AllBut(41));
    let answer = rig.post(&json!({"events": (1..=100).map(event).collect::<Vec<_>>()})).await;
    assert_eq!(answer.status, 202);
    let results = answer.body["results"].as_array().cloned().unwrap_or_default();
    assert_eq!(results.len(), 100);
    for (at, result) in results.iter().enumerate() {
        assert_eq!(result["status"], if at == 41 { "stored" } else { "queued" }, "{at}");
    }
    let seen = rig.qstash.seen();
    assert_eq!(seen.iter().map(|seen| seen.path.as_str()).collect::<Vec<_>>(), ["/v2/batch"]);
    assert_eq!(rig.count().await, 1);
    assert_eq!(said(&rig.qstash.deliver_all(1, 5).await, "stored"), 99);
    assert_eq!(rig.count().await, 100);
    rig.server.stop().await;
}

#[tokio::test]
async fn poison_is_buried_and_not_delivered_again() {
    let rig = Rig::start().await;
    let body = |id| json!({"v": 1, "event": {"id": Uuid::from_u128(id)}}).to_string();
    assert!(queued(&rig.post(&event(1)).await));
    rig.qstash.rewrite(0, |job| job["event"]["site_id"] = json!(Uuid::from_u128(404)));
    for poison in ["not even JSON", body(2).as_str(), r#"{"v":2,"event":{}}"#] {
        rig.qstash.keep(&rig.worker(), poison);
    }
    let attempts = rig.qstash.run_dry().await;
    assert_eq!(attempts.len(), 4, "each was tried once");
    assert!(attempts.iter().all(|attempt| attempt.status == 489), "{attempts:?}");
    assert!(rig.qstash.messages().iter().all(|message| message.fate == Fate::Stopped));
    let letters = rig.database.rows("SELECT reason, payload, tries FROM dead_letters ORDER BY reason, payload").await;
    let reasons: Vec<_> = letters.iter().filter_map(|letter| letter["reason"].as_str()).collect();
    assert_eq!(reasons, ["malformed_job", "malformed_job", "malformed_job", "unknown_site"]);
    assert!(letters.iter().all(|letter| letter["tries"] == 1));
    assert_eq!(letters[3]["payload"], rig.qstash.messages()[0].body, "the letter holds the whole delivery");
    assert_eq!(rig.count().await, 0);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_delivery_waits_out_a_database_that_is_away() {
    let rig = Rig::start().await;
    for id in [1, 2] {
        assert!(queued(&rig.post(&event(id)).await));
    }
    assert_eq!(rig.qstash.attempt(0).await.status, 200);
    let admin = connect(&cluster().await.url("postgres")).await;
    let name = rig.database.name.clone();
    let allow = async |yes: bool| {
        admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS {yes}")).await.expect("altered");
    };
    allow(false).await;
    let kill = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    admin.batch_execute(&kill).await.expect("ended");
    // QStash has three retries and comes back when it is told to: told a few seconds, it would have given up within a minute.
    let mut waits = Vec::new();
    for _ in 0..3 {
        let attempt = rig.qstash.attempt(1).await;
        let wait = attempt.headers.get("retry-after").and_then(|wait| wait.to_str().ok()?.parse::<u64>().ok());
        assert_eq!((attempt.status, &attempt.body["error"]), (503, &json!("database_unavailable")), "{attempt:?}");
        waits.push(wait.expect("a delivery that cannot be stored now is told when to come again"));
    }
    let message = rig.qstash.messages()[1].clone();
    assert_eq!(message.fate, Fate::Waiting, "{message:?}");
    assert!(waits[0] <= 30, "a restart of the database is over soon: {waits:?}");
    assert!(message.waited >= 6 * 3600, "a night without the database loses nothing: {waits:?}");

    allow(true).await;
    assert_eq!(rig.qstash.attempt(1).await.body["status"], "stored");
    let back = connect(&rig.database.url).await;
    let events: i64 = back.query_one("SELECT count(*) FROM events", &[]).await.expect("it is back").get(0);
    assert_eq!(events, 2);
    rig.server.stop().await;
}

#[tokio::test]
async fn a_site_that_was_just_added_is_no_stranger_to_its_first_delivery() {
    let rig = Rig::start().await;
    let ids = [SiteId::from_uuid(Uuid::from_u128(77)), SiteId::from_uuid(Uuid::from_u128(78))];
    for unknown in [ids[0].to_string(), "fresh".to_owned()] {
        let mut event = event(1);
        event["s"] = json!(unknown);
        assert_eq!(rig.post(&event).await.status, 404, "and the server remembers for a while that nobody has it");
    }
    rig.database.site_with_id("fresh", ids[0]).await;
    assert!(queued(&rig.post(&event(1)).await));
    rig.qstash.rewrite(0, |job| job["event"]["site_id"] = json!(ids[0]));
    let mut producer = event(2);
    producer["s"] = json!("fresh");
    rig.qstash.keep(&rig.worker(), &producer.to_string());

    // A public id may be spelled like another site's id; a job names its site by id.
    rig.database.site_with_id(&ids[1].to_string(), SiteId::from_uuid(Uuid::from_u128(79))).await;
    rig.database.site_with_id("shadowed", ids[1]).await;
    assert!(queued(&rig.post(&event(3)).await));
    rig.qstash.rewrite(2, |job| job["event"]["site_id"] = json!(ids[1]));

    let attempts = rig.qstash.run_dry().await;
    assert_eq!(said(&attempts, "stored"), 3, "{attempts:?}");
    let sites = rig.database.rows("SELECT site_id FROM events ORDER BY id").await;
    let sites: Vec<_> = sites.iter().map(|row| row["site_id"].clone()).collect();
    assert_eq!(sites, [json!(ids[0]), json!(ids[0]), json!(ids[1])]);
    assert_eq!(rig.database.count("SELECT count(*) FROM dead_letters").await, 0);
    rig.server.stop().await;
}

#[tokio::test]
async fn both_signing_keys_open_the_worker_and_no_secret_is_seen_anywhere() {
    let rig = Rig::start().await;
    for (id, key, status) in [(1, CURRENT_KEY, 200), (2, NEXT_KEY, 200), (3, "sig_of-somebody-else", 401)] {
        assert!(queued(&rig.post(&event(id)).await));
        rig.qstash.sign_with(key);
        let at = rig.qstash.messages().len() - 1;
        assert_eq!(rig.qstash.attempt(at).await.status, status, "{key}");
    }
    rig.qstash.mood(Mood::Answer(401, format!("Bearer {TOKEN} is not known, nor {CURRENT_KEY}")));
    assert!(stored(&rig.post(&event(4)).await));
    let (site, mut shown) = (rig.site().await, String::new());
    for url in [
        format!("{}/metrics", rig.admin),
        format!("{}/readyz", rig.admin),
        format!("{}/tracker.js", rig.public),
        rig.worker(),
    ] {
        let response = rig.client.get(url).send().await.expect("an answer");
        shown += &format!("{:?}", response.headers());
        shown += &response.text().await.expect("a whole answer");
    }
    assert!(shown.contains("opsmantik_qstash_fell_back_total") && shown.contains("opsmantik_qstash_published_total"));
    shown += &rig.qstash.messages().iter().map(|message| message.body.as_str()).collect::<String>();
    shown += &format!("{:?} {site}", rig.database.traffic().await);
    for secret in [TOKEN, CURRENT_KEY, NEXT_KEY] {
        assert!(!shown.contains(secret), "{secret} is seen");
    }
    rig.server.stop().await;
}
