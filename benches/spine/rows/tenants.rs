//! `tenants`: the same traffic spread over ten thousand sites, against one site.

use anyhow::ensure;

use super::{Bench, all_stored, sync_volley};
use crate::ground::{SITES, add_sites};
use crate::grpc_load;
use crate::report::{Bar, Line, Side};
use crate::workload::{Workload, one_of_each};

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let (rounds, events, sites) = (bench.rounds(), bench.size(30_000, 3_000), bench.size(10_000, 1_000));
    let (mut many, mut one) = (Side::default(), Side::default());
    let databases = [bench.ground.database().await?, bench.ground.database().await?];
    add_sites(&databases[0].admin().await?, SITES..sites).await?;
    let servers = [bench.server(&databases[0]).await?, bench.server(&databases[1]).await?];
    // Both are used to their sites, and have as many rows.
    for (server, sites, seed) in [(&servers[0], sites, 1), (&servers[1], 1, 2)] {
        let batches = grpc_load::batches(&one_of_each(seed, sites, bench.size(10_000, 1_000)));
        grpc_load::ingest(server.grpc, &bench.ground.token, &batches, 4).await?;
    }
    for round in 1..=rounds {
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for which in order {
            let sites = if which == 0 { sites } else { 1 };
            let volley = sync_volley(&Workload::new(6000 + round as u64, sites).take(events));
            databases[which].checkpoint().await?;
            let (server, side) = (&servers[which], if which == 0 { &mut many } else { &mut one });
            super::measured(side, events, server, all_stored(server, &volley, events)).await?;
        }
        bench.say_round(round, rounds, [&many, &one]);
    }
    for (server, database) in servers.into_iter().zip(databases) {
        let (stored, sent) = (database.count("events").await?, bench.size(10_000, 1_000) + rounds * events);
        ensure!(stored == sent, "{stored} of {sent} events are stored: {}", server.log());
        server.stop().await?;
        bench.ground.drop(database).await?;
    }
    let bar = Bar::AtLeast { bar: 0.9, stretch: None };
    let what = format!("POST /api/sync over {sites} sites; reference: one site");
    Ok(vec![Line::ratio("tenants", what, ["many sites", "one site"], many, one, bar)])
}
