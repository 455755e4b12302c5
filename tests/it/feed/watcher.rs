//! A client that watches as the contract tells it to: it keeps the latest token, and resumes by itself, now at one server, now at the other.
//! It has bad habits, too: it stops reading for a while, and it leaves without a word.

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::model::{Model, Tally};
use super::watched::{Scope, Watched};
use crate::support::line::Bearer;

/// A heartbeat comes every 30 seconds; a machine that is busy may be late.
const SILENCE: Duration = Duration::from_secs(45);
/// After everything has been written and disturbed.
const CATCH_UP: Duration = Duration::from_secs(60);
/// What a client takes without reading it. Few, so that a client that stops reading is felt.
const WINDOW: u32 = 64 << 10;
/// How much of a watcher's life is told when something is wrong.
const TRAIL: usize = 80;

/// Where to watch.
pub struct Place {
    pub servers: Vec<SocketAddr>,
    pub token: String,
    /// From now on everybody behaves, and is to come to an end.
    pub calm: AtomicBool,
    /// Whoever dozes does not read as long as this holds.
    pub flood: AtomicBool,
    /// So many have been told everything that was there, and hear what happens now.
    pub live: AtomicUsize,
}

impl Place {
    pub fn new(servers: Vec<SocketAddr>, token: String) -> Arc<Self> {
        Arc::new(Self {
            servers,
            token,
            calm: AtomicBool::new(false),
            flood: AtomicBool::new(false),
            live: AtomicUsize::new(0),
        })
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }
}

/// How often, of a hundred thousand messages, and how long, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Habits {
    pub stalls: u32,
    pub stalled: (u64, u64),
    pub leaves: u32,
    pub away: (u64, u64),
    /// Stops reading when the flood begins, until it is over.
    pub dozes: bool,
}

impl Habits {
    /// Reads all the time.
    pub const GOOD: Self = Self { stalls: 0, stalled: (0, 1), leaves: 0, away: (0, 1), dozes: false };
}

/// What became of a watcher.
#[derive(Debug, Clone, Copy, Default)]
pub struct Life {
    pub tally: Tally,
    pub opened: u32,
    /// Ended with RESOURCE_EXHAUSTED.
    pub cut_off: u32,
    /// Ended with UNAVAILABLE.
    pub unavailable: u32,
    /// The connection broke.
    pub broken: u32,
    pub stalled: u32,
    pub left: u32,
}

pub struct Watcher<R> {
    name: String,
    place: Arc<Place>,
    habits: Habits,
    random: StdRng,
    scope: Scope,
    model: Model<R>,
    life: Life,
    at: usize,
    live: bool,
    trail: VecDeque<String>,
    began: Instant,
}

/// Why a watch is over.
enum Over {
    /// It has all that it waits for.
    Done,
    /// It left, or was left.
    Again,
}

impl<R: Watched> Watcher<R> {
    pub fn new(name: &str, place: Arc<Place>, scope: Scope, habits: Habits, seed: u64) -> Self {
        let mut random =
            StdRng::seed_from_u64(name.bytes().fold(seed, |seed, byte| seed.rotate_left(7) ^ u64::from(byte)));
        let at = random.random_range(0..place.servers.len());
        Self {
            name: name.to_owned(),
            habits,
            at,
            live: false,
            random,
            model: Model::new(scope.clone()),
            scope,
            place,
            life: Life::default(),
            trail: VecDeque::new(),
            began: Instant::now(),
        }
    }

    /// Watches until all is calm and it has these rows; then all that it has.
    ///
    /// # Errors
    ///
    /// What the contract does not allow, with what led to it.
    pub async fn run(mut self, last: Vec<String>) -> Result<(BTreeMap<String, R>, Life), String> {
        let mut calm_since = None;
        loop {
            let watched = self.watch(&last).await;
            self.is_live(false);
            match watched {
                Ok(Over::Done) => break,
                Ok(Over::Again) => {}
                Err(wrong) => {
                    let trail: Vec<_> = self.trail.into();
                    return Err(format!("{}: {wrong}\n  {:?}\n  {}", self.name, self.life, trail.join("\n  ")));
                }
            }
            if self.place.is_calm() {
                let since = *calm_since.get_or_insert_with(Instant::now);
                if since.elapsed() > CATCH_UP {
                    return Err(format!("{} never gets there: {:?} {:?}", self.name, self.life, self.trail));
                }
            }
            if self.random.random_bool(0.7) {
                self.at = (self.at + 1) % self.place.servers.len();
            }
        }
        self.life.tally = self.model.tally;
        if std::env::var_os("FEED_TRAIL").is_some() {
            eprintln!("{}\n  {}", self.name, Vec::from(self.trail).join("\n  "));
        }
        Ok((self.model.rows, self.life))
    }

    fn note(&mut self, what: String) {
        if self.trail.len() == TRAIL {
            self.trail.pop_front();
        }
        self.trail.push_back(format!("{:8.3} {what}", self.began.elapsed().as_secs_f64()));
    }

    fn is_live(&mut self, live: bool) {
        match (std::mem::replace(&mut self.live, live), live) {
            (false, true) => drop(self.place.live.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.place.live.fetch_sub(1, Ordering::Relaxed)),
            (false, false) | (true, true) => {}
        }
    }

    fn resume_in(&mut self, (least, most): (u64, u64)) -> Duration {
        Duration::from_millis(if self.place.is_calm() { 50 } else { self.random.random_range(least..most) })
    }

    /// What a status means for who resumes by itself.
    fn ended(&mut self, status: &Status) -> Result<(), String> {
        let from_the_server =
            status.source().is_none_or(|source| !broke(source)) && !status.message().contains("h2 protocol error");
        match status.code() {
            Code::ResourceExhausted if from_the_server => self.life.cut_off += 1,
            Code::Unavailable if from_the_server => self.life.unavailable += 1,
            _ if !from_the_server => self.life.broken += 1,
            _ => return Err(format!("a watch ends with {status:?}")),
        }
        self.note(format!(
            "ended with {:?}: {}, {} messages",
            status.code(),
            status.message(),
            self.model.tally.messages
        ));
        Ok(())
    }

    /// One watch, on one server.
    async fn watch(&mut self, last: &[String]) -> Result<Over, String> {
        let address = self.place.servers[self.at];
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI");
        let endpoint = endpoint.initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
        let Ok(channel) = endpoint.connect_timeout(Duration::from_secs(5)).connect().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            return Ok(Over::Again);
        };
        let channel: InterceptedService<Channel, Bearer> =
            InterceptedService::new(channel, Bearer::new(&self.place.token));
        let token = self.model.token.clone();
        self.note(format!("opens at {}, {} a token", self.at, if token.is_some() { "with" } else { "without" }));
        let mut stream = match R::open(channel, &self.scope, token).await {
            Ok(stream) => stream,
            Err(status) => {
                self.ended(&status)?;
                tokio::time::sleep(Duration::from_millis(400)).await;
                return Ok(Over::Again);
            }
        };
        self.life.opened += 1;
        self.model.opened();
        loop {
            let message = match tokio::time::timeout(SILENCE, stream.message()).await {
                Err(_) => return Err("not even a heartbeat".to_owned()),
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Err("a watch ends with OK".to_owned()),
                Ok(Err(status)) => {
                    self.ended(&status)?;
                    let pause = self.resume_in((20, 300));
                    tokio::time::sleep(pause).await;
                    return Ok(Over::Again);
                }
            };
            let told = R::told(message).ok_or("a message without a payload")?;
            let tally = self.model.tally;
            self.model.take(told)?;
            self.is_live(self.model.is_live());
            let now = self.model.tally;
            if (now.starts, now.caught_up, now.went_on) != (tally.starts, tally.caught_up, tally.went_on) {
                self.note(format!("starts {} caught up {} went on {}", now.starts, now.caught_up, now.went_on));
            }
            if self.place.is_calm() {
                if self.model.is_live() && last.iter().all(|key| self.model.rows.contains_key(key)) {
                    return Ok(Over::Done);
                }
                continue;
            }
            if self.habits.dozes && self.place.flood.load(Ordering::Relaxed) {
                self.life.stalled += 1;
                self.note("dozes".to_owned());
                while self.place.flood.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            if self.random.random_ratio(self.habits.stalls, 100_000) {
                self.life.stalled += 1;
                let pause = self.resume_in(self.habits.stalled);
                self.note(format!("stops reading for {pause:?}"));
                tokio::time::sleep(pause).await;
            } else if self.random.random_ratio(self.habits.leaves, 100_000) {
                self.life.left += 1;
                drop(stream);
                let pause = self.resume_in(self.habits.away);
                self.note(format!("leaves for {pause:?}"));
                tokio::time::sleep(pause).await;
                return Ok(Over::Again);
            }
        }
    }
}

/// Whether an error comes from the connection and not from the server's answer.
fn broke(source: &(dyn Error + 'static)) -> bool {
    let mut error = Some(source);
    while let Some(this) = error {
        if this.is::<tonic::transport::Error>() || this.is::<hyper::Error>() || this.is::<std::io::Error>() {
            return true;
        }
        error = this.source();
    }
    false
}
