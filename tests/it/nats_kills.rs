//! Edges, a real NATS server and workers, as processes, killed in turn under load: whatever was answered is in the tables exactly once, and after
//! a retry of everything each event is.
//!
//! One round by default; `NATS_KILL_ROUNDS=30` asks for more.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::app::{Answer, ORIGIN, event};
use crate::support::database::{Database, database};
use crate::support::metrics::Metrics;
use crate::support::nats::NatsServer;
use crate::support::process::{Server, client};

const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Sends events of their own ids to whichever edge, until told; those that were answered 200 or 202.
struct Load {
    edges: Arc<Mutex<Vec<String>>>,
    next: Arc<AtomicU32>,
    done: Arc<AtomicBool>,
    clients: JoinSet<Vec<u32>>,
}

impl Load {
    fn start(edges: &[&Server], next: &Arc<AtomicU32>) -> Self {
        let edges = Arc::new(Mutex::new(edges.iter().map(|edge| edge.sync_url()).collect::<Vec<_>>()));
        let mut load = Self { edges, next: next.clone(), done: Arc::default(), clients: JoinSet::new() };
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

/// The numbers of the events that are stored, each once.
async fn there(database: &Database) -> HashSet<u32> {
    let ids = database.admin.query("SELECT id FROM events", &[]).await.expect("the test's own query");
    let there: HashSet<u32> =
        ids.iter().filter_map(|row| u32::try_from(row.get::<_, Uuid>(0).as_u128()).ok()).collect();
    assert_eq!(ids.len(), there.len(), "an event is there twice");
    there
}

async fn published(edge: &Server) -> f64 {
    Metrics::of(edge).await.value("opsmantik_nats_published_total", &[]).unwrap_or(0.0)
}

/// Sends events again, each of which has to be taken.
async fn send_again(edge: &Server, numbers: std::ops::Range<u32>) {
    let batches = numbers.clone().step_by(100).map(|from| async move {
        let events: Vec<_> = (from..numbers.end.min(from + 100)).map(numbered).collect();
        let sent = events.len();
        let body = json!({"events": events}).to_string();
        let answer = Answer::of(client().post(edge.sync_url()).header("Origin", ORIGIN).body(body)).await;
        let results = answer.body["results"].as_array().cloned().unwrap_or_default();
        let taken = |result: &&Value| matches!(result["status"].as_str(), Some("queued" | "stored" | "duplicate"));
        assert_eq!(results.iter().filter(taken).count(), sent, "{} {}", answer.status, answer.body);
    });
    join_all(batches).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_an_edge_and_a_worker_are_killed_in_turn_and_what_was_answered_is_there_exactly_once() {
    let Some(mut nats) = NatsServer::start().await else { return };
    let rounds: u32 = std::env::var("NATS_KILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1);
    let database = database().await;
    database.site("shop").await;
    let url = database.url.as_str();
    let (mut first, mut second) = tokio::join!(nats.serve("edge", url, &[]), nats.serve("edge", url, &[]));
    let mut steady = nats.worker(url).await;
    let (next, mut sent, mut answered) = (Arc::<AtomicU32>::default(), 0, 0);
    let (mut slowest, began) = (Duration::ZERO, Instant::now());
    for round in 1..=rounds {
        let worker = nats.worker(url).await;
        let load = Load::start(&[&first, &second], &next);
        // Never at quite the same place.
        let a_while = || tokio::time::sleep(Duration::from_millis(400 + 370 * u64::from(round) % 400));
        a_while().await;
        worker.program.kill().await;
        a_while().await;
        nats.kill().await;
        a_while().await;
        nats.restart().await;
        // Published again, not only stored directly.
        let (before, back) = (published(&second).await, Instant::now());
        while published(&second).await <= before {
            let said = || second.program.said();
            assert!(back.elapsed() < Duration::from_secs(15), "the edge does not find NATS again:\n{}", said());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        first.program.kill().await;
        first = nats.serve("edge", url, &[]).await;
        load.replace(0, &first);
        let replaced = nats.worker(url).await;
        a_while().await;
        // And one that is asked to stop ends what it took, and leaves the rest.
        steady.program.stop(STOP_LIMIT).await;
        steady = replaced;
        a_while().await;
        let took = load.stop().await;
        let from = std::mem::replace(&mut sent, next.load(Ordering::Relaxed));
        assert!(took.len() > 50, "only {} of {} events were answered", took.len(), sent - from);
        let settling = Instant::now();
        nats.empty().await;
        slowest = slowest.max(settling.elapsed());

        let there = there(&database).await;
        let lost: Vec<_> = took.difference(&there).collect();
        assert!(lost.is_empty(), "answered and not stored: {lost:?}\n{}", nats.figures().await);
        answered += took.len();
        // A retry of everything changes nothing but the events that nobody had.
        send_again(&first, from..sent).await;
        nats.stored(&database, i64::from(sent)).await;
        nats.empty().await;
        database.assert_counted().await;
    }
    let (took, slowest) = (began.elapsed().as_secs_f64(), slowest.as_secs_f64());
    eprintln!(
        "{rounds} rounds in {took:.0} s: {sent} events sent, {answered} answered, {sent} stored after a retry, 0 lost, 0 doubled; \
         empty {slowest:.1} s after the load at most"
    );
    for program in [&mut steady.program, &mut first.program, &mut second.program] {
        program.stop(STOP_LIMIT).await;
    }
}
