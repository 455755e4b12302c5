//! `history`: what the months before cost. The same events into a database with two years of traffic, and into an empty one.
//!
//! Of the events' visitors a third come back, and were in the history by an ad or without one: whether an ad brought them is looked up there.

use anyhow::ensure;

use super::Bench;
use crate::grpc_load::{self, BATCH};
use crate::report::{Bar, Line, Side};

const CALLERS: usize = 8;
const WARM_UP: usize = 20 * BATCH;

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let (rounds, events) = (bench.rounds(), bench.size(30_000, 4_000));
    let (mut full, mut empty) = (Side::default(), Side::default());
    // A copy: what is stored here is no part of the past that others begin with.
    let past = bench.history().await?;
    bench.say("a copy of the past");
    let databases = [bench.ground.copy(&past).await?, bench.ground.database().await?];
    let servers = [bench.server(&databases[0]).await?, bench.server(&databases[1]).await?];
    let mut before = [0; 2];
    for (which, server) in servers.iter().enumerate() {
        before[which] = databases[which].count("events").await?;
        let batches = grpc_load::batches(&bench.workload_after_past(4000).take(WARM_UP));
        grpc_load::ingest(server.grpc, &bench.ground.token, &batches, CALLERS).await?;
    }
    for round in 1..=rounds {
        // The same events, by id and all, into both.
        let batches = grpc_load::batches(&bench.workload_after_past(4000 + round as u64).take(events));
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for which in order {
            let (server, side) = (&servers[which], if which == 0 { &mut full } else { &mut empty });
            databases[which].checkpoint().await?;
            let sending = grpc_load::ingest(server.grpc, &bench.ground.token, &batches, CALLERS);
            super::measured(side, events, server, sending).await?;
        }
        bench.say_round(round, rounds, [&full, &empty]);
    }
    for (which, server) in servers.into_iter().enumerate() {
        let (stored, sent) = (databases[which].count("events").await? - before[which], WARM_UP + rounds * events);
        ensure!(stored == sent, "{stored} of {sent} events are stored: {}", server.log());
        server.stop().await?;
    }
    let assisted = "SELECT count(*) FROM public.sessions WHERE attribution = 'Ads-Assisted' AND created_at > now() - interval '1 hour'";
    let mut found = [0_i64; 2];
    for (database, found) in databases.iter().zip(&mut found) {
        *found = database.admin().await?.query_one(assisted, &[]).await?.get(0);
    }
    ensure!(found[0] > found[1], "no visitor of the history was recognised: {found:?}");
    for database in databases {
        bench.ground.drop(database).await?;
    }
    let bar = Bar::AtLeast { bar: 0.9, stretch: Some(0.97) };
    let what = format!(
        "Ingest with {} months, {} events and {} sessions stored; reference: empty tables",
        bench.past.months, before[0], bench.past.sessions
    );
    let line = Line::ratio("history", what, ["with history", "empty"], full, empty, bar);
    Ok(vec![line.with("assisted_with_history", found[0]).with("assisted_without", found[1])])
}
