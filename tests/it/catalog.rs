//! What there is in the database, and who may do what with it: all of it, against one list that is written down here.
//!
//! The catalog is read whole (`catalog/facts.sql`): relations, grants, policies, triggers, functions, schemas, default privileges,
//! publications, event triggers, our roles. A fact that the list does not have fails, and so does a line of the list that is no fact. Leaves
//! are not listed: each has to be its parent, word for word. Whoever adds something adds its line to `catalog/expected.rs`.

use std::collections::BTreeSet;

use tokio_postgres::Transaction;

use crate::support::database::{Database, database};
use crate::support::supabase::migrated_like_supabase;

mod expected;

pub use expected::FUNCTIONS;
use expected::{ALSO, LEAVES_ONLY, ON_SUPABASE, ON_VANILLA, TABLES, default_privileges_on_supabase};

/// On what the migrations ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    /// A plain PostgreSQL: we made the schema `auth`.
    Vanilla,
    /// It brought roles, default privileges and `auth`, which is not ours to describe.
    Supabase,
}

struct Fact {
    /// The relation that it is about, if that is a leaf, and its parent.
    leaf: Option<(String, String)>,
    text: String,
}

/// Policies ask for sites in three ways; said shorter, so that a line of the list can be read.
fn short(fact: &str) -> String {
    ["visible", "editable", "owned"].iter().fold(fact.to_owned(), |fact, which| {
        let long = format!("= ANY ((SELECT opsmantik.{which}_site_ids())::uuid[])");
        fact.replace(&long, &format!("in {which}_site_ids()"))
    })
}

async fn facts(tx: &Transaction<'_>, host: Host) -> Vec<Fact> {
    let mut schemas = vec!["public", "opsmantik"];
    schemas.extend((host == Host::Vanilla).then_some("auth"));
    tx.batch_execute("SET LOCAL search_path = pg_catalog; SET LOCAL jit = off").await.expect("set");
    let rows = tx.query(include_str!("catalog/facts.sql"), &[&schemas]).await.expect("the catalog can be read");
    rows.iter()
        .map(|row| {
            let parent: Option<String> = row.get("parent");
            Fact { leaf: parent.map(|parent| (row.get("rel"), parent)), text: short(row.get("fact")) }
        })
        .collect()
}

/// Every difference between the catalog and the list, in words.
async fn differences(tx: &Transaction<'_>, host: Host) -> Vec<String> {
    let facts = facts(tx, host).await;
    let leaves: BTreeSet<&(String, String)> = facts.iter().filter_map(|fact| fact.leaf.as_ref()).collect();
    let mut expected: BTreeSet<String> = ALSO.iter().map(|line| (*line).to_owned()).collect();
    expected.extend(FUNCTIONS.iter().map(|(function, how)| format!("{function}: {how}")));
    let hosts_own = if host == Host::Vanilla { ON_VANILLA } else { ON_SUPABASE };
    expected.extend(hosts_own.iter().map(|line| (*line).to_owned()));
    if host == Host::Supabase {
        expected.extend(default_privileges_on_supabase());
    }
    for (table, lines) in TABLES {
        expected.extend(lines.iter().map(|line| format!("{table}: {line}")));
        for (leaf, _) in leaves.iter().filter(|(_, parent)| parent == table) {
            // Word for word, but that it is a leaf, and that its publications are its own.
            let inherited = lines.iter().filter(|line| !line.starts_with("in publication"));
            for line in inherited.chain(LEAVES_ONLY) {
                let line = line.strip_prefix("partitioned ").unwrap_or(line).replace(table, leaf);
                expected.insert(format!("{leaf}: {line}"));
            }
        }
    }
    let found: BTreeSet<String> = facts.iter().map(|fact| fact.text.clone()).collect();
    let strange = found.difference(&expected).map(|fact| format!("nobody was told of: {fact}"));
    let missing = expected.difference(&found).map(|fact| format!("is not so: {fact}"));
    strange.chain(missing).collect()
}

async fn judge(database: &mut Database, host: Host) {
    database.ensure_month("2026-03-01").await;
    let leaves = database.count("SELECT count(*) FROM opsmantik.leaves()").await;
    assert!(leaves >= 12, "the months of the migration, and one that was made later: {leaves}");
    let tx = database.admin.transaction().await.expect("a transaction");
    let found = differences(&tx, host).await;
    assert!(found.is_empty(), "{host:?}\n{}", found.join("\n"));
}

#[tokio::test]
async fn the_catalog_holds_what_is_written_down_and_nothing_else() {
    judge(&mut database().await, Host::Vanilla).await;
}

#[tokio::test]
async fn on_supabase_the_catalog_holds_the_same() {
    judge(&mut migrated_like_supabase("catalog_like_supabase").await, Host::Supabase).await;
}

/// What somebody does by hand or by a careless migration, and what the comparison has to say of it.
const STRAYS: &[(&str, &str)] = &[
    ("CREATE TABLE public.stray (id int)", "nobody was told of: public.stray: table, row security off"),
    ("CREATE TABLE opsmantik.stray (id serial)", "nobody was told of: opsmantik.stray_id_seq: sequence"),
    ("CREATE TABLE public.events_2020_01 (LIKE public.events)", "nobody was told of: public.events_2020_01: table"),
    ("CREATE TABLE public.heir () INHERITS (public.calls)", "nobody was told of: public.heir: inherits public.calls"),
    ("CREATE VIEW public.stray AS SELECT * FROM public.calls", "nobody was told of: public.stray: view"),
    (
        "CREATE MATERIALIZED VIEW public.stray AS TABLE public.calls",
        "nobody was told of: public.stray: materialized view",
    ),
    ("CREATE TYPE public.stray AS ENUM ('a')", "nobody was told of: type public.stray"),
    (
        "CREATE RULE stray AS ON UPDATE TO public.calls DO INSTEAD NOTHING",
        "nobody was told of: public.calls: rule stray",
    ),
    ("GRANT SELECT ON public.sites TO anon", "nobody was told of: public.sites: anon may SELECT"),
    ("GRANT SELECT ON public.api_tokens TO PUBLIC", "nobody was told of: public.api_tokens: PUBLIC may SELECT"),
    (
        "GRANT UPDATE (user_id) ON public.sites TO authenticated",
        "nobody was told of: public.sites: authenticated may SELECT, UPDATE (all but created_at, id, public_id)",
    ),
    (
        "GRANT SELECT (url) ON public.events_2026_03 TO anon",
        "nobody was told of: public.events_2026_03: anon may SELECT (url)",
    ),
    (
        "GRANT DELETE ON public.events TO opsmantik_service",
        "nobody was told of: public.events: opsmantik_service may DELETE, INSERT, SELECT",
    ),
    (
        "GRANT SELECT ON public.calls TO authenticated WITH GRANT OPTION",
        "nobody was told of: public.calls: authenticated may SELECT WITH GRANT OPTION",
    ),
    (
        "REVOKE SELECT ON public.events_2026_03 FROM opsmantik_tenant",
        "is not so: public.events_2026_03: opsmantik_tenant may SELECT",
    ),
    ("GRANT USAGE ON SCHEMA opsmantik TO anon", "nobody was told of: schema opsmantik: anon may USAGE"),
    ("GRANT CREATE ON SCHEMA public TO PUBLIC", "nobody was told of: schema public: PUBLIC may CREATE, USAGE"),
    (
        "ALTER DEFAULT PRIVILEGES IN SCHEMA opsmantik GRANT SELECT ON TABLES TO authenticated",
        "nobody was told of: default privileges in opsmantik on tables that OWNER makes: authenticated may SELECT",
    ),
    (
        "CREATE FUNCTION opsmantik.stray() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "nobody was told of: opsmantik.stray(): sql, volatile, invoker, search_path NOT PINNED; for PUBLIC",
    ),
    ("GRANT EXECUTE ON FUNCTION opsmantik.ensure_month TO PUBLIC", "for PUBLIC, opsmantik_operator, opsmantik_service"),
    (
        "ALTER FUNCTION opsmantik.visible_site_ids() RESET search_path",
        "nobody was told of: opsmantik.visible_site_ids(): sql, stable, definer, search_path NOT PINNED",
    ),
    (
        "ALTER FUNCTION opsmantik.tenant_site_id() SECURITY DEFINER",
        "nobody was told of: opsmantik.tenant_site_id(): sql, stable, definer",
    ),
    (
        "ALTER FUNCTION opsmantik.caller_id() OWNER TO opsmantik_operator",
        "nobody was told of: opsmantik.caller_id(): plpgsql, stable, definer, owned by opsmantik_operator",
    ),
    ("DROP FUNCTION opsmantik.leaf_states()", "is not so: opsmantik.leaf_states()"),
    (
        "CREATE POLICY stray ON public.calls FOR SELECT USING (true)",
        "nobody was told of: public.calls: policy stray, SELECT to PUBLIC using true",
    ),
    (
        "ALTER POLICY authenticated ON public.sessions_2026_03 USING (true)",
        "nobody was told of: public.sessions_2026_03: policy authenticated, SELECT to authenticated using true",
    ),
    ("DROP POLICY opsmantik_tenant ON public.events", "is not so: public.events: policy opsmantik_tenant"),
    (
        "ALTER TABLE public.dead_letters NO FORCE ROW LEVEL SECURITY",
        "nobody was told of: public.dead_letters: table, row security on",
    ),
    (
        "ALTER TABLE public.events_2026_03 DISABLE ROW LEVEL SECURITY",
        "nobody was told of: public.events_2026_03: table, row security off",
    ),
    (
        "ALTER TABLE public.events_2026_03 REPLICA IDENTITY DEFAULT",
        "is not so: public.events_2026_03: table, row security forced, identity full",
    ),
    (
        "ALTER TABLE public.sessions OWNER TO opsmantik_operator",
        "nobody was told of: public.sessions: partitioned table, row security forced, identity full, owned by opsmantik_operator",
    ),
    ("DROP TRIGGER calls_deleted ON public.calls", "is not so: public.calls: TRIGGER calls_deleted"),
    ("ALTER TABLE public.calls DISABLE TRIGGER calls_touch", "EXECUTE FUNCTION opsmantik.touch_call() (fires: D)"),
    (
        "CREATE TRIGGER stray BEFORE INSERT ON public.events_2026_03 FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "nobody was told of: public.events_2026_03: TRIGGER stray",
    ),
    (
        "CREATE PUBLICATION stray FOR ALL TABLES",
        "nobody was told of: publication stray: insert update delete truncate, by the leaf, ALL TABLES",
    ),
    (
        "CREATE PUBLICATION stray FOR TABLES IN SCHEMA public",
        "nobody was told of: publication stray lists the schema public",
    ),
    (
        "ALTER PUBLICATION opsmantik_feed ADD TABLE public.api_tokens",
        "nobody was told of: public.api_tokens: in publication opsmantik_feed",
    ),
    (
        "ALTER PUBLICATION opsmantik_feed DROP TABLE public.calls",
        "is not so: public.calls: in publication opsmantik_feed",
    ),
    (
        "CREATE FUNCTION pg_temp.stray() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; CREATE EVENT TRIGGER stray ON ddl_command_end EXECUTE FUNCTION pg_temp.stray()",
        "nobody was told of: event trigger stray on ddl_command_end",
    ),
    ("ALTER ROLE opsmantik_tenant BYPASSRLS", "nobody was told of: role opsmantik_tenant: BYPASSRLS"),
    (
        "GRANT opsmantik_operator TO opsmantik_service",
        "nobody was told of: role opsmantik_service: member of opsmantik_operator",
    ),
];

#[tokio::test]
async fn the_comparison_names_whatever_strays() {
    let mut database = database().await;
    database.ensure_month("2026-03-01").await;
    for (stray, named) in STRAYS {
        // Rolled back: the next one begins from what is right, and roles belong to other tests, too.
        let tx = database.admin.transaction().await.expect("a transaction");
        tx.batch_execute(stray).await.unwrap_or_else(|error| panic!("{stray}: {error:?}"));
        let found = differences(&tx, Host::Vanilla).await;
        tx.rollback().await.expect("as if it had not been");
        assert!(found.iter().any(|line| line.contains(named)), "{stray}\nis told as\n{}", found.join("\n"));
    }
}
