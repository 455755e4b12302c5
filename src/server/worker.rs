//! A server without doors: stores what edges left in the stream, keeps the months, corrects followers and matches calls again.

use std::net::SocketAddr;

use anyhow::Context;
use axum::Extension;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Fetching, LOOK_UP_CONNECTIONS, log_end};
use crate::calls;
use crate::config::{Mode, Settings};
use crate::directory::Directory;
use crate::http::admin::{AdminState, QueueState, admin_router};
use crate::http::serve::{Limits, serve};
use crate::keeper::{self, Nudge};
use crate::pipeline::{Pipeline, PipelineConfig, followers};
use crate::queue::nats::{self, Nats};
use crate::store::Store;
use crate::telemetry;

/// A running worker.
pub struct Worker {
    pub admin_addr: SocketAddr,
    pipeline: Pipeline,
    fetching: Fetching,
    tasks: Vec<JoinHandle<()>>,
    end_tasks: CancellationToken,
}

impl Worker {
    /// Starts what a worker runs, and the operator's listener on the address of the settings.
    pub async fn start(settings: &Settings, database_url: &str) -> anyhow::Result<Self> {
        settings.check(Mode::Serve)?;
        let config = settings.nats()?.context("ROLE is worker, which has work with QUEUE=nats only")?;
        let address = settings.admin_addr;
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("ADMIN_ADDR: cannot listen on {address}"))?;
        let admin_addr = listener.local_addr()?;
        // Installed before anything is counted.
        telemetry::prometheus();
        let pipeline_config = PipelineConfig::default();
        let store = Store::new(database_url, u32::try_from(pipeline_config.writers)? + LOOK_UP_CONNECTIONS).await?;
        let end_tasks = CancellationToken::new();
        let nats = Nats::start(config, end_tasks.clone()).await?;
        let nudge = Nudge::default();
        let pipeline = Pipeline::start(store.clone(), nudge.clone(), pipeline_config);
        let admin = admin_router(AdminState { store: store.clone() })
            .layer(Extension(QueueState { nats: nats.clone(), needed: true }));
        let directory = Directory::new(store.clone());
        let fetching = Fetching::start(nats::Worker::new(nats, pipeline.clone(), directory, store.clone()));
        let tasks = vec![
            tokio::spawn(serve(listener, admin, Limits::default(), end_tasks.clone())),
            tokio::spawn(keeper::run(store.clone(), nudge, end_tasks.clone())),
            tokio::spawn(followers::sweep(store.clone(), end_tasks.clone())),
            tokio::spawn(calls::sweep(store, end_tasks.clone())),
            tokio::spawn(telemetry::fold_samples(end_tasks.clone())),
        ];
        tracing::info!(admin.addr = %admin_addr, "working: no public listener, the operator's only");
        Ok(Self { admin_addr, pipeline, fetching, tasks, end_tasks })
    }

    /// Fetches nothing more, stores and acknowledges what was fetched, and returns.
    pub async fn stop(self) {
        self.fetching.stop().await;
        self.pipeline.drain().await;
        self.end_tasks.cancel();
        for task in self.tasks {
            log_end(task.await);
        }
        tracing::info!("stopped; everything that was fetched is stored, or still in the stream");
    }
}
