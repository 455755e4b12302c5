//! What watching may cost: memory that does not grow with those who do not read, and no log that PostgreSQL keeps for nobody.

use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope as Right;
use opsmantik::grpc::proto::StoredEvent;
use tokio_postgres::Client;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Endpoint;
use tonic::{Code, Streaming};

use super::model::Model;
use super::seed::{flood, prepare, write_plainly};
use super::watched::{Scope, Watched};
use super::work::{SITES, Work};

use crate::support::database::{connect, database};
use crate::support::line::Bearer;
use crate::support::private::{Private, Shutdown};
use crate::support::process::Server;

const MIB: u64 = 1 << 20;
const STALLED: usize = 50;
/// What all those who do not read would be owed, each for itself, is fifty times what was written.
const WRITTEN: u64 = 50_000;
/// The log in memory holds 64 MiB and as much again in what surrounds its values; those who do not read cost some messages and a connection
/// each, and an allocator gives nothing back. A copy for each of them would be gigabytes.
const GROWTH: u64 = 256 * MIB;
/// Two segments, what was being written, and what a transaction that is open has written.
const KEPT_WAL: i64 = 3 * 16 * (MIB as i64);

/// A watch of the second site's events that is live, and the client that has heard it.
struct Watch {
    stream: Streaming<<StoredEvent as Watched>::Response>,
    model: Model<StoredEvent>,
}

impl Watch {
    async fn open(server: &Server, token: &str) -> Self {
        let scope = Scope { site: SITES[1].to_string(), month: None };
        let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let endpoint = endpoint.initial_stream_window_size(64 << 10).initial_connection_window_size(64 << 10);
        let channel = InterceptedService::new(endpoint.connect().await.expect("it listens"), Bearer::new(token));
        let began = Instant::now();
        let stream = loop {
            match StoredEvent::open(channel.clone(), &scope, None).await {
                Ok(stream) => break stream,
                // The database has just come back.
                Err(status) if status.code() == Code::Unavailable && began.elapsed() < Duration::from_secs(20) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(status) => panic!("{status:?}"),
            }
        };
        let mut watch = Self { stream, model: Model::new(scope) };
        watch.model.opened();
        while !watch.model.is_live() {
            watch.read().await.expect("a snapshot");
        }
        watch
    }

    async fn read(&mut self) -> Result<(), tonic::Status> {
        let message = tokio::time::timeout(Duration::from_secs(45), self.stream.message()).await;
        let message = message.expect("at least a heartbeat")?.expect("a watch has no end");
        self.model.take(StoredEvent::told(message).expect("a payload")).expect("as the contract has it");
        Ok(())
    }

    /// Reads until it has so many rows; the status, if it ends before.
    async fn until(&mut self, rows: usize) -> Result<(), tonic::Status> {
        while self.model.rows.len() < rows {
            self.read().await?;
        }
        Ok(())
    }
}

/// Resident memory of a server, in bytes.
fn resident(server: &Server) -> u64 {
    let path = format!("/proc/{}/status", server.program.pid());
    let status = std::fs::read_to_string(path).expect("a process tells its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it is resident");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}

async fn number(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.expect("the test's own query").get(0)
}

/// Waits until a query answers so.
async fn becomes(client: &Client, query: &str, holds: impl Fn(i64) -> bool, what: &str) {
    let began = Instant::now();
    loop {
        let found = number(client, query).await;
        if holds(found) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {found}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_who_do_not_read_cost_a_server_no_memory_to_speak_of() {
    let database = database().await;
    let work = Work::new(database.url.clone(), WRITTEN, 0);
    prepare(&database.admin, &work).await;
    let token = database.token(&Right::ALL, None).await;
    let mut server = Server::start(&database.url).await;
    let mut watches = Vec::new();
    for _ in 0..STALLED {
        watches.push(Watch::open(&server, &token).await);
    }
    let before = resident(&server);
    let mut most = before;
    let mut written = 0;
    while written < WRITTEN {
        written += write_plainly(&database.admin, &work, SITES[1], written, 1_000).await;
        most = most.max(resident(&server));
    }
    flood(&database.admin, &work).await;
    // One who reads proves that the server has heard of all of it.
    let mut reader = Watch::open(&server, &token).await;
    assert!(reader.model.rows.len() as u64 > WRITTEN);
    write_plainly(&database.admin, &work, SITES[1], written, 1).await;
    reader.until(reader.model.rows.len() + 1).await.expect("it reads all the time");
    most = most.max(resident(&server));
    eprintln!("{} MiB with {STALLED} watchers, {} MiB after {WRITTEN} rows", before / MIB, most / MIB);
    assert!(most - before < GROWTH, "from {} to {} MiB", before / MIB, most / MIB);

    // Whoever is cut off is told so behind what had been sent.
    let stalled = &mut watches[0];
    let end = stalled.until(usize::try_from(WRITTEN).expect("few") + 1).await;
    let status = end.expect_err("it has not read for long");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    drop((watches, reader));
    server.program.stop(Duration::from_secs(15)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_keeps_no_log_for_a_watcher_who_does_not_read_nor_for_a_server_that_is_gone() {
    let mut private = Private::start(&[]).await;
    let own = private.database().await;
    let work = Work::new(private.url(), u64::MAX, 0);
    prepare(&own.admin, &work).await;
    let token = own.token(&Right::ALL, None).await;
    let slots = "SELECT count(*) FROM pg_replication_slots";
    let server = Server::start(&private.url()).await;
    assert_eq!(number(&own.admin, slots).await, 0, "nobody watches");
    let _stalled = Watch::open(&server, &token).await;
    let _other = Watch::open(&server, &token).await;
    assert_eq!(number(&own.admin, slots).await, 1, "all share one");
    assert_eq!(number(&own.admin, &format!("{slots} WHERE temporary AND plugin = 'pgoutput'")).await, 1);

    let mut written = 0;
    let log = "SELECT (pg_current_wal_lsn() - '0/0')::int8";
    let began_at = number(&own.admin, log).await;
    while number(&own.admin, log).await - began_at < 3 * KEPT_WAL {
        written += write_plainly(&own.admin, &work, SITES[1], written, 2_000).await;
    }
    let kept = "SELECT (pg_current_wal_lsn() - restart_lsn)::int8 FROM pg_replication_slots";
    // A slot moves where PostgreSQL notes which transactions run: at a checkpoint, and every 15 seconds.
    own.admin.batch_execute("CHECKPOINT").await.expect("the superuser may");
    becomes(&own.admin, kept, |bytes| bytes < KEPT_WAL, "bytes of log that are kept for who does not read").await;

    // It does not hold up its end either.
    let began = Instant::now();
    private.restart(Shutdown::Fast).await;
    assert!(began.elapsed() < Duration::from_secs(10), "PostgreSQL was held up for {:?}", began.elapsed());
    let admin = connect(&private.url()).await;
    assert_eq!(number(&admin, slots).await, 0, "nobody reads yet");
    let _again = Watch::open(&server, &token).await;
    assert_eq!(number(&admin, slots).await, 1);
    server.program.kill().await;
    becomes(&admin, slots, |slots| slots == 0, "slots of a server that was killed").await;
}
