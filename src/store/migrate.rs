//! Schema migrations, embedded in the program and run by `refinery`.
//!
//! They run as the role that logs in (the owner), one migrator at a time, and keep their history in the schema `opsmantik`, where no
//! default privilege of `public` reaches it.

use std::time::Duration;

use anyhow::Context;
use tokio_postgres::error::SqlState;

use super::Store;

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// Held by the one that migrates; any fixed number will do.
const MIGRATION_LOCK: i64 = 0x6f70_736d_616e_7469;

/// A lock on a table is waited for no longer, as everybody else waits behind.
const LOCK_WAIT: &str = "2s";
/// Then they are let pass for a while, and it is tried again, for about two minutes.
const LOCK_PAUSE: Duration = Duration::from_secs(1);
const LOCK_TRIES: u32 = 40;

/// Whether somebody else's lock was in the way.
fn waited_in_vain(error: &refinery::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<tokio_postgres::Error>() {
            return error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE);
        }
        source = cause.source();
    }
    false
}

impl Store {
    /// Brings the schema up to date and returns the names of the migrations that ran now.
    #[allow(clippy::disallowed_methods)] // DDL, by the owner, outside the pool
    pub async fn migrate(&self) -> anyhow::Result<Vec<String>> {
        let mut client = self.manager.open().await.context("connecting to the database")?;
        let prepare = format!(
            "SET TIME ZONE 'UTC'; SET lock_timeout = 0; SELECT pg_advisory_lock({MIGRATION_LOCK}); \
             CREATE SCHEMA IF NOT EXISTS opsmantik; SET lock_timeout = '{LOCK_WAIT}'"
        );
        client.batch_execute(&prepare).await.context("preparing to migrate")?;
        let mut applied = Vec::new();
        let mut tries = 1;
        loop {
            let mut runner = embedded::migrations::runner();
            runner.set_migration_table_name("opsmantik.schema_history");
            match runner.run_async(&mut client).await {
                Ok(report) => {
                    applied.extend(report.applied_migrations().iter().map(ToString::to_string));
                    break;
                }
                Err(error) if tries < LOCK_TRIES && waited_in_vain(&error) => {
                    // What ran before is done; each migration is a transaction of its own.
                    applied.extend(
                        error.report().iter().flat_map(|report| report.applied_migrations()).map(ToString::to_string),
                    );
                    tracing::warn!(tries, "a table is in use by a long transaction; trying to migrate it again");
                    tries += 1;
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(error) => return Err(error).context("migrating the schema"),
            }
        }
        client.batch_execute(&format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})")).await?;
        Ok(applied)
    }

    /// Makes a database beside the one of `url`, if there is none of that name. `name` is our own and needs no quoting.
    #[allow(clippy::disallowed_methods)] // DDL, by the owner, outside the pool
    pub async fn create_database(url: &str, name: &'static str) -> anyhow::Result<()> {
        let client = super::pool::Manager::new(url)?.open().await.context("connecting to the database")?;
        match client.batch_execute(&format!("CREATE DATABASE {name}")).await {
            Err(error) if error.code() == Some(&SqlState::DUPLICATE_DATABASE) => Ok(()),
            made => made.with_context(|| format!("making the database {name}")),
        }
    }
}
