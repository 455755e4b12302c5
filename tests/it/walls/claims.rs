//! Claims and settings that make no sense: they show nothing, reach nothing and raise nothing, and whoever comes next on the same connection
//! sees what is theirs.

use super::world::{A, Actor, B, ONLY_A, OWNER_A, Table, VIEWER_A, World};

/// Tables that a person may read, and leaves.
fn readable(world: &World) -> Vec<&Table> {
    let tenants = ["public.sites", "public.site_members", "public.sessions", "public.events", "public.calls"];
    world.tables.iter().filter(|table| tenants.contains(&table.kind.as_str())).collect()
}

/// What a person can do with rows, over all they can reach: none of it may reach one, and none of it may fail.
const WRITES: [&str; 6] = [
    "UPDATE sites SET name = 'theirs'",
    "UPDATE site_members SET role = 'owner'",
    "DELETE FROM site_members",
    "UPDATE calls SET review = 'JUNK' RETURNING *",
    "SELECT * FROM sites FOR UPDATE",
    "SELECT * FROM events e JOIN sessions s ON s.site_id = e.site_id AND s.id = e.session_id",
];

async fn reaches_nothing(world: &mut World, actor: &Actor) {
    let tables: Vec<String> = readable(world).iter().map(|table| format!("SELECT * FROM {}", table.name)).collect();
    let tx = world.database.admin.transaction().await.expect("a transaction");
    tx.batch_execute(&actor.opening()).await.expect("the superuser may be anybody");
    let writes: &[&str] = if actor.role == "authenticated" { &WRITES } else { &[] };
    for sql in tables
        .iter()
        .map(String::as_str)
        .filter(|sql| !sql.ends_with("site_members") || !writes.is_empty())
        .chain(writes.iter().copied())
    {
        let reached = tx.execute(sql, &[]).await;
        let reached = reached.unwrap_or_else(|error| panic!("{}: {sql}: {error:?}", shown(&actor.name)));
        assert_eq!(reached, 0, "{}: {sql}", shown(&actor.name));
    }
    tx.rollback().await.expect("nothing stays");
}

fn shown(text: &str) -> &str {
    text.char_indices().nth(80).map_or(text, |(end, _)| &text[..end])
}

/// What a next transaction of the same connection sees.
async fn sees_a(world: &mut World, actor: &Actor) {
    let expected =
        world.tables.iter().find(|table| table.name == "public.events").expect("it is there").rows_of(ONLY_A);
    let tx = world.database.admin.transaction().await.expect("a transaction");
    tx.batch_execute(&actor.opening()).await.expect("the superuser may be anybody");
    let rows = tx.query("SELECT to_jsonb(t)::text FROM events t ORDER BY 1", &[]).await.expect("read");
    let mut rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    rows.sort();
    assert_eq!(rows, expected);
}

/// Claims of nobody, though they know the name of somebody.
fn nonsense() -> Vec<String> {
    let owner = OWNER_A;
    let mut claims: Vec<String> =
        ["", " ", "null", "sub", "{", "{]", "[]", "\"text\"", "42", "true", "{}", "{\"sub\"", "\\", "'"]
            .map(str::to_owned)
            .into();
    for sub in
        ["null", "{}", "[]", "7", "true", "\"\"", "\"x\"", r#""\u0000""#, r#""\ud800""#, r#""\u00e9""#, "1e999999"]
    {
        claims.push(format!(r#"{{"sub":{sub}}}"#));
    }
    claims.extend([
        owner.to_string(),
        format!(r#""{owner}""#),
        format!(r#"["{owner}"]"#),
        format!(r#"[{{"sub":"{owner}"}}]"#),
        format!(r#"{{"sub":["{owner}"]}}"#),
        format!(r#"{{"sub":{{"sub":"{owner}"}}}}"#),
        format!(r#"{{"Sub":"{owner}","SUB":"{owner}"}}"#),
        format!(r#"{{"sub":"{owner} "}}"#),
        format!(r#"{{"sub":"{owner}\u0000"}}"#),
        format!(r#"{{"sub":"{owner}","sub":"x"}}"#),
        format!(r#"{{"sub":"{owner}","exp":1e999999}}"#),
        format!(r#"{{"sub":"{owner}'::uuid OR true --"}}"#),
        format!("{{'sub':'{owner}'}}"),
        format!(r#"{{"sub":"{owner}"}} trailing"#),
        // Deeper than the stack, and longer than any token.
        "[".repeat(200_000),
        format!("{}1{}", r#"{"sub":"#.repeat(100_000), "}".repeat(100_000)),
        format!(r#"{{"sub":"{}"}}"#, "a".repeat(3_000_000)),
    ]);
    claims
}

async fn nonsense_shows_nothing(mut world: World, settings: &[&'static str]) {
    let viewer = Actor::person("viewer of A", VIEWER_A);
    for setting in settings {
        // Alone in this older setting of Supabase's, a UUID is good.
        let good = |claims: &String| *setting == "request.jwt.claim.sub" && *claims == OWNER_A.to_string();
        for claims in nonsense().into_iter().filter(|claims| !good(claims)) {
            let actor = Actor::of("authenticated", &format!("{setting} = {}", shown(&claims))).with(setting, &claims);
            reaches_nothing(&mut world, &actor).await;
        }
        sees_a(&mut world, &viewer).await;
    }
    let garbage = [
        "",
        " ",
        "*",
        "null",
        "a",
        &format!("{A}{B}"),
        &format!("{A},{B}"),
        &format!(" {A}"),
        &format!("{A}\n"),
        &format!("{{{A}}}"),
        &A.simple().to_string(),
        &format!("urn:uuid:{A}"),
        &format!("{A}' OR true --"),
        &"a0".repeat(1_000_000),
    ]
    .map(str::to_owned);
    for site in &garbage {
        let actor = Actor::of("opsmantik_tenant", shown(site)).with("opsmantik.site_id", site);
        reaches_nothing(&mut world, &actor).await;
    }
    sees_a(&mut world, &Actor::of("opsmantik_tenant", "of A").with("opsmantik.site_id", &A.to_string())).await;
}

#[tokio::test]
async fn claims_that_make_no_sense_show_nothing_and_raise_nothing() {
    nonsense_shows_nothing(World::vanilla().await, &["request.jwt.claims"]).await;
}

#[tokio::test]
async fn where_auth_uid_raises_they_show_nothing_and_raise_nothing() {
    let mut world = World::like_supabase("claims_like_supabase").await;
    // Its own function does raise: what is shown here is that ours does not hand it on.
    let tx = world.database.admin.transaction().await.expect("a transaction");
    tx.batch_execute("SET LOCAL request.jwt.claims = 'sub'; SET LOCAL ROLE authenticated").await.expect("set");
    assert!(tx.execute("SELECT auth.uid()", &[]).await.is_err());
    tx.rollback().await.expect("nothing stays");
    nonsense_shows_nothing(world, &["request.jwt.claims", "request.jwt.claim.sub"]).await;
}

#[tokio::test]
async fn whatever_a_host_made_of_auth_uid_a_query_does_not_fail_by_it() {
    let mut world = World::vanilla().await;
    let owner = Actor::person("owner of A", OWNER_A);
    sees_a(&mut world, &owner).await;
    for body in [
        "BEGIN RAISE EXCEPTION 'no'; END",
        "BEGIN RAISE insufficient_privilege; END",
        "BEGIN PERFORM * FROM there_is_no_such_table; RETURN NULL; END",
        "BEGIN RETURN (1 / 0)::text; END",
        "BEGIN RETURN auth.uid(); END",
    ] {
        let made = format!("CREATE OR REPLACE FUNCTION auth.uid() RETURNS uuid LANGUAGE plpgsql AS $$ {body} $$");
        world.database.admin.batch_execute(&made).await.expect("a function");
        assert!(world.database.admin.execute("SELECT auth.uid()", &[]).await.is_err(), "{body}");
        reaches_nothing(&mut world, &owner).await;
    }
}
