//! The partition keeper: a task in every running server that makes months ahead of time.
//!
//! It keeps the month before (late deliveries and visits over midnight belong there), the current one and [`MONTHS_AHEAD`] more, and mends leaves
//! that somebody disturbed. Two keepers at once do not fight: the database function serialises them and gives up on locks quickly.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::domain::month::Month;
use crate::store::Store;
use crate::telemetry;

/// Months that are ready before they begin.
pub const MONTHS_AHEAD: i32 = 3;

/// A look at the months is cheap when nothing is missing.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(10);

/// Wakes the keeper before its time; clones share it.
#[derive(Clone, Default)]
pub struct Nudge(Arc<Notify>);

impl Nudge {
    pub fn wake(&self) {
        self.0.notify_one();
    }
}

/// Makes what is missing at `now`; the names of the leaves made.
pub async fn keep(store: &Store, now: chrono::DateTime<Utc>) -> Result<Vec<String>, crate::store::error::StoreError> {
    let mut made = Vec::new();
    for ahead in -1..=MONTHS_AHEAD {
        made.extend(store.ensure_month(Month::of(now).plus(ahead)).await?);
    }
    Ok(made)
}

/// Keeps until `stop`.
pub async fn run(store: Store, nudge: Nudge, stop: CancellationToken) {
    loop {
        let pause = match keep(&store, Utc::now()).await {
            Ok(made) => {
                if !made.is_empty() {
                    tracing::info!(partitions = ?made, "made partitions");
                    metrics::counter!(telemetry::PARTITIONS_MADE_TOTAL).increment(made.len() as u64);
                }
                EVERY
            }
            Err(error) => {
                tracing::warn!(%error, "cannot keep partitions now");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            // A missing month was met. Not more often than now and then, whoever asks.
            () = async { nudge.0.notified().await; tokio::time::sleep(Duration::from_millis(200)).await } => {}
        }
    }
}
