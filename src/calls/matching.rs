//! Finds what speaks for calls, lets the domain decide, and writes what changed: the calls, and the sessions that they are credited to.
//!
//! Runs with the site's gate closed, so the events and sessions of the site stand still.

use std::collections::{BTreeSet, HashMap, HashSet};

use chrono::{DateTime, Utc};

use crate::domain::attribution::Attribution;
use crate::domain::call::{CallKey, Direction, MatchMethod, Told};
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

/// Calls as they are to be stored, and what of it has to be written.
pub(super) struct Settled {
    site: SiteId,
    write: Vec<Call>,
    same: Vec<Call>,
    /// The sessions that are credited now, with what the calls raise, as far as that is not there yet.
    gained: Vec<Session>,
    /// The sessions that were credited, and may still be by another call.
    lost: Vec<SessionKey>,
}

/// Matches the open ones of `calls`, of which those with a key in `told` have changed. What is known of the `evidence` is not looked for again.
pub(super) async fn settle(
    tx: &Transaction<'_>,
    site: SiteId,
    region: Option<&str>,
    mut calls: Vec<Call>,
    told: &[CallKey],
    evidence: Evidence,
) -> Result<Settled, StoreError> {
    let told: HashSet<&CallKey> = told.iter().collect();
    let mut stale = HashSet::new();
    let (mut gained, mut lost) = (BTreeSet::new(), BTreeSet::new());
    let open: Vec<usize> = (0..calls.len()).filter(|place| calls[*place].is_open()).collect();
    let asked: Vec<&Call> = open.iter().map(|place| &calls[*place]).collect();
    let decisions = decide(tx, site, &asked, region, evidence).await?;
    let (found, mut sessions) = freeze(tx, site, &asked, decisions).await?;
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
            lost.extend(call.credited().map(|credit| credit.session));
            continue;
        }
        let (before, after) = (credited(&call.found.decision), credited(&found.decision));
        if before != after {
            lost.extend(before);
            gained.extend(after);
        }
        call.found = found;
        call.matched_at = Some(now);
        stale.insert(call.id);
    }
    sessions.retain_mut(|session| gained.contains(&session.key) && raise(session, true));
    let (write, same) = calls.into_iter().partition(|call| stale.contains(&call.id) || told.contains(&call.key));
    Ok(Settled { site, write, same, gained: sessions, lost: lost.difference(&gained).copied().collect() })
}

impl Settled {
    /// Writes the calls and what they raise in their sessions, and commits; all calls as they are stored then.
    pub(super) async fn commit(self, tx: Transaction<'_>) -> Result<Vec<Call>, StoreError> {
        let Self { site, write, same, gained, lost } = self;
        let mut written = if lost.is_empty() {
            store::calls::write_and_commit(tx, site, &write, &gained).await?
        } else {
            let (raised, written, credited, sessions) = tokio::join!(
                biased;
                store::sessions::set_call_signals(&tx, site, &gained),
                store::calls::write(&tx, site, &write),
                store::call_evidence::credited(&tx, site, &lost),
                store::sessions::load_keys(&tx, site, &lost),
            );
            raised?;
            let (written, credited, mut sessions) = (written?, credited?, sessions?);
            sessions.retain_mut(|session| raise(session, credited.contains(&session.key)));
            store::sessions::set_call_signals(&tx, site, &sessions).await?;
            tx.commit().await?;
            written
        };
        written.extend(same);
        Ok(written)
    }
}

fn credited(decision: &Match) -> Option<SessionKey> {
    decision.credited.as_ref().map(|credit| credit.session)
}

/// Notes in a session whether a call is credited to it, on which its signals and score depend. True if that is news.
fn raise(session: &mut Session, credited: bool) -> bool {
    let raised: SignalSet = credited.then_some(Signal::PrimaryConversion).into_iter().collect();
    std::mem::replace(&mut session.call_signals, raised) != raised
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

/// What was found in the windows of calls. It depends on the site, on when a call began, and on the fingerprint that it brought, and on nothing
/// else of the call.
#[derive(Default)]
pub(super) struct Evidence {
    activity: HashMap<(String, DateTime<Utc>), Vec<Activity>>,
    conversions: HashMap<DateTime<Utc>, Vec<Conversion>>,
}

impl Evidence {
    /// Looks for what the rule asks for first, as far as that is not known: activity of the fingerprint, or else clicks. In one round trip.
    pub(super) async fn look(&mut self, tx: &Transaction<'_>, site: SiteId, calls: &[&Told]) -> Result<(), StoreError> {
        let inbound = || calls.iter().filter(|told| told.direction == Direction::Inbound);
        let by_fingerprint = inbound().filter_map(|told| Some((told.fingerprint.as_deref()?, told.started_at)));
        let by_fingerprint: BTreeSet<_> = by_fingerprint
            .filter(|(fingerprint, at)| !self.activity.contains_key(&((*fingerprint).to_owned(), *at)))
            .collect();
        let by_fingerprint: Vec<(&str, DateTime<Utc>)> = by_fingerprint.into_iter().collect();
        let others = inbound().filter(|told| told.fingerprint.is_none() && told.caller.is_some());
        let times = self.unknown_times(others.copied());
        let (activity, conversions) = tokio::join!(
            biased;
            store::call_evidence::activity(tx, site, &by_fingerprint),
            store::call_evidence::conversions(tx, site, &times),
        );
        let asked = by_fingerprint.into_iter().map(|(fingerprint, at)| (fingerprint.to_owned(), at));
        self.activity.extend(asked.zip(activity?));
        self.conversions.extend(times.into_iter().zip(conversions?));
        Ok(())
    }

    /// Looks for clicks in the windows of these calls.
    async fn look_for_clicks(&mut self, tx: &Transaction<'_>, site: SiteId, calls: &[&Told]) -> Result<(), StoreError> {
        let times = self.unknown_times(calls.iter().copied());
        let conversions = store::call_evidence::conversions(tx, site, &times).await?;
        self.conversions.extend(times.into_iter().zip(conversions));
        Ok(())
    }

    fn unknown_times<'t>(&self, calls: impl Iterator<Item = &'t Told>) -> Vec<DateTime<Utc>> {
        let times: BTreeSet<_> = calls.map(|told| told.started_at).collect();
        times.into_iter().filter(|at| !self.conversions.contains_key(at)).collect()
    }

    fn activity_of(&self, told: &Told) -> &[Activity] {
        let key = told.fingerprint.as_ref().map(|fingerprint| (fingerprint.clone(), told.started_at));
        key.and_then(|key| self.activity.get(&key)).map_or(&[], Vec::as_slice)
    }

    fn conversions_of(&self, told: &Told) -> &[Conversion] {
        self.conversions.get(&told.started_at).map_or(&[], Vec::as_slice)
    }
}

/// The match of each call.
async fn decide(
    tx: &Transaction<'_>,
    site: SiteId,
    calls: &[&Call],
    region: Option<&str>,
    mut evidence: Evidence,
) -> Result<Vec<Match>, StoreError> {
    let told: Vec<&Told> = calls.iter().map(|call| &call.told).collect();
    evidence.look(tx, site, &told).await?;
    let needs_clicks = |told: &&Told| matching::needs_clicks(&Facts::of(site, told), evidence.activity_of(told));
    let unknown: Vec<&Told> = told.iter().copied().filter(needs_clicks).collect();
    evidence.look_for_clicks(tx, site, &unknown).await?;
    let mut clicks = Clicks { region, known: HashMap::new() };
    let decide = |told: &Told| {
        let clicks: Vec<Click> = evidence.conversions_of(told).iter().filter_map(|one| clicks.read(one)).collect();
        matching::decide(&Facts::of(site, told), evidence.activity_of(told), &clicks)
    };
    Ok(told.into_iter().map(decide).collect())
}

/// Reads conversions as clicks. A site has few numbers and a window many clicks, and the windows of calls overlap: each label is read once, or the
/// site's gate would stay closed for it.
struct Clicks<'r> {
    region: Option<&'r str>,
    /// The number of each, and whether it is a click on WhatsApp.
    known: HashMap<ActionAndLabel<'r>, (Option<E164>, bool)>,
}

type ActionAndLabel<'r> = (&'r str, Option<&'r str>);

impl<'r> Clicks<'r> {
    /// The click on a number, if the conversion is one.
    fn read(&mut self, conversion: &'r Conversion) -> Option<Click> {
        let Conversion { session, event, at, action, label } = conversion;
        if !is_call_action(action) {
            return None;
        }
        let told = (action.as_str(), label.as_deref());
        let (number, whatsapp) = self.known.entry(told).or_insert_with(|| matching::clicked(told, self.region)).clone();
        Some(Click { session: *session, event: *event, at: *at, number, whatsapp })
    }
}

/// What was there of each credited session's score when the call came; and the sessions that are credited anew.
async fn freeze(
    tx: &Transaction<'_>,
    site: SiteId,
    calls: &[&Call],
    decisions: Vec<Match>,
) -> Result<(Vec<Found>, Vec<Session>), StoreError> {
    // The click that led to the call came before it, even if the clocks say otherwise.
    let until = |call: &Call, decision: &Match, credit: &Candidate| match decision.method {
        MatchMethod::Click => call.told.started_at.max(credit.at),
        MatchMethod::Fingerprint | MatchMethod::Ambiguous | MatchMethod::Unmatched => call.told.started_at,
    };
    let both = || calls.iter().zip(&decisions);
    let asked: Vec<(SessionKey, DateTime<Utc>)> = both()
        .filter_map(|(call, decision)| {
            let credit = decision.credited.as_ref()?;
            Some((credit.session, until(call, decision, credit)))
        })
        .collect();
    let anew = both()
        .filter_map(|(call, decision)| credited(decision).filter(|new| credited(&call.found.decision) != Some(*new)));
    let anew: Vec<SessionKey> = anew.collect::<BTreeSet<_>>().into_iter().collect();
    let (standings, sessions) = tokio::join!(
        biased;
        store::call_evidence::standings(tx, site, &asked),
        store::sessions::load_keys(tx, site, &anew),
    );
    let mut standings = standings?.into_iter();
    let found = decisions.into_iter().map(|mut decision| {
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
    });
    Ok((found.collect(), sessions?))
}
