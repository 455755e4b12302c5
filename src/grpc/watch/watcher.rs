//! One watch: from the tables into the log, without a gap and without a double.
//!
//! The rows that are there are read in pages, each in a short transaction of its own, so that a slow client holds neither a connection
//! nor a snapshot. A page counts once its snapshot covers all that the log has told so far. What the log tells of a row that was shown
//! is told if its page did not see it; what it tells of one that was not, a later page will show.
//!
//! A client that comes back goes on in the log where it stood. If the log does not reach back so far, it is told which rows were written
//! since, page by page again; and if rows have gone since, or nobody can tell, it begins anew.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use chrono::DateTime;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use uuid::Uuid;

use super::coverage::{Coverage, Edge, Key};
use super::rows::{Said, Watched};
use super::sources::{Log, Page, Tables, Unread};
use super::token::{Had, Mark, Tokens};
use crate::domain::id::SiteId;
use crate::domain::month::Month;
use crate::feed::{Lost, Step};
use crate::store::watch::{Seen, Span};

mod hearing;

/// A silent watch says so. The contract has 30 seconds.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// A client that takes no message for so long does not read at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// What came too early is asked again so often, after pauses that double up to so many times the first: for about nine seconds.
const TRIES: u32 = 40;
const LONGEST_PAUSE: u32 = 25;
/// The end of a snapshot waits so long for the log to pass what its pages saw: a token from behind it then repeats nothing.
const SETTLE: Duration = Duration::from_secs(1);
/// A row tells its writer by 32 bits, which is enough for so many transactions, and far from all.
const MAX_AGE: u64 = 1 << 30;

/// Calls have no month, and so come before all that have one.
const AFTER_CALLS: fn() -> Month = || Month::of(DateTime::UNIX_EPOCH);

/// What is watched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope {
    pub(super) site: SiteId,
    /// One partition, or all.
    pub(super) month: Option<Month>,
}

/// Why a watch ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client reads too slowly; with the last token that it will find in what it has not read.
    Slow { token: String },
    /// The log broke off, or the server stops.
    Away,
    /// The tables cannot be read as they should.
    Unread(Unread),
    /// Nobody listens.
    Gone,
}

/// Why the telling stops.
enum Stop {
    End(End),
    /// Rows came or went that no log tells of.
    Anew,
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

pub(super) struct Watcher<W: Watched, L, T> {
    scope: Scope,
    log: L,
    tables: Arc<T>,
    tokens: Tokens,
    out: mpsc::Sender<W::Answer>,
    coverage: Coverage,
    had: Option<Had>,
    /// Of the next change the first half was told.
    halved: bool,
    /// The client knows that it was shown everything ...
    ended: bool,
    /// ... and until then it stands no further than this, which is after all rows.
    almost: Edge,
    last_token: String,
    /// While it is not known yet how to go on: what the client came with.
    brought: Option<String>,
    said_at: Instant,
}

impl<W: Watched, L: Log, T: Tables<W>> Watcher<W, L, T> {
    pub(super) fn new(scope: Scope, log: L, tables: T, out: mpsc::Sender<W::Answer>) -> Self {
        Self {
            scope,
            log,
            tables: Arc::new(tables),
            tokens: Tokens::of(W::TABLE.name(), scope.site.as_uuid(), scope.month),
            out,
            coverage: Coverage::from(Edge::before_month(scope.month)),
            had: None,
            halved: false,
            ended: false,
            almost: Edge::before_month(scope.month),
            last_token: String::new(),
            brought: None,
            said_at: Instant::now(),
        }
    }

    /// Tells until something ends it.
    pub(super) async fn run(mut self, resume: Option<(Mark, String)>) -> End {
        match self.watch(resume).await {
            Err(end) => end,
            Ok(never) => match never {},
        }
    }

    async fn watch(&mut self, resume: Option<(Mark, String)>) -> Result<Infallible, End> {
        let mut goes_on = false;
        if let Some((mark, token)) = resume {
            self.last_token.clone_from(&token);
            self.brought = Some(token);
            goes_on = match self.resume(&mark).await {
                Ok(goes_on) => goes_on,
                Err(Stop::Anew) => false,
                Err(Stop::End(end)) => return Err(end),
            };
            self.brought = None;
        }
        loop {
            let told = if goes_on { self.tell().await } else { self.tell_anew().await };
            match told {
                Err(Stop::Anew) => goes_on = false,
                Err(Stop::End(end)) => return Err(end),
                Ok(never) => match never {},
            }
        }
    }

    /// Takes up where the client stood; false if it has to begin anew.
    async fn resume(&mut self, mark: &Mark) -> Result<bool, Stop> {
        if mark.lineage != self.log.lineage() {
            return Ok(false);
        }
        let scope = self.scope;
        if mark.position > self.log.position() {
            // From another server that is ahead of this one; or from a history that is no more, as after a restored backup.
            let since = mark.horizon;
            let seen = self.seen(move |tables| async move { tables.vanished(scope.month, since).await }).await?;
            if is_ahead(mark, &seen) {
                return Ok(false);
            }
        }
        if self.log.seek(mark.position) {
            (self.coverage, self.had, self.halved) = (Coverage::from(mark.shown), mark.had, mark.halved);
            self.ended = mark.shown == Edge::End;
            return Ok(true);
        }
        let had = match mark.had {
            // Older, and of more rows.
            Some(had) if had.to > mark.shown && mark.shown != Edge::End => had,
            Some(_) | None => Had { since: mark.horizon, to: mark.shown },
        };
        let seen = self.seen(move |tables| async move { tables.vanished(scope.month, had.since).await }).await?;
        if seen.what || is_ahead(mark, &seen) || seen.snapshot.xmax.saturating_sub(had.since) > MAX_AGE {
            return Ok(false);
        }
        self.had = Some(had);
        Ok(true)
    }

    async fn tell_anew(&mut self) -> Result<Infallible, Stop> {
        self.coverage = Coverage::from(Edge::before_month(self.scope.month));
        (self.had, self.halved, self.ended) = (None, false, false);
        // What makes a watch begin anew is often told more than once: for each leaf of a table, for instance. Nothing is shown yet, so
        // whatever the log tells is for the pages to show.
        self.meanwhile(sleep(T::AGAIN)).await;
        while self.log.try_next().map_err(|lost| self.lost(lost))?.is_some() {}
        self.say(self.mark(), Said::Start).await?;
        self.tell().await
    }

    async fn tell(&mut self) -> Result<Infallible, Stop> {
        if !self.ended {
            while let Edge::Before(from) = self.coverage.edge() {
                while let Some(entry) = self.log.try_next().map_err(|lost| self.lost(lost))? {
                    self.hear(&entry).await?;
                }
                self.settle();
                self.next_page(from).await?;
            }
            let late = Instant::now() + SETTLE;
            while !self.coverage.is_settled() && Instant::now() < late {
                self.listen(late).await?;
            }
            self.ended = true;
            self.say(self.mark(), Said::End).await?;
        }
        loop {
            let due = self.said_at + HEARTBEAT;
            self.listen(due).await?;
            if Instant::now() >= due {
                self.say(self.mark(), Said::Heartbeat).await?;
            }
        }
    }

    /// Shows the rows from a key on, as far as one page goes.
    async fn next_page(&mut self, from: Key) -> Result<(), Stop> {
        let mut from = from;
        // All but the end was told before: nothing is left, or the very last id.
        if W::TABLE.has_months() && self.scope.month.is_none() {
            self.almost = Edge::Before(from);
        } else {
            let after_all = self.scope.month.map_or_else(AFTER_CALLS, Month::next);
            self.almost = Edge::before_month(Some(after_all));
            if from.month != self.scope.month {
                from = Key { month: self.scope.month, id: Uuid::max() };
            }
        }
        // At the beginning of a month it is not known yet whether that month is there.
        if W::TABLE.has_months() && self.scope.month.is_none() && from.id.is_nil() {
            let seen = self.seen(move |tables| async move { tables.next_month(from.month).await }).await?;
            let end = seen.what.map_or(Edge::End, |month| Edge::before_month(Some(month)));
            if end > self.coverage.edge() {
                self.coverage.extend(end, seen.snapshot, seen.lsn);
            }
            if seen.what.is_none() {
                return Ok(());
            }
            from.month = seen.what;
        }
        // Behind what the client had, every row is new to it.
        let had = self.had.filter(|had| had.to.is_after(from));
        let to = match had {
            Some(Had { to: Edge::Before(to), .. }) if to.month == from.month => {
                to.id.as_u128().checked_sub(1).map_or(Uuid::nil(), Uuid::from_u128)
            }
            Some(_) | None => Uuid::max(),
        };
        let span = Span { month: from.month, from: from.id, to, since: had.map(|had| had.since) };
        let seen = self.seen(move |tables| async move { tables.page(span).await }).await?;
        let Page { rows, end, odd } = seen.what;
        if odd && had.is_some() {
            // The client may have the row as it was, and cannot be told what has become of it.
            return Err(Stop::Anew);
        }
        for (id, row) in rows {
            let shown = self.told_to(self.edge_after(Key { month: from.month, id }));
            self.say(Mark { shown, ..self.mark() }, Said::There(row)).await?;
        }
        let end = self.edge_after(Key { month: from.month, id: end });
        self.coverage.extend(end, seen.snapshot, seen.lsn);
        Ok(())
    }

    /// How far the client knows that it was shown everything.
    fn told_to(&self, edge: Edge) -> Edge {
        if edge == Edge::End && !self.ended { self.almost } else { edge }
    }

    /// The edge behind a key; at the end of the last month that is the end.
    fn edge_after(&self, key: Key) -> Edge {
        let next_month = || match key.month {
            Some(month) if self.scope.month.is_none() => Edge::before_month(Some(month.next())),
            Some(_) | None => Edge::End,
        };
        Edge::after(key).unwrap_or_else(next_month)
    }

    /// What the tables say, as soon as it covers all that the log has told.
    async fn seen<V, F>(&mut self, ask: impl Fn(Arc<T>) -> F) -> Result<Seen<V>, Stop>
    where
        F: Future<Output = Result<Seen<V>, Unread>> + Send,
        V: Send,
    {
        for tried in 0..TRIES {
            let asked = ask(self.tables.clone());
            let seen = self.meanwhile(asked).await.map_err(End::Unread)?;
            if self.log.covers(&seen.snapshot) {
                return Ok(seen);
            }
            let pause = T::AGAIN * 2u32.saturating_pow(tried).min(LONGEST_PAUSE);
            self.meanwhile(sleep(pause)).await;
        }
        tracing::warn!(table = W::TABLE.name(), "queries do not show what the change log has told long ago");
        Err(End::Unread(Unread::Database).into())
    }

    /// Waits for something, and gives a sign of life when that takes long.
    async fn meanwhile<V>(&mut self, waiting: impl Future<Output = V>) -> V {
        let mut waiting = std::pin::pin!(waiting);
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return done,
                () = sleep_until(self.said_at + HEARTBEAT) => {
                    // Who has not read the last messages needs no sign, and must not hold up what goes on here.
                    let token = self.brought.clone().unwrap_or_else(|| self.tokens.seal(&self.mark()));
                    if self.out.try_send(W::answer(token.clone(), Said::Heartbeat)).is_ok() {
                        self.last_token = token;
                    }
                    self.said_at = Instant::now();
                }
            }
        }
    }

    /// Hears the next step of the log, if it comes in time.
    async fn listen(&mut self, late: Instant) -> Result<(), Stop> {
        let step = tokio::select! {
            step = self.log.next() => step.map_err(|lost| self.lost(lost))?,
            () = sleep_until(late) => return Ok(()),
        };
        match step {
            Step::Entry(entry) => self.hear(&entry).await?,
            Step::Moved => {}
        }
        self.settle();
        Ok(())
    }

    fn settle(&mut self) {
        self.coverage.settle(self.log.position().lsn, self.log.horizon());
        if self.coverage.is_settled() && self.coverage.edge() == Edge::End {
            self.had = None;
        }
    }

    /// What the client has when it has all that was said.
    fn mark(&self) -> Mark {
        let shown = self.told_to(self.coverage.edge());
        Mark {
            lineage: self.log.lineage(),
            position: self.log.position(),
            halved: self.halved,
            horizon: self.log.horizon(),
            shown,
            had: self.had.filter(|had| shown != Edge::End && had.to > shown),
        }
    }

    async fn say(&mut self, mark: Mark, said: Said<W::Row>) -> Result<(), Stop> {
        let token = self.tokens.seal(&mark);
        match timeout(PATIENCE, self.out.send(W::answer(token.clone(), said))).await {
            Ok(Ok(())) => {
                (self.last_token, self.said_at) = (token, Instant::now());
                Ok(())
            }
            Ok(Err(_closed)) => Err(End::Gone.into()),
            Err(_elapsed) => Err(self.lost(Lost::Slow).into()),
        }
    }

    fn lost(&self, lost: Lost) -> End {
        match lost {
            Lost::Slow => End::Slow { token: self.last_token.clone() },
            Lost::Away => End::Away,
        }
    }
}

/// Whether a client has seen more than the database has ever written.
fn is_ahead<T>(mark: &Mark, seen: &Seen<T>) -> bool {
    mark.position.lsn > seen.lsn || mark.horizon > seen.snapshot.xmax
}
