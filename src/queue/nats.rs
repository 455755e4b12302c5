//! NATS JetStream: edges publish, the stream owns the event, and workers fetch it.
//!
//! ```text
//! /api/sync ─▶ edge ─▶ stream (file, work queue, refuses when full) ─▶ durable consumer ─▶ worker ─▶ pipeline ─▶ ack after commit
//!                └─ not taken: the edge's own pipeline
//! ```
//!
//! One [`Nats`] a server. It looks at the stream every second, makes what is missing, and publishes nothing and fetches nothing while the
//! stream would lose events. A connection that ended is replaced by another; a NATS that is away is looked for until it is back; nobody waits
//! for it.

use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use async_nats::{ConnectError, ConnectOptions};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry;
use connection::Connection;
use sight::{Sight, Watch};

pub use edge::NatsTransport;
pub use servers::Servers;
pub use worker::Worker;

mod connection;
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
/// First pause before a try to connect; each one that fails makes the next one longer ...
const RECONNECT: Duration = Duration::from_millis(20);
/// ... up to this.
const RECONNECT_AT_MOST: Duration = Duration::from_millis(500);

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
    #[error("{0}")]
    Unfit(String),
}

/// The connection to NATS and what is known of the stream; clones share it.
#[derive(Clone)]
pub struct Nats {
    config: Arc<NatsConfig>,
    options: Arc<ConnectOptions>,
    /// The last one that was opened.
    connection: Arc<watch::Sender<Option<Arc<Connection>>>>,
    /// Told when it ends.
    ended: Arc<Notify>,
    status: Arc<watch::Sender<Status>>,
}

impl Nats {
    /// Connects and looks at the stream once, if NATS answers soon. A stream that would lose events is an error, a NATS that is away is none.
    /// The task that keeps looking ends with `stop`.
    pub async fn start(config: NatsConfig, stop: CancellationToken) -> Result<Self, NatsSetupError> {
        let ended = Arc::<Notify>::default();
        let options = Arc::new(connection::options(&config, ended.clone()).await?);
        let mut first = Status::Away("no answer".to_owned());
        let status = Arc::new(watch::Sender::new(first.clone()));
        let nats = Self { config: Arc::new(config), options, connection: Arc::default(), ended, status };
        let looked = timeout(FIRST_LOOK, async {
            let mut tries = 0;
            loop {
                first = nats.look().await.0;
                if nats.connection().is_some() {
                    return;
                }
                sleep(back_off(tries)).await;
                tries += 1;
            }
        });
        // A NATS that does not answer by then is looked for further on.
        drop(looked.await);
        if let Status::Unfit(why) = first {
            return Err(NatsSetupError::Unfit(why));
        }
        nats.set(first);
        nats.say();
        tokio::spawn(nats.clone().keep_looking(stop));
        Ok(nats)
    }

    /// What stands in the way now, for people; nothing if events flow. A full stream stands in the way of edges only. No secret in it.
    pub fn obstacle(&self, of_worker: bool) -> Option<String> {
        match &*self.status.borrow() {
            Status::Ready | Status::Full if self.connection().is_none() => {
                Some("NATS is away: the connection has ended".to_owned())
            }
            Status::Ready => None,
            Status::Full if of_worker => None,
            Status::Full => Some(format!("the stream `{}` is nearly full: workers do not keep up", self.config.stream)),
            Status::Away(why) => Some(format!("NATS is away: {why}")),
            Status::Unfit(why) => Some(why.clone()),
        }
    }

    /// Sends what is still on its way to NATS, acknowledgements above all.
    pub async fn flush(&self) {
        let Some(connection) = self.connection() else { return };
        if timeout(ANSWER, connection.client.flush()).await.is_err() {
            tracing::warn!(
                "NATS does not answer; what was stored last may be delivered once more, which changes nothing"
            );
        }
    }

    /// The subject of a site's events: one a site, so that an operator can look at one customer's backlog.
    fn subject(&self, site: impl std::fmt::Display) -> String {
        format!("{}.{site}", stream::prefix(&self.config.stream))
    }

    /// The connection, as long as it lasts.
    fn connection(&self) -> Option<Arc<Connection>> {
        self.connection.borrow().clone().filter(|connection| connection.lasts())
    }

    /// The connection, or another one if it has ended.
    async fn connect(&self) -> Result<Arc<Connection>, ConnectError> {
        let mut servers = self.config.servers.addresses();
        let last = self.connection.borrow().clone();
        if let Some(last) = last {
            if last.lasts() {
                return Ok(last);
            }
            // The cluster has other servers, whether they were configured or not.
            for server in last.cluster() {
                if !servers.contains(&server) {
                    servers.push(server);
                }
            }
        }
        let connection = Arc::new(Connection::open(&self.options, servers).await?);
        self.connection.send_replace(Some(connection.clone()));
        Ok(connection)
    }

    /// The status, and what was seen if NATS answers.
    async fn look(&self) -> (Status, Option<Sight>) {
        let connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => return (Status::Away(error.to_string()), None),
        };
        match stream::look(&connection.jetstream, &self.config).await {
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

    /// Notes the status, and says so when it is news.
    fn now(&self, status: Status) {
        match (self.set(status.clone()), status) {
            // Of several servers each may be away for a reason of its own.
            (Status::Away(_), Status::Away(_)) => {}
            (before, now) if before == now => {}
            _ => self.say(),
        }
    }

    /// Notes the status; which it was before.
    fn set(&self, status: Status) -> Status {
        metrics::gauge!(telemetry::NATS_READY).set(if status == Status::Ready { 1.0 } else { 0.0 });
        self.status.send_replace(status)
    }

    fn say(&self) {
        match self.obstacle(false) {
            None => tracing::info!(nats.stream = %self.config.stream, "the stream is there and takes events"),
            Some(why) => tracing::warn!(nats.stream = %self.config.stream, "the stream takes no events: {why}"),
        }
    }

    async fn keep_looking(self, stop: CancellationToken) {
        let (mut watch, mut failed) = (Watch::default(), 0);
        loop {
            let pause = if self.connection().is_some() { LOOK_EVERY } else { back_off(failed) };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.ended.notified() => continue,
                () = sleep(pause) => {}
            }
            let (status, sight) = self.look().await;
            // A connection that ends as soon as it is open is no success.
            failed = if matches!(status, Status::Away(_)) { failed + 1 } else { 0 };
            self.now(status);
            let (Some(sight), Some(connection)) = (sight, self.connection()) else { continue };
            if watch.sees(sight, Instant::now()) {
                tracing::warn!(
                    nats.stream = %self.config.stream,
                    ?sight,
                    "nobody is handed some events of the stream; all in it are handed out again"
                );
                if let Err(obstacle) = stream::hand_out_again(&connection.jetstream, &self.config, &sight).await {
                    self.now(obstacle.into());
                }
            }
        }
    }
}

/// How long to wait before the next try to connect: never at the same moment as all others who lost the same NATS.
fn back_off(failed: u32) -> Duration {
    let at_most = RECONNECT.saturating_mul(2u32.saturating_pow(failed)).min(RECONNECT_AT_MOST);
    at_most.mul_f64(rand::random_range(0.5..=1.0))
}
