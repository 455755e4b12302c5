//! A cluster of a test's own, which may be restarted under the feet of everybody who uses it, and comes back where it was.
//!
//! No commit that was answered is lost by its restarts, not even by an immediate one: only the machine's own end could cost something.

use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opsmantik::dev::cluster::{Cluster, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use opsmantik::store::Store;
use uuid::Uuid;

use super::cluster::throw_away;
use super::database::{Database, connect};

const DATABASE: &str = "own";

/// A folder that is gone with its test, however that ends.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Sessions are ended, everything is written.
    Fast,
    /// As if it had crashed: what it had not written is recovered from its log.
    Immediate,
}

pub struct Private {
    // Stopped before its folder is removed.
    cluster: Option<Cluster>,
    place: Place,
    settings: Vec<(String, String)>,
}

impl Private {
    /// A new cluster with further settings, which win over those that all clusters of ours have.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        let place = Place(std::env::temp_dir().join(format!("opsmantik-test-{}", Uuid::new_v4().simple())));
        // An answered commit is in the log's file, so a crash of PostgreSQL does not take it back.
        let safe = [("synchronous_commit", "on"), ("full_page_writes", "on")];
        let settings: Vec<(String, String)> =
            safe.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut private = Self { cluster: None, place, settings };
        private.raise().await;
        private
    }

    async fn raise(&mut self) {
        let (folder, settings) = (self.place.0.clone(), self.settings.clone());
        let raise = move || {
            let progress = Progress::stderr();
            let postgres = Postgres::find_or_install(progress).expect("there is a PostgreSQL");
            let mut options = ClusterOptions { data_dir: folder, keep: true, ..throw_away(postgres) };
            options.settings.extend(settings);
            Cluster::start(options, progress).expect("it starts")
        };
        self.cluster = Some(tokio::task::spawn_blocking(raise).await.expect("no panic"));
    }

    fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("it runs but while it is restarted")
    }

    pub fn url(&self) -> String {
        self.cluster().url(DATABASE)
    }

    /// A migrated database; the cluster has one.
    pub async fn database(&self) -> Database {
        Store::create_database(&self.cluster().url("postgres"), DATABASE).await.expect("a new database");
        let store = Store::new(&self.url(), 2).await.expect("a URL");
        store.migrate().await.expect("it migrates");
        Database { admin: connect(&self.url()).await, name: DATABASE.to_owned(), url: self.url(), store }
    }

    /// Stops it and starts it again at the same address.
    pub async fn restart(&mut self, how: Shutdown) {
        let cluster = self.cluster.take().expect("it runs");
        let url = cluster.url(DATABASE);
        if how == Shutdown::Immediate {
            let pid = i32::try_from(cluster.pid().expect("it runs")).expect("a pid");
            kill(Pid::from_raw(pid), Signal::SIGQUIT).expect("it is ours");
        }
        let stopped = tokio::task::spawn_blocking(move || cluster.stop()).await;
        stopped.expect("no panic").expect("it ends, or what is left of it");
        self.raise().await;
        assert_eq!(self.url(), url, "it comes back where it was");
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        drop(self.cluster.take());
    }
}
