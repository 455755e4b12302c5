//! The wall between tenants is the database's: a statement that forgets its WHERE, or names the neighbour in it, shows a reader nothing of
//! the neighbour's. Asked of the bare tables and of every statement of the program, those that will be written included.

use chrono::Datelike;
use opsmantik::domain::id::{SiteId, UserId};
use opsmantik::store::statement::STATEMENTS;
use opsmantik::store::transaction::{Purpose, Reader};
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use crate::statements::sample;
use crate::support::database::{Database, database};

const TABLES: [&str; 4] = ["public.sites", "public.sessions", "public.events", "public.calls"];
const OWNER: UserId = UserId::from_uuid(Uuid::from_u128(0xA));
const VIEWER: UserId = UserId::from_uuid(Uuid::from_u128(0xB));
const NEIGHBOUR: UserId = UserId::from_uuid(Uuid::from_u128(0xC));

/// The statement without its look at the site: `site_id = $1`, `s.site_id = $1`, `site_id = ANY ($1)` become `site_id IS NOT NULL`, which it always is.
fn without_site(sql: &str) -> String {
    let mut text = sql.to_owned();
    for column in ["site_id", "public_id", "id"] {
        for (operator, close) in [(" = $", ""), (" = ANY ($", ")")] {
            let front = format!("{column}{operator}");
            let mut from = 0;
            while let Some(at) = text[from..].find(&front).map(|at| at + from) {
                from = at + column.len();
                let part_of_another_name =
                    text[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_');
                let digits = text[at + front.len()..].bytes().take_while(u8::is_ascii_digit).count();
                let end = at + front.len() + digits;
                if !part_of_another_name && text[end..].starts_with(close) {
                    text.replace_range(from..end + close.len(), " IS NOT NULL");
                }
            }
        }
    }
    text
}

/// Everything that `sql` shows, as text a row, sorted; or nothing, if the reader may not run it at all.
async fn shown(
    database: &mut Database,
    reader: Option<Reader>,
    sql: &str,
    params: &[(&(dyn ToSql + Sync), Type)],
) -> Vec<String> {
    let tx = database.admin.transaction().await.expect("a transaction");
    if let Some(reader) = reader {
        // The words of a reader's transaction, within this one.
        let opening = Purpose::Read(reader).opening();
        let (begin, opening) = opening.split_once(';').expect("it begins, and then takes a role");
        assert!(begin.ends_with("READ ONLY"), "a reader only reads: {begin}");
        tx.batch_execute(&format!("SET TRANSACTION READ ONLY;{opening}")).await.expect("the superuser may be anybody");
    }
    let rows = tx.query_typed(&format!("SELECT to_jsonb(r)::text FROM ({sql}) AS r"), params).await;
    let mut rows: Vec<String> = match rows {
        Ok(rows) => rows.iter().map(|row| row.get(0)).collect(),
        Err(error) => {
            let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
            // Not granted, or not while reading only.
            assert!(reader.is_some() && ["42501", "25006"].contains(&code.as_str()), "{error:?}\n{sql}");
            Vec::new()
        }
    };
    tx.rollback().await.expect("nothing stays");
    rows.sort();
    rows
}

/// One site's rows in every table and in the months that the samples address, marked with its name.
async fn fill(database: &Database, site: SiteId, mark: &str) {
    let id = site.as_uuid();
    for year in [2025, 2026] {
        for month in 1..=12 {
            let day = chrono::NaiveDate::from_ymd_opt(year, month, 1).expect("a day");
            let session = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, \
                attribution, traffic_source, traffic_medium, lead_score, fingerprint, gclid) \
                VALUES ($1, $2::date, $3, $2::date, $2::date, 1, $4, 'Direct-to-Ads', 'Direct', 'direct', 0, 'Direct-to-Ads', $4)";
            let event = "INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, \
                event_action, event_label, lead_score) VALUES ($1, $2::date, $3, $3, $2::date, $2::date, $4, 'conversion', 'phone_call', 'Direct-to-Ads', 0)";
            for statement in [session, event] {
                let params: [&(dyn ToSql + Sync); 4] = [&id, &day, &id, &mark];
                database.admin.execute(statement, &params).await.unwrap_or_else(|error| panic!("{day}: {error:?}"));
            }
            let call = "INSERT INTO calls (site_id, provider, provider_call_id, channel, direction, dialled_number, started_at, \
                recording_ref, fingerprint) VALUES ($1, 'Direct-to-Ads', $2, 'PHONE', 'INBOUND', '+12025550123', $3, $4, 'Direct-to-Ads')";
            let at = day.and_hms_opt(1, 0, 0).expect("an hour").and_utc();
            let call_id = format!("{}-{}", day.year(), day.month());
            database.admin.execute(call, &[&id, &call_id, &at, &mark]).await.expect("a call");
        }
    }
}

#[tokio::test]
async fn a_statement_without_its_where_shows_nothing_of_the_neighbour() {
    let mut database = database().await;
    for year in [2025, 2026] {
        for month in 1..=12 {
            database.ensure_month(&format!("{year}-{month:02}-01")).await;
        }
    }
    let (mine, theirs) = (database.site("mine").await.id, database.site("theirs").await.id);
    let own = "UPDATE sites SET user_id = $1 WHERE id = $2";
    for (user, site) in [(OWNER, mine), (NEIGHBOUR, theirs)] {
        database.admin.execute(own, &[&user.as_uuid(), &site.as_uuid()]).await.expect("an owner");
    }
    let member = "INSERT INTO site_members (site_id, user_id, role) VALUES ($1, $2, 'viewer')";
    database.admin.execute(member, &[&mine.as_uuid(), &VIEWER.as_uuid()]).await.expect("a member");
    fill(&database, mine, "MY-OWN").await;
    fill(&database, theirs, "NEIGHBOUR").await;
    let nobody = UserId::from_uuid(Uuid::from_u128(0xD));
    let is_theirs =
        |row: &String| row.contains("NEIGHBOUR") || row.contains(&theirs.to_string()) || row.contains("\"theirs\"");
    let is_mine = |row: &String| row.contains("MY-OWN") || row.contains(&mine.to_string()) || row.contains("\"mine\"");

    for table in TABLES {
        let all = format!("SELECT * FROM {table}");
        let everything = shown(&mut database, None, &all, &[]).await;
        assert!(
            everything.iter().any(is_theirs) && everything.iter().any(is_mine),
            "{table}: the test shows something"
        );
        let expected: Vec<String> = everything.into_iter().filter(is_mine).collect();
        for reader in [Reader::Site(mine), Reader::User(OWNER), Reader::User(VIEWER)] {
            assert_eq!(shown(&mut database, Some(reader), &all, &[]).await, expected, "{table} as {reader:?}");
        }
        for reader in [Reader::User(nobody), Reader::Site(SiteId::from_uuid(Uuid::nil()))] {
            assert_eq!(
                shown(&mut database, Some(reader), &all, &[]).await,
                Vec::<String>::new(),
                "{table} as {reader:?}"
            );
        }
    }

    let mut seen_by_the_superuser = 0;
    let mut seen_by_readers = 0;
    for statement in STATEMENTS {
        let sql = (statement.sql)();
        let reads = ["SELECT", "WITH"].iter().any(|verb| sql.trim_start().starts_with(verb))
            && !["FOR UPDATE", "INSERT INTO", "UPDATE public", "DELETE FROM", "SELECT opsmantik.", "FROM opsmantik."]
                .iter()
                .any(|verb| sql.contains(verb))
            && TABLES.iter().any(|table| sql.contains(table));
        if !reads {
            continue;
        }
        let (values, _) = sample(statement, theirs);
        let typed: Vec<(&(dyn ToSql + Sync), Type)> =
            values.iter().map(|value| &**value as &(dyn ToSql + Sync)).zip(statement.params.iter().cloned()).collect();
        for text in [sql.to_owned(), without_site(sql)] {
            seen_by_the_superuser +=
                shown(&mut database, None, &text, &typed).await.iter().filter(|row| is_theirs(row)).count();
            for reader in [Reader::Site(mine), Reader::User(OWNER), Reader::User(VIEWER)] {
                let rows = shown(&mut database, Some(reader), &text, &typed).await;
                assert!(!rows.iter().any(is_theirs), "{} as {reader:?}: {rows:?}\n{text}", statement.name);
                seen_by_readers += rows.iter().filter(|row| is_mine(row)).count();
                // What shows no row of the neighbour can still count them: then it would change with them.
                let without = shown_without(&mut database, theirs, reader, &text, &typed).await;
                assert_eq!(rows, without, "{} as {reader:?}\n{text}", statement.name);
            }
        }
    }
    assert!(seen_by_the_superuser > 0, "without the wall the same statements show the neighbour");
    assert!(seen_by_readers > 0, "and through it one's own rows");
}

/// As [`shown`], in a world in which the neighbour has no rows.
async fn shown_without(
    database: &mut Database,
    neighbour: SiteId,
    reader: Reader,
    sql: &str,
    params: &[(&(dyn ToSql + Sync), Type)],
) -> Vec<String> {
    let tx = database.admin.transaction().await.expect("a transaction");
    for table in ["calls", "events", "sessions"] {
        let delete = format!("DELETE FROM {table} WHERE site_id = '{neighbour}'");
        tx.batch_execute(&delete).await.expect("the superuser may");
    }
    let delete = format!("DELETE FROM sites WHERE id = '{neighbour}'");
    tx.batch_execute(&delete).await.expect("the superuser may");
    let opening = Purpose::Read(reader).opening();
    let (_, opening) = opening.split_once(';').expect("it begins, and then takes a role");
    tx.batch_execute(opening).await.expect("the superuser may be anybody");
    let rows = tx.query_typed(&format!("SELECT to_jsonb(r)::text FROM ({sql}) AS r"), params).await;
    let mut rows: Vec<String> = rows.map(|rows| rows.iter().map(|row| row.get(0)).collect()).unwrap_or_default();
    tx.rollback().await.expect("nothing stays");
    rows.sort();
    rows
}

#[test]
fn the_predicates_are_taken_out_whole() {
    let text = "SELECT 1 FROM a s WHERE s.site_id = $1 AND site_id = ANY ($12) AND session_id = $2 AND (public_id = $1 OR id = $3)";
    let expected = "SELECT 1 FROM a s WHERE s.site_id IS NOT NULL AND site_id IS NOT NULL AND session_id = $2 \
        AND (public_id IS NOT NULL OR id IS NOT NULL)";
    assert_eq!(without_site(text), expected);
}
