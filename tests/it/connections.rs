//! What the server does with its connections to PostgreSQL, and what it takes for granted of them.

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use opsmantik::domain::month::Month;
use opsmantik::domain::outcome::Outcome;
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::Store;

use crate::support::database::{Database, database};
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
