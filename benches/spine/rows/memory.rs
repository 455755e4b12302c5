//! `memory`: what the server holds while ten times as much is offered as it can do, through two doors at once. What a door stores meanwhile is the
//! row `overload`.
//!
//! First the same doors are measured with clients that wait: that is the most it can do. Then the flood: ten times as many connections whose requests
//! are due by the clock at ten times that rate and who do not wait for answers, and streams that send what flow control takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::{Bench, CONNECTIONS, sync_volley};
use crate::flood::{self, Flooded, Pressure};
use crate::ground::{Database, SITES};
use crate::processes::resident;
use crate::report::{Bar, Line, median};
use crate::server::Server;
use crate::workload::{Beat, Workload};

const STREAMS: usize = 2;
const TIMES: usize = 10;
const MIB: f64 = 1024.0 * 1024.0;

/// What was seen while load was on.
struct Seen {
    http: Flooded,
    acknowledged: usize,
    ended: usize,
    /// Events stored, a second.
    goodput: f64,
    /// Resident bytes, twice a second.
    resident: Vec<u64>,
}

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let database = bench.ground.database().await?;
    let server = bench.server(&database).await?;
    let beats = Arc::new(Workload::new(7000, SITES).take(2_000));
    let (warm_up, calm, flood) = if bench.short { (1, 4, 5) } else { (3, 15, 60) };
    let waiting = |seconds| Pressure { connections: CONNECTIONS, rate: None, lasts: Duration::from_secs(seconds) };
    load(&server, bench, &database, &beats, 1, waiting(warm_up)).await?;
    let before = resident(server.pid)?.0;
    bench.say("clients that wait");
    let most = load(&server, bench, &database, &beats, 2, waiting(calm)).await?;
    ensure!(most.http.others + most.http.hung_up == 0, "unexpected answers: {:?}", most.http);
    ensure!(most.http.stored > 0 && most.acknowledged > 0, "nothing was stored by clients that wait: {:?}", most.http);
    // Of both doors together.
    #[allow(clippy::cast_precision_loss)]
    let rate = (most.http.stored + most.acknowledged) as f64 / calm as f64 * TIMES as f64;
    bench.say(format!("{rate:.0} requests/s are offered to server {}", server.pid));
    let pressure = Pressure { connections: CONNECTIONS * TIMES, rate: Some(rate), lasts: Duration::from_secs(flood) };
    let flooded = load(&server, bench, &database, &beats, 3, pressure).await?;
    let peak = resident(server.pid)?.1;
    server.stop().await?;
    bench.ground.drop(database).await?;
    ensure!(flooded.http.stored > 0 && flooded.acknowledged > 0, "nothing was stored in the flood: {:?}", flooded.http);

    #[allow(clippy::cast_precision_loss)]
    let mib = |bytes: u64| bytes as f64 / MIB;
    let part = |from: usize, to: usize| {
        let (all, times) = (flooded.resident.len(), |at: usize| flooded.resident.len() * at / 4);
        median(
            &flooded.resident[times(from).min(all)..times(to).min(all)]
                .iter()
                .map(|bytes| mib(*bytes))
                .collect::<Vec<_>>(),
        )
    };
    let http = &flooded.http;
    let bar = Bar::AtMost { bar: 128.0, stretch: Some(64.0) };
    let what = format!("resident at the most, {TIMES} times the sustainable rate for {flood} s");
    let memory = Line::figure("memory", what, "MiB", mib(peak), Some(bar))
        .with("before_mib", mib(before))
        .with("second_quarter_mib", part(1, 2))
        .with("last_quarter_mib", part(3, 4))
        .with("offered", http.offered)
        .with("sent", http.sent)
        .with("stored", http.stored)
        .with("refused", http.refused)
        .with("other_answers", http.others)
        .with("hung_up", http.hung_up)
        .with("events_per_second", flooded.goodput)
        .with("events_per_second_of_clients_that_wait", most.goodput)
        .with("stream_acknowledged", flooded.acknowledged)
        .with("streams_ended", flooded.ended)
        .with("first_odd_answer", http.odd.clone().unwrap_or_else(|| "none".to_owned()));
    #[allow(clippy::cast_precision_loss)]
    let without = http.without_retry_after as f64;
    let bar = Bar::AtMost { bar: 0.0, stretch: None };
    let refusals = Line::figure("memory", "refusals without Retry-After", "refusals", without, Some(bar));
    Ok(vec![memory, refusals])
}

/// Both doors at once, for as long as the pressure lasts.
async fn load(
    server: &Server,
    bench: &Bench,
    database: &Database,
    beats: &Arc<Vec<Beat>>,
    flood: u32,
    pressure: Pressure,
) -> anyhow::Result<Seen> {
    let volley = sync_volley(beats);
    let before = database.count("events").await?;
    let pressing = flood::press(server.http, &volley, flood, pressure);
    let streaming = flood::stream(server.grpc, &bench.ground.token, beats, flood, STREAMS, pressure.lasts);
    let watching = async {
        let (began, mut resident_bytes) = (Instant::now(), Vec::new());
        while began.elapsed() < pressure.lasts {
            tokio::time::sleep(Duration::from_millis(500)).await;
            resident_bytes.push(resident(server.pid)?.0);
        }
        anyhow::Ok((database.count("events").await?, began.elapsed().as_secs_f64(), resident_bytes))
    };
    let (http, streamed, watched) = tokio::join!(pressing, streaming, watching);
    let (http, (acknowledged, ended), (stored, seconds, resident)) = (http?, streamed?, watched?);
    let answered = database.count("events").await? - before;
    ensure!(
        answered >= http.stored + acknowledged,
        "{} events were answered as stored and {acknowledged} acknowledged, and {answered} are there: {}",
        http.stored,
        server.log()
    );
    #[allow(clippy::cast_precision_loss)]
    let goodput = (stored - before) as f64 / seconds;
    Ok(Seen { http, acknowledged, ended, goodput, resident })
}
