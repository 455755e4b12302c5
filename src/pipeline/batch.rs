//! A batch in one transaction with a fixed number of statements, whatever its size.
//!
//! Pass the gates of the sites and lock sessions and fingerprints by name; load the sessions from the three months they can be in; insert the
//! events and learn which are new; merge the new ones into their sessions (pure); write them, with what follows from them
//! (`consequences.rs`).
//!
//! A step that does not need the answer of the one before is sent along with it (`join!`, in its order). Nearly always every event is new, so
//! what would follow from that is asked along with their insertion, and asked again where it was not so; what is in the way of the questions
//! is then in the way of copies, too. Sessions that nothing has to follow are committed along with being written. So a batch mostly waits for
//! the database three times.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::consequences::{Change, Consequences};
use crate::domain::attribution::Attribution;
use crate::domain::event::Event;
use crate::domain::id::{EventId, SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::outcome::{Outcome, Receipt};
use crate::domain::session::Session;
use crate::domain::signal::SignalSet;
use crate::store::error::StoreError;
use crate::store::events::EventKey;
use crate::store::locks::{self, LockName};
use crate::store::transaction::{Purpose, Transaction};
use crate::store::{self, Store};

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

    let mut visits: Vec<(SiteId, SessionId)> = events.iter().map(|event| (event.site_id, event.session_id)).collect();
    visits.sort_unstable();
    visits.dedup();
    let sites: Vec<SiteId> = visits.iter().map(|(site, _)| *site).collect();
    let told =
        events.iter().filter_map(|event| Some(LockName::fingerprint(event.site_id, event.fingerprint.as_deref()?)));
    let told: HashSet<LockName> = told.collect();
    let names = visits.iter().map(|(site, id)| LockName::session(*site, *id)).chain(told.iter().copied()).collect();

    let tx = store.reserve(Purpose::Serve).await?;
    let (begun, passed, loaded) =
        tokio::join!(biased; tx.enter(), locks::pass(&tx, &sites, names), store::sessions::load(&tx, months, &visits));
    begun?;
    passed?;
    let stored = loaded?;
    let known = known_by_visit(&stored);
    let settled =
        if known.len() < stored.len() { settled(&tx, months, events, &stored).await? } else { HashMap::new() };

    let placed = place(events, &known, &settled);
    let distinct = distinct(&placed);
    let all: HashSet<usize> = distinct.values().copied().collect();
    let mut changes = merge(&placed, &all, stored);
    let (new, hoped) = tokio::join!(
        biased;
        insert(&tx, &placed, distinct),
        Consequences::ask(&tx, &mut changes, &told, &placed, &all),
    );
    // Both, whatever was guessed: after either has failed the transaction answers nothing more, and least of all why.
    let (new, hoped) = (new?, hoped?);
    let consequences = if new == all {
        hoped
    } else {
        let stored = changes.into_values().filter_map(|change| change.before).collect();
        changes = merge(&placed, &new, stored);
        Consequences::ask(&tx, &mut changes, &told, &placed, &new).await?
    };

    let sessions: Vec<&Session> =
        changes.values().filter(|change| change.is_one()).map(|change| &change.after).collect();
    if consequences.are_none() {
        // What is told of copies does not change by what is still to be written.
        let outcomes = outcomes(&tx, months, &placed, &new, &changes).await?;
        store::sessions::upsert_and_commit(tx, &sessions).await?;
        return Ok(Written { outcomes, rematch: Vec::new() });
    }
    store::sessions::upsert(&tx, &sessions).await?;
    let rematch = consequences.write(&tx, &changes).await?;
    let outcomes = outcomes(&tx, months, &placed, &new, &changes).await?;
    tx.commit().await?;
    Ok(Written { outcomes, rematch })
}

/// What became of each event. A copy is told where the event lies, which is another session if that was the first to use its id.
async fn outcomes(
    tx: &Transaction<'_>,
    months: [Month; 3],
    placed: &[(SessionKey, &Event)],
    new: &HashSet<usize>,
    changes: &BTreeMap<SessionKey, Change>,
) -> Result<Vec<Outcome>, StoreError> {
    let copies = placed.iter().enumerate().filter(|(place, _)| !new.contains(place));
    let ids: Vec<(SiteId, EventId)> = copies.map(|(_, (key, event))| (key.site_id, event.id)).collect();
    let lie = if ids.is_empty() { HashMap::new() } else { store::events::sessions_of(tx, months, &ids).await? };
    let elsewhere: Vec<(SiteId, SessionId)> =
        lie.values().filter(|key| !changes.contains_key(key)).map(|key| (key.site_id, key.id)).collect();
    let others = if elsewhere.is_empty() { Vec::new() } else { store::sessions::load(tx, months, &elsewhere).await? };

    let receipt = |key: SessionKey| {
        let other = || others.iter().find(|session| session.key == key);
        let session = changes.get(&key).map(|change| &change.after).or_else(other);
        Receipt {
            session: key,
            signals: session.map_or(SignalSet::EMPTY, Session::signals),
            attribution: session.map_or(Attribution::OrganicReferral, Session::attribution),
        }
    };
    let lies = |key: &SessionKey, event: &Event| lie.get(&(key.site_id, event.id)).copied().unwrap_or(*key);
    let outcome = |(place, (key, event)): (usize, &(SessionKey, &Event))| {
        if new.contains(&place) {
            return Outcome::Stored(receipt(*key));
        }
        Outcome::Duplicate(receipt(lies(key, event)))
    };
    // Anybody can send any number of these: a line for all of a batch.
    let strays = || placed.iter().filter(|(key, event)| lies(key, event).id != event.session_id);
    if let Some((_, event)) = strays().next() {
        let events = strays().count();
        tracing::warn!(event.id = %event.id, site.id = %event.site_id, events, "an event has the id of another session's event, and counts as its copy");
    }
    Ok(placed.iter().enumerate().map(outcome).collect())
}

/// Where stored sessions lie, by visit. A visit has one session; were there two (its events were imported over months that are no
/// neighbours, in any order), the earlier is the one that everybody follows.
fn known_by_visit(sessions: &[Session]) -> HashMap<(SiteId, SessionId), SessionKey> {
    let mut known: HashMap<_, SessionKey> = HashMap::with_capacity(sessions.len());
    for session in sessions {
        let key = known.entry((session.key.site_id, session.key.id)).or_insert(session.key);
        *key = session.key.min(*key);
    }
    known
}

/// Of visits with two sessions: the events that are stored already, and in which. So a copy of theirs is one, whichever is followed now.
async fn settled(
    tx: &Transaction<'_>,
    months: [Month; 3],
    events: &[&Event],
    stored: &[Session],
) -> Result<HashMap<(SiteId, EventId), SessionKey>, StoreError> {
    let twice = |event: &Event| {
        let of_visit = |session: &&Session| (session.key.site_id, session.key.id) == (event.site_id, event.session_id);
        stored.iter().filter(of_visit).count() > 1
    };
    let ids: Vec<(SiteId, EventId)> =
        events.iter().filter(|event| twice(event)).map(|event| (event.site_id, event.id)).collect();
    store::events::sessions_of(tx, months, &ids).await
}

/// Each event with the key of its session: the stored month, or else the one of the visit's first event in this batch.
fn place<'e>(
    events: &[&'e Event],
    known: &HashMap<(SiteId, SessionId), SessionKey>,
    settled: &HashMap<(SiteId, EventId), SessionKey>,
) -> Vec<(SessionKey, &'e Event)> {
    let mut beginnings: HashMap<(SiteId, SessionId), &Event> = HashMap::new();
    for event in events {
        let beginning = beginnings.entry((event.site_id, event.session_id)).or_insert(event);
        if (event.received_at, event.id) < (beginning.received_at, beginning.id) {
            *beginning = event;
        }
    }
    let key = |event: &Event| {
        let visit = (event.site_id, event.session_id);
        let settled = settled.get(&(event.site_id, event.id)).filter(|key| key.id == event.session_id);
        match settled.or_else(|| known.get(&visit)) {
            Some(key) => *key,
            None => {
                let beginning = beginnings[&visit];
                let month = Month::for_new_session(beginning.month_hint, beginning.received_at);
                SessionKey { site_id: event.site_id, month, id: event.session_id }
            }
        }
    };
    events.iter().map(|event| (key(event), *event)).collect()
}

/// The places of the events, sorted by key and each once.
fn distinct(placed: &[(SessionKey, &Event)]) -> BTreeMap<EventKey, usize> {
    let mut distinct: BTreeMap<EventKey, usize> = BTreeMap::new();
    for (place, (key, event)) in placed.iter().enumerate() {
        distinct.entry((key.site_id, key.month, event.id)).or_insert(place);
    }
    distinct
}

/// Inserts the events, and tells the places of those that are new.
async fn insert(
    tx: &Transaction<'_>,
    placed: &[(SessionKey, &Event)],
    distinct: BTreeMap<EventKey, usize>,
) -> Result<HashSet<usize>, StoreError> {
    let rows: Vec<_> = distinct.values().map(|place| placed[*place]).collect();
    let inserted = store::events::insert(tx, &rows).await?;
    Ok(distinct.into_iter().filter(|(key, _)| inserted.contains(key)).map(|(_, place)| place).collect())
}

/// The sessions of the batch, sorted by key, with the new events merged in.
fn merge(placed: &[(SessionKey, &Event)], new: &HashSet<usize>, stored: Vec<Session>) -> BTreeMap<SessionKey, Change> {
    let mut changes: BTreeMap<SessionKey, Change> = BTreeMap::new();
    for session in stored {
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
