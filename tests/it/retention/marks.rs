//! Marks of rows that went: whoever took them away, and however, and that a leaf which would leave none is not ready.

use opsmantik::keeper::Nudge;
use serde_json::Value;

use super::{fill, leaf, old};
use crate::support::browser::eventually;
use crate::support::database::database;

#[tokio::test]
async fn what_empties_a_table_or_brings_one_back_leaves_a_mark_and_marks_do_not_pile_up() {
    let database = database().await;
    let (site, other) = (database.site("shop").await.id, database.site("neighbour").await.id);
    let month = old(5);
    fill(&database, site, month, 100, 20).await;
    fill(&database, other, month, 10, 2).await;
    let admin = &database.admin;
    let [events, sessions] = ["events", "sessions"].map(|table| leaf(table, month));
    let causes =
        async || {
            let rows = database
            .rows("SELECT tab, CASE month WHEN '-infinity' THEN 'every' ELSE 'one' END AS month, cause, count(*) AS n \
                   FROM opsmantik.vanished GROUP BY 1, 2, 3 ORDER BY 1, 2, 3")
            .await;
            admin.batch_execute("DELETE FROM opsmantik.vanished").await.expect("forgotten");
            let text = |row: &Value, key: &str| row[key].as_str().expect("text").to_owned();
            rows.iter()
                .map(|row| format!("{} {} {} {}", text(row, "tab"), text(row, "month"), text(row, "cause"), row["n"]))
                .collect::<Vec<_>>()
        };
    // However many rows go, a transaction leaves a mark a site. What is undone leaves none.
    admin.batch_execute("BEGIN; SAVEPOINT s; DELETE FROM events; ROLLBACK TO s; COMMIT").await.expect("undone");
    assert_eq!(causes().await, Vec::<String>::new());
    admin
        .batch_execute("BEGIN; SAVEPOINT s; DELETE FROM events; ROLLBACK TO s; DELETE FROM events; COMMIT")
        .await
        .expect("gone");
    assert_eq!(causes().await, ["events one delete 2"]);
    fill(&database, site, month, 1, 1).await;

    admin.batch_execute(&format!("TRUNCATE {events}")).await.expect("emptied");
    assert_eq!(causes().await, ["events one truncate 1"]);
    admin.batch_execute("TRUNCATE calls CASCADE").await.expect("emptied");
    assert_eq!(causes().await, ["calls every truncate 1"]);
    admin.batch_execute("TRUNCATE events").await.expect("emptied");
    let all = causes().await;
    assert!(all.contains(&"events every truncate 1".to_owned()), "{all:?}");
    let disturbed = format!(
        "DROP TRIGGER opsmantik_truncated ON {events}; ALTER TABLE {events} DROP CONSTRAINT events_session_of_month"
    );
    admin.batch_execute(&disturbed).await.expect("disturbed");
    let faults = database.store.readiness(old(0), 3).await.expect("it answers").faults;
    let expected = ["is not tied to the sessions of its month", "leaves no mark when rows go"]
        .map(|fault| format!("{events}: {fault}"));
    assert_eq!(faults, expected);
    database.store.ensure_month(month).await.expect("mended");
    assert!(database.store.readiness(old(0), 3).await.expect("it answers").is_ready());

    // Detached with rows, and attached again; one that is empty brings nothing.
    let detach = format!(
        "ALTER TABLE events DETACH PARTITION {events}; ALTER TABLE sessions DETACH PARTITION {sessions}; TRUNCATE {events}"
    );
    admin.batch_execute(&detach).await.expect("detached");
    assert_eq!(causes().await, Vec::<String>::new(), "nobody sees the rows of a table that is detached");
    assert_eq!(database.store.ensure_month(month).await.expect("attached").len(), 2);
    assert_eq!(causes().await, ["events one detach 1", "sessions one attach 1", "sessions one detach 1"]);

    for _ in 0..5 {
        admin
            .batch_execute("DELETE FROM sessions WHERE id IN (SELECT id FROM sessions LIMIT 5)")
            .await
            .expect("deleted");
        admin.batch_execute(&format!("TRUNCATE {events}")).await.expect("emptied");
    }
    let newest = "SELECT DISTINCT ON (tab, month, site_id) tab, month, site_id, xid::text FROM opsmantik.vanished \
        ORDER BY tab, month, site_id, xid DESC";
    let expected = database.rows(newest).await;
    let all = database.count("SELECT count(*) FROM opsmantik.vanished").await;
    assert!(all >= i64::try_from(expected.len()).expect("a few") + 8, "{all}");
    // The keeper of any server does it.
    let stop = tokio_util::sync::CancellationToken::new();
    let kept = tokio::spawn(opsmantik::keeper::run(database.store.clone(), Nudge::default(), stop.clone()));
    let many = "SELECT count(*) FROM opsmantik.vanished";
    let few = i64::try_from(expected.len()).expect("a few");
    eventually("the keeper clears marks away", async || (database.count(many).await == few).then_some(())).await;
    stop.cancel();
    kept.await.expect("the keeper ends");
    let left = "SELECT tab, month, site_id, xid::text FROM opsmantik.vanished ORDER BY tab, month, site_id";
    assert_eq!(database.rows(left).await, expected, "the newest of each scope stays");
    assert_eq!(database.store.prune_vanished().await.expect("pruned"), 0);
}

#[tokio::test]
async fn a_table_that_would_lose_rows_without_a_mark_is_not_ready_until_it_is_mended() {
    let database = database().await;
    let site = database.site("shop").await.id;
    let month = old(5);
    fill(&database, site, month, 10, 3).await;
    let (admin, events) = (&database.admin, leaf("events", month));
    for (disturbed, named) in [
        (format!("ALTER TABLE {events} DISABLE TRIGGER USER"), events.as_str()),
        // It would fire, but not for everybody.
        (format!("ALTER TABLE {events} ENABLE TRIGGER events_deleted"), &events),
        (format!("ALTER TABLE {events} ENABLE TRIGGER opsmantik_truncated"), &events),
        ("ALTER TABLE events DISABLE TRIGGER events_moved".to_owned(), &events),
        ("ALTER TABLE ONLY sessions ENABLE REPLICA TRIGGER sessions_deleted".to_owned(), "sessions"),
        ("DROP TRIGGER sessions_deleted ON sessions".to_owned(), "sessions"),
        ("ALTER TABLE calls DISABLE TRIGGER calls_deleted".to_owned(), "calls"),
    ] {
        admin.batch_execute(&disturbed).await.expect("disturbed");
        let faults = database.store.readiness(old(0), 3).await.expect("it answers").faults;
        assert!(faults.contains(&format!("{named}: leaves no mark when rows go")), "{disturbed}: {faults:?}");
        database.store.ensure_month(month).await.expect("mended");
        let faults = database.store.readiness(old(0), 3).await.expect("it answers").faults;
        assert_eq!(faults, Vec::<String>::new(), "mended after {disturbed}");
    }

    // In a month that was there, in one that came back, and in one that is made now.
    let detach = format!("ALTER TABLE events DETACH PARTITION {events}");
    admin.batch_execute(&detach).await.expect("detached");
    database.store.ensure_month(month).await.expect("attached");
    fill(&database, site, old(7), 10, 3).await;
    admin
        .batch_execute("DELETE FROM opsmantik.vanished; SET session_replication_role = replica")
        .await
        .expect("a replica");
    admin.batch_execute("DELETE FROM events; UPDATE sessions SET id = gen_random_uuid()").await.expect("gone");
    admin.batch_execute("TRUNCATE calls CASCADE; RESET session_replication_role").await.expect("emptied");
    let marks = database.count("SELECT count(DISTINCT (tab, month, cause)) FROM opsmantik.vanished").await;
    assert_eq!(marks, 5, "two of events, two of sessions, one of calls");
}

#[tokio::test]
async fn what_a_hand_attaches_or_takes_away_is_marked_once_by_whoever_looks_next() {
    let database = database().await;
    let site = database.site("shop").await.id;
    let month = old(5);
    fill(&database, site, month, 10, 3).await;
    let (admin, events, next) = (&database.admin, leaf("events", month), old(4));
    let causes = async || {
        // As the server, which may not look into what it keeps.
        admin
            .batch_execute("BEGIN; SET LOCAL ROLE opsmantik_service; SELECT opsmantik.note_leaves(); COMMIT")
            .await
            .expect("noted");
        let marks = database.rows("SELECT cause, month FROM opsmantik.vanished ORDER BY 1, 2").await;
        admin.batch_execute("DELETE FROM opsmantik.vanished").await.expect("forgotten");
        marks
            .iter()
            .map(|mark| format!("{} {}", mark["cause"].as_str().unwrap_or("?"), mark["month"].as_str().unwrap_or("?")))
            .collect::<Vec<_>>()
    };
    let (attach, none) = (
        format!("ALTER TABLE events ATTACH PARTITION {events} FOR VALUES FROM ('{month}') TO ('{next}')"),
        Vec::<String>::new(),
    );
    assert_eq!(causes().await, none, "months that were made empty, and filled later");
    for (done, marked) in [
        (format!("ALTER TABLE events DETACH PARTITION {events}"), vec!["detach"]),
        (attach.clone(), vec!["attach"]),
        (format!("ALTER TABLE events DETACH PARTITION {events}; {attach}"), vec!["attach", "detach"]),
        (
            format!(
                "ALTER TABLE events RENAME TO occurrences; ALTER TABLE occurrences RENAME TO events; ANALYZE {events}"
            ),
            vec![],
        ),
        (format!("BEGIN; DROP TABLE {events}; ROLLBACK"), vec![]),
        (format!("ALTER TABLE events DETACH PARTITION {events} CONCURRENTLY"), vec!["detach"]),
        (format!("TRUNCATE {events}; {attach}"), vec![]),
        (format!("DROP TABLE {events}"), vec!["detach"]),
        (format!("CREATE TABLE {events} PARTITION OF events FOR VALUES FROM ('{month}') TO ('{next}')"), vec![]),
    ] {
        admin.batch_execute(&done).await.unwrap_or_else(|error| panic!("{error:?}: {done}"));
        let marked: Vec<String> = marked.iter().map(|cause| format!("{cause} {month}")).collect();
        assert_eq!((causes().await, causes().await), (marked, none.clone()), "{done}");
    }
    // Its rows go when the detaching begins; who began to write before may add some until it has ended.
    let mut reader = crate::support::database::connect(&database.url).await;
    let open = reader.transaction().await.expect("a transaction");
    open.query("SELECT count(*) FROM events", &[]).await.expect("read");
    let impatient = format!("SET lock_timeout = '300ms'; ALTER TABLE events DETACH PARTITION {events} CONCURRENTLY");
    for one in impatient.split("; ") {
        let _ = admin.batch_execute(one).await;
    }
    assert_eq!(causes().await, [format!("detach {month}")], "pending");
    open.rollback().await.expect("it ends");
    admin.batch_execute(&format!("ALTER TABLE events DETACH PARTITION {events} FINALIZE")).await.expect("detached");
    assert_eq!((causes().await, causes().await), (vec![format!("detach {month}")], none));
}
