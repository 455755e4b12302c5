//! Nothing is missed and nothing is told twice: while rows are written in every way that there is, watchers come, stall, leave and resume, a server is
//! killed and PostgreSQL restarts under them. Each of them ends with exactly the rows of the table.
//!
//! `FEED_SEED` repeats what the writers and the watchers choose, though not who is faster; `FEED_TRAIL=1` tells what each watcher went through.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope as Right;
use opsmantik::grpc::proto::{Call, Session, StoredEvent};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use uuid::Uuid;

use super::door::Door;
use super::rows::{Stored, expected};
use super::seed::{flood, prepare};
use super::watched::{Scope, Watched};
use super::watcher::{Habits, Life, Place, Watcher};
use super::work::{SITES, Work};
use super::writer::Writer;
use crate::support::calls::KEY;
use crate::support::private::{Private, Shutdown};
use crate::support::process::Server;

/// Row changes that are committed.
const ROWS: u64 = 100_000;
/// By SQL, each on a connection of its own; one more writes through the doors.
const WRITERS: u16 = 5;
/// The last row of every table, site and month.
const LAST: Uuid = Uuid::from_u128(0xffff_0000_0000_0000_0000_0000_0000_0001);

/// Reads, and now and then it does not, or is gone.
const RESTLESS: Habits = Habits { stalls: 25, stalled: (500, 2_500), leaves: 40, away: (50, 1_500), dozes: false };
/// Does not read for a long time when most is written.
const DROWSY: Habits = Habits { dozes: true, ..Habits::GOOD };

/// What the watchers of one kind of row came to, by name.
type Ends<R> = JoinSet<(String, Scope, Result<(BTreeMap<String, R>, Life), String>)>;

struct Crowd {
    place: Arc<Place>,
    work: Arc<Work>,
}

impl Crowd {
    fn admit<R: Watched>(&self, ends: &mut Ends<R>, name: &str, site: usize, month: Option<usize>, habits: Habits) {
        let month = month.map(|month| self.work.months[month].to_string());
        let scope = Scope { site: SITES[site].to_string(), month };
        let last = self.last_of::<R>(&scope);
        let watcher = Watcher::<R>::new(name, self.place.clone(), scope.clone(), habits, self.work.seed);
        let name = name.to_owned();
        ends.spawn(async move { (name, scope, watcher.run(last).await) });
    }

    /// The keys of the last rows of a scope.
    fn last_of<R: Watched>(&self, scope: &Scope) -> Vec<String> {
        let months = self.work.months.iter().map(ToString::to_string);
        let months = months.filter(|month| scope.month.as_ref().is_none_or(|asked| asked == month));
        let mut keys: Vec<String> = months.map(|month| format!("{} {month} {LAST}", scope.site)).collect();
        if std::any::type_name::<R>() == std::any::type_name::<Call>() {
            let at = SITES.iter().position(|site| site.to_string() == scope.site).expect("a site of the test");
            keys = vec![last_call(at).to_string()];
        }
        keys
    }
}

fn last_call(site: usize) -> Uuid {
    Uuid::from_u128(LAST.as_u128() + site as u128)
}

/// Writes the last row of every table, site and month.
async fn write_last(client: &Client, work: &Work) {
    client.batch_execute("BEGIN").await.expect("a transaction");
    for (at, site) in SITES.iter().enumerate() {
        for month in &work.months {
            let session = "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
                traffic_source, traffic_medium, lead_score) VALUES ($1, $2, $3, now(), now(), 1, '/', 'Organic/Referral', 'Direct', 'direct', 0)";
            client.execute(session, &[site, month, &LAST]).await.expect("a last visit");
            let event = "INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, \
                lead_score) VALUES ($1, $2, $3, $3, now(), now(), '/', 'system', 'end', 0)";
            client.execute(event, &[site, month, &LAST]).await.expect("a last event");
        }
        let call = "INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, started_at) \
            VALUES ($1, $2, 'last', 'last', 'PHONE', 'INBOUND', '+12025550123', now())";
        client.execute(call, &[&last_call(at), site]).await.expect("a last call");
    }
    client.batch_execute("COMMIT").await.expect("committed");
}

/// Holds what each watcher has against the table; what they have been through.
async fn compare<R: Stored>(client: &Client, door: &Door, ends: Ends<R>, wrong: &mut Vec<String>) -> Vec<Life> {
    let mut lives = Vec::new();
    for (name, scope, end) in ends.join_all().await {
        let (rows, life) = match end {
            Ok(end) => end,
            Err(complaint) => {
                wrong.push(complaint);
                continue;
            }
        };
        let (mut table, ask) = expected::<R>(client, &scope).await;
        for id in ask {
            let site = scope.site.parse().expect("a UUID");
            let call: Box<dyn std::any::Any> = Box::new(door.call(site, &id).await);
            let row = *call.downcast::<R>().expect("only calls are asked for");
            table.insert(row.key(), row);
        }
        eprintln!("{name:28} {} rows, {life:?}", rows.len());
        lives.push(life);
        let missing: Vec<_> = table.keys().filter(|key| !rows.contains_key(*key)).collect();
        let surplus: Vec<_> = rows.keys().filter(|key| !table.contains_key(*key)).collect();
        let other: Vec<_> =
            table.iter().filter_map(|(key, row)| rows.get(key).filter(|has| *has != row).zip(Some(row))).collect();
        if !(missing.is_empty() && surplus.is_empty() && other.is_empty()) {
            wrong.push(format!(
                "{name} has {} rows of {}: {} missing {:?}, {} too many {:?}, {} other than they are {:#?}",
                rows.len(),
                table.len(),
                missing.len(),
                missing.iter().take(3).collect::<Vec<_>>(),
                surplus.len(),
                surplus.iter().take(3).collect::<Vec<_>>(),
                other.len(),
                other.first(),
            ));
        }
    }
    lives
}

async fn server(url: &str, grpc: Option<SocketAddr>) -> Server {
    let address = grpc.map_or("127.0.0.1:0".to_owned(), |address| address.to_string());
    Server::start_with(url, &[("CALLER_KEY", KEY), ("GRPC_ADDR", &address)]).await
}

/// So much is written before the next thing happens, in per cent of all; and while it happens, two more.
const STAGES: [u64; 5] = [15, 30, 50, 70, 85];

/// Writing waits here, not for long, until most watchers hear what happens now: those that read only the past would notice little.
async fn most_are_live(work: &Work, place: &Place, stage: usize, watchers: usize) {
    work.reached(ROWS * STAGES[stage] / 100).await;
    let began = Instant::now();
    while place.live.load(Ordering::Relaxed) * 3 < watchers * 2 && began.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (live, waited) = (place.live.load(Ordering::Relaxed), began.elapsed());
    eprintln!("{} row changes, {live} of {watchers} watchers are live after {waited:?}", work.done());
    work.hold_at(STAGES.get(stage + 1).map_or(ROWS, |next| ROWS * next / 100));
    work.reached(ROWS * (STAGES[stage] + 2) / 100).await;
}

/// Pulls everything away from under everybody, once each.
async fn disturb(work: Arc<Work>, place: Arc<Place>, mut private: Private, victim: Server) -> (Private, Server) {
    most_are_live(&work, &place, 1, 9).await;
    eprintln!("a server is killed at {} row changes", work.done());
    let address = victim.grpc;
    victim.program.kill().await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let victim = server(&work.url, Some(address)).await;
    for (stage, how) in [(2, Shutdown::Fast), (3, Shutdown::Immediate)] {
        most_are_live(&work, &place, stage, 9).await;
        eprintln!("PostgreSQL is restarted, {how:?}, at {} row changes", work.done());
        private.restart(how).await;
    }
    most_are_live(&work, &place, 4, 12).await;
    eprintln!("and too much for who does not read");
    let client = work.connect().await;
    place.flood.store(true, Ordering::Relaxed);
    flood(&client, &work).await;
    place.flood.store(false, Ordering::Relaxed);
    (private, victim)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn each_watcher_ends_with_exactly_the_rows_of_the_table() {
    let seed = std::env::var("FEED_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("FEED_SEED={seed}");
    let began = Instant::now();
    let private = Private::start(&[]).await;
    let database = private.database().await;
    let work = Arc::new(Work::new(private.url(), ROWS, seed));
    prepare(&database.admin, &work).await;
    let token = database.token(&Right::ALL, None).await;
    drop(database);
    let (one, mut other) = tokio::join!(server(&work.url, None), server(&work.url, None));
    let servers = vec![one.grpc, other.grpc];
    let door = || Door { servers: servers.clone(), token: token.clone() };

    work.hold_at(ROWS * STAGES[0] / 100);
    let mut writers = JoinSet::new();
    for number in 1..=WRITERS {
        writers.spawn(Writer::new(work.clone(), number).run());
    }
    writers.spawn(door().run(work.clone()));
    let place = Place::new(servers.clone(), token.clone());
    let disturbed = tokio::spawn(disturb(work.clone(), place.clone(), private, one));

    // Some are there from the beginning, some come later.
    let crowd = Crowd { place: place.clone(), work: work.clone() };
    let (mut events, mut sessions, mut calls): (Ends<StoredEvent>, Ends<Session>, Ends<Call>) = Default::default();
    crowd.admit(&mut events, "events of alice", 0, None, RESTLESS);
    crowd.admit(&mut events, "events of bob, drowsy", 1, None, DROWSY);
    crowd.admit(&mut events, "a month's events of alice", 0, Some(1), RESTLESS);
    crowd.admit(&mut sessions, "sessions of alice", 0, None, RESTLESS);
    crowd.admit(&mut sessions, "a month's sessions of bob", 1, Some(1), RESTLESS);
    crowd.admit(&mut calls, "calls of alice", 0, None, RESTLESS);
    crowd.admit(&mut calls, "calls of bob", 1, None, Habits::GOOD);
    most_are_live(&work, &place, 0, 7).await;
    crowd.admit(&mut events, "next month's events of bob", 1, Some(2), RESTLESS);
    crowd.admit(&mut sessions, "sessions of bob", 1, None, Habits::GOOD);
    work.reached(ROWS * 3 / 5).await;
    crowd.admit(&mut events, "late, events of bob", 1, None, RESTLESS);
    crowd.admit(&mut sessions, "late, sessions of alice", 0, None, Habits::GOOD);
    crowd.admit(&mut calls, "late, calls of alice", 0, None, RESTLESS);

    writers.join_all().await;
    let (_private, mut one) = disturbed.await.expect("everything comes back");
    let wrote = began.elapsed();
    let admin = work.connect().await;
    // Calls that something late has touched are matched again by themselves.
    settled(&admin).await;
    eprintln!("written after {wrote:?}, calls settled after {:?}", began.elapsed());
    place.calm.store(true, Ordering::Relaxed);
    write_last(&admin, &work).await;

    let mut wrong = Vec::new();
    let door = door();
    let mut lives = compare(&admin, &door, events, &mut wrong).await;
    lives.extend(compare(&admin, &door, sessions, &mut wrong).await);
    lives.extend(compare(&admin, &door, calls, &mut wrong).await);
    eprintln!("{} row changes in {wrote:?}, everybody has them after {:?}", work.done(), began.elapsed());
    assert!(wrong.is_empty(), "FEED_SEED={seed}\n{}", wrong.join("\n\n"));

    // And it was a disturbed day.
    let sum = |pick: fn(&Life) -> u32| lives.iter().map(pick).sum::<u32>();
    assert!(sum(|life| life.cut_off) > 0, "nobody was cut off: {lives:?}");
    assert!(sum(|life| life.unavailable + life.broken) > 0, "nobody noticed the restarts: {lives:?}");
    assert!(sum(|life| life.left) > 0 && sum(|life| life.stalled) > 0, "everybody behaved: {lives:?}");
    assert!(sum(|life| life.tally.went_on + life.tally.caught_up) > 0, "nobody resumed: {lives:?}");
    for server in [&mut one, &mut other] {
        assert!(!server.program.said().contains("panicked"), "{}", server.program.said());
        server.program.stop(Duration::from_secs(15)).await;
    }
}

async fn settled(admin: &Client) {
    let began = Instant::now();
    loop {
        let waiting =
            "SELECT (SELECT count(*) FROM opsmantik.call_rematches) + (SELECT count(*) FROM opsmantik.late_followers)";
        let waiting: i64 = admin.query_one(waiting, &[]).await.expect("the test's own query").get(0);
        if waiting == 0 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{waiting} calls and followers are never looked at again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
