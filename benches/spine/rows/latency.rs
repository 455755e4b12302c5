//! `latency`: how long a durable answer takes at half of the most that the server can do: for a minute that begins with a checkpoint, after which
//! PostgreSQL logs every page whole that is written for the first time. By its defaults it makes one in five minutes.

use anyhow::ensure;

use super::{Bench, CONNECTIONS, sync_volley};
use crate::ground::SITES;
use crate::http_load::{Pace, fire};
use crate::report::{Bar, Line};
use crate::workload::Workload;

pub async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Line>> {
    let database = bench.ground.database().await?;
    let server = bench.server(&database).await?;
    let most = match bench.sync_rate {
        Some(rate) => rate,
        None => {
            bench.say("looking for the most that it can do");
            let events = bench.size(30_000, 4_000);
            let volley = sync_volley(&Workload::new(2000, SITES).take(events));
            fire(server.http, &volley, CONNECTIONS, Pace::Closed).await?.all_stored(events)?.rate()
        }
    };
    bench.sync_rate = Some(most);
    let rate = most / 2.0;
    let seconds = if bench.short { 2.0 } else { 60.0 };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let events = (rate * seconds) as usize;
    let warm_up = sync_volley(&Workload::new(2001, SITES).take(1000));
    fire(server.http, &warm_up, CONNECTIONS, Pace::Open(rate)).await?.all_stored(1000)?;
    let before = database.count("events").await?;
    let volley = sync_volley(&Workload::new(2002, SITES).take(events));
    database.checkpoint().await?;
    bench.say(format!("{rate:.0} events/s for {seconds:.0} s"));
    let answers = fire(server.http, &volley, CONNECTIONS, Pace::Open(rate)).await?.all_stored(events)?;
    let stored = database.count("events").await? - before;
    ensure!(stored == events, "{stored} of {events} events are stored: {}", server.log());
    server.stop().await?;
    bench.ground.drop(database).await?;
    let bar = Bar::AtMost { bar: 25.0, stretch: Some(10.0) };
    let what = format!("durable answer of POST /api/sync at half the maximum, {rate:.0} events/s: p99");
    let line = Line::figure("latency", what, "ms", answers.percentile(0.99), Some(bar))
        .with("p50_ms", answers.percentile(0.5))
        .with("p90_ms", answers.percentile(0.9))
        .with("p99_9_ms", answers.percentile(0.999))
        .with("max_ms", answers.percentile(1.0))
        .with("events_per_second", rate)
        .with("sent_again", answers.again);
    Ok(vec![line])
}
