//! The command line: one file a noun.

use std::ops::ControlFlow;

use clap::{Args, Parser, Subcommand};

use crate::config::{ConfigError, Mode, Role, Settings};
use crate::secret::Secret;
use crate::server::{Listeners, Server, Worker, asked_to_stop, hang_ups};
use crate::store::Store;

#[macro_use]
mod output;

mod dead_letters;
mod duration;
mod partitions;
mod site;
mod token;

/// Tells which ad click, visit and page made the phone ring.
#[derive(Debug, Parser)]
#[command(name = "opsmantik", version, propagate_version = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server: the public /api/sync, the QStash worker, gRPC and the operator's listener; or a part of it, by --role
    Serve(Serve),
    /// Raise everything on this machine: a private PostgreSQL, the schema, a demo site and page, the server
    Dev(crate::dev::run::Dev),
    /// Bring the database's schema up to date; safe to run again and by several at once
    Migrate(Database),
    /// Add and list the sites whose events are taken
    #[command(subcommand)]
    Site(site::Site),
    /// Issue, list, revoke and rotate the API tokens that let machines in by gRPC
    #[command(subcommand)]
    Token(token::Token),
    /// List, make and drop the monthly partitions
    #[command(subcommand)]
    Partitions(partitions::Partitions),
    /// Look at what was accepted and could not be stored, and store it again
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLetters),
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    settings: Settings,
    /// Migrate the schema first; otherwise run `opsmantik migrate` before a new version serves
    #[arg(long)]
    migrate: bool,
}

/// Where the database is.
#[derive(Debug, Args)]
struct Database {
    /// PostgreSQL: `postgres://user:password@host:5432/database?sslmode=require`
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "DATABASE_URL")]
    database_url: Option<Secret>,
}

impl Database {
    async fn store(&self) -> anyhow::Result<Store> {
        self.store_of(2).await
    }

    /// For a command that works with several connections at once.
    async fn store_of(&self, connections: u32) -> anyhow::Result<Store> {
        let missing =
            ConfigError::Missing("DATABASE_URL", "the PostgreSQL database, postgres://user:password@host/name");
        let url = self.database_url.as_ref().filter(|url| !url.reveal().is_empty()).ok_or(missing)?;
        Store::new(url.reveal(), connections).await
    }
}

/// Runs the command that the process was called with.
pub async fn run() -> anyhow::Result<()> {
    output::ended(CommandLine::parse().command.run().await)
}

impl Command {
    async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Serve(serve) => serve.run().await,
            Self::Dev(dev) => dev.run().await,
            Self::Migrate(database) => {
                let applied = database.store().await?.migrate().await?;
                match applied.len() {
                    0 => say!("the schema is up to date"),
                    n => say!("{n} migrations applied: {}", applied.join(", ")),
                }
            }
            Self::Site(site) => site.run().await,
            Self::Token(token) => token.run().await,
            Self::Partitions(partitions) => partitions.run().await,
            Self::DeadLetters(letters) => letters.run().await,
        }
    }
}

impl Serve {
    async fn run(self) -> anyhow::Result<()> {
        self.settings.check(Mode::Serve)?;
        // A reload that is asked for while the server starts must not end it.
        let hang_ups = hang_ups()?;
        let url = self.settings.database_url()?.to_owned();
        if self.migrate {
            Store::new(&url, 1).await?.migrate().await?;
        }
        if self.settings.role == Role::Worker {
            let worker = Worker::start(&self.settings, &url).await?;
            asked_to_stop(hang_ups, || ControlFlow::Continue(())).await?;
            worker.stop().await;
            return Ok(());
        }
        let listeners = Listeners::bind(&self.settings).await?;
        let server = Server::start(&self.settings, Mode::Serve, &url, listeners, axum::Router::new()).await?;
        let reload = || {
            server.reload();
            ControlFlow::Continue(())
        };
        asked_to_stop(hang_ups, reload).await?;
        server.stop().await;
        Ok(())
    }
}
