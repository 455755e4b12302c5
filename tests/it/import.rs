//! History from elsewhere: placed by when it happened, in months that are made for it, with our own receipt kept beside.

use std::time::Duration;

use chrono::{DateTime, Datelike, Months, SubsecRound, TimeDelta, Utc};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::month::Month;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::{Event, IngestResult, RejectionReason};
use opsmantik::pipeline::PipelineConfig;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::App;
use crate::support::database::database;
use crate::support::line::{Line, event};

fn timestamp(at: DateTime<Utc>) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: at.timestamp(), nanos: at.timestamp_subsec_nanos().cast_signed() }
}

/// An event of a visit of its own, that happened at `at`.
fn past(n: u32, visit: &str, at: DateTime<Utc>) -> Event {
    Event { session_id: visit.to_owned(), occurred_at: Some(timestamp(at)), ..event(n) }
}

fn count(results: &[IngestResult], wanted: fn(&Outcome) -> bool) -> usize {
    results.iter().filter_map(|result| result.outcome.as_ref()).filter(|outcome| wanted(outcome)).count()
}

fn stored(results: &[IngestResult]) -> usize {
    count(results, |outcome| matches!(outcome, Outcome::Stored(_)))
}

fn duplicates(results: &[IngestResult]) -> usize {
    count(results, |outcome| matches!(outcome, Outcome::Duplicate(_)))
}

/// 1000 events of 250 visits over the two years before `now`.
fn two_years(now: DateTime<Utc>) -> Vec<Event> {
    let oldest = now - Months::new(24) + TimeDelta::hours(1);
    let step = (now - TimeDelta::hours(1) - oldest) / 250;
    (0..1000u32)
        .map(|n| {
            let (visit, nth) = (n / 4, n % 4);
            let began = oldest + step * visit.cast_signed();
            let at = began + TimeDelta::minutes(i64::from(nth) * 5);
            let mut event = past(n + 1, &format!("visit-{visit}"), at);
            event.fingerprint = Some(format!("f{}", visit % 40));
            // A visit over a month's end stays where it began, in whatever order its events come.
            event.session_month_hint = Some(Month::of(began).to_string());
            if visit % 7 == 0 {
                event.url = format!("https://shop.example/?gclid=g{n}");
            }
            event
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn two_years_come_in_one_call_and_their_months_are_made_within_it() {
    let line = Line::open(PipelineConfig::default()).await;
    let before = Utc::now();
    let events = two_years(before);
    let leaves = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'events'::regclass";
    assert_eq!(line.database.count(leaves).await, 5, "the months of every day");
    let results = line.ingest(events.clone()).await.expect("the call is understood");
    assert_eq!(stored(&results), 1000, "{:?}", results.iter().find(|r| !matches!(r.outcome, Some(Outcome::Stored(_)))));
    assert!(line.database.count(leaves).await >= 24 + 4);
    let now = Month::of(Utc::now());
    let readiness = line.database.store.readiness(now, 3).await.expect("it answers");
    assert!(readiness.is_ready(), "{readiness:?}");

    let rows = line.database.rows("SELECT id, session_month, created_at, occurred_at, received_at FROM events").await;
    let instant = |value: &Value| value.as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok()).expect("a time");
    assert_eq!(rows.len(), 1000);
    for row in &rows {
        let id: Uuid = row["id"].as_str().and_then(|id| id.parse().ok()).expect("a UUID");
        let sent = &events[id.as_u128() as usize - 1];
        let told = sent.occurred_at.as_ref().map(|at| (at.seconds, at.nanos / 1000 * 1000));
        let created = instant(&row["created_at"]);
        assert_eq!(Some((created.timestamp(), created.timestamp_subsec_nanos().cast_signed())), told);
        assert_eq!(row["created_at"], row["occurred_at"]);
        assert_eq!(row["session_month"].as_str(), sent.session_month_hint.as_deref());
        let received = instant(&row["received_at"]);
        assert!(received >= before.trunc_subsecs(6) && received <= Utc::now(), "our own receipt: {received}");
    }
    let wrong = "SELECT count(*) FROM sessions s WHERE \
        (created_at, last_seen_at) <> (SELECT min(created_at), max(created_at) FROM events e \
         WHERE (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id)) \
        OR created_month <> date_trunc('month', created_at AT TIME ZONE 'UTC')::date";
    assert_eq!(line.database.count(wrong).await, 0);
    assert_eq!(line.database.count("SELECT count(*) FROM sessions").await, 250);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_same_history_in_any_order_twice_leaves_the_same_tables() {
    let now = Utc::now();
    let site = SiteId::from_uuid(Uuid::from_u128(0x51));
    let mut tables = Vec::new();
    for seed in 0..2 {
        let database = database().await;
        database.site_with_id("shop", site).await;
        let line = Line::before(database, PipelineConfig::default()).await;
        let mut events = two_years(now);
        if seed > 0 {
            events.extend(two_years(now));
            events.shuffle(&mut StdRng::seed_from_u64(seed));
        }
        for batch in events.chunks(if seed == 0 { 1000 } else { 170 }) {
            let results = line.ingest(batch.to_vec()).await.expect("the call is understood");
            assert_eq!(stored(&results) + duplicates(&results), batch.len());
        }
        let mut traffic = line.database.traffic().await;
        for event in &mut traffic[1] {
            event.as_object_mut().expect("a row is an object").remove("received_at");
        }
        tables.push(traffic);
    }
    assert_eq!((tables[0][0].len(), tables[0][1].len()), (250, 1000));
    for (table, (one, other)) in tables[0].iter().zip(&tables[1]).enumerate() {
        for (one, other) in one.iter().zip(other) {
            assert_eq!(one, other, "table {table}");
        }
        assert_eq!(one.len(), other.len());
    }
}

#[tokio::test]
async fn a_paid_visit_that_is_imported_later_corrects_the_visits_after_it() {
    let line = Line::open(PipelineConfig::default()).await;
    let now = Utc::now();
    let visit = |n: u32, days: i64, fingerprint: &str| Event {
        fingerprint: Some(fingerprint.to_owned()),
        ..past(n, &format!("visit-{n}"), now - TimeDelta::days(days))
    };
    let live = Event { fingerprint: Some("live".to_owned()), session_id: "live".to_owned(), ..event(3) };
    let results = line.ingest(vec![visit(1, 200, "a"), visit(2, 200, "b"), live]).await.expect("understood");
    assert_eq!(stored(&results), 3);
    let paid = |n: u32, days: i64, fingerprint: &str| Event {
        url: "https://shop.example/?gclid=G".to_owned(),
        ..visit(n, days, fingerprint)
    };
    let results =
        line.ingest(vec![paid(4, 289, "a"), paid(5, 291, "b"), paid(6, 89, "live")]).await.expect("understood");
    assert_eq!(stored(&results), 3);
    let rows = line
        .database
        .rows("SELECT fingerprint, attribution FROM sessions WHERE attribution <> 'Direct-to-Ads' ORDER BY fingerprint")
        .await;
    let told: Vec<_> = rows.iter().filter_map(|row| row["attribution"].as_str()).collect();
    assert_eq!(told, ["Ads-Assisted", "Organic/Referral", "Ads-Assisted"], "89 days, 91 days, 89 days: {rows:?}");
}

#[tokio::test]
async fn what_lies_outside_of_the_window_is_refused_by_itself() {
    let line = Line::open(PipelineConfig::default()).await;
    let now = Utc::now();
    let (earliest, some) = (now - Months::new(24), TimeDelta::seconds(20));
    let odd =
        |seconds: i64, nanos: i32| Event { occurred_at: Some(prost_types::Timestamp { seconds, nanos }), ..event(5) };
    let events = vec![
        past(1, "early", earliest + some),
        past(2, "too-early", earliest - some),
        past(3, "ahead", now + TimeDelta::minutes(2) - some),
        past(4, "too-far-ahead", now + TimeDelta::minutes(2) + some),
        odd(now.timestamp(), -1),
        odd(now.timestamp(), 1_000_000_000),
        odd(253_402_300_800, 0),
        odd(i64::MAX, 0),
    ];
    let results = line.ingest(events).await.expect("the call is understood");
    let told: Vec<_> = results
        .iter()
        .map(|result| match &result.outcome {
            Some(Outcome::Stored(_)) => None,
            Some(Outcome::Rejected(rejection)) => {
                assert_eq!(rejection.field, "occurred_at");
                Some(rejection.reason())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let (range, invalid) = (Some(RejectionReason::OutOfRange), Some(RejectionReason::Invalid));
    assert_eq!(told, [None, range, None, range, invalid, invalid, invalid, invalid]);
    let ahead = "SELECT count(*) FROM sessions WHERE created_at > now() + interval '30 seconds'";
    assert_eq!(line.database.count(ahead).await, 1, "a clock that is ahead is believed");
    let early = earliest + some;
    let month =
        format!("SELECT count(*) FROM sessions WHERE created_month = '{}-{:02}-01'", early.year(), early.month());
    assert_eq!(line.database.count(&month).await, 1);
}

#[tokio::test]
async fn an_import_without_ids_may_be_repeated() {
    let line = Line::open(PipelineConfig::default()).await;
    let at = Utc::now() - TimeDelta::days(100);
    let nameless = |seconds: i64| Event {
        id: None,
        url: "https://shop.example/".to_owned(),
        ..past(1, "s", at + TimeDelta::seconds(seconds))
    };
    let history = vec![nameless(0), nameless(1), nameless(2)];
    assert_eq!(stored(&line.ingest(history.clone()).await.expect("understood")), 3);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(duplicates(&line.ingest(history).await.expect("understood")), 3);
    assert_eq!(line.database.count("SELECT count(*) FROM events").await, 3);
}

#[tokio::test]
async fn the_public_door_imports_nothing() {
    let app = App::start(0).await;
    let sent = json!({"s": "shop", "u": "https://shop.example/", "sid": "v", "ec": "interaction", "ea": "view",
        "occurred_at": "2026-01-02T03:04:05Z", "meta": {"received_at": "2026-01-02T03:04:05Z"}});
    assert_eq!(app.post(sent.to_string()).await.status, 200);
    let rows = app
        .database
        .rows("SELECT created_at > now() - interval '1 minute' AS fresh, received_at, metadata FROM events")
        .await;
    let kept = json!({"occurred_at": "2026-01-02T03:04:05Z", "received_at": "2026-01-02T03:04:05Z"});
    assert_eq!(rows, [json!({"fresh": true, "received_at": null, "metadata": kept})]);
}

#[tokio::test]
async fn a_leaf_that_was_detached_before_the_column_came_can_be_attached_again() {
    let database = database().await;
    database.ensure_month("2026-03-01").await;
    let before =
        "ALTER TABLE events DETACH PARTITION events_2026_03; ALTER TABLE events_2026_03 DROP COLUMN received_at";
    database.admin.batch_execute(before).await.expect("as an older version left it");
    let month: Month = "2026-03-01".parse().expect("a month");
    assert!(database.store.ensure_month(month).await.is_err(), "it lacks the column");
    database.admin.batch_execute(include_str!("../../migrations/V7__imports.sql")).await.expect("it runs again");
    assert_eq!(database.store.ensure_month(month).await.expect("attached"), ["events_2026_03"]);
    assert!(database.store.readiness(Month::of(Utc::now()), 3).await.expect("it answers").is_ready());
}
