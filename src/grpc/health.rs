//! `grpc.health.v1`, which follows the database: while it does not answer, nothing that this door promises can be kept.
//!
//! The server as a whole (the empty name) and each of its services have one status. Nothing is SERVING before the first answer of
//! the database; when the server stops everything is NOT_SERVING and the watches end.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, HealthService};

use super::proto::{calls_service_server, ingest_service_server, scoring_service_server};
use crate::store::Store;

/// How often the database is asked while it answers ...
const EVERY: Duration = Duration::from_secs(1);
/// ... and while it does not: whoever waits for it is told soon.
const EVERY_WHILE_AWAY: Duration = Duration::from_millis(250);
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Every name that has a status.
const NAMES: [&str; 4] =
    ["", ingest_service_server::SERVICE_NAME, scoring_service_server::SERVICE_NAME, calls_service_server::SERVICE_NAME];

/// The health of a server on this database.
pub struct Health {
    store: Store,
    reporter: HealthReporter,
}

impl Health {
    pub fn of(store: Store) -> Self {
        Self { store, reporter: HealthReporter::new() }
    }

    /// The service that tells it.
    pub(super) async fn service(&self) -> tonic_health::pb::health_server::HealthServer<HealthService> {
        self.tell(false).await;
        tonic_health::pb::health_server::HealthServer::new(HealthService::from_health_reporter(self.reporter.clone()))
    }

    /// Asks and tells until `stop`.
    pub(super) async fn follow(mut self, stop: CancellationToken) {
        let mut serving = false;
        let ask = async {
            loop {
                let answers = self.database_answers().await;
                if answers != serving {
                    serving = answers;
                    tracing::info!(serving, "gRPC health changed");
                    self.tell(serving).await;
                }
                tokio::time::sleep(if serving { EVERY } else { EVERY_WHILE_AWAY }).await;
            }
        };
        tokio::select! {
            () = ask => {}
            () = stop.cancelled() => {}
        }
        self.tell(false).await;
        for name in NAMES {
            // Ends the watches, which would hold up the stop.
            self.reporter.clear_service_status(name).await;
        }
    }

    async fn database_answers(&self) -> bool {
        match tokio::time::timeout(PATIENCE, self.store.ping()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the database does not answer");
                false
            }
            Err(_elapsed) => false,
        }
    }

    async fn tell(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in NAMES {
            self.reporter.set_service_status(name, status).await;
        }
    }
}
