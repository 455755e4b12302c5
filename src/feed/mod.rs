//! The change feed: one reader of PostgreSQL's log a server, shared by everybody who watches.
//!
//! Data walks one way: a replication connection with a temporary slot (PostgreSQL drops it with the connection, so no slot ever keeps WAL
//! for nobody) → changes, decoded and bounded in a log that forgets its oldest → [`Subscription`]s, each at its own place in it. The log
//! never waits for a subscriber: one that falls behind what the log holds is told [`Lost::Slow`].
//!
//! A subscription tells changes in the order of their commits. What was there before is the subscriber's to read from the tables, and
//! [`Subscription::covers`] says whether what a query saw and what the log tells from here on leave no gap.

use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::domain::change::{Change, Lineage, Place, Position, Snapshot, Table};
use crate::domain::id::SiteId;
use crate::store::columns::Tuple;

/// One change, or the news that the tables have to be read anew.
#[derive(Debug)]
pub struct Entry {
    pub position: Position,
    /// The full id of the transaction.
    pub xid: u64,
    pub committed_at: DateTime<Utc>,
    pub what: What,
}

#[derive(Debug)]
pub enum What {
    /// A row changed; both values are complete.
    Row(Change<(Place, Tuple)>),
    /// Rows of these places came or went in a way that no log tells row by row: a partition was dropped, emptied or attached. Without a
    /// month: of every month; without a site: of every site.
    Anew { site: Option<SiteId>, month: Option<crate::domain::month::Month> },
}

/// Why nobody can watch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// The database is not set up for it. The text names the cure and no secret.
    #[error("{0}")]
    Unfit(String),
    /// The log cannot be read now.
    #[error("the change log cannot be read now")]
    Away,
    /// As many watch as this server has room for.
    #[error("too many watch already")]
    Full,
}

/// Why a subscription ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The log has forgotten what comes next: the subscriber reads too slowly.
    #[error("the subscriber is too slow")]
    Slow,
    /// The connection to the database broke, or the server stops.
    #[error("the change log cannot be read any more")]
    Away,
}

/// What a subscription tells.
#[derive(Debug, Clone)]
pub enum Step {
    /// The next entry of this table and site.
    Entry(Arc<Entry>),
    /// The log has gone on without one: [`Subscription::position`] has moved.
    Moved,
}

/// The feed of a server. Clones share it.
#[derive(Debug, Clone)]
pub struct Feed {
    unfit: Arc<str>,
}

impl Feed {
    /// A feed that nobody can watch, and why.
    pub fn unfit(why: &str) -> Self {
        Self { unfit: why.into() }
    }

    /// From the place on that the log has reached. Begins to read the log if nobody did, and returns when that stands.
    #[allow(clippy::unused_async)]
    pub async fn subscribe(&self, table: Table, site: SiteId) -> Result<Subscription, FeedError> {
        let _ = (table, site);
        Err(FeedError::Unfit(self.unfit.to_string()))
    }
}

/// A place in the log, and what comes after it of one table and one site.
#[derive(Debug)]
pub struct Subscription {
    never: std::convert::Infallible,
}

impl Subscription {
    /// The history that positions and transaction ids of this log belong to.
    pub fn lineage(&self) -> Lineage {
        match self.never {}
    }

    /// Where it stands: everything at or before this was told or passed over.
    pub fn position(&self) -> Position {
        match self.never {}
    }

    /// Goes to another place: what comes after it is told next. False, and it stays, when the log no longer holds all of that. A place
    /// that the log has not reached yet is waited for.
    pub fn seek(&mut self, after: Position) -> bool {
        let _ = after;
        match self.never {}
    }

    /// A transaction id below which every transaction has ended, with its commit at or before [`Self::position`]: what a query sees of
    /// transactions below was told, or was there before.
    pub fn horizon(&self) -> u64 {
        match self.never {}
    }

    /// Whether a query with this snapshot saw every transaction whose commit lies at or before [`Self::position`]. If it did not, it came
    /// a moment too early: PostgreSQL writes a commit to its log before it shows it to queries.
    pub fn covers(&self, snapshot: &Snapshot) -> bool {
        let _ = snapshot;
        match self.never {}
    }

    /// The next entry if it is there already.
    pub fn try_next(&mut self) -> Result<Option<Arc<Entry>>, Lost> {
        match self.never {}
    }

    /// Waits for the next step. Can be dropped at any time and asked again.
    #[allow(clippy::unused_async)]
    pub async fn next(&mut self) -> Result<Step, Lost> {
        match self.never {}
    }
}
