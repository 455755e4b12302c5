//! Clients that do not wait: requests due by the clock, written to sockets whether or not answers came, callers who ask again at once when they are
//! refused, and streams that send what flow control takes.
//!
//! What a socket has no room for is *held back*: offered, and kept by the kernels between the two from ever reaching the server. Each request has an
//! event of its own, made while it is written.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use opsmantik::grpc::proto::IngestRequest;
use prost::Message;
use prost::bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::LocalSet;
use tonic::Code;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_types::StatusExt;

use crate::grpc_load::{BATCH, INGEST, Raw, STREAM_INGEST, channel, message, with_token};
use crate::http_load::{Volley, parse, says_stored};
use crate::workload::Beat;

/// How often a connection looks at what is due.
const TICK: Duration = Duration::from_millis(20);
/// What was asked has this long to be answered after the end.
const AFTERMATH: Duration = Duration::from_secs(5);

/// What is sent over HTTP.
#[derive(Debug, Clone, Copy)]
pub struct Pressure {
    pub connections: usize,
    /// Requests a second, of all connections; none: each waits for its answer.
    pub rate: Option<f64>,
    pub lasts: Duration,
}

/// What became of it.
#[derive(Debug, Clone, Default)]
pub struct Flooded {
    /// Due by the clock.
    pub offered: usize,
    /// Written to a socket.
    pub sent: usize,
    pub stored: usize,
    /// 429 and 503.
    pub refused: usize,
    /// Of those: without `Retry-After`.
    pub without_retry_after: usize,
    pub others: usize,
    /// Connections that the server ended.
    pub hung_up: usize,
    pub odd: Option<String>,
}

/// A request with the places of its ids.
struct Mould {
    bytes: Vec<u8>,
    ids: Vec<usize>,
}

impl Mould {
    fn of(bytes: &[u8]) -> Self {
        let marks: [&[u8]; 2] = [br#""id":""#, br#""sid":""#];
        let place = |mark: &[u8]| bytes.windows(mark.len()).position(|window| window == mark).map(|at| at + mark.len());
        Self { bytes: bytes.to_vec(), ids: marks.into_iter().filter_map(place).collect() }
    }

    /// The request with its ids moved on to this round: other events, and other sessions in the same way.
    fn cast(&self, round: u32, into: &mut Vec<u8>) {
        let begin = into.len();
        into.extend_from_slice(&self.bytes);
        for at in &self.ids {
            into[begin + at..begin + at + 8].copy_from_slice(format!("{round:08x}").as_bytes());
        }
    }
}

struct Press {
    to: SocketAddr,
    moulds: Vec<Mould>,
    next: RefCell<u64>,
    /// Where the rounds of this flood begin, so that two do not send the same.
    first_round: u32,
    pressure: Pressure,
    began: Instant,
    seen: RefCell<Flooded>,
}

/// Presses on `/api/sync`. `flood` tells this flood from others.
pub async fn press(to: SocketAddr, volley: &Arc<Volley>, flood: u32, pressure: Pressure) -> anyhow::Result<Flooded> {
    let (volley, (tell, told)) = (volley.clone(), tokio::sync::oneshot::channel());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let pressed = runtime.context("a runtime for the load").map(|runtime| {
            let moulds = (0..volley.len()).map(|at| Mould::of(volley.get(at))).collect();
            let (began, first_round) = (Instant::now(), flood << 24);
            let seen = RefCell::default();
            let press = Rc::new(Press { to, moulds, next: RefCell::new(0), first_round, pressure, began, seen });
            LocalSet::new().block_on(&runtime, async {
                let tasks: Vec<_> =
                    (0..pressure.connections).map(|_| tokio::task::spawn_local(press.clone().connection())).collect();
                for task in tasks {
                    let _ = task.await;
                }
            });
            press.seen.borrow().clone()
        });
        let _ = tell.send(pressed);
    });
    told.await.context("the load ended without an answer")?
}

impl Press {
    fn over(&self) -> bool {
        self.began.elapsed() >= self.pressure.lasts
    }

    /// Keeps a connection open for as long as the flood lasts.
    async fn connection(self: Rc<Self>) {
        while !self.over() {
            let Ok(stream) = TcpStream::connect(self.to).await else {
                tokio::time::sleep(TICK).await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            let (reader, writer) = stream.into_split();
            // For who waits: a request may be sent, an answer has come.
            let (answered, mut may) = tokio::sync::mpsc::unbounded_channel();
            let reading = self.clone().read(reader, answered);
            let writing = async {
                match self.pressure.rate {
                    None => self.ask_and_wait(&writer, &mut may).await,
                    Some(rate) => self.write_what_is_due(&writer, rate).await,
                }
                tokio::time::sleep(AFTERMATH).await;
            };
            tokio::select! {
                () = reading => if !self.over() { self.seen.borrow_mut().hung_up += 1 },
                () = writing => {}
            }
        }
    }

    fn cast(&self, into: &mut Vec<u8>) {
        let mut next = self.next.borrow_mut();
        let all = self.moulds.len() as u64;
        let round = u32::try_from(*next / all).unwrap_or(0) + self.first_round;
        self.moulds[usize::try_from(*next % all).unwrap_or(0)].cast(round, into);
        *next += 1;
        self.seen.borrow_mut().sent += 1;
    }

    async fn ask_and_wait(
        &self,
        writer: &tokio::net::tcp::OwnedWriteHalf,
        may: &mut tokio::sync::mpsc::UnboundedReceiver<()>,
    ) {
        let mut bytes = Vec::new();
        while !self.over() {
            bytes.clear();
            self.cast(&mut bytes);
            self.seen.borrow_mut().offered += 1;
            if !write_all(writer, &bytes).await || may.recv().await.is_none() {
                return;
            }
        }
    }

    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    async fn write_what_is_due(&self, writer: &tokio::net::tcp::OwnedWriteHalf, rate: f64) {
        let (mut bytes, mut written) = (Vec::new(), 0);
        let mine = rate / self.pressure.connections as f64;
        let (since, mut offered) = (Instant::now(), 0_usize);
        while !self.over() {
            let due = (since.elapsed().as_secs_f64() * mine) as usize - offered;
            offered += due;
            self.seen.borrow_mut().offered += due;
            for _ in 0..due {
                if written == bytes.len() {
                    bytes.clear();
                    written = 0;
                    self.cast(&mut bytes);
                }
                match writer.try_write(&bytes[written..]) {
                    Ok(more) => written += more,
                    // The rest of what is due is held back; what has begun goes on when there is room.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(_) => return,
                }
            }
            tokio::time::sleep(TICK).await;
        }
        // Half a request would be nobody's.
        let _ = tokio::time::timeout(AFTERMATH, write_all(writer, &bytes[written..])).await;
    }

    async fn read(self: Rc<Self>, mut reader: OwnedReadHalf, answered: tokio::sync::mpsc::UnboundedSender<()>) {
        let mut buffer = Vec::with_capacity(16 << 10);
        while matches!(reader.read_buf(&mut buffer).await, Ok(read) if read > 0) {
            let mut at = 0;
            while let Some((status, body, whole)) =
                parse(&buffer[at..]).filter(|(_, _, whole)| buffer.len() >= at + whole)
            {
                self.count(status, &buffer[at..at + body], &buffer[at + body..at + whole]);
                at += whole;
                let _ = answered.send(());
            }
            buffer.drain(..at);
        }
    }

    fn count(&self, status: u16, head: &[u8], body: &[u8]) {
        let mut seen = self.seen.borrow_mut();
        match status {
            200 if says_stored(body) => seen.stored += 1,
            429 | 503 => {
                seen.refused += 1;
                let head = String::from_utf8_lossy(head).to_ascii_lowercase();
                if !head.contains("\r\nretry-after:") {
                    seen.without_retry_after += 1;
                    seen.odd.get_or_insert(head);
                }
            }
            _ => {
                seen.others += 1;
                seen.odd.get_or_insert_with(|| String::from_utf8_lossy(&[head, body].concat()).into_owned());
            }
        }
    }
}

async fn write_all(writer: &tokio::net::tcp::OwnedWriteHalf, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        if writer.writable().await.is_err() {
            return false;
        }
        match writer.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
    }
    true
}

/// What became of calls of `Ingest`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Called {
    /// Calls whose events were all stored.
    pub stored: usize,
    /// UNAVAILABLE.
    pub refused: usize,
    /// Of those: without `google.rpc.RetryInfo`.
    pub without_retry_info: usize,
}

/// Callers of `Ingest`, each with a connection of its own, who ask again at once when they are refused, until the time is over.
pub async fn ingest(
    to: SocketAddr,
    token: &str,
    beats: &Arc<Vec<Beat>>,
    flood: u32,
    callers: usize,
    lasts: Duration,
) -> anyhow::Result<Called> {
    let mut channels = Vec::with_capacity(callers);
    for _ in 0..callers {
        channels.push(channel(to).await?);
    }
    let next = Arc::new(AtomicUsize::new(0));
    let until = Instant::now() + lasts;
    let tasks: Vec<_> = channels
        .into_iter()
        .map(|channel| {
            let (beats, next, token) = (beats.clone(), next.clone(), token.to_owned());
            tokio::spawn(async move {
                let (mut client, mut called) = (Grpc::new(channel), Called::default());
                while Instant::now() < until {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let (round, which) = (at / (beats.len() / BATCH), at % (beats.len() / BATCH));
                    let round = (flood << 24) + u32::try_from(round)?;
                    let events = beats[which * BATCH..][..BATCH].iter().map(|beat| beat.in_round(round).to_proto());
                    let message = Bytes::from(IngestRequest::of(events.collect()).encode_to_vec());
                    while Instant::now() < until {
                        client.ready().await?;
                        let request = with_token(message.clone(), &token)?;
                        match client.unary(request, PathAndQuery::from_static(INGEST), Raw).await {
                            Ok(_) => {
                                called.stored += 1;
                                break;
                            }
                            Err(refused) if refused.code() == Code::Unavailable => {
                                called.refused += 1;
                                called.without_retry_info += usize::from(refused.get_details_retry_info().is_none());
                            }
                            Err(odd) => return Err(odd.into()),
                        }
                    }
                }
                anyhow::Ok(called)
            })
        })
        .collect();
    let mut all = Called::default();
    for task in tasks {
        let called = task.await?.context("Ingest")?;
        all.stored += called.stored;
        all.refused += called.refused;
        all.without_retry_info += called.without_retry_info;
    }
    Ok(all)
}

/// Streams that send as much as is taken, until the time is over; how many messages were acknowledged, and how many streams were ended by the server.
pub async fn stream(
    to: SocketAddr,
    token: &str,
    beats: &Arc<Vec<Beat>>,
    flood: u32,
    streams: usize,
    lasts: Duration,
) -> anyhow::Result<(usize, usize)> {
    let (acknowledged, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let until = Instant::now() + lasts;
    let tasks: Vec<_> = (0..streams)
        .map(|which| {
            let (beats, token, acknowledged, ended) =
                (beats.clone(), token.to_owned(), acknowledged.clone(), ended.clone());
            let next = Arc::new(AtomicUsize::new(0));
            tokio::spawn(async move {
                while Instant::now() < until {
                    let (beats, next) = (beats.clone(), next.clone());
                    let endless = std::iter::from_fn(move || {
                        if Instant::now() >= until {
                            return None;
                        }
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let round = (flood << 24)
                            + (1 << 23)
                            + (u32::try_from(which).ok()? << 20)
                            + u32::try_from(at / beats.len()).ok()?;
                        Some(message(&beats[at % beats.len()].in_round(round)))
                    });
                    let mut client = Grpc::new(channel(to).await?);
                    client.ready().await?;
                    let request = with_token(tokio_stream::iter(endless), &token)?;
                    let Ok(answer) = client.streaming(request, PathAndQuery::from_static(STREAM_INGEST), Raw).await
                    else {
                        ended.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(TICK).await;
                        continue;
                    };
                    let mut answers = answer.into_inner();
                    loop {
                        match answers.message().await {
                            Ok(Some(_)) => acknowledged.fetch_add(1, Ordering::Relaxed),
                            Ok(None) => break,
                            Err(_) => {
                                ended.fetch_add(1, Ordering::Relaxed);
                                tokio::time::sleep(TICK).await;
                                break;
                            }
                        };
                    }
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await?.context("StreamIngest")?;
    }
    Ok((acknowledged.load(Ordering::Relaxed), ended.load(Ordering::Relaxed)))
}
