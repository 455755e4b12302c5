//! The running program: killed, stopped, twice at once, and with its database pulled away. Nothing that it answered 200 is ever lost.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::Utc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opsmantik::dev::cluster::{Cluster, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use opsmantik::domain::id::SiteId;
use opsmantik::store::Store;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::support::cluster::{cluster, throw_away};
use crate::support::database::{Database, connect, database};
use crate::support::process::{Server, client};

const ORIGIN: &str = "https://shop.example";
const SITE: SiteId = SiteId::from_uuid(Uuid::from_u128(0x51));
/// An orderly stop is over by then, whatever clients do.
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// A visitor's browser is told within this time that the database is away.
const AWAY_LIMIT: Duration = Duration::from_secs(3);

/// The test's own database with the site `shop`.
async fn shop() -> Database {
    let database = database().await;
    database.site_with_id("shop", SITE).await;
    database
}

/// Event `n`: one of some dozens of visits, with all that makes a session differ from its neighbours. Its time is told, so that
/// which event came first does not depend on the run.
fn event(n: u32, base_ms: i64) -> Value {
    let visit = n % 37;
    let (category, action) = match n % 5 {
        0 => ("conversion", "phone_call"),
        1 => ("interaction", "scroll_depth"),
        _ => ("interaction", "view"),
    };
    let query = if visit.is_multiple_of(3) { format!("?gclid=g{n}&utm_source=s{n}") } else { String::new() };
    let month = Utc::now().format("%Y-%m-01").to_string();
    json!({"id": Uuid::from_u128(u128::from(n)), "s": "shop", "u": format!("https://shop.example/p{n}{query}"),
        "sid": format!("visit-{visit}"), "sm": month, "ec": category, "ea": action, "ev": n % 101, "ts": base_ms + i64::from(n),
        "meta": {"fp": format!("f{visit}"), "scroll_pct": n % 101, "duration_sec": n}})
}

/// What a request came to: its status, or none if the server was gone.
async fn post(client: &reqwest::Client, url: &str, event: &Value) -> Option<reqwest::Response> {
    client.post(url).header("Origin", ORIGIN).body(event.to_string()).send().await.ok()
}

/// Sends events by a few clients at once; those that were answered 200.
async fn send(url: &str, events: impl IntoIterator<Item = u32>, base_ms: i64) -> HashSet<u32> {
    let queue = Arc::new(tokio::sync::Mutex::new(events.into_iter().collect::<Vec<_>>()));
    let mut clients = JoinSet::new();
    for _ in 0..12 {
        let (queue, url, client) = (queue.clone(), url.to_owned(), client());
        clients.spawn(async move {
            let mut stored = Vec::new();
            loop {
                let Some(n) = queue.lock().await.pop() else { return stored };
                match post(&client, &url, &event(n, base_ms)).await {
                    Some(answer) if answer.status() == 200 => stored.push(n),
                    Some(answer) => assert_eq!(answer.status(), 503, "event {n}"),
                    None => {}
                }
            }
        });
    }
    clients.join_all().await.into_iter().flatten().collect()
}

/// How often each event is stored.
async fn stored(database: &Database) -> HashSet<u32> {
    let rows = database.admin.query("SELECT id FROM events", &[]).await.expect("the test's own query");
    let ids: Vec<u32> = rows.iter().map(|row| number(row.get(0))).collect();
    let distinct: HashSet<u32> = ids.iter().copied().collect();
    assert_eq!(ids.len(), distinct.len(), "an event is there twice");
    distinct
}

fn number(id: Uuid) -> u32 {
    u32::try_from(id.as_u128()).expect("the test's own id")
}

/// Sessions and events without the times of arrival, which no two runs share.
async fn timeless(database: &Database) -> [Vec<Value>; 2] {
    let mut tables = database.traffic().await;
    for row in tables.iter_mut().flatten() {
        let row = row.as_object_mut().expect("a row is an object");
        row.retain(|column, _| !matches!(column.as_str(), "created_at" | "last_seen_at"));
    }
    tables
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_it_loses_nothing_that_it_answered_and_stores_nothing_twice() {
    const ROUNDS: u32 = 5;
    const EACH: u32 = 400;
    let (database, undisturbed) = (shop().await, shop().await);
    let base_ms = Utc::now().timestamp_millis() - 3_600_000;
    let mut answered = HashSet::new();
    for round in 0..ROUNDS {
        let server = Server::start(&database.url).await;
        let before = answered.len();
        let mine = round * EACH + 1..=(round + 1) * EACH;
        let sending = tokio::spawn({
            let url = server.sync_url();
            async move { send(&url, mine, base_ms).await }
        });
        // In the middle: some are stored, most are not.
        let enough = i64::try_from(before).expect("a count") + i64::from(EACH / 8);
        let began = Instant::now();
        while database.count("SELECT count(*) FROM events").await < enough {
            assert!(began.elapsed() < Duration::from_secs(20), "nothing is stored");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        server.program.kill().await;
        answered.extend(sending.await.expect("the clients report"));
        assert!(answered.len() < ((round + 1) * EACH) as usize, "killed too late to show anything");
        // What was under way in the database when its client died may still be committing.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let stored = stored(&database).await;
        let lost: Vec<_> = answered.difference(&stored).collect();
        assert!(lost.is_empty(), "round {round}: answered 200 and not stored: {lost:?}");
        database.assert_counted().await;
    }

    let all: HashSet<u32> = (1..=ROUNDS * EACH).collect();
    let mut server = Server::start(&database.url).await;
    assert_eq!(send(&server.sync_url(), all.iter().copied(), base_ms).await, all, "every request again");
    server.program.stop(STOP_LIMIT).await;
    assert_eq!(stored(&database).await, all);
    database.assert_counted().await;

    let mut server = Server::start(&undisturbed.url).await;
    assert_eq!(send(&server.sync_url(), all.iter().copied(), base_ms).await, all);
    server.program.stop(STOP_LIMIT).await;
    let [sessions, events] = timeless(&undisturbed).await;
    assert_eq!((sessions.len(), events.len()), (37, all.len()));
    assert_eq!(timeless(&database).await, [sessions, events], "as if it had never been killed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_to_stop_under_load_it_answers_and_stores_what_it_took_and_takes_nothing_more() {
    let database = shop().await;
    let mut server = Server::start_with(&database.url, &[("QUEUE", "inline")]).await;
    let base_ms = Utc::now().timestamp_millis() - 3_600_000;
    let (url, http) = (server.sync_url(), server.http);
    // Warm, and the site known.
    assert_eq!(send(&url, 1..=20, base_ms).await.len(), 20);

    // These have been taken for certain when the signal comes: they wait for a lock in the database.
    let lock = connect(&database.url).await;
    lock.batch_execute("BEGIN; LOCK TABLE events IN SHARE MODE").await.expect("the lock is free");
    let taken: Vec<u32> = (21..=60).collect();
    let mut waiting = JoinSet::new();
    for n in taken.clone() {
        let (url, client) = (url.clone(), client());
        waiting
            .spawn(async move { post(&client, &url, &event(n, base_ms)).await.map(|answer| answer.status().as_u16()) });
    }
    let blocked =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let began = Instant::now();
    while database.count(blocked).await == 0 {
        assert!(began.elapsed() < Duration::from_secs(10), "nobody waits for the lock");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A request whose second half comes after the signal, and one whose second half never comes.
    let body = event(61, base_ms).to_string();
    let head =
        format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {}\r\n\r\n", body.len());
    let (first, second) = body.split_at(body.len() / 2);
    let mut slow = TcpStream::connect(http).await.expect("it listens");
    slow.write_all(format!("{head}{first}").as_bytes()).await.expect("it reads");
    let mut dead = TcpStream::connect(http).await.expect("it listens");
    dead.write_all(format!("{head}{first}").as_bytes()).await.expect("it reads");
    // And clients that know nothing of all this, with connections old and new.
    let load = tokio::spawn({
        let url = url.clone();
        async move { send(&url, 1000..4000, base_ms).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;

    let began = Instant::now();
    server.program.signal(Signal::SIGTERM);
    let stopping = |said: &str| said.contains("taking nothing more").then_some(());
    server.program.until("that it stops", stopping).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..5 {
        let late = post(&client(), &url, &event(5000, base_ms)).await;
        assert!(late.is_none_or(|answer| answer.status() == 503), "a new connection was taken");
    }
    slow.write_all(second.as_bytes()).await.expect("it still reads what it began to take");
    lock.batch_execute("COMMIT").await.expect("the lock is given back");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.expect("a whole answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let answers = waiting.join_all().await;
    assert!(answers.iter().all(|status| *status == Some(200)), "{answers:?}\n{}", server.program.said());
    let answered = load.await.expect("the clients report");
    let status = server.program.ended().await;
    assert_eq!(status.code(), Some(0), "{}", server.program.said());
    assert!(began.elapsed() < STOP_LIMIT, "stopping took {:?}", began.elapsed());
    drop(dead);

    let stored = stored(&database).await;
    assert!(taken.iter().chain(&[61]).all(|n| stored.contains(n)), "taken and not stored");
    assert!(answered.is_subset(&stored), "answered 200 and not stored");
    assert!(!stored.contains(&5000));
    database.assert_counted().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_on_one_database_store_each_event_once_and_keep_the_months_together() {
    let database = shop().await;
    // Both keepers find work when they start.
    let far = (Utc::now() + chrono::Months::new(3)).format("%Y_%m").to_string();
    let drop_far = format!(
        "ALTER TABLE events DETACH PARTITION events_{far}; DROP TABLE events_{far}; \
         ALTER TABLE sessions DETACH PARTITION sessions_{far}; DROP TABLE sessions_{far}"
    );
    database.admin.batch_execute(&drop_far).await.expect("the months ahead are there");
    let (mut one, mut other) = tokio::join!(Server::start(&database.url), Server::start(&database.url));
    let base_ms = Utc::now().timestamp_millis() - 3_600_000;
    let all: HashSet<u32> = (1..=600).collect();
    let (a, b) = (one.sync_url(), other.sync_url());
    let (by_one, by_other) = tokio::join!(send(&a, 1..=600, base_ms), send(&b, (1..=600).rev(), base_ms));
    assert_eq!((&by_one, &by_other), (&all, &all), "both answer 200, to the second copy too");
    assert_eq!(stored(&database).await, all);
    database.assert_counted().await;
    let leaves = format!("SELECT count(*) FROM pg_class WHERE relname IN ('events_{far}', 'sessions_{far}')");
    let began = Instant::now();
    while database.count(&leaves).await < 2 {
        assert!(began.elapsed() < Duration::from_secs(30), "no keeper made the month");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for server in [&mut one, &mut other] {
        assert_eq!(client().get(server.ready_url()).send().await.expect("an answer").status(), 200);
        server.program.stop(STOP_LIMIT).await;
    }
}

/// A folder that is gone with its test, however that ends.
struct Place(std::path::PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// A cluster that may be pulled away without hurting another test.
fn raise(folder: &std::path::Path) -> Cluster {
    let progress = Progress::stderr();
    let postgres = Postgres::find_or_install(progress).expect("there is a PostgreSQL");
    let options = ClusterOptions { data_dir: folder.to_owned(), durable: true, keep: true, ..throw_away(postgres) };
    Cluster::start(options, progress).expect("it starts")
}

async fn raised(folder: &std::path::Path) -> Cluster {
    let folder = folder.to_owned();
    tokio::task::spawn_blocking(move || raise(&folder)).await.expect("it starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn with_its_database_pulled_away_it_says_so_quickly_and_recovers_by_itself() {
    let place = Place(std::env::temp_dir().join(format!("opsmantik-test-{}", Uuid::new_v4().simple())));
    let folder = &place.0;
    let cluster = raised(folder).await;
    let url = cluster.url("away");
    Store::create_database(&cluster.url("postgres"), "away").await.expect("a new database");
    let store = Store::new(&url, 2).await.expect("a URL");
    store.migrate().await.expect("it migrates");
    let database = Database { admin: connect(&url).await, name: "away".to_owned(), url: url.clone(), store };
    database.site_with_id("shop", SITE).await;
    drop(database);

    let mut server = Server::start(&url).await;
    let base_ms = Utc::now().timestamp_millis() - 3_600_000;
    let (sync_url, ready_url, client) = (server.sync_url(), server.ready_url(), client());
    assert_eq!(send(&sync_url, 1..=50, base_ms).await.len(), 50);
    let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    let mut health = HealthClient::new(endpoint.connect().await.expect("it listens"));
    serving(&mut health, ServingStatus::Serving).await;

    // A steady stream of visitors who do not wait for each other, from before to after.
    let done = Arc::new(AtomicBool::new(false));
    let visitors = tokio::spawn({
        let (done, client, sync_url) = (done.clone(), client.clone(), sync_url.clone());
        async move {
            let mut requests = JoinSet::new();
            let mut n = 100;
            while !done.load(Ordering::Relaxed) {
                n += 1;
                let (client, sync_url) = (client.clone(), sync_url.clone());
                requests.spawn(async move {
                    let began = Instant::now();
                    let answer = post(&client, &sync_url, &event(n, base_ms)).await.expect("it answers always");
                    let retry_after = answer.headers().contains_key("retry-after");
                    (n, began, answer.status().as_u16(), retry_after, began.elapsed())
                });
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            requests.join_all().await
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;

    kill(Pid::from_raw(i32::try_from(cluster.pid().expect("it runs")).expect("a pid")), Signal::SIGQUIT).expect("ours");
    serving(&mut health, ServingStatus::NotServing).await;
    let ready = client.get(&ready_url).send().await.expect("an answer");
    assert_eq!(ready.status(), 503);
    let ready = ready.text().await.expect("a whole answer");
    assert!(ready.contains("database"), "{ready}");
    tokio::time::sleep(Duration::from_secs(3)).await;

    tokio::task::spawn_blocking(move || cluster.stop()).await.expect("no panic").expect("what is left of it ends");
    let cluster = raised(folder).await;
    assert_eq!(cluster.url("away"), url, "it comes back where it was");
    let back = Instant::now();
    while client.get(&ready_url).send().await.expect("an answer").status() != 200 {
        assert!(back.elapsed() < Duration::from_secs(5), "not ready again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    serving(&mut health, ServingStatus::Serving).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    done.store(true, Ordering::Relaxed);
    let answers = visitors.await.expect("the visitors report");

    let database = Database {
        admin: connect(&url).await,
        name: "away".to_owned(),
        store: Store::new(&url, 1).await.expect("a URL"),
        url,
    };
    let stored = stored(&database).await;
    let (mut away, mut slowest) = (0, Duration::ZERO);
    for (n, began, status, retry_after, took) in answers {
        match status {
            200 => assert!(stored.contains(&n), "event {n} was answered 200 and is not stored"),
            503 => {
                away += 1;
                slowest = slowest.max(took);
                assert!(retry_after, "event {n}: when to come again?");
                assert!(began < back + Duration::from_secs(1), "event {n}: the database was back");
            }
            other => panic!("event {n}: {other}"),
        }
    }
    assert!(away > 50, "the database was away for seconds, but only {away} visitors heard of it");
    eprintln!("{away} visitors were sent away, the last of them after {slowest:?}");
    assert!(slowest < AWAY_LIMIT, "a visitor waited {slowest:?}\n{}", server.program.said());
    database.assert_counted().await;
    server.program.stop(STOP_LIMIT).await;
    drop(database);
    tokio::task::spawn_blocking(move || cluster.stop()).await.expect("no panic").expect("it stops");
}

/// Waits until gRPC health says so, as it must within seconds.
async fn serving(health: &mut HealthClient<Channel>, expected: ServingStatus) {
    let began = Instant::now();
    loop {
        let answer = health.check(HealthCheckRequest::default()).await.expect("it answers");
        if answer.into_inner().status() == expected {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(6), "gRPC health is not {expected:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn before_the_schema_is_there_it_is_not_ready_and_takes_nothing_and_then_it_does() {
    let name = "not_migrated";
    drop(crate::support::database::empty(name).await);
    let url = cluster().await.url(name);
    let mut server = Server::start(&url).await;
    let (client, sync_url, ready_url) = (client(), server.sync_url(), server.ready_url());
    let ready = client.get(&ready_url).send().await.expect("an answer");
    assert_eq!(ready.status(), 503);
    let reasons = ready.text().await.expect("a whole answer");
    assert!(reasons.contains("opsmantik migrate"), "it says what to do: {reasons}");
    let answer = post(&client, &sync_url, &event(1, 0)).await.expect("an answer");
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));

    let store = Store::new(&url, 1).await.expect("a URL");
    store.migrate().await.expect("it migrates");
    let admin = connect(&url).await;
    let database = Database { store, admin, name: name.to_owned(), url };
    database.site_with_id("shop", SITE).await;
    let began = Instant::now();
    loop {
        let ready = client.get(&ready_url).send().await.expect("an answer").status();
        let answer = post(&client, &sync_url, &event(1, 0)).await.expect("an answer").status();
        if (ready.as_u16(), answer.as_u16()) == (200, 200) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "ready: {ready}, sync: {answer}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(database.count("SELECT count(*) FROM events").await, 1);
    server.program.stop(STOP_LIMIT).await;
}
