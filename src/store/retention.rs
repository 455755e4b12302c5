//! The end of a month: detached, concurrently, then dropped, so that nobody who reads or writes other months waits for it.
//!
//! Every step is looked up in the catalog and not remembered: a run that was killed anywhere is finished by the next. What other
//! transactions hold is waited for without standing in a queue for long, because whoever came later would stand behind us: by short
//! attempts, each of which locks leaves of this month and nothing else.
//!
//! DDL, by the role that owns the tables, on a connection of its own.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use super::Store;
use super::partitions::{Leaf, LeafState};
use crate::domain::month::Month;

/// Held by the one that drops months; any fixed number will do.
const DROP_LOCK: i64 = 0x6f70_736d_6472_6f70;
/// While a step waits for a lock, whoever wants the same lock waits behind it: at most so long.
const DETACH_LOCK_TIMEOUT: &str = "1s";
const FINALIZE_LOCK_TIMEOUT: &str = "500ms";
const DROP_LOCK_TIMEOUT: &str = "500ms";
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(300);
/// A month that events bring back while it goes is taken away again this often.
const MOST_RETURNS: u32 = 5;

/// Why months cannot be dropped, or not now.
#[derive(Debug, thiserror::Error)]
pub enum DropError {
    #[error("cannot connect to the database: {0}")]
    Connect(#[source] tokio_postgres::Error),
    #[error("{role} does not own the tables: connect as {owner}, as whom the schema was migrated")]
    NotOwner { role: String, owner: String },
    #[error("another run drops months at this moment")]
    Busy,
    #[error(
        "{0} is a DEFAULT partition: beside it no month can be detached without locking everybody out; move its rows and drop it"
    )]
    DefaultPartition(String),
    #[error("gave up at {0}: {1}. What is done is done, run it again")]
    InTheWay(String, String),
    #[error(
        "{0} is the month of the database's clock, the one before it, or one to come: it stays, whatever the clock here says"
    )]
    TooYoung(Month),
    #[error("events keep bringing {0} back: stop importing into it, then run it again")]
    ComesBack(Month),
    #[error("{0}: {1}")]
    Refused(String, #[source] tokio_postgres::Error),
    #[error("the catalog cannot be read: {0}")]
    Unreadable(String),
}

/// What a run has done, or waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Detached(String),
    /// A detaching that an earlier run has begun.
    Finished(String),
    Dropped(String),
    Waiting {
        at: String,
        for_what: String,
    },
}

/// Drops months. The one of its database: no second one can be opened.
pub struct Dropper {
    client: Client,
    /// When waiting ends.
    deadline: Instant,
}

/// What is next for a month.
#[derive(Debug, PartialEq, Eq)]
enum Next<'l> {
    Detach(&'l Leaf),
    Finalize(&'l Leaf),
    Drop(Vec<&'l Leaf>),
    Nothing,
}

/// Events first: they refer to sessions, and a visit without its events would look like one that did nothing.
fn next(leaves: &[Leaf]) -> Next<'_> {
    let ours = || leaves.iter().filter(|leaf| leaf.ours);
    let attached = |table: &str| ours().find(|leaf| leaf.table == table && leaf.state != LeafState::Detached);
    match attached("events").or_else(|| attached("sessions")) {
        Some(leaf) if leaf.state == LeafState::Pending => Next::Finalize(leaf),
        Some(leaf) => Next::Detach(leaf),
        None if ours().next().is_none() => Next::Nothing,
        None => Next::Drop(ours().collect()),
    }
}

impl Store {
    /// Opens the way to drop months, which waits for others at most until `deadline`.
    pub async fn dropper(&self, deadline: Instant) -> Result<Dropper, DropError> {
        let dropper = Dropper { client: self.manager.open().await.map_err(DropError::Connect)?, deadline };
        // A server that is killed here should notice there, also while a statement waits.
        for setting in [
            "SET TIME ZONE 'UTC'",
            "SET datestyle = 'ISO, YMD'",
            "SET statement_timeout = 0",
            "SET client_connection_check_interval = '1s'",
        ] {
            dropper.sql("prepare", setting).await?;
        }
        let owner = "SELECT current_user, pg_get_userbyid(relowner), pg_has_role(current_user, relowner, 'USAGE') FROM pg_class \
             WHERE oid IN ('public.sessions'::regclass, 'public.events'::regclass) ORDER BY 3";
        for row in dropper.sql("look for the owner", owner).await? {
            if text(&row, 2)? != "t" {
                return Err(DropError::NotOwner { role: text(&row, 0)?, owner: text(&row, 1)? });
            }
        }
        let lock = dropper.sql("lock", &format!("SELECT pg_try_advisory_lock({DROP_LOCK})")).await?;
        if text_of(&lock)? != "t" {
            return Err(DropError::Busy);
        }
        let default = "SELECT partdefid::regclass FROM pg_partitioned_table WHERE partdefid <> 0 \
             AND partrelid IN ('public.sessions'::regclass, 'public.events'::regclass)";
        if let Some(row) = dropper.sql("look for a default partition", default).await?.first() {
            return Err(DropError::DefaultPartition(text(row, 0)?));
        }
        Ok(dropper)
    }
}

impl Dropper {
    /// Drops what there is of a month, as far as it is ours, and tells each step; true if there was anything.
    pub async fn drop_month(&mut self, month: Month, mut tell: impl FnMut(Step)) -> Result<bool, DropError> {
        // The caller has judged by its own clock; the rows of today go by the database's.
        let now = self.sql("look at the clock", "SELECT (now() AT TIME ZONE 'UTC')::date::text").await?;
        let now: Month =
            text_of(&now)?.parse().map_err(|error| DropError::Unreadable(format!("its clock: {error}")))?;
        if month >= now.previous() {
            return Err(DropError::TooYoung(month));
        }
        let mut detached = HashSet::new();
        let mut returns = 0;
        let mut any = false;
        loop {
            let leaves = self.leaves(month).await?;
            let (at, done) = match next(&leaves) {
                Next::Nothing => return Ok(any),
                Next::Detach(leaf) => {
                    (format!("detaching {}", leaf.name), self.detach(leaf, "CONCURRENTLY", DETACH_LOCK_TIMEOUT).await)
                }
                Next::Finalize(leaf) => {
                    (format!("detaching {}", leaf.name), self.detach(leaf, "FINALIZE", FINALIZE_LOCK_TIMEOUT).await)
                }
                Next::Drop(leaves) => {
                    let names: Vec<&str> = leaves.iter().map(|leaf| leaf.name.as_str()).collect();
                    (format!("dropping {}", names.join(" and ")), self.drop_leaves(month, &leaves).await)
                }
            };
            match done {
                Ok(steps) => {
                    any = true;
                    for step in steps {
                        if let Step::Detached(leaf) | Step::Finished(leaf) = &step
                            && !detached.insert(leaf.clone())
                        {
                            returns += 1;
                        }
                        tell(step);
                    }
                    if returns > MOST_RETURNS {
                        return Err(DropError::ComesBack(month));
                    }
                }
                Err(DropError::Refused(_, error)) if passes(&error) => {
                    let why = error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned());
                    self.wait(at, format!("other transactions ({why})"), &mut tell).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn wait(&self, at: String, for_what: String, tell: &mut impl FnMut(Step)) -> Result<(), DropError> {
        if Instant::now() >= self.deadline {
            return Err(DropError::InTheWay(at, format!("waited too long for {for_what}")));
        }
        tell(Step::Waiting { at, for_what });
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    async fn leaves(&self, month: Month) -> Result<Vec<Leaf>, DropError> {
        let look = format!(
            "SELECT tab, leaf, state, ours, estimate, bytes FROM opsmantik.leaf_states() WHERE month = '{month}'"
        );
        let number = |text: String| text.parse().map_err(|_| DropError::Unreadable(text));
        let read = |row: &SimpleQueryRow| {
            let state = text(row, 2)?;
            Ok(Leaf {
                table: text(row, 0)?,
                name: text(row, 1)?,
                month,
                state: LeafState::from_name(&state).ok_or(DropError::Unreadable(state))?,
                ours: text(row, 3)? == "t",
                rows: number(text(row, 4)?)?,
                bytes: number(text(row, 5)?)?,
            })
        };
        self.sql("look at the leaves", &look).await?.iter().map(read).collect()
    }

    async fn detach(&self, leaf: &Leaf, how: &str, lock_timeout: &str) -> Result<Vec<Step>, DropError> {
        self.sql("prepare", &format!("SET lock_timeout = '{lock_timeout}'")).await?;
        let Leaf { name, table, .. } = leaf;
        let alter = format!("ALTER TABLE public.{} DETACH PARTITION public.{} {how}", quoted(table), quoted(name));
        self.sql(&format!("detach {name}"), &alter).await?;
        // Only now its rows are gone for everybody: who reads the mark and looks again does not see them. A run that is killed before it
        // leaves that to whoever looks next.
        self.note().await?;
        let name = name.clone();
        Ok(vec![if leaf.state == LeafState::Pending { Step::Finished(name) } else { Step::Detached(name) }])
    }

    async fn note(&self) -> Result<(), DropError> {
        self.sql("note what vanished", "SELECT opsmantik.note_leaves()").await.map(drop)
    }

    /// Drops them, together, unless an event has brought one back meanwhile.
    async fn drop_leaves(&self, month: Month, leaves: &[&Leaf]) -> Result<Vec<Step>, DropError> {
        self.sql("begin", "BEGIN ISOLATION LEVEL READ COMMITTED").await?;
        let done = self.drop_in_transaction(month, leaves).await;
        match done {
            Ok(true) => {
                self.sql("commit", "COMMIT").await?;
                Ok(leaves.iter().map(|leaf| Step::Dropped(leaf.name.clone())).collect())
            }
            Ok(false) => self.sql("rollback", "ROLLBACK").await.map(|_| Vec::new()),
            Err(error) => {
                self.sql("rollback", "ROLLBACK").await?;
                Err(error)
            }
        }
    }

    async fn drop_in_transaction(&self, month: Month, leaves: &[&Leaf]) -> Result<bool, DropError> {
        self.sql("prepare", &format!("SET LOCAL lock_timeout = '{DROP_LOCK_TIMEOUT}'")).await?;
        // With this lock nobody attaches a month.
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended('opsmantik.ensure_month', 0))";
        self.sql("lock", lock).await?;
        if self.leaves(month).await?.iter().any(|leaf| leaf.state != LeafState::Detached) {
            return Ok(false);
        }
        // One that was detached by hand, or by a run that was killed then.
        self.note().await?;
        let names: Vec<String> = leaves.iter().map(|leaf| format!("public.{}", quoted(&leaf.name))).collect();
        self.sql(&format!("drop {}", names.join(", ")), &format!("DROP TABLE {}", names.join(", "))).await?;
        Ok(true)
    }

    /// Runs one statement outside of any other; its rows as text.
    #[allow(clippy::disallowed_methods)] // DDL, by the owner, outside the pool
    async fn sql(&self, what: &str, sql: &str) -> Result<Vec<SimpleQueryRow>, DropError> {
        let told = self.client.simple_query(sql).await.map_err(|error| DropError::Refused(what.to_owned(), error))?;
        Ok(told
            .into_iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => Some(row),
                _ => None,
            })
            .collect())
    }
}

/// Whether another transaction was in the way: a lock, or the same leaf that it attached, detached or dropped.
fn passes(error: &tokio_postgres::Error) -> bool {
    [
        SqlState::LOCK_NOT_AVAILABLE,
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        SqlState::OBJECT_IN_USE,
        SqlState::UNDEFINED_TABLE,
        SqlState::WRONG_OBJECT_TYPE,
    ]
    .iter()
    .any(|code| error.code() == Some(code))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn text(row: &SimpleQueryRow, column: usize) -> Result<String, DropError> {
    let value = row.try_get(column).map_err(|error| DropError::Unreadable(error.to_string()))?;
    value.map(str::to_owned).ok_or_else(|| DropError::Unreadable(format!("column {column} is NULL")))
}

fn text_of(rows: &[SimpleQueryRow]) -> Result<String, DropError> {
    rows.first().map_or_else(|| Err(DropError::Unreadable("no row".to_owned())), |row| text(row, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(table: &str, state: LeafState, ours: bool) -> Leaf {
        let month = "2025-01-01".parse().expect("a month");
        Leaf { name: format!("{table}_2025_01"), table: table.to_owned(), month, state, ours, rows: 0, bytes: 0 }
    }

    #[test]
    fn events_go_before_sessions_and_both_are_detached_before_one_is_dropped() {
        use LeafState::{Attached, Detached, Pending};
        let of = |sessions, events| [leaf("sessions", sessions, true), leaf("events", events, true)];
        let both = of(Attached, Attached);
        assert_eq!(next(&both), Next::Detach(&both[1]));
        let halfway = of(Attached, Pending);
        assert_eq!(next(&halfway), Next::Finalize(&halfway[1]));
        let one = of(Attached, Detached);
        assert_eq!(next(&one), Next::Detach(&one[0]));
        let none = of(Detached, Detached);
        assert_eq!(next(&none), Next::Drop(none.iter().collect()));
        let strangers = [leaf("events", Detached, false)];
        assert_eq!((next(&strangers), next(&[])), (Next::Nothing, Next::Nothing));
    }
}
