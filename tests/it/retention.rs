//! Months go while everybody works on: shown first, detached and dropped, finished by whoever comes next; and what they leave behind.

mod load;
mod marks;

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::calls::{Calls, Decision};
use opsmantik::domain::call::MatchMethod;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::month::Month;
use opsmantik::domain::outcome::Outcome;
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::Pipeline;
use opsmantik::store;
use opsmantik::store::transaction::{Purpose, Reader};
use serde_json::{Value, json};

use crate::support::browser::eventually;
use crate::support::calls::{BUSINESS, call, push};
use crate::support::database::{Database, connect, database};
use crate::support::events::Spec;
use crate::support::process::{Ended, Program, run};

fn old(months: i32) -> Month {
    Month::of(Utc::now()).plus(-months)
}

fn leaf(table: &str, month: Month) -> String {
    format!("{table}_{}", month.first_day().format("%Y_%m"))
}

fn at(month: Month) -> DateTime<Utc> {
    month.start() + TimeDelta::days(10)
}

/// A month of a site: sessions, each with so many events.
async fn fill(database: &Database, site: SiteId, month: Month, sessions: u32, events: u32) {
    database.store.ensure_month(month).await.expect("the month can be made");
    database
        .admin
        .batch_execute(&format!(
            "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
                 traffic_source, traffic_medium, lead_score) SELECT '{site}', '{month}', gen_random_uuid(), '{month}', '{month}', {events}, \
                 '/', 'Organic/Referral', 'Direct', 'direct', 0 FROM generate_series(1, {sessions});
             INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, \
                 lead_score) SELECT site_id, created_month, gen_random_uuid(), id, created_at, created_at, '/', 'interaction', 'view', 10 \
                 FROM sessions, generate_series(1, {events}) WHERE created_month = '{month}' AND site_id = '{site}'"
        ))
        .await
        .expect("filled");
}

async fn partitions(database: &Database, args: &[&str]) -> Ended {
    run(&[&["partitions"], args].concat(), &[("DATABASE_URL", database.url.as_str())]).await
}

/// The tables of a month by their names, attached or not.
async fn tables(database: &Database, month: Month) -> Vec<Value> {
    let suffix = month.first_day().format("%Y_%m");
    database
        .rows(&format!("SELECT relname AS t FROM pg_class WHERE relkind = 'r' AND relname ~ '_{suffix}$' ORDER BY 1"))
        .await
}

async fn marks(database: &Database, month: Month) -> Vec<Value> {
    let marks =
        format!("SELECT DISTINCT tab, cause, site_id FROM opsmantik.vanished WHERE month = '{month}' ORDER BY 1, 2");
    database.rows(&marks).await
}

fn detached() -> Vec<Value> {
    let every = "00000000-0000-0000-0000-000000000000";
    ["events", "sessions"].map(|tab| json!({"tab": tab, "cause": "detach", "site_id": every})).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn old_months_are_shown_first_and_go_when_told() {
    let database = database().await;
    let site = database.site("shop").await.id;
    for months in [3, 4, 5] {
        fill(&database, site, old(months), 10, 3).await;
    }
    database.admin.batch_execute("ANALYZE").await.expect("analyzed");
    let (month, text) = (old(5), old(5).to_string());

    let shown = partitions(&database, &["drop", "--keep-months", "5", "--json"]).await.json();
    assert_eq!((&shown["dry_run"], &shown["months"][0]["month"]), (&json!(true), &json!(text)), "{shown}");
    assert_eq!(shown["months"].as_array().map(Vec::len), Some(1), "{shown}");
    assert_eq!((&shown["months"][0]["events_rows"], &shown["months"][0]["matched_calls"]), (&json!(30), &json!(0)));
    let for_people = partitions(&database, &["drop", "--month", &text]).await;
    assert!(for_people.stdout.contains("~30 events") && for_people.stdout.contains("dry run"), "{for_people:?}");
    assert_eq!(tables(&database, month).await.len(), 2, "shown, and still there");

    for (ahead, why) in [(0, "current month"), (-1, "late deliveries"), (1, "not begun")] {
        let refused = partitions(&database, &["drop", "--month", &old(-ahead).to_string(), "--yes"]).await;
        assert!(refused.complaint().contains(why), "{refused:?}");
    }
    for (args, why) in [(&["--keep-months", "1"][..], "always kept"), (&[], "--month")] {
        let refused = partitions(&database, &[&["drop", "--yes"], args].concat()).await;
        assert!(refused.code == Some(2) && refused.stderr.contains(why), "{refused:?}");
    }

    let gone = partitions(&database, &["drop", "--month", &text, "--yes", "--json"]).await;
    assert_eq!(gone.json()["months"][0]["dropped"], true);
    for step in ["detached events", "detached sessions", "dropped"] {
        assert!(gone.stderr.contains(step), "{gone:?}");
    }
    assert_eq!((tables(&database, month).await.len(), marks(&database, month).await), (0, detached()));
    let again = partitions(&database, &["drop", "--month", &text, "--yes", "--json"]).await.json();
    assert_eq!((&again["months"], &again["absent"]), (&json!([]), &json!([text])));

    // What somebody detached by hand goes, too; what only has the name of a leaf does not.
    let (by_hand, strange) = (leaf("events", old(4)), leaf("events", old(9)));
    let detach =
        format!("ALTER TABLE events DETACH PARTITION {by_hand}; CREATE TABLE public.{strange} AS SELECT 1 AS id");
    database.admin.batch_execute(&detach).await.expect("by hand");
    let list = partitions(&database, &["list", "--json"]).await.json();
    let state = |month: Month| {
        let months = list.as_array().expect("a list").iter();
        months.filter(|one| one["month"] == month.to_string()).map(|one| one["state"].clone()).next()
    };
    let seen = [0, 3, 4, 9].map(|months| state(old(months)));
    assert_eq!(seen, ["whole", "whole", "incomplete", "detached"].map(|state| Some(json!(state))));
    let gone = partitions(&database, &["drop", "--keep-months", "2", "--yes", "--json"]).await.json();
    assert_eq!((gone["months"].as_array().map(Vec::len), &gone["left_alone"]), (Some(2), &json!([strange])));
    assert_eq!((tables(&database, old(4)).await, tables(&database, old(9)).await.len()), (vec![], 1));
    assert_eq!(marks(&database, old(4)).await, detached());

    let dropped = database.store.ensure_month(old(0)).await.expect("kept");
    assert_eq!(dropped, Vec::<String>::new());
    opsmantik::keeper::keep(&database.store, Utc::now()).await.expect("kept");
    assert_eq!(tables(&database, month).await, Vec::<Value>::new(), "a keeper does not bring back what was dropped");
    assert!(database.store.readiness(old(0), 3).await.expect("it answers").is_ready());
    // A keeper that was away: what is missing is named.
    let next = old(-3);
    let lost = format!("DROP TABLE {}, {}", leaf("events", next), leaf("sessions", next));
    database.admin.batch_execute(&lost).await.expect("dropped by hand");
    let list = partitions(&database, &["list"]).await;
    assert!(list.stdout.contains(&format!("{next}  ~0 sessions  ~0 events  0 KiB  MISSING")), "{list:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn only_the_owner_of_the_tables_drops_months() {
    let database = database().await;
    database.store.ensure_month(old(5)).await.expect("made");
    database
        .admin
        .batch_execute(
            "DO $$ BEGIN CREATE ROLE no_owner LOGIN PASSWORD 'x'; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
             GRANT opsmantik_operator, opsmantik_service TO no_owner",
        )
        .await
        .expect("a role");
    let (_, place) = database.url.split_once('@').expect("user@host");
    let url = format!("postgres://no_owner:x@{place}");
    let drop = ["partitions", "drop", "--month", &old(5).to_string(), "--yes"];
    let refused = run(&drop, &[("DATABASE_URL", &url)]).await;
    assert!(refused.complaint().contains("no_owner does not own the tables"), "{refused:?}");
    assert_eq!(tables(&database, old(5)).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_that_was_killed_anywhere_is_finished_by_the_next_and_two_do_not_fight() {
    let database = database().await;
    let site = database.site("shop").await.id;
    let month = old(5);
    let [events, sessions] = ["events", "sessions"].map(|table| leaf(table, month));
    let text = month.to_string();
    let drop = ["drop", "--month", &text, "--yes", "--wait", "20"];
    // As a run leaves it that was killed between two of its steps.
    for left in [
        vec![],
        vec![format!("ALTER TABLE events DETACH PARTITION {events} CONCURRENTLY")],
        vec![
            format!("ALTER TABLE events DETACH PARTITION {events} CONCURRENTLY"),
            format!("ALTER TABLE sessions DETACH PARTITION {sessions} CONCURRENTLY"),
        ],
        vec![
            format!("ALTER TABLE events DETACH PARTITION {events} CONCURRENTLY"),
            format!("ALTER TABLE sessions DETACH PARTITION {sessions} CONCURRENTLY"),
            format!("DROP TABLE {events}"),
        ],
    ] {
        fill(&database, site, month, 10, 3).await;
        database.admin.batch_execute("DELETE FROM opsmantik.vanished").await.expect("no marks");
        for step in &left {
            database.admin.batch_execute(step).await.expect("a step");
        }
        let ended = partitions(&database, &drop).await;
        assert_eq!((ended.code, tables(&database, month).await), (Some(0), vec![]), "after {left:?}: {ended:?}");
        assert_eq!(marks(&database, month).await, detached(), "after {left:?}");
    }

    // Killed in the middle of a step, while a long reader is in the way.
    for held in [&events, &sessions] {
        fill(&database, site, month, 10, 3).await;
        let parent = held.split('_').next().expect("its parent's name");
        let mut reader = connect(&database.url).await;
        let open = reader.transaction().await.expect("a transaction");
        let seen: i64 = open.query_one(&format!("SELECT count(*) FROM {parent}"), &[]).await.expect("read").get(0);
        let env = [("DATABASE_URL", database.url.as_str())];
        let mut first = Program::start(&[&["partitions"], &drop[..]].concat(), &env);
        first.until("what it waits for", |said| said.contains("waiting for").then_some(())).await;
        let second = partitions(&database, &drop).await;
        assert!(second.complaint().contains("another run"), "{second:?}");
        first.kill().await;

        let state = database.rows(&format!("SELECT state FROM opsmantik.leaf_states() WHERE leaf = '{held}'")).await;
        assert_eq!(state, [json!({"state": "pending"})], "half way");
        let given_up = eventually("the killed run's session ends", async || {
            let tried = partitions(&database, &["drop", "--month", &text, "--yes", "--wait", "1"]).await;
            (!tried.stderr.contains("another run")).then_some(tried)
        })
        .await;
        assert!(given_up.complaint().contains("run it again"), "{given_up:?}");
        // The reader is not hurt, and may even read the month by its name.
        let again: i64 = open.query_one(&format!("SELECT count(*) FROM {held}"), &[]).await.expect("read").get(0);
        assert!(seen >= again && again > 0, "{seen} {again}");
        open.rollback().await.expect("it ends");
        let ended = partitions(&database, &drop).await;
        assert_eq!((ended.code, tables(&database, month).await), (Some(0), vec![]), "{ended:?}");
        assert_eq!(marks(&database, month).await, detached());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_long_reader_holds_the_drop_up_and_nobody_else() {
    let database = database().await;
    let site = database.site("shop").await.id;
    fill(&database, site, old(5), 10, 3).await;
    fill(&database, site, old(0), 10, 3).await;
    for table in ["events", "sessions"] {
        fill(&database, site, old(5), 1, 1).await;
        let mut reader = connect(&database.url).await;
        let open = reader.transaction().await.expect("a transaction");
        open.query(&format!("SELECT count(*) FROM {table}"), &[]).await.expect("read");
        let env = [("DATABASE_URL", database.url.as_str())];
        let drop = ["partitions", "drop", "--month", &old(5).to_string(), "--yes", "--wait", "60"];
        let mut run = Program::start(&drop, &env);
        run.until("what it waits for", |said| said.contains("waiting for").then_some(())).await;
        let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), Default::default());
        let mut longest = Duration::ZERO;
        let began = std::time::Instant::now();
        let mut n = u32::from(table.as_bytes()[1]) * 1000;
        while began.elapsed() < Duration::from_secs(3) {
            let (asked, event) = (std::time::Instant::now(), Spec::new(n, &format!("v{n}"), Utc::now()).event(site));
            n += 1;
            assert!(matches!(pipeline.submit(vec![event]).await[0], Outcome::Stored(_)));
            longest = longest.max(asked.elapsed());
        }
        assert!(longest < Duration::from_secs(1), "beside a reader of {table} a write waited for {longest:?}");
        assert!(!tables(&database, old(5)).await.is_empty(), "the reader still reads {table}");
        open.rollback().await.expect("it ends");
        let ended = tokio::time::timeout(Duration::from_secs(30), run.ended()).await.expect("it goes on");
        assert!(ended.success(), "{}", run.said());
        assert_eq!(tables(&database, old(5)).await, Vec::<Value>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_outlives_the_month_of_its_visit_with_its_match_and_is_still_judged() {
    let database = database().await;
    let site = database.site("shop").await.id;
    let month = old(5);
    database.store.ensure_month(month).await.expect("made");
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), Default::default());
    let calls = Calls::new(database.store.clone());
    let store_events = async |specs: &[Spec]| {
        let outcomes = pipeline.submit(specs.iter().map(|spec| spec.event(site)).collect()).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Stored(_))), "{outcomes:?}");
    };
    let noon = at(month);
    let click =
        |n: u32, visit: &str, seconds: i64| Spec::new(n, visit, noon + TimeDelta::seconds(seconds)).clicks(BUSINESS);
    store_events(&[click(1, "A", -60), click(2, "P", 36_000 - 20), click(3, "Q", 36_000 - 10)]).await;
    let recorded = calls
        .record(
            site,
            &[push(site, call("credited", noon)), push(site, call("ambiguous", noon + TimeDelta::seconds(36_000)))],
        )
        .await
        .expect("recorded");
    let methods = [0, 1].map(|n: usize| recorded[n].call.found.decision.method);
    assert_eq!(methods, [MatchMethod::Click, MatchMethod::Ambiguous]);
    let before = recorded[0].call.clone();

    let shown = partitions(&database, &["drop", "--month", &month.to_string(), "--yes", "--json"]).await.json();
    assert_eq!(shown["months"][0]["matched_calls"], 1, "{shown}");
    assert_eq!(tables(&database, month).await, Vec::<Value>::new());

    let tx = database.store.begin(Purpose::Read(Reader::Site(site))).await.expect("the database answers");
    let read = store::calls::find(&tx, site, before.id).await.expect("it answers").expect("it is still there");
    tx.commit().await.expect("read");
    assert_eq!(read, before);
    let tx = database.store.begin(Purpose::Read(Reader::Site(site))).await.expect("the database answers");
    let filter = store::calls::Filter {
        from: noon - TimeDelta::days(1),
        before: noon + TimeDelta::days(1),
        ..Default::default()
    };
    let listed = store::calls::list(&tx, site, &filter, None, 10).await.expect("it answers");
    tx.commit().await.expect("read");
    assert!(listed.len() == 2 && listed.contains(&before), "{listed:?}");
    let judge = async |decision: Decision| {
        calls.review(site, before.id, &decision, "token:t").await.expect("it answers").expect("there is such a call")
    };
    assert_eq!(judge(Decision::Confirm(None)).await.found, before.found);
    assert_eq!(judge(Decision::Reopen).await.found, before.found, "opened again, and there is nothing better");
    let told =
        push(site, opsmantik::domain::push::Draft { recording_reference: Some("r".into()), ..call("credited", noon) });
    let merged = calls.record(site, &[told]).await.expect("a push about a call whose visit is gone");
    assert_eq!(merged[0].call.found, before.found);
    database
        .admin
        .batch_execute("UPDATE calls SET review = 'JUNK'; UPDATE calls SET review = 'OPEN'")
        .await
        .expect("by hand");
    opsmantik::calls::settle(&database.store, site, None).await.expect("settled");
    let waiting = "SELECT count(*) FROM opsmantik.call_rematches";
    assert_eq!(database.count(waiting).await, 0, "it does not fail for ever");

    // Events come late: the month is made again, with them only. The visit has lost the click that speaks for it.
    store_events(&[
        Spec::new(9, "A", noon - TimeDelta::seconds(30)).hint(&month.to_string()),
        click(8, "P", 36_000 - 25),
    ])
    .await;
    assert_eq!(tables(&database, month).await.len(), 2);
    assert_eq!(database.count("SELECT count(*) FROM events").await, 2);
    assert_eq!(database.count(waiting).await, 0);
    let found = database
        .rows("SELECT provider_call_id AS id, match_method AS how, lead_score_at_match AS score FROM calls ORDER BY 1 DESC")
        .await;
    let kept = [
        json!({"id": "credited", "how": "CLICK", "score": 60}),
        json!({"id": "ambiguous", "how": "AMBIGUOUS", "score": null}),
    ];
    assert_eq!(found, kept);
    assert_eq!(judge(Decision::Reopen).await.found, before.found);
    assert_eq!(
        database
            .count("SELECT call_signals::bigint FROM sessions WHERE event_count = 1 ORDER BY call_signals DESC LIMIT 1")
            .await,
        1,
        "the visit that came back is credited with the call again"
    );
    assert!(database.store.readiness(old(0), 3).await.expect("it answers").is_ready());
}

#[tokio::test]
async fn a_session_needs_its_site_and_a_site_with_sessions_stays() {
    let database = database().await;
    let site = database.site("shop").await.id;
    fill(&database, site, old(5), 2, 0).await;
    let admin = &database.admin;
    for sql in [
        "INSERT INTO sessions SELECT (jsonb_populate_record(s, jsonb_build_object('site_id', gen_random_uuid()))).* FROM sessions s",
        "UPDATE sessions SET site_id = gen_random_uuid()",
        "DELETE FROM sites",
        "UPDATE sites SET id = gen_random_uuid()",
    ] {
        let error = admin.batch_execute(sql).await.expect_err(sql);
        let error = error.as_db_error().expect("PostgreSQL says no");
        assert_eq!((error.code().code(), error.constraint()), ("23503", Some("sessions_site_id_fkey")), "{sql}");
    }
    // A session that is being written while its site is deleted: one of them is refused.
    let mut writer = connect(&database.url).await;
    admin.batch_execute("DELETE FROM sessions").await.expect("none is left");
    let open = writer.transaction().await.expect("a transaction");
    let insert = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
        traffic_source, traffic_medium, lead_score) VALUES ($1, $2, $1, now(), now(), 1, '/', 'Organic/Referral', 'Direct', 'direct', 0)";
    open.execute(insert, &[&site.as_uuid(), &old(5).first_day()]).await.expect("written");
    let deleting = async { admin.batch_execute("DELETE FROM sites").await };
    let committing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        open.commit().await
    };
    let (deleted, written) = tokio::join!(deleting, committing);
    assert!(deleted.is_err() && written.is_ok(), "{deleted:?} {written:?}");
    admin.batch_execute("DELETE FROM sessions; DELETE FROM sites").await.expect("nothing holds it");
}

#[tokio::test]
async fn a_match_names_a_session_that_is_there_when_it_is_made() {
    let database = database().await;
    let site = database.site("shop").await.id;
    fill(&database, site, old(5), 2, 0).await;
    let admin = &database.admin;
    let columns = "provider, provider_call_id, channel, direction, dialled_number, started_at, match_method, match_evidence, \
        lead_score_at_match, score_breakdown_at_match, matched_session_month, matched_session_id";
    let insert = |session: &str| {
        format!(
            "INSERT INTO calls (site_id, {columns}) SELECT '{site}', 'p', gen_random_uuid(), 'PHONE', 'INBOUND', '+12025550123', now(), \
             'CLICK', '{{}}', 0, '[]', '{month}', {session}",
            month = old(5)
        )
    };
    let there = "(SELECT id FROM sessions ORDER BY id LIMIT 1)";
    for (sql, refused) in [
        (insert("gen_random_uuid()"), true),
        (insert(there), false),
        ("UPDATE calls SET matched_session_id = gen_random_uuid()".to_owned(), true),
        (format!("UPDATE calls SET matched_session_month = '{}'", old(4)), true),
        ("UPDATE calls SET matched_session_id = (SELECT id FROM sessions ORDER BY id DESC LIMIT 1)".to_owned(), false),
        // Deferred, as the server does: in the end it counts.
        (format!("BEGIN; SET CONSTRAINTS ALL DEFERRED; {}; COMMIT", insert("gen_random_uuid()")), true),
        (
            format!(
                "BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE calls SET matched_session_id = gen_random_uuid(); \
                 UPDATE calls SET matched_session_id = {there}; COMMIT"
            ),
            false,
        ),
        // The visit goes, the call stays, and whatever else is written to it is written.
        (
            "DELETE FROM sessions; UPDATE calls SET duration_sec = 7, matched_session_id = matched_session_id"
                .to_owned(),
            false,
        ),
        ("UPDATE calls SET matched_session_id = gen_random_uuid()".to_owned(), true),
    ] {
        let told = admin.batch_execute(&sql).await;
        assert_eq!(told.is_err(), refused, "{sql}: {told:?}");
        if let Err(error) = told {
            let error = error.as_db_error().expect("PostgreSQL says no");
            assert_eq!((error.code().code(), error.constraint()), ("23503", Some("calls_session")), "{sql}");
            admin.batch_execute("ROLLBACK").await.expect("back");
        }
    }
}
