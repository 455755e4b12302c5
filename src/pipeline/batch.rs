//! A batch in one transaction with a fixed number of statements, whatever its size.
//!
//! Pass the gates of the sites and lock the sessions by name; load them from the three months they can be in; insert the events and learn which are new; merge the new ones
//! into their sessions (pure); lock the fingerprints; ask for their ads history; write the sessions. Only when a paid visit appeared or moved:
//! look for the stored sessions that follow it, ask for their history, correct them. Only when something came in that calls may care for:
//! note the calls that have to be matched again.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};

use crate::domain::ads_history::{self, Reach, WINDOW};
use crate::domain::attribution::Attribution;
use crate::domain::event::Event;
use crate::domain::id::{SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::outcome::{Outcome, Receipt};
use crate::domain::rematch::Touched;
use crate::domain::session::Session;
use crate::domain::signal::SignalSet;
use crate::store::ads_history::{Follower, Visit};
use crate::store::error::StoreError;
use crate::store::locks::{self, LockName};
use crate::store::transaction::{Purpose, Transaction};
use crate::store::{self, Store};

/// A session of the batch: as it was stored (none: it is new) and as it is with the batch's events.
struct Change {
    before: Option<Session>,
    after: Session,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// One outcome an event, in the same order.
    pub outcomes: Vec<Outcome>,
    /// Sites of which calls are to be matched again.
    pub rematch: Vec<SiteId>,
}

/// Writes events of one arrival month and commits.
pub(super) async fn write(store: &Store, events: &[&Event]) -> Result<Written, StoreError> {
    let Some(first) = events.first() else { return Ok(Written::default()) };
    let months = Month::neighbourhood(first.arrival_month());
    debug_assert!(events.iter().all(|event| event.arrival_month() == months[1]), "a batch has one arrival month");

    let tx = store.begin(Purpose::Serve).await?;
    let mut visits: Vec<(SiteId, SessionId)> = events.iter().map(|event| (event.site_id, event.session_id)).collect();
    visits.sort_unstable();
    visits.dedup();
    let sites: Vec<SiteId> = visits.iter().map(|(site, _)| *site).collect();
    locks::pass(&tx, &sites, visits.iter().map(|(site, id)| LockName::session(*site, *id)).collect()).await?;
    let stored = known_by_visit(store::sessions::load(&tx, months, &visits).await?);

    let placed = place(events, &stored);
    let new = insert(&tx, &placed).await?;
    let mut changes = merge(&placed, &new, stored);
    let mut rematch = Vec::new();
    if changes.values().any(|change| change.before.as_ref() != Some(&change.after)) {
        attribute(&tx, &mut changes).await?;
        let sessions: Vec<&Session> = changes.values().map(|change| &change.after).collect();
        store::sessions::upsert(&tx, &sessions).await?;
        let corrected = correct_followers(&tx, &changes).await?;
        rematch = store::rematches::note(&tx, &touched(&changes, &placed, &new, corrected)).await?;
    }
    tx.commit().await?;

    let outcomes = placed
        .iter()
        .enumerate()
        .map(|(place, (key, event))| {
            let session = changes.get(key).map(|change| &change.after);
            if session.is_none() {
                tracing::warn!(event.id = %event.id, site.id = %event.site_id, "an event has the id of another session's event, and counts as its copy");
            }
            let receipt = Receipt {
                session: *key,
                // No session: the event's id is taken by an event of another session, and this copy changed nothing.
                signals: session.map_or(SignalSet::EMPTY, Session::signals),
                attribution: session.map_or(Attribution::OrganicReferral, Session::attribution),
            };
            if new.contains(&place) { Outcome::Stored(receipt) } else { Outcome::Duplicate(receipt) }
        })
        .collect();
    Ok(Written { outcomes, rematch })
}

/// What calls may care for: the sessions that changed, with their new events, and the followers that were corrected.
fn touched(
    changes: &BTreeMap<SessionKey, Change>,
    placed: &[(SessionKey, &Event)],
    new: &HashSet<usize>,
    corrected: Vec<SessionKey>,
) -> Touched {
    let mut by_session: HashMap<SessionKey, Vec<&Event>> = HashMap::new();
    for (place, (key, event)) in placed.iter().enumerate() {
        if new.contains(&place) {
            by_session.entry(*key).or_default().push(event);
        }
    }
    let mut touched = Touched::default();
    for (key, change) in changes.iter().filter(|(_, change)| change.before.as_ref() != Some(&change.after)) {
        let events = by_session.remove(key).unwrap_or_default();
        touched.by_session(change.before.as_ref(), &change.after, &events);
    }
    corrected.into_iter().for_each(|key| touched.credited(key));
    touched
}

/// Stored sessions by visit. A visit has one session; were there two, the earlier month is the one that everybody follows.
fn known_by_visit(sessions: Vec<Session>) -> HashMap<(SiteId, SessionId), Session> {
    let mut known: HashMap<_, Session> = HashMap::with_capacity(sessions.len());
    for session in sessions {
        let visit = (session.key.site_id, session.key.id);
        if known.get(&visit).is_none_or(|other| session.key.month < other.key.month) {
            known.insert(visit, session);
        }
    }
    known
}

/// Each event with the key of its session: the stored month, or else the one of the visit's first event in this batch.
fn place<'e>(events: &[&'e Event], stored: &HashMap<(SiteId, SessionId), Session>) -> Vec<(SessionKey, &'e Event)> {
    let mut beginnings: HashMap<(SiteId, SessionId), &Event> = HashMap::new();
    for event in events {
        let beginning = beginnings.entry((event.site_id, event.session_id)).or_insert(event);
        if (event.received_at, event.id) < (beginning.received_at, beginning.id) {
            *beginning = event;
        }
    }
    let key = |event: &Event| {
        let visit = (event.site_id, event.session_id);
        let month = match stored.get(&visit) {
            Some(session) => session.key.month,
            None => Month::for_new_session(beginnings[&visit].month_hint, beginnings[&visit].received_at),
        };
        SessionKey { site_id: event.site_id, month, id: event.session_id }
    };
    events.iter().map(|event| (key(event), *event)).collect()
}

/// Inserts the events, sorted by key and each once, and tells the places of those that are new.
async fn insert(tx: &Transaction<'_>, placed: &[(SessionKey, &Event)]) -> Result<HashSet<usize>, StoreError> {
    let mut distinct: BTreeMap<store::events::EventKey, usize> = BTreeMap::new();
    for (place, (key, event)) in placed.iter().enumerate() {
        distinct.entry((key.site_id, key.month, event.id)).or_insert(place);
    }
    let rows: Vec<_> = distinct.values().map(|place| placed[*place]).collect();
    let inserted = store::events::insert(tx, &rows).await?;
    Ok(distinct.into_iter().filter(|(key, _)| inserted.contains(key)).map(|(_, place)| place).collect())
}

/// The sessions of the batch, sorted by key, with the new events merged in.
fn merge(
    placed: &[(SessionKey, &Event)],
    new: &HashSet<usize>,
    mut stored: HashMap<(SiteId, SessionId), Session>,
) -> BTreeMap<SessionKey, Change> {
    let mut changes: BTreeMap<SessionKey, Change> = BTreeMap::new();
    for session in stored.drain().map(|(_, session)| session) {
        changes.insert(session.key, Change { before: Some(session.clone()), after: session });
    }
    for (place, (key, event)) in placed.iter().enumerate() {
        if new.contains(&place) {
            changes
                .entry(*key)
                .and_modify(|change| change.after.merge(event))
                .or_insert_with(|| Change { before: None, after: Session::begin(*key, event) });
        }
    }
    changes
}

/// Settles for every session of the batch whether it follows an ad: by the table, and by the batch itself.
async fn attribute(tx: &Transaction<'_>, changes: &mut BTreeMap<SessionKey, Change>) -> Result<(), StoreError> {
    let lock = |session: &Session| Some(LockName::fingerprint(session.key.site_id, session.fingerprint()?));
    let names = changes.values().flat_map(|change| [change.before.as_ref().and_then(lock), lock(&change.after)]);
    locks::take(tx, names.flatten().collect()).await?;

    let asked: Vec<Visit> =
        changes.values().filter(|change| !change.after.is_direct()).filter_map(|change| visit(&change.after)).collect();
    let answers = judge(tx, &asked, changes).await?;
    let assisted: HashSet<SessionKey> =
        asked.iter().zip(answers).filter(|(_, follows)| *follows).map(|(visit, _)| visit.key).collect();
    for (key, change) in changes.iter_mut() {
        change.after.ads_assisted = assisted.contains(key);
    }
    Ok(())
}

/// Looks again at stored sessions whose earlier paid visit appeared or moved with this batch; those that it corrected.
async fn correct_followers(
    tx: &Transaction<'_>,
    changes: &BTreeMap<SessionKey, Change>,
) -> Result<Vec<SessionKey>, StoreError> {
    let reaches: Vec<Reach> =
        changes.values().flat_map(|change| ads_history::reaches(change.before.as_ref(), &change.after)).collect();
    let known: Vec<SessionKey> = changes.keys().copied().collect();
    let followers = store::ads_history::followers(tx, &reaches, &known).await?;
    let visits: Vec<Visit> = followers.iter().map(|follower| follower.visit.clone()).collect();
    let answers = judge(tx, &visits, changes).await?;
    let fixes: Vec<(Follower, Attribution)> = followers
        .into_iter()
        .zip(answers)
        .map(|(follower, follows)| {
            (follower, if follows { Attribution::AdsAssisted } else { Attribution::OrganicReferral })
        })
        .filter(|(follower, attribution)| follower.attribution != *attribution)
        .collect();
    store::ads_history::correct(tx, &fixes).await?;
    Ok(fixes.into_iter().map(|(follower, _)| follower.visit.key).collect())
}

/// For each visit: is there an earlier paid visit in its window, in the table or among the batch's own sessions?
async fn judge(
    tx: &Transaction<'_>,
    visits: &[Visit],
    changes: &BTreeMap<SessionKey, Change>,
) -> Result<Vec<bool>, StoreError> {
    let known: Vec<SessionKey> = changes.keys().copied().collect();
    let in_table = store::ads_history::follow_an_ad(tx, visits, &known).await?;
    let mut paid: HashMap<(SiteId, &str), Vec<DateTime<Utc>>> = HashMap::new();
    for session in changes.values().map(|change| &change.after).filter(|session| session.is_direct()) {
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

fn visit(session: &Session) -> Option<Visit> {
    let fingerprint = session.fingerprint()?.to_owned();
    Some(Visit { key: session.key, fingerprint, created_at: session.created_at })
}
