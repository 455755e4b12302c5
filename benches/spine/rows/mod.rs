//! The rows of the table, a file each, and what they share.

use std::sync::Arc;

use anyhow::Context;
use futures::future::BoxFuture;
use opsmantik::dev::progress::{Progress, Step};

use crate::ground::{Database, Ground, SITES};
use crate::http_load::{Pace, Volley, fire};
use crate::past::Past;
use crate::report::{Line, Side};
use crate::sent::Sent;
use crate::server::Server;
use crate::workload::{Beat, Workload};

mod calls;
mod history;
mod ingest;
mod latency;
mod memory;
mod overload;
mod start;
mod sync;
mod tenants;
mod worker;

/// A row: what it is called, what it says, and how it is measured.
pub struct Row {
    pub name: &'static str,
    pub about: &'static str,
    measure: for<'b> fn(&'b mut Bench) -> BoxFuture<'b, anyhow::Result<Vec<Line>>>,
}

impl Row {
    pub async fn measure(&self, bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
        (self.measure)(bench).await
    }
}

/// In the order in which they run: what a later one needs of an earlier one it finds, or makes.
pub const ALL: &[Row] = &[
    Row {
        name: "ingest",
        about: "Ingest, batches of 100, against COPY of the same rows",
        measure: |bench| Box::pin(ingest::measure(bench, ingest::Door::Ingest)),
    },
    Row {
        name: "stream",
        about: "StreamIngest against COPY of the same rows",
        measure: |bench| Box::pin(ingest::measure(bench, ingest::Door::Stream)),
    },
    Row {
        name: "sync",
        about: "POST /api/sync, single events, 64 connections, against answering without storing",
        measure: |bench| Box::pin(sync::measure(bench)),
    },
    Row {
        name: "latency",
        about: "the durable answer of POST /api/sync at half the maximum rate",
        measure: |bench| Box::pin(latency::measure(bench)),
    },
    Row {
        name: "worker",
        about: "POST /api/sync/worker, signed single deliveries, against /api/sync inline",
        measure: |bench| Box::pin(worker::measure(bench)),
    },
    Row {
        name: "tenants",
        about: "ten thousand sites against one",
        measure: |bench| Box::pin(tenants::measure(bench)),
    },
    Row {
        name: "overload",
        about: "what one door stores while ten times as many clients do not wait, against clients that wait",
        measure: |bench| Box::pin(overload::measure(bench)),
    },
    Row {
        name: "memory",
        about: "ten times the sustainable rate for a minute, from clients that do not wait",
        measure: |bench| Box::pin(memory::measure(bench)),
    },
    Row {
        name: "history",
        about: "two years, five million events and a million sessions stored, against empty tables",
        measure: |bench| Box::pin(history::measure(bench)),
    },
    Row {
        name: "calls",
        about: "RecordCall with match over that history",
        measure: |bench| Box::pin(calls::measure(bench)),
    },
    Row {
        name: "start",
        about: "from start to ready on an existing database",
        measure: |bench| Box::pin(start::measure(bench)),
    },
];

/// Connections of the public door's clients.
pub const CONNECTIONS: usize = 64;

/// What rows run on.
pub struct Bench {
    pub ground: Ground,
    pub short: bool,
    /// Events a second through `/api/sync`, if that was measured.
    pub sync_rate: Option<f64>,
    /// The past that is laid, or is to be.
    pub past: Arc<Past>,
    /// The database with that past, once somebody needed it.
    pub laid: Option<Database>,
    step: Option<Step>,
}

impl Bench {
    pub async fn raise(progress: Progress, short: bool, settings: Vec<(String, String)>) -> anyhow::Result<Self> {
        Ok(Self {
            ground: Ground::raise(progress, settings, short).await?,
            short,
            sync_rate: None,
            past: Arc::new(Past::of(short)),
            laid: None,
            step: None,
        })
    }

    pub fn settings(&self) -> Vec<String> {
        self.ground.settings.clone()
    }

    pub fn show(&mut self, step: Step) {
        self.step = Some(step);
    }

    /// Ends the step that is shown.
    pub fn shown(&mut self, well: bool) {
        if let Some(step) = self.step.take()
            && well
        {
            step.done();
        }
    }

    /// Tells what is being done.
    pub fn say(&self, what: impl AsRef<str>) {
        if let Some(step) = &self.step {
            step.detail(what.as_ref());
        }
    }

    /// This much, or the little of a short run; of one that was built without optimisation, the least.
    pub fn size(&self, whole: usize, short: usize) -> usize {
        match (self.short, cfg!(debug_assertions)) {
            (false, _) => whole,
            (true, false) => short,
            (true, true) => short / 4,
        }
    }

    pub fn rounds(&self) -> usize {
        self.size(5, 2).max(1)
    }

    /// Tells what the last round of both sides found.
    pub fn say_round(&self, round: usize, rounds: usize, sides: [&Side; 2]) {
        let [one, other] = sides.map(|side| side.rates.last().copied().unwrap_or_default());
        self.say(format!("round {round} of {rounds}: {one:.0} and {other:.0} events/s"));
    }

    pub async fn server(&self, database: &Database) -> anyhow::Result<Server> {
        let server = Server::start(&self.ground, database).await?;
        self.say(format!("server {} on {}", server.pid, database.name));
        Ok(server)
    }

    /// The database with the past in it, laid when it is first asked for.
    pub async fn history(&mut self) -> anyhow::Result<Database> {
        if let Some(database) = &self.laid {
            return Ok(database.clone());
        }
        let database = self.ground.database().await?;
        let past = Past::of(self.short).lay(&self.ground, &database, &|what| self.say(what)).await?;
        self.past = Arc::new(past);
        self.laid = Some(database.clone());
        Ok(database)
    }

    /// Traffic of which some have been there in the past.
    pub fn workload_after_past(&self, seed: u64) -> Workload {
        Workload::new(seed, SITES).after(self.past.clone())
    }

    pub async fn end(self) -> anyhow::Result<()> {
        self.ground.end().await
    }
}

/// Sends events to a server, and adds what that took and cost to its side of the row.
pub async fn measured(
    side: &mut Side,
    events: usize,
    server: &Server,
    sending: impl Future<Output = anyhow::Result<Sent>>,
) -> anyhow::Result<()> {
    let before = server.meter().read()?;
    let sent = sending.await.with_context(|| server.log())?;
    side.add(events, sent, server.meter().read()?.since(before));
    Ok(())
}

/// Sends requests of one event each, as fast as they are answered; all of them are stored.
pub async fn all_stored(server: &Server, volley: &Arc<Volley>, events: usize) -> anyhow::Result<Sent> {
    Ok(fire(server.http, volley, CONNECTIONS, Pace::Closed).await?.all_stored(events)?.sent())
}

/// Requests of the tracker, one event each.
pub fn sync_volley(beats: &[Beat]) -> Arc<Volley> {
    let mut volley = Volley::default();
    for beat in beats {
        let headers = format!(
            "Origin: https://{}.example\r\nUser-Agent: {}\r\nAccept: */*\r\nAccept-Language: tr-TR,tr;q=0.9\r\nContent-Type: text/plain;charset=UTF-8\r\n",
            crate::workload::public_id(beat.site),
            beat.agent
        );
        volley.post("/api/sync", &headers, &beat.to_json().to_string());
    }
    Arc::new(volley)
}
