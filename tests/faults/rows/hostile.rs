//! Slow and hostile peers, all at once and at both doors, while a visitor and a service that mean well come by: these are served, the others are
//! answered or closed, and the server's memory stays within bounds.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opsmantik::grpc::proto::IngestRequest;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::Plan;
use super::kill::{shop, token};
use super::qstash::resident;
use crate::doors::{Caller, Doors, OPEN, ORIGIN, Said, Work, caller};
use crate::ledger::{self, Stored};
use crate::options::slack;
use crate::report::Report;
use crate::support::database::{Database, database};
use crate::support::process::Server;
use crate::world::{Door, World};

/// Nobody is borne with for longer: fifteen seconds for headers, ten for a body, five for what is swallowed after a refusal.
/// Before that a connection may wait in the kernel's queue until it is taken.
const PATIENCE: Duration = Duration::from_secs(40);
/// Most that the server may occupy, MiB: its rooms are 24 for bodies, 16 for messages, 40 for events.
const MOST: f64 = 256.0;
/// What whoever means well waits, on a machine that is busy with the others.
const ANSWER: Duration = Duration::from_secs(4);
/// Rounds in which the peers attack; in every round new fingerprints come.
const ATTACKS: u32 = 2;

/// Requests at once on a connection of HTTP/2: as many as the server takes.
const STREAMS: u32 = 16;
/// A client may fill its own part of the rooms, so whoever does has an address of its own: those whose requests never end ...
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// ... and those who pour. All others, and whoever means well, are at the usual one.
const POURING: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// They come when all that are idle have come, and one after the other, or the kernel's queue would be what is tried; all of them within the time
/// that a body has.
const LATER: Duration = Duration::from_secs(5);
const PACE: Duration = Duration::from_millis(8);

/// How many of each kind.
struct Scale {
    bare: usize,
    begun: usize,
    slow: usize,
    endless: usize,
    idle: usize,
    idle_grpc: usize,
    resetting: usize,
    resets: u32,
    fingerprints: u32,
}

/// Those that have begun a body are as many as it takes to fill the room of all, if each has the smallest piece of it.
const SHORT: Scale = Scale {
    bare: 300,
    begun: 1_100,
    slow: 100,
    endless: 100,
    idle: 2_000,
    idle_grpc: 1_500,
    resetting: 8,
    resets: 5_000,
    fingerprints: 2_000,
};
const LONG: Scale = Scale {
    bare: 500,
    begun: 1_100,
    slow: 1_000,
    endless: 100,
    idle: 6_000,
    idle_grpc: 4_000,
    resetting: 30,
    resets: 50_000,
    fingerprints: 20_000,
};

/// How a complaint about an idle connection begins.
const IDLE: &str = "idle at";

/// What a peer has against the server, if anything.
type Complaint = Option<String>;

/// Reads until the other side is done; what it said. None if it is still there after [`PATIENCE`].
async fn until_closed(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    closed_within(PATIENCE, stream).await
}

async fn closed_within(patience: Duration, stream: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    let mut said = Vec::new();
    let mut piece = [0; 4096];
    let read = async {
        while let Ok(length @ 1..) = stream.read(&mut piece).await {
            // The beginning says enough.
            let room = 4096_usize.saturating_sub(said.len());
            said.extend_from_slice(&piece[..length.min(room)]);
        }
    };
    let closed = tokio::time::timeout(patience, read).await.is_ok();
    closed.then_some(said)
}

fn status_of(said: &[u8]) -> Option<u16> {
    std::str::from_utf8(said.get(9..12)?).ok()?.parse().ok()
}

/// A byte a second: of the headers, or of the body.
async fn slow(server: SocketAddr, body: bool) -> Complaint {
    let Ok(stream) = TcpStream::connect(server).await else { return Some("slow: not taken".to_owned()) };
    let (mut from, mut to) = stream.into_split();
    let head = "POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: https://shop.example\r\nContent-Length: 500\r\n";
    let begun = if body { format!("{head}\r\n{{") } else { "POST /api/sync HTTP/1.1\r\nHost: x\r\nX: ".to_owned() };
    let dripping = async {
        let _ = to.write_all(begun.as_bytes()).await;
        while to.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = dripping => None,
        said = until_closed(&mut from) => match said {
            None => Some(format!("slow: still borne with after {PATIENCE:?}")),
            Some(said) => match status_of(&said) {
                Some(408) | None => None,
                Some(other) => Some(format!("slow: {other}")),
            },
        },
    }
}

/// A connection from this address of the machine's own.
async fn connect(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect(to).await
}

/// A body without an end, as fast as it goes.
async fn endless(server: SocketAddr) -> Complaint {
    let Ok(stream) = connect(POURING, server).await else { return Some("endless: not taken".to_owned()) };
    let (mut from, mut to) = stream.into_split();
    let head = format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nTransfer-Encoding: chunked\r\n\r\n");
    let piece = [&b"4000\r\n"[..], &[b' '; 0x4000], b"\r\n"].concat();
    let pouring = async {
        let _ = to.write_all(head.as_bytes()).await;
        while to.write_all(&piece).await.is_ok() {}
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = pouring => None,
        said = until_closed(&mut from) => match said.as_deref().map(status_of) {
            Some(Some(413 | 503)) | Some(None) => None,
            Some(Some(other)) => Some(format!("endless: {other}")),
            None => Some(format!("endless: still borne with after {PATIENCE:?}")),
        },
    }
}

/// Connects and says nothing. They come one after the other, or the kernel's own queue of connections would be what is tried.
async fn idle(door: &'static str, server: SocketAddr, n: usize) -> Complaint {
    tokio::time::sleep(Duration::from_micros(700) * u32::try_from(n).unwrap_or(0)).await;
    let Ok(mut stream) = TcpStream::connect(server).await else { return None };
    match closed_within(PATIENCE + slack(), &mut stream).await {
        Some(_) => None,
        None => Some(format!("{IDLE} {door}: still there after {:?}", PATIENCE + slack())),
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The head of a POST over http, as HPACK writes it without a table: its path and an authority.
fn head(path: &str) -> Vec<u8> {
    [&[0x83, 0x86, 0x04][..], &text(path), &[0x01], &text("x")].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("short")][..], text.as_bytes()].concat()
}

/// As many requests as go on a connection, of which each has sent its head, and so much of a body that never ends.
async fn unfinished(server: SocketAddr, n: usize, body: &'static [u8]) -> Complaint {
    tokio::time::sleep(LATER + PACE * u32::try_from(n).unwrap_or(0)).await;
    let Ok(mut stream) = connect(ELSEWHERE, server).await else { return Some("unfinished: not taken".to_owned()) };
    let path = if n.is_multiple_of(10) { "/api/sync/worker" } else { "/api/sync" };
    let mut bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
    for n in 0..STREAMS {
        bytes.extend(frame(1, 4, 2 * n + 1, &head(path)));
        if !body.is_empty() {
            bytes.extend(frame(0, 0, 2 * n + 1, body));
        }
    }
    let answered = async {
        stream.write_all(&bytes).await?;
        let mut answers = 0;
        while answers < STREAMS {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await?;
            let [a, b, c, kind, ..] = head;
            stream.read_exact(&mut vec![0; u32::from_be_bytes([0, a, b, c]) as usize]).await?;
            answers += u32::from(kind == 1);
        }
        std::io::Result::Ok(())
    };
    // Closed is as good as answered.
    let over = tokio::time::timeout(PATIENCE, answered).await.is_ok();
    (!over).then(|| format!("unfinished: neither answered nor closed after {PATIENCE:?}"))
}

/// HTTP/2 rapid reset: requests that are taken back as soon as they are made.
async fn resetting(server: SocketAddr, path: &'static str, resets: u32, cut: Arc<AtomicU32>) -> Complaint {
    let Ok(stream) = TcpStream::connect(server).await else { return None };
    let (mut from, mut to) = stream.into_split();
    // gRPC's content type, too.
    let block = [&head(path)[..], &[0x0f, 0x10], &text("application/grpc")].concat();
    let attack = async {
        let mut bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
        for n in 0..resets {
            bytes.extend(frame(1, 4, 2 * n + 1, &block));
            bytes.extend(frame(3, 0, 2 * n + 1, &8_u32.to_be_bytes()));
            if bytes.len() > 16 << 10 {
                if to.write_all(&bytes).await.is_err() {
                    cut.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                bytes.clear();
            }
        }
        let _ = to.write_all(&bytes).await;
    };
    let ended = tokio::time::timeout(PATIENCE, async {
        tokio::join!(attack, async {
            let mut piece = [0; 4096];
            while let Ok(1..) =
                tokio::time::timeout(Duration::from_secs(3), from.read(&mut piece)).await.unwrap_or(Ok(0))
            {}
        })
    });
    // Cut off or borne with: either way it is over, and others were served.
    if ended.await.is_err() { Some("rapid reset: the attack was not over in time".to_owned()) } else { None }
}

/// What no event may look like: each is answered, and none takes the server with it.
async fn monstrous(url: String) -> Vec<Complaint> {
    let client = crate::support::process::client();
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"s":"shop","u":"https://shop.example/","sid":"deep","meta":{{"deep":{open}{close}}}}}"#)
    };
    let objects = |levels: usize| {
        let (open, close) = (r#"{"a":"#.repeat(levels), "}".repeat(levels));
        format!(r#"{{"s":"shop","u":"https://shop.example/","sid":"deep","meta":{open}1{close}}}"#)
    };
    let large = |bytes: usize| {
        let meta = "x".repeat(bytes);
        json!({"s": "shop", "u": "https://shop.example/", "sid": "large", "meta": {"large": meta}}).to_string()
    };
    let bodies = [
        ("100,000 levels", nested(100_000)),
        ("30,000 levels", nested(30_000)),
        ("80,000 objects", objects(80_000)),
        ("only brackets", "[".repeat(500_000)),
        ("a 512 KiB meta", large(512 << 10)),
        ("a meta that fills the body", large((512 << 10) - 200)),
    ];
    let mut complaints = Vec::new();
    for (what, body) in bodies {
        let began = Instant::now();
        let answer = client.post(&url).header("Origin", ORIGIN).body(body).send().await;
        let status = answer.ok().map(|answer| answer.status().as_u16());
        let fine = matches!(status, Some(400 | 413)) && began.elapsed() < PATIENCE;
        complaints.push((!fine).then(|| format!("{what}: {status:?} after {:?}", began.elapsed())));
    }
    complaints
}

/// The most that a process occupied while it was watched.
struct Gauge {
    most: Arc<Mutex<f64>>,
    watch: JoinHandle<()>,
}

impl Gauge {
    fn of(pid: i32) -> Self {
        let most = Arc::new(Mutex::new(0.0_f64));
        let watched = most.clone();
        let watch = tokio::spawn(async move {
            loop {
                let now = resident(pid);
                {
                    let mut most = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    *most = most.max(now);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Self { most, watch }
    }

    fn most(&self) -> f64 {
        *self.most.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

struct Rig {
    database: Database,
    server: Server,
    doors: Doors,
    grpc: Caller,
    world: Arc<World>,
    next: u32,
    all: Work,
}

impl Rig {
    /// A visitor and a service that mean well, until `done`; they come through new connections, as everybody does.
    fn good(&self, token: &str, done: Arc<AtomicBool>) -> JoinHandle<Vec<(u32, Said, Duration)>> {
        let (world, mut n) = (self.world.clone(), self.next);
        let doors = Doors::of(&self.server, token);
        tokio::spawn(async move {
            let mut heard = Vec::new();
            while !done.load(Ordering::Relaxed) {
                n += 1;
                let event = world.event(n);
                let door = if n % 2 == 0 { Door::Ingest } else { Door::Sync };
                let began = Instant::now();
                let said = doors.send(door, &[event]).await.remove(0);
                heard.push((n, said, began.elapsed()));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            heard
        })
    }

    async fn attack(&mut self, token: &str, scale: &Scale, report: &mut Report) {
        let done = Arc::new(AtomicBool::new(false));
        let good = self.good(token, done.clone());
        let (http, grpc) = (self.server.http, self.server.grpc);
        let mut peers: JoinSet<Vec<Complaint>> = JoinSet::new();
        for n in 0..scale.bare {
            peers.spawn(async move { vec![unfinished(http, n, b"").await] });
        }
        for n in 0..scale.begun {
            peers.spawn(async move { vec![unfinished(http, n, b" ").await] });
        }
        for n in 0..scale.slow {
            peers.spawn(async move { vec![slow(http, n % 2 == 0).await] });
        }
        for _ in 0..scale.endless {
            peers.spawn(async move { vec![endless(http).await] });
        }
        for n in 0..scale.idle {
            peers.spawn(async move { vec![idle("HTTP", http, n).await] });
        }
        for n in 0..scale.idle_grpc {
            peers.spawn(async move { vec![idle("gRPC", grpc, n).await] });
        }
        let cut = Arc::new(AtomicU32::new(0));
        for _ in 0..scale.resetting {
            for (door, path) in [(http, "/api/sync"), (grpc, "/opsmantik.v1.IngestService/Ingest")] {
                let (resets, cut) = (scale.resets, cut.clone());
                peers.spawn(async move { vec![resetting(door, path, resets, cut).await] });
            }
        }
        peers.spawn(monstrous(self.server.sync_url()));
        let mut idle_ones = Vec::new();
        while let Some(complaints) = peers.join_next().await {
            for complaint in complaints.expect("no peer panics").into_iter().flatten() {
                if complaint.starts_with(IDLE) { idle_ones.push(complaint) } else { report.demand(false, complaint) }
            }
        }
        // When its queue is full the kernel itself may keep one for a minute, of which no server hears.
        let most = (scale.idle + scale.idle_grpc) / 50;
        let many = idle_ones.len() > most;
        report.demand(!many, format!("{} of them {}", idle_ones.len(), idle_ones.first().map_or("", String::as_str)));
        done.store(true, Ordering::Relaxed);
        let heard = good.await.expect("they do not panic");
        report.demand(heard.len() >= 10, format!("only {} visitors who mean well were served", heard.len()));
        let (cut, all) = (cut.load(Ordering::Relaxed), scale.resetting * 2);
        report.note(format!(
            "{cut} of {all} peers that took back {} requests each were cut off before they were through",
            scale.resets
        ));
        let came = heard.len() as u64;
        report.note(format!("{came} visitors and services who mean well came by meanwhile"));
        for (n, said, took) in heard {
            self.next = self.next.max(n);
            report.sent += 1;
            report.waited(took);
            report.demand(took <= ANSWER + slack(), format!("who means well waited {took:?}"));
            match said {
                Said::Yes => {
                    report.answered += 1;
                    self.all.events.push(n);
                }
                // Or closed: five hundred connections that came after it, and nobody had the time to see its token.
                Said::Later { told_when: true } | Said::Nothing => report.refused += 1,
                other => report.demand(false, format!("who means well heard {other:?}")),
            }
        }
        // Only the short form, which may run where there is no time at all, lets one of twenty come again.
        let served = report.refused == 0 || (!slack().is_zero() && report.refused * 20 <= came);
        report.demand(served, format!("{} of {came} who mean well were told to come again", report.refused));
    }

    /// So many browsers that nobody has seen before, each with a visit of its own.
    async fn fingerprints(&mut self, count: u32, report: &mut Report) {
        for first in (0..count).step_by(500) {
            let events: Vec<u32> = (first..count.min(first + 500)).map(|n| self.next + 1 + n).collect();
            let messages = events.iter().map(|n| {
                let mut event = self.world.event(*n).message();
                (event.fingerprint, event.session_id) = (Some(format!("new-{n}")), format!("new-{n}"));
                event
            });
            let request = IngestRequest::of(messages.collect());
            let began = Instant::now();
            match IngestServiceClient::new(self.grpc.clone()).ingest(request).await {
                Ok(_) => {
                    report.answered += events.len() as u64;
                    self.all.events.extend(&events);
                }
                Err(status) => report.demand(false, format!("new fingerprints: {status}")),
            }
            report.sent += events.len() as u64;
            report.waited(began.elapsed());
        }
        self.next += count;
    }
}

pub async fn row(plan: Plan) -> Report {
    let scale = if plan.long { LONG } else { SHORT };
    let database = shop(database().await).await;
    let token = token(&database).await;
    let server = Server::start_with(&database.url, &OPEN).await;
    let (doors, grpc) = (Doors::of(&server, &token), caller(&server, &token));
    let world = Arc::new(World::new(plan.seed, 300));
    let mut rig = Rig { database, server, doors, grpc, world, next: 0, all: Work::default() };
    let mut report = Report::default();
    let pid = rig.server.program.pid();
    let gauge = Gauge::of(pid);
    rig.fingerprints(500, &mut report).await;
    let (before, mut after_first) = (resident(pid), 0.0);
    for round in 0..plan.rounds {
        if round < ATTACKS {
            rig.attack(&token, &scale, &mut report).await;
        }
        rig.fingerprints(scale.fingerprints, &mut report).await;
        if round == 0 {
            after_first = resident(pid);
        }
    }
    let (most, after) = (gauge.most(), resident(pid));
    report.note(format!(
        "the server occupied {before:.0} MiB before, {most:.0} MiB at most, {after_first:.0} MiB after the first round and {after:.0} MiB in the end"
    ));
    report.note(format!("{} distinct fingerprints", plan.rounds * scale.fingerprints + 500));
    report.demand(most <= MOST, format!("the server occupied {most:.0} MiB"));
    report.demand(after <= after_first + 48.0, "the server grows with the fingerprints that it has seen");
    let event = rig.world.event(rig.next + 1);
    let said = rig.doors.send(event.door, &[event]).await;
    report.demand(said == [Said::Yes], format!("in the end: {said:?}"));
    rig.all.events.push(rig.next + 1);
    (report.sent, report.answered) = (report.sent + 1, report.answered + 1);

    let stored = Stored::read(&rig.database.admin).await;
    (report.stored, report.doubled, report.lost) = (stored.rows, stored.doubled, stored.missing(&rig.all));
    ledger::sessions_count(&rig.database.admin, &mut report).await;
    rig.server.program.stop(Duration::from_secs(25)).await;
    report
}
