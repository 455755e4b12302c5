//! Two servers on one database: the same events through both at once, in another order; keepers and feeds in both, a watcher at each.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use opsmantik::grpc::proto::WatchEventsRequest;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::watch_events_response::Payload;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tonic::Code;

use super::Plan;
use super::kill::{Scene, shop, token};
use crate::doors::{Caller, Doors, OPEN, caller, send};
use crate::ledger;
use crate::report::Report;
use crate::support::database::database;
use crate::support::process::Server;
use crate::world::PUBLIC_ID;

/// Somebody who watches the site's events, and goes on where a watch has ended.
pub struct Watch {
    seen: watch::Receiver<BTreeSet<String>>,
    task: JoinHandle<Result<(), String>>,
}

impl Watch {
    pub fn begin(server: &Server, token: &str) -> Self {
        let (sender, seen) = watch::channel(BTreeSet::new());
        Self { seen, task: tokio::spawn(follow(caller(server, token), sender)) }
    }

    /// Waits until it has all that is stored, and no more.
    pub async fn end(mut self, admin: &Client, report: &mut Report) {
        let rows = admin.query("SELECT id::text FROM events", &[]).await.expect("the row's own query");
        let stored: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
        let all = self.seen.wait_for(|seen| *seen == stored);
        let complete = tokio::time::timeout(Duration::from_secs(30), all).await.is_ok_and(|waited| waited.is_ok());
        let seen = self.seen.borrow().len();
        report.note(format!("a watcher has seen {seen} of {} events", stored.len()));
        report.demand(complete, format!("a watcher has seen {seen} of {} events", stored.len()));
        if self.task.is_finished()
            && let Ok(Err(why)) = self.task.await
        {
            report.demand(false, format!("a watch ended: {why}"));
        }
    }
}

async fn follow(caller: Caller, seen: watch::Sender<BTreeSet<String>>) -> Result<(), String> {
    let mut resume_token = None;
    loop {
        let request =
            WatchEventsRequest { site: PUBLIC_ID.to_owned(), session_month: None, resume_token: resume_token.clone() };
        let ended = match IngestServiceClient::new(caller.clone()).watch_events(request).await {
            Err(status) => status,
            Ok(answer) => {
                let mut messages = answer.into_inner();
                loop {
                    let message = match messages.message().await {
                        Ok(Some(message)) => message,
                        Ok(None) => return Err("it ended in order".to_owned()),
                        Err(status) => break status,
                    };
                    match message.payload {
                        Some(Payload::SnapshotStart(_)) => drop(seen.send_replace(BTreeSet::new())),
                        Some(Payload::Change(change)) => seen.send_modify(|seen| {
                            if let Some(old) = &change.old {
                                seen.remove(&old.id);
                            }
                            if let Some(new) = change.new {
                                seen.insert(new.id);
                            }
                        }),
                        Some(Payload::SnapshotEnd(_) | Payload::Heartbeat(_)) | None => {}
                    }
                    resume_token = Some(message.resume_token);
                }
            }
        };
        if seen.is_closed() {
            return Ok(());
        }
        let passing =
            [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::ResourceExhausted, Code::DeadlineExceeded];
        if !passing.contains(&ended.code()) {
            return Err(ended.to_string());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub async fn row(plan: Plan) -> Report {
    let mut scene = Scene::new(&plan);
    let database = shop(database().await).await;
    let token = token(&database).await;
    // Both keepers find work when they start.
    let far = (chrono::Utc::now() + chrono::Months::new(3)).format("%Y_%m").to_string();
    let drop_far = ["events", "sessions"]
        .map(|table| format!("ALTER TABLE {table} DETACH PARTITION {table}_{far}; DROP TABLE {table}_{far};"))
        .concat();
    database.admin.batch_execute(&drop_far).await.expect("the months ahead are there");
    let start = || Server::start_with(&database.url, &OPEN);
    let (mut one, mut other) = tokio::join!(start(), start());
    let doors = [Doors::of(&one, &token), Doors::of(&other, &token)];
    let watches = [Watch::begin(&one, &token), Watch::begin(&other, &token)];
    for round in 0..plan.rounds {
        let work = scene.work(round);
        let mut backwards = work.clone();
        backwards.events.reverse();
        backwards.calls.reverse();
        let never = Arc::new(AtomicBool::new(false));
        let (world, ledger) = (&scene.world, &scene.ledger);
        tokio::join!(send(&doors[0], world, ledger, &work, &never), send(&doors[1], world, ledger, &backwards, &never));
        scene.check(&database.admin, round, &work).await;
        // Whoever was told to come again does so, at the other one.
        scene.retry(&doors[1 - (round % 2) as usize], &database.admin, round, &work).await;
    }
    let leaves = format!("SELECT count(*) FROM pg_class WHERE relname IN ('events_{far}', 'sessions_{far}')");
    let began = Instant::now();
    while ledger::count(&database.admin, &leaves).await < 2 && began.elapsed() < Duration::from_secs(30) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let made = ledger::count(&database.admin, &leaves).await;
    scene.report.demand(made == 2, format!("the keepers made {made} of the two leaves of a missing month"));
    for watch in watches {
        watch.end(&database.admin, &mut scene.report).await;
    }
    let report = scene.finish(&database.admin, plan.rounds).await;
    for server in [&mut one, &mut other] {
        server.program.stop(Duration::from_secs(20)).await;
    }
    report
}
