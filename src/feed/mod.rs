//! The change feed: one reader of PostgreSQL's log a server, shared by everybody who watches.
//!
//! Data walks one way: a replication connection with a temporary slot (PostgreSQL drops it with the connection, so no slot ever keeps WAL
//! for nobody) → changes, decoded and bounded in a log that forgets its oldest → [`Subscription`]s, each at its own place in it. The log
//! never waits for a subscriber: one that falls behind what the log holds is told [`Lost::Slow`].
//!
//! A subscription tells changes in the order of their commits. What was there before is the subscriber's to read from the tables, and
//! [`Subscription::covers`] says whether what a query saw and what the log tells from here on leave no gap.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{self, Arc};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

mod decode;
mod fitness;
mod link;
mod log;
mod reader;
mod source;
mod subscription;
mod told;

#[cfg(test)]
mod tests;

use crate::domain::change::{Change, Place, Position, Table};
use crate::domain::id::SiteId;
use crate::store::Store;
use crate::store::columns::Tuple;
use crate::store::pool::Manager;
use crate::telemetry;
use reader::{Entered, Shared};
use source::Places;
pub use subscription::Subscription;

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
    /// To begin, PostgreSQL waits for transactions that have not ended.
    #[error("transactions that write hold up the reading of the change log")]
    Held,
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

/// How a feed is bounded. Tests have their own bounds.
#[derive(Debug, Clone)]
pub struct FeedOptions {
    /// Bytes that the log holds before it forgets its oldest.
    pub log_bytes: usize,
    /// How long it goes on when nobody listens any more.
    pub linger: Duration,
    /// As many may listen.
    pub subscribers: usize,
    /// No start takes longer. It waits for transactions that write, whoever's they are.
    pub start_limit: Duration,
    /// No subscriber waits longer for a start; it goes on without them.
    pub patience: Duration,
    /// After a start that failed, the next is tried no sooner.
    pub back_off: Duration,
}

impl Default for FeedOptions {
    fn default() -> Self {
        Self {
            log_bytes: 64 << 20,
            linger: Duration::from_secs(5 * 60),
            subscribers: 1000,
            start_limit: Duration::from_secs(30),
            patience: Duration::from_secs(10),
            back_off: Duration::from_secs(2),
        }
    }
}

/// An answer to whether the feed could run is good for this long.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// What held up a start may have ended since.
const HELD_FOR: Duration = Duration::from_secs(60);
/// A look that takes longer says nothing.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// The feed of a server. Clones share it.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

enum Inner {
    Unfit(String),
    Fit(Box<Engine>),
}

struct Engine {
    places: Places,
    options: FeedOptions,
    running: Arc<sync::Mutex<Running>>,
    looked: Mutex<Option<(Instant, Option<String>)>>,
    stop: CancellationToken,
    /// A feed whose last handle is gone ends.
    _end: DropGuard,
    tasks: TaskTracker,
    broke: Arc<AtomicBool>,
}

#[derive(Default)]
struct Running {
    shared: Option<Arc<Shared>>,
    /// There while it begins, so that it begins once.
    beginning: Option<watch::Receiver<()>>,
    failed: Option<(Instant, FeedError)>,
}

fn running(state: &sync::Mutex<Running>) -> sync::MutexGuard<'_, Running> {
    state.lock().unwrap_or_else(sync::PoisonError::into_inner)
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").finish_non_exhaustive()
    }
}

impl Feed {
    /// A feed that nobody can watch, and why.
    pub fn unfit(why: &str) -> Self {
        Self { inner: Arc::new(Inner::Unfit(why.to_owned())) }
    }

    /// A feed of the store's database. `direct` is where its log is read: the same database, without a pooler between. It begins when
    /// somebody subscribes, and ends with `stop`.
    pub fn new(
        store: Store,
        database_url: &str,
        direct: Option<&str>,
        options: FeedOptions,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let to = match direct {
            Some(url) => Manager::named("FEED_DATABASE_URL", url)?,
            None => Manager::new(database_url)?,
        };
        // There from the beginning, so that nobody takes a feed that does not run for one that is not measured.
        metrics::gauge!(telemetry::FEED_RUNNING).set(0.0);
        metrics::counter!(telemetry::FEED_RESTARTS_TOTAL).absolute(0);
        metrics::counter!(telemetry::FEED_CUT_OFF_TOTAL).absolute(0);
        let stop = stop.child_token();
        let engine = Engine {
            places: Places { store, direct: to, same: direct.is_none_or(|url| url == database_url) },
            options,
            running: Arc::default(),
            looked: Mutex::default(),
            _end: stop.clone().drop_guard(),
            stop,
            tasks: TaskTracker::new(),
            broke: Arc::default(),
        };
        Ok(Self { inner: Arc::new(Inner::Fit(Box::new(engine))) })
    }

    /// From the place on that the log has reached. Begins to read the log if nobody did, and returns when that stands.
    pub async fn subscribe(&self, table: Table, site: SiteId) -> Result<Subscription, FeedError> {
        match &*self.inner {
            Inner::Unfit(why) => Err(FeedError::Unfit(why.clone())),
            Inner::Fit(engine) => engine.subscribe(table, site).await,
        }
    }

    /// What is in the way of a feed and its cure, as far as one can tell without beginning to read; none if nothing is, or if the database
    /// does not answer. Cheap enough to be asked often.
    pub async fn obstacle(&self) -> Option<String> {
        match &*self.inner {
            Inner::Unfit(why) => Some(why.clone()),
            Inner::Fit(engine) => engine.obstacle().await,
        }
    }

    /// Resolves when nothing of the feed runs any more, after it was told to stop.
    pub async fn stopped(&self) {
        if let Inner::Fit(engine) = &*self.inner {
            engine.stop.cancelled().await;
            // Nobody begins anew from here on.
            drop(running(&engine.running));
            engine.tasks.close();
            engine.tasks.wait().await;
        }
    }
}

impl Engine {
    async fn subscribe(&self, table: Table, site: SiteId) -> Result<Subscription, FeedError> {
        let asked = Instant::now();
        let late = tokio::time::Instant::now() + self.options.patience;
        loop {
            let mut begun = {
                let mut running = running(&self.running);
                if self.stop.is_cancelled() {
                    return Err(FeedError::Away);
                }
                if let Some(shared) = &running.shared {
                    match shared.enter(table, site, self.options.subscribers) {
                        Entered::In(subscription) => return Ok(subscription),
                        Entered::Full => return Err(FeedError::Full),
                        Entered::Over => running.shared = None,
                    }
                }
                let just_now = |at: &Instant| *at >= asked || at.elapsed() < self.options.back_off;
                if let Some((_, error)) = running.failed.as_ref().filter(|(at, _)| just_now(at)) {
                    return Err(error.clone());
                }
                running.beginning.get_or_insert_with(|| self.begin()).clone()
            };
            // Who goes meanwhile leaves it to the next: what was waited for is not lost.
            if tokio::time::timeout_at(late, begun.changed()).await.is_err() {
                return Err(FeedError::Held);
            }
        }
    }

    /// Begins in the background. What is returned resolves when that has come to an end.
    fn begin(&self) -> watch::Receiver<()> {
        let (done, begun) = watch::channel(());
        let (places, options, stop) = (self.places.clone(), self.options.clone(), self.stop.clone());
        let (state, broke, tasks) = (self.running.clone(), self.broke.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            let limit = options.start_limit;
            let source = tokio::select! {
                () = stop.cancelled() => Err(FeedError::Away),
                started = tokio::time::timeout(limit, places.start(limit)) => started.unwrap_or_else(|_| {
                    tracing::warn!("the change feed cannot begin within {} s: {}", limit.as_secs(), fitness::HELD);
                    Err(FeedError::Held)
                }),
            };
            let mut running = running(&state);
            running.beginning = None;
            match source {
                Err(error) => running.failed = Some((Instant::now(), error)),
                Ok(source) => {
                    running.failed = None;
                    if broke.swap(false, Ordering::Relaxed) {
                        metrics::counter!(telemetry::FEED_RESTARTS_TOTAL).increment(1);
                    }
                    tracing::info!("the change feed begins");
                    let (shared, task) = reader::run(source, places, &options, stop);
                    tasks.spawn(async move { broke.fetch_or(task.await, Ordering::Relaxed) });
                    running.shared = Some(shared);
                }
            }
            drop(running);
            drop(done);
        });
        begun
    }

    async fn obstacle(&self) -> Option<String> {
        let mut looked = self.looked.lock().await;
        if let Some((_, answer)) = looked.as_ref().filter(|(at, _)| at.elapsed() < LOOK_AGAIN) {
            return answer.clone();
        }
        let (runs, refused) = {
            let running = running(&self.running);
            let runs = running.shared.as_ref().is_some_and(|shared| !shared.state().over);
            let refused = running.failed.as_ref().and_then(|(at, error)| match error {
                FeedError::Unfit(why) => Some(why.clone()),
                FeedError::Held if at.elapsed() < HELD_FOR => Some(fitness::HELD.to_owned()),
                FeedError::Held | FeedError::Away | FeedError::Full => None,
            });
            (runs || running.beginning.is_some(), refused)
        };
        // What a query cannot see the last attempt may have met.
        let seen = tokio::time::timeout(LOOK_LIMIT, self.places.obstacle(runs)).await.ok().flatten();
        let answer = seen.or(refused);
        *looked = Some((Instant::now(), answer.clone()));
        answer
    }
}
