//! Load over HTTP/1.1 that costs little itself: requests built before the clock starts, keep-alive connections on one thread, answers read no
//! further than their status, length and the word that says what became of the event.
//!
//! The machine's processors are shared by load, server and database, so what the load spends is taken from what is measured.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::sent::{COME_BACK, Sent};

/// Requests, one after the other.
#[derive(Default)]
pub struct Volley {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Volley {
    /// Adds a POST with these headers, `\r\n` after each.
    pub fn post(&mut self, path: &str, headers: &str, body: &str) {
        let length = body.len();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: collect.example\r\n{headers}Content-Length: {length}\r\n\r\n");
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(body.as_bytes());
        self.ends.push(self.bytes.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, at: usize) -> &[u8] {
        let begin = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[begin..self.ends[at]]
    }
}

/// What the answers said.
#[derive(Debug, Default, Clone)]
pub struct Answers {
    /// 200, and the event is stored.
    pub stored: usize,
    /// Times that the server said 503, and was sent the same again, as a tracker does. On a quiet machine it never does.
    pub again: usize,
    /// All others, by status.
    pub others: Vec<(u16, usize)>,
    /// The first answer that was not expected.
    pub odd: Option<String>,
    /// From when a request was to be sent to the end of its answer, microseconds. Sorted.
    pub latencies: Vec<u32>,
    pub seconds: f64,
}

impl Answers {
    fn add(&mut self, status: u16, stored: bool, answer: &[u8]) {
        if stored {
            self.stored += 1;
            return;
        }
        if self.odd.is_none() {
            self.odd = Some(String::from_utf8_lossy(answer).into_owned());
        }
        match self.others.iter_mut().find(|(found, _)| *found == status) {
            Some((_, count)) => *count += 1,
            None => self.others.push((status, 1)),
        }
    }

    /// Milliseconds that a part of the answers took no longer than.
    pub fn percentile(&self, part: f64) -> f64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let at = ((self.latencies.len() as f64 * part).ceil() as usize).clamp(1, self.latencies.len().max(1)) - 1;
        self.latencies.get(at).map_or(f64::NAN, |micros| f64::from(*micros) / 1000.0)
    }

    /// Events a second.
    #[allow(clippy::cast_precision_loss)]
    pub fn rate(&self) -> f64 {
        self.stored as f64 / self.seconds
    }

    /// What sending took.
    pub fn sent(&self) -> Sent {
        Sent { seconds: self.seconds, again: self.again }
    }

    /// Every request was answered, and stored.
    pub fn all_stored(self, sent: usize) -> anyhow::Result<Self> {
        ensure!(
            self.stored == sent,
            "of {sent} events {} were stored; others by status: {:?}; the first of them: {}",
            self.stored,
            self.others,
            self.odd.as_deref().unwrap_or("none")
        );
        Ok(self)
    }
}

/// When requests are sent.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// Each connection sends as soon as it has its answer.
    Closed,
    /// So many a second, whether or not answers come; one that finds no connection free is late, and its latency counts from when it was due.
    Open(f64),
}

/// All connections together come back so often, and then take 503 for an answer.
const COME_BACK_TIMES: usize = 1000;

/// Sends all of it over so many connections.
pub async fn fire(
    to: SocketAddr,
    volley: &std::sync::Arc<Volley>,
    connections: usize,
    pace: Pace,
) -> anyhow::Result<Answers> {
    let volley = volley.clone();
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread of its own: no work is handed from one thread to another on the way.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let fired = runtime
            .context("a runtime for the load")
            .and_then(|runtime| LocalSet::new().block_on(&runtime, fire_here(to, volley, connections, pace)));
        let _ = tell.send(fired);
    });
    told.await.context("the load ended without an answer")?
}

async fn fire_here(
    to: SocketAddr,
    volley: std::sync::Arc<Volley>,
    connections: usize,
    pace: Pace,
) -> anyhow::Result<Answers> {
    let mut streams = Vec::with_capacity(connections);
    for _ in 0..connections {
        let stream = TcpStream::connect(to).await.context("the server listens")?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    let next = Rc::new(Cell::new(0_usize));
    let answers = Rc::new(RefCell::new(Answers { latencies: Vec::with_capacity(volley.len()), ..Answers::default() }));
    let began = Instant::now();
    let tasks: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            let (volley, next, answers) = (volley.clone(), next.clone(), answers.clone());
            tokio::task::spawn_local(async move {
                let mut buffer = Vec::with_capacity(4096);
                loop {
                    let at = next.get();
                    if at == volley.len() {
                        return anyhow::Ok(());
                    }
                    next.set(at + 1);
                    let due = match pace {
                        Pace::Closed => Instant::now(),
                        #[allow(clippy::cast_precision_loss)]
                        Pace::Open(rate) => {
                            let due = began + Duration::from_secs_f64(at as f64 / rate);
                            tokio::time::sleep_until(due.into()).await;
                            due
                        }
                    };
                    stream.write_all(volley.get(at)).await?;
                    let mut answer = read_answer(&mut stream, &mut buffer).await?;
                    while answer.status == 503 && answers.borrow().again < COME_BACK_TIMES {
                        answers.borrow_mut().again += 1;
                        tokio::time::sleep(COME_BACK).await;
                        stream.write_all(volley.get(at)).await?;
                        answer = read_answer(&mut stream, &mut buffer).await?;
                        // It may have been stored all the same.
                        answer.stored |= answer.status == 200;
                    }
                    let mut answers = answers.borrow_mut();
                    answers.add(answer.status, answer.stored, &buffer);
                    answers.latencies.push(u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let mut answers = Rc::try_unwrap(answers).map(RefCell::into_inner).unwrap_or_default();
    answers.seconds = began.elapsed().as_secs_f64();
    answers.latencies.sort_unstable();
    Ok(answers)
}

struct Answer {
    status: u16,
    stored: bool,
}

/// Reads one answer into the buffer.
async fn read_answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> anyhow::Result<Answer> {
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            bail!("the server hung up in the middle of an answer: {}", String::from_utf8_lossy(buffer));
        }
        if let Some((status, body, whole)) = parse(buffer)
            && buffer.len() >= whole
        {
            return Ok(Answer { status, stored: status == 200 && says_stored(&buffer[body..whole]) });
        }
    }
}

/// Status, where the body begins, and where it ends; none if the head is not whole yet.
pub fn parse(bytes: &[u8]) -> Option<(u16, usize, usize)> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let text = std::str::from_utf8(&bytes[..head]).ok()?;
    let status = text.get(9..12)?.parse().ok()?;
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    Some((status, head + 4, head + 4 + length.unwrap_or(0)))
}

/// Whether the body of an answer says that its event is stored.
pub fn says_stored(body: &[u8]) -> bool {
    const WORD: &[u8] = br#""status":"stored""#;
    body.windows(WORD.len()).any(|window| window == WORD)
}
