//! Statements that the server keeps ready, so that it does not read and plan them anew for every batch.
//!
//! That needs a connection that stays ours, see [`super::direct`]; behind a pooler the next transaction may run on another one, where a name means
//! nothing, or means somebody else's statement. There everything is said anew each time.
//!
//! A month is written into a statement that is kept, in the place of its parameter: planned without it, the statement would lock every
//! leaf there is. All else stays a parameter, and is planned without its value: no statement here has another best plan for another
//! value. What is used often enough on any connection is kept on each, and each prepares what it lacks before its next transaction, never within
//! one: statements are sent along with each other there, and their order is what makes them right.
//!
//! Such a session also keeps what most transactions begin with, see [`super::transaction::serving`].

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::statement::Statement;
use super::transaction::serving;

/// Has the server plan anew what it keeps.
pub(super) const PLAN_ANEW: &str = "DISCARD PLANS";
/// A plan that was made while a month was empty would read all of it for ever: until somebody has counted its rows, an index on the site alone
/// looks as good as one that finds a visit. So a connection plans anew after this, and then after twice as long each time, up to the last; and
/// begins again with the first when something new is ready, such as the statements of a month that has just begun.
const PLAN_FIRST: Duration = Duration::from_millis(100);
const PLAN_LAST: Duration = Duration::from_secs(30);
/// Uses after which a statement is worth keeping.
const OFTEN: u32 = 3;
/// Most statements that are kept or counted; then all are forgotten, and those still in use are soon there again.
const MOST: usize = 256;
/// What could not be prepared and may be later is not tried again on the same connection before.
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
    uses: Mutex<Uses>,
    /// Counts the changes of what is wanted: what a connection compares itself with.
    version: AtomicUsize,
}

#[derive(Debug, Default)]
struct Uses {
    counts: HashMap<Kept, u32>,
    wanted: HashSet<Kept>,
}

impl Habits {
    /// It was used and was not ready.
    fn used(&self, kept: Kept) {
        let mut uses = lock(&self.uses);
        if uses.counts.len() >= MOST {
            *uses = Uses::default();
            self.version.fetch_add(1, Ordering::Relaxed);
        }
        let count = uses.counts.entry(kept.clone()).or_default();
        *count = count.saturating_add(1);
        if *count == OFTEN {
            uses.wanted.insert(kept);
            self.version.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It cannot be kept ready, and is not wanted again.
    fn give_up(&self, kept: &Kept) {
        let mut uses = lock(&self.uses);
        uses.counts.insert(kept.clone(), u32::MAX);
        uses.wanted.remove(kept);
    }
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
    /// Whether the session keeps what serving takes.
    serving: AtomicBool,
    here: Mutex<Here>,
}

#[derive(Default)]
struct Here {
    statements: HashMap<Kept, tokio_postgres::Statement>,
    /// The version of what is wanted that has been seen to.
    seen: usize,
    /// When somebody's lock was in the way of preparing; then some are still lacking, and more are not tried meanwhile.
    held_up: Option<Instant>,
    /// When some could not be prepared for another reason that may pass.
    put_off: Option<Instant>,
    plans: Plans,
}

/// When the plans are to be made anew, and how long after that again.
struct Plans {
    at: Instant,
    next: Duration,
}

impl Default for Plans {
    fn default() -> Self {
        Self { at: Instant::now() + PLAN_FIRST, next: PLAN_FIRST * 2 }
    }
}

impl Ready {
    /// For a connection that was opened just now.
    pub fn new(habits: Arc<Habits>) -> Self {
        Self { habits, serving: AtomicBool::new(false), here: Mutex::default() }
    }

    /// Whether the session keeps what serving takes, from transaction to transaction.
    pub fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Relaxed)
    }

    /// Whether the transaction that is about to begin is to have the plans made anew; the next ones are not.
    pub fn is_to_plan_anew(&self) -> bool {
        let mut here = lock(&self.here);
        let due = here.plans.at <= Instant::now();
        if due {
            here.plans = Plans { at: Instant::now() + here.plans.next, next: (here.plans.next * 2).min(PLAN_LAST) };
        }
        due
    }

    /// A statement as it is ready here, or what it would be prepared from; that it was asked for is remembered.
    pub fn find(&self, statement: &'static Statement, params: &[&(dyn ToSql + Sync)]) -> Found {
        let Some(months) = statement.months_of(params) else { return Found::Text((statement.sql)().to_owned()) };
        let kept = Kept { statement, months };
        if let Some(ready) = lock(&self.here).statements.get(&kept) {
            return Found::Ready(ready.clone());
        }
        let sql = kept.sql();
        self.habits.used(kept);
        Found::Text(sql)
    }

    /// Whether the session is to be told what it keeps, or something is wanted that is not here yet.
    pub fn lacks(&self) -> bool {
        if !self.is_serving() {
            return true;
        }
        let here = lock(&self.here);
        match here.held_up {
            Some(at) => at.elapsed() > TRY_AGAIN,
            None => {
                self.habits.version.load(Ordering::Relaxed) != here.seen
                    || here.put_off.is_some_and(|at| at.elapsed() > TRY_AGAIN)
            }
        }
    }

    /// Has the session keep what serving takes, and prepares what is wanted and not here, in transactions of its own that begin with `opening`. What
    /// cannot be prepared runs as before.
    #[allow(clippy::disallowed_methods)] // beside every transaction
    pub async fn fill(&self, client: &Client, opening: &str) -> Result<(), tokio_postgres::Error> {
        if !self.is_serving() {
            client.batch_execute(&serving()).await?;
            self.serving.store(true, Ordering::Relaxed);
        }
        let version = self.habits.version.load(Ordering::Relaxed);
        let wanted = lock(&self.habits.uses).wanted.clone();
        let mut missing: Vec<Kept> = {
            let mut here = lock(&self.here);
            here.statements.retain(|kept, _| wanted.contains(kept));
            wanted.into_iter().filter(|kept| !here.statements.contains_key(kept)).collect()
        };
        let (mut held_up, mut put_off) = (None, None);
        while !missing.is_empty() {
            let (prepared, culprit) = prepare(client, opening, &missing).await?;
            let mut here = lock(&self.here);
            here.plans = Plans::default();
            let asked = std::mem::take(&mut missing);
            for (place, (kept, prepared)) in asked.into_iter().zip(prepared).enumerate() {
                match (prepared, &culprit) {
                    (Some(prepared), _) => drop(here.statements.insert(kept, prepared)),
                    (None, Some((at, error))) if place == *at => {
                        tracing::debug!(%error, statement = kept.statement.name, "a statement cannot be kept ready");
                        match fate(error) {
                            Fate::HeldUp => held_up = Some(Instant::now()),
                            Fate::PutOff => put_off = Some(Instant::now()),
                            Fate::GivenUp => self.habits.give_up(&kept),
                        }
                    }
                    (None, _) => missing.push(kept),
                }
            }
            if held_up.is_some() {
                break;
            }
        }
        let mut here = lock(&self.here);
        (here.seen, here.held_up, here.put_off) = (version, held_up, put_off);
        Ok(())
    }
}

/// Statements as they were prepared, in the order in which they were asked for, and the place of the one that was in the way of those that were not.
type Prepared = (Vec<Option<tokio_postgres::Statement>>, Option<(usize, tokio_postgres::Error)>);

/// Prepares statements in one transaction. The first that fails fails those after it, and those whose types are not known yet: what a type is
/// is asked after all of them.
#[allow(clippy::disallowed_methods)] // beside every other transaction
async fn prepare(client: &Client, opening: &str, wanted: &[Kept]) -> Result<Prepared, tokio_postgres::Error> {
    client.batch_execute(opening).await?;
    let texts: Vec<String> = wanted.iter().map(Kept::sql).collect();
    let asked = wanted.iter().zip(&texts).map(|(kept, sql)| client.prepare_typed(sql, kept.statement.params));
    let answers = futures::future::join_all(asked).await;
    client.batch_execute("ROLLBACK").await?;
    let (mut prepared, mut culprit) = (Vec::with_capacity(wanted.len()), None);
    for (place, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(statement) => prepared.push(Some(statement)),
            Err(error) => {
                prepared.push(None);
                let came_after =
                    |error: &tokio_postgres::Error| error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION);
                if culprit.as_ref().is_none_or(|(_, first)| came_after(first) && !came_after(&error)) {
                    culprit = Some((place, error));
                }
            }
        }
    }
    Ok((prepared, culprit))
}

/// What becomes of a statement that could not be prepared.
enum Fate {
    /// Somebody's lock was in the way, perhaps of others, too.
    HeldUp,
    /// It may be otherwise in a while: nobody has migrated yet, memory was short.
    PutOff,
    GivenUp,
}

fn fate(error: &tokio_postgres::Error) -> Fate {
    let Some(code) = error.code() else { return Fate::HeldUp };
    let locked = [&SqlState::LOCK_NOT_AVAILABLE, &SqlState::QUERY_CANCELED, &SqlState::T_R_DEADLOCK_DETECTED];
    match code.code().get(..2) {
        _ if locked.contains(&code) => Fate::HeldUp,
        Some("42" | "53") => Fate::PutOff,
        _ if *code == SqlState::IN_FAILED_SQL_TRANSACTION => Fate::PutOff,
        _ => Fate::GivenUp,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
