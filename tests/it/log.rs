//! The change feed against a real log: what it tells, in which order, what it never claims too early, and how it ends.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use opsmantik::dev::cluster::{Cluster, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use opsmantik::domain::change::{Change, Place, Position, Snapshot, Table};
use opsmantik::domain::id::SiteId;
use opsmantik::feed::{Entry, Feed, FeedError, FeedOptions, Lost, Step, Subscription, What};
use opsmantik::store::Store;
use opsmantik::store::columns::{Columns, Tuple};
use serde_json::Value;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::support::cluster::throw_away;
use crate::support::database::{Database, connect, database};
use crate::support::metrics::Metrics;
use crate::support::process::{Server, client};

mod life;
mod unfit;

const LIMIT: Duration = Duration::from_secs(30);

/// A feed, and what stops it.
struct Rig {
    feed: Feed,
    stop: CancellationToken,
    _stop: DropGuard,
}

impl Rig {
    fn new(database: &Database, options: FeedOptions) -> Self {
        Self::at(&database.store, &database.url, None, options)
    }

    fn at(store: &Store, url: &str, direct: Option<&str>, options: FeedOptions) -> Self {
        let stop = CancellationToken::new();
        let feed = Feed::new(store.clone(), url, direct, options, &stop).expect("a URL");
        Self { feed, _stop: stop.clone().drop_guard(), stop }
    }

    async fn watch(&self, table: Table, site: SiteId) -> Subscription {
        let late = Instant::now() + LIMIT;
        loop {
            match self.feed.subscribe(table, site).await {
                // It waits for writers of the whole cluster, in which other tests have transactions open.
                Err(FeedError::Away | FeedError::Held) if Instant::now() < late => {
                    tokio::time::sleep(Duration::from_millis(100)).await
                }
                subscribed => return subscribed.expect("the log can be read"),
            }
        }
    }
}

/// A cluster with settings of its own.
struct Private {
    url: String,
    store: Store,
    _cluster: Cluster,
}

impl Private {
    async fn start(settings: &[(&str, &str)]) -> Self {
        let settings = settings.iter().chain(&[("max_connections", "40")]);
        let settings = settings.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let started = tokio::task::spawn_blocking(move || {
            let postgres = Postgres::find_or_install(Progress::stderr()).expect("there is one");
            let options = ClusterOptions { settings, ..throw_away(postgres) };
            Cluster::start(options, Progress::stderr()).expect("it starts")
        });
        let cluster = started.await.expect("no panic");
        let url = cluster.url("postgres");
        let store = Store::new(&url, 4).await.expect("a URL");
        store.migrate().await.expect("an empty database");
        Self { url, store, _cluster: cluster }
    }

    async fn site(&self) -> SiteId {
        let insert = "INSERT INTO sites (public_id, name, domain) VALUES ('shop', 'shop', 'shop.example') RETURNING id";
        let row = connect(&self.url).await.query_one(insert, &[]).await.expect("a new site");
        SiteId::from_uuid(row.get(0))
    }
}

/// The next entry, within reason.
async fn entry(of: &mut Subscription) -> Arc<Entry> {
    let next = async {
        loop {
            match of.next().await.expect("the feed goes on") {
                Step::Entry(entry) => return entry,
                Step::Moved => {}
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.expect("an entry comes")
}

/// How it ends.
async fn end(of: &mut Subscription) -> Lost {
    let next = async {
        loop {
            if let Err(lost) = of.next().await {
                return lost;
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.expect("it ends")
}

async fn row(of: &mut Subscription) -> Change<(Place, Tuple)> {
    match &entry(of).await.what {
        What::Row(change) => change.clone(),
        what @ What::Anew { .. } => panic!("{what:?}"),
    }
}

fn text<'a>(row: Option<&'a (Place, Tuple)>, column: &str) -> &'a str {
    row.expect("there is a row").1.column(column).expect("there is a text")
}

fn id_of(row: Option<&(Place, Tuple)>) -> Uuid {
    row.expect("there is a row").1.column("id").expect("there is an id")
}

async fn slots(database: &Database) -> i64 {
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
    database.count(slots).await
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < LIMIT, "{what} takes too long");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Calls of a site: the id, the provider's id, and a long text that is stored away from its row.
fn insert_calls(site: SiteId, series: &str, note: &str) -> String {
    format!(
        "INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, started_at, recording_ref) \
         SELECT gen_random_uuid(), '{site}', 'p', n::text, 'PHONE', 'INBOUND', '+12015550123', now(), {note} FROM {series} AS n"
    )
}

/// A text that does not compress.
const LONG: &str = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 500) AS i)";

async fn run(database: &Database, sql: &str) {
    database.admin.batch_execute(sql).await.expect("the test's own statement");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_written_by_hand_is_told_whole_before_and_after() {
    let database = database().await;
    let (shop, other) = (database.site("shop").await.id, database.site("other").await.id);
    let rig = Rig::new(&database, FeedOptions::default());
    let (mut here, mut there) = (rig.watch(Table::Calls, shop).await, rig.watch(Table::Calls, other).await);
    let (mut visits, mut events) = (rig.watch(Table::Sessions, shop).await, rig.watch(Table::Events, shop).await);
    assert_eq!(slots(&database).await, 1, "one reader for all");

    run(&database, &insert_calls(shop, "generate_series(1, 1)", LONG)).await;
    let inserted = row(&mut here).await;
    assert!(matches!(inserted, Change::Insert { .. }));
    let long = text(inserted.after(), "recording_ref").to_owned();
    assert_eq!(long.len(), 16_000);
    run(&database, "UPDATE calls SET status = 'COMPLETED'").await;
    let updated = row(&mut here).await;
    assert_eq!((text(updated.before(), "recording_ref"), text(updated.after(), "recording_ref")), (&*long, &*long));
    let was: Option<&str> = updated.before().expect("a row").1.column("status").expect("a column");
    assert_eq!((was, text(updated.after(), "status")), (None, "COMPLETED"));

    run(&database, &format!("UPDATE calls SET site_id = '{other}'")).await;
    for moved in [row(&mut here).await, row(&mut there).await] {
        assert_eq!(moved.before().expect("a row").0, Place { site: shop, month: None });
        assert_eq!(moved.after().expect("a row").0, Place { site: other, month: None });
        assert_eq!(text(moved.after(), "recording_ref"), long);
    }
    run(&database, "DELETE FROM calls").await;
    let deleted = row(&mut there).await;
    assert!(matches!(deleted, Change::Delete { .. }) && text(deleted.before(), "recording_ref") == long);

    let session = format!(
        "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, exit_page, attribution, \
         traffic_source, traffic_medium, lead_score) SELECT '{shop}', date_trunc('month', now() AT TIME ZONE 'UTC'), gen_random_uuid(), \
         now(), now(), 1, 'https://shop.example/', {LONG}, 'Organic/Referral', 'Direct', 'direct', 0; \
         INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score) \
         SELECT site_id, created_month, gen_random_uuid(), id, now(), now(), 'u', 'interaction', 'view', 0 FROM sessions; \
         UPDATE sessions SET lead_score = 9"
    );
    run(&database, &format!("BEGIN; {session}; COMMIT")).await;
    let (visit, event, scored) = (entry(&mut visits).await, entry(&mut events).await, entry(&mut visits).await);
    assert!(visit.position < event.position && event.position < scored.position);
    assert_eq!((visit.xid, visit.position.lsn), (scored.xid, scored.position.lsn), "one transaction");
    let What::Row(Change::Update { old, new }) = &scored.what else { panic!("{scored:?}") };
    assert!(new.0.month.is_some() && old.0 == new.0);
    assert_eq!((text(Some(old), "exit_page").len(), text(Some(new), "exit_page").len()), (16_000, 16_000));
    assert_eq!((old.1.column::<i16>("lead_score").ok(), new.1.column::<i16>("lead_score").ok()), (Some(0), Some(9)));

    run(&database, "DELETE FROM events; TRUNCATE events").await;
    assert!(matches!(row(&mut events).await, Change::Delete { .. }), "and its mark is told by itself alone");
    assert!(matches!(entry(&mut events).await.what, What::Anew { site: None, month: None }));
    let marks =
        "SELECT count(DISTINCT cause) FROM opsmantik.vanished WHERE tab = 'events' AND cause IN ('delete', 'truncate')";
    assert_eq!(database.count(marks).await, 2, "one of each for who was not there");
    run(&database, &format!("SELECT opsmantik.note_vanished('sessions', '2026-03-01', '{shop}', 'detach')")).await;
    let told = entry(&mut visits).await;
    let What::Anew { site: Some(site), month: Some(month) } = &told.what else { panic!("{told:?}") };
    assert_eq!((*site, month.to_string()), (shop, "2026-03-01".to_owned()));

    // A hand takes the identity away: what cannot be told any more is to be read.
    run(&database, "ALTER TABLE calls REPLICA IDENTITY DEFAULT").await;
    run(&database, &insert_calls(shop, "generate_series(1, 1)", "'x'")).await;
    run(&database, "UPDATE calls SET status = 'BUSY'").await;
    assert!(matches!(row(&mut here).await, Change::Insert { .. }));
    assert!(matches!(entry(&mut here).await.what, What::Anew { site: None, month: None }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_are_told_in_the_order_of_their_commits_and_nothing_is_covered_too_early() {
    const WRITERS: usize = 4;
    const COMMITS: usize = 150;
    let database = database().await;
    let shop = database.site("shop").await.id;
    let rig = Rig::new(&database, FeedOptions::default());
    let mut watch = rig.watch(Table::Calls, shop).await;
    let writers = (0..WRITERS).map(|writer| {
        let url = database.url.clone();
        tokio::spawn(async move {
            let admin = connect(&url).await;
            for n in 0..COMMITS {
                let series = format!("generate_series({0}, {0} + 1)", writer * 1_000_000 + n * 2);
                let rolled_back = insert_calls(shop, "generate_series(-1, -1)", "'x'");
                admin.batch_execute(&insert_calls(shop, &series, "'x'")).await.expect("a commit");
                admin.batch_execute(&format!("BEGIN; {rolled_back}; ROLLBACK")).await.expect("a change of mind");
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let reader = connect(&database.url).await;
    let look = "SELECT pg_current_snapshot()::text, coalesce(array_agg(id ORDER BY id), '{}'), \
                coalesce(array_agg(xmin::text::int8 ORDER BY id), '{}') FROM calls";
    let (mut told, mut covered, mut early, mut last) = (HashMap::new(), 0, 0, Position::default());
    while told.len() < WRITERS * COMMITS * 2 {
        for _ in 0..5.min(WRITERS * COMMITS * 2 - told.len()) {
            let entry = entry(&mut watch).await;
            assert!(entry.position > last, "{entry:?} after {last:?}");
            last = entry.position;
            let What::Row(change) = &entry.what else { panic!("{entry:?}") };
            assert_eq!(told.insert(id_of(change.after()), entry.xid), None, "told once");
        }
        let horizon = watch.horizon();
        let seen = reader.query_one(look, &[]).await.expect("a look");
        let snapshot: Snapshot = seen.get::<_, &str>(0).parse().expect("a snapshot");
        let rows: HashMap<Uuid, i64> =
            seen.get::<_, Vec<Uuid>>(1).into_iter().zip(seen.get::<_, Vec<i64>>(2)).collect();
        if watch.covers(&snapshot) {
            covered += 1;
            assert!(told.keys().all(|id| rows.contains_key(id)), "{snapshot} at {:?}", watch.position());
        } else {
            early += 1;
        }
        for (id, xid) in &told {
            assert_eq!(rows.contains_key(id), snapshot.sees(*xid), "ids are whole: {xid} in {snapshot}");
        }
        assert!(0 < horizon && horizon <= snapshot.xmin, "{horizon} in {snapshot}");
        for (id, xid) in &rows {
            let below = u64::try_from(*xid).is_ok_and(|xid| xid < horizon);
            assert!(!below || told.contains_key(id), "{xid} is below {horizon} and was not told");
        }
    }
    for writer in writers {
        writer.await.expect("it wrote");
    }
    assert!(covered > 10, "{covered} of {}", covered + early);
    let order = "SELECT array_agg(DISTINCT xmin::text::int8) FROM calls";
    let xids: Vec<i64> = reader.query_one(order, &[]).await.expect("a look").get(0);
    assert_eq!(told.values().collect::<HashSet<_>>().len(), xids.len(), "as many transactions as committed");

    // With all ended, the horizon comes to lie beyond all that was told, once the position has moved there.
    let most = told.values().copied().max().expect("many");
    run(&database, "CREATE TABLE something_else (n int); INSERT INTO something_else VALUES (1)").await;
    until("the horizon passes", async || {
        drop(tokio::time::timeout(Duration::from_secs(2), watch.next()).await);
        watch.horizon() > most
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_logged_but_not_shown_yet_is_not_covered() {
    // Whoever asks for it waits for a standby that is not there: its commit is in the log, and nobody sees it.
    let private = Private::start(&[]).await;
    let rig = Rig::at(&private.store, &private.url, None, FeedOptions::default());
    let site = private.site().await;
    let mut watch = rig.watch(Table::Calls, site).await;
    let admin = connect(&private.url).await;
    let standbys = async |names: &str| {
        let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'");
        admin.batch_execute(&set).await.expect("a superuser");
        admin.batch_execute("SELECT pg_reload_conf()").await.expect("a superuser");
    };
    standbys("nobody").await;
    until("the standby is waited for", async || {
        let shown = admin.query_one("SHOW synchronous_standby_names", &[]).await.expect("a look");
        shown.get::<_, &str>(0) == "nobody"
    })
    .await;
    let moment = async || {
        let now = admin.query_one("SELECT pg_current_snapshot()::text", &[]).await.expect("a look");
        now.get::<_, &str>(0).parse::<Snapshot>().expect("a snapshot")
    };
    let before = moment().await;
    assert!(watch.covers(&before), "nothing was told yet");
    let writing = {
        let (url, insert) = (private.url.clone(), insert_calls(site, "generate_series(1, 1)", "'x'"));
        let write = format!("SET synchronous_commit = on; BEGIN; {insert}; COMMIT");
        tokio::spawn(async move { connect(&url).await.batch_execute(&write).await })
    };
    let told = entry(&mut watch).await;
    let others = insert_calls(site, "generate_series(2, 9)", "'y'");
    admin.batch_execute(&others).await.expect("who does not ask does not wait");
    let position = watch.position();
    while watch.position().lsn == position.lsn {
        entry(&mut watch).await;
    }
    // Long enough for the feed to ask the database again and again.
    for _ in 0..15 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = moment().await;
        assert!(!now.sees(told.xid) && !watch.covers(&now), "{now}");
        assert!(watch.horizon() <= told.xid);
    }
    standbys("").await;
    writing.await.expect("no panic").expect("it is shown at last");
    assert!(!watch.covers(&before), "a look from before stays one");
    until("what is shown is covered", async || watch.covers(&moment().await)).await;

    // Before the first entry's transaction was told, it need not have been seen.
    let start = Position { lsn: told.position.lsn, seq: 0 };
    assert!(watch.seek(start));
    assert_eq!(entry(&mut watch).await.position, told.position, "told again from there");
    // What nobody has read yet is covered by nothing.
    assert!(watch.seek(Position { lsn: told.position.lsn + (1 << 40), seq: 0 }));
    assert!(!watch.covers(&moment().await));
    assert!(watch.try_next().is_ok_and(|entry| entry.is_none()));
    assert!(!watch.seek(Position { lsn: 1, seq: 0 }), "nobody knows what came after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_huge_transaction_streams_through_and_who_sleeps_is_cut_off() {
    const ROWS: usize = 100_000;
    let database = database().await;
    let (shop, quiet) = (database.site("shop").await.id, database.site("quiet").await.id);
    let room = 4 << 20;
    let rig = Rig::new(&database, FeedOptions { log_bytes: room, ..FeedOptions::default() });
    let (mut sleeper, mut still) = (rig.watch(Table::Calls, shop).await, rig.watch(Table::Calls, quiet).await);
    let begin = sleeper.position();
    run(&database, &insert_calls(quiet, "generate_series(1, 1)", "'before'")).await;
    let first = entry(&mut still).await;
    let write = insert_calls(shop, &format!("generate_series(1, {ROWS})"), "'x'");
    let writing = {
        let url = database.url.clone();
        tokio::spawn(async move { connect(&url).await.batch_execute(&write).await })
    };
    writing.await.expect("no panic").expect("a commit");
    run(&database, &insert_calls(quiet, "generate_series(2, 2)", "'after'")).await;
    let after = entry(&mut still).await;
    let What::Row(change) = &after.what else { panic!("{after:?}") };
    assert_eq!(text(change.after(), "recording_ref"), "after", "others are none the worse");
    assert_eq!(end(&mut sleeper).await, Lost::Slow);
    assert!(!sleeper.seek(begin), "it is forgotten");

    // The first place in the log, and the first within the huge transaction, from which everything is kept.
    let mut tail = rig.watch(Table::Calls, shop).await;
    let mut first_kept = |mut low: u64, mut high: u64, place: &dyn Fn(u64) -> Position| {
        while low < high {
            let middle = low + (high - low) / 2;
            if tail.seek(place(middle)) { high = middle } else { low = middle + 1 }
        }
        low
    };
    let lsn = first_kept(first.position.lsn, after.position.lsn, &|lsn| Position { lsn, seq: 0 }) - 1;
    let seq = |seq: u64| u32::try_from(seq).expect("a number");
    let kept_from = first_kept(0, ROWS as u64, &|n| Position { lsn, seq: seq(n) });
    let kept = ROWS - usize::try_from(kept_from).expect("a number");
    assert!((1000..ROWS / 10).contains(&kept), "{kept} rows in {room} bytes");
    assert!(tail.seek(Position { lsn, seq: seq(kept_from) }));
    for n in kept_from + 1..=ROWS as u64 {
        let entry = tail.try_next().expect("it is kept").expect("it is there");
        assert_eq!(entry.position, Position { lsn, seq: seq(n) });
        let What::Row(change) = &entry.what else { panic!("{entry:?}") };
        assert_eq!(text(change.after(), "provider_call_id"), n.to_string());
    }
    assert!(tail.try_next().is_ok_and(|entry| entry.is_none()));
}
