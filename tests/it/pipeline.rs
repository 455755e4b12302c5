//! One outcome for every event, whatever happens to its neighbours or to the database.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use opsmantik::domain::outcome::{DeathReason, Outcome, Unavailable};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::Store;
use opsmantik::store::dead_letters::{DeadLetter, Undertaker};
use opsmantik::store::error::StoreError;

use crate::support::database::database;
use crate::support::events::{Spec, at};

fn start(store: &Store, config: PipelineConfig) -> Pipeline {
    Pipeline::start(store.clone(), Nudge::default(), config)
}

#[tokio::test]
async fn a_poisonous_event_dies_alone_and_its_neighbours_are_stored() {
    let database = database().await;
    let site = database.site("poison").await.id;
    database
        .admin
        .batch_execute(
            "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
               IF NEW.url LIKE '%poison%' THEN RAISE EXCEPTION 'poison'; END IF; RETURN NEW; END $$; \
             CREATE TRIGGER poison BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION poison()",
        )
        .await
        .expect("a trigger that refuses");
    let pipeline = start(&database.store, PipelineConfig { writers: 1, ..PipelineConfig::default() });
    let now = Utc::now();
    let events: Vec<_> = (1..=40)
        .map(|id| {
            let spec = Spec::new(id, &format!("s{}", id % 7), now);
            let spec = if id == 13 || id == 31 { spec.url("https://a.example/poison") } else { spec };
            spec.event(site)
        })
        .collect();
    let outcomes = pipeline.submit(events.clone()).await;
    for (id, outcome) in (1..).zip(&outcomes) {
        match id {
            13 | 31 => assert_eq!(*outcome, Outcome::Dead(DeathReason::RefusedByDatabase), "{id}"),
            _ => assert!(matches!(outcome, Outcome::Stored(_)), "{id}: {outcome:?}"),
        }
    }
    assert_eq!(database.count("SELECT count(*) FROM events").await, 38);
    assert_eq!(database.count("SELECT sum(event_count)::bigint FROM sessions").await, 38, "no poison in a session");
    let letters = database.rows("SELECT reason, payload, tries FROM dead_letters").await;
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[0]["reason"], "refused_by_database");
    assert!(
        letters[0]["payload"].as_str().is_some_and(|job| job.contains("/poison")),
        "the letter holds the whole event"
    );

    // The same poison again is the same letter.
    pipeline.submit(events).await;
    assert_eq!(database.count("SELECT count(*) FROM dead_letters WHERE tries = 2").await, 2);
    assert_eq!(database.count("SELECT count(*) FROM events").await, 38);
}

#[tokio::test]
async fn a_visit_that_the_database_refuses_leaves_none_of_its_events_whether_at_once_or_at_the_commit() {
    let database = database().await;
    let site = database.site("poison").await.id;
    let refuse = "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                    IF NEW.entry_page LIKE '%poison%' THEN RAISE EXCEPTION 'poison'; END IF; RETURN NEW; END $$;";
    database.admin.batch_execute(refuse).await.expect("a function that refuses");
    let at_once = "CREATE TRIGGER poison BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION poison()";
    let at_the_commit = "CREATE CONSTRAINT TRIGGER poison AFTER INSERT ON sessions DEFERRABLE INITIALLY DEFERRED \
                         FOR EACH ROW EXECUTE FUNCTION poison()";
    let pipeline = start(&database.store, PipelineConfig { writers: 1, ..PipelineConfig::default() });
    // Often enough for the statements to be kept ready, which is another way to the database.
    for (round, trigger) in [at_once, at_the_commit].into_iter().cycle().take(8).enumerate() {
        let round = u32::try_from(round).expect("a few");
        database.admin.batch_execute(trigger).await.expect("a trigger");
        let events = (1..=20).map(|id| match id {
            7 | 15 => Spec::new(100 * round + id, &format!("bad{round}"), Utc::now()).url("https://a.example/poison"),
            _ => Spec::new(100 * round + id, &format!("s{}", id % 7), Utc::now()),
        });
        let outcomes = pipeline.submit(events.map(|spec| spec.event(site)).collect()).await;
        for (id, outcome) in (1..).zip(&outcomes) {
            match id {
                7 | 15 => assert_eq!(*outcome, Outcome::Dead(DeathReason::RefusedByDatabase), "{round}: {id}"),
                _ => assert!(matches!(outcome, Outcome::Stored(_)), "{round}: {id}: {outcome:?}"),
            }
        }
        database.admin.batch_execute("DROP TRIGGER poison ON sessions").await.expect("it is there");
        let stored = i64::from(18 * (round + 1));
        assert_eq!(database.count("SELECT count(*) FROM events").await, stored);
        assert_eq!(database.count("SELECT sum(event_count)::bigint FROM sessions").await, stored);
    }
}

#[tokio::test]
async fn an_event_of_a_site_that_is_gone_dies_with_that_reason() {
    let database = database().await;
    let gone = opsmantik::domain::id::SiteId::from_uuid(uuid::Uuid::from_u128(404));
    let site = database.site("here").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let outcomes = pipeline
        .submit(vec![Spec::new(1, "s", Utc::now()).event(gone), Spec::new(2, "s", Utc::now()).event(site)])
        .await;
    assert_eq!(outcomes[0], Outcome::Dead(DeathReason::UnknownSite));
    assert!(matches!(outcomes[1], Outcome::Stored(_)));
}

#[tokio::test]
async fn a_visit_that_somebody_has_locked_holds_up_nobody_else() {
    let database = database().await;
    let site = database.site("held").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let event = |id: u32, visit: &str| Spec::new(id, visit, Utc::now()).event(site);
    assert!(matches!(pipeline.submit(vec![event(1, "locked")]).await[0], Outcome::Stored(_)));
    let person = crate::support::database::connect(&database.url).await;
    person.batch_execute("BEGIN; UPDATE public.sessions SET city = 'X'").await.expect("one row");

    let batch = (2..80).map(|id| event(id, &format!("v{}", id % 20))).chain([event(100, "locked")]).collect();
    let began = Instant::now();
    let told = pipeline.submit(batch).await;
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let (locked, others) = told.split_last().expect("many");
    assert_eq!(*locked, Outcome::Unavailable(Unavailable::Database));
    assert!(others.iter().all(|outcome| matches!(outcome, Outcome::Stored(_))), "{others:?}");
    assert_eq!(database.store.write_trouble(), None, "the database is well");

    // It is known now.
    let began = Instant::now();
    let told = pipeline.submit(vec![event(100, "locked"), event(200, "v1")]).await;
    assert!(matches!(told[..], [Outcome::Unavailable(_), Outcome::Stored(_)]), "{told:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

    person.batch_execute("ROLLBACK").await.expect("let go");
    let other = start(&database.store, PipelineConfig::default());
    assert!(matches!(other.submit(vec![event(100, "locked")]).await[0], Outcome::Stored(_)));
    database.assert_counted().await;
}

#[tokio::test]
async fn a_visit_that_somebody_has_locked_is_found_though_it_is_alone() {
    let database = database().await;
    let site = database.site("quiet").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let event = |id: u32| Spec::new(id, "locked", Utc::now()).event(site);
    assert!(matches!(pipeline.submit(vec![event(1)]).await[0], Outcome::Stored(_)));
    let person = crate::support::database::connect(&database.url).await;
    person.batch_execute("BEGIN; UPDATE public.sessions SET city = 'X'").await.expect("one row");

    let began = Instant::now();
    assert_eq!(pipeline.submit(vec![event(2)]).await, [Outcome::Unavailable(Unavailable::Database)]);
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(pipeline.submit(vec![event(2)]).await, [Outcome::Unavailable(Unavailable::Database)]);
    assert!(began.elapsed() < Duration::from_millis(500), "it is known now: {:?}", began.elapsed());

    person.batch_execute("ROLLBACK").await.expect("let go");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(pipeline.submit(vec![event(2)]).await[0], Outcome::Stored(_)));
    database.assert_counted().await;
}

/// Breaks over every letter.
struct Clumsy;

#[async_trait::async_trait]
impl Undertaker for Clumsy {
    async fn keep(&self, _: &DeadLetter) -> Result<(), StoreError> {
        panic!("this one drops letters");
    }
}

#[tokio::test]
async fn a_writer_that_breaks_takes_its_batch_with_it_and_no_other() {
    let database = database().await;
    let gone = opsmantik::domain::id::SiteId::from_uuid(uuid::Uuid::from_u128(404));
    let site = database.site("here").await.id;
    let config = PipelineConfig::default();
    let pipeline = Pipeline::start_with(database.store.clone(), Nudge::default(), Arc::new(Clumsy), config);
    for id in 1..=2 * u32::try_from(config.writers).expect("a few") {
        let told = pipeline.submit(vec![Spec::new(id, "s", Utc::now()).event(gone)]).await;
        assert!(matches!(told[0], Outcome::Unavailable(_)), "{told:?}");
    }
    for id in 1..=20 {
        let told = pipeline.submit(vec![Spec::new(id, "s", Utc::now()).event(site)]).await;
        assert!(matches!(told[0], Outcome::Stored(_)), "{told:?}");
    }
}

#[tokio::test]
async fn a_second_copy_changes_nothing_and_hears_of_the_session() {
    let database = database().await;
    let site = database.site("twice").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let event = Spec::new(1, "s", Utc::now()).action("phone_call").event(site);
    let first = pipeline.submit(vec![event.clone(), event.clone()]).await;
    let traffic = database.traffic().await;
    let (Outcome::Stored(stored), Outcome::Duplicate(same)) = (first[0], first[1]) else { panic!("{first:?}") };
    assert_eq!((stored, stored.score().get()), (same, 60));
    let again = pipeline.submit(vec![event]).await;
    assert_eq!(again, [Outcome::Duplicate(stored)]);
    assert_eq!(database.traffic().await, traffic);
}

#[tokio::test]
async fn a_row_that_a_hand_wrote_is_a_session_like_any_other() {
    let database = database().await;
    let site = database.site("by_hand").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let (first, second) = (Spec::new(1, "s", Utc::now()).event(site), Spec::new(2, "s", Utc::now()).event(site));
    assert!(matches!(pipeline.submit(vec![first]).await[0], Outcome::Stored(_)));
    let edit =
        "UPDATE sessions SET provenance = '{\"odd\": 1}', click_ids = '[]', city = 'X', exit_page = NULL, signals = 33";
    database.admin.batch_execute(edit).await.expect("edited");
    let outcome = pipeline.submit(vec![second]).await[0];
    let Outcome::Stored(receipt) = outcome else { panic!("{outcome:?}") };
    assert_eq!(receipt.score().get(), 65, "the hand's signals and the event's own");
    assert_eq!(database.count("SELECT event_count FROM sessions WHERE city = 'X'").await, 2);
}

#[tokio::test]
async fn a_schema_that_changes_under_statements_that_are_kept_ready_costs_no_event() {
    let database = database().await;
    let site = database.site("schema").await.id;
    let pipeline = start(&database.store, PipelineConfig::default());
    let event = |id: u32| Spec::new(id, &format!("s{}", id % 5), Utc::now()).event(site);
    // Often enough that every statement of a batch is kept.
    for id in 1..=20 {
        assert!(matches!(pipeline.submit(vec![event(id)]).await[0], Outcome::Stored(_)), "{id}");
    }
    database
        .admin
        .batch_execute("ALTER TABLE sessions ALTER COLUMN utm_term TYPE varchar")
        .await
        .expect("another type");
    for id in 15..=40 {
        let outcome = pipeline.submit(vec![event(id)]).await[0];
        assert!(
            matches!((id, outcome), (..=20, Outcome::Duplicate(_)) | (21.., Outcome::Stored(_))),
            "{id}: {outcome:?}"
        );
    }
    assert_eq!(database.count("SELECT count(*) FROM events").await, 40);
    assert_eq!(database.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn a_database_that_is_away_is_told_in_time_and_used_again_when_it_is_back() {
    let database = database().await;
    let site = database.site("away").await.id;
    let config = PipelineConfig { patience: Duration::from_secs(3), ..PipelineConfig::default() };
    let pipeline = start(&database.store, config);
    let event = |id| Spec::new(id, "s", Utc::now()).event(site);
    assert!(matches!(pipeline.submit(vec![event(1)]).await[0], Outcome::Stored(_)));

    // Every session is ended and no new one let in, as when PostgreSQL restarts.
    let admin = crate::support::database::connect(&crate::support::cluster::cluster().await.url("postgres")).await;
    let name = &database.name;
    admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false")).await.expect("closed");
    let kill = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    admin.batch_execute(&kill).await.expect("ended");
    let started = Instant::now();
    assert_eq!(pipeline.submit(vec![event(2)]).await, [Outcome::Unavailable(Unavailable::Database)]);
    assert!(started.elapsed() < Duration::from_secs(6), "told after {:?}", started.elapsed());

    // A cut in the middle is bridged by a retry: nobody but the log notices.
    let waiting = tokio::spawn({
        let (pipeline, event) = (pipeline.clone(), event(3));
        async move { pipeline.submit(vec![event]).await }
    });
    tokio::time::sleep(Duration::from_millis(150)).await;
    admin.batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true")).await.expect("open");
    assert!(matches!(waiting.await.expect("no panic")[0], Outcome::Stored(_)));
    assert!(matches!(pipeline.submit(vec![event(2)]).await[0], Outcome::Stored(_)), "the client tried again");
}

#[tokio::test]
async fn a_full_waiting_room_says_busy_at_once_and_keeps_what_it_took() {
    let database = database().await;
    let site = database.site("full").await.id;
    let config = PipelineConfig { writers: 1, room_bytes: 64 << 10, ..PipelineConfig::default() };
    let pipeline = start(&database.store, config);
    // Somebody holds the table, so the writer cannot go on.
    let blocker = crate::support::database::connect(&database.url).await;
    blocker.batch_execute("BEGIN; LOCK TABLE events IN SHARE MODE").await.expect("held");
    let mut waiting = tokio::task::JoinSet::new();
    for id in 1..=200 {
        let (pipeline, event) = (pipeline.clone(), Spec::new(id, "s", Utc::now()).event(site));
        waiting.spawn(async move { pipeline.submit(vec![event]).await[0] });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    blocker.batch_execute("COMMIT").await.expect("released");
    let (mut stored, mut busy) = (0, 0);
    while let Some(outcome) = waiting.join_next().await {
        match outcome.expect("no panic") {
            Outcome::Stored(_) => stored += 1,
            Outcome::Unavailable(Unavailable::Busy) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(stored > 5 && busy > 100, "{stored} stored, {busy} refused");
    assert_eq!(database.count("SELECT count(*) FROM events").await, stored, "what was refused is not there");
}

#[tokio::test]
async fn a_month_without_partition_is_unavailable_and_does_not_hold_up_the_others() {
    let database = database().await;
    let site = database.site("months").await.id;
    let pipeline = start(&database.store, PipelineConfig { writers: 1, ..PipelineConfig::default() });
    let outcomes = pipeline
        .submit(vec![
            Spec::new(1, "s", Utc::now()).event(site),
            Spec::new(2, "t", at("2019-05-05T00:00:00Z")).event(site),
            Spec::new(3, "u", Utc::now()).event(site),
        ])
        .await;
    assert!(matches!(outcomes[0], Outcome::Stored(_)) && matches!(outcomes[2], Outcome::Stored(_)), "{outcomes:?}");
    assert_eq!(outcomes[1], Outcome::Unavailable(Unavailable::Partition));
}

#[tokio::test]
async fn draining_finishes_what_was_taken_and_takes_nothing_more() {
    let database = database().await;
    let site = database.site("drain").await.id;
    let pipeline = start(&database.store, PipelineConfig { writers: 2, batch: 3, ..PipelineConfig::default() });
    let taken = tokio::spawn({
        let pipeline = pipeline.clone();
        let events = (1..=50).map(|id| Spec::new(id, "s", Utc::now()).event(site)).collect();
        async move { pipeline.submit(events).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    pipeline.drain().await;
    let stored = taken.await.expect("no panic").iter().filter(|o| matches!(o, Outcome::Stored(_))).count();
    assert_eq!(stored, 50);
    let late = pipeline.submit(vec![Spec::new(99, "s", Utc::now()).event(site)]).await;
    assert_eq!(late, [Outcome::Unavailable(Unavailable::Stopping)]);
}
