//! Tenants are kept apart by the database alone: whoever comes with whatever claims, at every table, at every leaf by its own name, with every
//! verb. `walls/rule.rs` says what is right, `walls/attempt.rs` tries it, on three databases: a plain one, one like Supabase's, and one whose
//! owner is bound by row level security as well.

use tokio_postgres::error::SqlState;

use crate::catalog::FUNCTIONS;
use crate::support::database::{Database, connect};

mod attempt;
mod claims;
mod manage;
mod plans;
mod rule;
mod world;

use attempt::Visit;
use world::{A, Actor, World, actors, snapshot};

/// What all attempts came to.
#[derive(Default)]
struct Tally {
    attempts: usize,
    reached: usize,
    faults: Vec<String>,
}

/// Everybody at every table whose name begins like this, after `prelude`, which is taken back as well.
async fn attempts(world: &World, tables: &str, prelude: &str) -> Tally {
    let mut admin = connect(&world.url_of_superuser().await).await;
    let before = snapshot(&admin, &world.tables).await;
    let mut tally = Tally::default();
    for actor in &actors() {
        let tx = admin.transaction().await.expect("a transaction");
        let opening = format!("{prelude}; {}", actor.opening());
        tx.batch_execute(&opening).await.expect("the superuser may be anybody");
        let mut visit = Visit { tx: &tx, world, before: &before, actor, attempts: 0, reached: 0, faults: Vec::new() };
        for table in world.tables.iter().filter(|table| table.name.starts_with(tables)) {
            visit.visit(table).await;
        }
        tally.attempts += visit.attempts;
        tally.reached += visit.reached;
        tally.faults.append(&mut visit.faults);
        tx.rollback().await.expect("nothing stays");
    }
    assert_eq!(snapshot(&admin, &world.tables).await, before);
    tally
}

async fn matrix(mut world: World) {
    let Tally { attempts, reached, faults } = attempts(&world, "", "").await;
    assert!(faults.is_empty(), "{} of {attempts}\n{}", faults.len(), faults[..faults.len().min(20)].join("\n"));
    assert!(
        attempts > 5_000 && reached > 1_000,
        "{attempts} attempts reached {reached} rows: the test shows something"
    );
    functions(&mut world.database).await;
}

/// Each function of our schema is called by each role, by name: it opens to those that the catalog's list names, if their schema is open.
async fn functions(database: &mut Database) {
    let calls = database
        .rows(
            "SELECT p.oid::regprocedure::text AS name, format('SELECT opsmantik.%I(%s)', p.proname, \
                 (SELECT string_agg('NULL::' || t::regtype, ', ' ORDER BY place) FROM unnest(p.proargtypes) WITH ORDINALITY AS a (t, place))) AS call, \
                 format('opsmantik.%s(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) AS listed \
             FROM pg_proc p WHERE p.pronamespace = 'opsmantik'::regnamespace",
        )
        .await;
    assert_eq!(calls.len(), FUNCTIONS.len());
    for call in &calls {
        let (sql, listed) = (call["call"].as_str().expect("text"), call["listed"].as_str().expect("text"));
        let (_, how) = FUNCTIONS.iter().find(|(function, _)| *function == listed).expect("the catalog's list has it");
        let (_, callers) = how.rsplit_once("; for ").expect("it says for whom");
        for role in
            ["anon", "authenticated", "opsmantik_tenant", "service_role", "opsmantik_service", "opsmantik_operator"]
        {
            let tx = database.admin.transaction().await.expect("a transaction");
            tx.batch_execute(&format!("SET LOCAL ROLE {role}")).await.expect("the superuser may be anybody");
            let called = tx.batch_execute(sql).await;
            tx.rollback().await.expect("nothing stays");
            let refused = called.err().is_some_and(|error| error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE));
            let opens = callers.split(", ").any(|caller| caller == role)
                && ["opsmantik_service", "opsmantik_operator"].contains(&role);
            assert_eq!(refused, !opens, "{role}: {sql}");
        }
    }
}

#[tokio::test]
async fn on_a_plain_postgresql_every_attempt_ends_as_the_rule_says() {
    matrix(World::vanilla().await).await;
}

#[tokio::test]
async fn on_supabase_every_attempt_ends_as_the_rule_says() {
    matrix(World::like_supabase("walls_like_supabase").await).await;
}

#[tokio::test]
async fn under_an_owner_who_bypasses_nothing_every_attempt_ends_as_the_rule_says() {
    matrix(World::of_a_plain_owner("walls_plain_owner").await).await;
}

/// Holes in the wall, and who is found in it.
const HOLES: &[(&str, &str, &str)] = &[
    (
        "public.events_2026_03",
        "CREATE POLICY hole ON events_2026_03 FOR SELECT TO authenticated USING (true)",
        "authenticated stranger: SELECT",
    ),
    (
        "public.sessions_2026_03",
        "ALTER TABLE sessions_2026_03 DISABLE ROW LEVEL SECURITY",
        "opsmantik_tenant of B: SELECT",
    ),
    (
        "public.calls",
        "CREATE POLICY hole ON calls FOR UPDATE TO authenticated USING (true)",
        "authenticated viewer of A: UPDATE",
    ),
    (
        "public.site_members",
        "GRANT UPDATE (site_id) ON site_members TO authenticated",
        "authenticated owner of A: UPDATE",
    ),
    (
        "public.site_members",
        "ALTER POLICY authenticated_add ON site_members WITH CHECK (true)",
        "authenticated editor of A: INSERT",
    ),
    (
        "public.site_members",
        "ALTER POLICY authenticated_remove ON site_members USING (true)",
        "authenticated owner of A: DELETE",
    ),
    ("public.sites", "GRANT SELECT ON sites TO anon", "anon with the owner's claims: SELECT"),
    ("public.dead_letters", "GRANT SELECT ON dead_letters TO opsmantik_tenant", "opsmantik_tenant of A: SELECT"),
    ("public.events", "GRANT DELETE ON events TO opsmantik_service", "opsmantik_service : DELETE"),
    ("opsmantik.vanished", "GRANT TRUNCATE ON opsmantik.vanished TO opsmantik_service", "opsmantik_service : TRUNCATE"),
];

#[tokio::test]
async fn a_hole_in_the_wall_is_found() {
    let world = World::vanilla().await;
    for (table, hole, found) in HOLES {
        let tally = attempts(&world, table, hole).await;
        assert!(tally.faults.iter().any(|fault| fault.contains(found)), "{hole}\n{}", tally.faults.join("\n"));
    }
}

#[tokio::test]
async fn a_function_in_a_where_sees_no_row_that_a_policy_hides() {
    let mut database = World::vanilla().await.database;
    let tx = database.admin.transaction().await.expect("a transaction");
    tx.batch_execute(&Actor::person("viewer", world::VIEWER_A).opening()).await.expect("the superuser may be anybody");
    // As cheap as can be, so that the planner would like to ask it first.
    let peek = "CREATE FUNCTION pg_temp.peek(site uuid) RETURNS bool LANGUAGE plpgsql COST 0.0001 AS $$ BEGIN \
        PERFORM set_config('test.peeked', concat(current_setting('test.peeked', true), site, ' '), true); RETURN true; END $$";
    tx.batch_execute(peek).await.expect("anybody may make a function of their own");
    for table in ["sessions", "events", "calls", "site_members", "events_2026_03", "sessions_2026_03"] {
        tx.batch_execute(&format!("SELECT * FROM {table} WHERE pg_temp.peek(site_id)")).await.expect("read");
    }
    let peeked = tx.query_one("SELECT current_setting('test.peeked')", &[]).await.expect("a setting");
    let peeked: String = peeked.get(0);
    assert!(peeked.contains(&A.to_string()) && !peeked.contains(&world::B.to_string()), "{peeked}");
}
