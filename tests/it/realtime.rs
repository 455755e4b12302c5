//! Supabase Realtime beside us: each leaf is published by its own name, tells old rows whole, and answers Realtime's own question for each
//! subscriber as it should.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use opsmantik::domain::id::SiteId;
use opsmantik::domain::month::Month;
use opsmantik::store::Store;
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::cluster::cluster;
use crate::support::database::{Database, database, empty};

const PUBLISHED: &str = "SELECT coalesce(jsonb_agg(tablename::text ORDER BY tablename), '[]') \
    FROM pg_publication_tables WHERE pubname = 'supabase_realtime'";
/// The leaves that are attached, and calls.
const EXPECTED: &str = "SELECT jsonb_agg(name ORDER BY name) FROM (SELECT c.relname::text FROM pg_inherits i \
    JOIN pg_class c ON c.oid = i.inhrelid WHERE c.relkind = 'r' AND NOT i.inhdetachpending UNION ALL SELECT 'calls') AS t (name)";

async fn value(client: &Client, query: &str) -> Value {
    client.query_one(query, &[]).await.expect("the test's own query").get(0)
}

async fn faults(store: &Store) -> Vec<String> {
    store.readiness(Month::of(chrono::Utc::now()), 3).await.expect("it answers").faults
}

fn month(text: &str) -> Month {
    text.parse().expect("a test's own month")
}

#[tokio::test]
async fn the_publication_lists_the_leaves_that_there_are_and_no_others() {
    let database = database().await;
    let admin = &database.admin;
    assert_eq!(value(admin, PUBLISHED).await, value(admin, EXPECTED).await);
    database.ensure_month("2026-03-01").await;
    let published = value(admin, PUBLISHED).await;
    assert_eq!(published, value(admin, EXPECTED).await);
    assert!(published.to_string().contains("events_2026_03"), "{published}");

    admin
        .batch_execute("ALTER PUBLICATION supabase_realtime DROP TABLE events_2026_03, calls")
        .await
        .expect("taken out");
    let told = faults(&database.store).await;
    let said = "is not in the publication supabase_realtime";
    assert_eq!(told, [format!("calls: {said}"), format!("events_2026_03: {said}")]);
    database.ensure_month("2026-03-01").await;
    assert_eq!((faults(&database.store).await, value(admin, PUBLISHED).await), (vec![], published));

    admin.batch_execute("ALTER TABLE events DETACH PARTITION events_2026_03").await.expect("detached by hand");
    database.ensure_month("2026-04-01").await;
    let after = value(admin, PUBLISHED).await;
    assert!(!after.to_string().contains("events_2026_03") && after.to_string().contains("events_2026_04"), "{after}");
    assert_eq!(after, value(admin, EXPECTED).await);
    database.ensure_month("2026-03-01").await;
    assert_eq!(value(admin, PUBLISHED).await, value(admin, EXPECTED).await, "attached again, published again");
}

/// A database whose owner is no superuser, and what was there before we came.
async fn prepared(name: &str, before: &str) -> (Store, Client) {
    // The roles are the cluster's: made by the template's migration.
    let _roles_exist = database().await;
    let admin = empty(name).await;
    admin
        .batch_execute(&format!(
            "DO $$ BEGIN CREATE ROLE owner_of_{name} LOGIN PASSWORD 'owner'; END $$;
             GRANT anon, authenticated, service_role, opsmantik_service, opsmantik_operator, opsmantik_tenant TO owner_of_{name};
             GRANT ALL ON SCHEMA public TO owner_of_{name};
             GRANT CREATE ON DATABASE {name} TO owner_of_{name};
             {before}"
        ))
        .await
        .expect("prepared");
    let url = cluster().await.url(name);
    let (_, place) = url.split_once('@').expect("user@host");
    (Store::new(&format!("postgres://owner_of_{name}:owner@{place}"), 4).await.expect("a URL"), admin)
}

#[tokio::test]
async fn a_publication_that_is_there_is_joined_where_we_may_and_left_alone_where_we_may_not() {
    let ours = "ALTER PUBLICATION supabase_realtime OWNER TO";
    for (name, before, joins) in [
        ("without", String::new(), true),
        (
            "joined",
            format!(
                "CREATE TABLE theirs (id int PRIMARY KEY); ALTER TABLE theirs OWNER TO owner_of_joined;
                 CREATE PUBLICATION supabase_realtime FOR TABLE theirs; {ours} owner_of_joined"
            ),
            true,
        ),
        ("strangers", "CREATE PUBLICATION supabase_realtime".to_owned(), false),
        (
            "via_root",
            format!(
                "CREATE PUBLICATION supabase_realtime WITH (publish_via_partition_root = true); {ours} owner_of_via_root"
            ),
            false,
        ),
    ] {
        let (store, admin) = prepared(name, &before).await;
        store.migrate().await.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        store.ensure_month(month("2026-03-01")).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(faults(&store).await, Vec::<String>::new(), "{name}: nothing that could be mended");
        let mut published: BTreeSet<String> = serde_json::from_value(value(&admin, PUBLISHED).await).expect("names");
        let expected: BTreeSet<String> = serde_json::from_value(value(&admin, EXPECTED).await).expect("names");
        if name == "joined" {
            assert!(published.remove("theirs"), "what was in it stays in it");
        }
        assert_eq!(published, if joins { expected } else { BTreeSet::new() }, "{name}");
    }
    let (store, admin) = prepared("everything", "CREATE PUBLICATION supabase_realtime FOR ALL TABLES").await;
    store.migrate().await.expect("it needs nothing of us");
    assert_eq!(faults(&store).await, Vec::<String>::new());
    assert!(value(&admin, PUBLISHED).await.to_string().contains("sessions_2"));
}

/// A value of a tuple of pgoutput.
#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Null,
    /// Stored apart and not changed: not told.
    Unchanged,
    Text(String),
}

type Row = BTreeMap<String, Cell>;

/// What pgoutput tells of rows.
#[derive(Debug, Default)]
struct Told {
    relations: HashMap<u32, (String, Vec<String>)>,
    /// Kind (`I`, `U`, `D`), table, old row, new row.
    rows: Vec<(char, String, Row, Row)>,
}

/// Reads a message from its front.
struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn take(&mut self, bytes: usize) -> &[u8] {
        let (front, rest) = self.0.split_at(bytes);
        self.0 = rest;
        front
    }

    fn number<const N: usize>(&mut self) -> usize {
        self.take(N).iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    fn name(&mut self) -> String {
        let end = self.0.iter().position(|byte| *byte == 0).expect("it ends");
        let name = String::from_utf8_lossy(self.take(end)).into_owned();
        self.take(1);
        name
    }

    fn cells(&mut self, columns: &[String]) -> Row {
        assert_eq!(self.number::<2>(), columns.len(), "a row of all columns");
        let mut row = BTreeMap::new();
        for column in columns {
            let cell = match self.number::<1>() as u8 {
                b'n' => Cell::Null,
                b'u' => Cell::Unchanged,
                b't' => {
                    let bytes = self.number::<4>();
                    Cell::Text(String::from_utf8_lossy(self.take(bytes)).into_owned())
                }
                other => panic!("a value of kind {other}"),
            };
            row.insert(column.clone(), cell);
        }
        row
    }
}

impl Told {
    fn hear(&mut self, message: &[u8]) {
        let mut reader = Reader(message);
        let kind = reader.number::<1>() as u8;
        match kind {
            b'R' => {
                let id = reader.number::<4>() as u32;
                let (_, name) = (reader.name(), reader.name());
                assert_eq!(reader.take(1), b"f", "{name}: its identity is FULL");
                let columns = (0..reader.number::<2>())
                    .map(|_| {
                        reader.take(1);
                        let column = reader.name();
                        reader.take(8);
                        column
                    })
                    .collect();
                self.relations.insert(id, (name, columns));
            }
            b'I' | b'U' | b'D' => {
                let (name, columns) = self.relations[&(reader.number::<4>() as u32)].clone();
                let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
                while !reader.0.is_empty() {
                    match reader.number::<1>() as u8 {
                        b'O' => old = reader.cells(&columns),
                        b'N' => new = reader.cells(&columns),
                        other => panic!("part {other}: with identity FULL there are old and new rows only"),
                    }
                }
                self.rows.push((kind as char, name, old, new));
            }
            _ => {}
        }
    }
}

/// The row as PostgreSQL writes its values in text.
async fn row_as_text(admin: &Client, table: &str) -> Row {
    let columns = admin
        .query(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped",
            &[&table],
        )
        .await
        .expect("the catalog");
    let mut row = BTreeMap::new();
    for column in columns {
        let column: String = column.get(0);
        let text: Option<String> =
            admin.query_one(&format!("SELECT {column}::text FROM {table}"), &[]).await.expect("one row").get(0);
        row.insert(column, text.map_or(Cell::Null, Cell::Text));
    }
    row
}

#[tokio::test]
async fn old_rows_of_updates_and_deletes_are_complete_in_a_leaf_that_the_keeper_made() {
    let database = database().await;
    let site = database.site("shop").await.id;
    database.ensure_month("2026-03-01").await;
    let admin = &database.admin;
    let slot = format!("realtime_{}", database.name);
    admin
        .execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&slot])
        .await
        .expect("wal_level is logical");
    // The log is decoded as far as it is flushed.
    admin.batch_execute("SET synchronous_commit = on").await.expect("set");
    // Random, so that it is not compressed into the row: it is stored apart.
    let large = "(SELECT jsonb_build_object('k', string_agg(md5(random()::text), '')) FROM generate_series(1, 1000))";
    admin.batch_execute(&session_and_event(site, 1, large)).await.expect("stored");
    let apart = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE relname = 'events_2026_03'";
    assert!(database.count(apart).await > 20_000, "the large value is stored apart");
    let tables = ["sessions_2026_03", "events_2026_03"];
    let before = [row_as_text(admin, tables[0]).await, row_as_text(admin, tables[1]).await];
    admin.batch_execute("UPDATE sessions SET city = 'Izmir'; UPDATE events SET url = '/moved'").await.expect("changed");
    let after = [row_as_text(admin, tables[0]).await, row_as_text(admin, tables[1]).await];
    admin.batch_execute("DELETE FROM events; DELETE FROM sessions").await.expect("deleted");

    let changes = admin
        .query(
            "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1', \
             'publication_names', 'supabase_realtime')",
            &[&slot],
        )
        .await
        .expect("decoded");
    admin.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await.expect("dropped");
    let mut told = Told::default();
    changes.iter().for_each(|change| told.hear(change.get(0)));
    let heard: Vec<(char, &str)> = told.rows.iter().map(|(kind, table, ..)| (*kind, table.as_str())).collect();
    let [sessions, events] = tables;
    assert_eq!(
        heard,
        [('I', sessions), ('I', events), ('U', sessions), ('U', events), ('D', events), ('D', sessions)],
        "by the names of the leaves"
    );
    for (kind, table, old, new) in &told.rows {
        let which = usize::from(table == events);
        let expected = match kind {
            'I' => &BTreeMap::new(),
            'U' => &before[which],
            _ => &after[which],
        };
        assert!(old == expected, "{kind} {table}: the old row is not whole");
        if *kind == 'U' {
            assert!(new.values().all(|cell| *cell != Cell::Unchanged || *table == events));
            assert_eq!(new.len(), after[which].len());
        }
    }
}

fn session_and_event(site: SiteId, n: u128, metadata: &str) -> String {
    let id = Uuid::from_u128(n);
    format!(
        "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, traffic_source, \
             traffic_medium, lead_score, fingerprint) VALUES ('{site}', '2026-03-01', '{id}', '2026-03-02', '2026-03-02', 1, '/', \
             'Organic/Referral', 'Direct', 'direct', 0, 'F');
         INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score, \
             metadata) VALUES ('{site}', '2026-03-01', '{id}', '{id}', '2026-03-02', '2026-03-02', '/', 'interaction', 'view', 10, {metadata})"
    )
}

/// What Realtime does for each change of a leaf and each subscriber (`realtime.apply_rls`): is every column of the key readable to the
/// role; and does a statement that was prepared before, run as the role with the subscriber's claims, find the row by its key?
async fn realtime_shows(
    database: &mut Database,
    leaf: &str,
    role: &str,
    claims: &Value,
    key: &[(&str, String)],
) -> bool {
    let tx = database.admin.transaction().await.expect("a transaction");
    for (column, _) in key {
        let readable = "SELECT has_column_privilege($1::text, $2::text::regclass, $3::text, 'SELECT')";
        if !tx.query_one(readable, &[&role, &leaf, column]).await.expect("the catalog").get::<_, bool>(0) {
            return false;
        }
    }
    let found: Vec<String> = key.iter().map(|(column, value)| format!("{column} = {value}")).collect();
    let prepare =
        format!("PREPARE walrus_rls_stmt AS SELECT EXISTS (SELECT 1 FROM {leaf} WHERE {})", found.join(" AND "));
    tx.batch_execute(&prepare).await.expect("prepared");
    tx.query_one(
        "SELECT set_config('role', $1, true), set_config('request.jwt.claims', $2, true)",
        &[&role, &claims.to_string()],
    )
    .await
    .expect("the superuser may be anybody");
    let shown = match &tx.simple_query("EXECUTE walrus_rls_stmt").await.expect("a policy does not raise")[..] {
        [tokio_postgres::SimpleQueryMessage::RowDescription(_), tokio_postgres::SimpleQueryMessage::Row(row), ..] => {
            row.get(0) == Some("t")
        }
        other => panic!("{other:?}"),
    };
    tx.rollback().await.expect("nothing stays");
    database.admin.batch_execute("DEALLOCATE walrus_rls_stmt").await.expect("it was prepared");
    shown
}

#[tokio::test]
async fn realtimes_own_check_shows_a_row_to_its_owner_and_to_nobody_else() {
    let mut database = database().await;
    let site = database.site("shop").await.id;
    let (owner, neighbour) = (Uuid::from_u128(0xA), Uuid::from_u128(0xC));
    database.admin.execute("UPDATE sites SET user_id = $1", &[&owner]).await.expect("owned");
    let other = database.site("neighbour").await.id;
    let theirs = "UPDATE sites SET user_id = $1 WHERE id = $2";
    database.admin.execute(theirs, &[&neighbour, &other.as_uuid()]).await.expect("owned");
    // Made after everything else was.
    database.ensure_month("2026-03-01").await;
    database.admin.batch_execute(&session_and_event(site, 1, "'{}'")).await.expect("stored");
    let push = "INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, started_at) \
        SELECT $1, $2, 'p', '1', 'PHONE', 'INBOUND', '+12025550123', now()";
    database.admin.execute(push, &[&Uuid::from_u128(1), &site.as_uuid()]).await.expect("stored");

    let (site, id) = (format!("'{site}'::uuid"), format!("'{}'::uuid", Uuid::from_u128(1)));
    let month = "'2026-03-01'::date".to_owned();
    let signed_in = |user: &str| json!({"sub": user, "role": "authenticated", "aud": "authenticated"});
    for (leaf, key) in [
        ("sessions_2026_03", vec![("site_id", site.clone()), ("created_month", month.clone()), ("id", id.clone())]),
        ("events_2026_03", vec![("site_id", site.clone()), ("session_month", month.clone()), ("id", id.clone())]),
        ("calls", vec![("id", id.clone())]),
    ] {
        for (role, claims, sees) in [
            ("authenticated", signed_in(&owner.to_string()), true),
            ("authenticated", signed_in(&neighbour.to_string()), false),
            ("authenticated", signed_in("not a uuid"), false),
            ("authenticated", json!({}), false),
            ("anon", json!({"role": "anon"}), false),
        ] {
            let shown = realtime_shows(&mut database, leaf, role, &claims, &key).await;
            assert_eq!(shown, sees, "{leaf} to {role} {claims}");
        }
    }
}
