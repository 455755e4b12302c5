//! QStash is away, silent, slow, or answers 500, 429 or rubbish: the server stores the events itself, loses none, and does not pile them up.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::Plan;
use super::kill::shop;
use crate::doors::{OPEN, ORIGIN, Work};
use crate::ledger::{self, Stored};
use crate::proxy::{Proxy, Way};
use crate::report::Report;
use crate::support::database::{Database, database};
use crate::support::process::Server;
use crate::support::qstash::{Mood, Qstash, TOKEN};
use crate::world::World;

/// Requests at once, and events of a burst; every tenth request is a batch of five.
const AT_ONCE: usize = 100;
const BURST: u32 = 200;
/// What a visitor waits at most: QStash's three seconds, and the pipeline.
const ANSWER: Duration = Duration::from_secs(8);
/// 64 requests may be under way to QStash; the client keeps a connection that it has opened in vain for the next one.
const CONNECTIONS: usize = 2 * 64;
/// How much the server may grow, MiB.
const GROWTH: f64 = 64.0;
/// The breaker's pause, and some more.
const ASKED_AGAIN: Duration = Duration::from_secs(25);

struct Rig {
    database: Database,
    qstash: Qstash,
    proxy: Proxy,
    server: Server,
    /// Where QStash delivers, whichever server is there.
    address: SocketAddr,
    world: World,
    next: u32,
}

async fn serve(database: &str, address: SocketAddr, proxy: &Proxy) -> Server {
    let (address, qstash) = (address.to_string(), format!("http://{}", proxy.address));
    let public = format!("http://{address}");
    let more = [
        ("HTTP_ADDR", address.as_str()),
        ("PUBLIC_URL", &public),
        ("QUEUE", "qstash"),
        ("QSTASH_URL", &qstash),
        ("QSTASH_TOKEN", TOKEN),
    ];
    Server::start_with(database, &[&OPEN[..], &more].concat()).await
}

/// What happens to QStash.
struct Fault {
    name: &'static str,
    mood: Mood,
    way: Way,
    /// Whether QStash may own what it is sent.
    takes: bool,
    /// Whether the short form has it, too.
    short: bool,
}

fn faults() -> Vec<Fault> {
    let answer = |name, short, status, text: &str| {
        let mood = Mood::Answer(status, text.to_owned());
        Fault { name, mood, way: Way::Open, takes: false, short }
    };
    let by_way = |name, short, way, takes| Fault { name, mood: Mood::Accept, way, takes, short };
    let loses_answers = Fault {
        name: "takes it and never answers",
        mood: Mood::AcceptAndHang,
        way: Way::Open,
        takes: true,
        short: true,
    };
    vec![
        by_way("away", true, Way::Shut, false),
        by_way("packets lost", false, Way::Silent, false),
        by_way("two seconds slow", false, Way::Slow(Duration::from_secs(2)), true),
        by_way("five seconds slow", false, Way::Slow(Duration::from_secs(5)), true),
        loses_answers,
        answer("500", false, 500, "broken"),
        answer("429", true, 429, r#"{"error":"quota"}"#),
        answer("rubbish", true, 200, "<html>hello</html>"),
        answer("an empty 200", false, 200, ""),
        answer("no message id", false, 200, r#"{"messageId":null}"#),
    ]
}

/// MiB that a process occupies.
pub fn resident(pid: i32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

impl Rig {
    async fn start(plan: &Plan) -> Self {
        let database = shop(database().await).await;
        let qstash = Qstash::start().await;
        let address = qstash.url.strip_prefix("http://").and_then(|text| text.parse().ok()).expect("an address");
        let proxy = Proxy::before(address).await;
        let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = free.local_addr().expect("a bound socket");
        drop(free);
        let server = serve(&database.url, address, &proxy).await;
        Self { database, qstash, proxy, server, address, world: World::new(plan.seed, BURST), next: 0 }
    }

    /// Another server, whose breaker is closed.
    async fn begin_anew(&mut self) {
        self.server.program.stop(Duration::from_secs(20)).await;
        self.server = serve(&self.database.url, self.address, &self.proxy).await;
    }

    /// Sends a burst; what was queued and what was stored.
    async fn burst(&mut self, report: &mut Report, at_once: usize) -> (Work, Work) {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("a client");
        let (mut bodies, last) = (Vec::new(), self.next + BURST);
        while self.next < last {
            let count = if bodies.len() % 10 == 0 { 5 } else { 1 };
            let events: Vec<u32> = (self.next + 1..=(self.next + count).min(last)).collect();
            self.next = events.last().copied().unwrap_or(last);
            bodies.push(events);
        }
        let (url, world) = (self.server.sync_url(), &self.world);
        let answers: Vec<_> = stream::iter(bodies)
            .map(async |events: Vec<u32>| {
                let wires: Vec<Value> = events.iter().map(|n| world.event(*n).wire()).collect();
                let body = if wires.len() == 1 { wires[0].clone() } else { json!({"events": wires}) };
                let began = Instant::now();
                let answer = client.post(&url).header("Origin", ORIGIN).body(body.to_string()).send().await;
                let answer = answer.expect("the server answers");
                let (status, text) = (answer.status().as_u16(), answer.text().await.expect("a whole answer"));
                let body: Value = serde_json::from_str(&text).unwrap_or_default();
                let results = match body["results"].as_array() {
                    Some(results) => results.clone(),
                    None => vec![body],
                };
                (events, status, results, began.elapsed())
            })
            .buffer_unordered(at_once)
            .collect()
            .await;
        let (mut queued, mut stored) = (Work::default(), Work::default());
        for (events, status, results, took) in answers {
            report.waited(took);
            report.demand(took <= ANSWER, format!("a visitor waited {took:?}"));
            report.sent += events.len() as u64;
            for (n, result) in events.into_iter().zip(results) {
                match result["status"].as_str() {
                    Some("queued") => queued.events.push(n),
                    Some("stored" | "duplicate") => stored.events.push(n),
                    _ => report.demand(false, format!("{status} {result}")),
                }
            }
        }
        report.answered += (queued.events.len() + stored.events.len()) as u64;
        (queued, stored)
    }
}

/// One round is one fault after the other; the short form has those that differ most.
pub async fn row(plan: Plan) -> Report {
    let mut rig = Rig::start(&plan).await;
    let mut report = Report::default();
    let mut all = Work::default();
    // Few at once: even then a busy machine may store one itself rather than wait for its turn.
    let (queued, stored) = rig.burst(&mut report, 8).await;
    report.demand(queued.events.len() > BURST as usize * 9 / 10, "a QStash that is well takes everything");
    all.events.extend(queued.events.into_iter().chain(stored.events));
    let mut growth = 0.0_f64;
    for _ in 0..plan.rounds {
        for fault in faults().into_iter().filter(|fault| plan.long || fault.short) {
            rig.begin_anew().await;
            let pid = rig.server.program.pid();
            let before = resident(pid);
            rig.qstash.mood(fault.mood);
            rig.proxy.set(fault.way);
            let began = Instant::now();
            let (queued, stored) = rig.burst(&mut report, AT_ONCE).await;
            let (took, name) = (began.elapsed(), fault.name);
            growth = growth.max(resident(pid) - before);
            let there = Stored::read(&rig.database.admin).await;
            let lost = there.missing(&stored);
            report.lost += lost;
            report.demand(lost == 0, format!("{name}: {lost} answered as stored are not there"));
            let said = queued.events.len();
            report.demand(fault.takes || said == 0, format!("{name}: {said} are said to be queued"));
            report.note(format!(
                "{name}: {} stored directly, {said} queued, in {:.1} s",
                stored.events.len(),
                took.as_secs_f64()
            ));
            all.events.extend(queued.events.into_iter().chain(stored.events));
            rig.qstash.mood(Mood::Accept);
            rig.proxy.set(Way::Open);
        }
        if !plan.long {
            continue;
        }
        // It is asked again, sooner or later: the breaker closes by itself.
        let mended = Instant::now();
        loop {
            let (queued, stored) = rig.burst(&mut report, AT_ONCE).await;
            let some = !queued.events.is_empty();
            all.events.extend(queued.events.into_iter().chain(stored.events));
            if some {
                break;
            }
            if mended.elapsed() > ASKED_AGAIN {
                report.demand(false, "QStash is never asked again");
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        report.note(format!("QStash was asked again {:.1} s after it was well", mended.elapsed().as_secs_f64()));
    }
    let at_once = rig.proxy.most_at_once();
    report.note(format!("at most {at_once} connections to QStash at once; the server grew by at most {growth:.0} MiB"));
    report.demand(at_once <= CONNECTIONS, format!("{at_once} connections to QStash at once"));
    report.demand(growth <= GROWTH, format!("the server grew by {growth:.0} MiB"));

    // QStash delivers what it has, twice and in any order.
    let delivered = rig.qstash.deliver_all(2, plan.seed).await;
    let bad = delivered.iter().filter(|attempt| attempt.status != 200).count();
    report.demand(bad == 0, format!("{bad} deliveries were not answered 200"));
    let stored = Stored::read(&rig.database.admin).await;
    (report.stored, report.doubled) = (stored.rows, stored.doubled);
    let lost = stored.missing(&all);
    report.lost += lost;
    report.demand(stored.rows == u64::from(rig.next), format!("{} events are stored of {}", stored.rows, rig.next));
    ledger::sessions_count(&rig.database.admin, &mut report).await;
    rig.server.program.stop(Duration::from_secs(20)).await;
    report
}
