//! What was answered, held against what is stored; and one database held against another.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::doors::{Said, Work};
use crate::report::Report;
use crate::world::{Door, World};

/// What clients heard.
#[derive(Default)]
pub struct Ledger {
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    events: HashSet<u32>,
    calls: HashSet<u32>,
    refused: u64,
    broken: u64,
    without_when: u64,
    odd: BTreeMap<String, u64>,
    slowest: Duration,
}

impl Book {
    fn heard(&mut self, began: Instant, said: &Said) -> bool {
        match said {
            Said::Nothing => self.broken += 1,
            Said::Later { told_when } => {
                self.refused += 1;
                self.without_when += u64::from(!told_when);
            }
            Said::Odd(text) => *self.odd.entry(text.clone()).or_default() += 1,
            Said::Yes => {}
        }
        if *said != Said::Nothing {
            self.slowest = self.slowest.max(began.elapsed());
        }
        *said == Said::Yes
    }
}

impl Ledger {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn event(&self, n: u32, began: Instant, said: Said) {
        let mut book = self.book();
        if book.heard(began, &said) {
            book.events.insert(n);
        }
    }

    pub fn call(&self, n: u32, began: Instant, said: Said) {
        let mut book = self.book();
        if book.heard(began, &said) {
            book.calls.insert(n);
        }
    }

    /// Events and calls that were answered as stored.
    pub fn answered(&self) -> usize {
        let book = self.book();
        book.events.len() + book.calls.len()
    }

    pub fn answered_work(&self) -> Work {
        let book = self.book();
        Work { events: book.events.iter().copied().collect(), calls: book.calls.iter().copied().collect() }
    }

    /// They are to be answered anew.
    pub fn forget(&self, work: &Work) {
        let mut book = self.book();
        book.events.retain(|n| !work.events.contains(n));
        book.calls.retain(|n| !work.calls.contains(n));
    }

    pub fn unanswered(&self, of: &Work) -> Work {
        let book = self.book();
        Work {
            events: of.events.iter().copied().filter(|n| !book.events.contains(n)).collect(),
            calls: of.calls.iter().copied().filter(|n| !book.calls.contains(n)).collect(),
        }
    }

    /// Adds what was heard to a row's report, and complains of what should not have been said.
    pub fn tell(&self, report: &mut Report) {
        let book = self.book();
        report.refused += book.refused;
        report.waited(book.slowest);
        report.demand(book.without_when == 0, format!("{} refusals did not say when to come again", book.without_when));
        for (text, times) in book.odd.iter().take(5) {
            report.demand(false, format!("{times} times: {text}"));
        }
        report.note(format!("{} requests were left without an answer by a broken connection", book.broken));
    }
}

/// What is in the tables.
#[derive(Debug, Default)]
pub struct Stored {
    events: HashSet<u32>,
    calls: HashSet<u32>,
    pub doubled: u64,
    pub rows: u64,
}

impl Stored {
    pub async fn read(admin: &Client) -> Self {
        let mut stored = Self::default();
        for row in admin.query("SELECT id FROM events", &[]).await.expect("the row's own query") {
            stored.rows += 1;
            let n = u32::try_from(row.get::<_, Uuid>(0).as_u128()).expect("the row's own id");
            stored.doubled += u64::from(!stored.events.insert(n));
        }
        for row in admin.query("SELECT provider_call_id FROM calls", &[]).await.expect("the row's own query") {
            stored.rows += 1;
            let n = row.get::<_, String>(0).parse().expect("the row's own id");
            stored.doubled += u64::from(!stored.calls.insert(n));
        }
        stored
    }

    /// How many of these are not there.
    pub fn missing(&self, of: &Work) -> u64 {
        let events = of.events.iter().filter(|n| !self.events.contains(n)).count();
        (events + of.calls.iter().filter(|n| !self.calls.contains(n)).count()) as u64
    }
}

/// No session counts more or less than is stored of it, and nothing has died.
pub async fn sessions_count(admin: &Client, report: &mut Report) {
    let miscounted = "SELECT count(*) FROM sessions s WHERE event_count <> (SELECT count(*) FROM events e \
        WHERE (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id))";
    for (query, what) in [
        (miscounted, "sessions count what is not there"),
        (
            "SELECT count(*) FROM (SELECT FROM sessions GROUP BY site_id, id HAVING count(*) > 1) AS t",
            "visits have two sessions",
        ),
        ("SELECT count(*) FROM dead_letters", "dead letters"),
    ] {
        let count = count(admin, query).await;
        report.demand(count == 0, format!("{count} {what}"));
    }
}

pub async fn count(admin: &Client, query: &str) -> i64 {
    admin.query_one(query, &[]).await.expect("the row's own query").get(0)
}

/// Waits until nothing of a server works in the database any more: what was under way when its client died may still commit.
pub async fn at_rest(admin: &Client) {
    let began = Instant::now();
    let working = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'opsmantik' \
        AND state <> 'idle' AND backend_type = 'client backend'";
    while count(admin, working).await > 0 && began.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until no call and no follower of a paid visit is left that something late has touched.
pub async fn calls_settled(admin: &Client) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let waiting =
            "SELECT (SELECT count(*) FROM opsmantik.call_rematches) + (SELECT count(*) FROM opsmantik.late_followers)";
        let waiting = count(admin, waiting).await;
        if waiting == 0 {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(30) {
            return Err(format!("{waiting} calls and followers are never looked at again"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// All of the traffic that is a function of the distinct events: without what is the moment at which some server heard of them.
async fn timeless(admin: &Client, world: &World) -> [BTreeMap<String, Value>; 3] {
    let own_time = |id: &str| {
        let n = id.parse::<Uuid>().ok().and_then(|id| u32::try_from(id.as_u128()).ok()).expect("the row's own id");
        world.event(n).door.takes_its_own_time()
    };
    let mut events = rows(admin, "SELECT id::text AS k, to_jsonb(t) - 'received_at' FROM events t").await;
    // Sessions that had such an event, by id.
    let mut edged: HashSet<String> = HashSet::new();
    for (id, row) in &mut events {
        if own_time(id) {
            edged.insert(row["session_id"].as_str().unwrap_or_default().to_owned());
            row.as_object_mut().expect("a row").remove("created_at");
        }
    }
    let mut sessions = rows(admin, "SELECT id::text AS k, to_jsonb(t) FROM sessions t").await;
    for (id, row) in &mut sessions {
        if edged.contains(id) {
            let row = row.as_object_mut().expect("a row");
            row.retain(|column, _| !matches!(column.as_str(), "created_at" | "last_seen_at"));
        }
    }
    let calls = "SELECT provider_call_id AS k, to_jsonb(t) - '{matched_at,created_at,updated_at}'::text[] FROM calls t";
    [sessions, events, rows(admin, calls).await]
}

async fn rows(admin: &Client, query: &str) -> BTreeMap<String, Value> {
    let rows = admin.query(query, &[]).await.expect("the row's own query");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Holds a database against one that nothing has disturbed.
pub async fn compare(disturbed: &Client, undisturbed: &Client, world: &World, report: &mut Report) {
    for admin in [disturbed, undisturbed] {
        if let Err(why) = calls_settled(admin).await {
            report.demand(false, why);
        }
    }
    let (is, should) = (timeless(disturbed, world).await, timeless(undisturbed, world).await);
    let mut sizes = Vec::new();
    for (table, (is, should)) in ["sessions", "events", "calls"].iter().zip(is.iter().zip(&should)) {
        sizes.push(format!("{} {table}", is.len()));
        report.demand(is.len() == should.len(), format!("{table}: {} rows, undisturbed {}", is.len(), should.len()));
        let other: Vec<_> = should.iter().filter(|(key, row)| is.get(*key) != Some(row)).collect();
        if let Some((key, row)) = other.first() {
            let difference = differing(is.get(*key), row);
            report.demand(
                false,
                format!("{table}: {} rows differ from the undisturbed run; {key}: {difference}", other.len()),
            );
        }
    }
    report.note(format!("compared with an undisturbed run: {}", sizes.join(", ")));
    let matched = count(disturbed, "SELECT count(*) FROM calls WHERE match_method IN ('CLICK', 'FINGERPRINT')").await;
    report.note(format!("{matched} calls found their visit"));
    report.demand(matched > 0, "no call found its visit: the comparison says nothing of matching");
}

fn differing(is: Option<&Value>, should: &Value) -> String {
    let Some(is) = is else { return "missing".to_owned() };
    let columns = should.as_object().into_iter().flatten();
    let columns = columns.filter(|(name, value)| is.get(name.as_str()) != Some(value));
    let texts: Vec<String> =
        columns.map(|(name, value)| format!("{name} is {}, undisturbed {value}", is[name.as_str()])).collect();
    texts.join("; ").chars().take(600).collect()
}

/// The doors that a piece of work takes; for a row that wants all of them.
pub fn doors_of(world: &World, work: &Work) -> HashSet<Door> {
    work.events.iter().map(|n| world.event(*n).door).collect()
}
