//! The private cluster: it starts from nothing, keeps what it should, goes when its owner goes,
//! and touches nobody else's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use opsmantik::dev::account::Account;
use opsmantik::dev::cluster::{Cluster, ClusterError, ClusterOptions};
use opsmantik::dev::postgres::Postgres;
use opsmantik::dev::progress::Progress;
use tokio_postgres::{Client, NoTls};

use crate::support::cluster::{cluster, throw_away};

/// Tells the owner process that a test starts, and then kills, what to own.
const OWNED: &str = "OPSMANTIK_TEST_OWNED_CLUSTER";

#[tokio::test]
async fn the_shared_cluster_answers_and_is_ready_for_logical_decoding() {
    let client = connect(&cluster().await.url("postgres")).await;
    let row = client
        .query_one("SELECT 1, current_setting('wal_level'), current_setting('fsync')", &[])
        .await
        .expect("the cluster answers");
    assert_eq!(row.get::<_, i32>(0), 1);
    assert_eq!(row.get::<_, &str>(1), "logical");
    assert_eq!(row.get::<_, &str>(2), "off");
}

#[tokio::test]
async fn a_kept_cluster_opens_again_with_its_data_its_port_and_its_password() {
    let place = Place::new();
    let first = start(place.kept()).await.expect("a new cluster starts");
    let url = first.url("postgres");
    let password = first.folder().join("password");
    let mode = fs::metadata(&password).expect("there is a password").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    leave_a_mark(&url).await;
    first.stop().expect("it stops");
    assert!(tokio_postgres::connect(&url, NoTls).await.is_err(), "it is stopped");

    let second = start(place.kept()).await.expect("it starts again");
    assert_eq!(second.url("postgres"), url);
    assert!(mark_is_there(&url).await);
    let wrong = url.replace("opsmantik:", "opsmantik:x");
    assert!(tokio_postgres::connect(&wrong, NoTls).await.is_err(), "the password counts");
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_or_another_is_found() {
    let place = Place::new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("some port is free");
    let port = taken.local_addr().expect("it is bound").port();
    let asked = ClusterOptions { port: Some(port), ..place.kept() };
    match start(asked).await {
        Err(ClusterError::PortTaken(named)) => assert_eq!(named, port),
        other => panic!("the port is taken, but: {other:?}"),
    }
    fs::write(place.folder.join("port"), port.to_string()).expect("the folder is there");
    let cluster = start(place.kept()).await.expect("another port is free");
    assert_ne!(cluster.port(), port);
}

#[tokio::test]
async fn a_second_owner_is_told_of_the_first() {
    let place = Place::new();
    let first = start(place.kept()).await.expect("a new cluster starts");
    match start(place.kept()).await {
        Err(ClusterError::InUse { owner, .. }) => {
            assert_eq!(owner, format!("process {}", std::process::id()));
        }
        other => panic!("it is in use, but: {other:?}"),
    }
    leave_a_mark(&first.url("postgres")).await;
}

#[tokio::test]
async fn a_server_without_an_owner_is_taken_over() {
    let place = Place::new();
    let first = start(place.kept()).await.expect("a new cluster starts");
    let (url, port) = (first.url("postgres"), first.port());
    leave_a_mark(&url).await;
    first.stop().expect("it stops");
    let account = Account::for_cluster().expect("there is an account");
    let mut orphan = account
        .command(&postgres().program("postgres"), &place.folder)
        .arg("-D")
        .arg(place.folder.join("data"))
        .args(["-c", &format!("port={port}"), "-c", "listen_addresses=127.0.0.1"])
        .args(["-c", "unix_socket_directories="])
        .stderr(Stdio::null())
        .spawn()
        .expect("the server can be run by hand");
    eventually("the orphan listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());

    let second = start(place.kept()).await.expect("it is taken over");
    assert!(orphan.wait().expect("it was our child").success(), "it was stopped in order");
    assert_ne!(second.pid(), Some(orphan.id()));
    assert!(mark_is_there(&second.url("postgres")).await);
}

#[tokio::test]
async fn a_pid_file_that_names_a_stranger_is_put_aside_and_the_stranger_lives() {
    let place = Place::new();
    let first = start(place.kept()).await.expect("a new cluster starts");
    let pid_file = place.folder.join("data/postmaster.pid");
    let text = fs::read_to_string(&pid_file).expect("a running server has one");
    let pid = first.pid().expect("it runs").to_string();
    first.stop().expect("it stops");
    let account = Account::for_cluster().expect("there is an account");
    let mut stranger = account.command(Path::new("/bin/sleep"), Path::new("/")).arg("600").spawn().expect("sleep runs");
    let stale = text.replacen(&pid, &stranger.id().to_string(), 1);
    fs::write(&pid_file, stale).expect("the data folder is writable");

    let second = start(place.kept()).await;
    let lives = stranger.try_wait().expect("it is our child").is_none();
    stranger.kill().expect("it is our child");
    stranger.wait().expect("it is our child");
    second.expect("the stale file does not stop it");
    assert!(lives, "the stranger was none of our business");
}

#[tokio::test]
async fn a_cluster_ends_with_an_owner_that_was_killed_and_kept_data_is_recovered() {
    let place = Place::new();
    let mut owner = Owner::start(&format!("keep {}", place.folder.display()));
    leave_a_mark(&owner.url).await;
    owner.kill();
    let url = owner.url.clone();
    eventually("the server is gone", || !owner.server_listens());

    let next = start(place.kept()).await.expect("it starts again");
    assert_eq!(next.url("postgres"), url);
    assert!(mark_is_there(&url).await);
}

#[test]
fn nothing_stays_of_a_throw_away_cluster_whose_owner_was_killed() {
    let mut owner = Owner::start("remove");
    assert!(owner.folder.join("data").is_dir());
    owner.kill();
    eventually("the server is gone", || !owner.server_listens());
    eventually("the folder is gone", || !owner.folder.exists());
}

#[tokio::test]
async fn nothing_stays_of_a_throw_away_cluster_that_is_dropped() {
    let cluster = start(throw_away(postgres())).await.expect("it starts");
    let folder = cluster.folder().to_path_buf();
    assert!(folder.exists());
    drop(cluster);
    assert!(!folder.exists());
}

#[test]
#[ignore = "no test: the owner that other tests start in a process of its own, and kill"]
fn owner() {
    let Ok(owned) = std::env::var(OWNED) else {
        panic!("only to be started by a test here");
    };
    let options = match owned.strip_prefix("keep ") {
        Some(folder) => kept(Path::new(folder)),
        None => throw_away(postgres()),
    };
    let cluster = Cluster::start(options, Progress::Silent).expect("a new cluster starts");
    let (port, folder) = (cluster.port(), cluster.folder().display());
    println!("\nOWNED {port} {} {folder}", cluster.url("postgres"));
    std::thread::sleep(Duration::from_secs(600));
}

/// A process that owns a cluster, to be killed.
struct Owner {
    process: Child,
    port: u16,
    url: String,
    folder: PathBuf,
}

impl Owner {
    fn start(owned: &str) -> Self {
        // Installed here if need be, where it is shown.
        postgres();
        let this = std::env::current_exe().expect("a test knows its program");
        let mut process = Command::new(this)
            .args(["cluster::owner", "--exact", "--ignored", "--nocapture"])
            .env(OWNED, owned)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test program runs again");
        let stdout = process.stdout.take().expect("it is piped");
        let line = BufReader::new(stdout)
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("OWNED ").map(str::to_owned))
            .expect("the owner tells what it owns");
        let mut words = line.splitn(3, ' ');
        let mut word = || words.next().expect("three words are told").to_owned();
        Owner {
            process,
            port: word().parse().expect("the first is the port"),
            url: word(),
            folder: PathBuf::from(word()),
        }
    }

    fn kill(&mut self) {
        self.process.kill().expect("SIGKILL reaches a child");
        self.process.wait().expect("it is our child");
    }

    fn server_listens(&self) -> bool {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // After a failed assertion it may still live; killed already, there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A folder for a kept cluster, removed with the test.
struct Place {
    folder: PathBuf,
}

impl Place {
    fn new() -> Self {
        let name = format!("opsmantik-kept-{}", uuid::Uuid::new_v4().simple());
        Place { folder: std::env::temp_dir().join(name) }
    }

    fn kept(&self) -> ClusterOptions {
        kept(&self.folder)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The test has ended, well or badly; the system's temporary folder takes what stays.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn kept(folder: &Path) -> ClusterOptions {
    ClusterOptions { data_dir: folder.to_path_buf(), durable: true, keep: true, ..throw_away(postgres()) }
}

fn postgres() -> Postgres {
    Postgres::find_or_install(Progress::stderr()).expect("the tests need PostgreSQL")
}

async fn start(options: ClusterOptions) -> Result<Cluster, ClusterError> {
    tokio::task::spawn_blocking(|| Cluster::start(options, Progress::Silent)).await.expect("starting does not panic")
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the cluster accepts connections");
    tokio::spawn(connection);
    client
}

async fn leave_a_mark(url: &str) {
    connect(url)
        .await
        .batch_execute("CREATE TABLE mark AS SELECT 'here' AS text")
        .await
        .expect("the superuser may create a table");
}

async fn mark_is_there(url: &str) -> bool {
    let client = connect(url).await;
    let row = client.query_one("SELECT text FROM mark", &[]).await;
    row.is_ok_and(|row| row.get::<_, &str>(0) == "here")
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < limit, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
