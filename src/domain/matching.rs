//! The rule by which a call finds its visit: pure, deterministic, within one site.
//!
//! 1. The call brought a fingerprint, and a session with it was active in the window: the one that was active last.
//! 2. Else a session clicked on the dialled number in the window: the nearest click before the call, unless another
//!    session clicked within a minute of it; then nobody is credited and all of them are named.
//! 3. Else nobody.
//!
//! Only calls of visitors are matched, and an anonymous caller is not matched by number, so by the first step alone. The
//! result is a function of the set of what is passed in; what lies outside the window, of another site or on another
//! number is dropped here, so callers may pass more than they must.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::call::{Channel, Direction, MatchMethod, Told};
use super::id::{EventId, SessionId, SessionKey, SiteId};
use super::month::Month;
use super::telephone::{self, E164};

/// How long before a call a visit may speak for it.
pub const WINDOW_BEFORE: TimeDelta = TimeDelta::minutes(30);
/// How far the clocks of a page and a provider may differ: so long after the call's beginning.
pub const WINDOW_AFTER: TimeDelta = TimeDelta::minutes(2);
/// Clicks of two sessions this close are too close to choose.
pub const RIVAL_DISTANCE: TimeDelta = TimeDelta::seconds(60);
/// Most candidates that a match names.
pub const MAX_CANDIDATES: usize = 20;
/// An event's own time may be this much before its arrival, by which its session's month was chosen.
pub const LONGEST_DELAY: TimeDelta = TimeDelta::hours(24);

/// What is sure when the browser itself is known. Browsers can share a fingerprint, so it is not everything.
const FINGERPRINT_CONFIDENCE: f64 = 0.95;
/// A click at the moment of the call; it loses [`CLICK_LOSS`] over the length of the window.
const CLICK_CONFIDENCE: f64 = 0.90;
const CLICK_LOSS: f64 = 0.40;
const LEAST_CLICK_CONFIDENCE: f64 = 0.50;

/// What the rule asks of a call.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub site_id: SiteId,
    pub started_at: DateTime<Utc>,
    pub channel: Channel,
    pub direction: Direction,
    pub dialled: &'a E164,
    /// No push told the caller's number.
    pub anonymous: bool,
    pub fingerprint: Option<&'a str>,
}

impl<'a> Facts<'a> {
    pub fn of(site_id: SiteId, told: &'a Told) -> Self {
        Self {
            site_id,
            started_at: told.started_at,
            channel: told.channel,
            direction: told.direction,
            dialled: &told.dialled,
            anonymous: told.caller.is_none(),
            fingerprint: told.fingerprint.as_deref(),
        }
    }

    fn reaches(&self, session: &SessionKey, at: DateTime<Utc>) -> bool {
        let (from, to) = window(self.started_at);
        session.site_id == self.site_id && (from..=to).contains(&at)
    }

    fn fits(&self, click: &Click) -> bool {
        match &click.number {
            Some(number) => number == self.dialled,
            None => click.whatsapp && self.channel == Channel::Whatsapp,
        }
    }
}

/// An event of a session whose fingerprint is the call's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    pub session: SessionKey,
    pub event: EventId,
    pub at: DateTime<Utc>,
}

/// An event that clicked on a telephone number or a WhatsApp link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Click {
    pub session: SessionKey,
    pub event: EventId,
    pub at: DateTime<Utc>,
    /// The number that was clicked. None: it cannot be read from the event.
    pub number: Option<E164>,
    pub whatsapp: bool,
}

impl Click {
    /// Reads what an event with a call's action was a click on, a national number in the site's `region`.
    pub fn read(
        session: SessionKey,
        (event, at): (EventId, DateTime<Utc>),
        (action, label): (&str, Option<&str>),
        region: Option<&str>,
    ) -> Self {
        let (number, whatsapp) = clicked((action, label), region);
        Self { session, event, at, number, whatsapp }
    }
}

/// What an event with a call's action was a click on: the number, and whether it was WhatsApp's.
pub fn clicked((action, label): (&str, Option<&str>), region: Option<&str>) -> (Option<E164>, bool) {
    let label = label.unwrap_or_default();
    let whatsapp = action.to_ascii_lowercase().starts_with("whatsapp") || telephone::is_whatsapp_link(label);
    (telephone::clicked(label, region), whatsapp)
}

/// A session that a call may have come from, with the event that speaks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub session: SessionKey,
    pub event: EventId,
    pub at: DateTime<Utc>,
    /// By which the session was found, if it was. Of the credited one it is the session's own as soon as that is frozen.
    pub fingerprint: Option<String>,
    /// The number that was clicked. None for an event that is no click, or whose number cannot be read.
    pub clicked: Option<E164>,
}

/// What the rule decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Match {
    pub method: MatchMethod,
    /// 0 to 1, in hundredths; 0 when nobody is credited.
    pub confidence: f64,
    pub credited: Option<Candidate>,
    /// One a session, the nearest to the call first, at most [`MAX_CANDIDATES`], the credited one always among them.
    pub candidates: Vec<Candidate>,
}

impl Match {
    /// Nobody fits.
    pub const NONE: Self =
        Self { method: MatchMethod::Unmatched, confidence: 0.0, credited: None, candidates: Vec::new() };
}

/// Finds the visit of a call among the events of the sessions with its fingerprint and the clicks of its site.
pub fn decide(call: &Facts<'_>, activity: &[Activity], clicks: &[Click]) -> Match {
    if call.direction == Direction::Outbound {
        return Match::NONE;
    }
    by_fingerprint(call, activity).or_else(|| by_click(call, clicks)).unwrap_or(Match::NONE)
}

/// Whether only a click can tell whose call it was: whoever finds evidence for [`decide`] need not look for clicks otherwise.
pub fn needs_clicks(call: &Facts<'_>, activity: &[Activity]) -> bool {
    call.direction != Direction::Outbound && !call.anonymous && by_fingerprint(call, activity).is_none()
}

fn by_fingerprint(call: &Facts<'_>, activity: &[Activity]) -> Option<Match> {
    let fingerprint = call.fingerprint?;
    let mut latest: BTreeMap<SessionKey, (DateTime<Utc>, EventId)> = BTreeMap::new();
    for Activity { session, event, at } in activity.iter().filter(|seen| call.reaches(&seen.session, seen.at)) {
        latest.entry(*session).and_modify(|last| *last = (*at, *event).max(*last)).or_insert((*at, *event));
    }
    let candidates = latest.into_iter().map(|(session, (at, event))| {
        let fingerprint = Some(fingerprint.to_owned());
        Candidate { session, event, at, fingerprint, clicked: None }
    });
    let candidates: Vec<_> = candidates.collect();
    let credited = candidates.iter().max_by_key(|one| (one.at, one.event, one.session)).cloned()?;
    Some(Match {
        method: MatchMethod::Fingerprint,
        confidence: FINGERPRINT_CONFIDENCE,
        candidates: shortlist(call, candidates, &credited),
        credited: Some(credited),
    })
}

fn by_click(call: &Facts<'_>, clicks: &[Click]) -> Option<Match> {
    if call.anonymous {
        return None;
    }
    let fitting = || clicks.iter().filter(|click| call.reaches(&click.session, click.at) && call.fits(click));
    // What led to the call came before it; only the skew of the clocks lets a click after it stand in.
    let rank = |click: &Click| {
        let distance = (call.started_at - click.at).abs();
        (click.at > call.started_at, distance, click.event, click.session)
    };
    let mut nearest: BTreeMap<SessionKey, &Click> = BTreeMap::new();
    for click in fitting() {
        let known = nearest.entry(click.session).or_insert(click);
        if rank(click) < rank(known) {
            *known = click;
        }
    }
    let winner = *nearest.values().min_by_key(|click| rank(click))?;
    let rivalled =
        fitting().any(|click| click.session != winner.session && (click.at - winner.at).abs() <= RIVAL_DISTANCE);
    let candidate = |click: &Click| Candidate {
        session: click.session,
        event: click.event,
        at: click.at,
        fingerprint: None,
        clicked: click.number.clone(),
    };
    let winner = candidate(winner);
    let candidates = shortlist(call, nearest.into_values().map(candidate).collect(), &winner);
    Some(if rivalled {
        Match { method: MatchMethod::Ambiguous, candidates, ..Match::NONE }
    } else {
        let confidence = click_confidence(call.started_at - winner.at);
        Match { method: MatchMethod::Click, confidence, credited: Some(winner), candidates }
    })
}

/// The nearest to the call, `kept` among them.
fn shortlist(call: &Facts<'_>, mut candidates: Vec<Candidate>, kept: &Candidate) -> Vec<Candidate> {
    let nearness = |one: &Candidate| {
        let before = one.at <= call.started_at;
        ((call.started_at - one.at).abs(), Reverse(before), one.event, one.session)
    };
    candidates.sort_by_key(nearness);
    if let Some(place) = candidates.iter().position(|one| one.session == kept.session)
        && place >= MAX_CANDIDATES
    {
        candidates.swap(MAX_CANDIDATES - 1, place);
    }
    candidates.truncate(MAX_CANDIDATES);
    candidates
}

/// 0.90 at the call's beginning, falling evenly to 0.50 at the window's far end, in hundredths.
fn click_confidence(distance: TimeDelta) -> f64 {
    let share = distance.abs().as_seconds_f64() / WINDOW_BEFORE.as_seconds_f64();
    let confidence = (CLICK_CONFIDENCE - CLICK_LOSS * share).max(LEAST_CLICK_CONFIDENCE);
    (confidence * 100.0).round() / 100.0
}

/// The first and the last instant at which an event may speak for a call that began at `started_at`.
pub fn window(started_at: DateTime<Utc>) -> (DateTime<Utc>, DateTime<Utc>) {
    (moved(started_at, -WINDOW_BEFORE), moved(started_at, WINDOW_AFTER))
}

/// The first and the last month in which a session with an event in the window of such a call can be stored: the event
/// arrived up to a day after it happened, and its session's month is that of the arrival or a neighbour.
pub fn months_of_window(started_at: DateTime<Utc>) -> (Month, Month) {
    let (from, to) = window(started_at);
    (Month::of(from).previous(), Month::of(moved(to, LONGEST_DELAY)).next())
}

/// The first and the last beginning of the calls in whose window an event at `at` lies.
pub fn calls_touched_by(at: DateTime<Utc>) -> (DateTime<Utc>, DateTime<Utc>) {
    (moved(at, -WINDOW_AFTER), moved(at, WINDOW_BEFORE))
}

/// It stays at time's end when there is no such instant.
fn moved(at: DateTime<Utc>, by: TimeDelta) -> DateTime<Utc> {
    let end = if by < TimeDelta::zero() { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    at.checked_add_signed(by).unwrap_or(end)
}

/// A candidate as it is kept in `calls.match_candidates` (a list) and `calls.match_evidence` (the credited one). What a
/// hand wrote there is read as far as it can be: a member that is absent or cannot be read is None.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Noted {
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub session_month: Option<Month>,
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub event_id: Option<EventId>,
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub event_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    #[serde(deserialize_with = "leniently", skip_serializing_if = "Option::is_none")]
    pub clicked_number: Option<E164>,
}

impl Noted {
    /// The list in `match_candidates`; entries that are no objects are passed over.
    pub fn list(column: &Value) -> Vec<Self> {
        let entries = column.as_array().map(Vec::as_slice).unwrap_or_default();
        entries.iter().filter_map(|entry| Self::deserialize(entry).ok()).collect()
    }

    /// The session, when it is named whole.
    pub fn session(&self, site_id: SiteId) -> Option<SessionKey> {
        Some(SessionKey { site_id, month: self.session_month?, id: self.session_id? })
    }

    /// The candidate, when it is noted whole.
    pub fn candidate(self, site_id: SiteId) -> Option<Candidate> {
        let (session, event, at) = (self.session(site_id)?, self.event_id?, self.event_at?);
        Some(Candidate { session, event, at, fingerprint: self.fingerprint, clicked: self.clicked_number })
    }
}

impl From<&Candidate> for Noted {
    fn from(candidate: &Candidate) -> Self {
        Self {
            session_id: Some(candidate.session.id),
            session_month: Some(candidate.session.month),
            event_id: Some(candidate.event),
            event_at: Some(candidate.at),
            fingerprint: candidate.fingerprint.clone(),
            clicked_number: candidate.clicked.clone(),
        }
    }
}

fn leniently<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

#[cfg(test)]
#[path = "matching_tests.rs"]
mod tests;
