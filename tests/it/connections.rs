//! What the server does with its connections to PostgreSQL, and what it takes for granted of them.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use opsmantik::domain::id::{SessionKey, SiteId, UserId};
use opsmantik::domain::month::Month;
use opsmantik::domain::outcome::Outcome;
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::Store;
use opsmantik::store::transaction::{self, Purpose, Reader};
use serde_json::json;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use crate::support::database::{Database, connect, database};
use crate::support::events::Spec;

fn start(store: &Store) -> Pipeline {
    Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default())
}

#[tokio::test]
async fn a_connection_that_ended_while_it_lay_there_is_not_handed_out() {
    let database = database().await;
    let ping = || async { database.store.ping().await };
    let (a, b, c, d) = tokio::join!(ping(), ping(), ping(), ping());
    assert!([a, b, c, d].iter().all(Result::is_ok), "the database is there");
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE datname = current_database() AND application_name = 'opsmantik'";
    let ended = database.count(ended).await;
    assert!(ended > 1, "{ended} connections were open");
    tokio::time::sleep(Duration::from_millis(200)).await;
    for _ in 0..ended {
        ping().await.expect("the database was never away");
    }
}

#[tokio::test]
async fn a_login_that_only_may_take_the_servers_role_stores_events() {
    let database = database().await;
    let login = format!("bare_{}", database.name);
    let role = format!("CREATE ROLE {login} LOGIN NOINHERIT PASSWORD 'bare'; GRANT opsmantik_service TO {login}");
    database.admin.batch_execute(&role).await.expect("a role");
    let (head, tail) = database.url.split_once("://").expect("a URL");
    let url = format!("{head}://{login}:bare@{}", tail.split_once('@').expect("a host").1);
    let store = Store::new(&url, 2).await.expect("a URL");
    stores(&database, &start(&store), 1..10).await;
    store.ping().await.expect("ready");
}

#[tokio::test]
async fn where_the_session_serves_a_transaction_is_as_on_a_new_connection() {
    let database = database().await;
    // What somebody has chosen for the database is what a session goes back to.
    let chosen = format!("ALTER DATABASE {} SET lock_timeout = '7s'", database.name);
    database.admin.batch_execute(&chosen).await.expect("a default");
    let serving = connect(&database.url).await;
    serving.batch_execute(&transaction::serving()).await.expect("the login may take the role");
    let (site, user) = (SiteId::from_uuid(Uuid::from_u128(1)), UserId::from_uuid(Uuid::from_u128(2)));
    for purpose in [
        Purpose::Serve,
        Purpose::Keep,
        Purpose::Operate,
        Purpose::Read(Reader::Site(site)),
        Purpose::Read(Reader::User(user)),
        Purpose::Act(user),
        Purpose::Serve,
    ] {
        let new = connect(&database.url).await;
        let mut expected = settings(&new, &purpose.opening()).await;
        if purpose == Purpose::Serve {
            for (name, value) in [("plan_cache_mode", "force_generic_plan"), ("enable_seqscan", "off")] {
                expected.insert(name.to_owned(), value.to_owned());
            }
        }
        assert_eq!(settings(&serving, &purpose.opening_where_serving()).await, expected, "{purpose:?}");
    }
}

/// Who somebody is in a transaction that was opened like this, and all of the server's settings and ours. Rolled back.
async fn settings(client: &Client, opening: &str) -> BTreeMap<String, String> {
    client.batch_execute(opening).await.expect("opened");
    let ask = "SELECT name, setting FROM pg_settings \
        UNION ALL SELECT 'current_user', current_user \
        UNION ALL SELECT name, current_setting(name, true) FROM unnest('{opsmantik.site_id,request.jwt.claims}'::text[]) AS name";
    let rows = client.query(ask, &[]).await.expect("anybody may ask");
    client.batch_execute("ROLLBACK").await.expect("rolled back");
    let text = |row: &Row, at: usize| row.get::<_, Option<String>>(at).unwrap_or_default();
    rows.iter().map(|row| (text(row, 0), text(row, 1))).collect()
}

#[tokio::test]
async fn the_server_says_once_a_connection_whom_it_serves_and_reads_as_the_reader_on_the_same_one() {
    let database = database().await;
    database.admin.batch_execute(NOTE).await.expect("a trigger that notes");
    let store = Store::new(&database.url, 1).await.expect("a URL");
    let pipeline = start(&store);
    let site = database.site("shop").await.id;
    for id in 1..4 {
        let told = pipeline.submit(vec![Spec::new(id, "visit", Utc::now()).event(site)]).await;
        assert!(matches!(told[0], Outcome::Stored(_)), "{told:?}");
        // On the one connection that there is.
        let tx = store.begin(Purpose::Read(Reader::Site(site))).await.expect("a reader");
        let visit = database.rows("SELECT id FROM sessions").await[0]["id"].as_str().and_then(|id| id.parse().ok());
        let month = Month::containing(Utc::now().date_naive());
        let key = SessionKey { site_id: site, month, id: visit.expect("a visit") };
        let seen = opsmantik::store::events::of_session(&tx, key, 10).await.expect("a tenant may read");
        assert_eq!(seen.len(), id as usize);
        tx.rollback().await.expect("rolled back");
    }
    let noted = database.rows("SELECT DISTINCT who, bound, waits FROM noted").await;
    assert_eq!(noted, [json!({"who": "opsmantik_service", "bound": "5s", "waits": "1s"})]);
    assert_eq!(database.count("SELECT count(DISTINCT pid) FROM noted").await, 1);
}

/// Notes, at each statement that stores events, as whom and within which bounds.
const NOTE: &str = "CREATE TABLE public.noted (pid int, who text, bound text, waits text); GRANT INSERT ON public.noted TO PUBLIC; \
    CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
      INSERT INTO public.noted VALUES (pg_backend_pid(), current_user, current_setting('statement_timeout'), current_setting('lock_timeout')); \
      RETURN NULL; END $$; \
    CREATE TRIGGER note AFTER INSERT ON public.events FOR EACH STATEMENT EXECUTE FUNCTION public.note()";

/// Notes, at each statement that stores events, whether the server has it ready.
const WATCH: &str = "CREATE TABLE public.seen (is_ready boolean); \
    CREATE FUNCTION public.watch() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN \
      INSERT INTO public.seen SELECT EXISTS \
        (SELECT FROM pg_prepared_statements WHERE statement LIKE 'INSERT INTO public.events%'); RETURN NULL; END $$; \
    CREATE TRIGGER watch AFTER INSERT ON public.events FOR EACH STATEMENT EXECUTE FUNCTION public.watch()";

async fn stores(database: &Database, pipeline: &Pipeline, events: std::ops::Range<u32>) {
    let site = database.site("shop").await.id;
    for id in events {
        let told = pipeline.submit(vec![Spec::new(id, "visit", Utc::now()).event(site)]).await;
        assert!(matches!(told[0], Outcome::Stored(_)), "{told:?}");
    }
}

#[tokio::test]
async fn what_is_used_often_is_kept_ready_on_a_connection_that_reaches_the_database_itself() {
    let database = database().await;
    database.admin.batch_execute(WATCH).await.expect("a trigger that watches");
    stores(&database, &start(&database.store), 1..40).await;
    assert_eq!(database.count("SELECT count(*) FROM seen").await, 39);
    assert!(database.count("SELECT count(*) FROM seen WHERE is_ready").await >= 20);
    assert!(database.count("SELECT count(*) FROM seen WHERE NOT is_ready").await >= 3, "it has to be used for that");
}

#[tokio::test]
async fn a_statement_that_cannot_be_kept_ready_does_not_keep_others_from_it() {
    let database = database().await;
    database.admin.batch_execute(WATCH).await.expect("a trigger that watches");
    let rename = "ALTER TABLE opsmantik.call_rematches RENAME TO away";
    database.admin.batch_execute(rename).await.expect("renamed");
    for _ in 0..5 {
        database.store.sites_with_rematches(1).await.expect_err("there is no such table");
    }
    stores(&database, &start(&database.store), 1..40).await;
    assert!(database.count("SELECT count(*) FROM seen WHERE is_ready").await >= 20);
}

#[tokio::test]
async fn two_servers_agree_on_a_visit_at_a_months_turn_whatever_isolation_is_the_databases_default() {
    let database = database().await;
    let isolation = "ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'";
    database.admin.batch_execute(&isolation.replace("{}", &database.name)).await.expect("a default");
    let site = database.site("turn").await.id;
    let turn = Month::of(Utc::now()).next().start();
    let second = Store::new(&database.url, 8).await.expect("a URL");
    let servers = [start(&database.store), start(&second)];
    let visits = 40;
    for visit in 0..visits {
        let event = |n: u32, seconds| {
            Spec::new(visit * 2 + n, &format!("v{visit}"), turn + TimeDelta::seconds(seconds)).event(site)
        };
        let [before, after] = [event(1, -1), event(2, 1)];
        let (before, after) = tokio::join!(servers[0].submit(vec![before]), servers[1].submit(vec![after]));
        assert!(matches!((before[0], after[0]), (Outcome::Stored(_), Outcome::Stored(_))), "{before:?} {after:?}");
    }
    assert_eq!(database.count("SELECT count(*) FROM sessions").await, i64::from(visits));
    database.assert_counted().await;
}
