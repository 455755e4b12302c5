//! Which calls have to be looked at again because of what just came in: the other side of [`super::matching`].
//!
//! A match is a function of the events in the call's window and of the sessions that they belong to. So a call is touched by a click on
//! its number in its window, by an event of a session with its fingerprint, by a session that gains or loses that fingerprint, and by whatever changes
//! what was frozen of the session that it is credited to. Naming too many calls changes nothing, but each is looked for in all the clicks of its window,
//! while the events of its site wait.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};

use super::call::Channel;
use super::event::{Event, is_call_action};
use super::id::{SessionKey, SiteId};
use super::matching::{LONGEST_DELAY, calls_touched_by, clicked};
use super::session::Session;
use super::signal::Signal;
use super::telephone::E164;

/// From one time to another, both included.
pub type Span = (DateTime<Utc>, DateTime<Utc>);

/// Sites, with the regions in which their national numbers are read.
pub type Regions = HashMap<SiteId, Option<String>>;

/// Which of a site's calls a click speaks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dialled {
    /// Those to the number that was clicked.
    Number(E164),
    /// Those by this channel, whatever their number: the click does not tell it.
    Any(Channel),
    /// That depends on the site's region: the action and the label of the click.
    Unread(String, Option<String>),
}

impl Dialled {
    /// None: those of nobody.
    fn read(self, region: Option<&str>) -> Option<Self> {
        let Self::Unread(action, label) = self else { return Some(self) };
        match clicked((&action, label.as_deref()), region) {
            (Some(number), _) => Some(Self::Number(number)),
            (None, true) => Some(Self::Any(Channel::Whatsapp)),
            (None, false) => None,
        }
    }
}

/// What came in, as far as calls may care.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Calls of the site that began in this time: a click came in.
    pub clicks: Vec<(SiteId, Dialled, Span)>,
    /// Calls of the site with this fingerprint that began in this time.
    pub fingerprints: Vec<(SiteId, String, Span)>,
    /// Calls that are credited to this session and began at this time or later.
    pub credited: Vec<(SessionKey, DateTime<Utc>)>,
}

impl Touched {
    pub fn is_empty(&self) -> bool {
        self.clicks.is_empty() && self.fingerprints.is_empty() && self.credited.is_empty()
    }

    /// For each site the earliest start of a call that may be touched.
    pub fn since(&self) -> BTreeMap<SiteId, DateTime<Utc>> {
        let clicks = self.clicks.iter().map(|(site, _, span)| (*site, span.0));
        let told = self.fingerprints.iter().map(|(site, _, span)| (*site, span.0));
        let credited = self.credited.iter().map(|(key, since)| (key.site_id, *since));
        let mut earliest: BTreeMap<SiteId, DateTime<Utc>> = BTreeMap::new();
        for (site, since) in clicks.chain(told).chain(credited) {
            earliest.entry(site).and_modify(|earliest| *earliest = since.min(*earliest)).or_insert(since);
        }
        earliest
    }

    /// What of it belongs to these sites, with the clicks read.
    pub fn of_sites(mut self, sites: &Regions) -> Self {
        let read = |(site, dialled, span): (SiteId, Dialled, Span)| {
            Some((site, dialled.read(sites.get(&site)?.as_deref())?, span))
        };
        self.clicks = self.clicks.into_iter().filter_map(read).collect::<BTreeSet<_>>().into_iter().collect();
        self.fingerprints.retain(|(site, ..)| sites.contains_key(site));
        self.credited.retain(|(key, _)| sites.contains_key(&key.site_id));
        self
    }

    /// A session went from `before` (none: it is new) to `after` by these new events.
    pub fn by_session(&mut self, before: Option<&Session>, after: &Session, new: &[&Event]) {
        let site = after.key.site_id;
        for event in new {
            if event.signals.contains(Signal::PrimaryConversion) && is_call_action(&event.action) {
                let click = Dialled::Unread(event.action.clone(), event.label.clone());
                self.clicks.push((site, click, calls_touched_by(event.occurred_at)));
            }
        }
        let old = before.and_then(Session::fingerprint);
        let fingerprint = after.fingerprint();
        let moved = before.is_some() && old != fingerprint;
        let times = new.iter().map(|event| event.occurred_at);
        let span = if moved {
            // Every event of the session now speaks for another fingerprint.
            let earliest = calls_touched_by(after.created_at - LONGEST_DELAY).0;
            Some((earliest, calls_touched_by(after.last_seen_at).1))
        } else {
            times
                .clone()
                .min()
                .zip(times.clone().max())
                .map(|(from, to)| (calls_touched_by(from).0, calls_touched_by(to).1))
        };
        if let Some(span) = span {
            let names = old.into_iter().filter(|_| moved).chain(fingerprint);
            self.fingerprints.extend(names.map(|name| (site, name.to_owned(), span)));
        }
        let Some(before) = before else { return };
        if moved || before.attribution() != after.attribution() {
            self.credited(after.key);
        } else if let Some(first) = times.min() {
            // What the session did after the call is none of the call's business.
            self.credited.push((after.key, calls_touched_by(first).0));
        }
    }

    /// All calls that are credited to this session.
    pub fn credited(&mut self, session: SessionKey) {
        self.credited.push((session, DateTime::UNIX_EPOCH));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::{Arrival, Draft, FieldNames};
    use crate::domain::id::SessionId;
    use uuid::Uuid;

    fn key() -> SessionKey {
        SessionKey {
            site_id: SiteId::from_uuid(Uuid::from_u128(1)),
            month: "2026-11-01".parse().expect("a month"),
            id: SessionId::from_uuid(Uuid::from_u128(2)),
        }
    }

    fn event(n: u128, second: i64, action: &str, fingerprint: Option<&str>) -> Event {
        let mut draft = Draft {
            id: Some(Uuid::from_u128(n).to_string()),
            url: Some("https://a.example/".into()),
            session: Some("s".into()),
            action: Some(action.into()),
            ..Draft::default()
        };
        if let Some(fingerprint) = fingerprint {
            draft.meta.insert("fp".into(), fingerprint.into());
        }
        let names = FieldNames { url: "u", session: "sid" };
        Event::accept(key().site_id, draft, &Arrival::at(at(second)), names).expect("a whole draft")
    }

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_795_000_000 + second, 0).unwrap_or_default()
    }

    fn touched(stored: &[&Event], new: &[&Event]) -> Touched {
        let fold = |events: &[&Event]| {
            events.iter().fold(None, |session: Option<Session>, event| match session {
                None => Some(Session::begin(key(), event)),
                Some(mut session) => {
                    session.merge(event);
                    Some(session)
                }
            })
        };
        let before = fold(stored);
        let all: Vec<&Event> = stored.iter().chain(new).copied().collect();
        let mut touched = Touched::default();
        touched.by_session(before.as_ref(), &fold(&all).expect("an event"), new);
        touched
    }

    #[test]
    fn a_click_touches_the_calls_whose_window_it_lies_in() {
        let click = event(1, 0, "phone_call", None);
        let told = touched(&[], &[&click]);
        let unread = Dialled::Unread("phone_call".into(), None);
        assert_eq!(told.clicks, [(key().site_id, unread, (at(-120), at(1800)))]);
        assert!(told.fingerprints.is_empty() && told.credited.is_empty());
        assert!(touched(&[], &[&event(1, 0, "view", None)]).is_empty(), "a view without fingerprint touches nothing");
    }

    #[test]
    fn a_click_touches_the_calls_to_its_number_and_no_others() {
        let click = |action: &str, label: &str| {
            let mut event = event(1, 0, action, None);
            event.label = Some(label.to_owned());
            let sites = Regions::from([(key().site_id, Some("US".to_owned()))]);
            let told = touched(&[], &[&event, &event]).of_sites(&sites);
            told.clicks.into_iter().map(|(_, dialled, _)| dialled).collect::<Vec<_>>()
        };
        let number = || vec![Dialled::Number("+13035550100".parse().expect("a number"))];
        assert_eq!(click("phone_call", "tel:303-555-0100"), number(), "once, and as its region reads it");
        assert_eq!(click("whatsapp", "https://wa.me/13035550100"), number());
        assert_eq!(click("whatsapp", "chat with us"), [Dialled::Any(Channel::Whatsapp)]);
        assert_eq!(click("phone_call", "call us"), []);
        let elsewhere = touched(&[], &[&event(1, 0, "phone_call", None)]).of_sites(&Regions::new());
        assert!(elsewhere.is_empty(), "the site has no calls");
    }

    #[test]
    fn a_session_with_a_fingerprint_touches_the_calls_that_brought_it() {
        let told = touched(&[], &[&event(1, 0, "view", Some("f")), &event(2, 60, "view", None)]);
        assert_eq!(told.fingerprints, [(key().site_id, "f".to_owned(), (at(-120), at(1860)))]);
    }

    #[test]
    fn a_late_fingerprint_touches_what_the_session_did_before() {
        let (silent, telling) = (event(1, 0, "view", None), event(2, 7200, "view", Some("f")));
        let told = touched(&[&silent], &[&telling]);
        let [(_, name, (from, to))] = told.fingerprints.as_slice() else { panic!("{told:?}") };
        assert_eq!(name, "f");
        assert!(*from <= at(-120) && *to >= at(7200 + 1800), "{told:?}");
        // An earlier event that tells another one takes the first away.
        let earlier = event(3, -10, "view", Some("e"));
        let names: Vec<String> =
            touched(&[&telling], &[&earlier]).fingerprints.into_iter().map(|(_, name, _)| name).collect();
        assert_eq!(names, ["f", "e"]);
    }

    #[test]
    fn what_a_session_does_later_does_not_touch_what_was_frozen() {
        let (first, later) = (event(1, 0, "view", None), event(2, 600, "view", None));
        assert_eq!(touched(&[&first], &[&later]).credited, [(key(), at(600 - 120))]);
    }
}
