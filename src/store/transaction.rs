//! The one way to the database: a short transaction under a role of our own.
//!
//! Whatever role logs in, a transaction has the role of its [`Purpose`], which owns nothing and bypasses nothing. Roles and bounds are set with
//! `SET LOCAL`. Only where no pooler stands between (`direct.rs`) does a session keep something from one transaction to the next: what is prepared on
//! the server, and what a transaction that serves begins with. A transaction that is dropped before its end takes its connection with it: nothing half
//! done ever returns to the pool. If a statement of it still runs, because the caller's deadline passed or they hung up, the server is asked to stop it.

use std::borrow::Cow;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use futures::future::maybe_done;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::error::{BEGIN, StoreError};
use super::pool::Connection;
use super::ready::{Found, PLAN_ANEW, Ready};
use super::statement::Statement;
use crate::domain::id::{SiteId, UserId};
use crate::telemetry;

/// What a transaction is for: decides its role and its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Doors and pipeline. Foreign keys are checked at the commit, so events may come before their session. Locks are waited for briefly, since
    /// others wait behind: whoever is locked out tries again, or another part.
    Serve,
    /// The partition keeper: waits for locks only briefly.
    Keep,
    /// The command line, on behalf of the operator.
    Operate,
    /// A read on behalf of a tenant: the policies of the database show what is theirs, whatever a statement asks for. All its statements see
    /// the same moment.
    Read(Reader),
    /// A judgement that a person makes themselves: bound by the same policies.
    Act(UserId),
}

/// On whose behalf a transaction reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// A token: the one site.
    Site(SiteId),
    /// A person: the sites that they own or are a member of.
    User(UserId),
}

impl Purpose {
    /// The text that opens a transaction for it: isolation, role, claims, bounds. Public so that a test can stand where a reader stands.
    pub fn opening(self) -> String {
        format!("{}; {}", self.begin(), self.settings())
    }

    /// The same where the session is [`serving`]: only what differs from that is said.
    pub fn opening_where_serving(self) -> String {
        match self {
            Self::Serve => format!("{}; {DEFERRED}", self.begin()),
            _ => format!("{}; {NOT_SERVING}; {}", self.begin(), self.settings()),
        }
    }

    /// Who writes sees what was committed before each statement, whatever a database has for a default: what a lock was waited for has to be seen.
    fn begin(self) -> &'static str {
        match self {
            Self::Read(_) => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            Self::Serve | Self::Keep | Self::Operate | Self::Act(_) => "BEGIN ISOLATION LEVEL READ COMMITTED",
        }
    }

    fn settings(self) -> Cow<'static, str> {
        match self {
            Self::Read(Reader::Site(site)) => {
                let role = format!("SET LOCAL ROLE opsmantik_tenant; SET LOCAL opsmantik.site_id = '{site}'");
                format!("{role}; {TENANT_BOUNDS}").into()
            }
            Self::Read(Reader::User(user)) | Self::Act(user) => format!("{}; {TENANT_BOUNDS}", as_user(user)).into(),
            Self::Serve => format!("{}; {DEFERRED}", set("SET LOCAL", &SERVING)).into(),
            Self::Keep => {
                "SET LOCAL ROLE opsmantik_service; SET LOCAL statement_timeout = '15s'; SET LOCAL lock_timeout = '2s'"
                    .into()
            }
            Self::Operate => "SET LOCAL ROLE opsmantik_operator; SET LOCAL statement_timeout = '60s'".into(),
        }
    }
}

/// The role and the bounds of [`Purpose::Serve`].
const SERVING: [&str; 4] = [
    "ROLE opsmantik_service",
    "statement_timeout = '5s'",
    "lock_timeout = '1s'",
    "idle_in_transaction_session_timeout = '15s'",
];
/// How statements that are kept ready are planned. Of a month that somebody counted while it was empty the planner believes that reading all of it
/// costs nothing.
const GENERIC: [&str; 2] = ["plan_cache_mode = force_generic_plan", "enable_seqscan = off"];

/// The text that has a session keep all of this from transaction to transaction: to say it anew each time costs the database as much as writing an event.
/// Only for a connection that stays ours; behind a pooler the session is everybody's.
pub fn serving() -> String {
    format!("{}; {}", set("SET", &SERVING), set("SET", &GENERIC))
}

fn set(how: &str, settings: &[&str]) -> String {
    settings.iter().map(|setting| format!("{how} {setting}")).collect::<Vec<_>>().join("; ")
}

/// Takes what a session keeps for serving out of one transaction, before that has settings of its own. Its role it has in any case.
const NOT_SERVING: &str = "SET LOCAL statement_timeout TO DEFAULT; SET LOCAL lock_timeout TO DEFAULT; \
     SET LOCAL idle_in_transaction_session_timeout TO DEFAULT; SET LOCAL plan_cache_mode TO DEFAULT; SET LOCAL enable_seqscan TO DEFAULT";
/// Events may come before their session.
const DEFERRED: &str = "SET CONSTRAINTS ALL DEFERRED";

/// No reader waits or works longer.
const TENANT_BOUNDS: &str = "SET LOCAL statement_timeout = '5s'; SET LOCAL lock_timeout = '4s'; \
     SET LOCAL idle_in_transaction_session_timeout = '15s'";

/// The role and the claims that Supabase gives a signed-in user. A UUID needs no quoting.
fn as_user(user: UserId) -> String {
    let claims = format!(r#"{{"sub":"{user}","role":"authenticated"}}"#);
    format!(
        "SET LOCAL ROLE authenticated; SET LOCAL \"request.jwt.claims\" = '{claims}'; SET LOCAL \"request.jwt.claim.sub\" = '{user}'"
    )
}

/// An open transaction.
pub struct Transaction<'a> {
    connection: bb8::PooledConnection<'a, super::pool::Manager>,
    purpose: Purpose,
    /// Statements that were sent and have not ended.
    busy: AtomicUsize,
}

impl<'a> Transaction<'a> {
    /// One that is not open yet: see [`Transaction::enter`].
    pub(super) fn on(connection: bb8::PooledConnection<'a, super::pool::Manager>, purpose: Purpose) -> Self {
        connection.set_in_transaction(true);
        Self { connection, purpose, busy: AtomicUsize::new(0) }
    }

    /// Opens it. Statements may be sent along with this, after it: if it fails, so does all that was said to happen in the transaction, and
    /// nothing of it may be used.
    pub(crate) async fn enter(&self) -> Result<(), StoreError> {
        let opening = match self.connection().ready().is_some_and(Ready::is_serving) {
            true => self.purpose.opening_where_serving(),
            false => self.purpose.opening(),
        };
        match self.ready().is_some_and(Ready::is_to_plan_anew) {
            true => self.simple(BEGIN, &format!("{opening}; {PLAN_ANEW}")).await,
            false => self.simple(BEGIN, &opening).await,
        }
    }

    /// What is kept ready for its statements.
    fn ready(&self) -> Option<&Ready> {
        self.connection().ready().filter(|_| self.purpose == Purpose::Serve)
    }

    /// Opens one that sees what a replication slot's exported snapshot saw. `snapshot` is PostgreSQL's name for it.
    pub(super) async fn begin_at(
        connection: bb8::PooledConnection<'a, super::pool::Manager>,
        snapshot: &str,
    ) -> Result<Self, StoreError> {
        const OPERATION: &str = "begin at a snapshot";
        if snapshot.is_empty() || !snapshot.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return Err(StoreError::unreadable(OPERATION, "that is no name of a snapshot"));
        }
        let transaction = Self::on(connection, Purpose::Serve);
        let opening = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'; {NOT_SERVING}; \
             SET LOCAL ROLE opsmantik_service; SET LOCAL statement_timeout = '5s'"
        );
        transaction.simple(OPERATION, &opening).await?;
        Ok(transaction)
    }

    fn connection(&self) -> &Connection {
        &self.connection
    }

    #[allow(clippy::disallowed_methods)] // the one place that may
    async fn simple(&self, operation: &'static str, sql: &str) -> Result<(), StoreError> {
        self.busy.fetch_add(1, Ordering::Relaxed);
        let done = self.connection().client().batch_execute(sql).await;
        self.busy.fetch_sub(1, Ordering::Relaxed);
        done.map_err(|error| StoreError::of(operation, error))
    }

    /// Runs a statement and returns its rows.
    #[allow(clippy::disallowed_methods)] // the one place that may
    pub(super) async fn query(
        &self,
        statement: &'static Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        assert_eq!(statement.arity(), params.len(), "{} is called as it is declared", statement.name);
        let client = self.connection().client();
        let found = self.ready().map(|ready| ready.find(statement, params));
        let started = Instant::now();
        self.busy.fetch_add(1, Ordering::Relaxed);
        let rows = match found {
            Some(Found::Ready(ready)) => client.query(&ready, params).await,
            Some(Found::Text(sql)) => self.query_text(&sql, statement, params).await,
            None => self.query_text((statement.sql)(), statement, params).await,
        };
        self.busy.fetch_sub(1, Ordering::Relaxed);
        telemetry::time_statement(statement.name, started.elapsed(), rows.is_ok());
        rows.map_err(|error| StoreError::of(statement.name, error))
    }

    #[allow(clippy::disallowed_methods)] // the one place that may
    async fn query_text(
        &self,
        sql: &str,
        statement: &'static Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let mut types = statement.params.to_vec();
        if let Some(rows) = statement.rows {
            types.push(self.connection().array_of(rows));
        }
        let typed: Vec<_> = params.iter().copied().zip(types).collect();
        self.connection().client().query_typed(sql, &typed).await
    }

    /// Commits. Only after this is anything durable.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.simple("commit", "COMMIT").await?;
        self.connection.set_in_transaction(false);
        Ok(())
    }

    /// Runs a last statement and commits, see [`Transaction::finish`].
    pub(super) async fn query_and_commit(
        self,
        statement: &'static Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<(), StoreError> {
        self.finish(self.query(statement, params), std::future::ready(Ok(()))).await?;
        Ok(())
    }

    /// Runs the last two steps and commits, without waiting in between. A step sends one statement or none. If one fails, PostgreSQL commits
    /// nothing. Whoever drops this while it waits knows as little of what became of it as whoever drops a commit; afterwards there is nothing
    /// that could be done in this transaction.
    pub(super) async fn finish<A, B>(
        &self,
        first: impl Future<Output = Result<A, StoreError>>,
        second: impl Future<Output = Result<B, StoreError>>,
    ) -> Result<(A, B), StoreError> {
        let (mut first, mut second) = (pin!(maybe_done(first)), pin!(maybe_done(second)));
        // Each is sent, or has failed, before the next one is: what could not be sent must not be missing in what is committed.
        let _ = futures::poll!(first.as_mut());
        if first.as_mut().output_mut().is_none_or(|done| done.is_ok()) {
            let _ = futures::poll!(second.as_mut());
        }
        let failed = first.as_mut().output_mut().is_some_and(|done| done.is_err())
            || second.as_mut().output_mut().is_some_and(|done| done.is_err());
        let committed = match failed {
            true => Ok(()),
            false => tokio::join!(biased; first.as_mut(), second.as_mut(), self.simple("commit", "COMMIT")).2,
        };
        let done = match (first.as_mut().take_output(), second.as_mut().take_output()) {
            (Some(first), Some(second)) => (first?, second?),
            (Some(Err(failed)), _) | (_, Some(Err(failed))) => return Err(failed),
            (None, _) | (_, None) => return Err(StoreError::unreadable("commit", "a step has not ended")),
        };
        committed?;
        self.connection.set_in_transaction(false);
        Ok(done)
    }

    /// Gives everything back.
    pub async fn rollback(self) -> Result<(), StoreError> {
        self.simple("rollback", "ROLLBACK").await?;
        self.connection.set_in_transaction(false);
        Ok(())
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.busy.load(Ordering::Relaxed) > 0 {
            self.connection().cancel_running();
        }
    }
}
