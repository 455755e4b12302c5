//! `sync`: single events through the public door, stored and answered, against the same door answering without storing.

use anyhow::ensure;

use super::{Bench, CONNECTIONS, all_stored, sync_volley};
use crate::ground::SITES;
use crate::report::{Bar, Line, Side};
use crate::server::Server;
use crate::workload::Workload;

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let (rounds, events) = (bench.rounds(), bench.size(30_000, 4_000));
    let (mut ours, mut answering) = (Side::default(), Side::default());
    let database = bench.ground.database().await?;
    let server = bench.server(&database).await?;
    let reference = Server::start_answering(&bench.ground, &database).await?;
    bench.say(format!("servers {} (stores) and {} (answers)", server.pid, reference.pid));
    // Once: one in each round would be one in ten seconds, and a page is logged whole when it is first written after one.
    database.checkpoint().await?;
    let warm_up = sync_volley(&Workload::new(1000, SITES).take(1000));
    for server in [&server, &reference] {
        all_stored(server, &warm_up, 1000).await?;
    }
    for round in 1..=rounds {
        let volley = sync_volley(&Workload::new(round as u64, SITES).take(events));
        // The same requests, to the one and to the other.
        for (server, side) in [(&server, &mut ours), (&reference, &mut answering)] {
            super::measured(side, events, server, all_stored(server, &volley, events)).await?;
        }
        bench.say_round(round, rounds, [&ours, &answering]);
    }
    let (stored, sent) = (database.count("events").await?, 1000 + rounds * events);
    ensure!(stored == sent, "{stored} of {sent} events are stored: {}", server.log());
    server.stop().await?;
    reference.stop().await?;
    bench.ground.drop(database).await?;
    let bar = Bar::AtLeast { bar: 0.25, stretch: Some(0.4) };
    let what = format!(
        "POST /api/sync, single events, {CONNECTIONS} connections; reference: the same answers without storing"
    );
    let line = Line::ratio("sync", what, ["stored", "answered only"], ours, answering, bar);
    bench.sync_rate = Some(line.measured);
    Ok(vec![line])
}
