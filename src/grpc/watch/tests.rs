//! A watch against a database that commits, shows, forgets and breaks off at random. Whatever happens, a client that follows the contract
//! ends with exactly the rows that there are; and where nothing broke, no change comes twice and every old value is the one it had.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use prost::Message;
use rand::Rng;
use tokio::sync::{Notify, mpsc};

use super::coverage::{Edge, Key};
use super::rows::{Said, Watched};
use super::sources::{Log, Page, Tables, Unread};
use super::token::{Mark, Tokens};
use super::watcher::{Scope, Watcher};
use crate::domain::change::{Change, Lineage, Position, Snapshot, Table};
use crate::domain::month::Month;
use crate::feed::{Entry, Lost, Step};
use crate::store::columns::{Columns, Unreadable};
use crate::store::watch::{Seen, Span};
use world::{Shared, World, open, site};

mod world;

#[derive(Clone, PartialEq, Message)]
struct Row {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(int64, tag = "2")]
    value: i64,
}

/// A message as its words and its rows.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(string, tag = "1")]
    token: String,
    #[prost(string, tag = "2")]
    said: String,
    #[prost(message, optional, tag = "3")]
    old: Option<Row>,
    #[prost(message, optional, tag = "4")]
    new: Option<Row>,
}

/// A table of the world, with months or without.
struct Toy<const DATED: bool>;

impl<const DATED: bool> Watched for Toy<DATED> {
    const TABLE: Table = if DATED { Table::Events } else { Table::Calls };
    type Row = Row;
    type Answer = Answer;

    fn read(row: &impl Columns) -> Result<Row, Unreadable> {
        shown(row.column("name")?, row.column("value")?).ok_or_else(|| "odd".into())
    }

    fn answer(token: String, said: Said<Row>) -> Answer {
        let answer = |said: &str, old, new| Answer { token, said: said.to_owned(), old, new };
        match said {
            Said::Start => answer("start", None, None),
            Said::There(row) => answer("there", None, Some(row)),
            Said::End => answer("end", None, None),
            Said::Heartbeat => answer("heartbeat", None, None),
            Said::Changed(Change::Insert { new }, _) => answer("insert", None, Some(new)),
            Said::Changed(Change::Update { old, new }, _) => answer("update", Some(old), Some(new)),
            Said::Changed(Change::Delete { old }, _) => answer("delete", Some(old), None),
        }
    }
}

/// The row, unless it is an odd one.
fn shown(name: Vec<u8>, value: i64) -> Option<Row> {
    (value >= 0).then_some(Row { id: name, value })
}

/// The key as the client knows it.
fn named(key: Key) -> Vec<u8> {
    [key.month.map(|month| month.to_string()).unwrap_or_default().as_bytes(), key.id.as_bytes()].concat()
}

struct SomeLog {
    world: Shared,
    position: Position,
    /// Rung when nothing will come any more.
    quiet: Arc<Notify>,
}

impl Log for SomeLog {
    fn lineage(&self) -> Lineage {
        open(&self.world).lineage()
    }

    fn position(&self) -> Position {
        self.position
    }

    fn seek(&mut self, after: Position) -> bool {
        let held = after >= open(&self.world).floor;
        if held {
            self.position = after;
        }
        held
    }

    fn horizon(&self) -> u64 {
        open(&self.world).horizon(self.position)
    }

    fn covers(&self, snapshot: &Snapshot) -> bool {
        open(&self.world).covers(self.position, snapshot)
    }

    fn try_next(&mut self) -> Result<Option<Arc<Entry>>, Lost> {
        let mut world = open(&self.world);
        world.go_on();
        let entry = world.next(self.position)?;
        self.position = entry.as_ref().map_or(self.position, |entry| entry.position);
        Ok(entry)
    }

    async fn next(&mut self) -> Result<Step, Lost> {
        loop {
            {
                let mut world = open(&self.world);
                let goes_on = world.go_on();
                if let Some(entry) = world.next(self.position)? {
                    self.position = entry.position;
                    return Ok(Step::Entry(entry));
                }
                if world.reached > self.position && (!goes_on || world.rng.random_bool(0.3)) {
                    self.position = world.reached;
                    return Ok(Step::Moved);
                }
                if !goes_on {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
        self.quiet.notify_one();
        std::future::pending().await
    }
}

struct SomeTables(Shared);

impl SomeTables {
    async fn seen<V>(&self, what: impl FnOnce(&mut World) -> V) -> Seen<V> {
        tokio::task::yield_now().await;
        let mut world = open(&self.0);
        world.go_on();
        let (snapshot, lsn) = world.moment();
        let what = what(&mut world);
        world.go_on();
        Seen { snapshot, lsn, what }
    }
}

impl<const DATED: bool> Tables<Toy<DATED>> for SomeTables {
    const AGAIN: Duration = Duration::ZERO;

    async fn next_month(&self, from: Option<Month>) -> Result<Seen<Option<Month>>, Unread> {
        let later =
            |world: &mut World| world.months.iter().copied().find(|month| from.is_none_or(|from| *month >= from));
        Ok(self.seen(later).await)
    }

    async fn page(&self, span: Span) -> Result<Seen<Page<Row>>, Unread> {
        let page = |world: &mut World| {
            let limit = world.rng.random_range(1..5);
            let keys = world.rows.iter().filter(|(at, _)| at.site == site(1) && at.key.month == span.month);
            let rows: Vec<_> = keys.filter(|(at, _)| (span.from..=span.to).contains(&at.key.id)).take(limit).collect();
            let end = if rows.len() < limit { span.to } else { rows[limit - 1].0.key.id };
            let changed = rows.into_iter().filter(|(_, (_, xid))| span.since.is_none_or(|since| *xid >= since));
            let rows: Vec<_> = changed.map(|(at, (value, _))| (at.key.id, shown(named(at.key), *value))).collect();
            let odd = rows.iter().any(|(_, row)| row.is_none());
            let rows = rows.into_iter().filter_map(|(id, row)| Some((id, row?))).collect();
            Page { rows, end, odd }
        };
        Ok(self.seen(page).await)
    }

    async fn vanished(&self, month: Option<Month>, since: u64) -> Result<Seen<bool>, Unread> {
        Ok(self.seen(|world| world.vanished(month, since)).await)
    }
}

/// Who does what the contract says, and looks closely.
#[derive(Default)]
struct Client {
    rows: BTreeMap<Vec<u8>, i64>,
    token: Option<String>,
    /// Between a beginning, or a catching-up, and its end.
    catching_up: bool,
    /// Nothing may come twice.
    exact: bool,
}

impl Client {
    fn hear(&mut self, Answer { token, said, old, new }: Answer) {
        assert!(!token.is_empty() && token.len() <= 256);
        self.token = Some(token);
        let had = |rows: &BTreeMap<Vec<u8>, i64>, row: &Row| rows.get(&row.id).copied();
        match (said.as_str(), old, new) {
            ("start", None, None) => {
                self.rows.clear();
                (self.catching_up, self.exact) = (true, true);
            }
            ("end", None, None) => {
                assert!(self.catching_up, "an end of nothing");
                (self.catching_up, self.exact) = (false, true);
            }
            ("heartbeat", None, None) => {}
            ("there", None, Some(new)) => {
                assert!(self.catching_up, "a row of no snapshot");
                assert!(!self.exact || had(&self.rows, &new).is_none(), "shown twice");
                self.rows.insert(new.id, new.value);
            }
            ("insert", None, Some(new)) => {
                assert!(!self.exact || had(&self.rows, &new).is_none(), "inserted twice");
                self.rows.insert(new.id, new.value);
            }
            ("update", Some(old), Some(new)) => {
                assert!(!self.exact || had(&self.rows, &old) == Some(old.value), "another old value");
                assert_eq!(old.id, new.id);
                self.rows.insert(new.id, new.value);
            }
            ("delete", Some(old), None) => {
                assert!(!self.exact || had(&self.rows, &old) == Some(old.value), "deleted twice");
                self.rows.remove(&old.id);
            }
            other => panic!("no message: {other:?}"),
        }
    }
}

/// One world from its beginning to its end, and one client that breaks off and comes back. Tells how often it went on in the log, caught
/// up from the tables, and began anew.
async fn live<const DATED: bool>(seed: u64) -> [usize; 3] {
    let world: Shared = Arc::new(Mutex::new(World::new(seed, DATED)));
    let one_month = DATED && open(&world).rng.random_bool(0.3);
    let scope = Scope { site: site(1), month: one_month.then(|| world::month(2)) };
    let tokens = Tokens::of(Toy::<DATED>::TABLE.name(), scope.site.as_uuid(), scope.month);
    let mut client = Client::default();
    let mut ways = [0; 3];
    let mut visits = 0;
    loop {
        visits += 1;
        assert!(visits < 1000, "it comes to no end");
        let resume = client.token.clone().map(|token| (tokens.open(&token).expect("a token of this watch"), token));
        let (position, left, room) = {
            let mut world = open(&world);
            match world.rng.random_range(0..8) {
                0 => world.timeline += 1,
                1..4 => world.forget(),
                _ => {}
            }
            let left = if world.steps > 0 { world.rng.random_range(0..40) } else { usize::MAX };
            if let Some((mark, _)) = &resume {
                let in_log = mark.lineage == world.lineage() && mark.position >= world.floor;
                (client.exact, client.catching_up) =
                    (in_log && mark.shown == Edge::End, !in_log || mark.shown != Edge::End);
                ways[if in_log { 0 } else { 1 }] += 1;
            }
            (world.reached, left, world.rng.random_range(1..4))
        };
        let (out, mut answers) = mpsc::channel(room);
        let quiet = Arc::new(Notify::new());
        let log = SomeLog { world: world.clone(), position, quiet: quiet.clone() };
        let watcher = Watcher::<Toy<DATED>, _, _>::new(scope, log, SomeTables(world.clone()), out);
        let task = tokio::spawn(watcher.run(resume));
        let mut idle = false;
        for _ in 0..left {
            let answer = tokio::select! {
                biased;
                answer = answers.recv() => answer,
                () = quiet.notified() => {
                    idle = true;
                    None
                }
            };
            let Some(answer) = answer else { break };
            ways[2] += usize::from(answer.said == "start");
            client.hear(answer);
        }
        task.abort();
        match task.await {
            Ok(_) => {}
            Err(ended) if ended.is_cancelled() => {}
            Err(broken) => std::panic::resume_unwind(broken.into_panic()),
        }
        if idle && open(&world).steps == 0 {
            break;
        }
    }
    assert!(!client.catching_up);
    let world = open(&world);
    let there = world.rows.iter().filter(|(at, (value, _))| {
        at.site == scope.site && *value >= 0 && scope.month.is_none_or(|month| at.key.month == Some(month))
    });
    let there: BTreeMap<Vec<u8>, i64> = there.map(|(at, (value, _))| (named(at.key), *value)).collect();
    assert_eq!(client.rows, there);
    ways
}

fn alone(run: impl Future<Output = [usize; 3]>) -> [usize; 3] {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime").block_on(run)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_client_ends_with_the_rows_that_there_are(seed: u64) {
        alone(live::<true>(seed));
        alone(live::<false>(seed));
    }
}

/// As after a backup was restored: the same system and timeline, and the client has seen what was never written here.
#[tokio::test]
async fn a_token_from_beyond_the_end_of_the_log_begins_anew() {
    let world: Shared = Arc::new(Mutex::new(World::new(1, false)));
    while open(&world).go_on() {}
    let scope = Scope { site: site(1), month: None };
    let (position, lineage, horizon) = {
        let mut world = open(&world);
        let (snapshot, lsn) = world.moment();
        (Position { lsn: lsn + 1_000_000, seq: 1 }, world.lineage(), snapshot.xmin)
    };
    let mark = Mark { lineage, position, halved: false, horizon, shown: Edge::End, had: None };
    let token = Tokens::of(Toy::<false>::TABLE.name(), scope.site.as_uuid(), scope.month).seal(&mark);
    let (out, mut answers) = mpsc::channel(1);
    let reached = open(&world).reached;
    let log = SomeLog { world: world.clone(), position: reached, quiet: Arc::default() };
    let watcher = Watcher::<Toy<false>, _, _>::new(scope, log, SomeTables(world), out);
    let task = tokio::spawn(watcher.run(Some((mark, token))));
    let first =
        tokio::time::timeout(Duration::from_secs(5), answers.recv()).await.expect("it does not wait for that place");
    assert_eq!(first.map(|answer| answer.said).as_deref(), Some("start"));
    task.abort();
}

#[test]
fn the_worlds_lead_down_every_way() {
    let mut ways = [0; 3];
    for seed in 0..60 {
        let more = alone(live::<true>(seed));
        ways = std::array::from_fn(|at| ways[at] + more[at]);
    }
    assert!(ways.iter().all(|times| *times >= 10), "{ways:?}");
}
