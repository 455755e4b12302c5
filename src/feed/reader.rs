//! The running feed: what its two tasks and its subscriptions share, and the tasks.
//!
//! One task reads the connection and never waits for anybody; the other asks the database now and then what it shows. When the first
//! ends, for whatever reason, the feed is over: every subscription is told, and the next subscriber begins another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use pg_walstream::parse_keepalive_message;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::decode::{Decoder, Said};
use super::link::{Link, LinkError};
use super::log::{Key, Log};
use super::source::{Places, Source};
use super::told::Told;
use super::{FeedOptions, Subscription};
use crate::domain::change::{Lineage, Position, Table};
use crate::domain::id::SiteId;
use crate::telemetry;

/// How often what was read is confirmed, and waiting subscribers learn that the log went on without anything for them.
const BEAT: Duration = Duration::from_secs(1);
/// Nobody subscribed: this many beats between two questions.
const IDLE_BEATS: u32 = 10;
/// Every beat asks for an answer. After so long without any the connection leads nowhere.
const SILENCE: Duration = Duration::from_secs(120);
/// A word to a connection that takes longer does not get through.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// A question to the database that takes longer is given up.
const ASK_LIMIT: Duration = Duration::from_secs(3);
/// Bytes of a data message before its content: tag, two places, a time.
const DATA_HEAD: usize = 25;

/// What all share.
#[derive(Debug)]
pub(super) struct Shared {
    pub lineage: Lineage,
    state: Mutex<State>,
    /// Rung every beat, and at the end.
    pub beat: Notify,
    over: CancellationToken,
    /// Cancelled when the publication does not tell everything any more: what the log says is then no longer the whole.
    unpublished: CancellationToken,
}

#[derive(Debug)]
pub(super) struct State {
    pub log: Log,
    pub told: Told,
    listeners: HashMap<(Table, SiteId), (usize, Arc<Notify>)>,
    subscribers: usize,
    unwatched_since: Instant,
    pub over: bool,
}

/// How a subscriber was met.
pub(super) enum Entered {
    In(Subscription),
    Full,
    Over,
}

impl Shared {
    fn new(source: &Source, options: &FeedOptions) -> Self {
        let start = Position { lsn: source.start, seq: 0 };
        Self {
            lineage: source.lineage,
            state: Mutex::new(State {
                log: Log::new(start, options.log_bytes),
                told: Told::new(source.origin.snapshot.clone(), source.start),
                listeners: HashMap::new(),
                subscribers: 0,
                unwatched_since: Instant::now(),
                over: false,
            }),
            beat: Notify::new(),
            over: CancellationToken::new(),
            unpublished: CancellationToken::new(),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when the feed is over.
    pub async fn ended(&self) {
        self.over.cancelled().await;
    }

    pub fn enter(self: &Arc<Self>, table: Table, site: SiteId, most: usize) -> Entered {
        let mut state = self.state();
        if state.over {
            return Entered::Over;
        }
        if state.subscribers >= most {
            return Entered::Full;
        }
        state.subscribers += 1;
        metrics::gauge!(telemetry::FEED_SUBSCRIBERS).set(state.subscribers as f64);
        let listener = state.listeners.entry((table, site)).or_default();
        listener.0 += 1;
        let wake = listener.1.clone();
        let position = state.log.reached();
        Entered::In(Subscription::new(self.clone(), table, site, position, wake))
    }

    pub fn leave(&self, table: Table, site: SiteId) {
        let mut state = self.state();
        state.subscribers = state.subscribers.saturating_sub(1);
        state.unwatched_since = Instant::now();
        metrics::gauge!(telemetry::FEED_SUBSCRIBERS).set(if state.over { 0.0 } else { state.subscribers as f64 });
        if let Some((count, _)) = state.listeners.get_mut(&(table, site)) {
            *count -= 1;
            if *count == 0 {
                state.listeners.remove(&(table, site));
            }
        }
    }

    fn finish(&self) {
        self.state().over = true;
        self.over.cancel();
        self.beat.notify_waiters();
        for gauge in
            [telemetry::FEED_RUNNING, telemetry::FEED_SUBSCRIBERS, telemetry::FEED_LOG_BYTES, telemetry::FEED_LAG_BYTES]
        {
            metrics::gauge!(gauge).set(0.0);
        }
    }

    /// Whether nobody has listened for this long; then nobody can enter any more.
    fn close_if_unwatched(&self, linger: Duration) -> bool {
        let mut state = self.state();
        state.over |= state.subscribers == 0 && state.unwatched_since.elapsed() >= linger;
        state.over
    }
}

impl State {
    fn say(&mut self, said: Said) {
        match said {
            Said::Begun { xid, lsn } => self.told.tell(xid, lsn),
            Said::Committed { end } => self.log.reach(end),
            Said::Entry { table, entry, bytes } => {
                metrics::counter!(telemetry::FEED_CHANGES_TOTAL, "table" => table.name()).increment(1);
                for key in self.log.push(table, entry, bytes).into_iter().flatten() {
                    self.wake(key);
                }
            }
        }
    }

    fn wake(&self, (table, site): Key) {
        let Some(site) = site else {
            let all = self.listeners.iter().filter(|((of, _), _)| *of == table);
            return all.for_each(|(_, (_, wake))| wake.notify_waiters());
        };
        if let Some((_, wake)) = self.listeners.get(&(table, site)) {
            wake.notify_waiters();
        }
    }
}

/// Starts the two tasks.
pub(super) fn run(
    source: Source,
    places: Places,
    options: &FeedOptions,
    stop: CancellationToken,
) -> (Arc<Shared>, impl Future<Output = bool> + use<>) {
    let shared = Arc::new(Shared::new(&source, options));
    metrics::gauge!(telemetry::FEED_RUNNING).set(1.0);
    let decoder = Decoder::new(source.origin.snapshot.xmax);
    let (linger, start) = (options.linger, source.start);
    let reader = Reader { shared: shared.clone(), link: source.link, decoder, confirmed: start, heard: Instant::now() };
    let watched = shared.clone();
    let task = async move {
        let asker = tokio::spawn(ask(watched.clone(), places));
        let broke = reader.read(linger, &stop).await;
        watched.finish();
        drop(asker.await);
        broke
    };
    (shared, task)
}

struct Reader {
    shared: Arc<Shared>,
    link: Link,
    decoder: Decoder,
    /// What is confirmed to PostgreSQL, so that it need not keep it.
    confirmed: u64,
    heard: Instant,
}

impl Reader {
    /// Until nobody listens any more, the server stops, or the connection breaks: then true.
    async fn read(mut self, linger: Duration, stop: &CancellationToken) -> bool {
        let mut beat = tokio::time::interval(BEAT.min(linger).max(Duration::from_millis(1)));
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let broken = loop {
            tokio::select! {
                () = stop.cancelled() => break None,
                () = self.shared.unpublished.cancelled() => {
                    break Some(LinkError::Protocol("the publication opsmantik_feed does not tell everything any more"));
                }
                message = self.link.next() => {
                    if let Err(error) = self.take(message).await {
                        break Some(error);
                    }
                }
                _ = beat.tick() => {
                    if self.shared.close_if_unwatched(linger) {
                        break None;
                    }
                    if let Err(error) = self.beat().await {
                        break Some(error);
                    }
                }
            }
        };
        match broken {
            None => {
                tracing::info!("the change feed ends");
                let farewell = tokio::time::timeout(WRITE_LIMIT, self.link.close());
                drop(farewell.await);
                false
            }
            Some(error) => {
                tracing::warn!(%error, "the change log cannot be read any more");
                true
            }
        }
    }

    async fn beat(&mut self) -> Result<(), LinkError> {
        if self.heard.elapsed() > SILENCE {
            return Err(LinkError::Protocol("the database says nothing any more"));
        }
        self.shared.beat.notify_waiters();
        let (reached, bytes) = {
            let state = self.shared.state();
            (state.log.reached().lsn, state.log.bytes())
        };
        metrics::gauge!(telemetry::FEED_LOG_BYTES).set(bytes as f64);
        self.confirm(reached).await
    }

    async fn confirm(&mut self, reached: u64) -> Result<(), LinkError> {
        self.confirmed = self.confirmed.max(reached);
        let confirm = self.link.confirm(self.confirmed);
        let slow = || LinkError::Protocol("the database takes no word any more");
        tokio::time::timeout(WRITE_LIMIT, confirm).await.unwrap_or_else(|_| Err(slow()))
    }

    async fn take(&mut self, message: Result<Bytes, LinkError>) -> Result<(), LinkError> {
        const BROKEN: LinkError = LinkError::Protocol("a message of the log that cannot be understood");
        let mut message = message?;
        self.heard = Instant::now();
        match message.first() {
            Some(b'w') if message.len() > DATA_HEAD => {
                message.advance(DATA_HEAD);
                let mut state = self.shared.state();
                self.decoder.read(message, &mut |said| state.say(said)).map_err(|error| {
                    tracing::error!(%error, "the change log cannot be understood");
                    BROKEN
                })
            }
            Some(b'k') => {
                let keepalive = parse_keepalive_message(&message).map_err(|_| BROKEN)?;
                // Every commit record that begins before this place was sent before this message.
                let reached = {
                    let mut state = self.shared.state();
                    state.log.reach(keepalive.wal_end);
                    state.log.reached().lsn
                };
                if keepalive.reply_requested { self.confirm(reached).await } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}

/// Asks the database what it shows, until the feed is over.
async fn ask(shared: Arc<Shared>, places: Places) {
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut idle = 0;
    loop {
        tokio::select! {
            () = shared.ended() => return,
            _ = beat.tick() => {}
        }
        idle = if shared.state().subscribers == 0 { idle + 1 } else { 0 };
        if idle % IDLE_BEATS != 0 {
            continue;
        }
        let asked = tokio::select! {
            () = shared.ended() => return,
            asked = tokio::time::timeout(ASK_LIMIT, places.store.feed_moment()) => asked,
        };
        match asked {
            Ok(Ok(moment)) => {
                if !moment.published {
                    shared.unpublished.cancel();
                }
                let mut state = shared.state();
                let lag = moment.written.saturating_sub(state.log.reached().lsn);
                metrics::gauge!(telemetry::FEED_LAG_BYTES).set(lag as f64);
                state.told.show(moment.snapshot, moment.written);
            }
            Ok(Err(error)) => tracing::debug!(%error, "the database does not say what it shows"),
            Err(_) => tracing::debug!("the database takes too long to say what it shows"),
        }
    }
}
