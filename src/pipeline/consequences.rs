//! What follows from the events of a batch beyond their own rows: the ads history of its visits, the followers of its paid visits, calls.
//!
//! Only of sessions whose history is not settled: ask for it. Only when a paid visit appeared or moved: look for the stored sessions that follow
//! it, ask for their history, correct them, or note them if there are too many for a batch (`followers.rs`). Only when something came in that
//! calls may care for: note the calls that have to be matched again.
//!
//! What is asked rests on what was stored before the batch, and on how the batch changes it; the answers are the same whether the batch's own
//! rows are written by then or not.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::followers;
use crate::domain::ads_history;
use crate::domain::event::Event;
use crate::domain::id::{SessionKey, SiteId};
use crate::domain::rematch::Touched;
use crate::domain::session::Session;
use crate::store;
use crate::store::ads_history::{Followers, Visit};
use crate::store::error::StoreError;
use crate::store::locks::{self, LockName};
use crate::store::transaction::Transaction;

/// A session of the batch: as it was stored (none: it is new) and as it is with the batch's events.
pub(super) struct Change {
    pub before: Option<Session>,
    pub after: Session,
}

impl Change {
    /// Whether there is one, or only copies came in.
    pub fn is_one(&self) -> bool {
        self.before.as_ref() != Some(&self.after)
    }
}

/// The sessions of a batch.
type Changes = BTreeMap<SessionKey, Change>;

/// What is to be written beside a batch's events and sessions.
#[derive(Default)]
pub(super) struct Consequences {
    followers: Followers,
    /// Of sites that have calls which it may touch.
    touched: Touched,
}

impl Consequences {
    /// Asks the database, and settles for the batch's sessions whether they follow an ad. `told` are the fingerprints that were locked before
    /// the sessions were read, `new` the places of the events that `changes` has been made of.
    pub async fn ask(
        tx: &Transaction<'_>,
        changes: &mut Changes,
        told: &HashSet<LockName>,
        placed: &[(SessionKey, &Event)],
        new: &HashSet<usize>,
    ) -> Result<Self, StoreError> {
        if !changes.values().any(Change::is_one) {
            return Ok(Self::default());
        }
        let open = open(tx, changes, told).await?;
        let own = own(changes);
        let asked: Vec<Visit> = open
            .iter()
            .map(|key| &changes[key].after)
            .filter(|session| !session.is_direct())
            .filter_map(visit)
            .collect();
        let mut may_touch = touched(changes, placed, new);
        open.iter().filter(|key| changes[key].before.is_some()).for_each(|key| may_touch.credited(*key));
        let (answers, followers, sites) = tokio::join!(
            biased;
            followers::judge(tx, &asked, &own),
            followers::find(tx, ads_history::joined(reaches(changes)), &own),
            store::rematches::sites_with_calls(tx, &may_touch),
        );
        drop(own);
        // In the order in which they were sent: after the first that failed the others only hear that something had.
        let (answers, followers, sites) = (answers?, followers?, sites?);
        let assisted: HashSet<SessionKey> =
            asked.iter().zip(answers).filter(|(_, follows)| *follows).map(|(visit, _)| visit.key).collect();
        for key in open {
            if let Some(change) = changes.get_mut(&key) {
                change.after.ads_assisted = assisted.contains(&key);
            }
        }
        let touched =
            if sites.is_empty() { Touched::default() } else { touched(changes, placed, new).of_sites(&sites) };
        Ok(Self { followers, touched })
    }

    /// Whether nothing is to be written.
    pub fn are_none(&self) -> bool {
        self.followers.found.is_empty() && self.followers.left.is_empty() && self.touched.is_empty()
    }

    /// Writes them, after the sessions; the sites of which calls are to be matched again.
    pub async fn write(mut self, tx: &Transaction<'_>, changes: &Changes) -> Result<Vec<SiteId>, StoreError> {
        let corrected = followers::correct(tx, self.followers, &own(changes)).await?;
        if !corrected.is_empty() {
            let mut credited = Touched::default();
            corrected.into_iter().for_each(|key| credited.credited(key));
            let sites = store::rematches::sites_with_calls(tx, &credited).await?;
            self.touched.credited.extend(credited.of_sites(&sites).credited);
        }
        // All at once, since they are noted in their order: two servers would otherwise wait for each other.
        store::rematches::note(tx, self.touched).await
    }
}

/// What calls may care for: the sessions that changed, with their new events.
fn touched(changes: &Changes, placed: &[(SessionKey, &Event)], new: &HashSet<usize>) -> Touched {
    let mut by_session: HashMap<SessionKey, Vec<&Event>> = HashMap::new();
    for (place, (key, event)) in placed.iter().enumerate() {
        if new.contains(&place) {
            by_session.entry(*key).or_default().push(event);
        }
    }
    let mut touched = Touched::default();
    for (key, change) in changes.iter().filter(|(_, change)| change.is_one()) {
        let events = by_session.remove(key).unwrap_or_default();
        touched.by_session(change.before.as_ref(), &change.after, &events);
    }
    touched
}

/// The sessions of the batch of which nobody knows yet whether they follow an ad. Locks the fingerprints that none of its events has told. What is
/// stored of a session with a fingerprint that was locked before holds, unless the batch itself changes what it rests on: whoever moves
/// a paid visit corrects its followers under the same lock.
async fn open(
    tx: &Transaction<'_>,
    changes: &Changes,
    told: &HashSet<LockName>,
) -> Result<Vec<SessionKey>, StoreError> {
    let lock = |session: &Session| Some(LockName::fingerprint(session.key.site_id, session.fingerprint()?));
    let names = changes.values().flat_map(|change| [change.before.as_ref().and_then(lock), lock(&change.after)]);
    let late: HashSet<LockName> = names.flatten().filter(|name| !told.contains(name)).collect();
    locks::take(tx, late.iter().copied().collect()).await?;

    let moved: HashSet<LockName> =
        reaches(changes).map(|reach| LockName::fingerprint(reach.site_id, &reach.fingerprint)).collect();
    let settled = |change: &Change| {
        ads_history::settled(change.before.as_ref(), &change.after)
            && lock(&change.after).is_none_or(|name| !late.contains(&name) && !moved.contains(&name))
    };
    Ok(changes.iter().filter(|(_, change)| !settled(change)).map(|(key, _)| *key).collect())
}

/// Whose history the batch changes.
fn reaches(changes: &Changes) -> impl Iterator<Item = ads_history::Reach> {
    changes.values().flat_map(|change| ads_history::reaches(change.before.as_ref(), &change.after))
}

/// The sessions of the batch as they will be.
fn own(changes: &Changes) -> Vec<&Session> {
    changes.values().map(|change| &change.after).collect()
}

fn visit(session: &Session) -> Option<Visit> {
    let fingerprint = session.fingerprint()?.to_owned();
    Some(Visit { key: session.key, fingerprint, created_at: session.created_at })
}
