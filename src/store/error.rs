//! What can go wrong in the store, as a closed set, with the operation that failed.
//!
//! The class is chosen by SQLSTATE, in this one place. The layers above decide by [`Fault`] only; the source stays for the log.

use std::fmt;

use tokio_postgres::error::SqlState;

/// What a failure means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The database is away, full, read-only, too slow, or not (yet) what we expect. Try again later.
    Away,
    /// Another transaction was in the way (serialization, deadlock, lock time-out). Try again at once.
    Conflict,
    /// The row's month has no partition.
    MissingPartition,
    /// The row's site does not exist.
    UnknownSite,
    /// PostgreSQL will never take this row.
    Refused,
}

/// A failed operation of the store.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {detail}")]
pub struct StoreError {
    /// The statement or step.
    pub operation: &'static str,
    pub fault: Fault,
    /// SQLSTATE and PostgreSQL's message, without the row's values.
    pub detail: Detail,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// A short account of a failure that may be logged and kept.
#[derive(Debug, Clone)]
pub struct Detail(String);

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StoreError {
    pub(super) fn of(operation: &'static str, error: tokio_postgres::Error) -> Self {
        let detail = match error.as_db_error() {
            Some(db) if no_schema(operation, db.code()) => {
                format!("{NO_SCHEMA} ({} {})", db.code().code(), db.message())
            }
            Some(db) => format!("{} {}", db.code().code(), db.message()),
            None => error.to_string(),
        };
        // Before a transaction has begun nothing has been said of any row.
        let fault = if operation == BEGIN { Fault::Away } else { classify(&error) };
        Self { operation, fault, detail: Detail(detail), source: Some(Box::new(error)) }
    }

    /// Whether the database answers, but nobody has migrated it yet, or not far enough for this program.
    pub fn is_missing_schema(&self) -> bool {
        self.code().is_some_and(|code| no_schema(self.operation, code))
    }

    /// Whether a look at the database tells of it, too: it is not there, or takes no writes and says so. It does not tell of a full disk, a
    /// lock that somebody holds, or statements that outlast their bound.
    pub(super) fn shows(&self) -> bool {
        let Some(source) = &self.source else { return self.operation == CONNECT };
        let error = source.downcast_ref::<tokio_postgres::Error>();
        match error.and_then(tokio_postgres::Error::as_db_error) {
            Some(db) => {
                let class = db.code().code().get(..2).unwrap_or_default();
                self.operation == BEGIN
                    || matches!(class, "08" | "25")
                    || (class == "57" && *db.code() != SqlState::QUERY_CANCELED)
            }
            None => true,
        }
    }

    /// Whether somebody held a lock for longer than is waited.
    pub fn is_locked_out(&self) -> bool {
        self.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
    }

    fn code(&self) -> Option<&SqlState> {
        self.source.as_ref()?.downcast_ref::<tokio_postgres::Error>()?.code()
    }

    pub(super) fn away(operation: &'static str, why: impl fmt::Display) -> Self {
        Self { operation, fault: Fault::Away, detail: Detail(why.to_string()), source: None }
    }

    /// An operation that outlasted its caller's patience.
    pub fn too_slow(operation: &'static str) -> Self {
        Self::away(operation, "no answer in time")
    }

    /// A row that our own code cannot read back: the schema is not the one this program was built for.
    pub fn unreadable(operation: &'static str, why: impl fmt::Display) -> Self {
        Self::away(operation, format_args!("unreadable row: {why}"))
    }
}

/// The operation that opens a connection.
pub(super) const CONNECT: &str = "connect";
/// The operation that opens a transaction.
pub(super) const BEGIN: &str = "begin";
/// What to do about a role, a schema, a table or a function that is not there.
const NO_SCHEMA: &str = "the schema is missing or older than this program: run `opsmantik migrate`";

fn no_schema(operation: &str, code: &SqlState) -> bool {
    // A role that does not exist is, to PostgreSQL, a setting's invalid value; no other value of a BEGIN of ours can be invalid.
    (operation == BEGIN && *code == SqlState::INVALID_PARAMETER_VALUE)
        || [
            SqlState::INVALID_SCHEMA_NAME,
            SqlState::UNDEFINED_TABLE,
            SqlState::UNDEFINED_COLUMN,
            SqlState::UNDEFINED_FUNCTION,
            SqlState::UNDEFINED_OBJECT,
        ]
        .contains(code)
}

fn classify(error: &tokio_postgres::Error) -> Fault {
    let Some(db) = error.as_db_error() else { return Fault::Away };
    let code = db.code();
    if *code == SqlState::T_R_SERIALIZATION_FAILURE
        || *code == SqlState::T_R_DEADLOCK_DETECTED
        || *code == SqlState::LOCK_NOT_AVAILABLE
    {
        return Fault::Conflict;
    }
    // What has no code of its own is known by where it is raised: messages are in the language of the database.
    let raised_in = |routine: &str| db.routine() == Some(routine);
    // A statement that was kept ready and is not what it was, since somebody changed the schema: another connection prepares it anew.
    if (*code == SqlState::FEATURE_NOT_SUPPORTED && raised_in("RevalidateCachedQuery"))
        || *code == SqlState::INVALID_SQL_STATEMENT_NAME
    {
        return Fault::Conflict;
    }
    if *code == SqlState::CHECK_VIOLATION && raised_in("ExecFindPartition") {
        return Fault::MissingPartition;
    }
    if *code == SqlState::FOREIGN_KEY_VIOLATION && db.constraint().is_some_and(|name| name.contains("site_id_fkey")) {
        return Fault::UnknownSite;
    }
    match code.code().get(..2) {
        // Data exceptions, integrity constraints, RAISE in a trigger, limits such as an index entry's size.
        Some("22" | "23" | "P0" | "54") => Fault::Refused,
        _ => Fault::Away,
    }
}
