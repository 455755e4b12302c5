//! The running server: wires the pieces together and takes them apart again in the right order.
//!
//! A [`Server`] has the doors, and beside them what stores: alone (`ROLE=all`), or as an edge in front of [`Worker`]s. On stop the doors
//! close first and finish what they took, the change feed's connection with them, then nothing more is fetched from the queue and the pipeline
//! writes what is waiting, then the keeper and the health task end. Whatever was answered as stored is committed by then.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Context;
use axum::{Extension, Router};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::access::Gate;
use crate::calls::{self, Calls};
use crate::config::{Mode, Role, Settings};
use crate::directory::Directory;
use crate::feed::{Feed, FeedOptions};
use crate::grpc::{self, Certificates, GrpcState, Health};
use crate::http::admin::{AdminState, QueueState, admin_router};
use crate::http::client_address::TrustedProxies;
use crate::http::limit::RateLimit;
use crate::http::serve::{Limits, serve};
use crate::http::{self, PublicState, public_router};
use crate::keeper::{self, Nudge};
use crate::pipeline::{Pipeline, PipelineConfig, followers};
use crate::queue::Transport;
use crate::queue::nats::{self, Nats, NatsTransport};
use crate::queue::qstash::QstashTransport;
use crate::store::Store;
use crate::telemetry;
pub use worker::Worker;

mod worker;

/// Connections to the database: the writers', and some for look-ups, the keeper and readiness.
const LOOK_UP_CONNECTIONS: u32 = 6;

/// Sockets that are bound already, so that whoever starts a server knows where it listens.
pub struct Listeners {
    pub http: TcpListener,
    pub grpc: TcpListener,
    pub admin: TcpListener,
}

impl Listeners {
    /// Binds the addresses of the settings.
    pub async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        let bind = async |name: &str, address: SocketAddr| {
            TcpListener::bind(address).await.with_context(|| format!("{name}: cannot listen on {address}"))
        };
        grpc::check_address(settings.grpc_addr, &settings.grpc_protection(Mode::Serve)?).context("GRPC_ADDR")?;
        Ok(Self {
            http: bind("HTTP_ADDR", settings.http_addr).await?,
            grpc: bind("GRPC_ADDR", settings.grpc_addr).await?,
            admin: bind("ADMIN_ADDR", settings.admin_addr).await?,
        })
    }
}

/// A running server.
pub struct Server {
    pub http_addr: SocketAddr,
    pub grpc_addr: SocketAddr,
    pub admin_addr: SocketAddr,
    certificates: Option<Certificates>,
    pipeline: Pipeline,
    feed: Feed,
    doors: Vec<JoinHandle<()>>,
    fetching: Option<Fetching>,
    tasks: Vec<JoinHandle<()>>,
    close_doors: CancellationToken,
    end_tasks: CancellationToken,
}

/// What brings events from NATS to the pipeline.
struct Fetching {
    worker: JoinHandle<()>,
    stop: CancellationToken,
}

impl Fetching {
    fn start(worker: nats::Worker) -> Self {
        let stop = CancellationToken::new();
        Self { worker: tokio::spawn(worker.run(stop.clone())), stop }
    }

    /// Fetches nothing more, and finishes what was fetched.
    async fn stop(self) {
        self.stop.cancel();
        log_end(self.worker.await);
    }
}

impl Server {
    /// Starts everything that has a door. `beside` is served on the public listener, too (the demo page of `dev`; empty otherwise).
    pub async fn start(
        settings: &Settings,
        mode: Mode,
        database_url: &str,
        listeners: Listeners,
        beside: Router,
    ) -> anyhow::Result<Self> {
        settings.check(mode)?;
        let grpc_addr = listeners.grpc.local_addr()?;
        // Installed before anything is counted.
        telemetry::prometheus();
        let grpc_listener = grpc::Listener::new(listeners.grpc, settings.grpc_protection(mode)?).context("gRPC")?;
        let certificates = grpc_listener.certificates();
        let config = PipelineConfig::default();
        let connections = u32::try_from(config.writers)? + LOOK_UP_CONNECTIONS;
        let store = Store::new(database_url, connections).await?;
        let (close_doors, end_tasks) = (CancellationToken::new(), CancellationToken::new());
        let nats = match settings.nats()? {
            Some(config) => Some(Nats::start(config, end_tasks.clone()).await?),
            None => None,
        };
        let nudge = Nudge::default();
        let pipeline = Pipeline::start(store.clone(), nudge.clone(), config);
        let directory = Directory::new(store.clone());
        let transport: Arc<dyn Transport> = match (settings.qstash(mode)?, &nats) {
            (Some(qstash), _) => Arc::new(QstashTransport::new(qstash, Arc::new(pipeline.clone()))?),
            (None, Some(nats)) => Arc::new(NatsTransport::new(nats.clone(), Arc::new(pipeline.clone()))),
            (None, None) => Arc::new(pipeline.clone()),
        };
        let public = public_router(PublicState {
            directory: directory.clone(),
            transport,
            pipeline: pipeline.clone(),
            store: store.clone(),
            limit: Arc::new(RateLimit::new(settings.rate_limit)),
            proxies: Arc::new(TrustedProxies::new(settings.trusted_proxies.0.clone())),
            verifier: Arc::new(settings.verifier(mode)?),
            body_patience: http::BODY_PATIENCE,
            body_room: http::body_room(),
            delivery_room: http::delivery_room(),
        })
        .merge(beside);
        let feed_url = settings.feed_database_url(mode);
        let feed = Feed::new(store.clone(), database_url, feed_url, FeedOptions::default(), &close_doors)?;
        let mut admin = admin_router(AdminState { store: store.clone() }).layer(Extension(feed.clone()));
        if let Some(nats) = &nats {
            admin = admin.layer(Extension(QueueState { nats: nats.clone(), needed: false }));
        }

        let (http_addr, admin_addr) = (listeners.http.local_addr()?, listeners.admin.local_addr()?);
        if settings.caller_key()?.is_none() {
            tracing::warn!("CALLER_KEY is not set, so no call can be recorded");
        }
        let gate = Gate::new(store.clone()).with_users(&settings.users()?)?;
        let fetching = nats
            .filter(|_| settings.role == Role::All)
            .map(|nats| Fetching::start(nats::Worker::new(nats, pipeline.clone(), directory.clone(), store.clone())));
        let internal = GrpcState {
            pipeline: pipeline.clone(),
            directory,
            store: store.clone(),
            calls: Calls::new(store.clone()),
            caller_key: settings.caller_key()?,
            feed: feed.clone(),
            gate,
            stop: close_doors.clone(),
        };
        let health = Health::of(store.clone());
        let stop_grpc = close_doors.clone();
        let doors = vec![
            tokio::spawn(serve(listeners.http, public, Limits::default(), close_doors.clone())),
            tokio::spawn(async move {
                if let Err(error) = grpc::serve(grpc_listener, internal, health, stop_grpc).await {
                    tracing::error!(%error, "the gRPC listener ended");
                }
            }),
        ];
        let mut tasks = vec![
            tokio::spawn(serve(listeners.admin, admin, Limits::default(), end_tasks.clone())),
            tokio::spawn(telemetry::fold_samples(end_tasks.clone())),
            tokio::spawn(warn_of_feed(feed.clone())),
        ];
        if settings.role == Role::All {
            tasks.push(tokio::spawn(keeper::run(store.clone(), nudge, end_tasks.clone())));
            tasks.push(tokio::spawn(followers::sweep(store.clone(), end_tasks.clone())));
            tasks.push(tokio::spawn(calls::sweep(store, end_tasks.clone())));
        }
        tracing::info!(http.addr = %http_addr, grpc.addr = %grpc_addr, admin.addr = %admin_addr, "listening");
        Ok(Self {
            http_addr,
            grpc_addr,
            admin_addr,
            certificates,
            pipeline,
            feed,
            doors,
            fetching,
            tasks,
            close_doors,
            end_tasks,
        })
    }

    /// Reads again what can change while the server runs: the certificates of the gRPC listener.
    pub fn reload(&self) {
        match &self.certificates {
            Some(certificates) => certificates.read_again(),
            None => tracing::info!("nothing to reload: gRPC is served without TLS"),
        }
    }

    /// Stops taking, finishes what was taken, and returns.
    pub async fn stop(self) {
        self.close_doors.cancel();
        for door in self.doors {
            log_end(door.await);
        }
        self.feed.stopped().await;
        if let Some(fetching) = self.fetching {
            fetching.stop().await;
        }
        self.pipeline.drain().await;
        self.end_tasks.cancel();
        for task in self.tasks {
            log_end(task.await);
        }
        tracing::info!("stopped; everything that was taken is stored");
    }
}

/// Says once what is in the way of Watch. The rest of the server does without.
async fn warn_of_feed(feed: Feed) {
    if let Some(why) = feed.obstacle().await {
        tracing::warn!("Watch cannot be served: {why}");
    }
}

fn log_end(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a task of the server broke");
    }
}

/// SIGHUPs from now on. One that comes before this call ends the process.
pub fn hang_ups() -> anyhow::Result<Signal> {
    signal(SignalKind::hangup()).context("SIGHUP")
}

/// Waits until the process is asked to end: SIGTERM, SIGINT (Ctrl-C), or a SIGHUP that `hung_up` takes for that. It is a closed
/// terminal for who sits before one, and "read your files again" for a service.
pub async fn asked_to_stop(mut hang_ups: Signal, hung_up: impl Fn() -> ControlFlow<()>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let name = loop {
        tokio::select! {
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hang_ups.recv() => if hung_up().is_break() { break "SIGHUP" },
        }
    };
    tracing::info!(signal = name, "stopping: taking nothing more, finishing what was taken");
    Ok(())
}
