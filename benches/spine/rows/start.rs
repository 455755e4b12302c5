//! `start`: from the start of the process until it says that it is ready, on a database that has been used.

use super::Bench;
use crate::ground::SITES;
use crate::grpc_load;
use crate::report::{Bar, Line, median};
use crate::workload::Workload;

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let laid = bench.laid.clone();
    let database = match &laid {
        Some(laid) => laid.clone(),
        None => bench.ground.database().await?,
    };
    let first = bench.server(&database).await?;
    let batches = grpc_load::batches(&Workload::new(9000, SITES).take(1000));
    grpc_load::ingest(first.grpc, &bench.ground.token, &batches, 1).await?;
    first.stop().await?;
    let mut seconds = Vec::new();
    for _ in 0..2 * bench.rounds() {
        let server = bench.server(&database).await?;
        seconds.push(server.ready_after.as_secs_f64());
        server.stop().await?;
    }
    let what = match laid {
        Some(_) => "from start to ready on the database with the history",
        None => {
            bench.ground.drop(database).await?;
            "from start to ready on an existing database"
        }
    };
    let most = seconds.iter().copied().fold(0.0, f64::max);
    let bar = Bar::AtMost { bar: 1.0, stretch: None };
    Ok(vec![Line::figure("start", what, "s", median(&seconds), Some(bar)).with("max_s", most)])
}
