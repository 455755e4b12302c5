//! The edge's side: publishes, and answers once the stream has the event in its files.
//!
//! An event counts as queued only when the stream that we named has acknowledged it, as new or as one that it had already. Everything
//! else (away, slow, full, too large) goes to the fallback, the edge's own pipeline, event by event; if the stream had taken it after all, the second copy
//! changes nothing. A full stream means that the workers do not keep up: the edge then stores at the pace of the database, and its bounded room answers 503
//! when that is too slow, too. Refusing at once would turn away events that can be stored.

use std::sync::Arc;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, context::PublishError};
use async_trait::async_trait;
use futures::future::join_all;
use tokio::time::timeout;

use super::{ANSWER, Nats, Status};
use crate::domain::event::Event;
use crate::domain::job::Job;
use crate::queue::breaker::Breaker;
use crate::queue::{Transport, Verdict, fall_back, identity};
use crate::telemetry;

/// Bytes that go with a message beside its payload: two headers and what frames them.
const HEADERS: usize = 512;

/// Publishes to the stream, and hands to `fallback` what the stream does not take.
pub struct NatsTransport {
    nats: Nats,
    fallback: Arc<dyn Transport>,
    breaker: Breaker,
}

/// Why an event was not published. A closed list: it is a metric's label.
#[derive(Debug, thiserror::Error)]
enum Unpublished {
    #[error("NATS is away")]
    Away,
    #[error("the stream would lose events")]
    Unfit,
    #[error("the stream is full")]
    Full,
    #[error("the breaker is open")]
    Open,
    #[error("an event cannot be written as JSON")]
    Unwritable(#[source] serde_json::Error),
    #[error("the event is larger than NATS takes")]
    TooLarge,
    #[error("no answer in time")]
    Slow,
    #[error("the stream refused it")]
    Refused(#[source] PublishError),
}

impl Unpublished {
    const fn code(&self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Unfit => "unfit",
            Self::Full => "full",
            Self::Open => "breaker_open",
            Self::Unwritable(_) => "unwritable",
            Self::TooLarge => "too_large",
            Self::Slow => "slow",
            Self::Refused(_) => "refused",
        }
    }

    /// Whether it says something about NATS that nobody knew before.
    const fn is_news(&self) -> bool {
        match self {
            Self::Away | Self::Unfit | Self::Full | Self::Open | Self::Unwritable(_) | Self::TooLarge => false,
            Self::Slow | Self::Refused(_) => true,
        }
    }

    fn of(error: PublishError) -> Self {
        let code = std::error::Error::source(&error)
            .and_then(|source| source.downcast_ref::<jetstream::Error>())
            .map(jetstream::Error::error_code);
        match (error.kind(), code) {
            (PublishErrorKind::MaxPayloadExceeded, _) => Self::TooLarge,
            (PublishErrorKind::TimedOut, _) => Self::Slow,
            // How a stream with `discard: new` says that one of its bounds is reached.
            (_, Some(ErrorCode::STREAM_STORE_FAILED | ErrorCode::STORAGE_RESOURCES_EXCEEDED)) => Self::Full,
            _ => Self::Refused(error),
        }
    }
}

impl NatsTransport {
    pub fn new(nats: Nats, fallback: Arc<dyn Transport>) -> Self {
        Self { nats, fallback, breaker: Breaker::default() }
    }

    /// Whether the stream has the event.
    async fn publish(&self, event: &Event) -> bool {
        match self.try_to_publish(event).await {
            Ok(()) => {
                self.breaker.succeeded();
                metrics::counter!(telemetry::NATS_PUBLISHED_TOTAL).increment(1);
                true
            }
            Err(error) => {
                metrics::counter!(telemetry::NATS_FELL_BACK_TOTAL, "reason" => error.code()).increment(1);
                if error.is_news() {
                    let opened = self.breaker.failed();
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::warn!(%error, cause, breaker.opened = opened, "NATS did not take an event; it is stored directly");
                }
                false
            }
        }
    }

    async fn try_to_publish(&self, event: &Event) -> Result<(), Unpublished> {
        match &*self.nats.status.borrow() {
            Status::Ready => {}
            Status::Full => return Err(Unpublished::Full),
            Status::Away(_) => return Err(Unpublished::Away),
            Status::Unfit(_) => return Err(Unpublished::Unfit),
        }
        let Some(connection) = self.nats.connection() else { return Err(Unpublished::Away) };
        if self.breaker.is_open() {
            return Err(Unpublished::Open);
        }
        let payload = Job::of(event).to_json().map_err(Unpublished::Unwritable)?;
        if payload.len() + HEADERS > connection.client.max_payload() {
            return Err(Unpublished::TooLarge);
        }
        // NATS compares these within the whole stream: by the event's id alone, one of two sites' events would be taken for a copy and dropped.
        let message = PublishMessage::build()
            .payload(payload.into())
            .message_id(identity(event))
            .expected_stream(&self.nats.config.stream);
        let acknowledged = async {
            let sent = connection.jetstream.send_publish(self.nats.subject(event.site_id), message).await?;
            sent.await
        };
        match timeout(ANSWER, acknowledged).await {
            // One that the stream had already is as safe as a new one.
            Ok(Ok(_)) => Ok(()),
            // The answer went with the connection, which says nothing about the one that there may be by now.
            _ if !connection.lasts() => Err(Unpublished::Away),
            Ok(Err(error)) => Err(Unpublished::of(error)),
            Err(_) => Err(Unpublished::Slow),
        }
    }
}

#[async_trait]
impl Transport for NatsTransport {
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict> {
        let queued = join_all(events.iter().map(|event| self.publish(event))).await;
        fall_back(events, &queued, &*self.fallback).await
    }
}
