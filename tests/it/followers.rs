//! A paid visit whose fingerprint thousands share: it is stored at once, and all its followers are corrected behind it, whatever happens meanwhile.

use std::ops::Range;
use std::time::{Duration, Instant};

use chrono::{NaiveDate, TimeDelta};
use opsmantik::calls::{self, Calls};
use opsmantik::domain::id::SiteId;
use opsmantik::pipeline::followers::{AT_ONCE, settle, sweep};
use opsmantik::store::Store;
use opsmantik::store::statement::STATEMENTS;
use serde_json::Value;
use tokio_postgres::types::ToSql;
use tokio_util::sync::CancellationToken;

use crate::merge::{assert_durable, calls_of, pipeline, prepared, sites};
use crate::support::calls::{call, push, with_fingerprint};
use crate::support::database::Database;
use crate::support::events::{Spec, at};

const WAITING: &str = "SELECT count(*) FROM opsmantik.late_followers";
const ASSISTED: &str = "SELECT count(*) FROM sessions WHERE attribution = 'Ads-Assisted'";

/// Visits of one fingerprint, over a hundred days; a dozen at the same time, as a batch of a beacon brings them.
fn visits(numbers: Range<u32>) -> Vec<Spec> {
    let visit = |n: u32| {
        let began = at("2026-02-02T00:00:00Z") + TimeDelta::hours(i64::from(n / 12) * 14);
        Spec::new(n, &format!("visit-{n}"), began).hint(&began.format("%Y-%m-01").to_string()).fingerprint("same")
    };
    numbers.map(visit).collect()
}

fn paid(id: u32, session: &str, time: &str) -> Spec {
    Spec::new(id, session, at(time)).fingerprint("same").url("https://a.example/?gclid=1")
}

async fn store(database: &Database, site: SiteId, specs: &[Spec]) {
    let server = pipeline(database, 2, 512);
    for some in specs.chunks(250) {
        assert_durable(&server.submit(some.iter().map(|spec| spec.event(site)).collect()).await);
    }
    server.drain().await;
}

/// A call of one of the visitors, told as soon as it rings.
async fn ring(database: &Database, site: SiteId) {
    let rang = at("2026-02-02T00:01:00Z") + TimeDelta::hours(100 * 14);
    let pushed = push(site, with_fingerprint(call("call", rang), "same"));
    Calls::new(database.store.clone()).record(site, &[pushed]).await.expect("the database answers");
}

/// The same of a run that nothing disturbed: the paid visits were there first, so that each visit asked for its own history.
async fn undisturbed(site: SiteId, paid: &[Spec], visits: &[Spec]) -> (Database, [Vec<Value>; 2], Vec<Value>) {
    let database = prepared().await;
    store(&database, site, paid).await;
    store(&database, site, visits).await;
    assert_eq!(database.count(WAITING).await, 0, "nobody was late");
    ring(&database, site).await;
    let (traffic, calls) = (database.traffic().await, calls_of(&database).await);
    (database, traffic, calls)
}

async fn assert_same(database: &Database, site: SiteId, traffic: &[Vec<Value>; 2], calls: &[Value]) {
    calls::settle(&database.store, site, None).await.expect("the database answers");
    for (expected, stored) in traffic.iter().zip(database.traffic().await) {
        assert_eq!(expected.len(), stored.len());
        for (expected, stored) in expected.iter().zip(&stored) {
            assert_eq!(expected, stored);
        }
    }
    assert_eq!(calls_of(database).await, calls);
    for table in ["late_followers", "call_rematches"] {
        assert_eq!(database.count(&format!("SELECT count(*) FROM opsmantik.{table}")).await, 0, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_paid_visit_with_thousands_of_followers_is_stored_at_once_and_all_of_them_are_corrected_behind_it() {
    let [site, _] = sites();
    let (visits, ad) = (visits(0..2000), [paid(9001, "ad", "2026-02-05T00:00:00Z")]);
    let (_reference, traffic, calls) = undisturbed(site, &ad, &visits).await;

    let database = prepared().await;
    store(&database, site, &visits).await;
    ring(&database, site).await;
    let most = i64::try_from(AT_ONCE).expect("a small number");
    let began = Instant::now();
    store(&database, site, &ad).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let noted = (database.count(ASSISTED).await, database.count(WAITING).await);
    assert_eq!(noted, (0, 1), "the batch has looked at none of so many");
    // A copy does nothing.
    store(&database, site, &ad).await;
    assert_eq!((database.count(ASSISTED).await, database.count(WAITING).await), noted);

    let go_on = CancellationToken::new();
    let (mut steps, mut before) = (1, 0);
    while settle(&database.store, &go_on).await.expect("the database answers") {
        let now = database.count(ASSISTED).await;
        // The ad visit itself is looked at as well.
        assert_eq!(now - before, if steps == 1 { most - 1 } else { most }, "a step is as short as a batch");
        (steps, before) = (steps + 1, now);
    }
    assert_eq!((steps, database.count(ASSISTED).await), (4, 1848), "all of ninety days");
    assert_same(&database, site, &traffic, &calls).await;
    assert_read_in_order(&database, site).await;
}

/// A step reads the rows that it looks at in the order of an index. Were they sorted, each step would read all that are left.
async fn assert_read_in_order(database: &Database, site: SiteId) {
    let statement = STATEMENTS.iter().find(|statement| statement.name == "NEXT_LATER_SESSIONS").expect("a statement");
    let (month, since, until) =
        ("2026-03-01".parse::<NaiveDate>(), at("2026-02-05T00:00:00Z"), at("2026-05-06T00:00:00Z"));
    let (month, id) = (month.expect("a day"), site.as_uuid());
    let values: [&(dyn ToSql + Sync); 7] = [&month, &id, &"same", &since, &id, &until, &501i64];
    let typed: Vec<_> = values.into_iter().zip(statement.params.iter().cloned()).collect();
    // A month as small as this one is read whole instead.
    database.admin.batch_execute("SET enable_seqscan = off; SET enable_bitmapscan = off").await.expect("set");
    let explain = format!("EXPLAIN {}", (statement.sql)());
    let plan = database.admin.query_typed(&explain, &typed).await.expect("explained");
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert!(plan.contains("Index Scan") && !plan.contains("Sort"), "{plan}");
}

/// Steps that are cut off at any moment, two servers at once, an ad visit that turns out to be another browser's, one that comes in between and
/// one that moves, and visits that come in meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_happens_while_followers_are_corrected_they_end_as_if_all_had_been_known_before() {
    let [site, _] = sites();
    let (visits, meanwhile) = (visits(0..1800), visits(1800..2000));
    let ads = [
        // The first one moves to the day before, the second one to somebody else's browser.
        paid(9001, "moves", "2026-02-07T00:00:00Z"),
        paid(9002, "leaves", "2026-02-03T00:00:00Z"),
        paid(9003, "between", "2026-03-20T00:00:00Z"),
        paid(9004, "moves", "2026-02-06T00:00:00Z"),
        paid(9005, "leaves", "2026-02-02T23:00:00Z").fingerprint("another"),
    ];
    let all = [visits.clone(), meanwhile.clone()].concat();
    let (_reference, traffic, calls) = undisturbed(site, &ads, &all).await;

    let database = prepared().await;
    store(&database, site, &visits).await;
    ring(&database, site).await;
    let go_on = CancellationToken::new();
    for (ad, new) in ads.iter().zip(meanwhile.chunks(40)) {
        store(&database, site, std::slice::from_ref(ad)).await;
        assert!(
            settle(&database.store, &go_on).await.expect("the database answers"),
            "the next ad comes before the end"
        );
        store(&database, site, new).await;
    }
    let mut cut_off = 0;
    let server = Store::new(&database.url, 2).await.expect("a URL");
    for patience in [1, 2, 3, 5, 7, 9, 11, 13] {
        // Dropped in the middle of a step, its transaction is rolled back.
        let step = tokio::time::timeout(Duration::from_millis(patience), settle(&server, &go_on));
        cut_off += u32::from(step.await.is_err());
    }
    assert!(cut_off > 2, "{cut_off} steps were cut off");

    // Two servers finish the work, and a third one is killed over it.
    let other = Store::new(&database.url, 2).await.expect("a URL");
    let killed = tokio::spawn(sweep(other.clone(), go_on.clone()));
    let sweeps = [database.store.clone(), other].map(|store| tokio::spawn(sweep(store, go_on.clone())));
    tokio::time::sleep(Duration::from_millis(15)).await;
    killed.abort();
    crate::support::browser::eventually("nobody waits", async || (database.count(WAITING).await == 0).then_some(()))
        .await;
    go_on.cancel();
    for sweep in sweeps {
        sweep.await.expect("the sweep ends");
    }
    assert_same(&database, site, &traffic, &calls).await;
}
