//! A fault that begins and ends while visitors keep coming: what each of them hears, how long they wait for it, and when all is well again.
//!
//! Visitors do not wait for each other. Each comes through the door that its event takes; every tenth is a telephone call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, JoinSet};
use tokio_postgres::Client;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::doors::{Doors, OPEN, Said, Work, send_until_answered};
use crate::ledger::{self, Ledger, Stored};
use crate::options::slack;
use crate::report::Report;
use crate::rows::Plan;
use crate::support::process::Server;
use crate::world::World;

/// A visitor comes this often: on a machine that is busy with other things, too, they are no load.
const EVERY: Duration = Duration::from_millis(120);
/// So many visitors before the fault, and so long after it they still come.
const BEFORE: u32 = 12;
/// The first of them.
const COLD: usize = 5;
/// A telephone call passes more gates than an event, each of which is waited for.
const CALLS_LATER: Duration = Duration::from_secs(6);
/// What the looks of the server itself may be later than its answers.
const LOOKED_LATER: Duration = Duration::from_millis(750);
/// Readiness and health are looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const AFTER: Duration = Duration::from_millis(2_500);

/// What a row holds the server to.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Nobody waits longer for an answer.
    pub answer: Duration,
    /// Nobody who comes so long after the end of the fault notices it.
    pub recovery: Duration,
    /// `/readyz` and gRPC health tell of the fault within this time; none where it may not be seen.
    pub noticed: Option<Duration>,
}

impl Bounds {
    /// What a database that does not answer at once allows.
    pub const QUICK: Self = Self {
        answer: Duration::from_secs(5),
        recovery: Duration::from_secs(1),
        noticed: Some(Duration::from_secs(5)),
    };
    /// The patience of the pipeline, and what is asked before it.
    pub const PATIENT: Self = Self { answer: Duration::from_secs(10), ..Self::QUICK };
}

struct Probe {
    n: u32,
    call: bool,
    began: Instant,
    took: Duration,
    said: Said,
}

/// When it was asked, when the answer came, and whether that was a yes.
type Looks = Vec<(Instant, Instant, bool)>;

/// A server in front of a database that something will happen to.
pub struct Stage {
    pub server: Server,
    pub report: Report,
    doors: Doors,
    world: Arc<World>,
    next: u32,
    all: Work,
    answered: Work,
}

impl Stage {
    /// `url` is how the server reaches the database.
    pub async fn set(plan: &Plan, url: &str, token: &str, more: &[(&str, &str)]) -> Self {
        let server = Server::start_with(url, &[&OPEN, more].concat()).await;
        let doors = Doors::of(&server, token);
        let world = Arc::new(World::new(plan.seed, 300));
        Self {
            server,
            report: Report::default(),
            doors,
            world,
            next: 0,
            all: Work::default(),
            answered: Work::default(),
        }
    }

    /// One outage: `fault` begins it, `mend` ends it.
    pub async fn outage(
        &mut self,
        hold: Duration,
        bounds: Bounds,
        fault: impl AsyncFnOnce(),
        mend: impl AsyncFnOnce(),
    ) {
        let (done, heard) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (ready, serving) = (look_at_ready(&self.server, done.clone()), look_at_health(&self.server, done.clone()));
        well(&self.server).await;
        tokio::time::sleep(LOOK_EVERY * 3).await;
        let visitors = self.visitors(done.clone(), heard.clone());
        let waited = Instant::now();
        while heard.load(Ordering::Relaxed) < BEFORE && waited.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(EVERY).await;
        }
        let began = Instant::now();
        fault().await;
        tokio::time::sleep(hold).await;
        mend().await;
        let back = Instant::now();
        tokio::time::sleep(AFTER).await;
        done.store(true, Ordering::Relaxed);
        let probes = visitors.await.expect("the visitors do not panic");
        self.next += u32::try_from(probes.len()).expect("a few hundred");
        // What an answer takes on this machine while nothing is wrong: it may be busy with other things.
        let mut calm: Vec<_> = probes.iter().filter(|probe| probe.began + probe.took < began).collect();
        calm.sort_by_key(|probe| probe.began);
        // The first ones meet a server that has no connection yet.
        let calm = calm.iter().skip(COLD).map(|probe| probe.took).max().unwrap_or_default();
        let bounds = Bounds {
            answer: bounds.answer + calm * 2 + slack(),
            recovery: bounds.recovery + calm + slack(),
            noticed: bounds.noticed.map(|limit| limit + calm * 2 + slack()),
        };
        self.report.note(format!("an answer took {calm:.1?} at most before it"));
        self.judge(&probes, began, back, bounds);
        let looks = [("/readyz", ready), ("gRPC health", serving)];
        for (what, looks) in looks {
            let looks = looks.await.expect("looking does not panic");
            self.judge_looks(what, &looks, began, back, bounds);
        }
    }

    fn visitors(&self, done: Arc<AtomicBool>, heard: Arc<AtomicU32>) -> JoinHandle<Vec<Probe>> {
        let (doors, world, mut n) = (self.doors.clone(), self.world.clone(), self.next);
        tokio::spawn(async move {
            let (mut visits, mut heard_of) = (JoinSet::new(), Vec::new());
            while !done.load(Ordering::Relaxed) {
                // Until the fault the next one waits for the last.
                while heard.load(Ordering::Relaxed) < BEFORE
                    && visits.join_next().await.map(|probe| heard_of.extend(probe.ok())).is_some()
                {}
                n += 1;
                let (doors, world, heard) = (doors.clone(), world.clone(), heard.clone());
                visits.spawn(async move {
                    let (began, call) = (Instant::now(), n % 10 == 0);
                    let said = if call {
                        doors.call(world.call(n)).await
                    } else {
                        let event = world.event(n);
                        doors.send(event.door, &[event]).await.remove(0)
                    };
                    heard.fetch_add(u32::from(said == Said::Yes), Ordering::Relaxed);
                    Probe { n, call, began, took: began.elapsed(), said }
                });
                tokio::time::sleep(EVERY).await;
            }
            heard_of.extend(visits.join_all().await);
            heard_of
        })
    }

    fn judge(&mut self, probes: &[Probe], began: Instant, back: Instant, bounds: Bounds) {
        let report = &mut self.report;
        let (mut refused, mut early, mut unwell, mut late) = (0, 0, None, Vec::new());
        for probe in probes {
            let what = if probe.call { "call".to_owned() } else { format!("{:?}", self.world.event(probe.n).door) };
            report.waited(probe.took);
            let bound = if probe.call { bounds.answer + CALLS_LATER } else { bounds.answer };
            if probe.took > bound {
                late.push((probe.took, format!("{what}: {:?}", probe.said)));
            }
            if probe.call { &mut self.all.calls } else { &mut self.all.events }.push(probe.n);
            match &probe.said {
                Said::Yes => {
                    report.answered += 1;
                    if probe.call { &mut self.answered.calls } else { &mut self.answered.events }.push(probe.n);
                }
                Said::Later { told_when } => {
                    refused += 1;
                    report.demand(*told_when, format!("{what}: a refusal without a word on when to come again"));
                    early += u32::from(probe.began + probe.took < began);
                }
                other => report.demand(false, format!("{what}: {other:?}")),
            }
            if probe.said != Said::Yes && probe.began > back {
                unwell = unwell.max(Some(probe.began - back));
            }
        }
        if let Some((took, what)) = late.iter().max() {
            let bound = bounds.answer;
            report.demand(false, format!("{} waited longer than {bound:.1?}; {what} after {took:.1?}", late.len()));
        }
        if early > 0 {
            report.note(format!("{early} were refused before anything was wrong: the machine is too busy"));
        }
        let recovery = unwell.unwrap_or_default();
        report.sent += probes.len() as u64;
        report.refused += refused;
        report.recovered_after(recovery);
        report.demand(refused > 0, "nobody noticed the fault: the row says nothing");
        report.demand(
            recovery <= bounds.recovery,
            format!("who came {recovery:?} after the end of the fault was still refused"),
        );
    }

    fn judge_looks(&mut self, what: &str, looks: &Looks, began: Instant, back: Instant, bounds: Bounds) {
        let well_before = looks.iter().filter(|(_, ended, _)| *ended < began).any(|(.., well)| *well);
        self.report.demand(well_before, format!("{what}: not well before the fault"));
        let Some(limit) = bounds.noticed else { return };
        match looks.iter().find(|(_, ended, well)| *ended > began && !well) {
            Some((_, ended, _)) => {
                let after = *ended - began;
                self.report.note(format!("{what} told of it after {:.1} s", after.as_secs_f64()));
                self.report.demand(after <= limit, format!("{what} told of the fault only after {after:?}"));
            }
            None => self.report.demand(false, format!("{what} never told of the fault")),
        }
        let last =
            looks.iter().filter(|(asked, _, well)| *asked > back && !well).map(|(asked, ..)| *asked - back).max();
        let last = last.unwrap_or_default();
        let soon = bounds.recovery + LOOKED_LATER;
        self.report.demand(last <= soon, format!("{what} still told of the fault {last:?} after its end"));
        self.report.demand(looks.last().is_some_and(|(.., well)| *well), format!("{what} is not well in the end"));
    }

    /// What was answered is there; after a retry of all everything is, once.
    pub async fn end(mut self, admin: &Client, stop_limit: Duration) -> Report {
        let ledger = Arc::new(Ledger::default());
        let stored = Stored::read(admin).await;
        self.report.doubled += stored.doubled;
        self.report.lost += stored.missing(&self.answered);
        if let Err(why) =
            send_until_answered(&self.doors, &self.world, &ledger, &self.all, Duration::from_secs(60)).await
        {
            self.report.demand(false, why);
        }
        let stored = Stored::read(admin).await;
        self.report.stored = stored.rows;
        self.report.doubled += stored.doubled;
        self.report.lost += stored.missing(&self.all);
        ledger::sessions_count(admin, &mut self.report).await;
        self.server.program.stop(stop_limit).await;
        self.report
    }
}

/// Waits until whoever looks at the server finds it well.
async fn well(server: &Server) {
    let since = Instant::now();
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    let mut health = HealthClient::new(endpoint.connect_lazy());
    while since.elapsed() < Duration::from_secs(20) {
        let ready = crate::support::process::client().get(server.ready_url()).send().await;
        let serving = health.check(HealthCheckRequest::default()).await;
        let serving = serving.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving);
        if serving && ready.is_ok_and(|answer| answer.status() == 200) {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn look_at_ready(server: &Server, done: Arc<AtomicBool>) -> JoinHandle<Looks> {
    let (url, client) = (server.ready_url(), crate::support::process::client());
    tokio::spawn(async move {
        let mut looks = Looks::new();
        while !done.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let well = client.get(&url).send().await.is_ok_and(|answer| answer.status() == 200);
            looks.push((asked, Instant::now(), well));
            tokio::time::sleep(LOOK_EVERY).await;
        }
        looks
    })
}

fn look_at_health(server: &Server, done: Arc<AtomicBool>) -> JoinHandle<Looks> {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    tokio::spawn(async move {
        let mut health = HealthClient::new(endpoint.connect_lazy());
        let mut looks = Looks::new();
        while !done.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let answer = health.check(HealthCheckRequest::default()).await;
            let well = answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving);
            looks.push((asked, Instant::now(), well));
            tokio::time::sleep(LOOK_EVERY).await;
        }
        looks
    })
}
