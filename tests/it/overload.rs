//! Overload: more is offered than can be stored, by clients that do not wait. What is stored stays as much as before, the rest is refused
//! at once with `Retry-After`, memory stays flat, and a site that has nothing to do with it is served as if nothing were.
//!
//! By default seconds; `OVERLOAD_SECONDS=60` takes as long, on a cluster whose commits are durable, and prints what it found.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use opsmantik::pipeline::PipelineConfig;

use crate::support::database::{Database, database};
use crate::support::line::{Line, event};
use crate::support::private::Private;
use crate::support::process::Server;
use load::{Crowd, Kind, deaf};

mod load;

const MIB: u64 = 1 << 20;
const AT_ONCE: Duration = Duration::ZERO;

/// A flood: more requests at once than the waiting room has space for.
const FLOOD: Kind = Kind { site: "loud", events: 100, pause: AT_ONCE };
const QUIET: Kind = Kind { site: "quiet", events: 1, pause: Duration::from_millis(20) };

const SLOW: &str = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
    $$ BEGIN PERFORM pg_sleep(0.008); RETURN NEW; END $$; \
    CREATE TRIGGER slow BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION slow()";

/// How long, if it was asked for.
fn asked() -> Option<Duration> {
    let text = std::env::var("OVERLOAD_SECONDS").ok()?;
    Some(Duration::from_secs(text.parse().expect("OVERLOAD_SECONDS is a number")))
}

fn resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs, on Linux");
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.expect("the kernel tells") * 1024
}

/// What the server's memory was like, a sample a fifth of a second.
async fn watched(pid: i32, time: Duration) -> Vec<u64> {
    let began = Instant::now();
    let mut samples = Vec::new();
    while began.elapsed() < time {
        samples.push(resident(pid));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    samples
}

async fn events(database: &Database) -> i64 {
    database.count("SELECT count(*) FROM events").await
}

/// Events stored in a second while these clients come.
async fn goodput(database: &Database, server: &Server, size: usize, kind: Kind, time: Duration) -> f64 {
    let crowd = Crowd::begin(server.http, size, kind);
    tokio::time::sleep(time / 4).await;
    let (before, began) = (events(database).await, Instant::now());
    tokio::time::sleep(time).await;
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let rate = (events(database).await - before) as f64 / began.elapsed().as_secs_f64();
    let told = crowd.end().await;
    assert_eq!(told.odd.load(Ordering::Relaxed), 0, "with {size} clients");
    rate
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg(target_os = "linux")]
async fn a_flood_is_refused_and_neither_the_writers_nor_another_site_nor_memory_suffers() {
    let long = asked();
    let time = long.unwrap_or(Duration::from_secs(5));
    let durable = match long {
        Some(_) => Some(Private::start(&[("fsync", "on")]).await),
        None => None,
    };
    let database = match &durable {
        Some(cluster) => cluster.database().await,
        None => database().await,
    };
    for site in ["loud", "quiet"] {
        database.site(site).await;
    }
    if long.is_none() {
        // A database that stores some hundred events in a second, however fast or busy the machine is: the comparison is of these, and a build
        // without optimisation can offer more.
        database.admin.batch_execute(SLOW).await.expect("a trigger");
    }
    let mut server = Server::start(&database.url).await;
    let pid = server.program.pid();
    let idle = resident(pid);

    let calm = long.map_or(Duration::from_secs(3), |long| long / 3);
    let before = goodput(&database, &server, 16, FLOOD, calm).await;
    let alone = Crowd::begin(server.http, 4, QUIET);
    tokio::time::sleep(calm / 3).await;
    let alone = alone.end().await.slowest();

    let (kind, size, deafs) = match long {
        Some(_) => (FLOOD, 256, 32),
        None => (Kind { pause: Duration::from_millis(100), ..FLOOD }, 128, 8),
    };
    let flood = Crowd::begin(server.http, size, kind);
    let deaf = deaf(server.http, deafs, FLOOD);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let quiet = Crowd::begin(server.http, 4, QUIET);
    let (stored, offered, began) = (events(&database).await, flood.told.requests(), Instant::now());
    // As long as it takes to store a thousand events or two, where that is slow.
    let time = time.max(Duration::from_secs_f64((2500.0 / before.max(1.0)).min(15.0)));
    let memory = watched(pid, time).await;
    let (stored, took) = (events(&database).await - stored, began.elapsed().as_secs_f64());
    let offered = flood.told.requests() - offered;
    let (quiet, ()) = (quiet.end().await, drop(deaf));
    let flood = flood.end().await;

    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let (during, offered) = (stored as f64 / took, offered as f64 * f64::from(FLOOD.events) / took);
    let (most, half) = (memory.iter().max().expect("samples"), memory.len() / 2);
    let (p99, slowest) = quiet.slowest();
    let [refused, curt, odd] = [&flood.refused, &flood.curt, &flood.odd].map(|number| number.load(Ordering::Relaxed));
    let mean = |samples: &[u64]| samples.iter().sum::<u64>() / (samples.len().max(1) as u64);
    let (first, second) = (mean(&memory[..half]), mean(&memory[half..]));
    println!("events/s stored        before {before:.0}, in the flood {during:.0}: {:.0} %", 100.0 * during / before);
    println!("events/s offered       {offered:.0}: {:.1} times that", offered / before);
    println!("requests refused       {refused}, of them without Retry-After {curt}; odd {odd}");
    println!(
        "the quiet site         {} stored, {} refused; p99 {p99:?}, slowest {slowest:?}; without the flood {alone:?}",
        quiet.stored.load(Ordering::Relaxed),
        quiet.refused.load(Ordering::Relaxed)
    );
    println!(
        "resident MiB           idle {}, most {}, first half {}, second half {}",
        idle / MIB,
        most / MIB,
        first / MIB,
        second / MIB
    );

    if quiet.refused.load(Ordering::Relaxed) > 0 || during < before / 2.0 {
        let said = server.program.said();
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("WARN")).collect();
        println!("the server's last words of warning: {:#?}", &lines[lines.len().saturating_sub(8)..]);
    }
    assert!(refused > 0 && curt == 0, "{refused} refused, {curt} of them without Retry-After");
    assert_eq!(odd, 0, "a refusal is an answer, not a broken connection");
    let [stored, refused, odd] =
        [&quiet.stored, &quiet.refused, &quiet.odd].map(|number| number.load(Ordering::Relaxed));
    assert!(stored >= 1 && odd == 0, "the quiet site: {stored} stored, {refused} refused, {odd} odd");
    // A busy machine and a build without optimisation leave no rates to compare: those are the long form's.
    if long.is_some() {
        assert_eq!(refused, 0, "of the quiet site");
        assert!(slowest < Duration::from_secs(2), "the quiet site waited {slowest:?}");
        assert!(during >= 0.9 * before, "{before:.0} events/s before, {during:.0} in the flood");
    }
    assert!(*most <= 128 * MIB, "{} MiB", most / MIB);
    assert!(second <= first + first / 4 + 8 * MIB, "it grows: {} MiB, then {} MiB", first / MIB, second / MIB);
    server.program.stop(Duration::from_secs(30)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_one_site_is_not_held_back_by_the_streams_of_another() {
    use futures::StreamExt;
    use opsmantik::grpc::proto::{Event, StreamIngestRequest};

    let config = PipelineConfig { writers: 1, patient_room_bytes: 256 << 10, ..PipelineConfig::default() };
    let line = Line::open(config).await;
    line.database.site("quiet").await;
    let mut floods = tokio::task::JoinSet::new();
    for stream in 0..8_u32 {
        let mut client = line.client().await;
        floods.spawn(async move {
            let messages = (0_u32..).map(move |n| StreamIngestRequest::of("m", Some(event(1000 + n * 8 + stream))));
            let mut hear = client.stream_ingest(futures::stream::iter(messages)).await.expect("a stream").into_inner();
            while let Some(answer) = hear.next().await {
                answer.expect("who waits is served");
            }
        });
    }
    let written = "SELECT count(*) FROM events WHERE site_id = (SELECT id FROM sites WHERE public_id = 'shop')";
    let began = Instant::now();
    while line.database.count(written).await < 500 {
        assert!(began.elapsed() < Duration::from_secs(30), "the flood does not begin");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (say, said) = tokio::sync::mpsc::channel(1);
    let messages = tokio_stream::wrappers::ReceiverStream::new(said);
    let mut hear = line.client().await.stream_ingest(messages).await.expect("a stream").into_inner();
    let (flood, mut slowest) = (line.database.count(written).await, Duration::ZERO);
    for n in 1..=20 {
        let began = Instant::now();
        let quiet = Event { site: "quiet".to_owned(), ..event(n) };
        say.send(StreamIngestRequest::of("q", Some(quiet))).await.expect("the stream is open");
        hear.message().await.expect("it goes on").expect("an acknowledgement");
        slowest = slowest.max(began.elapsed());
    }
    let flood = line.database.count(written).await - flood;
    // In a plain queue each would have waited for all that waits, in two rooms.
    assert!(slowest < Duration::from_secs(10), "it waited {slowest:?}");
    assert!(flood > 20, "and the flood went on: {flood}");
    floods.abort_all();
    line.close().await;
}
