//! From pushes to matched calls: one transaction a site, which sees all of the site's events or waits for them.
//!
//! ```text
//! record ─▶ close the site's gate ─▶ merge the pushes ─▶ find candidates, decide (domain) ─▶ write calls ─▶ credit sessions ─▶ commit
//! settle ─▶ the same for calls that something late has touched (noted by the pipeline in its own transaction)
//! ```
//!
//! Whoever writes events of a site passes its gate, whoever matches closes it; so a call that is pushed before its click is processed
//! ends with the same match as one that is pushed after, whatever races. What was noted and not settled, because a server died in between, the
//! [`sweep`] settles.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::domain::call::{ReviewStatus, Told};
use crate::domain::id::{CallId, SiteId, UserId};
use crate::domain::outcome::Unavailable;
use crate::domain::push::Push;
use crate::domain::recorded::{Call, Sale};
use crate::seats::Seats;
use crate::store::error::{Fault, StoreError};
use crate::store::transaction::{Purpose, Transaction};
use crate::store::{self, Store, locks};
use crate::telemetry;
use matching::Evidence;

pub mod caller_key;
mod matching;

/// Most calls of one transaction: the gate of the site is closed meanwhile. So many of one month share one.
pub const CHUNK: usize = 100;
/// As many are matched again in one transaction: events of the site wait at its gate meanwhile, and perhaps somebody for an answer.
const SETTLE_CHUNK: usize = 16;
/// Who has locked a call, such as a person who judges it, is waited for so long; not with the site's gate closed, but by trying again.
const ROW_PATIENCE: Duration = Duration::from_secs(3);
/// As that, for calls that the sweep will come back to.
const SETTLE_PATIENCE: Duration = Duration::from_millis(500);
/// How often the sweep looks.
const SWEEP_EVERY: Duration = Duration::from_secs(2);
/// Sites that one look settles.
const SWEEP_SITES: i64 = 100;

/// Transactions at once: each holds a connection, also while it waits for its site's gate.
const SEATS: usize = 3;
/// Nobody waits longer for a seat.
const PATIENCE: Duration = Duration::from_secs(5);

/// Records and judges calls. Clones share the seats: the calls of a site are worked on by one at a time.
#[derive(Clone)]
pub struct Calls {
    store: Store,
    seats: Arc<Seats>,
}

/// What a push did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Created,
    Merged,
    Unchanged,
}

impl Effect {
    const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Merged => "merged",
            Self::Unchanged => "unchanged",
        }
    }
}

/// A call after a push.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    pub call: Call,
    pub effect: Effect,
}

/// What a person says about a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Confirm(Option<Sale>),
    Junk,
    Reopen,
}

impl Decision {
    fn status(&self) -> ReviewStatus {
        match self {
            Self::Confirm(_) => ReviewStatus::Confirmed,
            Self::Junk => ReviewStatus::Junk,
            Self::Reopen => ReviewStatus::Open,
        }
    }

    fn sale(&self) -> Option<&Sale> {
        match self {
            Self::Confirm(sale) => sale.as_ref(),
            Self::Junk | Self::Reopen => None,
        }
    }
}

impl Calls {
    pub fn new(store: Store) -> Self {
        Self { store, seats: Arc::new(Seats::new(SEATS, PATIENCE)) }
    }

    /// Runs a transaction in a seat, again while only others were in its way. Between the tries the seat is free: who waits for a call that somebody
    /// has locked keeps nobody from the site's other calls.
    async fn seated<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        site: SiteId,
        run: impl Fn() -> F,
    ) -> Result<T, Failed> {
        let mut tries = Tries::within(ROW_PATIENCE);
        loop {
            let seat = self.seats.take(site).await.ok_or(Failed::Unavailable(Unavailable::Busy))?;
            let ended = run().await;
            drop(seat);
            match ended {
                Err(error) if tries.another(&error).await => {}
                ended => return Ok(ended?),
            }
        }
    }

    /// Records pushes of one site, [`CHUNK`] at most, and matches their calls: all of them in one transaction, or none. One result a push, in
    /// the same order; a call that is pushed twice here tells its final state both times. Pushes of one month look for their visits in
    /// the same few partitions, so whoever has many keeps months apart.
    pub async fn record(&self, site: SiteId, pushes: &[Push]) -> Result<Vec<Recorded>, Failed> {
        debug_assert!(pushes.len() <= CHUNK, "the gate of the site is closed meanwhile");
        let recorded = self.seated(site, || record_once(&self.store, site, pushes)).await?;
        for one in &recorded {
            let (effect, method) = (one.effect.name(), one.call.found.decision.method.name());
            metrics::counter!(telemetry::CALL_PUSHES_TOTAL, "effect" => effect, "method" => method).increment(1);
        }
        Ok(recorded)
    }

    /// Judges a call on behalf of a token; nothing if the site has no such call.
    pub async fn review(
        &self,
        site: SiteId,
        id: CallId,
        decision: &Decision,
        signature: &str,
    ) -> Result<Option<Call>, Failed> {
        self.seated(site, || review_once(&self.store, site, id, decision, signature)).await
    }

    /// Judges a call as a person: the policies of the database decide whether they may. Nothing if there is no such call that they may
    /// judge.
    pub async fn review_as(
        &self,
        user: UserId,
        site: SiteId,
        id: CallId,
        decision: &Decision,
        signature: &str,
    ) -> Result<Option<Call>, Failed> {
        let judged = self.seated(site, || review_as_once(&self.store, user, site, id, decision, signature)).await?;
        if let (Some(_), Decision::Reopen) = (&judged, decision) {
            // The database has noted it; what fails here is done by the sweep.
            if let Err(error) = settle(&self.store, site, None).await {
                tracing::warn!(%error, site.id = %site, "an opened call is matched again later");
            }
        }
        Ok(judged)
    }
}

/// Why a call could not be recorded or judged.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error("nothing can be stored now")]
    Unavailable(Unavailable),
    /// PostgreSQL will never take it.
    #[error("the database refuses it: {0}")]
    Refused(StoreError),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        match error.fault {
            Fault::Refused | Fault::UnknownSite => Self::Refused(error),
            Fault::Away | Fault::Conflict | Fault::MissingPartition => {
                tracing::warn!(%error, "calls cannot be stored now");
                Self::Unavailable(Unavailable::Database)
            }
        }
    }
}

async fn record_once(store: &Store, site: SiteId, pushes: &[Push]) -> Result<Vec<Recorded>, StoreError> {
    let keys: Vec<_> = pushes.iter().map(|push| &push.key).collect();
    let told: Vec<Told> = pushes.iter().cloned().map(Told::begin).collect();
    let told: Vec<&Told> = told.iter().collect();
    let mut evidence = Evidence::default();
    let tx = store.reserve(Purpose::Serve).await?;
    // What most calls need is asked along with the rest, behind the gate.
    let (begun, closed, region, stored, looked) = tokio::join!(
        biased;
        tx.enter(),
        locks::close(&tx, site),
        store::sites::region(&tx, site),
        store::calls::lock_by_key(&tx, site, &keys),
        evidence.look(&tx, site, &told),
    );
    begun?;
    closed?;
    let region = region?;
    let stored = stored?;
    looked?;
    let mut calls: HashMap<_, Call> = stored.into_iter().map(|call| (call.key.clone(), call)).collect();
    let mut changed = Vec::new();
    let mut effects = Vec::with_capacity(pushes.len());
    for push in pushes {
        let effect = match calls.get_mut(&push.key) {
            Some(call) => match call.told.merge(push.clone()) {
                true => Effect::Merged,
                false => Effect::Unchanged,
            },
            None => {
                calls.insert(push.key.clone(), Call::begin(push.clone()));
                Effect::Created
            }
        };
        if effect != Effect::Unchanged {
            changed.push(push.key.clone());
        }
        effects.push(effect);
    }
    let mut all: Vec<Call> = calls.into_values().collect();
    all.sort_by_key(|call| call.id);
    let settled = matching::settle(&tx, site, region.as_deref(), all, &changed, evidence).await?;
    let written = settled.commit(tx).await?;

    let written: HashMap<_, &Call> = written.iter().map(|call| (&call.key, call)).collect();
    let result = |(push, effect): (&Push, Effect)| {
        let call = written.get(&push.key).map(|call| (*call).clone());
        call.map(|call| Recorded { call, effect })
    };
    let recorded: Option<Vec<_>> = pushes.iter().zip(effects).map(result).collect();
    recorded.ok_or_else(|| StoreError::unreadable("record calls", "a written call did not come back"))
}

/// Matches again the calls of a site that wait for it, a few at a time; no more are begun after `until`, and the [`sweep`] goes on with the rest.
pub async fn settle(store: &Store, site: SiteId, until: Option<Instant>) -> Result<(), Failed> {
    while patiently(SETTLE_PATIENCE, || settle_some(store, site)).await? {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
    }
    Ok(())
}

/// Whether there may be more.
async fn settle_some(store: &Store, site: SiteId) -> Result<bool, StoreError> {
    let tx = store.begin(Purpose::Serve).await?;
    locks::close(&tx, site).await?;
    let noted = store::rematches::noted(&tx, site, SETTLE_CHUNK as i64).await?;
    if noted.is_empty() {
        tx.rollback().await?;
        return Ok(false);
    }
    let region = store::sites::region(&tx, site).await?;
    let calls = store::calls::lock(&tx, site, &noted).await?;
    let settled = matching::settle(&tx, site, region.as_deref(), calls, &[], Evidence::default()).await?;
    store::rematches::forget(&tx, site, &noted).await?;
    settled.commit(tx).await?;
    metrics::counter!(telemetry::CALLS_REMATCHED_TOTAL).increment(noted.len() as u64);
    Ok(noted.len() == SETTLE_CHUNK)
}

/// Settles, until `stop`, whatever waits: what a server that died has left, what could not be settled at once, what a dashboard has opened again.
pub async fn sweep(store: Store, stop: CancellationToken) {
    loop {
        match store.sites_with_rematches(SWEEP_SITES).await {
            Ok(sites) => {
                for site in sites {
                    if let Err(error) = settle(&store, site, None).await {
                        tracing::warn!(%error, site.id = %site, "calls wait to be matched again");
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "cannot look for calls that wait"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP_EVERY) => {}
        }
    }
}

async fn review_once(
    store: &Store,
    site: SiteId,
    id: CallId,
    decision: &Decision,
    signature: &str,
) -> Result<Option<Call>, StoreError> {
    let tx = store.begin(Purpose::Serve).await?;
    locks::close(&tx, site).await?;
    // Nobody is waited for from here on.
    store::calls::lock(&tx, site, &[id]).await?;
    let Some(mut call) = judge(&tx, site, id, decision, signature).await? else {
        tx.rollback().await?;
        return Ok(None);
    };
    if call.is_open() {
        let region = store::sites::region(&tx, site).await?;
        let evidence = Evidence::default();
        let settled = matching::settle(&tx, site, region.as_deref(), vec![call.clone()], &[], evidence).await?;
        store::rematches::forget(&tx, site, &[id]).await?;
        call = settled.commit(tx).await?.pop().unwrap_or(call);
    } else {
        tx.commit().await?;
    }
    Ok(Some(call))
}

async fn review_as_once(
    store: &Store,
    user: UserId,
    site: SiteId,
    id: CallId,
    decision: &Decision,
    signature: &str,
) -> Result<Option<Call>, StoreError> {
    let tx = store.begin(Purpose::Act(user)).await?;
    let judged = judge(&tx, site, id, decision, signature).await?;
    tx.commit().await?;
    Ok(judged)
}

async fn judge(
    tx: &Transaction<'_>,
    site: SiteId,
    id: CallId,
    decision: &Decision,
    signature: &str,
) -> Result<Option<Call>, StoreError> {
    store::calls::review(tx, site, id, decision.status(), decision.sale(), signature).await
}

/// Runs a transaction, again while only others were in its way.
async fn patiently<T, F: Future<Output = Result<T, StoreError>>>(
    patience: Duration,
    run: impl Fn() -> F,
) -> Result<T, StoreError> {
    let mut tries = Tries::within(patience);
    loop {
        match run().await {
            Err(error) if tries.another(&error).await => {}
            ended => return ended,
        }
    }
}

/// How often something is tried.
struct Tries {
    until: Instant,
    failed: u32,
}

impl Tries {
    fn within(patience: Duration) -> Self {
        Self { until: Instant::now() + patience, failed: 0 }
    }

    /// Whether to try once more, which then is due.
    async fn another(&mut self, error: &StoreError) -> bool {
        let again = error.fault == Fault::Conflict && Instant::now() < self.until;
        if again {
            self.failed += 1;
            tokio::time::sleep(Duration::from_millis(rand::random_range(1..=10)) * self.failed.min(10)).await;
        }
        again
    }
}
