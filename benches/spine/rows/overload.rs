//! `overload`: what a door stores while ten times as much is offered to it, against what it stores for clients that wait.
//!
//! One door at a time: an event of `Ingest` costs a third of one that comes by itself, so through both doors at once the number of events would
//! tell who was served more rather than what was wasted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::{Bench, CONNECTIONS, sync_volley};
use crate::flood::{self, Called, Flooded, Pressure};
use crate::ground::{Database, SITES};
use crate::report::{Bar, Line, Side};
use crate::sent::Sent;
use crate::server::Server;
use crate::workload::{Beat, Workload};

/// How much more is offered.
const TIMES: usize = 10;
/// Callers of `Ingest` who wait.
const CALLERS: usize = 16;

/// Where a load is laid on, and what makes its events others than those before.
struct Target<'b> {
    server: &'b Server,
    database: &'b Database,
    token: &'b str,
    beats: &'b Arc<Vec<Beat>>,
    flood: u32,
    lasts: Duration,
}

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let database = bench.ground.database().await?;
    let server = bench.server(&database).await?;
    let beats = Arc::new(Workload::new(6000, SITES).take(2_000));
    let rounds = if bench.short { 1 } else { 3 };
    // The short form runs without optimisation, too, where reading what 160 callers send takes seconds.
    let lasts = Duration::from_secs(if bench.short { 4 } else { 10 });
    let mut flood = 0;
    let mut target = |lasts| {
        flood += 1;
        Target { server: &server, database: &database, token: &bench.ground.token, beats: &beats, flood, lasts }
    };
    let warm_up = Duration::from_secs(if bench.short { 1 } else { 3 });
    target(warm_up).http(&mut Side::default(), 1, None).await?;
    target(warm_up).ingest(&mut Side::default(), CALLERS).await?;

    let (mut calm, mut flooded, mut told) = (Side::default(), Side::default(), Flooded::default());
    for round in 1..=rounds {
        database.checkpoint().await?;
        target(lasts).http(&mut calm, 1, None).await?;
        let rate = calm.rates.last().copied().unwrap_or_default();
        database.checkpoint().await?;
        let seen = target(lasts).http(&mut flooded, TIMES, Some(rate)).await?;
        told.offered += seen.offered;
        told.sent += seen.sent;
        told.refused += seen.refused;
        told.without_retry_after += seen.without_retry_after;
        bench.say_round(round, rounds, [&flooded, &calm]);
    }
    ensure!(told.without_retry_after == 0, "{} refusals had no Retry-After", told.without_retry_after);
    let bar = || Bar::AtLeast { bar: 0.9, stretch: None };
    let what = format!(
        "POST /api/sync, stored while {TIMES} times as much is offered; reference: {CONNECTIONS} clients that wait"
    );
    let sync = Line::ratio("overload", what, ["flooded", "calm"], flooded, calm, bar())
        .with("offered", told.offered)
        .with("sent", told.sent)
        .with("refused", told.refused);

    let (mut calm, mut flooded, mut told) = (Side::default(), Side::default(), Called::default());
    for round in 1..=rounds {
        database.checkpoint().await?;
        target(lasts).ingest(&mut calm, CALLERS).await?;
        database.checkpoint().await?;
        let called = target(lasts).ingest(&mut flooded, CALLERS * TIMES).await?;
        told.stored += called.stored;
        told.refused += called.refused;
        told.without_retry_info += called.without_retry_info;
        bench.say_round(round, rounds, [&flooded, &calm]);
    }
    ensure!(told.without_retry_info == 0, "{} refusals had no RetryInfo", told.without_retry_info);
    let what = format!(
        "Ingest, stored while {} callers ask again at once when they are refused; reference: {CALLERS} callers that wait",
        CALLERS * TIMES
    );
    let ingest = Line::ratio("overload", what, ["flooded", "calm"], flooded, calm, bar())
        .with("calls_stored", told.stored)
        .with("calls_refused", told.refused);
    server.stop().await?;
    bench.ground.drop(database).await?;
    Ok(vec![sync, ingest])
}

impl Target<'_> {
    /// `times` the usual connections; each waits for its answers, or all of them together send `times` this rate.
    async fn http(&self, side: &mut Side, times: usize, rate: Option<f64>) -> anyhow::Result<Flooded> {
        #[allow(clippy::cast_precision_loss)]
        let rate = rate.map(|rate| rate * times as f64);
        let pressure = Pressure { connections: CONNECTIONS * times, rate, lasts: self.lasts };
        let volley = sync_volley(self.beats);
        let seen = self.counted(side, flood::press(self.server.http, &volley, self.flood, pressure)).await?;
        ensure!(seen.others + seen.hung_up == 0, "unexpected answers: {seen:?}");
        Ok(seen)
    }

    async fn ingest(&self, side: &mut Side, callers: usize) -> anyhow::Result<Called> {
        let calls = flood::ingest(self.server.grpc, self.token, self.beats, self.flood, callers, self.lasts);
        self.counted(side, calls).await
    }

    /// Adds what was in the tables when the time was over.
    async fn counted<T>(&self, side: &mut Side, load: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let (before, began) = (self.database.count("events").await?, Instant::now());
        let spent = self.server.meter().read()?;
        let counting = async {
            tokio::time::sleep(self.lasts).await;
            let spent = self.server.meter().read()?.since(spent);
            let seconds = began.elapsed().as_secs_f64();
            anyhow::Ok((self.database.count("events").await? - before, seconds, spent))
        };
        let (seen, counted) = tokio::join!(load, counting);
        let (stored, seconds, spent) = counted?;
        ensure!(stored > 0, "nothing was stored: {}", self.server.log());
        side.add(stored, Sent { seconds, again: 0 }, spent);
        seen
    }
}
