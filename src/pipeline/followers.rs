//! The followers of a paid visit: stored sessions that are ads-assisted by it, or no longer are.
//!
//! ```text
//! batch ─▶ few: judge and correct them; many: note the fingerprint ─▶ commit
//! sweep ─▶ for each that is noted: pass the gate, lock it ─▶ judge and correct the next some, note where to go on ─▶ commit ─▶ again
//! ```
//!
//! A paid visit has as many followers as its fingerprint has sessions, which nobody bounds; so what a batch and what a step of the [`sweep`]
//! look at is. Each session is judged by the table as it is then, under the lock of its fingerprint: it does not matter who comes to it, how
//! often, and what happened in between. Whatever is new or changes meanwhile asks for its own history under the same lock.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::domain::ads_history::{Reach, WINDOW};
use crate::domain::attribution::Attribution;
use crate::domain::id::{SessionKey, SiteId};
use crate::domain::rematch::Touched;
use crate::domain::session::Session;
use crate::store::ads_history::{Follower, Followers, Visit};
use crate::store::error::StoreError;
use crate::store::locks::{self, LockName};
use crate::store::transaction::{Purpose, Transaction};
use crate::store::{self, Store};
use crate::telemetry;

/// Most followers that one transaction looks at: some tens of milliseconds, in which others with the same fingerprint wait.
pub const AT_ONCE: usize = 500;
/// How often the sweep looks.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Between two steps of it: events come first.
const BREATH: Duration = Duration::from_millis(50);
/// Fingerprints of one look-up.
const PAGE: i64 = 100;

/// The stored sessions in a batch's reaches, one a fingerprint. `own` are the sessions of the batch as it writes them, which are left out.
pub(super) async fn find(tx: &Transaction<'_>, reaches: Vec<Reach>, own: &[&Session]) -> Result<Followers, StoreError> {
    // Each has its share, so that a fingerprint with very many takes nothing from the others.
    let share = (AT_ONCE / reaches.len().max(1)).max(1);
    let mut followers = store::ads_history::followers(tx, &reaches, share).await?;
    let known: HashSet<SessionKey> = own.iter().map(|session| session.key).collect();
    followers.found.retain(|follower| !known.contains(&follower.visit.key));
    Ok(followers)
}

/// Corrects them, and notes the reaches that have too many; the sessions that it corrected.
pub(super) async fn correct(
    tx: &Transaction<'_>,
    followers: Followers,
    own: &[&Session],
) -> Result<Vec<SessionKey>, StoreError> {
    store::late_followers::note(tx, &followers.left).await?;
    fix(tx, followers.found, own).await
}

/// Judges followers and writes those that have another attribution now.
async fn fix(tx: &Transaction<'_>, followers: Vec<Follower>, own: &[&Session]) -> Result<Vec<SessionKey>, StoreError> {
    let visits: Vec<Visit> = followers.iter().map(|follower| follower.visit.clone()).collect();
    let answers = judge(tx, &visits, own).await?;
    let mut fixes: Vec<(Follower, Attribution)> = followers
        .into_iter()
        .zip(answers)
        .map(|(follower, follows)| {
            (follower, if follows { Attribution::AdsAssisted } else { Attribution::OrganicReferral })
        })
        .filter(|(follower, attribution)| follower.attribution != *attribution)
        .collect();
    fixes.sort_unstable_by_key(|(follower, _)| follower.visit.key);
    store::ads_history::correct(tx, &fixes).await?;
    Ok(fixes.into_iter().map(|(follower, _)| follower.visit.key).collect())
}

/// For each visit: is there an earlier paid visit in its window, in the table or among the batch's own sessions?
pub(super) async fn judge(tx: &Transaction<'_>, visits: &[Visit], own: &[&Session]) -> Result<Vec<bool>, StoreError> {
    let known: Vec<SessionKey> = own.iter().map(|session| session.key).collect();
    let in_table = store::ads_history::follow_an_ad(tx, visits, &known).await?;
    let mut paid: HashMap<(SiteId, &str), Vec<DateTime<Utc>>> = HashMap::new();
    for session in own.iter().filter(|session| session.is_direct()) {
        if let Some(fingerprint) = session.fingerprint() {
            paid.entry((session.key.site_id, fingerprint)).or_default().push(session.created_at);
        }
    }
    let in_batch = |visit: &Visit| {
        let times = paid.get(&(visit.key.site_id, visit.fingerprint.as_str()));
        times.is_some_and(|times| times.iter().any(|at| *at < visit.created_at && *at >= visit.created_at - WINDOW))
    };
    Ok(visits.iter().zip(in_table).map(|(visit, in_table)| in_table || in_batch(visit)).collect())
}

/// Corrects, until `stop`, what batches have noted. Two servers may do so at once: a fingerprint is worked on by one at a time.
pub async fn sweep(store: Store, stop: CancellationToken) {
    loop {
        let pause = match settle(&store, &stop).await {
            Ok(true) => BREATH,
            Ok(false) => SWEEP_EVERY,
            Err(error) => {
                tracing::debug!(%error, "cannot look for followers that wait");
                SWEEP_EVERY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One step for each fingerprint of which followers wait, in turn, so that none waits for all of another's; whether there is more to do.
pub async fn settle(store: &Store, stop: &CancellationToken) -> Result<bool, StoreError> {
    let mut place = (SiteId::from_uuid(Uuid::nil()), String::new());
    let (mut waiting, mut more) = (0u32, false);
    loop {
        let page = store.late_followers((place.0, &place.1), PAGE).await?;
        for (site, fingerprint) in &page {
            if stop.is_cancelled() {
                return Ok(more);
            }
            match step(store, *site, fingerprint).await {
                Ok(true) => (waiting, more) = (waiting + 1, true),
                Ok(false) => {}
                Err(error) => {
                    waiting += 1;
                    tracing::warn!(%error, site.id = %site, "followers of a paid visit wait to be corrected");
                }
            }
        }
        match page.into_iter().next_back() {
            Some(last) => place = last,
            None => break,
        }
    }
    metrics::gauge!(telemetry::LATE_FOLLOWERS).set(waiting);
    Ok(more)
}

/// Corrects the next followers of a fingerprint; whether some are left.
async fn step(store: &Store, site: SiteId, fingerprint: &str) -> Result<bool, StoreError> {
    let tx = store.begin(Purpose::Serve).await?;
    locks::pass(&tx, &[site], vec![LockName::fingerprint(site, fingerprint)]).await?;
    // Read under the lock: another server may have been here.
    let Some((reach, place)) = store::late_followers::waiting(&tx, site, fingerprint).await? else {
        tx.rollback().await?;
        return Ok(false);
    };
    let (mut place, mut looked_at, mut followers) = (Some(place), 0, Vec::new());
    while let Some(from) = place.filter(|_| looked_at < AT_ONCE) {
        let next = store::ads_history::next_followers(&tx, &reach, from, AT_ONCE - looked_at).await?;
        looked_at += next.looked_at;
        followers.extend(next.found);
        place = next.left.or_else(|| reach.beyond(from.month));
    }
    let mut touched = Touched::default();
    fix(&tx, followers, &[]).await?.into_iter().for_each(|key| touched.credited(key));
    // Their calls are matched again by the sweep of calls.
    let sites = store::rematches::sites_with_calls(&tx, &touched).await?;
    store::rematches::note(&tx, touched.of_sites(&sites)).await?;
    store::late_followers::go_on(&tx, site, fingerprint, place).await?;
    tx.commit().await?;
    metrics::counter!(telemetry::LATE_FOLLOWERS_LOOKED_AT_TOTAL).increment(looked_at as u64);
    Ok(place.is_some())
}
