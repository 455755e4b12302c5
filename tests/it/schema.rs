//! The schema itself: what PostgreSQL does not do by itself for a partition, and what it refuses even to hand-written SQL.

use opsmantik::domain::month::Month;
use opsmantik::keeper;
use opsmantik::store::Store;

use crate::support::database::{connect, database};
use crate::support::supabase::like_supabase;

const SESSION: &str = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, \
     attribution, traffic_source, traffic_medium, lead_score) SELECT id, '2026-03-01', id, now(), now(), 1, '/', \
     'Organic/Referral', 'Direct', 'direct', 0 FROM sites";

#[tokio::test]
async fn an_event_without_its_sessions_month_cannot_be_stored_even_by_hand() {
    let database = database().await;
    database.site("hand").await;
    database.ensure_month("2026-03-01").await;
    database.ensure_month("2026-04-01").await;
    database.admin.batch_execute(SESSION).await.expect("a session");
    let event = |column: &str, value: &str| {
        format!(
            "INSERT INTO events (site_id, id, session_id, created_at, occurred_at, url, event_category, event_action, \
             lead_score{column}) SELECT id, gen_random_uuid(), id, now(), now(), '/', 'c', 'a', 0{value} FROM sites"
        )
    };
    for (column, value, why) in [
        ("", "", "no session_month"),
        (", session_month", ", NULL", "NULL"),
        (", session_month", ", '2026-04-01'", "another month than its session's"),
        (", session_month", ", '2026-03-02'", "not the first of a month"),
        (", session_month", ", '1999-01-01'", "a month without partition"),
    ] {
        let refused = database.admin.batch_execute(&event(column, value)).await;
        assert!(refused.is_err(), "{why} was stored");
    }
    let stored = database.admin.batch_execute(&event(", session_month", ", '2026-03-01'")).await;
    stored.expect("the session's own month");
    let moved = database.admin.batch_execute("UPDATE events SET session_month = '2026-04-01'").await;
    assert!(moved.is_err(), "an event left its session's month");
}

#[tokio::test]
async fn every_leaf_is_whole_now_and_in_future_and_is_mended_when_disturbed() {
    let database = database().await;
    assert_eq!(keeper::keep(&database.store, chrono::Utc::now()).await.expect("kept"), Vec::<String>::new());
    database.ensure_month("2026-03-01").await;
    let leaves = database
        .rows(
            "SELECT c.relname, c.relreplident, c.relrowsecurity, c.relforcerowsecurity, \
             (SELECT count(*) FROM pg_policy p WHERE p.polrelid = c.oid) AS policies, \
             (SELECT count(*) FROM pg_policy p WHERE p.polrelid = i.inhparent) AS parent_policies \
             FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE c.relkind = 'r'",
        )
        .await;
    assert!(leaves.len() >= 12, "five months at least, and the one made later: {}", leaves.len());
    for leaf in &leaves {
        assert_eq!(leaf["relreplident"], "f", "{leaf}");
        assert_eq!((&leaf["relrowsecurity"], &leaf["relforcerowsecurity"]), (&true.into(), &true.into()), "{leaf}");
        assert!(
            leaf["policies"].as_i64().is_some_and(|n| n > 0) && leaf["policies"] == leaf["parent_policies"],
            "{leaf}"
        );
    }
    let now = Month::of(chrono::Utc::now());
    assert!(database.store.readiness(now, 3).await.expect("it answers").is_ready());

    database
        .admin
        .batch_execute(
            "ALTER TABLE events_2026_03 DISABLE ROW LEVEL SECURITY; ALTER TABLE events_2026_03 REPLICA IDENTITY DEFAULT; \
             GRANT SELECT ON events_2026_03 TO anon",
        )
        .await
        .expect("disturbed");
    let readiness = database.store.readiness(now, 3).await.expect("it answers");
    assert!(
        readiness.faults.len() >= 3 && readiness.faults.iter().all(|f| f.contains("events_2026_03")),
        "{readiness:?}"
    );
    database.ensure_month("2026-03-01").await;
    assert!(database.store.readiness(now, 3).await.expect("it answers").is_ready());
    let far = database.store.readiness(now, 7).await.expect("it answers");
    assert!(!far.missing_months.is_empty(), "months that nobody made are missing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_keepers_at_once_do_not_fight_and_no_reader_is_in_their_way() {
    let database = database().await;
    let mut reader = connect(&database.url).await;
    let open = reader.transaction().await.expect("a transaction");
    open.query("SELECT * FROM events", &[]).await.expect("read");
    open.query("SELECT * FROM sessions", &[]).await.expect("read");
    let future = chrono::Utc::now() + chrono::Months::new(8);
    let servers = futures::future::join_all((0..4).map(|_| keeper::keep(&database.store, future))).await;
    let mut made: Vec<String> = servers.into_iter().flat_map(|made| made.expect("a keeper is not disturbed")).collect();
    let all = made.len();
    made.sort();
    made.dedup();
    assert_eq!((made.len(), all), (10, 10), "each leaf was made once: {made:?}");
    open.rollback().await.expect("the reader was never in the way");
}

#[tokio::test]
async fn a_month_that_a_late_event_needs_is_made_while_it_waits() {
    let database = database().await;
    let site = database.site("late").await.id;
    let (nudge, stop) = (keeper::Nudge::default(), tokio_util::sync::CancellationToken::new());
    let running = tokio::spawn(keeper::run(database.store.clone(), nudge.clone(), stop.clone()));
    let pipeline = opsmantik::pipeline::Pipeline::start(database.store.clone(), nudge, Default::default());
    let late = crate::support::events::Spec::new(1, "s", chrono::Utc::now() - chrono::Months::new(7)).event(site);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !matches!(pipeline.submit(vec![late.clone()]).await[0], opsmantik::domain::outcome::Outcome::Stored(_)) {
        assert!(std::time::Instant::now() < deadline, "the month was never made");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    stop.cancel();
    running.await.expect("the keeper ends");
}

#[tokio::test]
async fn the_migrations_run_on_a_supabase_database_and_leak_nothing_there() {
    let database = like_supabase("like_supabase").await;
    let (admin, store) = (&database.admin, &database.store);
    assert!(store.migrate().await.expect("the migrations run").len() >= 4);
    assert_eq!(store.migrate().await.expect("again"), Vec::<String>::new());

    assert!(store.readiness(Month::of(chrono::Utc::now()), 3).await.expect("it answers").is_ready());
    let made = store.ensure_month("2026-03-01".parse().expect("a month")).await.expect("a later month");
    assert_eq!(made, ["sessions_2026_03", "events_2026_03"]);
    let leaks = admin
        .query(
            "SELECT c.relname::text, a.privilege_type FROM pg_class c, aclexplode(c.relacl) a \
             WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND a.grantee = 'anon'::regrole",
            &[],
        )
        .await
        .expect("a look into the catalog");
    assert!(leaks.is_empty(), "anon may {} {}", leaks[0].get::<_, String>(1), leaks[0].get::<_, String>(0));
    let open = admin
        .query(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r','p') \
                AND NOT (relrowsecurity AND relforcerowsecurity)",
            &[],
        )
        .await
        .expect("a look into the catalog");
    assert!(open.is_empty(), "without row level security: {}", open[0].get::<_, String>(0));
}

#[tokio::test]
async fn months_are_those_of_utc_whatever_the_database_thinks() {
    let database = database().await;
    let name = &database.name;
    database
        .admin
        .batch_execute(&format!("ALTER DATABASE {name} SET timezone = 'Pacific/Auckland'"))
        .await
        .expect("set");
    let store = Store::new(&database.url, 1).await.expect("a URL");
    assert_eq!(store.ensure_month("2026-03-01".parse().expect("a month")).await.expect("made").len(), 2);
    let bounds = database
        .rows("SELECT pg_get_expr(relpartbound, oid) AS bounds FROM pg_class WHERE relname IN ('events_2026_03', 'sessions_2026_03')")
        .await;
    for leaf in bounds {
        assert_eq!(leaf["bounds"], "FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')");
    }
}

#[tokio::test]
async fn the_servers_own_role_can_do_only_what_its_statements_need() {
    let database = database().await;
    database.site("walls").await;
    for forbidden in [
        "DELETE FROM events",
        "DELETE FROM sessions",
        "UPDATE events SET url = ''",
        "TRUNCATE events",
        "INSERT INTO sites (public_id, name, domain) VALUES ('x', 'x', 'x')",
        "DROP TABLE events",
        "CREATE TABLE public.stray (id int)",
        "INSERT INTO api_tokens (token_hash, scopes, all_sites) VALUES (decode(repeat('00', 32), 'hex'), '{calls:read}', true)",
    ] {
        let tried = database
            .admin
            .batch_execute(&format!("BEGIN; SET LOCAL ROLE opsmantik_service; {forbidden}; COMMIT"))
            .await;
        assert!(tried.is_err(), "opsmantik_service may: {forbidden}");
        database.admin.batch_execute("ROLLBACK").await.expect("back");
    }
    let bypass =
        "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'opsmantik_%' AND (rolsuper OR rolbypassrls OR rolcanlogin)";
    assert_eq!(database.count(bypass).await, 0);
    let owned =
        "SELECT count(*) FROM pg_class WHERE relowner IN (SELECT oid FROM pg_roles WHERE rolname LIKE 'opsmantik\\_%')";
    assert_eq!(database.count(owned).await, 0);
}

/// Its owner's triggers would run as whoever stores.
#[tokio::test]
async fn a_table_of_somebody_else_does_not_become_a_month() {
    let database = database().await;
    database.admin.batch_execute("CREATE TABLE public.events_2026_03 (LIKE events INCLUDING ALL)").await.expect("made");
    database.admin.batch_execute("ALTER TABLE public.events_2026_03 OWNER TO anon").await.expect("given away");
    let month = "2026-03-01".parse().expect("a month");
    let refused = database.store.ensure_month(month).await.expect_err("it would be attached");
    assert!(refused.detail.to_string().contains("events_2026_03 is in the way"), "{refused:?}");
    database.admin.batch_execute("ALTER TABLE public.events_2026_03 OWNER TO CURRENT_USER").await.expect("taken back");
    assert_eq!(database.store.ensure_month(month).await.expect("ours").len(), 2);
    let judged =
        database.admin.batch_execute("INSERT INTO sites (public_id, name, domain) VALUES ('a', E'a\\nb', 'a.example')");
    assert!(judged.await.is_err(), "a name of two lines");
}

/// Where an indexed column changes, the new row is entered into every index of its table.
#[tokio::test]
async fn no_index_holds_what_the_events_of_a_session_change() {
    let database = database().await;
    let indexed = database
        .rows(
            "SELECT DISTINCT a.attname FROM pg_index i \
             JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refobjid = i.indrelid AND d.refobjsubid > 0 \
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid \
             WHERE i.indrelid = 'sessions'::regclass AND NOT i.indisprimary ORDER BY 1",
        )
        .await;
    let indexed: Vec<&str> = indexed.iter().filter_map(|row| row["attname"].as_str()).collect();
    // The time of the first event, who it was, and what brought them: mostly told by the first event, and by no later one.
    assert_eq!(indexed, ["attribution", "created_at", "fingerprint", "id", "site_id"]);
}
