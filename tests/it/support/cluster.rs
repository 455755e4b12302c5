//! The one private cluster of this test process.
//!
//! Started by whichever test asks first and shared by all; a test makes databases of
//! its own in it. Its watchdog stops it and removes its folder when the process is
//! gone, however that ends.

use opsmantik::dev::cluster::{Cluster, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use tokio::sync::OnceCell;

static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();

/// The cluster, running.
///
/// # Panics
///
/// If there can be none: no test that asks for it can say anything then.
pub async fn cluster() -> &'static Cluster {
    CLUSTER
        .get_or_init(|| async {
            let started = tokio::task::spawn_blocking(|| {
                let progress = Progress::stderr();
                let postgres = Postgres::find_or_install(progress)?;
                anyhow::Ok(Cluster::start(throw_away(postgres), progress)?)
            });
            match started.await {
                Ok(Ok(cluster)) => cluster,
                Ok(Err(error)) => panic!("the tests need a PostgreSQL of their own: {error:#}"),
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            }
        })
        .await
}

/// A cluster that nobody will miss, in a new folder under the system's temporary one.
pub fn throw_away(postgres: Postgres) -> ClusterOptions {
    let name = format!("opsmantik-test-{}", uuid::Uuid::new_v4().simple());
    ClusterOptions {
        postgres,
        data_dir: std::env::temp_dir().join(name),
        port: None,
        durable: false,
        settings: vec![
            ("max_connections".to_owned(), "300".to_owned()),
            ("log_statement".to_owned(), "none".to_owned()),
        ],
        keep: false,
    }
}
