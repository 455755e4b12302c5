//! The parsers of the program, by their own sources, and what must be true of whatever they accept.

#![allow(dead_code)] // of each source a part is used

use crate::domain::event::{Arrival, Event};
use crate::domain::evidence::paid_click;
use crate::domain::id::{SessionKey, SiteId};
use crate::domain::job::Job;
use crate::domain::month::Month;
use crate::domain::session::Session;
use crate::domain::signal::Signal;
use crate::domain::text::{MAX_LABEL, MAX_REFERRER, MAX_SHORT, MAX_URL, clean_map};
use crate::domain::traffic::TrafficRule;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use uuid::Uuid;

#[path = "../../src/domain/mod.rs"]
pub mod domain;
pub mod grpc;
pub mod http;

/// The site of every event here.
pub const SITE: SiteId = SiteId::from_uuid(Uuid::from_u128(0x0f5));

/// What a job is larger than its event's body at most: names of fields, and text that is escaped once more.
const MAX_JOB: usize = 512 << 10;

/// A moment that is the same in every run.
pub fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_795_000_000, 123_456_000).unwrap_or_default()
}

pub fn arrival() -> Arrival {
    Arrival::at(now())
}

/// What an accepted event promises the pipeline and the tables.
pub fn check_event(event: &Event) {
    assert_eq!(event.defect(), None);
    assert_eq!(event.site_id, SITE);
    let short = |text: &Option<String>| text.iter().for_each(|text| check_text(text, MAX_SHORT));
    check_text(&event.url, MAX_URL);
    check_text(&event.exit_page, MAX_URL);
    check_text(&event.category, MAX_SHORT);
    check_text(&event.action, MAX_SHORT);
    event.referrer.iter().for_each(|text| check_text(text, MAX_REFERRER));
    event.label.iter().for_each(|text| check_text(text, MAX_LABEL));
    let (clicks, campaign, geo) = (&event.click_ids, &event.campaign, &event.geo);
    for text in [
        &event.fingerprint,
        &event.language,
        &clicks.gclid,
        &clicks.wbraid,
        &clicks.gbraid,
        &clicks.gclsrc,
        &clicks.dclid,
        &clicks.fbclid,
        &clicks.ttclid,
        &clicks.msclkid,
        &campaign.utm_source,
        &campaign.utm_medium,
        &campaign.utm_campaign,
        &campaign.utm_term,
        &campaign.utm_content,
        &campaign.matchtype,
        &campaign.device,
        &campaign.network,
        &campaign.placement,
        &geo.city,
        &geo.district,
        &geo.country,
        &geo.timezone,
    ] {
        short(text);
    }
    check_text(&event.traffic.source, MAX_SHORT);
    check_text(&event.traffic.medium, MAX_SHORT);
    let paid = [&clicks.gclid, &clicks.wbraid, &clicks.gbraid, &clicks.gclsrc, &clicks.dclid];
    let google = event.traffic.rule == TrafficRule::GoogleClick;
    assert_eq!(paid.iter().any(|id| id.is_some()), google, "{:?}", event.traffic);

    let gauges = event.gauges;
    let counts = [gauges.duration_sec, gauges.cta_hovers, gauges.focus_dur, gauges.active_sec];
    assert!(counts.into_iter().flatten().all(|count| (0..=1_000_000_000).contains(&count)), "{gauges:?}");
    assert!(gauges.scroll_pct.is_none_or(|percent| (0..=100).contains(&percent)), "{gauges:?}");
    assert!(event.value.is_none_or(f64::is_finite));
    assert!(event.occurred_at <= event.received_at && event.received_at - event.occurred_at <= TimeDelta::days(1));
    let hint = Month::for_new_session(event.month_hint, event.received_at);
    assert!(Month::neighbourhood(event.arrival_month()).contains(&hint));
    assert!(!event.signals.contains(Signal::ReturningAdsAssisted), "that is a session's");
    assert!(!event.signals.contains(Signal::Scroll90) || event.signals.contains(Signal::Scroll50));
    assert!(event.signals.score().get() <= 100);

    assert_eq!(clean_map(event.metadata.clone()), event.metadata, "clean once is clean");
    event.metadata.iter().for_each(|(key, value)| check_kept(key, value));
    let job = Job::of(event).to_json().expect("what was accepted can be written");
    assert!(job.len() <= MAX_JOB, "{} bytes", job.len());
    let again = Job::event_from_json(&job, now());
    assert_eq!(again.expect("and read"), *event, "a queue changes nothing");
}

/// PostgreSQL takes it as it is.
fn check_kept(key: &str, value: &Value) {
    assert!(!key.contains('\0'));
    match value {
        Value::String(text) => assert!(!text.contains('\0')),
        Value::Array(items) => items.iter().for_each(|item| check_kept("", item)),
        Value::Object(map) => map.iter().for_each(|(key, value)| check_kept(key, value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn check_text(text: &str, most: usize) {
    assert!((1..=most).contains(&text.len()) && !text.contains('\0'), "{} bytes of {most}", text.len());
    assert_eq!(text.trim(), text);
}

/// Events of one visit make one session, in whatever order they come. Each id counts once.
pub fn check_merge(events: &[Event]) {
    let mut distinct: Vec<&Event> = Vec::new();
    for event in events {
        if !distinct.iter().any(|known| known.id == event.id) {
            distinct.push(event);
        }
    }
    let Some(first) = distinct.first() else { return };
    let key = SessionKey { site_id: SITE, month: first.arrival_month(), id: first.session_id };
    let session = |order: &[&Event]| {
        let mut session = Session::begin(key, order[0]);
        order[1..].iter().for_each(|event| session.merge(event));
        session
    };
    let whole = session(&distinct);
    assert_eq!(whole.event_count, i64::try_from(distinct.len()).expect("a few"));
    assert!(whole.signals().score().get() <= 100);
    let mut order = distinct.clone();
    order.reverse();
    let reversed = session(&order);
    assert_eq!(reversed, whole);
    assert_eq!(paid_click(&reversed), paid_click(&whole));
    assert_eq!(whole.is_direct(), paid_click(&whole).is_some(), "a direct visit has a click");
    order.rotate_left(distinct.len() / 2);
    assert_eq!(session(&order), whole);
}
