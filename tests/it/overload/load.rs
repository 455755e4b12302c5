//! Clients of the public door that do not wait: each sends its next request as soon as it has an answer, whatever the answer was.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Of which site, and how many events at a time.
#[derive(Clone, Copy)]
pub struct Kind {
    pub site: &'static str,
    pub events: u32,
    /// Between an answer and the next request.
    pub pause: Duration,
}

/// What clients were told.
#[derive(Default)]
pub struct Told {
    pub stored: AtomicU64,
    pub refused: AtomicU64,
    /// Refusals that did not say when to come again.
    pub curt: AtomicU64,
    /// Anything else, and connections that broke.
    pub odd: AtomicU64,
    latencies: Mutex<Vec<Duration>>,
}

impl Told {
    pub fn requests(&self) -> u64 {
        [&self.stored, &self.refused, &self.odd].iter().map(|number| number.load(Ordering::Relaxed)).sum()
    }

    /// The slowest answer of a hundred that stored something, and the slowest of all.
    pub fn slowest(&self) -> (Duration, Duration) {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner).clone();
        latencies.sort_unstable();
        let last = latencies.last().copied().unwrap_or_default();
        (latencies.get(latencies.len() * 99 / 100).copied().unwrap_or(last), last)
    }
}

/// Some clients of a kind.
pub struct Crowd {
    pub told: Arc<Told>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Crowd {
    pub fn begin(server: SocketAddr, size: usize, kind: Kind) -> Self {
        let (told, stop) = (Arc::<Told>::default(), Arc::<AtomicBool>::default());
        let mut clients = JoinSet::new();
        for _ in 0..size {
            let (told, stop) = (told.clone(), stop.clone());
            clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    if visit(server, kind, &told, &stop).await.is_err() {
                        told.odd.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            });
        }
        Self { told, stop, clients }
    }

    /// Waits for the answers that are still due.
    pub async fn end(mut self) -> Arc<Told> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("no panic");
        }
        self.told
    }
}

/// One connection, for as long as it lasts.
async fn visit(server: SocketAddr, kind: Kind, told: &Told, stop: &AtomicBool) -> std::io::Result<()> {
    let mut socket = TcpStream::connect(server).await?;
    socket.set_nodelay(true)?;
    let mut received = Vec::with_capacity(4096);
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        socket.write_all(&request(kind)).await?;
        let head = loop {
            if let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
                break String::from_utf8_lossy(&received[..end]).to_ascii_lowercase();
            }
            if socket.read_buf(&mut received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        };
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.trim().parse().ok());
        let whole = head.len() + 4 + length.unwrap_or(0_usize);
        while received.len() < whole {
            if socket.read_buf(&mut received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        received.drain(..whole);
        match head.split(' ').nth(1) {
            Some("200") => {
                told.stored.fetch_add(1, Ordering::Relaxed);
                told.latencies.lock().unwrap_or_else(PoisonError::into_inner).push(began.elapsed());
            }
            Some("503") => {
                told.refused.fetch_add(1, Ordering::Relaxed);
                told.curt.fetch_add(u64::from(!head.contains("retry-after: ")), Ordering::Relaxed);
            }
            _ => drop(told.odd.fetch_add(1, Ordering::Relaxed)),
        }
        if head.contains("connection: close") {
            return Ok(());
        }
        if !kind.pause.is_zero() {
            tokio::time::sleep(kind.pause).await;
        }
    }
    Ok(())
}

/// A request with events that nobody has sent before; sixteen in a row are one visit.
pub fn request(kind: Kind) -> Vec<u8> {
    let Kind { site, events, .. } = kind;
    let first = NEXT.fetch_add(u64::from(events), Ordering::Relaxed);
    let event = |n: u64| {
        format!(
            r#"{{"id":"{}","s":"{site}","u":"https://{site}.example/page?utm_source=x&gclid=G{n}","sid":"visit-{}","ec":"interaction","ea":"view","meta":{{"fp":"f{}","sw":390,"sh":844,"lan":"en-GB"}}}}"#,
            Uuid::from_u128(u128::from(n)),
            n / 16,
            n / 64,
        )
    };
    let body = match events {
        1 => event(first),
        _ => {
            let events: Vec<String> = (first..first + u64::from(events)).map(event).collect();
            format!("{{\"events\":[{}]}}", events.join(","))
        }
    };
    let length = body.len();
    format!(
        "POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: https://{site}.example\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Connections that send one request after the other, read no answer, and come again when they are thrown out.
pub fn deaf(server: SocketAddr, size: usize, kind: Kind) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for _ in 0..size {
        clients.spawn(async move {
            loop {
                if let Ok(mut socket) = TcpStream::connect(server).await {
                    while socket.write_all(&request(kind)).await.is_ok() {}
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
    }
    clients
}
