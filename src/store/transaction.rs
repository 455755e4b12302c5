//! The one way to the database: a short transaction under a role of our own.
//!
//! Whatever role logs in, a transaction first takes the role of its [`Purpose`], which owns nothing and bypasses nothing. Roles and bounds
//! are set with `SET LOCAL`, and statements are not prepared on the server, so a transaction pooler may stand between. A transaction that is
//! dropped before its end takes its connection with it: nothing half done ever returns to the pool.

use std::time::Instant;

use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::error::{BEGIN, StoreError};
use super::pool::Connection;
use super::statement::Statement;
use crate::telemetry;

/// What a transaction is for: decides its role and its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Doors and pipeline. Foreign keys are checked at the commit, so events may come before their session.
    Serve,
    /// The partition keeper: waits for locks only briefly.
    Keep,
    /// The command line, on behalf of the operator.
    Operate,
}

impl Purpose {
    const fn begin(self) -> &'static str {
        match self {
            Self::Serve => {
                "BEGIN; SET LOCAL ROLE opsmantik_service; SET LOCAL statement_timeout = '5s'; \
                 SET LOCAL lock_timeout = '4s'; SET LOCAL idle_in_transaction_session_timeout = '15s'; SET CONSTRAINTS ALL DEFERRED"
            }
            Self::Keep => {
                "BEGIN; SET LOCAL ROLE opsmantik_service; SET LOCAL statement_timeout = '15s'; SET LOCAL lock_timeout = '2s'"
            }
            Self::Operate => "BEGIN; SET LOCAL ROLE opsmantik_operator; SET LOCAL statement_timeout = '60s'",
        }
    }
}

/// An open transaction.
pub struct Transaction<'a> {
    connection: bb8::PooledConnection<'a, super::pool::Manager>,
}

impl<'a> Transaction<'a> {
    pub(super) async fn begin(
        connection: bb8::PooledConnection<'a, super::pool::Manager>,
        purpose: Purpose,
    ) -> Result<Self, StoreError> {
        connection.set_in_transaction(true);
        let transaction = Self { connection };
        transaction.simple(BEGIN, purpose.begin()).await?;
        Ok(transaction)
    }

    fn connection(&self) -> &Connection {
        &self.connection
    }

    #[allow(clippy::disallowed_methods)] // the one place that may
    async fn simple(&self, operation: &'static str, sql: &str) -> Result<(), StoreError> {
        let client = self.connection().client();
        client.batch_execute(sql).await.map_err(|error| StoreError::of(operation, error))
    }

    /// Runs a statement and returns its rows.
    #[allow(clippy::disallowed_methods)] // the one place that may
    pub(super) async fn query(
        &self,
        statement: &'static Statement,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        assert_eq!(statement.params.len(), params.len(), "{} is called as it is declared", statement.name);
        let typed: Vec<_> = params.iter().copied().zip(statement.params.iter().cloned()).collect();
        let started = Instant::now();
        let rows = self.connection().client().query_typed((statement.sql)(), &typed).await;
        telemetry::time_statement(statement.name, started.elapsed(), rows.is_ok());
        rows.map_err(|error| StoreError::of(statement.name, error))
    }

    /// Commits. Only after this is anything durable.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.simple("commit", "COMMIT").await?;
        self.connection.set_in_transaction(false);
        Ok(())
    }

    /// Gives everything back.
    pub async fn rollback(self) -> Result<(), StoreError> {
        self.simple("rollback", "ROLLBACK").await?;
        self.connection.set_in_transaction(false);
        Ok(())
    }
}
