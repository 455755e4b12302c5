//! What runs is killed under load through every door, again and again: what was answered is there exactly once, all else at most once; after a
//! retry of all everything exactly once, and the tables are those of a run that nothing has disturbed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::Plan;
use crate::doors::{Doors, OPEN, Said, Work, send, send_until_answered};
use crate::ledger::{self, Ledger, Stored};
use crate::options::slack;
use crate::report::Report;
use crate::support::database::{Database, connect, database};
use crate::support::private::{Private, Shutdown};
use crate::support::process::Server;
use crate::world::{CALLS_IN, Door, PUBLIC_ID, SITE, World};

/// Events of a round, and of the short form; one more in fifteen is a call.
const EVENTS: u32 = 300;
const FEW_EVENTS: u32 = 150;
/// Everybody's retries are through by then.
const LIMIT: Duration = Duration::from_secs(60);

/// What rows of this kind have in common.
pub struct Scene {
    pub world: Arc<World>,
    pub ledger: Arc<Ledger>,
    pub report: Report,
    lot: StdRng,
    events: u32,
}

impl Scene {
    pub fn new(plan: &Plan) -> Self {
        let events = if plan.long { EVENTS } else { FEW_EVENTS };
        let (world, lot) = (Arc::new(World::new(plan.seed, events)), StdRng::seed_from_u64(plan.seed));
        Self { world, ledger: Arc::default(), report: Report::default(), lot, events }
    }

    pub fn work(&self, round: u32) -> Work {
        let numbers = |each: u32| (round * each + 1..=(round + 1) * each).collect();
        let work = Work { events: numbers(self.events), calls: numbers(self.events / CALLS_IN) };
        debug_assert_eq!(ledger::doors_of(&self.world, &work).len(), Door::ALL.len(), "every door is used");
        work
    }

    /// All rounds up to this one.
    fn all(&self, rounds: u32) -> Work {
        let works = (0..rounds).map(|round| self.work(round));
        works.fold(Work::default(), |mut all, work| {
            all.events.extend(work.events);
            all.calls.extend(work.calls);
            all
        })
    }

    /// Begins to send a round's work, and returns in the middle of it, at a moment that is drawn by lot.
    pub async fn begin(&mut self, doors: &Doors, work: &Work) -> Sending {
        let enough = Arc::new(AtomicBool::new(false));
        let before = self.ledger.answered();
        let task = tokio::spawn({
            let (doors, world, ledger) = (doors.clone(), self.world.clone(), self.ledger.clone());
            let (work, enough) = (work.clone(), enough.clone());
            async move { send(&doors, &world, &ledger, &work, &enough).await }
        });
        let share = self.lot.random_range(0.05..0.6);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share of a few hundred
        let awaited = before + (f64::from(self.events) * share) as usize;
        let began = Instant::now();
        while self.ledger.answered() < awaited && !task.is_finished() {
            if began.elapsed() > LIMIT {
                self.report.demand(false, "nothing is stored");
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(self.lot.random_range(0..20_000))).await;
        Sending { task, enough }
    }

    /// After the kill: what was answered is there, and nothing twice.
    pub async fn check_answered(&mut self, admin: &Client, round: u32, work: &Work) {
        let unanswered = self.check(admin, round, work).await;
        self.report.demand(unanswered > 0, format!("round {round}: all was answered before anything broke"));
    }

    /// What was answered is there, and nothing twice; how many were not answered.
    pub async fn check(&mut self, admin: &Client, round: u32, work: &Work) -> usize {
        ledger::at_rest(admin).await;
        let stored = Stored::read(admin).await;
        let lost = stored.missing(&self.ledger.answered_work());
        self.report.lost += lost;
        self.report.doubled += stored.doubled;
        self.report.demand(lost == 0, format!("round {round}: {lost} were answered as stored and are not there"));
        let unanswered = self.ledger.unanswered(work);
        let left = unanswered.events.len() + unanswered.calls.len();
        self.report.sent += (work.events.len() + work.calls.len()) as u64;
        self.report.answered += (work.events.len() + work.calls.len() - left) as u64;
        ledger::sessions_count(admin, &mut self.report).await;
        if (round + 1).is_multiple_of(5) {
            println!("    round {}: {} were sent, {} answered", round + 1, self.report.sent, self.report.answered);
        }
        left
    }

    /// Knocks at a door from now on; how long it takes until it is answered there that an event is stored.
    pub fn knock(&self, doors: &Doors, work: &Work) -> JoinHandle<Duration> {
        let event = work.events.iter().rev().map(|n| self.world.event(*n)).find(|event| event.door == Door::Sync);
        let (doors, event) = (doors.clone(), event.expect("every door is used"));
        tokio::spawn(async move {
            let began = Instant::now();
            while doors.send(Door::Sync, std::slice::from_ref(&event)).await != [Said::Yes] && began.elapsed() < LIMIT {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            began.elapsed()
        })
    }

    /// Sends all of a round again until all of it is answered; it is there exactly once then.
    pub async fn retry(&mut self, doors: &Doors, admin: &Client, round: u32, work: &Work) {
        if let Err(why) = send_until_answered(doors, &self.world, &self.ledger, work, LIMIT).await {
            self.report.demand(false, format!("round {round}: {why}"));
        }
        let stored = Stored::read(admin).await;
        let lost = stored.missing(work);
        self.report.lost += lost;
        self.report.doubled += stored.doubled;
        self.report.demand(lost == 0, format!("round {round}: {lost} are not there after everything was sent again"));
        ledger::sessions_count(admin, &mut self.report).await;
    }

    /// Holds the tables against those of one run that nothing has disturbed.
    pub async fn finish(mut self, admin: &Client, rounds: u32) -> Report {
        let undisturbed = shop(database().await).await;
        let token = token(&undisturbed).await;
        let mut server = Server::start_with(&undisturbed.url, &OPEN).await;
        let quiet = Arc::new(Ledger::default());
        let (doors, all) = (Doors::of(&server, &token), self.all(rounds));
        if let Err(why) = send_until_answered(&doors, &self.world, &quiet, &all, LIMIT * 20).await {
            self.report.demand(false, format!("undisturbed: {why}"));
        }
        ledger::compare(admin, &undisturbed.admin, &self.world, &mut self.report).await;
        server.program.stop(Duration::from_secs(20)).await;
        let stored = Stored::read(admin).await;
        self.report.stored = stored.rows;
        self.report.demand(stored.rows == self.report.sent, "what is stored is not what was sent");
        self.ledger.tell(&mut self.report);
        self.report
    }
}

/// A round's work on its way.
pub struct Sending {
    task: tokio::task::JoinHandle<()>,
    enough: Arc<AtomicBool>,
}

impl Sending {
    /// Whoever has not begun does not begin any more; the others hear what there is to hear.
    pub async fn end(self) {
        self.enough.store(true, Ordering::Relaxed);
        self.task.await.expect("the clients do not panic");
    }
}

/// The database with the one site.
pub async fn shop(database: Database) -> Database {
    let insert = "INSERT INTO sites (id, public_id, name, domain, region) VALUES ($1, $2, $2, $2 || '.example', 'US')";
    database.admin.execute(insert, &[&SITE.as_uuid(), &PUBLIC_ID]).await.expect("a new site");
    database
}

pub async fn token(database: &Database) -> String {
    database.token(&Scope::ALL, None).await
}

pub async fn server(plan: Plan) -> Report {
    let mut scene = Scene::new(&plan);
    let database = shop(database().await).await;
    let token = token(&database).await;
    let mut server = Server::start_with(&database.url, &OPEN).await;
    for round in 0..plan.rounds {
        let work = scene.work(round);
        let sending = scene.begin(&Doors::of(&server, &token), &work).await;
        server.program.kill().await;
        sending.end().await;
        scene.check_answered(&database.admin, round, &work).await;
        let since = Instant::now();
        server = Server::start_with(&database.url, &OPEN).await;
        let doors = Doors::of(&server, &token);
        scene.knock(&doors, &work).await.expect("it does not panic");
        scene.report.recovered_after(since.elapsed());
        scene.retry(&doors, &database.admin, round, &work).await;
    }
    server.program.stop(Duration::from_secs(20)).await;
    scene.finish(&database.admin, plan.rounds).await
}

/// With `fsync` on, as anybody has it.
pub async fn postgres(plan: Plan) -> Report {
    let mut scene = Scene::new(&plan);
    let mut private = Private::start(&[("fsync", "on")]).await;
    let (url, token) = {
        let database = shop(private.database().await).await;
        (database.url.clone(), token(&database).await)
    };
    let mut server = Server::start_with(&url, &OPEN).await;
    let doors = Doors::of(&server, &token);
    let mut calm = Duration::ZERO;
    for round in 0..plan.rounds {
        let work = scene.work(round);
        let sending = scene.begin(&doors, &work).await;
        private.restart(Shutdown::Immediate).await;
        let knocking = scene.knock(&doors, &work);
        sending.end().await;
        scene.report.recovered_after(knocking.await.expect("it does not panic"));
        let admin = connect(&url).await;
        scene.check_answered(&admin, round, &work).await;
        scene.retry(&doors, &admin, round, &work).await;
        // What the same takes on this machine while nothing is wrong.
        calm = calm.max(scene.knock(&doors, &work).await.expect("it does not panic"));
    }
    let recovery = scene.report.recovery.unwrap_or_default();
    scene.report.note(format!("an answer took {calm:.1?} at most while nothing was wrong"));
    scene.report.demand(
        recovery <= Duration::from_secs(1) + calm * 3 + slack(),
        format!("the first event was stored {recovery:?} after the database was back"),
    );
    let report = scene.finish(&connect(&url).await, plan.rounds).await;
    server.program.stop(Duration::from_secs(20)).await;
    report
}
