//! A private PostgreSQL cluster: made, started, stopped, and recovered.
//!
//! It lives in one folder, listens on loopback only, asks for a random password
//! that lies beside its data, and belongs to one process at a time, its owner. It
//! never outlives its owner, not even by `kill -9` (a watchdog sees to it); what
//! such an end left behind is cleared at the next start, and kept data is recovered
//! by PostgreSQL itself. No other cluster of the machine is ever touched.
//!
//! ```text
//! folder/lock       held by the owner while it lives
//! folder/password   of the superuser, for nobody else to read
//! folder/port       the last one, so that a kept cluster keeps its address
//! folder/log        what the server wrote
//! folder/data       PostgreSQL's own
//! ```

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::account::{Account, AccountError};
use super::folder::{open_log, password, place, read_log, take_lock};
use super::leftover;
use super::postgres::{Postgres, PostgresError};
use super::progress::{CommandError, Progress};
use super::watchdog::Watchdog;

/// The superuser of every cluster made here.
pub const USER: &str = "opsmantik";

/// Crash recovery of a busy development database takes seconds; a minute and a half is a fault.
const START_LIMIT: Duration = Duration::from_secs(90);
/// How long an orderly stop may take before it is made an immediate one.
const STOP_LIMIT: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(25);
/// Somebody may take a free port between our look and PostgreSQL's bind, so another is tried.
const PORT_TRIES: usize = 5;

/// Always given: they hold for every cluster of ours, whatever its configuration file says.
const SETTINGS: [(&str, &str); 11] = [
    ("listen_addresses", "127.0.0.1"),
    // Loopback is enough, and a folder's path may be longer than a socket's may be.
    ("unix_socket_directories", ""),
    ("wal_level", "logical"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_connections", "100"),
    // A statement over years of partitions locks each of their tables and indexes.
    ("max_locks_per_transaction", "256"),
    ("jit", "off"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("logging_collector", "off"),
];

/// For data that is kept. PostgreSQL's own defaults (128MB and 1GB) are for the smallest machine it runs on: the pages of a month that is being written
/// should stay in memory, and not be logged whole time and again because a checkpoint was forced. Memory is taken as it is needed. A segment of the log
/// that is not needed any more is written over; of less than `min_wal_size` none is removed, and a new one has to be filled with zeros while whoever
/// commits waits.
const DURABLE: [(&str, &str); 3] = [("shared_buffers", "512MB"), ("max_wal_size", "2GB"), ("min_wal_size", "1GB")];

/// For data that may be lost with the machine, as a test's may; there are many such clusters, and they are small.
const NOT_DURABLE: [(&str, &str); 5] = [
    ("fsync", "off"),
    ("synchronous_commit", "off"),
    ("full_page_writes", "off"),
    ("shared_buffers", "64MB"),
    ("max_wal_size", "512MB"),
];

/// What kind of cluster, and where.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    pub postgres: Postgres,
    /// The cluster's folder; made if missing. Where PostgreSQL's user cannot get there, another
    /// one is used, always the same; if it is kept, a file beside this path, ending in
    /// `.location`, names it.
    pub data_dir: PathBuf,
    /// The port to use, or to fail on; none takes the last one again, or any that is free.
    pub port: Option<u16>,
    /// Whether a commit survives the machine.
    pub durable: bool,
    /// Further settings; they win over ours.
    pub settings: Vec<(String, String)>,
    /// Whether the folder stays when the owner is gone.
    pub keep: bool,
}

/// Why a cluster does not run.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("the database in {folder} is in use by another process of ours ({owner}): stop that one first")]
    InUse { folder: PathBuf, owner: String },
    #[error("port {0} is taken by another program")]
    PortTaken(u16),
    #[error(
        "the database in {folder} was made by PostgreSQL {made_by}, which is not installed (there is {found}): \
         install that version, or remove the folder to begin anew"
    )]
    OtherVersion { folder: PathBuf, made_by: String, found: Postgres },
    #[error("PostgreSQL did not start in {folder}: {why}\n{log}")]
    NotStarted { folder: PathBuf, why: String, log: String },
    #[error("PostgreSQL (process {pid}) in {folder} could not be stopped")]
    NotStopped { folder: PathBuf, pid: i32 },
    #[error("cannot use {path} for the database: {source}")]
    Folder { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Initdb(#[from] CommandError),
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    #[error(transparent)]
    Account(#[from] AccountError),
}

/// A running cluster; dropping it stops it.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    postgres: Postgres,
    port: u16,
    password: String,
    keep: bool,
    server: Option<(Child, Watchdog)>,
    /// Held until the server is stopped, and released by the system should we die.
    _lock: File,
}

impl Cluster {
    /// Makes the cluster if it is new, and starts it; returns when it accepts connections.
    pub fn start(options: ClusterOptions, progress: Progress) -> Result<Self, ClusterError> {
        let account = Account::for_cluster()?;
        let folder = place(&options, account, progress)?;
        let lock = take_lock(&folder)?;
        let mut watchdog = Watchdog::start(&folder, options.keep).map_err(on(&folder))?;
        leftover::clear(&folder.join("data"), progress)
            .map_err(|pid| ClusterError::NotStopped { folder: folder.clone(), pid })?;
        let password = password(&folder, account)?;
        let postgres = initialise(&folder, account, options.postgres.clone(), progress)?;

        let step = progress.step(format!("starting {postgres}"));
        let remembered = folder.join("port");
        let mut tries = PORT_TRIES;
        let (server, port) = loop {
            let port = match options.port {
                Some(port) => is_free(port).then_some(port),
                None => free_port(&remembered),
            };
            let port = port.ok_or(ClusterError::PortTaken(options.port.unwrap_or_default()))?;
            let log = open_log(&folder, account)?;
            let mut server = launch(&options, &postgres, &folder, account, port, &log)?;
            let pid = server.id();
            watchdog.started(pid).map_err(on(&folder))?;
            match wait_until_ready(&mut server, &folder) {
                Ok(()) => break (server, port),
                Err(why) => {
                    stop_server(&mut server, Signal::SIGQUIT);
                    let log = read_log(&folder, log);
                    tries -= 1;
                    if log.contains("could not bind") && options.port.is_some() {
                        return Err(ClusterError::PortTaken(port));
                    }
                    // The last sessions of a server that was killed may need a moment to notice.
                    let passing = log.contains("could not bind") || log.contains("pre-existing shared memory block");
                    if !passing || tries == 0 {
                        return Err(ClusterError::NotStarted { folder, why, log });
                    }
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
        };
        fs::write(&remembered, port.to_string()).map_err(on(&remembered))?;
        step.done();
        Ok(Cluster {
            folder,
            postgres,
            port,
            password,
            keep: options.keep,
            server: Some((server, watchdog)),
            _lock: lock,
        })
    }

    /// Where to connect, as the superuser.
    pub fn url(&self, database: &str) -> String {
        let (password, port) = (&self.password, self.port);
        // Nothing listens there but our own cluster, and it has no certificate to show.
        format!("postgres://{USER}:{password}@127.0.0.1:{port}/{database}?sslmode=disable")
    }

    /// A line for a shell that opens a database.
    pub fn psql_line(&self, database: &str) -> String {
        format!("{} '{}'", self.postgres.psql().display(), self.url(database))
    }

    /// The port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder it truly lives in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The process id of the server.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(|(server, _)| server.id())
    }

    /// Stops it: open sessions are ended, what was committed is written. A cluster that is not
    /// kept is gone afterwards, with its folder.
    pub fn stop(mut self) -> Result<(), ClusterError> {
        self.stop_now()
    }

    fn stop_now(&mut self) -> Result<(), ClusterError> {
        let Some((mut server, watchdog)) = self.server.take() else {
            return Ok(());
        };
        let signal = if self.keep { Signal::SIGINT } else { Signal::SIGQUIT };
        if stop_server(&mut server, signal).is_none() {
            return Err(ClusterError::NotStopped { folder: self.folder.clone(), pid: server.id().cast_signed() });
        }
        watchdog.stopped().map_err(on(&self.folder))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.stop_now() {
            super::progress::write_stderr(&format!("{error}\n"));
        }
    }
}

/// Makes the data, if there is none, and tells which PostgreSQL opens it.
fn initialise(
    folder: &Path,
    account: Account,
    postgres: Postgres,
    progress: Progress,
) -> Result<Postgres, ClusterError> {
    let data = folder.join("data");
    if data.exists() {
        let path = data.join("PG_VERSION");
        let made_by = fs::read_to_string(&path).map_err(on(&path))?;
        let made_by = made_by.trim();
        if made_by == postgres.major().to_string() {
            return Ok(postgres);
        }
        let same = match made_by.parse() {
            Ok(major) => Postgres::find_major(major)?,
            Err(_) => None,
        };
        return same.ok_or_else(|| ClusterError::OtherVersion {
            folder: folder.to_path_buf(),
            made_by: made_by.to_owned(),
            found: postgres,
        });
    }
    // Under another name first: an interrupted attempt never looks like data.
    let fresh = folder.join("data.new");
    let initdb = |locale: &str| {
        if fresh.exists() {
            fs::remove_dir_all(&fresh).map_err(on(&fresh))?;
        }
        let mut command = account.command(&postgres.program("initdb"), folder);
        command
            .args(["--username", USER, "--encoding", "UTF8", "--no-sync"])
            .args(["--auth", "scram-sha-256", "--pwfile"])
            .arg(folder.join("password"))
            .args(["--locale", locale, "--pgdata"])
            .arg(&fresh);
        let made = progress.run("making a new database cluster", &mut command);
        made.map_err(ClusterError::from)
    };
    match initdb("C.UTF-8") {
        Err(ClusterError::Initdb(CommandError::Failed { output, .. })) if output.contains("locale") => {
            initdb("C")?;
        }
        done => done?,
    }
    fs::rename(&fresh, &data).map_err(on(&data))?;
    Ok(postgres)
}

fn launch(
    options: &ClusterOptions,
    postgres: &Postgres,
    folder: &Path,
    account: Account,
    port: u16,
    log: &File,
) -> Result<Child, ClusterError> {
    let mut command = account.command(&postgres.program("postgres"), folder);
    command.arg("-D").arg(folder.join("data"));
    command.args(["-c", &format!("port={port}")]);
    let kind: &[(&str, &str)] = if options.durable { &DURABLE } else { &NOT_DURABLE };
    for (name, value) in SETTINGS.iter().chain(kind) {
        command.args(["-c", &format!("{name}={value}")]);
    }
    for (name, value) in &options.settings {
        command.args(["-c", &format!("{name}={value}")]);
    }
    let log_path = folder.join("log");
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(on(&log_path))?)
        .stderr(log.try_clone().map_err(on(&log_path))?)
        .spawn()
        .map_err(|source| ClusterError::NotStarted {
            folder: folder.to_path_buf(),
            why: format!("{} cannot be run", postgres.program("postgres").display()),
            log: source.to_string(),
        })
}

/// PostgreSQL tells in the eighth line of its pid file when it accepts connections.
fn wait_until_ready(server: &mut Child, folder: &Path) -> Result<(), String> {
    let pid_file = folder.join("data/postmaster.pid");
    let limit = Instant::now() + START_LIMIT;
    while Instant::now() < limit {
        match server.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Err(format!("it ended at once ({status})")),
            Err(error) => return Err(error.to_string()),
        }
        let text = fs::read_to_string(&pid_file).unwrap_or_default();
        let mut lines = text.lines();
        let pid = lines.next().and_then(|line| line.trim().parse().ok());
        if pid == Some(server.id()) && lines.nth(6).is_some_and(|line| line.trim() == "ready") {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
    Err(format!("it was not ready after {} s", START_LIMIT.as_secs()))
}

/// Stops a child of ours, ever less politely; none if it cannot be stopped.
fn stop_server(server: &mut Child, first: Signal) -> Option<ExitStatus> {
    for signal in [first, Signal::SIGQUIT, Signal::SIGKILL] {
        if let Ok(Some(status)) = server.try_wait() {
            return Some(status);
        }
        leftover::send(server.id().cast_signed(), signal);
        let limit = Instant::now() + STOP_LIMIT;
        while Instant::now() < limit {
            if let Ok(Some(status)) = server.try_wait() {
                return Some(status);
            }
            std::thread::sleep(POLL);
        }
    }
    None
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn free_port(remembered: &Path) -> Option<u16> {
    let last = fs::read_to_string(remembered).ok();
    let last = last.and_then(|text| text.trim().parse().ok());
    if let Some(port) = last.filter(|port| *port != 0 && is_free(*port)) {
        return Some(port);
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    listener.local_addr().ok().map(|address| address.port())
}

pub(super) fn on(path: &Path) -> impl Fn(io::Error) -> ClusterError + use<> {
    let path = path.to_path_buf();
    move |source| ClusterError::Folder { path: path.clone(), source }
}
