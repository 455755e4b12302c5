//! What all writers of a test share: where, for whom, how much is to be done, and how much has been.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::{Datelike, Months, NaiveDate, Utc};
use tokio_postgres::Client;
use uuid::Uuid;

pub const SITES: [Uuid; 2] = [Uuid::from_u128(0xa11ce), Uuid::from_u128(0xb0b)];

/// Long enough for PostgreSQL to come back on a busy machine.
const AWAY_LIMIT: Duration = Duration::from_secs(60);

/// Nobody waits longer for a share of the row changes; then the writers are gone.
const WRITING_LIMIT: Duration = Duration::from_secs(300);

/// Row changes a second: slow enough for a machine that is busy to be watched meanwhile.
const PACE: f64 = 3_000.0;

/// Row changes of all writers' transactions that are under way together, about.
const WRITTEN_AT_ONCE: f64 = 600.0;

pub struct Work {
    pub url: String,
    /// Last month, this one and the next two: the server has made their partitions.
    pub months: Vec<NaiveDate>,
    /// Row changes to be committed.
    pub target: u64,
    pub seed: u64,
    done: AtomicU64,
    /// Nobody writes more than this, for now.
    gate: AtomicU64,
}

impl Work {
    pub fn new(url: String, target: u64, seed: u64) -> Self {
        let this = Utc::now().date_naive().with_day(1).expect("every month has a first day") - Months::new(1);
        let months = (0..4).map(|ahead| this + Months::new(ahead)).collect();
        Self { url, months, target, seed, done: AtomicU64::new(0), gate: AtomicU64::new(target) }
    }

    /// Row changes were committed.
    pub fn add(&self, changes: u64) {
        self.done.fetch_add(changes, Ordering::Relaxed);
    }

    /// Waits until it is time for more, and more may be written.
    pub async fn pace(&self) {
        tokio::time::sleep(Duration::from_secs_f64(WRITTEN_AT_ONCE / PACE)).await;
        while self.done() >= self.gate.load(Ordering::Relaxed) && !self.is_over() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// From here on nobody writes more, until it is said again.
    pub fn hold_at(&self, changes: u64) {
        self.gate.store(changes, Ordering::Relaxed);
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub fn is_over(&self) -> bool {
        self.done() >= self.target
    }

    /// Waits until so many row changes have been committed.
    pub async fn reached(&self, changes: u64) {
        let began = Instant::now();
        while self.done() < changes {
            assert!(began.elapsed() < WRITING_LIMIT, "{} of {changes} row changes are written", self.done());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A connection as the superuser, as soon as there can be one.
    pub async fn connect(&self) -> Client {
        let began = Instant::now();
        loop {
            match tokio_postgres::connect(&self.url, tokio_postgres::NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    return client;
                }
                Err(error) => assert!(began.elapsed() < AWAY_LIMIT, "PostgreSQL does not come back: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
