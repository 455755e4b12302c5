//! QStash: the edge publishes, QStash owns the event, and delivers it to the worker.
//!
//! An event counts as queued only when QStash has named the message it made of it. Everything else (refused, silent, too slow, too
//! many at once) goes to the fallback, the pipeline itself, event by event. If QStash had taken it after all, the second copy
//! changes nothing. After a run of failures the edge stops asking for a while, so a dead QStash costs no visitor three seconds.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::breaker::Breaker;
use super::{Transport, Verdict, fall_back, identity};
use crate::bounded;
use crate::domain::event::Event;
use crate::domain::job::Job;
use crate::secret::Secret;
use crate::telemetry;

/// How often QStash tries again: its default, and the most that its free plan has. The worker makes them last, by `Retry-After`.
const RETRIES: &str = "3";
const CONNECT: Duration = Duration::from_secs(1);
const WHOLE: Duration = Duration::from_secs(3);
/// Requests to QStash at once.
const CONCURRENCY: usize = 64;
/// Longest wait for one of them to end.
const WAIT: Duration = Duration::from_millis(100);
/// Most bytes of an answer: a message takes some hundred.
const ANSWER_BYTES: usize = 256 << 10;
/// Most messages of one request ...
const BATCH: usize = 100;
/// ... and most bytes of them: QStash takes a MiB.
const BATCH_BYTES: usize = 900 << 10;

/// Where to publish and where QStash is to deliver.
#[derive(Debug, Clone)]
pub struct QstashConfig {
    /// QStash itself, without a slash at its end.
    pub url: String,
    pub token: Secret,
    /// The worker's public URL.
    pub destination: String,
}

/// Publishes to QStash, and hands to `fallback` what QStash does not take.
pub struct QstashTransport {
    http: reqwest::Client,
    config: QstashConfig,
    authorization: HeaderValue,
    fallback: Arc<dyn Transport>,
    room: Semaphore,
    breaker: Breaker,
}

/// The HTTP client, or the token, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QstashSetupError {
    #[error("QSTASH_TOKEN has characters that no token has")]
    Token,
    #[error("the HTTP client cannot be made")]
    Client(#[source] reqwest::Error),
}

/// Why a request to QStash did not count. A closed list: it is a metric's label.
#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error("the breaker is open")]
    Open,
    #[error("too many requests are under way")]
    Crowded,
    #[error("an event cannot be written as JSON")]
    Unwritable(#[source] serde_json::Error),
    #[error("no connection, or no answer in time")]
    Unreachable(#[source] reqwest::Error),
    #[error("status {0}")]
    Refused(reqwest::StatusCode),
    #[error("the answer names no message")]
    Unreadable,
}

impl PublishError {
    const fn code(&self) -> &'static str {
        match self {
            Self::Open => "breaker_open",
            Self::Crowded => "crowded",
            Self::Unwritable(_) => "unwritable",
            Self::Unreachable(_) => "unreachable",
            Self::Refused(_) => "refused",
            Self::Unreadable => "unreadable",
        }
    }

    /// Whether it says something about QStash.
    const fn is_qstashs(&self) -> bool {
        match self {
            Self::Open | Self::Crowded | Self::Unwritable(_) => false,
            Self::Unreachable(_) | Self::Refused(_) | Self::Unreadable => true,
        }
    }
}

#[derive(Deserialize)]
struct Published {
    #[serde(rename = "messageId", default)]
    message_id: Option<String>,
}

impl Published {
    fn is_accepted(answer: &Value) -> bool {
        Self::deserialize(answer).is_ok_and(|published| published.message_id.is_some_and(|id| !id.is_empty()))
    }
}

impl QstashTransport {
    pub fn new(config: QstashConfig, fallback: Arc<dyn Transport>) -> Result<Self, QstashSetupError> {
        let mut authorization =
            HeaderValue::from_str(&format!("Bearer {}", config.token.reveal())).map_err(|_| QstashSetupError::Token)?;
        authorization.set_sensitive(true);
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .timeout(WHOLE)
            // A redirect would carry the token, and visitors' events, somewhere else.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(QstashSetupError::Client)?;
        let (room, breaker) = (Semaphore::new(CONCURRENCY), Breaker::default());
        Ok(Self { http, config, authorization, fallback, room, breaker })
    }

    /// Publishes one group; whether QStash has each, in order.
    async fn publish(&self, group: &[Prepared]) -> Vec<bool> {
        let result = match self.breaker.is_open() {
            true => Err(PublishError::Open),
            false => self.request(group).await,
        };
        let accepted = match result {
            Ok(accepted) => {
                self.breaker.succeeded();
                accepted
            }
            Err(error) => {
                metrics::counter!(telemetry::QSTASH_FELL_BACK_TOTAL, "reason" => error.code())
                    .increment(group.len() as u64);
                if error.is_qstashs() {
                    let opened = self.breaker.failed();
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, events = group.len(), breaker.opened = opened, "QStash did not take events; they are stored directly");
                }
                return vec![false; group.len()];
            }
        };
        let taken = accepted.iter().filter(|accepted| **accepted).count();
        metrics::counter!(telemetry::QSTASH_PUBLISHED_TOTAL).increment(taken as u64);
        if taken < group.len() {
            metrics::counter!(telemetry::QSTASH_FELL_BACK_TOTAL, "reason" => "not_in_batch")
                .increment((group.len() - taken) as u64);
        }
        accepted
    }

    async fn request(&self, group: &[Prepared]) -> Result<Vec<bool>, PublishError> {
        let _permit = match tokio::time::timeout(WAIT, self.room.acquire()).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(PublishError::Crowded),
        };
        let request = match group {
            [single] => {
                let url = format!("{}/v2/publish/{}", self.config.url, self.config.destination);
                let post = self.http.post(url).body(single.body.clone());
                single.headers().into_iter().fold(post, |post, (name, value)| post.header(name, value))
            }
            many => {
                let messages: Vec<Value> = many.iter().map(|one| one.message(&self.config.destination)).collect();
                let body = serde_json::to_string(&messages).map_err(PublishError::Unwritable)?;
                let post = self.http.post(format!("{}/v2/batch", self.config.url));
                post.header(CONTENT_TYPE, "application/json").body(body)
            }
        };
        let unreachable = |error: reqwest::Error| PublishError::Unreachable(error.without_url());
        let response = request.header(AUTHORIZATION, self.authorization.clone()).send().await.map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(PublishError::Refused(response.status()));
        }
        let body = bounded::body(response, ANSWER_BYTES).await.map_err(unreachable)?.ok_or(PublishError::Unreadable)?;
        let answer: Value = serde_json::from_slice(&body).map_err(|_| PublishError::Unreadable)?;
        let accepted: Vec<bool> = match &answer {
            Value::Array(answers) if group.len() > 1 => {
                (0..group.len()).map(|at| answers.get(at).is_some_and(Published::is_accepted)).collect()
            }
            single if group.len() == 1 => vec![Published::is_accepted(single)],
            _ => return Err(PublishError::Unreadable),
        };
        // Nothing taken at all is no success, whatever the status says.
        if accepted.contains(&true) { Ok(accepted) } else { Err(PublishError::Unreadable) }
    }
}

/// An event as it is published.
struct Prepared {
    /// Its position among the events that were handed over.
    at: usize,
    deduplication_id: String,
    body: String,
}

impl Prepared {
    fn of(at: usize, event: &Event) -> Result<Self, PublishError> {
        // One event is one message for QStash too, however often a browser repeats it. No colon may be in it.
        let name = Uuid::new_v5(&event.site_id.as_uuid(), identity(event).as_bytes());
        let body = Job::of(event).to_json().map_err(PublishError::Unwritable)?;
        Ok(Self { at, deduplication_id: name.simple().to_string(), body })
    }

    fn headers(&self) -> [(&'static str, &str); 4] {
        [
            ("Content-Type", "application/json"),
            ("Upstash-Method", "POST"),
            ("Upstash-Retries", RETRIES),
            ("Upstash-Deduplication-Id", &self.deduplication_id),
        ]
    }

    /// As one message of `/v2/batch`.
    fn message(&self, destination: &str) -> Value {
        let headers: Map<String, Value> =
            self.headers().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
        json!({"destination": destination, "headers": headers, "body": self.body})
    }
}

/// Cuts into groups that fit one request each.
fn groups(prepared: Vec<Prepared>) -> Vec<Vec<Prepared>> {
    let mut groups: Vec<Vec<Prepared>> = Vec::new();
    let mut bytes = 0;
    for one in prepared {
        // A body inside a body is escaped once more; some two hundred bytes go with it.
        let size = one.body.len() + one.body.len() / 4 + 256;
        match groups.last_mut() {
            Some(group) if group.len() < BATCH && bytes + size <= BATCH_BYTES => {
                bytes += size;
                group.push(one);
            }
            _ => {
                bytes = size;
                groups.push(vec![one]);
            }
        }
    }
    groups
}

#[async_trait]
impl Transport for QstashTransport {
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict> {
        let prepared = events.iter().enumerate().filter_map(|(at, event)| match Prepared::of(at, event) {
            Ok(prepared) => Some(prepared),
            Err(error) => {
                metrics::counter!(telemetry::QSTASH_FELL_BACK_TOTAL, "reason" => error.code()).increment(1);
                None
            }
        });
        let groups = groups(prepared.collect());
        let accepted = join_all(groups.iter().map(|group| self.publish(group))).await;
        let mut queued = vec![false; events.len()];
        for (one, accepted) in groups.iter().flatten().zip(accepted.into_iter().flatten()) {
            queued[one.at] = accepted;
        }
        drop(groups);
        fall_back(events, &queued, &*self.fallback).await
    }
}

#[cfg(test)]
mod tests;
