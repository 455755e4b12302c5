//! NATS JetStream: edges publish, the stream owns the event, and workers fetch it.
//!
//! ```text
//! /api/sync ─▶ edge ─▶ stream (file, work queue, refuses when full) ─▶ durable consumer ─▶ worker ─▶ pipeline ─▶ ack after commit
//!                └─ not taken: the edge's own pipeline
//! ```
//!
//! One [`Nats`] a server. It looks at the stream every second, makes what is missing, and publishes nothing and fetches nothing while the
//! stream would lose events. A NATS that is away is looked for until it is back; nobody waits for it.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::stream::ConsumerError;
use async_nats::{Client, ConnectOptions, Event as Happening};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry;
use sight::{Sight, Watch};

pub use edge::NatsTransport;
pub use servers::Servers;
pub use worker::Worker;

mod edge;
mod servers;
mod sight;
mod stream;
mod worker;

/// How often the stream is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a server that starts waits for its first look. NATS may be away, the server starts all the same.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// Longest wait for an answer of NATS.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest pause between two tries to connect.
const RECONNECT: Duration = Duration::from_millis(500);
/// A NATS that is silent for a few of these is away, even if its machine cannot say so any more.
const PING: Duration = Duration::from_secs(2);

/// Where NATS is, and how its stream is made.
#[derive(Debug, Clone)]
pub struct NatsConfig {
    pub servers: Servers,
    /// A credentials file, as `nsc` and Synadia write them.
    pub credentials: Option<PathBuf>,
    /// The stream's name; its subjects begin with it.
    pub stream: String,
    /// Copies of the stream, on as many NATS servers.
    pub replicas: usize,
    /// Bytes that wait at most; beyond, events are not taken.
    pub max_bytes: i64,
}

/// What stands between this server and the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Events can be published and fetched.
    Ready,
    /// So much waits that edges no longer add to it. Workers go on.
    Full,
    /// NATS is away, or cannot do it now.
    Away(String),
    /// The stream would lose events; somebody has to change it.
    Unfit(String),
}

/// The connection cannot be set up as it is configured, or the stream would lose events.
#[derive(Debug, thiserror::Error)]
pub enum NatsSetupError {
    #[error("NATS_CREDENTIALS: the file cannot be used")]
    Credentials(#[source] std::io::Error),
    #[error("NATS_URL cannot be used")]
    Url,
    #[error("{0}")]
    Unfit(String),
}

/// The connection to NATS and what is known of the stream; clones share it.
#[derive(Clone)]
pub struct Nats {
    client: Client,
    jetstream: Context,
    config: Arc<NatsConfig>,
    status: Arc<watch::Sender<Status>>,
    last_error: Arc<Mutex<Option<String>>>,
}

impl Nats {
    /// Connects in the background, and looks at the stream once if NATS answers soon. A stream that would lose events is an error, a
    /// NATS that is away is none. The task that keeps looking ends with `stop`.
    pub async fn start(config: NatsConfig, stop: CancellationToken) -> Result<Self, NatsSetupError> {
        let last_error = Arc::<Mutex<Option<String>>>::default();
        let client = connect(&config, last_error.clone()).await?;
        let jetstream = ContextBuilder::new().timeout(ANSWER).build(client.clone());
        let status = Arc::new(watch::Sender::new(Status::Away("not connected yet".to_owned())));
        let nats = Self { client, jetstream, config: Arc::new(config), status, last_error };
        let looked = timeout(FIRST_LOOK, async {
            while !nats.is_connected() {
                sleep(Duration::from_millis(10)).await;
            }
            nats.look().await
        });
        let (first, _) = looked.await.unwrap_or_else(|_| (nats.not_connected(), None));
        if let Status::Unfit(why) = first {
            return Err(NatsSetupError::Unfit(why));
        }
        nats.now(first);
        tokio::spawn(nats.clone().keep_looking(stop));
        Ok(nats)
    }

    /// What stands in the way now, for people; nothing if events flow. A full stream stands in the way of edges only. No secret in it.
    pub fn obstacle(&self, of_worker: bool) -> Option<String> {
        match &*self.status.borrow() {
            Status::Ready => None,
            Status::Full if of_worker => None,
            Status::Full => Some(format!("the stream `{}` is nearly full: workers do not keep up", self.config.stream)),
            Status::Away(why) => Some(format!("NATS is away: {why}")),
            Status::Unfit(why) => Some(why.clone()),
        }
    }

    /// Sends what is still on its way to NATS, acknowledgements above all.
    pub async fn flush(&self) {
        if timeout(ANSWER, self.client.flush()).await.is_err() {
            tracing::warn!(
                "NATS does not answer; what was stored last may be delivered once more, which changes nothing"
            );
        }
    }

    /// The subject of a site's events: one a site, so that an operator can look at one customer's backlog.
    fn subject(&self, site: impl std::fmt::Display) -> String {
        format!("{}.{site}", stream::prefix(&self.config.stream))
    }

    /// The consumer that all workers share.
    async fn consumer(&self) -> Result<Consumer<pull::Config>, ConsumerError> {
        self.jetstream.get_consumer_from_stream(stream::CONSUMER, &self.config.stream).await
    }

    fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Which connection to NATS there is, of those that there have been.
    fn connection(&self) -> Option<u64> {
        self.is_connected().then(|| self.client.statistics().connects.load(Ordering::Relaxed))
    }

    fn not_connected(&self) -> Status {
        let why = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status::Away(why.unwrap_or_else(|| "no connection".to_owned()))
    }

    /// The status, and what was seen if NATS answers.
    async fn look(&self) -> (Status, Option<Sight>) {
        if !self.is_connected() {
            return (self.not_connected(), None);
        }
        match stream::look(&self.jetstream, &self.config).await {
            Ok(load) => {
                metrics::gauge!(telemetry::NATS_STREAM_BYTES).set(load.bytes as f64);
                metrics::gauge!(telemetry::NATS_LAG_EVENTS).set(load.sight.waiting as f64);
                metrics::gauge!(telemetry::NATS_UNACKNOWLEDGED_EVENTS).set(load.sight.under_way as f64);
                if load.copies < 2 {
                    self.warn_of_one_copy();
                }
                let full = load.is_full(*self.status.borrow() == Status::Full);
                (if full { Status::Full } else { Status::Ready }, Some(load.sight))
            }
            Err(obstacle) => (obstacle.into(), None),
        }
    }

    fn warn_of_one_copy(&self) {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            tracing::warn!(
                nats.stream = %self.config.stream,
                "one NATS server has the stream, and writes it to the disk now and then: a power cut may cost what it took last. NATS_REPLICAS=3 keeps three"
            );
        });
    }

    /// Notes the status, and says so once when it changes.
    fn now(&self, status: Status) {
        let changed = self.status.send_if_modified(|before| {
            let changed = *before != status;
            before.clone_from(&status);
            changed
        });
        metrics::gauge!(telemetry::NATS_READY).set(if status == Status::Ready { 1.0 } else { 0.0 });
        match (changed, self.obstacle(false)) {
            (true, None) => tracing::info!(nats.stream = %self.config.stream, "the stream is there and takes events"),
            (true, Some(why)) => tracing::warn!(nats.stream = %self.config.stream, "the stream takes no events: {why}"),
            (false, _) => {}
        }
    }

    async fn keep_looking(self, stop: CancellationToken) {
        let mut watch = Watch::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(LOOK_EVERY) => {}
            }
            let (status, sight) = self.look().await;
            self.now(status);
            let Some(sight) = sight else { continue };
            if watch.sees(sight, Instant::now()) {
                tracing::warn!(
                    nats.stream = %self.config.stream,
                    ?sight,
                    "nobody is handed some events of the stream; all in it are handed out again"
                );
                if let Err(obstacle) = stream::hand_out_again(&self.jetstream, &self.config, &sight).await {
                    self.now(obstacle.into());
                }
            }
        }
    }
}

async fn connect(config: &NatsConfig, last_error: Arc<Mutex<Option<String>>>) -> Result<Client, NatsSetupError> {
    let remember = move |happening: Happening| {
        let why = match happening {
            Happening::Connected => None,
            other => Some(other.to_string()),
        };
        *last_error.lock().unwrap_or_else(PoisonError::into_inner) = why;
        async {}
    };
    let options = ConnectOptions::new()
        .name("opsmantik")
        .retry_on_initial_connect()
        .connection_timeout(ANSWER)
        .ping_interval(PING)
        .reconnect_delay_callback(|tries| {
            RECONNECT.min(Duration::from_millis(20) * u32::try_from(tries).unwrap_or(u32::MAX))
        })
        .event_callback(remember);
    let mut options = config.servers.log_in(options);
    if let Some(file) = &config.credentials {
        options = options.credentials_file(file).await.map_err(NatsSetupError::Credentials)?;
    }
    options.connect(config.servers.addresses()).await.map_err(|_| NatsSetupError::Url)
}
