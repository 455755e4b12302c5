//! What goes away while somebody watches, or while they do not: a membership, a month, a row's old key.

use std::time::{Duration, Instant};

use chrono::Utc;
use opsmantik::domain::access::Scope;
use opsmantik::domain::month::Month;
use opsmantik::feed::FeedOptions;
use opsmantik::grpc::proto::ChangeKind;
use opsmantik::grpc::proto::watch_events_response::Payload;
use opsmantik::store::retention::DropError;
use tonic::Code;

use super::{Door, LATER, MONTH, PATIENCE, Watch, events, run, session};
use crate::access::people;
use crate::support::database::database;

/// Old enough to be dropped.
const OLD: &str = "2026-03-01";

#[tokio::test]
async fn who_is_no_member_any_more_hears_no_more() {
    let database = database().await;
    let (shop, other) = (database.site("shop").await, database.site("other").await);
    session(&database, "shop", MONTH).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let token = database.token(&[Scope::EventsRead], Some(other.id)).await;
    let refused = door.events(&token, "shop", None).await.err().expect("another's site");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let no_scope = database.token(&[Scope::CallsRead], Some(shop.id)).await;
    let refused = door.events(&no_scope, "shop", None).await.err().expect("calls are no events");
    assert_eq!(refused.code(), Code::PermissionDenied);

    let jwt = people::good(people::SECRET);
    let refused = door.events(&jwt, "shop", None).await.err().expect("not yet a member");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let member = format!(
        "INSERT INTO site_members (site_id, user_id, role) VALUES ('{}', '{}', 'viewer')",
        shop.id,
        people::USER
    );
    run(&database, &member).await;
    let mut watch = door.events(&jwt, "shop", None).await.expect("a member");
    watch.snapshot().await;
    run(&database, &events("shop", MONTH, 0..1)).await;
    assert_eq!(watch.change().await.0, ChangeKind::Insert);

    run(&database, "DELETE FROM site_members").await;
    let sent_away = Instant::now();
    let end = watch.next().await.expect_err("no member any more");
    assert_eq!(end.code(), Code::PermissionDenied);
    assert!(sent_away.elapsed() < PATIENCE / 2, "after {:?}", sent_away.elapsed());
}

#[tokio::test]
async fn a_month_that_is_dropped_or_emptied_is_gone_for_its_watchers() {
    let database = database().await;
    database.site("shop").await;
    for month in [OLD, MONTH, LATER] {
        session(&database, "shop", month).await;
    }
    run(&database, &events("shop", OLD, 0..5)).await;
    run(&database, &events("shop", MONTH, 10..13)).await;
    run(&database, &events("shop", LATER, 20..22)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    assert_eq!(watch.snapshot().await.1.len(), 10);
    let away = watch.token.clone();

    let mut dropper = database.store.dropper(Instant::now() + PATIENCE).await.expect("the owner of the tables");
    for young in [Month::of(Utc::now()).previous(), Month::of(Utc::now()), Month::of(Utc::now()).next()] {
        let refused = dropper.drop_month(young, |_| {}).await;
        assert!(matches!(refused, Err(DropError::TooYoung(_))), "{young}: {refused:?}");
    }
    assert!(dropper.drop_month(OLD.parse().expect("a month"), |_| {}).await.expect("old enough"));
    let (anew, labels) = watch.snapshot().await;
    assert!(anew && labels == ["10", "11", "12", "20", "21"], "the rows went without a word of the log: {labels:?}");
    run(&database, &events("shop", MONTH, 13..14)).await;
    let kind = loop {
        if let Payload::Change(change) = watch.next().await.expect("it goes on") {
            break change.kind();
        }
    };
    assert_eq!(kind, ChangeKind::Insert);

    // By the name of its leaf.
    run(&database, "TRUNCATE events_2026_12").await;
    let (anew, labels) = watch.snapshot().await;
    assert!(anew && labels == ["10", "11", "12", "13"], "{labels:?}");

    // And who was away, and comes back to a server whose log knows nothing of it.
    drop((watch, door));
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", Some(&away)).await.expect("it is served");
    let (anew, labels) = watch.snapshot().await;
    assert!(anew && labels == ["10", "11", "12", "13"], "{labels:?}");
}

#[tokio::test]
async fn a_row_that_gets_another_key_while_nobody_watches_is_not_left_behind() {
    let database = database().await;
    for site in ["shop", "other"] {
        database.site(site).await;
        session(&database, site, MONTH).await;
    }
    run(&database, &events("shop", MONTH, 0..3)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    for change in [
        "UPDATE events SET id = gen_random_uuid() WHERE event_label = '1'",
        "UPDATE events SET site_id = (SELECT id FROM sites WHERE public_id = 'other') WHERE event_label = '2'",
    ] {
        let door = Door::open(&database, FeedOptions::default()).await;
        let mut watch = door.events(&token, "shop", None).await.expect("it is served");
        watch.snapshot().await;
        let left = watch.token.clone();
        drop((watch, door));
        run(&database, change).await;
        let door = Door::open(&database, FeedOptions::default()).await;
        let mut watch = door.events(&token, "shop", Some(&left)).await.expect("it is served");
        assert!(watch.snapshot().await.0, "the old key is in no table any more: {change}");
    }
}

/// Whether it begins anew, and the labels then. What was told before a start is not there any more: a mark may be told while rows are.
async fn comes_back(watch: &mut Watch) -> (bool, Vec<String>) {
    let (mut anew, mut labels) = (false, Vec::new());
    loop {
        match watch.next().await.expect("it goes on") {
            Payload::SnapshotStart(_) => (anew, labels) = (true, Vec::new()),
            Payload::SnapshotEnd(_) => break,
            Payload::Change(change) => labels.extend(change.new.and_then(|event| event.label)),
            Payload::Heartbeat(_) => {}
        }
    }
    labels.sort();
    (anew, labels)
}

/// Begins anew until these rows are told. (A leaf that is detached concurrently is noted when that begins and when it has ended.)
async fn begins_anew(watch: &mut Watch, expected: &[&str]) {
    loop {
        let (anew, labels) = comes_back(watch).await;
        assert!(anew);
        if labels == expected {
            return;
        }
    }
}

const ATTACH: &str =
    "ALTER TABLE events ATTACH PARTITION events_2026_03 FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')";
const DETACH: &str = "ALTER TABLE events DETACH PARTITION events_2026_03";

#[tokio::test]
async fn a_month_that_a_hand_takes_away_or_brings_back_is_told_to_who_watches() {
    let database = database().await;
    database.site("shop").await;
    for month in [OLD, MONTH] {
        session(&database, "shop", month).await;
    }
    run(&database, &events("shop", OLD, 0..3)).await;
    run(&database, &events("shop", MONTH, 10..12)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    watch.snapshot().await;
    let change = |label: &str| format!("UPDATE events_2026_03 SET event_label = 'x' WHERE event_label = '{label}'");
    for (done, rows) in [
        (DETACH.to_owned(), &["10", "11"][..]),
        (format!("{}; {ATTACH}", change("1")), &["0", "10", "11", "2", "x"]),
        // Between two looks.
        (format!("{DETACH}; {}; {ATTACH}", change("2")), &["0", "10", "11", "x", "x"]),
        (format!("{DETACH} CONCURRENTLY"), &["10", "11"]),
        (ATTACH.to_owned(), &["0", "10", "11", "x", "x"]),
        ("DROP TABLE events_2026_03".to_owned(), &["10", "11"]),
    ] {
        run(&database, &done).await;
        begins_anew(&mut watch, rows).await;
    }
    // A month that is new and empty is nobody's news.
    let marks = database.count("SELECT count(*) FROM opsmantik.vanished").await;
    database.ensure_month("2026-05-01").await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(database.count("SELECT count(*) FROM opsmantik.vanished").await, marks);
    run(&database, &events("shop", MONTH, 12..13)).await;
    assert_eq!(watch.change().await.0, ChangeKind::Insert, "it goes on as it was");
}

#[tokio::test]
async fn what_a_hand_does_past_all_triggers_is_told_to_who_comes_back() {
    let database = database().await;
    database.site("shop").await;
    for month in [OLD, MONTH] {
        session(&database, "shop", month).await;
    }
    run(&database, &events("shop", OLD, 0..3)).await;
    run(&database, &events("shop", MONTH, 10..14)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let replica =
        |change: &str| format!("SET session_replication_role = replica; {change}; RESET session_replication_role");
    let again = "SELECT opsmantik.ensure_month('2026-03-01')";
    let detached = format!("{}; {DETACH}; SELECT opsmantik.ensure_month('2026-11-01')", events("shop", OLD, 4..6));
    for (before, away, anew) in [
        ("", "SELECT opsmantik.ensure_month('2026-05-01')".to_owned(), false),
        ("", format!("{DETACH} CONCURRENTLY"), true),
        ("", ATTACH.to_owned(), true),
        ("", format!("DROP TABLE events_2026_03; {again}"), true),
        (detached.as_str(), ATTACH.to_owned(), true),
        ("", replica("DELETE FROM events WHERE event_label = '10'"), true),
        ("", replica("UPDATE events SET id = gen_random_uuid() WHERE event_label = '11'"), true),
        ("", replica("TRUNCATE events_2026_11"), true),
    ] {
        run(&database, before).await;
        let door = Door::open(&database, FeedOptions::default()).await;
        let mut watch = door.events(&token, "shop", None).await.expect("it is served");
        watch.snapshot().await;
        let left = watch.token.clone();
        drop((watch, door));
        run(&database, &away).await;
        let door = Door::open(&database, FeedOptions::default()).await;
        let mut watch = door.events(&token, "shop", Some(&left)).await.expect("it is served");
        let (begun, labels) = comes_back(&mut watch).await;
        assert_eq!(begun, anew, "after {away}: {labels:?}");
        if anew {
            let mut there: Vec<String> = Vec::new();
            for row in database.rows("SELECT event_label AS l FROM events").await {
                there.extend(row["l"].as_str().map(str::to_owned));
            }
            there.sort();
            assert_eq!(labels, there, "after {away}");
        }
    }
}
