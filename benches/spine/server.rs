//! The program under test, as an operator runs it: the real `opsmantik serve` in a process of its own, or the one that answers without storing.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::answering;
use crate::ground::{Database, Ground};
use crate::processes::Meter;

/// Where QStash is told to deliver, and what it signs for.
pub const PUBLIC_URL: &str = "https://collect.example";
pub const SIGNING_KEY: &str = "sig_of-the-bench-and-of-nobody-else";
const CALLER_KEY: &str = "of the bench, and long enough to be one";

/// A server is up, or has failed, within this time.
const LIMIT: Duration = Duration::from_secs(60);
/// Lines of its log that are kept to explain an end.
const KEPT_LINES: usize = 20;

pub struct Server {
    child: Child,
    log: Arc<Mutex<VecDeque<String>>>,
    pub pid: u32,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    meter: Meter,
    /// From the start of the process until it said that it is ready.
    pub ready_after: Duration,
}

impl Server {
    /// `opsmantik serve` on free ports, ready.
    pub async fn start(ground: &Ground, database: &Database) -> anyhow::Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_opsmantik"));
        command.arg("serve");
        Self::run(command, ground, database).await
    }

    /// The public listener in front of a transport that stores nothing.
    pub async fn start_answering(ground: &Ground, database: &Database) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(answering::VARIABLE, "1");
        Self::run(command, ground, database).await
    }

    async fn run(mut command: Command, ground: &Ground, database: &Database) -> anyhow::Result<Self> {
        for name in std::env::vars().map(|(name, _)| name) {
            if !["PATH", "HOME", "USER", "LANG", "TMPDIR", "RUST_LOG", answering::VARIABLE].contains(&&*name) {
                command.env_remove(name);
            }
        }
        for name in ["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR"] {
            command.env(name, "127.0.0.1:0");
        }
        command
            .env("DATABASE_URL", &database.url)
            .env("RATE_LIMIT", "0")
            .env("LOG_FORMAT", "json")
            .env("PUBLIC_URL", PUBLIC_URL)
            .env("QSTASH_CURRENT_SIGNING_KEY", SIGNING_KEY)
            .env("CALLER_KEY", CALLER_KEY)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().context("the server's program runs")?;
        let pid = child.id().context("it runs")?;
        let mut lines = BufReader::new(child.stderr.take().context("it is piped")?).lines();
        let log = Arc::<Mutex<VecDeque<String>>>::default();
        let listening = async {
            while let Some(line) = lines.next_line().await? {
                if let Ok(said) = serde_json::from_str::<Value>(&line)
                    && said["fields"]["message"] == "listening"
                {
                    return Ok(said["fields"].clone());
                }
                keep(&log, line);
            }
            bail!("the server ended: {}", told(&log))
        };
        let fields = tokio::time::timeout(LIMIT, listening).await.context("the server does not listen")??;
        let said = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                keep(&said, line);
            }
        });
        let address = |name: &str| fields[name].as_str().and_then(|text| text.parse().ok());
        let http = address("http.addr").context("it says where it listens")?;
        let meter = Meter { server: Some(pid), postmaster: ground.postmaster };
        let mut server = Self {
            child,
            log,
            pid,
            http,
            grpc: address("grpc.addr").unwrap_or(http),
            admin: address("admin.addr").unwrap_or(http),
            meter,
            ready_after: Duration::ZERO,
        };
        if server.admin != http {
            server.until_ready(began).await?;
        }
        server.ready_after = began.elapsed();
        Ok(server)
    }

    async fn until_ready(&mut self, began: Instant) -> anyhow::Result<()> {
        loop {
            let answer = ask(self.admin, "/readyz").await.unwrap_or_default();
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            if began.elapsed() > LIMIT {
                bail!("the server is not ready: {answer}\n{}", told(&self.log));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub fn meter(&self) -> Meter {
        self.meter
    }

    /// What it said last.
    pub fn log(&self) -> String {
        told(&self.log)
    }

    /// Asks it to stop, and waits until it has.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGTERM)?;
        let ended = tokio::time::timeout(LIMIT, self.child.wait()).await.context("the server does not stop")??;
        if !ended.success() {
            bail!("the server stopped with {ended}: {}", told(&self.log));
        }
        Ok(())
    }
}

fn keep(log: &Mutex<VecDeque<String>>, line: String) {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    if log.len() == KEPT_LINES {
        log.pop_front();
    }
    log.push_back(line);
}

fn told(log: &Mutex<VecDeque<String>>) -> String {
    let log = log.lock().unwrap_or_else(PoisonError::into_inner);
    log.iter().cloned().collect::<Vec<_>>().join("\n")
}

/// A GET of the operator's listener: the whole answer.
pub async fn ask(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
