//! Finds what speaks for calls, lets the domain decide, and writes what changed: the calls, and the sessions that they are credited to.
//!
//! Runs with the site's gate closed, so the events and sessions of the site stand still.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};

use crate::domain::attribution::Attribution;
use crate::domain::call::{CallKey, MatchMethod};
use crate::domain::event::is_call_action;
use crate::domain::id::{CallId, EventId, SessionKey, SiteId};
use crate::domain::matching::{self, Activity, Candidate, Click, Facts, Match};
use crate::domain::month::Month;
use crate::domain::recorded::{Call, Found};
use crate::domain::session::{Session, with_history};
use crate::domain::signal::{Signal, SignalSet};
use crate::domain::telephone::E164;
use crate::store;
use crate::store::call_evidence::{Conversion, Standing};
use crate::store::error::StoreError;
use crate::store::transaction::Transaction;

/// Matches the open ones of `calls` and writes those that changed by it, and those with a key in `told`; all of them as they are stored then.
pub(super) async fn settle(
    tx: &Transaction<'_>,
    site: SiteId,
    region: Option<&str>,
    mut calls: Vec<Call>,
    told: &[CallKey],
) -> Result<Vec<Call>, StoreError> {
    let told: HashSet<&CallKey> = told.iter().collect();
    let mut stale = HashSet::new();
    let mut credits: BTreeSet<SessionKey> = BTreeSet::new();
    let open: Vec<usize> = (0..calls.len()).filter(|place| calls[*place].is_open()).collect();
    let asked: Vec<&Call> = open.iter().map(|place| &calls[*place]).collect();
    let found = find(tx, site, &asked, region).await?;
    let moved: Vec<&Call> =
        asked.into_iter().zip(&found).filter(|(call, found)| call.found != **found).map(|(call, _)| call).collect();
    let outlived = outlived(tx, site, &moved).await?;
    let now = Utc::now();
    for (place, found) in open.into_iter().zip(found) {
        let call = &mut calls[place];
        if call.matched_at.is_some() && call.found == found {
            continue;
        }
        if outlived.contains(&call.id) {
            // Should its visit come back by a late event, it is still the one that made the phone ring.
            credits.extend(call.credited().map(|credit| credit.session));
            continue;
        }
        if call.credited().map(|credit| credit.session) != found.decision.credited.as_ref().map(|credit| credit.session)
        {
            credits.extend(call.credited().map(|credit| credit.session));
            credits.extend(found.decision.credited.as_ref().map(|credit| credit.session));
        }
        call.found = found;
        call.matched_at = Some(now);
        stale.insert(call.id);
    }
    let (write, same): (Vec<Call>, Vec<Call>) =
        calls.into_iter().partition(|call| stale.contains(&call.id) || told.contains(&call.key));
    let credits: Vec<SessionKey> = credits.into_iter().collect();
    let (written, credited, sessions) = tokio::join!(
        biased;
        store::calls::write(tx, site, &write),
        store::call_evidence::credited(tx, site, &credits),
        store::sessions::load_keys(tx, site, &credits),
    );
    let mut written = written?;
    credit(tx, site, &credited?, sessions?).await?;
    written.extend(same);
    Ok(written)
}

/// Of these calls those whose match rests on events that are no longer there, because their month was dropped. What is left of the window
/// tells less than the match, which therefore stays as it is.
async fn outlived(tx: &Transaction<'_>, site: SiteId, calls: &[&Call]) -> Result<HashSet<CallId>, StoreError> {
    let rests_on = |call: &Call| -> Vec<Candidate> {
        let decision = &call.found.decision;
        decision.credited.iter().chain(&decision.candidates).cloned().collect()
    };
    let named: Vec<(CallId, Candidate)> =
        calls.iter().flat_map(|call| rests_on(call).into_iter().map(|one| (call.id, one))).collect();
    let events: Vec<(Month, EventId)> = named.iter().map(|(_, one)| (one.session.month, one.event)).collect();
    let there = store::call_evidence::still_there(tx, site, &events).await?;
    Ok(named.iter().zip(there).filter(|(_, there)| !there).map(|((call, _), _)| *call).collect())
}

/// The match of each call, with what is frozen of the session that it is credited to.
async fn find(
    tx: &Transaction<'_>,
    site: SiteId,
    calls: &[&Call],
    region: Option<&str>,
) -> Result<Vec<Found>, StoreError> {
    let inbound: Vec<&Call> = calls.iter().copied().filter(|call| call.is_inbound()).collect();
    let activity = store::call_evidence::activity(tx, site, &inbound).await?;
    let activity: HashMap<CallId, Vec<Activity>> = inbound.iter().map(|call| call.id).zip(activity).collect();
    let seen = |call: &Call| activity.get(&call.id).map_or(&[][..], Vec::as_slice);
    let unknown: Vec<&Call> =
        inbound.into_iter().filter(|call| matching::needs_clicks(&Facts::of(site, &call.told), seen(call))).collect();
    let conversions = store::call_evidence::conversions(tx, site, &unknown).await?;
    let mut conversions: HashMap<CallId, Vec<Conversion>> =
        unknown.iter().map(|call| call.id).zip(conversions).collect();
    let mut clicks = Clicks { region, known: HashMap::new() };
    let decide = |call: &&Call| {
        let conversions = conversions.remove(&call.id).unwrap_or_default();
        let clicks: Vec<Click> = conversions.into_iter().filter_map(|conversion| clicks.read(conversion)).collect();
        matching::decide(&Facts::of(site, &call.told), seen(call), &clicks)
    };
    let decisions = calls.iter().map(decide).collect();
    freeze(tx, site, calls, decisions).await
}

/// Reads conversions as clicks. A site has few numbers and a window many clicks, and the windows of calls overlap: each label is read once, or the
/// site's gate would stay closed for it.
struct Clicks<'r> {
    region: Option<&'r str>,
    /// By action and label: the number, and whether it is a click on WhatsApp.
    known: HashMap<(String, Option<String>), (Option<E164>, bool)>,
}

impl Clicks<'_> {
    /// The click on a number, if the conversion is one.
    fn read(&mut self, conversion: Conversion) -> Option<Click> {
        let Conversion { session, event, at, action, label } = conversion;
        if !is_call_action(&action) {
            return None;
        }
        let (number, whatsapp) = match self.known.entry((action, label)) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => {
                let (action, label) = new.key();
                let click = Click::read(session, (event, at), (action, label.as_deref()), self.region);
                new.insert((click.number, click.whatsapp)).clone()
            }
        };
        Some(Click { session, event, at, number, whatsapp })
    }
}

/// What was there of each credited session's score when the call came.
async fn freeze(
    tx: &Transaction<'_>,
    site: SiteId,
    calls: &[&Call],
    decisions: Vec<Match>,
) -> Result<Vec<Found>, StoreError> {
    // The click that led to the call came before it, even if the clocks say otherwise.
    let until = |call: &Call, decision: &Match, credit: &Candidate| match decision.method {
        MatchMethod::Click => call.told.started_at.max(credit.at),
        MatchMethod::Fingerprint | MatchMethod::Ambiguous | MatchMethod::Unmatched => call.told.started_at,
    };
    let asked: Vec<(SessionKey, DateTime<Utc>)> = calls
        .iter()
        .zip(&decisions)
        .filter_map(|(call, decision)| {
            let credit = decision.credited.as_ref()?;
            Some((credit.session, until(call, decision, credit)))
        })
        .collect();
    let mut standings = store::call_evidence::standings(tx, site, &asked).await?.into_iter();
    Ok(decisions
        .into_iter()
        .map(|mut decision| {
            let mut signals = SignalSet::EMPTY;
            if let Some(credit) = decision.credited.as_mut() {
                match standings.next().flatten() {
                    Some(Standing { raised, attribution, fingerprint }) => {
                        signals = with_history(raised, attribution.unwrap_or(Attribution::OrganicReferral));
                        credit.fingerprint = fingerprint;
                    }
                    // A click without its visit: a month that a hand has taken apart. Nobody can be credited with it.
                    None => decision = Match { candidates: decision.candidates, ..Match::NONE },
                }
            }
            Found { decision, signals }
        })
        .collect())
}

/// Settles for each session whether a call is credited to it, and with that its signals and score.
async fn credit(
    tx: &Transaction<'_>,
    site: SiteId,
    credited: &[SessionKey],
    mut sessions: Vec<Session>,
) -> Result<(), StoreError> {
    sessions.retain_mut(|session| {
        let raised: SignalSet =
            credited.contains(&session.key).then_some(Signal::PrimaryConversion).into_iter().collect();
        std::mem::replace(&mut session.call_signals, raised) != raised
    });
    store::sessions::set_call_signals(tx, site, &sessions).await
}
