//! The database is away, unreachable, slow, locked, out of connections, read-only, out of disk, or without the month: everybody is told so in
//! time and told when to come again, whoever looks sees it, and all is well again by itself within a second.

use std::time::Duration;

use opsmantik::domain::month::Month;
use tokio::sync::Mutex;
use tokio_postgres::{Client, NoTls};

use super::Plan;
use super::kill::{shop, token};
use crate::outage::{Bounds, Stage};
use crate::proxy::{Proxy, Way, address_of};
use crate::report::Report;
use crate::support::database::{Database, connect, database};
use crate::support::private::{Private, Shutdown};

const STOP: Duration = Duration::from_secs(20);

/// How long a fault lasts.
fn hold(plan: &Plan) -> Duration {
    if plan.long { Duration::from_secs(6) } else { Duration::from_secs(3) }
}

/// PostgreSQL is stopped like by a crash, and started later.
pub async fn away(plan: Plan) -> Report {
    let mut private = Private::start(&[]).await;
    let (url, token, mut pid) = {
        let database = shop(private.database().await).await;
        (database.url.clone(), token(&database).await, postmaster(&database.admin).await)
    };
    let mut stage = Stage::set(&plan, &url, &token, &[]).await;
    for _ in 0..plan.rounds {
        let crash = async || nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGQUIT).expect("it is ours");
        stage.outage(hold(&plan), Bounds::QUICK, crash, async || private.restart(Shutdown::Immediate).await).await;
        pid = postmaster(&connect(&url).await).await;
    }
    stage.end(&connect(&url).await, STOP).await
}

async fn postmaster(admin: &Client) -> nix::unistd::Pid {
    let row = admin.query_one("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int4", &[]).await;
    nix::unistd::Pid::from_raw(row.expect("the row's own query").get(0))
}

/// A server that reaches its database by a way of ours.
async fn by_proxy(plan: &Plan) -> (Database, Proxy, Stage) {
    let database = shop(database().await).await;
    let proxy = Proxy::before(address_of(&database.url)).await;
    let token = token(&database).await;
    let stage = Stage::set(plan, &proxy.url(&database.url), &token, &[]).await;
    (database, proxy, stage)
}

/// Packets get lost: no error tells of it, only silence.
pub async fn unreachable(plan: Plan) -> Report {
    let (database, proxy, mut stage) = by_proxy(&plan).await;
    for _ in 0..plan.rounds {
        let hold = hold(&plan).max(Duration::from_secs(5));
        stage.outage(hold, Bounds::PATIENT, async || proxy.set(Way::Silent), async || proxy.set(Way::Open)).await;
    }
    stage.end(&database.admin, STOP).await
}

/// Every answer of the database takes five seconds.
pub async fn slow(plan: Plan) -> Report {
    let (database, proxy, mut stage) = by_proxy(&plan).await;
    for _ in 0..plan.rounds {
        let slow = Way::Slow(Duration::from_secs(5));
        let hold = hold(&plan).max(Duration::from_secs(9));
        stage.outage(hold, Bounds::PATIENT, async || proxy.set(slow), async || proxy.set(Way::Open)).await;
    }
    stage.end(&database.admin, STOP).await
}

/// Somebody holds a lock on a table, so statements wait as long as they may.
pub async fn locked(plan: Plan) -> Report {
    let database = shop(database().await).await;
    let token = token(&database).await;
    let mut stage = Stage::set(&plan, &database.url, &token, &[]).await;
    let locker = connect(&database.url).await;
    for _ in 0..plan.rounds {
        let lock = async || locker.batch_execute("BEGIN; LOCK TABLE events IN EXCLUSIVE MODE").await.expect("locked");
        let free = async || locker.batch_execute("COMMIT").await.expect("free");
        // It shows only when the first have lost their patience.
        let bounds = Bounds { noticed: Some(Duration::from_secs(12)), ..Bounds::PATIENT };
        stage.outage(hold(&plan).max(Duration::from_secs(12)), bounds, lock, free).await;
    }
    stage.end(&database.admin, STOP).await
}

/// Others have taken every connection that there is.
pub async fn no_connections(plan: Plan) -> Report {
    let private =
        Private::start(&[("max_connections", "24"), ("superuser_reserved_connections", "1"), ("max_wal_senders", "4")])
            .await;
    let database = shop(private.database().await).await;
    let token = token(&database).await;
    let mut stage = Stage::set(&plan, &database.url, &token, &[]).await;
    for _ in 0..plan.rounds {
        let others = Mutex::new(Vec::new());
        let take = async || {
            let ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'opsmantik'";
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'opsmantik'";
            let (mut tries, mut free) = (0, 0);
            // The server connects again as soon as it is cut off; sooner or later we are the faster one everywhere. One that is just
            // connecting has no name yet, so it is looked for again.
            while free < 5 {
                while let Ok((client, connection)) = tokio_postgres::connect(&database.url, NoTls).await {
                    tokio::spawn(connection);
                    others.lock().await.push(client);
                }
                if crate::ledger::count(&database.admin, ours).await == 0 {
                    free += 1;
                    tokio::time::sleep(Duration::from_millis(40)).await;
                } else {
                    (free, tries) = (0, tries + 1);
                    assert!(tries < 500, "the server keeps its connections");
                    database.admin.batch_execute(end).await.expect("ended");
                }
            }
        };
        stage.outage(hold(&plan), Bounds::QUICK, take, async || others.lock().await.clear()).await;
    }
    stage.end(&database.admin, STOP).await
}

/// The database takes no writes any more, as after a failover to a standby or for want of space at a provider.
pub async fn read_only(plan: Plan) -> Report {
    let database = shop(database().await).await;
    let token = token(&database).await;
    let mut stage = Stage::set(&plan, &database.url, &token, &[]).await;
    let other = connect(&database.url.replace(&database.name, "postgres")).await;
    let name = &database.name;
    let cut = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'opsmantik'"
    );
    for _ in 0..plan.rounds {
        let set = async |sql: String| {
            other.batch_execute(&sql).await.expect("altered");
            other.batch_execute(&cut).await.expect("cut off");
        };
        let begin = async || set(format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await;
        let end = async || set(format!("ALTER DATABASE {name} RESET default_transaction_read_only")).await;
        stage.outage(hold(&plan), Bounds::QUICK, begin, end).await;
    }
    stage.end(&database.admin, STOP).await
}

/// The month's leaf of `events` is not attached, and nobody may attach or make one.
pub async fn no_partition(plan: Plan) -> Report {
    let database = shop(database().await).await;
    let token = token(&database).await;
    let mut stage = Stage::set(&plan, &database.url, &token, &[]).await;
    // The last hours may lie in two months.
    let now = Month::of(chrono::Utc::now());
    let months = [now.previous(), now].map(|month| month.to_string()[..7].replace('-', "_"));
    let admin = &database.admin;
    let forbid = "CREATE OR REPLACE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ \
        BEGIN RAISE EXCEPTION 'no tables today'; END $$; \
        CREATE EVENT TRIGGER forbid ON ddl_command_start WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE') EXECUTE FUNCTION forbid()";
    for _ in 0..plan.rounds {
        let begin = async || {
            let detach = months.iter().map(|month| format!("ALTER TABLE events DETACH PARTITION events_{month};"));
            let sql = format!("BEGIN; {} {forbid}; COMMIT", detach.collect::<String>());
            admin.batch_execute(&sql).await.expect("detached");
        };
        let end = async || admin.batch_execute("DROP EVENT TRIGGER forbid").await.expect("allowed again");
        stage.outage(hold(&plan), Bounds::QUICK, begin, end).await;
    }
    stage.end(admin, STOP).await
}
