//! A stand-in for QStash: the documented contract, a memory, and deliveries when a test orders them.
//!
//! `POST /v2/publish/{destination}` and `POST /v2/batch` behind a bearer token, one message a deduplication id, at most three retries (its
//! smallest plan). What it takes it keeps, and delivers signed, at least once, in any order. It does not wait between two attempts; it adds up
//! how long it would have.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use chrono::Utc;
use futures::StreamExt;
use http::{HeaderMap, Method, StatusCode};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

pub const TOKEN: &str = "t0ken-that-nobody-may-see";
pub const CURRENT_KEY: &str = "sig_current-of-the-tests";
pub const NEXT_KEY: &str = "sig_next-of-the-tests";

/// Most retries of the free plan.
const MOST_RETRIES: u32 = 3;
/// QStash waits no longer than a day.
const LONGEST_WAIT: u64 = 86_400;

/// How it takes the next publications.
#[derive(Debug, Clone)]
pub enum Mood {
    Accept,
    /// Takes nothing and answers this.
    Answer(u16, String),
    /// Takes nothing and never answers.
    Hang,
    /// Takes everything, and its answer is lost.
    AcceptAndHang,
    /// Takes a batch but for the message at this position.
    AllBut(usize),
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub body: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Waiting,
    Delivered,
    /// Stopped by a 489.
    Stopped,
    /// Out of retries: in QStash's own dead letter queue, which nobody reads.
    Exhausted,
}

#[derive(Debug, Clone)]
pub struct Message {
    pub id: String,
    pub destination: String,
    pub body: String,
    pub content_type: Option<String>,
    pub retries: u32,
    pub attempts: u32,
    /// Seconds that QStash would have waited since the first attempt.
    pub waited: u64,
    pub fate: Fate,
}

/// What the destination said to one attempt.
#[derive(Debug)]
pub struct Attempt {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

#[derive(Debug)]
struct Desk {
    mood: Mood,
    key: &'static str,
    seen: Vec<Seen>,
    messages: Vec<Message>,
    by_deduplication_id: HashMap<String, usize>,
}

#[derive(Clone)]
pub struct Qstash {
    pub url: String,
    desk: Arc<Mutex<Desk>>,
    client: reqwest::Client,
    _stop: Arc<DropGuard>,
}

impl Qstash {
    pub async fn start() -> Self {
        let (mood, key) = (Mood::Accept, CURRENT_KEY);
        let desk = Desk { mood, key, seen: Vec::new(), messages: Vec::new(), by_deduplication_id: HashMap::new() };
        let desk = Arc::new(Mutex::new(desk));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket"));
        let router = Router::new().fallback(answer).with_state(desk.clone());
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move { axum::serve(listener, router).await }));
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build();
        Self { url, desk, client: client.expect("a client"), _stop: Arc::new(stop.drop_guard()) }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        lock(&self.desk)
    }

    pub fn mood(&self, mood: Mood) {
        self.desk().mood = mood;
    }

    /// Signs with this key from now on.
    pub fn sign_with(&self, key: &'static str) {
        self.desk().key = key;
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.desk().seen.clone()
    }

    pub fn messages(&self) -> Vec<Message> {
        self.desk().messages.clone()
    }

    /// Puts a message into the queue that another producer might have published; its position.
    pub fn keep(&self, destination: &str, body: &str) -> usize {
        self.desk().keep(destination, &HeaderMap::new(), body).0
    }

    /// Changes a waiting message, as if it had been published like this.
    pub fn rewrite(&self, at: usize, change: impl FnOnce(&mut Value)) {
        let mut desk = self.desk();
        let mut job = serde_json::from_str(&desk.messages[at].body).expect("the message is JSON");
        change(&mut job);
        desk.messages[at].body = job.to_string();
    }

    /// One attempt to deliver a message, whatever became of it before.
    pub async fn attempt(&self, at: usize) -> Attempt {
        let (message, key) = {
            let desk = self.desk();
            (desk.messages[at].clone(), desk.key)
        };
        let mut request = self.client.post(&message.destination).body(message.body.clone());
        if let Some(content_type) = &message.content_type {
            request = request.header("Content-Type", content_type);
        }
        let request = request
            .header("User-Agent", "Upstash-QStash")
            .header("Upstash-Message-Id", &message.id)
            .header("Upstash-Retried", message.attempts.min(message.retries).to_string())
            .header("Upstash-Signature", sign(key, &claims(&message.destination, &message.body)));
        let response = request.send().await.expect("the destination answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.expect("a whole answer");
        self.desk().messages[at].answered(status, &headers);
        Attempt { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::Null) }
    }

    /// Delivers every message this often, in an order that only the seed knows, several at once.
    pub async fn deliver_all(&self, times: usize, seed: u64) -> Vec<Attempt> {
        let messages = self.desk().messages.len();
        let mut order: Vec<usize> = (0..messages * times).map(|n| n % messages).collect();
        order.shuffle(&mut rand::rngs::StdRng::seed_from_u64(seed));
        futures::stream::iter(order).map(|at| self.attempt(at)).buffer_unordered(8).collect().await
    }

    /// Attempts until no message waits any more, without waiting in between.
    pub async fn run_dry(&self) -> Vec<Attempt> {
        let mut attempts = Vec::new();
        loop {
            let waiting = self.messages().iter().position(|message| message.fate == Fate::Waiting);
            let Some(at) = waiting else { return attempts };
            attempts.push(self.attempt(at).await);
        }
    }
}

impl Message {
    /// What QStash makes of an answer: any 2xx is a delivery, a 489 with its header an end, everything else another attempt.
    fn answered(&mut self, status: u16, headers: &HeaderMap) {
        self.attempts += 1;
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if (200..300).contains(&status) {
            self.fate = Fate::Delivered;
        } else if self.fate != Fate::Waiting {
            // A repeated delivery of something that is over.
        } else if status == 489 && header("upstash-nonretryable-error") == Some("true") {
            self.fate = Fate::Stopped;
        } else if self.attempts > self.retries {
            self.fate = Fate::Exhausted;
        } else {
            let back_off = (2.5 * f64::from(self.attempts)).exp() as u64;
            let asked = header("retry-after").and_then(|seconds| seconds.parse().ok());
            self.waited += asked.filter(|seconds| *seconds <= LONGEST_WAIT).unwrap_or(back_off.min(LONGEST_WAIT));
        }
    }
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The claims of a delivery's signature.
pub fn claims(destination: &str, body: &str) -> Value {
    let now = Utc::now().timestamp();
    json!({"iss": "Upstash", "sub": destination, "exp": now + 300, "nbf": now, "iat": now,
        "jti": format!("jwt_{}", uuid::Uuid::new_v4().simple()), "body": URL_SAFE.encode(Sha256::digest(body))})
}

pub fn sign(key: &str, claims: &Value) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).expect("claims can be signed")
}

type Refusal = (u16, &'static str);

impl Desk {
    /// Keeps a message, or finds the one with the same deduplication id; whether it is that one.
    fn keep(&mut self, destination: &str, headers: &HeaderMap, body: &str) -> (usize, bool) {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let at = self.messages.len();
        if let Some(name) = text("upstash-deduplication-id") {
            let known = *self.by_deduplication_id.entry(name).or_insert(at);
            if known != at {
                return (known, true);
            }
        }
        self.messages.push(Message {
            id: format!("msg_{}", uuid::Uuid::new_v4().simple()),
            destination: destination.to_owned(),
            body: body.to_owned(),
            content_type: text("content-type"),
            retries: text("upstash-retries").and_then(|n| n.parse().ok()).unwrap_or(MOST_RETRIES),
            attempts: 0,
            waited: 0,
            fate: Fate::Waiting,
        });
        (at, false)
    }

    fn publish(&mut self, destination: &str, headers: &HeaderMap, body: &str) -> Result<(Value, bool), Refusal> {
        if !destination.starts_with("http://") && !destination.starts_with("https://") {
            return Err((400, "the destination has no scheme"));
        }
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        if text("upstash-method").is_some_and(|method| method != "POST") {
            return Err((400, "the worker takes POST only"));
        }
        if text("upstash-retries").is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > MOST_RETRIES)) {
            return Err((400, "more retries than the plan has"));
        }
        if text("upstash-deduplication-id").is_some_and(|name| name.is_empty() || name.contains(':')) {
            return Err((400, "a deduplication id has no colon"));
        }
        if body.len() > 1 << 20 {
            return Err((413, "more than a MiB"));
        }
        let (at, deduplicated) = self.keep(destination, headers, body);
        let mut answer = json!({"messageId": self.messages[at].id, "url": destination});
        if deduplicated {
            answer["deduplicated"] = true.into();
        }
        Ok((answer, deduplicated))
    }

    fn batch(&mut self, body: &str, but: Option<usize>) -> Result<Value, Refusal> {
        let Ok(Value::Array(items)) = serde_json::from_str(body) else { return Err((400, "a batch is an array")) };
        let mut answers = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let mut headers = HeaderMap::new();
            for (name, value) in item["headers"].as_object().into_iter().flatten() {
                let name = name.parse::<http::HeaderName>().map_err(|_| (400, "a header's name"))?;
                let value = value.as_str().and_then(|value| value.parse().ok()).ok_or((400, "a header's value"))?;
                headers.insert(name, value);
            }
            let text = |key: &str| item[key].as_str().ok_or((400, "`destination` and `body` are texts"));
            let published = match but == Some(at) {
                true => Err((400, "not this one")),
                false => self.publish(text("destination")?, &headers, text("body")?),
            };
            answers.push(match published {
                Ok((answer, _)) => answer,
                Err((_, why)) => json!({"error": why}),
            });
        }
        Ok(answers.into())
    }

    fn take(&mut self, seen: &Seen, but: Option<usize>) -> Result<(u16, Value), Refusal> {
        if seen.headers.get("authorization").is_none_or(|value| value != &format!("Bearer {TOKEN}")) {
            return Err((401, "unauthorized"));
        }
        if seen.method != Method::POST {
            return Err((405, "POST"));
        }
        if seen.path == "/v2/batch" {
            return Ok((200, self.batch(&seen.body, but)?));
        }
        let destination = seen.path.strip_prefix("/v2/publish/").ok_or((404, "nothing is here"))?;
        let (answer, deduplicated) = self.publish(destination, &seen.headers, &seen.body)?;
        Ok((if deduplicated { 202 } else { 201 }, answer))
    }
}

async fn answer(State(desk): State<Arc<Mutex<Desk>>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, 8 << 20).await.unwrap_or_default();
    let body = String::from_utf8_lossy(&bytes).into_owned();
    let path = parts.uri.path().to_owned();
    let seen = Seen { method: parts.method, path, headers: parts.headers, body };
    let (mood, taken) = {
        let mut desk = lock(&desk);
        desk.seen.push(seen.clone());
        let mood = desk.mood.clone();
        let taken = match mood {
            Mood::Accept | Mood::AcceptAndHang => desk.take(&seen, None),
            Mood::AllBut(at) => desk.take(&seen, Some(at)),
            Mood::Answer(..) | Mood::Hang => Err((500, "not taken")),
        };
        (mood, taken)
    };
    let (status, text) = match (mood, taken) {
        (Mood::Hang | Mood::AcceptAndHang, _) => std::future::pending().await,
        (Mood::Answer(status, text), _) => (status, text),
        (Mood::Accept | Mood::AllBut(_), Ok((status, answer))) => (status, answer.to_string()),
        (Mood::Accept | Mood::AllBut(_), Err((status, why))) => (status, json!({"error": why}).to_string()),
    };
    (StatusCode::from_u16(status).expect("a test's own status"), text).into_response()
}
