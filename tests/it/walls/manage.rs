//! What owners do by hand, and what others try in order to become one.

use super::world::{A, Actor, B, EDITOR_A, MEMBER_OWNER_A, OWNER_A, STRANGER, VIEWER_A, World};
use crate::support::database::Database;

const REFUSED: Result<u64, &str> = Err("42501");
const UNFIT: Result<u64, &str> = Err("23514");

/// Plays steps in one transaction that is taken back: who does what, and how many rows it reaches or which error it meets.
async fn play(database: &mut Database, steps: &[(&Actor, String, Result<u64, &str>)]) {
    let tx = database.admin.transaction().await.expect("a transaction");
    for (actor, sql, expected) in steps {
        let opening = format!("SET LOCAL ROLE NONE; {}; SAVEPOINT step", actor.opening());
        tx.batch_execute(&opening).await.expect("the superuser may be anybody");
        let done = tx.execute(sql, &[]).await;
        let done = done.map_err(|error| error.code().map(|code| code.code().to_owned()).unwrap_or_default());
        assert_eq!(
            done.as_ref().map_err(String::as_str),
            expected.as_ref().map_err(|code| *code),
            "{}: {sql}",
            actor.name
        );
        if done.is_err() {
            tx.batch_execute("ROLLBACK TO step").await.expect("on to the next");
        }
    }
    tx.rollback().await.expect("nothing stays");
}

fn owner() -> Actor {
    Actor::person("owner of A", OWNER_A)
}

fn member_owner() -> Actor {
    Actor::person("member owner of A", MEMBER_OWNER_A)
}

fn add(site: uuid::Uuid, person: uuid::Uuid, role: &str) -> String {
    format!("INSERT INTO site_members (site_id, user_id, role) VALUES ('{site}', '{person}', '{role}')")
}

#[tokio::test]
async fn nobody_makes_themself_an_owner() {
    let mut database = World::vanilla().await.database;
    let nowhere = uuid::Uuid::from_u128(0xDEAD);
    for (person, id) in
        [("editor of A", EDITOR_A), ("viewer of A", VIEWER_A), ("stranger", STRANGER), ("nobody", nowhere)]
    {
        let actor = Actor::person(person, id);
        let or_else = format!("{} ON CONFLICT (site_id, user_id) DO UPDATE SET role = 'owner'", add(A, id, "owner"));
        let merge = format!(
            "MERGE INTO site_members m USING (SELECT '{A}'::uuid AS site_id, '{id}'::uuid AS user_id) n \
             ON m.site_id = n.site_id AND m.user_id = n.user_id \
             WHEN MATCHED THEN UPDATE SET role = 'owner' WHEN NOT MATCHED THEN INSERT (site_id, user_id, role) VALUES (n.site_id, n.user_id, 'owner')"
        );
        play(
            &mut database,
            &[
                (&actor, "UPDATE site_members SET role = 'owner'".to_owned(), Ok(0)),
                (&actor, "UPDATE sites SET name = 'mine'".to_owned(), Ok(0)),
                (&actor, "UPDATE sites SET user_id = (SELECT auth.uid())".to_owned(), REFUSED),
                (&actor, add(A, id, "owner"), REFUSED),
                (&actor, add(A, nowhere, "owner"), REFUSED),
                (&actor, add(B, id, "viewer"), REFUSED),
                // Whether a site exists is told by no difference.
                (&actor, add(nowhere, id, "viewer"), REFUSED),
                (&actor, format!("{} ON CONFLICT DO NOTHING", add(A, id, "owner")), REFUSED),
                (&actor, or_else, REFUSED),
                (&actor, merge, REFUSED),
                (&actor, "DELETE FROM site_members".to_owned(), Ok(0)),
                (
                    &actor,
                    "INSERT INTO sites (public_id, name, domain) VALUES ('x', 'x', 'x.example')".to_owned(),
                    REFUSED,
                ),
            ],
        )
        .await;
    }
}

#[tokio::test]
async fn an_owner_manages_the_members_of_their_site_and_of_no_other() {
    let mut database = World::vanilla().await.database;
    for actor in [&owner(), &member_owner()] {
        let or_else =
            |set: &str| format!("{} ON CONFLICT (site_id, user_id) DO UPDATE SET {set}", add(A, VIEWER_A, "editor"));
        let person = |sql: &str, id| format!("{sql} WHERE user_id = '{id}'");
        play(
            &mut database,
            &[
                (actor, add(A, STRANGER, "viewer"), Ok(1)),
                (actor, or_else("role = excluded.role"), Ok(1)),
                (actor, or_else(&format!("site_id = '{B}'")), REFUSED),
                (actor, or_else(&format!("user_id = '{STRANGER}'")), REFUSED),
                (actor, person("UPDATE site_members SET role = 'owner'", VIEWER_A), Ok(1)),
                (actor, person("UPDATE site_members SET role = 'king'", VIEWER_A), UNFIT),
                (actor, person("DELETE FROM site_members", STRANGER), Ok(1)),
                (actor, add(B, OWNER_A, "owner"), REFUSED),
                (actor, format!("INSERT INTO site_members (site_id, user_id, role, created_at) VALUES ('{A}', '{STRANGER}', 'viewer', now())"), REFUSED),
                (actor, format!("INSERT INTO site_members (site_id, user_id, role) SELECT id, '{STRANGER}', 'owner' FROM sites"), Ok(1)),
                (actor, format!("DELETE FROM site_members WHERE site_id = '{B}'"), Ok(0)),
            ],
        )
        .await;
    }
}

#[tokio::test]
async fn a_sites_own_owner_is_not_locked_out_and_a_member_who_is_sent_away_is() {
    let mut database = World::vanilla().await.database;
    let (own, other) = (owner(), member_owner());
    let rename = || "UPDATE sites SET name = 'renamed'".to_owned();
    play(
        &mut database,
        &[
            // A row that makes the owner less than an owner takes nothing from them; nor does taking it away.
            (&other, add(A, OWNER_A, "viewer"), Ok(1)),
            (&own, rename(), Ok(1)),
            (&other, format!("DELETE FROM site_members WHERE user_id = '{OWNER_A}'"), Ok(1)),
            (&own, rename(), Ok(1)),
            (&other, "UPDATE sites SET user_id = NULL".to_owned(), REFUSED),
            (&other, format!("UPDATE sites SET user_id = '{MEMBER_OWNER_A}'"), REFUSED),
            // Everybody is sent away, the one who does it among them.
            (&other, "DELETE FROM site_members".to_owned(), Ok(4)),
            (&other, rename(), Ok(0)),
            (&other, "SELECT * FROM sites".to_owned(), Ok(0)),
            (&own, add(A, MEMBER_OWNER_A, "editor"), Ok(1)),
            (&other, rename(), Ok(0)),
            (&other, "UPDATE calls SET review = 'CONFIRMED'".to_owned(), Ok(2)),
            (&own, "UPDATE site_members SET role = 'viewer'".to_owned(), Ok(1)),
            (&other, "UPDATE calls SET review = 'JUNK'".to_owned(), Ok(0)),
            (&other, "SELECT * FROM calls".to_owned(), Ok(2)),
        ],
    )
    .await;
}

#[tokio::test]
async fn who_reviews_signs_with_their_own_name_or_not_at_all() {
    let mut database = World::vanilla().await.database;
    let editor = Actor::person("editor of A", EDITOR_A);
    let signed =
        |by: &str| format!("UPDATE calls SET review = 'CONFIRMED', reviewed_by = {by} WHERE provider_call_id = '1'");
    play(
        &mut database,
        &[
            (&editor, signed(&format!("'user:{OWNER_A}'")), REFUSED),
            (&editor, signed("'token:00000000-0000-0000-0000-000000000001'"), REFUSED),
            (&editor, signed(&format!("'user:{EDITOR_A}'")), Ok(1)),
            (&owner(), "UPDATE calls SET review = 'JUNK' WHERE provider_call_id = '1'".to_owned(), REFUSED),
            (&owner(), signed("NULL"), Ok(1)),
            (&editor, format!("UPDATE calls SET site_id = '{B}'"), REFUSED),
            (&editor, "UPDATE calls SET recording_ref = 'https://elsewhere.example'".to_owned(), REFUSED),
            (
                &editor,
                "UPDATE calls SET sale_amount = 1, sale_currency = 'TRY', review = 'CONFIRMED' RETURNING *".to_owned(),
                Ok(2),
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_site_is_held_to_what_the_doors_understand() {
    let mut database = World::vanilla().await.database;
    let owner = owner();
    let long = "a".repeat(201);
    let far = format!("{}.example", "a".repeat(250));
    let many: Vec<String> = (0..101).map(|n| format!("https://a{n}.example")).collect();
    let mut steps = Vec::new();
    for (column, value, outcome) in [
        ("name", "A locksmith & sons, İstanbul", Ok(1)),
        ("name", "", UNFIT),
        ("name", " ", UNFIT),
        ("name", &long, UNFIT),
        ("domain", "shop.example.com", Ok(1)),
        ("domain", "xn--bcher-kva.example", Ok(1)),
        ("domain", "192.0.2.7", Ok(1)),
        ("domain", "[2001:db8::1]", Ok(1)),
        ("domain", "localhost", Ok(1)),
        ("domain", "com", UNFIT),
        ("domain", "", UNFIT),
        ("domain", "*.example.com", UNFIT),
        ("domain", "Example.com", UNFIT),
        ("domain", "example.com:8443", UNFIT),
        ("domain", "example.com/", UNFIT),
        ("domain", "https://example.com", UNFIT),
        ("domain", "a@example.com", UNFIT),
        ("domain", "example .com", UNFIT),
        ("domain", "example.com\nexample.net", UNFIT),
        ("domain", ".example.com", UNFIT),
        ("domain", "example.com.", UNFIT),
        ("domain", &far, UNFIT),
        ("origins", "{}", Ok(1)),
        ("origins", "{*}", Ok(1)),
        ("origins", "{https://shop.example.net,http://127.0.0.1:8090,\"http://[::1]:90\"}", Ok(1)),
        ("origins", "{NULL}", UNFIT),
        ("origins", "{\"\"}", UNFIT),
        ("origins", "{shop.example.net}", UNFIT),
        ("origins", "{https://Shop.example.net}", UNFIT),
        ("origins", "{https://shop.example.net/}", UNFIT),
        ("origins", "{https://*.example.net}", UNFIT),
        ("origins", "{https://a@shop.example.net}", UNFIT),
        ("origins", "{ftp://shop.example.net}", UNFIT),
        ("origins", "{\"https://a.example https://b.example\"}", UNFIT),
        ("origins", &format!("{{{}}}", many.join(",")), UNFIT),
        ("region", "TR", Ok(1)),
        ("region", "tr", UNFIT),
        ("region", "TUR", UNFIT),
    ] {
        steps.push((&owner, format!("UPDATE sites SET {column} = '{value}'"), outcome));
    }
    play(&mut database, &steps).await;
}

#[tokio::test]
async fn what_an_owner_changes_is_what_the_doors_go_by() {
    let database = World::vanilla().await.database;
    let change = "BEGIN; SET LOCAL ROLE authenticated; SET LOCAL request.jwt.claims = '{\"sub\":\"$OWNER\"}'; \
        UPDATE sites SET domain = 'moved.example', origins = '{https://shop.example.net}', region = 'TR'; COMMIT";
    database.admin.batch_execute(&change.replace("$OWNER", &OWNER_A.to_string())).await.expect("an owner manages");
    let site = database.store.find_site("a", None).await.expect("the database answers").expect("it is there");
    assert_eq!((site.domain.as_str(), site.region.as_deref()), ("moved.example", Some("TR")));
    for (origin, allowed) in
        [("https://www.moved.example", true), ("https://shop.example.net", true), ("https://a.example", false)]
    {
        let origin = opsmantik::domain::origin::Origin::parse(origin).expect("an origin");
        assert_eq!(opsmantik::domain::origin::allows(&site.domain, &site.origins, &origin), allowed, "{origin:?}");
        assert_eq!(database.store.any_site_allows(&origin).await.expect("the database answers"), allowed, "{origin:?}");
    }
    let untouched = database.rows("SELECT domain FROM sites WHERE public_id = 'b'").await;
    assert_eq!(untouched[0]["domain"], "b.example");
}
