//! What the pure domain costs, an event or a call at a time: `cargo bench --bench domain`.
//!
//! Everything here happens on the way of every single event, in one of the server's threads, without waiting for anybody.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use divan::{Bencher, black_box};
use opsmantik::domain::call::{Channel, Direction};
use opsmantik::domain::campaign::{Campaign, ClickIds};
use opsmantik::domain::client::Device;
use opsmantik::domain::event::{Arrival, Event};
use opsmantik::domain::id::{EventId, SessionId, SessionKey, SiteId};
use opsmantik::domain::job::Job;
use opsmantik::domain::matching::{Activity, Click, Facts, decide};
use opsmantik::domain::month::Month;
use opsmantik::domain::page::Page;
use opsmantik::domain::session::Session;
use opsmantik::domain::signal::SignalSet;
use opsmantik::domain::telephone::E164;
use opsmantik::http::signature::Verifier;
use opsmantik::http::wire::{self, Body};
use serde_json::json;
use sha2::{Digest, Sha256};
use uuid::Uuid;

const AGENT: &str = "Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Mobile Safari/537.36";
const RECEIVER: &str = "https://collect.example/api/sync/worker";
const KEY: &str = "sig_of-the-bench-and-of-nobody-else";

fn main() {
    divan::main();
}

fn site() -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(1))
}

/// As the tracker of a page sends it that an ad led to.
fn body(event: u128) -> String {
    let gclid = "Cj0KCQ0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF";
    json!({
        "id": Uuid::from_u128(event), "s": "shop", "sid": Uuid::from_u128(7), "sm": "2026-11-01",
        "u": format!("https://shop.example/emergency-locksmith?utm_source=google&utm_medium=cpc&utm_campaign=night%20shift&matchtype=e&device=m&network=g&gclid={gclid}"),
        "ec": "conversion", "ea": "phone_call", "el": "tel:+12025550123", "r": "https://www.google.com/",
        "ts": 1_795_000_000_000_i64 + i64::try_from(event).unwrap_or_default(),
        "meta": {
            "fp": "0123456789abcdef012345678", "gclid": gclid, "lan": "tr-TR", "mem": 8, "con": 8, "sw": 390, "sh": 844, "dpr": 3,
            "timezone": "Europe/Istanbul", "con_type": "4g", "intent_stamp": 1, "intent_action": "phone_call",
        },
    })
    .to_string()
}

fn arrival() -> Arrival {
    Arrival { device: Device::of_user_agent(AGENT), ..Arrival::at(now()) }
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_795_000_000, 0).unwrap_or_default()
}

fn read(text: &str) -> wire::WireEvent {
    match wire::read(text.as_bytes()) {
        Ok(Body::One(event)) => *event,
        other => panic!("the bench's own body is one event, and not {other:?}"),
    }
}

fn event(number: u128) -> Event {
    read(&body(number)).accept(site(), &arrival()).expect("the bench's own event is whole")
}

#[divan::bench]
fn wire_parse_of_a_sync_body(bencher: Bencher<'_, '_>) {
    let text = body(1);
    bencher.bench(|| wire::read(black_box(text.as_bytes())));
}

#[divan::bench]
fn event_accept(bencher: Bencher<'_, '_>) {
    let (text, arrival) = (body(1), arrival());
    bencher.with_inputs(|| read(&text)).bench_values(|read| read.accept(site(), &arrival));
}

#[divan::bench]
fn user_agent(bencher: Bencher<'_, '_>) {
    bencher.bench(|| Device::of_user_agent(black_box(AGENT)));
}

#[divan::bench]
fn url_and_click_id_parse(bencher: Bencher<'_, '_>) {
    let url = event(1).url;
    bencher.bench(|| {
        let page = Page::read(black_box(&url));
        (ClickIds::of(&page), Campaign::of(&page))
    });
}

#[divan::bench]
fn session_merge(bencher: Bencher<'_, '_>) {
    let (first, next) = (event(1), event(2));
    let key = SessionKey { site_id: site(), month: first.arrival_month(), id: first.session_id };
    let session = Session::begin(key, &first);
    bencher.with_inputs(|| session.clone()).bench_refs(|session| session.merge(black_box(&next)));
}

#[divan::bench]
fn score_and_breakdown(bencher: Bencher<'_, '_>) {
    let signals: SignalSet = opsmantik::domain::signal::Signal::ALL.into_iter().collect();
    bencher.bench(|| (black_box(signals).score(), black_box(signals).breakdown()));
}

#[divan::bench]
fn job_there_and_back(bencher: Bencher<'_, '_>) {
    let event = event(1);
    let later = now() + TimeDelta::seconds(5);
    bencher.bench(|| Job::of(black_box(&event)).to_json().map(|text| Job::event_from_json(&text, later)));
}

/// How many sessions were active, and how many clicked, in the window of a call.
#[divan::bench(args = [1, 20, 500])]
fn match_rule(bencher: Bencher<'_, '_>, sessions: u32) {
    let number: E164 = "+12025550123".parse().expect("a number of the films, in E.164");
    let key = |n: u32| SessionKey {
        site_id: site(),
        month: Month::containing(now().date_naive()),
        id: SessionId::from_uuid(Uuid::from_u128(n.into())),
    };
    let at = |n: u32| now() - TimeDelta::seconds(i64::from(n) * 1800 / i64::from(sessions));
    let id = |n: u32| EventId::from_uuid(Uuid::from_u128(u128::from(n)));
    let activity: Vec<Activity> =
        (0..sessions).map(|n| Activity { session: key(n), event: id(n), at: at(n) }).collect();
    let click =
        |n: u32| Click { session: key(n), event: id(n), at: at(n), number: Some(number.clone()), whatsapp: false };
    let clicks: Vec<Click> = (0..sessions).map(click).collect();
    let facts = Facts {
        site_id: site(),
        started_at: now(),
        channel: Channel::Phone,
        direction: Direction::Inbound,
        dialled: &number,
        anonymous: false,
        fingerprint: Some("0123456789abcdef012345678"),
    };
    let by_number = Facts { fingerprint: None, ..facts };
    bencher.bench(|| (decide(black_box(&facts), &activity, &[]), decide(black_box(&by_number), &[], &clicks)));
}

#[divan::bench]
fn qstash_signature(bencher: Bencher<'_, '_>) {
    let body = Job::new(event(1)).to_json().expect("a job");
    let now = Utc::now().timestamp();
    let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(&body));
    let claims = json!({"iss": "Upstash", "sub": RECEIVER, "exp": now + 3600, "nbf": now, "body": hash});
    let key = jsonwebtoken::EncodingKey::from_secret(KEY.as_bytes());
    let signature = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("a signature");
    let verifier = Verifier::new(&[KEY], RECEIVER);
    verifier.verify(Some(&signature), body.as_bytes()).expect("it is good");
    bencher.bench(|| verifier.verify(black_box(Some(&signature)), black_box(body.as_bytes())));
}
