//! What goes away while somebody watches, or while they do not: a membership, a month, a row's old key.

use std::time::Instant;

use opsmantik::domain::access::Scope;
use opsmantik::feed::FeedOptions;
use opsmantik::grpc::proto::ChangeKind;
use opsmantik::grpc::proto::watch_events_response::Payload;
use tonic::Code;

use super::{Door, LATER, MONTH, PATIENCE, events, run, session};
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
