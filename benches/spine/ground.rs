//! The ground that a bench stands on: a private cluster that keeps its promises (`fsync` and all), and databases that are alike.
//!
//! One database is migrated and given its sites and a token; every measurement gets a clone of it, so that all begin with the same tables,
//! and a reference has exactly the keys, indexes and triggers of what it is compared with.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use opsmantik::access::ApiToken;
use opsmantik::dev::cluster::{Cluster, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use opsmantik::domain::access::Scope;
use opsmantik::store::Store;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::workload;

const TEMPLATE: &str = "bench_template";
/// Segments of the log that are laid before anything is measured: `min_wal_size`, so that they stay.
const SEGMENTS: usize = 64;
/// Sites of the usual workload.
pub const SITES: usize = 8;

pub struct Ground {
    cluster: Cluster,
    /// Opens every door.
    pub token: String,
    pub postmaster: u32,
    /// PostgreSQL's version, and each setting that is not its default.
    pub settings: Vec<String>,
    next: AtomicU32,
}

/// A database of a bench.
#[derive(Debug, Clone)]
pub struct Database {
    pub name: String,
    pub url: String,
}

impl Ground {
    /// Raises the cluster. `settings` are further ones, for who looks into PostgreSQL while the bench runs. A `short` bench takes it as it comes.
    pub async fn raise(progress: Progress, settings: Vec<(String, String)>, short: bool) -> anyhow::Result<Self> {
        let raise = move || {
            let postgres = Postgres::find_or_install(progress)?;
            let name = format!("opsmantik-bench-{}", Uuid::new_v4().simple());
            let data_dir = std::env::temp_dir().join(name);
            let options = ClusterOptions { postgres, data_dir, port: None, durable: true, settings, keep: false };
            anyhow::Ok(Cluster::start(options, progress)?)
        };
        let cluster = tokio::task::spawn_blocking(raise).await??;
        let postmaster = cluster.pid().context("the cluster runs")?;
        let mut ground =
            Self { cluster, token: String::new(), postmaster, settings: Vec::new(), next: AtomicU32::new(0) };
        ground.settings = ground.durable_settings().await?;
        if !short {
            ground.lay_log().await?;
        }
        ground.token = ground.make_template().await?;
        Ok(ground)
    }

    /// What PostgreSQL was told; an error if it would answer a commit before it is safe.
    async fn durable_settings(&self) -> anyhow::Result<Vec<String>> {
        let admin = connect(&self.cluster.url("postgres")).await?;
        for name in ["fsync", "synchronous_commit", "full_page_writes"] {
            let value: String = admin.query_one("SELECT current_setting($1)", &[&name]).await?.get(0);
            ensure!(value == "on", "{name} is {value}, so nothing measured here would be durable");
        }
        let version: String =
            admin.query_one("SELECT 'PostgreSQL ' || current_setting('server_version')", &[]).await?.get(0);
        let told = "SELECT name || '=' || current_setting(name) FROM pg_settings WHERE source = 'command line' \
                    AND name NOT IN ('port', 'listen_addresses', 'unix_socket_directories') ORDER BY name";
        let told = admin.query(told, &[]).await?;
        let durable = "fsync=on, synchronous_commit=on, full_page_writes=on".to_owned();
        Ok([version, durable].into_iter().chain(told.iter().map(|row| row.get(0))).collect())
    }

    /// Lays the log as a database has it that has been written to for a while: its segments are there, and are written over. A new one is filled with
    /// zeros first, which no commit gets past: on the disk this was found on 40 ms for each 16 MB.
    async fn lay_log(&self) -> anyhow::Result<()> {
        let step = Progress::stderr().step("laying the log");
        let admin = connect(&self.cluster.url("postgres")).await?;
        for _ in 0..SEGMENTS {
            // Only a log that has been written to goes on to its next segment.
            admin.batch_execute("SELECT pg_logical_emit_message(false, 'bench', ''); SELECT pg_switch_wal()").await?;
        }
        admin.batch_execute("CHECKPOINT").await?;
        step.done();
        Ok(())
    }

    async fn make_template(&self) -> anyhow::Result<String> {
        let step = Progress::stderr().step("migrating a database");
        let url = self.cluster.url(TEMPLATE);
        let admin = connect(&self.cluster.url("postgres")).await?;
        admin.batch_execute(&format!("CREATE DATABASE {TEMPLATE}")).await?;
        let store = Store::new(&url, 1).await?;
        store.migrate().await?;
        let token = ApiToken::generate()?;
        store.issue_token(&token.hash(), "bench", &Scope::ALL, None, None).await?;
        drop(store);
        add_sites(&connect(&url).await?, 0..SITES).await?;
        step.done();
        Ok(token.reveal().to_owned())
    }

    /// A new database with nothing in it but the sites.
    pub async fn database(&self) -> anyhow::Result<Database> {
        self.clone_of(TEMPLATE, "").await
    }

    /// A new database with all that is in this one, whose servers are gone. From 15 on it would go through the log, unless told otherwise; before,
    /// there was no other way than by files.
    pub async fn copy(&self, database: &Database) -> anyhow::Result<Database> {
        let admin = connect(&self.cluster.url("postgres")).await?;
        let version = "SELECT current_setting('server_version_num')::int";
        let has_strategies = admin.query_one(version, &[]).await?.get::<_, i32>(0) >= 150_000;
        self.clone_of(&database.name, if has_strategies { "STRATEGY FILE_COPY" } else { "" }).await
    }

    async fn clone_of(&self, template: &str, how: &str) -> anyhow::Result<Database> {
        let name = format!("bench_{}", self.next.fetch_add(1, Ordering::Relaxed));
        let admin = connect(&self.cluster.url("postgres")).await?;
        let mut tries = 0;
        // Whoever made the template may take a moment to leave it.
        while let Err(error) = admin.batch_execute(&format!("CREATE DATABASE {name} TEMPLATE {template} {how}")).await {
            tries += 1;
            ensure!(tries < 100, "cannot clone {template}: {error:?}");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        Ok(Database { url: self.cluster.url(&name), name })
    }

    /// Removes a database whose servers are gone.
    pub async fn drop(&self, database: Database) -> anyhow::Result<()> {
        let admin = connect(&self.cluster.url("postgres")).await?;
        admin.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", database.name)).await?;
        Ok(())
    }

    /// Ends the cluster and removes what it wrote.
    pub async fn end(self) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || self.cluster.stop()).await??;
        Ok(())
    }
}

impl Database {
    /// A connection as the superuser.
    pub async fn admin(&self) -> anyhow::Result<Client> {
        connect(&self.url).await
    }

    /// Both sides of a comparison begin with what was written before on disk, so that neither pays for the other's.
    pub async fn checkpoint(&self) -> anyhow::Result<()> {
        self.admin().await?.batch_execute("CHECKPOINT").await?;
        Ok(())
    }

    pub async fn count(&self, table: &str) -> anyhow::Result<usize> {
        let count: i64 =
            self.admin().await?.query_one(&format!("SELECT count(*) FROM public.{table}"), &[]).await?.get(0);
        Ok(usize::try_from(count)?)
    }
}

pub async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.context("the bench's own cluster answers")?;
    tokio::spawn(connection);
    Ok(client)
}

/// Adds the sites with these numbers, by ids that are the same in every database.
pub async fn add_sites(admin: &Client, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    let names: Vec<String> = numbers.clone().map(workload::public_id).collect();
    let ids: Vec<Uuid> = numbers.map(site_id).collect();
    let insert = "INSERT INTO public.sites (id, public_id, name, domain, region) \
                  SELECT id, name, name, name || '.example', 'US' FROM unnest($1::uuid[], $2::text[]) AS new (id, name)";
    admin.execute(insert, &[&ids, &names]).await?;
    Ok(())
}

/// The id of the site with this number. Spread, as ids are.
pub fn site_id(number: usize) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, workload::public_id(number).as_bytes())
}
