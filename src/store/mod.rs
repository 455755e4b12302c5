//! The repository: all SQL of the program, one file a table, addressed by keys that contain the month.
//!
//! A function here runs one declared [`statement`] in a [`transaction`] that the caller owns, and speaks in domain types. Only
//! [`error::Fault`] tells the layers above what a failure means.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub mod ads_history;
pub mod call_evidence;
pub mod calls;
pub mod columns;
pub mod dead_letters;
mod direct;
pub mod error;
pub mod events;
pub mod feed;
pub mod late_followers;
pub mod locks;
pub mod migrate;
pub mod partitions;
pub mod pool;
mod ready;
pub mod rematches;
pub mod retention;
pub mod rows;
pub mod scoring;
pub mod sessions;
pub mod sites;
pub mod statement;
pub mod tokens;
pub mod transaction;
pub mod watch;

use error::{CONNECT, StoreError};
use pool::Manager;
use transaction::{Purpose, Transaction};

/// The database, by a bounded pool of connections. Clones share it.
#[derive(Clone)]
pub struct Store {
    pool: bb8::Pool<Manager>,
    manager: Arc<Manager>,
    /// Why the last batch of events could not be written, and when; none if it was.
    trouble: Arc<Mutex<Option<(Instant, String)>>>,
}

/// No operation on the pool waits longer than this for a connection.
const CONNECTION_WAIT: Duration = Duration::from_millis(2500);
/// A refused connection is asked for again after this, while others are in use and may come back.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// A write that failed says something of the next one for so long. Nobody who is told so sends another, so it is forgotten by itself.
const TROUBLE_FOR: Duration = Duration::from_secs(5);

impl Store {
    /// A store for a connection string; connects when it is first used.
    pub async fn new(url: &str, connections: u32) -> anyhow::Result<Self> {
        let manager = Manager::new(url)?;
        let pool = pool::pool(manager.clone(), connections).await?;
        Ok(Self { pool, manager: Arc::new(manager), trouble: Arc::default() })
    }

    /// Opens a transaction under the role of its purpose.
    pub async fn begin(&self, purpose: Purpose) -> Result<Transaction<'_>, StoreError> {
        let transaction = self.reserve(purpose).await?;
        transaction.enter().await?;
        Ok(transaction)
    }

    /// A transaction that is yet to be entered, so that its first statements can be sent along with that; see [`Transaction::enter`].
    pub(crate) async fn reserve(&self, purpose: Purpose) -> Result<Transaction<'_>, StoreError> {
        let connection = tokio::time::timeout(CONNECTION_WAIT, self.connection())
            .await
            .unwrap_or_else(|_| Err(StoreError::away(CONNECT, "no connection became free in time")))?;
        connection.learn_rows().await?;
        if purpose == Purpose::Serve {
            connection.make_ready(&purpose.opening()).await?;
        }
        Ok(Transaction::on(connection, purpose))
    }

    /// A connection, or the news that there is none and none can be opened.
    async fn connection(&self) -> Result<bb8::PooledConnection<'_, Manager>, StoreError> {
        loop {
            let refusal = self.manager.refusal();
            tokio::select! {
                biased;
                connection = self.pool.get() => match connection {
                    // It ended while it lay there.
                    Ok(connection) if connection.client().is_closed() => continue,
                    Ok(connection) => return Ok(connection),
                    Err(bb8::RunError::User(error)) => return Err(StoreError::of(CONNECT, error)),
                    Err(bb8::RunError::TimedOut) => {
                        return Err(StoreError::away(CONNECT, "no connection became free in time"));
                    }
                },
                () = refusal => if self.pool.state().connections == 0 {
                    return Err(StoreError::away(CONNECT, "the database refuses connections"));
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// A batch of events was committed.
    pub fn wrote(&self) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// A batch of events could not be written for a reason that may pass. Kept if no look at the database would tell of it.
    pub fn could_not_write(&self, error: &StoreError) {
        if error.shows() {
            return;
        }
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), error.to_string()));
    }

    /// Why events could not be written a moment ago; none if the last ones were.
    pub fn write_trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().filter(|(since, _)| since.elapsed() < TROUBLE_FOR).map(|(_, why)| why.clone())
    }

    /// Whether the database answers, and would store an event of ours now.
    pub async fn ping(&self) -> Result<(), StoreError> {
        if let Some(why) = self.write_trouble() {
            return Err(StoreError::away("ping", format_args!("events could not be written a moment ago: {why}")));
        }
        match partitions::storage_faults(self).await?.as_slice() {
            [] => Ok(()),
            faults => Err(StoreError::away("ping", faults.join("; "))),
        }
    }
}
