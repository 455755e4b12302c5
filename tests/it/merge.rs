//! The one idea: what is stored is a function of the set of distinct events and pushes of calls, and of nothing else.

use std::time::Duration;

use chrono::TimeDelta;
use opsmantik::calls::{Calls, Failed};
use opsmantik::domain::call::Status;
use opsmantik::domain::event::Event;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::outcome::{Outcome, Unavailable};
use opsmantik::domain::push::{Draft, Push};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

use crate::support::calls::{BUSINESS, call, ended, push, with_fingerprint};
use crate::support::database::{Database, database};
use crate::support::events::{Spec, at};

const MONTHS: [&str; 8] =
    ["2026-01-01", "2026-02-01", "2026-03-01", "2026-04-01", "2026-05-01", "2026-06-01", "2026-07-01", "2026-08-01"];

pub fn sites() -> [SiteId; 2] {
    [SiteId::from_uuid(Uuid::from_u128(0xA)), SiteId::from_uuid(Uuid::from_u128(0xB))]
}

pub async fn prepared() -> Database {
    let database = database().await;
    for (site, name) in sites().into_iter().zip(["a", "b"]) {
        database.site_with_id(name, site).await;
    }
    for month in MONTHS {
        database.ensure_month(month).await;
    }
    database
}

/// Visits over half a year on two sites that share fingerprints: some paid, some not, some over a month's end, some with a
/// fingerprint that is told late or changes.
fn history(rng: &mut StdRng) -> Vec<Event> {
    let mut events = Vec::new();
    let mut id = 0;
    for visit in 0..60 {
        let begins = if visit % 6 == 0 {
            at("2026-02-28T23:58:00Z") + TimeDelta::seconds(rng.random_range(0..115))
        } else {
            at("2026-02-02T00:00:00Z") + TimeDelta::minutes(rng.random_range(0..60 * 24 * 150))
        };
        let month = begins.format("%Y-%m-01").to_string();
        let site = sites()[rng.random_range(0..2)];
        let fingerprint = format!("f{}", rng.random_range(0..6));
        let paid = rng.random_bool(0.35);
        for n in 0..rng.random_range(1..=4) {
            id += 1;
            let moment = begins + TimeDelta::seconds(rng.random_range(0..240));
            let mut spec = Spec::new(id, &format!("visit-{visit}"), moment).hint(&month);
            if rng.random_bool(0.8) {
                spec = spec.fingerprint(&fingerprint);
            } else if rng.random_bool(0.2) {
                spec = spec.fingerprint("another");
            }
            if paid && (n == 0 || rng.random_bool(0.5)) {
                spec = spec.url(&format!("https://a.example/?gclid=g{id}&utm_source=s{id}"));
            }
            if rng.random_bool(0.3) {
                spec = spec.clicks(BUSINESS);
            }
            events.push(spec.event(site));
        }
    }
    events
}

/// Calls around some of the events, each told in a few parts: when it began, who called, whose browser it was, how it ended.
fn telephone(rng: &mut StdRng, round: u64, events: &[Event]) -> Vec<Push> {
    let mut pushes = Vec::new();
    for n in 0..60 {
        let near = &events[rng.random_range(0..events.len())];
        let began = near.occurred_at + TimeDelta::seconds(rng.random_range(-200..2000));
        let call = call(&format!("call-{round}-{n}"), began);
        let unknown = Draft { caller_number: None, started_at: Some(began + TimeDelta::seconds(70)), ..call.clone() };
        let fingerprint = format!("f{}", rng.random_range(0..6));
        let known = rng.random_bool(0.4);
        let parts = [
            unknown.clone(),
            call.clone(),
            if known { with_fingerprint(unknown.clone(), &fingerprint) } else { unknown.clone() },
            ended(unknown.clone(), Status::InProgress, 1),
            ended(unknown, Status::Completed, 17),
        ];
        pushes.extend(parts.map(|part| push(near.site_id, part)));
    }
    pushes
}

/// What calls come to. When they were matched and written is not part of the idea.
pub async fn calls_of(database: &Database) -> Vec<serde_json::Value> {
    let whole = "to_jsonb(c) - '{matched_at,created_at,updated_at}'::text[]";
    database.rows(&format!("SELECT {whole} AS call FROM calls c ORDER BY site_id, id")).await
}

pub fn pipeline(database: &Database, writers: usize, batch: usize) -> Pipeline {
    let config = PipelineConfig { writers, batch, patience: Duration::from_secs(60), ..PipelineConfig::default() };
    Pipeline::start(database.store.clone(), Nudge::default(), config)
}

pub fn assert_durable(outcomes: &[Outcome]) {
    assert!(outcomes.iter().all(|o| matches!(o, Outcome::Stored(_) | Outcome::Duplicate(_))), "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn any_order_repetition_batching_and_number_of_writers_stores_the_same() {
    let reference = prepared().await;
    for seed in 0..3u64 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut events = history(&mut rng);
        for event in &mut events {
            // Each round adds to the same tables: other sessions and events, the same sites and fingerprints.
            event.id = opsmantik::domain::id::EventId::from_uuid(Uuid::from_u128(
                event.id.as_uuid().as_u128() + u128::from(seed) * 1_000_000,
            ));
        }
        let one_by_one = pipeline(&reference, 1, 1);
        events.sort_by_key(|event| (event.received_at, event.id));
        for event in &events {
            assert_durable(&one_by_one.submit(vec![event.clone()]).await);
        }
        one_by_one.drain().await;
        let pushes = telephone(&mut rng, seed, &events);
        for push in &pushes {
            let recorded =
                Calls::new(reference.store.clone()).record(push.key.site_id(), std::slice::from_ref(push)).await;
            recorded.expect("the database answers");
        }

        let shuffled = prepared().await;
        // Two servers on one database, each with several writers.
        let servers = [pipeline(&shuffled, 4, 7), pipeline(&shuffled, 3, 64)];
        let mut deliveries: Vec<Event> = events.iter().cloned().chain(events.iter().cloned()).collect();
        deliveries.shuffle(&mut rng);
        let mut waiting = tokio::task::JoinSet::new();
        let (calls, mut ringing) = (Calls::new(shuffled.store.clone()), tokio::task::JoinSet::new());
        let mut told: Vec<Push> = pushes.iter().cloned().chain(pushes.iter().cloned()).collect();
        told.shuffle(&mut rng);
        while !deliveries.is_empty() || !told.is_empty() {
            for push in told.split_off(told.len() - told.len().min(rng.random_range(0..40))) {
                let calls = calls.clone();
                ringing.spawn(async move {
                    // More at once than there are seats: a provider that is told to come again does.
                    while let Err(failed) = calls.record(push.key.site_id(), std::slice::from_ref(&push)).await {
                        assert!(matches!(failed, Failed::Unavailable(Unavailable::Busy)), "{failed}");
                    }
                });
            }
            if deliveries.is_empty() {
                continue;
            }
            let batch = deliveries.split_off(deliveries.len() - rng.random_range(1..=deliveries.len().min(40)));
            let server = servers[rng.random_range(0..2)].clone();
            waiting.spawn(async move { server.submit(batch).await });
        }
        while let Some(outcomes) = waiting.join_next().await {
            assert_durable(&outcomes.expect("no panic"));
        }
        while let Some(recorded) = ringing.join_next().await {
            recorded.expect("no panic");
        }
        for server in servers {
            server.drain().await;
        }

        let (expected, stored) = (reference.traffic().await, shuffled.traffic().await);
        assert_eq!(stored[1].len(), events.len(), "each event once");
        for (table, (expected, stored)) in ["sessions", "events"].iter().zip(expected.into_iter().zip(stored)) {
            for (expected, stored) in expected.iter().zip(&stored) {
                assert_eq!(expected, stored, "{table}, seed {seed}");
            }
            assert_eq!(expected.len(), stored.len(), "{table}, seed {seed}");
        }
        let (expected, stored) = (calls_of(&reference).await, calls_of(&shuffled).await);
        assert_eq!(stored.len(), 60, "each call once");
        for (expected, stored) in expected.iter().zip(&stored) {
            assert_eq!(expected, stored, "calls, seed {seed}");
        }
        for waiting in ["call_rematches", "late_followers"] {
            assert_eq!(shuffled.count(&format!("SELECT count(*) FROM opsmantik.{waiting}")).await, 0, "nothing waits");
        }
        let methods = shuffled.count("SELECT count(DISTINCT match_method) FROM calls").await;
        assert_eq!(methods, 4, "the calls have something of everything");
        let assisted = "SELECT count(*) FROM sessions WHERE attribution = 'Ads-Assisted'";
        assert!(shuffled.count(assisted).await > 3, "the history has something to find");
        reference.admin.batch_execute("TRUNCATE events, sessions, calls CASCADE").await.expect("an empty reference");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_earlier_paid_visit_that_arrives_late_corrects_the_later_one() {
    let database = prepared().await;
    let [site, other] = sites();
    let server = pipeline(&database, 2, 64);
    let later = Spec::new(1, "later", at("2026-05-20T10:00:00Z")).fingerprint("f").action("whatsapp");
    let paid = |id, session: &str, time: &str| {
        Spec::new(id, session, at(time)).fingerprint("f").url("https://a.example/?gbraid=1")
    };
    assert_durable(&server.submit(vec![later.event(site), later.event(other)]).await);
    assert_durable(&server.submit(vec![paid(2, "too-old", "2026-02-19T09:59:59Z").event(site)]).await);
    let attribution = "SELECT attribution || ' ' || lead_score FROM sessions WHERE id = $1 AND site_id = $2";
    let told = |site: SiteId| {
        let id = opsmantik::domain::id::SessionId::from_text(site, "later").as_uuid();
        let database = &database;
        async move {
            let row = database.admin.query_one(attribution, &[&id, &site.as_uuid()]).await.expect("the session");
            row.get::<_, String>(0)
        }
    };
    assert_eq!(told(site).await, "Organic/Referral 60", "more than 90 days before does not count");
    assert_durable(&server.submit(vec![paid(3, "after", "2026-05-20T10:00:01Z").event(site)]).await);
    assert_eq!(told(site).await, "Organic/Referral 60", "nor does a later one");
    assert_durable(&server.submit(vec![paid(4, "earlier", "2026-02-19T10:00:00Z").event(site)]).await);
    assert_eq!(told(site).await, "Ads-Assisted 85", "exactly 90 days before");
    assert_eq!(told(other).await, "Organic/Referral 60", "another site's history is not ours");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_first_events_that_race_over_a_months_end_make_one_session() {
    let database = prepared().await;
    let [site, _] = sites();
    let servers = [pipeline(&database, 4, 16), pipeline(&database, 4, 16)];
    let mut waiting = tokio::task::JoinSet::new();
    for visit in 0..100u32 {
        let session = format!("midnight-{visit}");
        // Older trackers send a fresh hint with each event.
        let before = Spec::new(visit * 2 + 1, &session, at("2026-03-31T23:59:59.5Z")).hint("2026-03-01");
        let after = Spec::new(visit * 2 + 2, &session, at("2026-04-01T00:00:00.5Z")).hint("2026-04-01");
        for (server, spec) in servers.iter().zip([before, after]) {
            let (server, event) = (server.clone(), spec.event(site));
            waiting.spawn(async move { server.submit(vec![event]).await });
        }
    }
    while let Some(outcomes) = waiting.join_next().await {
        assert_durable(&outcomes.expect("no panic"));
    }
    assert_eq!(database.count("SELECT count(*) FROM sessions").await, 100);
    assert_eq!(database.count("SELECT count(DISTINCT id) FROM sessions WHERE event_count = 2").await, 100);
    assert_eq!(database.count("SELECT count(*) FROM events").await, 200);
    // With our own tracker's hint, fixed when the session began, any order gives the month of the beginning.
    let late_first = Spec::new(1001, "ours", at("2026-05-01T00:00:01Z")).hint("2026-04-01");
    let then_early = Spec::new(1002, "ours", at("2026-04-30T23:59:59Z")).hint("2026-04-01");
    assert_durable(&servers[0].submit(vec![late_first.event(site)]).await);
    assert_durable(&servers[1].submit(vec![then_early.event(site)]).await);
    let months = "SELECT count(*) FROM sessions WHERE created_month = '2026-04-01' AND event_count = 2";
    let ours = opsmantik::domain::id::SessionId::from_text(site, "ours");
    assert_eq!(database.count(&format!("{months} AND id = '{ours}'")).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_paid_visit_and_its_follower_that_are_stored_at_the_same_time_find_each_other() {
    let database = prepared().await;
    let [site, _] = sites();
    let servers = [pipeline(&database, 4, 16), pipeline(&database, 4, 16)];
    let mut waiting = tokio::task::JoinSet::new();
    for visitor in 0..200u32 {
        let fingerprint = format!("racing-{visitor}");
        let paid = Spec::new(visitor * 2 + 1, &format!("paid-{visitor}"), at("2026-05-01T10:00:00Z"))
            .url("https://a.example/?gclid=1")
            .fingerprint(&fingerprint);
        let later = Spec::new(visitor * 2 + 2, &format!("later-{visitor}"), at("2026-05-02T10:00:00Z"))
            .fingerprint(&fingerprint);
        for (server, spec) in servers.iter().zip([paid, later]) {
            let (server, event) = (server.clone(), spec.event(site));
            waiting.spawn(async move { server.submit(vec![event]).await });
        }
    }
    while let Some(outcomes) = waiting.join_next().await {
        assert_durable(&outcomes.expect("no panic"));
    }
    assert_eq!(database.count("SELECT count(*) FROM sessions WHERE attribution = 'Ads-Assisted'").await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_sent_again_is_a_copy_even_of_a_visit_that_was_imported_over_months_in_any_order() {
    let database = prepared().await;
    let [site, _] = sites();
    let server = pipeline(&database, 2, 64);
    let visit = [(1, "2026-08-13T10:00:00Z"), (2, "2026-07-13T10:00:00Z"), (3, "2026-06-13T10:00:00Z")];
    let visit = visit.map(|(id, time)| Spec::new(id, "long", at(time)).event(site));
    for round in 0..3 {
        for event in &visit {
            let outcome = server.submit(vec![event.clone()]).await[0];
            assert_eq!(matches!(outcome, Outcome::Stored(_)), round == 0, "{round}: {outcome:?}");
        }
        assert_eq!(database.count("SELECT count(*) FROM events").await, 3);
        assert_eq!(database.count("SELECT sum(event_count)::bigint FROM sessions").await, 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_is_told_where_the_event_lies() {
    let database = prepared().await;
    let [site, _] = sites();
    let server = pipeline(&database, 2, 64);
    let first = Spec::new(7, "first", at("2026-05-01T10:00:00Z")).action("whatsapp").event(site);
    let thief = Spec::new(7, "thief", at("2026-05-01T11:00:00Z")).event(site);
    let Outcome::Stored(receipt) = server.submit(vec![first.clone()]).await[0] else { panic!("not stored") };
    for event in [first, thief.clone()] {
        assert_eq!(server.submit(vec![event]).await, [Outcome::Duplicate(receipt)]);
    }
    // Also when the other session is there, with events of its own.
    let own = Spec::new(8, "thief", at("2026-05-01T11:00:00Z")).event(site);
    assert_durable(&server.submit(vec![own]).await);
    assert_eq!(server.submit(vec![thief]).await, [Outcome::Duplicate(receipt)]);
}
