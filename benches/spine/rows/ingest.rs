//! `ingest` and `stream`: durable events by gRPC, against `COPY` of the very rows that they became.

use anyhow::{Context, ensure};

use super::Bench;
use crate::copy::copy;
use crate::ground::SITES;
use crate::grpc_load::{self, BATCH};
use crate::processes::Meter;
use crate::report::{Bar, Line, Side};
use crate::sent::Sent;
use crate::workload::Workload;

/// Callers of `Ingest` at once.
const CALLERS: usize = 16;
/// Streams at once.
const STREAMS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Ingest,
    Stream,
}

pub async fn measure(bench: &mut Bench, door: Door) -> anyhow::Result<Vec<Line>> {
    let (rounds, events) = (bench.rounds(), bench.size(80_000, 8_000));
    let (mut ours, mut copied) = (Side::default(), Side::default());
    for round in 1..=rounds {
        bench.say(format!("round {round} of {rounds}"));
        let mut workload = Workload::new(round as u64, SITES);
        // Connections, caches and plans of a server that has been running.
        let warm_up = grpc_load::batches(&workload.take(20 * BATCH));
        let beats = workload.take(events);
        let messages = match door {
            Door::Ingest => grpc_load::batches(&beats),
            Door::Stream => grpc_load::messages(&beats),
        };
        drop(beats);
        let (from, to) = (bench.ground.database().await?, bench.ground.database().await?);
        let server = bench.server(&from).await?;
        let token = bench.ground.token.as_str();
        grpc_load::ingest(server.grpc, token, &warm_up, CALLERS).await.with_context(|| server.log())?;
        from.checkpoint().await?;

        let sending = async {
            match door {
                Door::Ingest => grpc_load::ingest(server.grpc, token, &messages, CALLERS).await,
                Door::Stream => grpc_load::stream(server.grpc, token, &messages, STREAMS).await,
            }
        };
        super::measured(&mut ours, events, &server, sending).await?;
        let stored = from.count("events").await?;
        ensure!(
            stored == events + 20 * BATCH,
            "{stored} events are stored of {events} and the warm-up: {}",
            server.log()
        );
        let meter = Meter { server: None, ..server.meter() };
        server.stop().await?;

        bench.say(format!("round {round} of {rounds}: COPY"));
        let reference = copy(&from, &to, meter).await?;
        copied.add(reference.events, Sent { seconds: reference.seconds, again: 0 }, reference.spent);
        bench.ground.drop(from).await?;
        bench.ground.drop(to).await?;
    }
    let (row, what) = match door {
        Door::Ingest => {
            ("ingest", format!("Ingest, {CALLERS} callers, batches of {BATCH}; reference: COPY of the same rows"))
        }
        Door::Stream => ("stream", format!("StreamIngest, {STREAMS} streams; reference: COPY of the same rows")),
    };
    let bar = Bar::AtLeast { bar: 0.5, stretch: Some(0.75) };
    Ok(vec![Line::ratio(row, what, ["stored", "COPY"], ours, copied, bar)])
}
