//! A NATS server of a test's own, and edges and workers around it, as an operator runs them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{Consumer, pull};
use async_nats::jetstream::{self, stream};
use opsmantik::dev::tools::{Tool, require, skip_or_fail};
use tokio::process::Command;

use super::database::Database;
use super::process::{Program, Server};

/// The login of every server here. It must be seen nowhere.
pub const PASSWORD: &str = "n4ts-p4ssw0rd";
const STREAM: &str = "opsmantik";
const CONSUMER: &str = "workers";
/// What the longest way takes, by far: an event is stranded, is told to be, and waits for a worker that is dead.
const LIMIT: Duration = Duration::from_secs(60);

/// A `nats-server` with JetStream in a folder of its own, which goes with it.
pub struct NatsServer {
    found: PathBuf,
    folder: PathBuf,
    port: u16,
    tls: bool,
    program: Option<Program>,
}

impl NatsServer {
    /// One that runs; none where there can be none, which has been said by then.
    pub async fn start() -> Option<Self> {
        let mut server = Self::found().await?;
        server.restart().await;
        Some(server)
    }

    /// One that speaks TLS only, with this certificate and key.
    pub async fn with_tls(certificate: &str, key: &str) -> Option<Self> {
        let mut server = Self::found().await?;
        server.tls = true;
        std::fs::write(server.folder.join("certificate.pem"), certificate).expect("a folder of ours");
        std::fs::write(server.folder.join("key.pem"), key).expect("a folder of ours");
        server.restart().await;
        Some(server)
    }

    async fn found() -> Option<Self> {
        let required = tokio::task::spawn_blocking(|| require(Tool::NatsServer)).await.expect("no panic");
        let found = match required {
            Ok(found) => found.path,
            Err(missing) => {
                skip_or_fail(&missing);
                return None;
            }
        };
        let name = format!("opsmantik-nats-{}", uuid::Uuid::new_v4().simple());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir(&folder).expect("a folder of our own");
        Some(Self { found, folder, port: 0, tls: false, program: None })
    }

    /// The file of its certificate.
    pub fn certificate(&self) -> String {
        self.folder.join("certificate.pem").display().to_string()
    }

    /// Begins on the port and the files that it had, if it had any.
    pub async fn restart(&mut self) {
        let mut command = Command::new(&self.found);
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        command
            .args(["-js", "-a", "127.0.0.1", "-p", &port, "--user", "om", "--pass", PASSWORD, "-sd"])
            .arg(&self.folder);
        if self.tls {
            command
                .arg("--tls")
                .arg("--tlscert")
                .arg(self.certificate())
                .arg("--tlskey")
                .arg(self.folder.join("key.pem"));
        }
        let mut program = Program::of(command);
        let listens = |said: &str| {
            let ready = said.contains("Server is ready");
            let (_, after) = said.split_once("Listening for client connections on 127.0.0.1:")?;
            let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok().filter(|_| ready)
        };
        self.port = program.until("that NATS listens", listens).await;
        self.program = Some(program);
    }

    /// `kill -9`; its files stay.
    pub async fn kill(&mut self) {
        self.program.take().expect("it runs").kill().await;
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls { "tls" } else { "nats" };
        format!("{scheme}://om:{PASSWORD}@127.0.0.1:{}", self.port)
    }

    pub async fn jetstream(&self) -> jetstream::Context {
        let address = format!("127.0.0.1:{}", self.port);
        let options = async_nats::ConnectOptions::with_user_and_password("om".to_owned(), PASSWORD.to_owned());
        jetstream::new(options.connect(address).await.expect("NATS answers"))
    }

    /// Messages in the stream.
    pub async fn messages(&self) -> u64 {
        self.state().await.messages
    }

    pub async fn state(&self) -> stream::State {
        self.jetstream().await.get_stream(STREAM).await.expect("the stream is there").cached_info().state.clone()
    }

    /// Waits until nothing is in the stream: all is acknowledged or terminated.
    pub async fn empty(&self) {
        let (jetstream, began) = (self.jetstream().await, Instant::now());
        loop {
            let stream = jetstream.get_stream(STREAM).await.expect("the stream is there");
            let left = stream.cached_info().state.messages;
            if left == 0 {
                return;
            }
            if began.elapsed() > LIMIT {
                panic!("{left} messages are still in the stream\n{}", self.figures().await);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until this many events are in the tables.
    pub async fn stored(&self, database: &Database, events: i64) {
        let began = Instant::now();
        loop {
            let there = database.count("SELECT count(*) FROM events").await;
            if there == events {
                return;
            }
            assert!(there < events, "{there} events, and {events} were sent");
            if began.elapsed() > LIMIT {
                let dead = database.rows("SELECT reason, detail FROM dead_letters LIMIT 5").await;
                panic!("{there} of {events} events are stored; dead: {dead:?}\n{}", self.figures().await);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The consumer of the workers.
    pub async fn consumer(&self) -> Consumer<pull::Config> {
        let consumer = self.jetstream().await.get_consumer_from_stream(CONSUMER, STREAM).await;
        consumer.expect("the consumer is there")
    }

    /// The files of the stream's events as they are now. What its consumer knows is not among them.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let files = std::fs::read_dir(self.events()).expect("NATS has a stream");
        let paths = files.map(|file| file.expect("a file").path());
        paths.map(|path| (path.clone(), std::fs::read(path).expect("its content"))).collect()
    }

    /// Makes them what they were, while it is down.
    pub fn put_back(&self, files: &[(PathBuf, Vec<u8>)]) {
        assert!(self.program.is_none(), "it writes them");
        std::fs::remove_dir_all(self.events()).expect("a folder of ours");
        std::fs::create_dir(self.events()).expect("a folder of ours");
        for (path, content) in files {
            std::fs::write(path, content).expect("a folder of ours");
        }
    }

    fn events(&self) -> PathBuf {
        self.folder.join("jetstream/$G/streams").join(STREAM).join("msgs")
    }

    /// What the stream and its consumer say of themselves, for a test that fails.
    pub async fn figures(&self) -> String {
        let stream = match self.jetstream().await.get_stream(STREAM).await {
            Ok(stream) => stream,
            Err(error) => return format!("no stream: {error}"),
        };
        let stored = &stream.cached_info().state;
        let (messages, first, last) = (stored.messages, stored.first_sequence, stored.last_sequence);
        let consumer = match stream.consumer_info(CONSUMER).await {
            Ok(info) => format!(
                "pending {} ack_pending {} redelivered {} waiting {} delivered {}/{} floor {}/{} made {}",
                info.num_pending,
                info.num_ack_pending,
                info.num_redelivered,
                info.num_waiting,
                info.delivered.stream_sequence,
                info.delivered.consumer_sequence,
                info.ack_floor.stream_sequence,
                info.ack_floor.consumer_sequence,
                info.created
            ),
            Err(error) => format!("no consumer: {error}"),
        };
        format!("stream: messages {messages} first {first} last {last}; consumer: {consumer}")
    }

    /// An edge, or a whole server.
    pub async fn serve(&self, role: &str, database_url: &str, more: &[(&str, &str)]) -> Server {
        let url = self.url();
        let mut env = vec![("QUEUE", "nats"), ("NATS_URL", url.as_str()), ("ROLE", role)];
        env.extend(more);
        Server::start_with(database_url, &env).await
    }

    pub async fn worker(&self, database_url: &str) -> Worker {
        Worker::start(database_url, &self.url()).await
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        drop(self.program.take());
        drop(std::fs::remove_dir_all(Path::new(&self.folder)));
    }
}

/// `opsmantik serve --role worker`.
pub struct Worker {
    pub program: Program,
    pub admin: SocketAddr,
}

impl Worker {
    pub async fn start(database_url: &str, nats_url: &str) -> Self {
        let env = [
            ("DATABASE_URL", database_url),
            ("LOG_FORMAT", "json"),
            ("QUEUE", "nats"),
            ("NATS_URL", nats_url),
            ("ADMIN_ADDR", "127.0.0.1:0"),
        ];
        let mut program = Program::start(&["serve", "--role", "worker"], &env);
        let working = |said: &str| {
            let (_, after) = said.split_once(r#""admin.addr":""#)?;
            after.split_once('"')?.0.parse().ok()
        };
        let admin = program.until("that it works", working).await;
        Self { program, admin }
    }
}
