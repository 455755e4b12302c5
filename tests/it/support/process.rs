//! The program itself, as an operator runs it: the real binary, its output, its signals and its end.
//!
//! It gets an environment of its own, so that a variable of whoever runs the tests cannot change them, and it never outlives the test.

use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};

/// Nothing that a test waits for takes longer, not even a new database cluster on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

fn command(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_opsmantik"));
    command.args(args).env_clear().kill_on_drop(true).stdin(Stdio::null());
    for kept in ["PATH", "HOME", "USER", "LANG", "TMPDIR"] {
        if let Ok(value) = std::env::var(kept) {
            command.env(kept, value);
        }
    }
    command.envs(env.iter().copied());
    command
}

/// How a command ended, and all that it said.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// What it printed for a script.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// What it complained of: one sentence, and no success.
    pub fn complaint(&self) -> &str {
        assert!(self.code.is_some_and(|code| code != 0), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        &self.stderr
    }
}

/// Runs a command to its end.
pub async fn run(args: &[&str], env: &[(&str, &str)]) -> Ended {
    let output = tokio::time::timeout(LIMIT, command(args, env).output()).await;
    let output = output.unwrap_or_else(|_| panic!("{args:?} does not end")).expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it speaks UTF-8");
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A running program.
pub struct Program {
    child: Child,
    said: Arc<Mutex<String>>,
    began: Instant,
}

impl Program {
    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::of(command(args, env))
    }

    /// Any program.
    pub fn of(mut command: Command) -> Self {
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        let said = Arc::<Mutex<String>>::default();
        tokio::spawn(listen(child.stdout.take().expect("it is piped"), said.clone()));
        tokio::spawn(listen(child.stderr.take().expect("it is piped"), said.clone()));
        Self { child, said, began: Instant::now() }
    }

    /// All it has said so far, on both streams.
    pub fn said(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it has said something that `find` finds.
    pub async fn until<T>(&mut self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        loop {
            // Asked before it is read: whoever has ended has said all.
            let ended = self.child.try_wait().expect("it is our child");
            if ended.is_some() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            if let Some(found) = find(&self.said()) {
                return found;
            }
            assert!(ended.is_none(), "{what}: it ended with {ended:?}\n{}", self.said());
            assert!(self.began.elapsed() < LIMIT, "{what}: not said in time\n{}", self.said());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id().expect("it has not been waited for")).expect("a pid")
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("it is our child");
    }

    /// `kill -9`, and gone.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("it is our child");
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = tokio::time::timeout(LIMIT, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("it does not end:\n{}", self.said())).expect("it is our child")
    }

    /// Asks it to stop, which it must do in order and within `limit`.
    pub async fn stop(&mut self, limit: Duration) {
        self.signal(Signal::SIGTERM);
        let began = Instant::now();
        let status = self.ended().await;
        assert_eq!(status.code(), Some(0), "{}", self.said());
        assert!(began.elapsed() < limit, "stopping took {:?}:\n{}", began.elapsed(), self.said());
        assert!(!self.said().contains("panicked"), "{}", self.said());
    }
}

async fn listen(stream: impl AsyncRead + Unpin, said: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.push_str(&line);
        said.push('\n');
    }
}

/// `opsmantik serve` on free ports.
pub struct Server {
    pub program: Program,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
}

impl Server {
    pub async fn start(database_url: &str) -> Self {
        Self::start_with(database_url, &[]).await
    }

    pub async fn start_with(database_url: &str, more: &[(&str, &str)]) -> Self {
        let free = "127.0.0.1:0";
        let mut env = vec![("DATABASE_URL", database_url), ("LOG_FORMAT", "json"), ("RATE_LIMIT", "0")];
        env.extend(["HTTP_ADDR", "GRPC_ADDR", "ADMIN_ADDR"].map(|name| (name, free)));
        env.extend(more);
        let mut program = Program::start(&["serve"], &env);
        let listening = |said: &str| {
            let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut fields = lines.map(|line| line["fields"].clone());
            fields.find(|fields| fields["message"] == "listening")
        };
        let fields = program.until("where it listens", listening).await;
        let address = |name: &str| fields[name].as_str().and_then(|text| text.parse().ok()).expect("an address");
        let [http, grpc, admin] = ["http.addr", "grpc.addr", "admin.addr"].map(address);
        Self { program, http, grpc, admin }
    }

    pub fn sync_url(&self) -> String {
        format!("http://{}/api/sync", self.http)
    }

    pub fn ready_url(&self) -> String {
        format!("http://{}/readyz", self.admin)
    }
}

/// A client that gives up before a test does.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().expect("a client")
}
