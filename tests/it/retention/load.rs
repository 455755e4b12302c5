//! Months are dropped under load: nobody who writes or reads notices, and what was written before is still told by the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use opsmantik::calls::Calls;
use opsmantik::domain::id::UserId;
use opsmantik::domain::outcome::Outcome;
use opsmantik::keeper::{self, Nudge};
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::transaction::{Purpose, Reader};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{at, detached, fill, marks, old, partitions, tables};
use crate::support::calls::{BUSINESS, call, push};
use crate::support::database::{connect, database};
use crate::support::events::Spec;

const OWNER: UserId = UserId::from_uuid(Uuid::from_u128(0xA));
/// What nobody waits for.
const PAUSE: Duration = Duration::from_secs(2);

/// The inserts that the log tells, by table.
async fn inserts(admin: &tokio_postgres::Client, slot: &str) -> HashMap<String, u64> {
    // It is decoded as far as it is flushed.
    admin
        .batch_execute("SET synchronous_commit = on; SELECT pg_logical_emit_message(true, '', '')")
        .await
        .expect("flushed");
    let changes = admin
        .query(
            "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1', \
             'publication_names', 'opsmantik_feed')",
            &[&slot],
        )
        .await
        .expect("decoded");
    let (mut names, mut told) = (HashMap::new(), HashMap::new());
    for change in &changes {
        let message: &[u8] = change.get(0);
        let relation = |at: usize| message.get(at..at + 4).map(<[u8]>::to_vec);
        match message.first() {
            Some(b'R') => {
                let name = message[5..].split(|byte| *byte == 0).nth(1).expect("a name");
                names.insert(relation(1), String::from_utf8_lossy(name).into_owned());
            }
            Some(b'I') => *told.entry(names[&relation(1)].clone()).or_default() += 1,
            _ => {}
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn months_are_dropped_under_load_and_nobody_notices() {
    let database = database().await;
    let site = database.site("shop").await.id;
    database.admin.execute("UPDATE sites SET user_id = $1", &[&OWNER.as_uuid()]).await.expect("owned");
    let config = PipelineConfig { patience: Duration::from_secs(20), ..PipelineConfig::default() };
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), config);
    let calls = Calls::new(database.store.clone());
    for months in 3..=8 {
        fill(&database, site, old(months), 300, 10).await;
        let noon = at(old(months));
        let n = u32::try_from(months).expect("positive");
        let click = Spec::new(n, &format!("caller{n}"), noon - TimeDelta::seconds(60)).clicks(BUSINESS).event(site);
        assert!(matches!(pipeline.submit(vec![click]).await[0], Outcome::Stored(_)));
        let matched = calls.record(site, &[push(site, call(&format!("c{n}"), noon))]).await.expect("recorded");
        assert!(matched[0].call.credited().is_some());
    }
    fill(&database, site, old(1), 200, 5).await;
    database.admin.batch_execute("ANALYZE").await.expect("analyzed");

    // What is written before the drop, and read from the log after it.
    let slot = format!("load_{}", database.name);
    let make = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
    database.admin.execute(make, &[&slot]).await.expect("wal_level is logical");
    fill(&database, site, old(7), 100, 7).await;
    let deleted = format!("DELETE FROM events WHERE session_month = '{}' AND url = '/nowhere'", old(7));
    database.admin.batch_execute(&deleted).await.expect("nothing");

    let (over, stop) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
    let kept = tokio::spawn(keeper::run(database.store.clone(), Nudge::default(), stop.clone()));
    let (longest_write, longest_read) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (next, stored) = (Arc::new(AtomicU32::new(1000)), Arc::new(AtomicU32::new(0)));
    let mut busy: JoinSet<()> = JoinSet::new();
    for months in [0, 1, 0, 1] {
        let (over, longest, next, stored) = (over.clone(), longest_write.clone(), next.clone(), stored.clone());
        let pipeline = pipeline.clone();
        busy.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let when = if months == 0 { Utc::now() } else { at(old(1)) };
                let began = Instant::now();
                let outcome = pipeline.submit(vec![Spec::new(n, &format!("v{}", n % 50), when).event(site)]).await;
                assert!(matches!(outcome[0], Outcome::Stored(_)), "{outcome:?}");
                longest.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                stored.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    // As a dashboard reads: one month, again and again; and rather long, everything there is, twice at the same moment.
    for long in [false, false, true] {
        let (over, longest, url) = (over.clone(), longest_read.clone(), database.url.clone());
        busy.spawn(async move {
            let reader = connect(&url).await;
            let opening = Purpose::Read(Reader::User(OWNER)).opening();
            let month =
                format!("SELECT count(*) FROM events WHERE site_id = '{site}' AND session_month = '{}'", old(1));
            let everything = "SELECT count(*) FROM events JOIN sessions s ON s.site_id = events.site_id \
                AND s.created_month = session_month AND s.id = session_id";
            let mut at_least = 1000;
            while !over.load(Ordering::Relaxed) {
                reader.batch_execute(&opening).await.expect("begun");
                let began = Instant::now();
                let query = if long { everything } else { month.as_str() };
                let seen: i64 = reader.query_one(query, &[]).await.expect("no reader fails").get(0);
                longest.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
                if long {
                    tokio::time::sleep(Duration::from_millis(700)).await;
                    let again: i64 = reader.query_one(query, &[]).await.expect("no reader fails").get(0);
                    assert_eq!(seen, again, "the same moment shows the same rows");
                } else {
                    assert!(seen >= at_least, "rows of a month that is kept went away: {seen} of {at_least}");
                    at_least = seen;
                }
                reader.batch_execute("COMMIT").await.expect("ended");
            }
        });
    }
    {
        let (over, store) = (over.clone(), database.store.clone());
        busy.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let readiness = store.readiness(old(0), 1).await.expect("it answers");
                assert!(readiness.is_ready(), "{readiness:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }

    tokio::time::sleep(Duration::from_millis(500)).await;
    let (began, before) = (Instant::now(), stored.load(Ordering::Relaxed));
    let gone = partitions(&database, &["drop", "--keep-months", "3", "--yes", "--json", "--wait", "80"]).await;
    let (took, meanwhile) = (began.elapsed(), stored.load(Ordering::Relaxed) - before);
    tokio::time::sleep(Duration::from_millis(300)).await;
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = busy.join_next().await {
        ended.expect("nobody noticed");
    }
    stop.cancel();
    kept.await.expect("the keeper ends");
    let longest = [&longest_write, &longest_read].map(|longest| Duration::from_millis(longest.load(Ordering::Relaxed)));
    eprintln!("dropped 6 months in {took:?}; {meanwhile} events meanwhile; longest write and read {longest:?}");
    assert!(longest.iter().all(|pause| *pause < PAUSE), "a write or a read waited: {longest:?}");
    assert!(meanwhile > 0, "there was no load");

    let gone = gone.json();
    assert_eq!(gone["months"].as_array().map(Vec::len), Some(6), "{gone}");
    assert!(gone["months"].as_array().expect("a list").iter().all(|month| month["matched_calls"] == 1), "{gone}");
    for months in 3..=8 {
        assert_eq!(tables(&database, old(months)).await, Vec::<Value>::new());
        assert_eq!(marks(&database, old(months)).await, detached());
    }
    assert_eq!(
        database
            .count("SELECT count(*) FROM calls WHERE match_method = 'CLICK' AND matched_session_id IS NOT NULL")
            .await,
        6
    );

    // The log tells all that was written, that of a month that is gone included.
    let told = inserts(&database.admin, &slot).await;
    database.admin.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await.expect("dropped");
    // 300 sessions were there, and the caller's.
    let of_the_month = (100 + 300 + 1) * 7;
    assert_eq!(told.get("events"), Some(&(of_the_month + u64::from(stored.load(Ordering::Relaxed)))), "{told:?}");
    assert!(told.get("vanished").is_some_and(|marks| *marks >= 12), "{told:?}");

    // A month's rows are still looked for in its leaf alone.
    let plan = database
        .admin
        .query(&format!("EXPLAIN SELECT * FROM events WHERE site_id = '{site}' AND session_month = '{}'", old(1)), &[])
        .await
        .expect("explained");
    let plan: Vec<String> = plan.iter().map(|line| line.get(0)).collect();
    assert!(plan.iter().filter(|line| line.contains(" on events_")).count() <= 1, "{plan:?}");
}
