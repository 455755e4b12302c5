//! What somebody does to the database itself under a watch: other columns, another publication, another way to write dates, other bounds.

use std::time::Duration;

use opsmantik::domain::access::Scope;
use opsmantik::feed::FeedOptions;
use opsmantik::grpc::proto::ChangeKind;
use tonic::Code;

use super::{Door, MONTH, events, run, session};
use crate::support::database::database;

const PAUSE: Duration = Duration::from_millis(200);

#[tokio::test]
async fn what_came_while_a_column_had_another_name_is_not_lost() {
    let database = database().await;
    database.site("shop").await;
    session(&database, "shop", MONTH).await;
    run(&database, &events("shop", MONTH, 0..3)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    watch.snapshot().await;
    run(&database, "ALTER TABLE events RENAME COLUMN event_label TO label").await;
    run(&database, &events("shop", MONTH, 3..4).replace("event_label", "label")).await;
    let end = loop {
        match watch.next().await {
            Ok(_) => {}
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    run(&database, "ALTER TABLE events RENAME COLUMN label TO event_label").await;
    let mut watch = door.events(&token, "shop", Some(&watch.token)).await.expect("it is served");
    assert_eq!(watch.snapshot().await.1, ["0", "1", "2", "3"]);
    run(&database, &events("shop", MONTH, 4..5)).await;
    assert_eq!(watch.change().await.0, ChangeKind::Insert);
}

#[tokio::test]
async fn a_publication_that_does_not_tell_everything_ends_a_watch() {
    let database = database().await;
    database.site("shop").await;
    session(&database, "shop", MONTH).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    for (broken, mended) in [
        ("ALTER PUBLICATION opsmantik_feed DROP TABLE events", "ALTER PUBLICATION opsmantik_feed ADD TABLE events"),
        (
            "ALTER PUBLICATION opsmantik_feed SET (publish = 'insert')",
            "ALTER PUBLICATION opsmantik_feed SET (publish = 'insert, update, delete, truncate')",
        ),
    ] {
        // What was in the way is believed for a moment.
        let mut watch = loop {
            match door.events(&token, "shop", None).await {
                Err(status) if status.code() == Code::FailedPrecondition => tokio::time::sleep(PAUSE).await,
                served => break served.expect("it is served"),
            }
        };
        watch.snapshot().await;
        run(&database, broken).await;
        let end = watch.next().await.expect_err("it is known to be less than everything");
        assert_eq!(end.code(), Code::Unavailable, "{broken}");
        let refused = door.events(&token, "shop", None).await.err().expect("nobody can watch");
        assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("publication"), "{refused:?}");
        run(&database, mended).await;
    }
}

#[tokio::test]
async fn rows_are_shown_however_dates_are_written_and_whatever_the_bounds_of_their_leaf() {
    let database = database().await;
    database.site("shop").await;
    session(&database, "shop", MONTH).await;
    run(&database, &events("shop", MONTH, 0..2)).await;
    for table in ["sessions", "events"] {
        let leaf =
            format!("CREATE TABLE {table}_wide PARTITION OF {table} FOR VALUES FROM ('2019-01-01') TO ('2020-01-01')");
        run(&database, &leaf).await;
    }
    // Not `session`, which would make the month.
    run(
        &database,
        "INSERT INTO sessions SELECT (jsonb_populate_record(s, '{\"created_month\": \"2019-05-01\"}')).* FROM sessions s",
    )
    .await;
    run(&database, &events("shop", "2019-05-01", 2..4)).await;
    run(&database, &format!("ALTER DATABASE {} SET datestyle = 'German, DMY'", database.name)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    assert_eq!(watch.snapshot().await.1, ["0", "1", "2", "3"]);
}
