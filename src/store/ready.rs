//! Statements that the server keeps ready, so that it does not read and plan them anew for every batch.
//!
//! That needs a connection that stays ours. Behind a transaction pooler the next transaction may run on another one, where a name means nothing, or
//! means somebody else's statement. So a connection says at its start a word that only the server behind it can repeat, and only one where it
//! does is *direct*; what does not let the word through is taken for a pooler, and everything runs there as it always did.
//!
//! A month is written into a statement on such a connection, in the place of its parameter: planned without it, the statement would lock every
//! leaf there is. All else stays a parameter, and is planned without its value ([`GENERIC`]): no statement here has another best plan for another
//! value. What is used often enough on any connection is kept on each, and each prepares what it lacks before its next transaction, never within
//! one: statements are sent along with each other there, and their order is what makes them right.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::statement::Statement;

/// The setting that carries the word.
const WORD: &str = "opsmantik.direct";
/// What a transaction says whose statements are ready.
const GENERIC: &str = "SET LOCAL plan_cache_mode = force_generic_plan";
/// Has the server plan anew what it keeps.
const PLAN_ANEW: &str = "DISCARD PLANS";
/// A plan that was made while a month was empty would read all of it for ever: until somebody has counted its rows, an index on the site alone
/// looks as good as one that finds a visit. So a connection plans anew after this, and then after twice as long each time, up to the last.
const PLAN_FIRST: Duration = Duration::from_millis(100);
const PLAN_LAST: Duration = Duration::from_secs(30);
/// Uses after which a statement is worth keeping.
const OFTEN: u32 = 3;
/// Most statements that are kept or counted; then all are forgotten, and those still in use are soon there again.
const MOST: usize = 256;
/// What could not be prepared is not tried again on the same connection before.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// A statement, and the months that are written into it, as SQL.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kept {
    statement: &'static Statement,
    months: Vec<String>,
}

impl Kept {
    fn sql(&self) -> String {
        self.statement.with_months(&self.months)
    }
}

/// What is used often, of all connections of a pool.
#[derive(Debug, Default)]
pub(super) struct Habits {
    inside: Mutex<Inside>,
    /// Counts the changes of what is wanted: what a connection compares itself with.
    version: AtomicUsize,
    pooler: AtomicBool,
}

#[derive(Debug, Default)]
struct Inside {
    uses: HashMap<Kept, u32>,
    wanted: Vec<Kept>,
}

impl Habits {
    /// It was used and was not ready.
    fn used(&self, kept: Kept) {
        let mut inside = lock(&self.inside);
        if inside.uses.len() >= MOST {
            *inside = Inside::default();
            self.version.fetch_add(1, Ordering::Relaxed);
        }
        let uses = inside.uses.entry(kept.clone()).or_default();
        *uses = uses.saturating_add(1);
        if *uses == OFTEN {
            inside.wanted.push(kept);
            self.version.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether there is a pooler between, as far as we know.
    pub fn behind_pooler(&self) -> bool {
        self.pooler.load(Ordering::Relaxed)
    }

    /// Whether a refused connection is refused for the word; then it is not said again.
    pub fn refused(&self, error: &tokio_postgres::Error) -> bool {
        let codes = [&SqlState::PROTOCOL_VIOLATION, &SqlState::FEATURE_NOT_SUPPORTED];
        let refused = error.code().is_some_and(|code| codes.contains(&code));
        if refused {
            self.pooler.store(true, Ordering::Relaxed);
        }
        refused
    }
}

/// A word for one connection, and the option that says it.
pub(super) fn word() -> (String, String) {
    let word = uuid::Uuid::new_v4().simple().to_string();
    let option = format!("-c {WORD}={word}");
    (word, option)
}

/// How a statement is to be run.
pub(super) enum Found {
    Ready(tokio_postgres::Statement),
    /// As SQL, with its months in it.
    Text(String),
}

/// What is ready on one connection.
pub(super) struct Ready {
    habits: Arc<Habits>,
    statements: Mutex<HashMap<Kept, tokio_postgres::Statement>>,
    /// The version of what is wanted that has been seen to.
    seen: AtomicUsize,
    /// When something could not be prepared; then it is still lacking.
    failed: Mutex<Option<Instant>>,
    plans: Mutex<Plans>,
}

/// When the plans are to be made anew, and how long after that again.
struct Plans {
    until: Instant,
    next: Duration,
}

impl Ready {
    /// None if the server does not know the word: there is something between.
    #[allow(clippy::disallowed_methods)] // no transaction is open yet
    pub async fn on(client: &Client, word: &str, habits: Arc<Habits>) -> Result<Option<Self>, tokio_postgres::Error> {
        let ask = format!("SELECT current_setting('{WORD}', true)");
        let said = client.query_typed(&ask, &[]).await?;
        let heard: Option<&str> = said.first().and_then(|row| row.try_get(0).ok());
        if heard != Some(word) {
            return Ok(None);
        }
        let (statements, seen, failed) = (Mutex::default(), AtomicUsize::new(0), Mutex::default());
        let plans = Mutex::new(Plans { until: Instant::now() + PLAN_FIRST, next: PLAN_FIRST * 2 });
        Ok(Some(Self { habits, statements, seen, failed, plans }))
    }

    /// `opening` of a transaction as it is on this connection.
    pub fn opening(&self, opening: &str) -> String {
        let mut plans = lock(&self.plans);
        if plans.until > Instant::now() {
            return format!("{opening}; {GENERIC}");
        }
        *plans = Plans { until: Instant::now() + plans.next, next: (plans.next * 2).min(PLAN_LAST) };
        format!("{PLAN_ANEW}; {opening}; {GENERIC}")
    }

    /// A statement as it is ready here, or what it would be prepared from; that it was asked for is remembered.
    pub fn find(&self, statement: &'static Statement, params: &[&(dyn ToSql + Sync)]) -> Found {
        let Some(months) = statement.months_of(params) else { return Found::Text((statement.sql)().to_owned()) };
        let kept = Kept { statement, months };
        if let Some(ready) = lock(&self.statements).get(&kept) {
            return Found::Ready(ready.clone());
        }
        let sql = kept.sql();
        self.habits.used(kept);
        Found::Text(sql)
    }

    /// Whether something is wanted that is not here yet.
    pub fn lacks(&self) -> bool {
        match *lock(&self.failed) {
            Some(at) => at.elapsed() > TRY_AGAIN,
            None => self.habits.version.load(Ordering::Relaxed) != self.seen.load(Ordering::Relaxed),
        }
    }

    /// Prepares what is wanted and not here, in a transaction of its own that begins with `opening`. What cannot be prepared runs as before.
    #[allow(clippy::disallowed_methods)] // beside every other transaction
    pub async fn fill(&self, client: &Client, opening: &str) -> Result<(), tokio_postgres::Error> {
        let version = self.habits.version.load(Ordering::Relaxed);
        let wanted = lock(&self.habits.inside).wanted.clone();
        let missing: Vec<Kept> = {
            let statements = lock(&self.statements);
            wanted.iter().filter(|kept| !statements.contains_key(kept)).cloned().collect()
        };
        client.batch_execute(opening).await?;
        let texts: Vec<String> = missing.iter().map(Kept::sql).collect();
        let asked = missing.iter().zip(&texts).map(|(kept, sql)| client.prepare_typed(sql, kept.statement.params));
        let prepared = futures::future::join_all(asked).await;
        client.batch_execute("COMMIT").await?;
        let mut failed = None;
        for (kept, prepared) in missing.into_iter().zip(prepared) {
            match prepared {
                Ok(statement) => drop(lock(&self.statements).insert(kept, statement)),
                Err(error) => failed = Some((kept.statement.name, error)),
            }
        }
        self.seen.store(version, Ordering::Relaxed);
        if let Some((name, error)) = &failed {
            tracing::debug!(%error, statement = name, "a statement cannot be kept ready");
        }
        *lock(&self.failed) = failed.map(|_| Instant::now());
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
