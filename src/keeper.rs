//! The partition keeper: a task in every running server that makes months ahead of time.
//!
//! It keeps the month before (late deliveries and visits over midnight belong there), the current one and [`MONTHS_AHEAD`] more, and mends leaves
//! that somebody disturbed. A month that was dropped it never makes again by itself: only an event that belongs there does. Two keepers at once do not fight: the database function serialises them and gives up on locks quickly.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::domain::event::IMPORT_MONTHS;
use crate::domain::month::Month;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::telemetry;

/// Months that are ready before they begin.
pub const MONTHS_AHEAD: i32 = 3;

/// A look at the months is cheap when nothing is missing.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// After a failure.
const RETRY: Duration = Duration::from_secs(10);

/// How far back a month is made on demand: imported history may be [`IMPORT_MONTHS`] old, its visit may have begun a month before, and its
/// job may have waited for a while.
const MONTHS_BACK: i32 = IMPORT_MONTHS.cast_signed() + 2;

/// Whether a month may be made on demand at all. Nobody fills the database with partitions by naming odd months.
pub fn may_make(month: Month, now: chrono::DateTime<Utc>) -> bool {
    let now = Month::of(now);
    (now.plus(-MONTHS_BACK)..=now.plus(MONTHS_AHEAD)).contains(&month)
}

/// Why a month may not be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Protected {
    #[error("it has not begun yet, and is kept ready for its first visit")]
    Future,
    #[error("it is the current month")]
    Current,
    #[error("it is the month before the current one: late deliveries and visits over midnight belong there")]
    Previous,
}

/// Whether a month may be dropped. What every keeper would make again at once may not.
pub fn may_drop(month: Month, now: chrono::DateTime<Utc>) -> Result<(), Protected> {
    let now = Month::of(now);
    if month > now {
        Err(Protected::Future)
    } else if month == now {
        Err(Protected::Current)
    } else if month == now.previous() {
        Err(Protected::Previous)
    } else {
        Ok(())
    }
}

/// The last month that goes when `keep` months stay: the current one counts, and so do those before it.
pub fn last_to_go(keep: u16, now: chrono::DateTime<Utc>) -> Month {
    Month::of(now).plus(-i32::from(keep))
}

/// Tells the keeper of a month that an event needs and that is not there; clones share it.
#[derive(Clone, Default)]
pub struct Nudge {
    wanted: Arc<Mutex<BTreeSet<Month>>>,
    bell: Arc<Notify>,
}

impl Nudge {
    /// Asks for a month. One that is out of all bounds is not made.
    pub fn want(&self, month: Month) {
        if may_make(month, Utc::now()) {
            self.put_back([month].into());
            self.bell.notify_one();
        }
    }

    /// Keeps months for the next look, without asking for an earlier one.
    fn put_back(&self, months: BTreeSet<Month>) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).extend(months);
    }

    fn take(&self) -> BTreeSet<Month> {
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The months that are there at any time.
pub fn kept(now: chrono::DateTime<Utc>) -> impl Iterator<Item = Month> {
    (-1..=MONTHS_AHEAD).map(move |ahead| Month::of(now).plus(ahead))
}

/// Makes what is missing at `now`; the names of the leaves made.
pub async fn keep(store: &Store, now: chrono::DateTime<Utc>) -> Result<Vec<String>, StoreError> {
    keep_also(store, now, &BTreeSet::new()).await
}

async fn keep_also(
    store: &Store,
    now: chrono::DateTime<Utc>,
    wanted: &BTreeSet<Month>,
) -> Result<Vec<String>, StoreError> {
    let mut made = Vec::new();
    // The months of every day first: an odd one that cannot be made must not cost the next.
    for month in kept(now).chain(wanted.iter().copied()) {
        made.extend(store.ensure_month(month).await?);
    }
    Ok(made)
}

/// Marks of vanished rows do not pile up. Nothing depends on it, so a failure waits for the next look.
async fn tidy(store: &Store) {
    match store.prune_vanished().await {
        Ok(0) => {}
        Ok(pruned) => tracing::debug!(pruned, "cleared away superfluous marks of vanished rows"),
        Err(error) => tracing::warn!(%error, "cannot clear away marks of vanished rows now"),
    }
}

/// Keeps until `stop`.
pub async fn run(store: Store, nudge: Nudge, stop: CancellationToken) {
    loop {
        let wanted = nudge.take();
        let pause = match keep_also(&store, Utc::now(), &wanted).await {
            Ok(made) => {
                if !made.is_empty() {
                    tracing::info!(partitions = ?made, "made partitions");
                    metrics::counter!(telemetry::PARTITIONS_MADE_TOTAL).increment(made.len() as u64);
                }
                tidy(&store).await;
                EVERY
            }
            Err(error) => {
                tracing::warn!(%error, "cannot keep partitions now");
                nudge.put_back(wanted);
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            // A missing month was met. Not more often than now and then, whoever asks.
            () = async { nudge.bell.notified().await; tokio::time::sleep(Duration::from_millis(200)).await } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_month_that_a_keeper_keeps_may_not_be_dropped() {
        let now = Utc::now();
        let this = Month::of(now);
        let told: Vec<_> = (-2..=2).map(|ahead| may_drop(this.plus(ahead), now)).collect();
        let refused = [Protected::Previous, Protected::Current, Protected::Future, Protected::Future].map(Err);
        assert_eq!((told[0], &told[1..]), (Ok(()), &refused[..]));
        assert_eq!(last_to_go(2, now), this.plus(-2), "the current and the one before it stay");
        assert_eq!(last_to_go(13, now), this.plus(-13));
    }

    #[tokio::test]
    async fn a_failure_keeps_what_is_wanted_and_rings_no_bell() {
        let nudge = Nudge::default();
        let month = Month::of(Utc::now()).plus(-5);
        nudge.want(month.plus(-MONTHS_BACK));
        assert!(nudge.take().is_empty(), "out of all bounds");
        nudge.want(month);
        nudge.bell.notified().await;
        nudge.put_back(nudge.take());
        let rung = tokio::time::timeout(Duration::from_millis(20), nudge.bell.notified()).await;
        assert!(rung.is_err(), "the keeper would not wait for its pause");
        assert_eq!(nudge.take(), [month].into());
    }
}
