//! Schema migrations, embedded in the program and run by `refinery`.
//!
//! They run as the role that logs in (the owner), one migrator at a time, and keep their history in the schema `opsmantik`, where no
//! default privilege of `public` reaches it.

use anyhow::Context;

use super::Store;

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// Held by the one that migrates; any fixed number will do.
const MIGRATION_LOCK: i64 = 0x6f70_736d_616e_7469;

impl Store {
    /// Brings the schema up to date and returns the names of the migrations that ran now.
    #[allow(clippy::disallowed_methods)] // DDL, by the owner, outside the pool
    pub async fn migrate(&self) -> anyhow::Result<Vec<String>> {
        let mut client = self.manager.open().await.context("connecting to the database")?;
        let prepare = format!(
            "SET TIME ZONE 'UTC'; SELECT pg_advisory_lock({MIGRATION_LOCK}); CREATE SCHEMA IF NOT EXISTS opsmantik"
        );
        client.batch_execute(&prepare).await.context("preparing to migrate")?;
        let mut runner = embedded::migrations::runner();
        runner.set_migration_table_name("opsmantik.schema_history");
        let report = runner.run_async(&mut client).await.context("migrating the schema")?;
        client.batch_execute(&format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})")).await?;
        Ok(report.applied_migrations().iter().map(ToString::to_string).collect())
    }

    /// Makes a database beside the one of `url`, if there is none of that name. `name` is our own and needs no quoting.
    #[allow(clippy::disallowed_methods)] // DDL, by the owner, outside the pool
    pub async fn create_database(url: &str, name: &'static str) -> anyhow::Result<()> {
        let client = super::pool::Manager::new(url)?.open().await.context("connecting to the database")?;
        match client.batch_execute(&format!("CREATE DATABASE {name}")).await {
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::DUPLICATE_DATABASE) => Ok(()),
            made => made.with_context(|| format!("making the database {name}")),
        }
    }
}
