//! A session: what the distinct events of one visit add up to.
//!
//! Every field is a merge. *First* fields are the minimum by (time, event id), the exit page is the maximum, gauges take the
//! maximum, the counter counts distinct events, signals are a union, the traffic source is the strongest rule. So events may come in
//! any order and any batching. The caller's one duty: never merge the same event twice (the events table knows).

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::attribution::Attribution;
use super::event::{Event, Gauges};
use super::id::{EventId, SessionKey};
use super::signal::{Score, Signal, SignalSet};
use super::traffic::{Traffic, TrafficRule};

/// The place of an event in the order of its visit. Ties of the clock are broken by the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    pub at: DateTime<Utc>,
    pub event: EventId,
}

/// A text field of a session that is first told by some event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    EntryPage,
    Referrer,
    Fingerprint,
    Gclid,
    Wbraid,
    Gbraid,
    Gclsrc,
    Dclid,
    Fbclid,
    Ttclid,
    Msclkid,
    UtmSource,
    UtmMedium,
    UtmCampaign,
    UtmTerm,
    UtmContent,
    Matchtype,
    AdsDevice,
    AdsNetwork,
    AdsPlacement,
    DeviceType,
    DeviceOs,
    Browser,
    City,
    District,
    Country,
    Timezone,
    IpTruncated,
    Language,
}

/// A first value with the event that told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct First {
    pub stamp: Stamp,
    pub value: String,
}

/// The traffic source with the event that told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub stamp: Stamp,
    pub traffic: Traffic,
}

/// One visit, as far as its events are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub key: SessionKey,
    /// The earliest arrival of its events.
    pub created_at: DateTime<Utc>,
    /// The latest arrival.
    pub last_seen_at: DateTime<Utc>,
    /// Distinct events.
    pub event_count: i64,
    pub firsts: BTreeMap<Field, First>,
    /// Where the visit ended so far, told by the last event.
    pub exit: First,
    pub source: Source,
    pub gauges: Gauges,
    /// For each signal of its events, the first event that raised it.
    pub raised: BTreeMap<Signal, Stamp>,
    /// What matched calls raise, kept apart so that it can be taken back; see [`super::signal`].
    pub call_signals: SignalSet,
    /// Whether the history of the fingerprint says so; see [`super::ads_history`]. Not a fact of the session's own events.
    pub ads_assisted: bool,
}

impl Session {
    /// The session that begins with one event.
    pub fn begin(key: SessionKey, event: &Event) -> Self {
        let stamp = Stamp { at: event.occurred_at, event: event.id };
        let mut session = Self {
            key,
            created_at: event.received_at,
            last_seen_at: event.received_at,
            event_count: 0,
            firsts: BTreeMap::new(),
            exit: First { stamp, value: event.exit_page.clone() },
            source: Source { stamp, traffic: event.traffic.clone() },
            gauges: Gauges::default(),
            raised: BTreeMap::new(),
            call_signals: SignalSet::EMPTY,
            ads_assisted: false,
        };
        session.merge(event);
        session
    }

    /// Adds a distinct event.
    pub fn merge(&mut self, event: &Event) {
        let stamp = Stamp { at: event.occurred_at, event: event.id };
        self.created_at = self.created_at.min(event.received_at);
        self.last_seen_at = self.last_seen_at.max(event.received_at);
        self.event_count += 1;
        for (field, value) in told_by(event) {
            match self.firsts.get_mut(&field) {
                Some(first) if first.stamp <= stamp => {}
                Some(first) => *first = First { stamp, value: value.to_owned() },
                None => drop(self.firsts.insert(field, First { stamp, value: value.to_owned() })),
            }
        }
        if self.exit.stamp < stamp {
            self.exit = First { stamp, value: event.exit_page.clone() };
        }
        if (event.traffic.rule, stamp) < (self.source.traffic.rule, self.source.stamp) {
            self.source = Source { stamp, traffic: event.traffic.clone() };
        }
        self.gauges = self.gauges.max(event.gauges);
        for signal in event.signals.iter() {
            self.raised.entry(signal).and_modify(|first| *first = stamp.min(*first)).or_insert(stamp);
        }
    }

    pub fn first(&self, field: Field) -> Option<&str> {
        self.firsts.get(&field).map(|first| first.value.as_str())
    }

    pub fn fingerprint(&self) -> Option<&str> {
        self.first(Field::Fingerprint)
    }

    /// Whether its own events carry an ad's click id.
    pub fn is_direct(&self) -> bool {
        [Field::Gclid, Field::Wbraid, Field::Gbraid].iter().any(|field| self.firsts.contains_key(field))
    }

    pub fn attribution(&self) -> Attribution {
        match (self.is_direct(), self.ads_assisted) {
            (true, _) => Attribution::DirectToAds,
            (false, true) => Attribution::AdsAssisted,
            (false, false) => Attribution::OrganicReferral,
        }
    }

    /// The union of the signals of all its events, of its matched calls and of its history.
    pub fn signals(&self) -> SignalSet {
        let events: SignalSet = self.raised.keys().copied().collect();
        with_history(events.union(self.call_signals), self.attribution())
    }

    pub fn score(&self) -> Score {
        self.signals().score()
    }

    /// Which event told what, in the compact form of the `provenance` column.
    pub fn provenance(&self) -> Provenance {
        let mut evidence = Vec::new();
        for (field, first) in &self.firsts {
            entry(&mut evidence, first.stamp).fields.push(*field);
        }
        for (signal, stamp) in &self.raised {
            entry(&mut evidence, *stamp).signals |= 1 << *signal as u8;
        }
        entry(&mut evidence, self.exit.stamp).exit = true;
        entry(&mut evidence, self.source.stamp).traffic = Some(self.source.traffic.rule);
        evidence.sort_unstable_by_key(Evidence::stamp);
        if let Some(most) = evidence.iter_mut().rev().max_by_key(|entry| entry.fields.len()) {
            most.rest = !std::mem::take(&mut most.fields).is_empty();
        }
        Provenance(evidence)
    }
}

/// The entry of an event, which is added if there is none yet.
fn entry(evidence: &mut Vec<Evidence>, stamp: Stamp) -> &mut Evidence {
    let at = evidence.iter().position(|entry| entry.stamp() == stamp).unwrap_or_else(|| {
        evidence.push(Evidence::by(stamp));
        evidence.len() - 1
    });
    &mut evidence[at]
}

/// `signals` without and with what attribution adds to them.
pub fn with_history(own: SignalSet, attribution: Attribution) -> SignalSet {
    match attribution {
        Attribution::AdsAssisted => own.with(Signal::ReturningAdsAssisted),
        Attribution::DirectToAds | Attribution::OrganicReferral => own.without(Signal::ReturningAdsAssisted),
    }
}

fn told_by(event: &Event) -> impl Iterator<Item = (Field, &str)> {
    let (clicks, campaign, device) = (&event.click_ids, &event.campaign, event.device.as_ref());
    [
        (Field::EntryPage, Some(event.url.as_str())),
        (Field::Referrer, event.referrer.as_deref()),
        (Field::Fingerprint, event.fingerprint.as_deref()),
        (Field::Gclid, clicks.gclid.as_deref()),
        (Field::Wbraid, clicks.wbraid.as_deref()),
        (Field::Gbraid, clicks.gbraid.as_deref()),
        (Field::Gclsrc, clicks.gclsrc.as_deref()),
        (Field::Dclid, clicks.dclid.as_deref()),
        (Field::Fbclid, clicks.fbclid.as_deref()),
        (Field::Ttclid, clicks.ttclid.as_deref()),
        (Field::Msclkid, clicks.msclkid.as_deref()),
        (Field::UtmSource, campaign.utm_source.as_deref()),
        (Field::UtmMedium, campaign.utm_medium.as_deref()),
        (Field::UtmCampaign, campaign.utm_campaign.as_deref()),
        (Field::UtmTerm, campaign.utm_term.as_deref()),
        (Field::UtmContent, campaign.utm_content.as_deref()),
        (Field::Matchtype, campaign.matchtype.as_deref()),
        (Field::AdsDevice, campaign.device.as_deref()),
        (Field::AdsNetwork, campaign.network.as_deref()),
        (Field::AdsPlacement, campaign.placement.as_deref()),
        (Field::DeviceType, device.map(|d| d.kind.as_str())),
        (Field::DeviceOs, device.and_then(|d| d.os.as_deref())),
        (Field::Browser, device.and_then(|d| d.browser.as_deref())),
        (Field::City, event.geo.city.as_deref()),
        (Field::District, event.geo.district.as_deref()),
        (Field::Country, event.geo.country.as_deref()),
        (Field::Timezone, event.geo.timezone.as_deref()),
        (Field::IpTruncated, event.ip.as_ref().map(|ip| ip.as_str())),
        (Field::Language, event.language.as_deref()),
    ]
    .into_iter()
    .filter_map(|(field, value)| Some((field, value?)))
}

/// Which events told what: the merge state of a session and the evidence behind it, in one. One entry an event that tells something.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Provenance(pub Vec<Evidence>);

/// The fields, signals and ends of a session that one event is the first (or last) to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    pub event: EventId,
    #[serde(with = "chrono::serde::ts_microseconds")]
    pub at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<Field>,
    /// It told every field that no entry names. Mostly that is nearly all of them, and a session is written anew with each of its events.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rest: bool,
    /// The bits of [`SignalSet`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub signals: i32,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exit: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<TrafficRule>,
}

impl Evidence {
    fn by(stamp: Stamp) -> Self {
        let Stamp { at, event } = stamp;
        Self { event, at, fields: Vec::new(), rest: false, signals: 0, exit: false, traffic: None }
    }

    pub fn stamp(&self) -> Stamp {
        Stamp { at: self.at, event: self.event }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde asks for
fn is_zero(bits: &i32) -> bool {
    *bits == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::event::{Arrival, Draft, FieldNames};
    use crate::domain::id::{SessionId, SiteId};
    use proptest::prelude::*;
    use serde_json::json;
    use uuid::Uuid;

    fn key() -> SessionKey {
        SessionKey {
            site_id: SiteId::from_uuid(Uuid::from_u128(1)),
            month: "2026-11-01".parse().expect("a month"),
            id: SessionId::from_uuid(Uuid::from_u128(2)),
        }
    }

    fn event(n: u32, second: i64, kind: u8) -> Event {
        let at = DateTime::from_timestamp(1_795_000_000 + second, 0).unwrap_or_default();
        let meta = match kind % 4 {
            0 => json!({"fp": format!("f{n}"), "scroll_pct": n % 100}),
            1 => json!({"gclid": format!("g{n}"), "city": format!("c{n}")}),
            2 => json!({"cta_hovers": n, "exit_page": format!("/exit{n}")}),
            _ => json!({"fbclid": "x", "duration_sec": n}),
        };
        let draft = Draft {
            id: Some(Uuid::from_u128(u128::from(n)).to_string()),
            url: Some(format!("https://a.example/{n}?utm_source=s{n}")),
            session: Some("s".into()),
            category: Some(if kind.is_multiple_of(3) { "interaction" } else { "conversion" }.into()),
            referrer: kind.is_multiple_of(5).then(|| "https://www.google.com/".into()),
            meta: meta.as_object().cloned().unwrap_or_default(),
            ..Draft::default()
        };
        let names = FieldNames { url: "u", session: "sid" };
        Event::accept(key().site_id, draft, &Arrival::at(at), names).expect("a whole draft")
    }

    fn fold<'a>(events: impl IntoIterator<Item = &'a Event>) -> Option<Session> {
        events.into_iter().fold(None, |session: Option<Session>, event| match session {
            None => Some(Session::begin(key(), event)),
            Some(mut session) => {
                session.merge(event);
                Some(session)
            }
        })
    }

    proptest! {
        #[test]
        fn the_order_of_events_does_not_matter(
            spec in prop::collection::vec((0i64..5, any::<u8>()), 1..12),
            order in any::<u64>(),
        ) {
            let events: Vec<Event> = spec.iter().zip(1u32..).map(|((second, kind), n)| event(n, *second, *kind)).collect();
            let mut shuffled: Vec<&Event> = events.iter().collect();
            shuffled.sort_by_key(|e| e.id.as_uuid().as_u128().wrapping_mul(u128::from(order) | 1).rotate_left(17));
            prop_assert_eq!(fold(&events), fold(shuffled));
        }
    }

    #[test]
    fn first_fields_come_from_the_first_event_that_tells_them() {
        let session = fold(&[event(3, 30, 1), event(1, 10, 3), event(2, 20, 0)]).expect("three events");
        assert_eq!(session.first(Field::EntryPage), Some("https://a.example/1?utm_source=s1"));
        assert_eq!(session.first(Field::Fingerprint), Some("f2"));
        assert_eq!(session.exit.value, "https://a.example/3?utm_source=s3");
        assert_eq!(session.source.traffic.source, "Google Ads", "stronger than the earlier fbclid");
        assert_eq!(session.attribution(), Attribution::DirectToAds);
        assert_eq!((session.event_count, session.gauges.duration_sec), (3, Some(1)));
    }

    #[test]
    fn history_adds_its_points_only_to_an_assisted_session() {
        let mut session = fold(&[event(1, 0, 3)]).expect("one event");
        let plain = session.score().get();
        session.ads_assisted = true;
        assert_eq!((session.attribution(), session.score().get()), (Attribution::AdsAssisted, plain + 25));
        session.merge(&event(2, 1, 1));
        assert!(!session.signals().contains(Signal::ReturningAdsAssisted), "Direct is stronger");
    }
}
