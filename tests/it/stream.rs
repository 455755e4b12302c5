//! `StreamIngest`: every acknowledgement is true, whoever leaves first; and a fast sender waits instead of filling memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use chrono::Utc;
use futures::StreamExt;
use nix::sys::signal::Signal;
use opsmantik::domain::access::Scope;
use opsmantik::domain::outcome::Outcome as Settled;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::{Event, IngestRequest, RejectionReason, StreamIngestRequest, StreamIngestResponse};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use prost::Message;
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::support::database::{Database, connect, database};
use crate::support::events::Spec;
use crate::support::line::{Client, Line, client, event};
use crate::support::process::Server;

/// Nothing that a test here waits for takes longer.
const LIMIT: Duration = Duration::from_secs(60);

fn message(n: u32) -> StreamIngestRequest {
    StreamIngestRequest::of(format!("m{n}"), Some(event(n)))
}

/// A stream on which messages are sent one by one.
struct Talk {
    say: mpsc::Sender<StreamIngestRequest>,
    hear: Streaming<StreamIngestResponse>,
}

impl Talk {
    async fn begin(mut client: Client) -> Self {
        let (say, said) = mpsc::channel(1);
        let hear = client.stream_ingest(tokio_stream::wrappers::ReceiverStream::new(said)).await;
        Self { say, hear: hear.expect("a stream").into_inner() }
    }

    async fn say(&self, message: StreamIngestRequest) {
        self.say.send(message).await.expect("the stream is open");
    }

    async fn hear(&mut self) -> Result<Option<StreamIngestResponse>, Status> {
        tokio::time::timeout(LIMIT, self.hear.message()).await.expect("an answer in time")
    }
}

/// As many messages as the server lets through, and how many that were.
async fn flood(mut client: Client, messages: u32) -> (Streaming<StreamIngestResponse>, Arc<AtomicU32>) {
    let sent = Arc::new(AtomicU32::new(0));
    let counting = sent.clone();
    let messages = futures::stream::iter(1..=messages).map(move |n| {
        counting.fetch_add(1, Ordering::Relaxed);
        message(n)
    });
    (client.stream_ingest(messages).await.expect("a stream").into_inner(), sent)
}

/// Waits until the number no longer grows, and tells it.
async fn at_rest(number: &AtomicU32) -> u32 {
    let (mut last, mut calm) = (0, 0);
    loop {
        // A busy machine may hold up everybody for a moment.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = number.load(Ordering::Relaxed);
        calm = if now == last && now > 0 { calm + 1 } else { 0 };
        if calm == 4 {
            return now;
        }
        last = now;
    }
}

/// All acknowledgements until the end, by message id, and the end.
async fn rest(hear: &mut Streaming<StreamIngestResponse>) -> (BTreeMap<String, Option<Outcome>>, Result<(), Status>) {
    let mut heard = BTreeMap::new();
    loop {
        match tokio::time::timeout(LIMIT, hear.message()).await.expect("an answer in time") {
            Ok(Some(StreamIngestResponse { message_id, result })) => {
                let twice = heard.insert(message_id, result.and_then(|result| result.outcome));
                assert!(twice.is_none(), "acknowledged twice");
            }
            Ok(None) => return (heard, Ok(())),
            Err(status) => return (heard, Err(status)),
        }
    }
}

fn numbers(heard: &BTreeMap<String, Option<Outcome>>) -> BTreeSet<u32> {
    let number = |id: &String| id.strip_prefix('m').and_then(|n| n.parse().ok()).expect("the test's own id");
    heard
        .iter()
        .map(|(id, outcome)| {
            assert!(matches!(outcome, Some(Outcome::Stored(_) | Outcome::Duplicate(_))), "{id}: {outcome:?}");
            number(id)
        })
        .collect()
}

/// The events that are stored, and that no session counts more or less.
async fn stored(database: &Database) -> BTreeSet<u32> {
    let miscounted = "SELECT count(*) FROM sessions s WHERE event_count <> (SELECT count(*) FROM events e \
        WHERE (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id))";
    assert_eq!(database.count(miscounted).await, 0);
    let rows = database.admin.query("SELECT id FROM events", &[]).await.expect("the test's own query");
    let ids: BTreeSet<u32> =
        rows.iter().filter_map(|row| u32::try_from(row.get::<_, uuid::Uuid>(0).as_u128()).ok()).collect();
    assert_eq!(ids.len(), rows.len(), "an event is there twice");
    ids
}

/// Somebody holds the table, so no writer can go on.
async fn locked(database: &Database) -> tokio_postgres::Client {
    let blocker = connect(&database.url).await;
    blocker.batch_execute("BEGIN; LOCK TABLE events IN EXCLUSIVE MODE").await.expect("the lock is free");
    blocker
}

#[tokio::test]
async fn each_message_is_acknowledged_by_its_own_id_and_a_bad_one_stops_nothing() {
    let line = Line::open(PipelineConfig::default()).await;
    let mut talk = Talk::begin(line.client().await).await;
    let named = |id: &str, event: Option<Event>| StreamIngestRequest::of(id, event);
    let long = "ü".repeat(65);
    let expected = [
        (named("first", Some(event(1))), "first", Ok("stored")),
        (named("again", Some(event(1))), "again", Ok("duplicate")),
        (named("none", None), "none", Err((RejectionReason::Missing, "event"))),
        (named(&long, Some(event(2))), &long[..128], Err((RejectionReason::TooLarge, "message_id"))),
        (
            named("no-url", Some(Event { url: String::new(), ..event(3) })),
            "no-url",
            Err((RejectionReason::Missing, "url")),
        ),
        (
            named("no-site", Some(Event { site: "nobody".to_owned(), ..event(4) })),
            "no-site",
            Err((RejectionReason::UnknownSite, "site")),
        ),
        (
            named("big", Some(Event { label: Some("x".repeat(70_000)), ..event(5) })),
            "big",
            Err((RejectionReason::TooLarge, "")),
        ),
        (named("", Some(event(6))), "", Ok("stored")),
        (named("last", Some(event(7))), "last", Ok("stored")),
    ];
    for (message, id, verdict) in expected {
        let event_id = message.event.as_deref().and_then(|event| Event::decode(event).ok()?.id);
        let event_id = event_id.unwrap_or_default();
        talk.say(message).await;
        let answer = talk.hear().await.expect("the stream goes on").expect("an acknowledgement");
        assert_eq!(answer.message_id, id);
        let result = answer.result.expect("always set");
        assert_eq!(result.event_id, event_id);
        match (result.outcome.expect("always set"), verdict) {
            (Outcome::Stored(_), Ok("stored")) | (Outcome::Duplicate(_), Ok("duplicate")) => {}
            (Outcome::Rejected(rejection), Err((reason, field))) => {
                assert_eq!((rejection.reason(), rejection.field.as_str()), (reason, field));
            }
            (other, expected) => panic!("{id}: not {expected:?}: {other:?}"),
        }
        if id == "first" {
            assert_eq!(stored(&line.database).await, [1].into(), "durable when it is acknowledged");
        }
    }
    drop(talk.say);
    let (more, end) = rest(&mut talk.hear).await;
    assert!(more.is_empty() && end.is_ok(), "{more:?} {end:?}");
    assert_eq!(stored(&line.database).await, [1, 6, 7].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_sender_that_is_faster_than_the_database_is_held_back_and_everything_is_stored() {
    const ALL: u32 = 20_000;
    let config = PipelineConfig { patient_room_bytes: 512 << 10, patience: LIMIT, ..PipelineConfig::default() };
    let line = Line::open(config).await;
    let blocker = locked(&line.database).await;
    let (mut hear, sent) = flood(line.client().await, ALL).await;
    // The room has a place for some two hundred; what is on the wire and in the client's own buffers comes on top.
    let before = at_rest(&sent).await;
    assert!(before < 4_000, "{before} were taken from the sender while nothing could be stored");
    assert_eq!(line.database.count("SELECT count(*) FROM events").await, 0);

    // A stream that waits holds up no other call of its connection's kind, and takes no room from it.
    let mut other = line.client().await;
    let unary = tokio::spawn(async move { other.ingest(IngestRequest::of(vec![event(ALL + 1)])).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    blocker.batch_execute("COMMIT").await.expect("released");
    let results = unary.await.expect("no panic").expect("there is room for it").into_inner().results;
    assert!(matches!(results[0].outcome, Some(Outcome::Stored(_))));

    let (heard, end) = rest(&mut hear).await;
    end.expect("half-closed and finished");
    assert_eq!(numbers(&heard), (1..=ALL).collect());
    assert_eq!(stored(&line.database).await, (1..=ALL + 1).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_client_that_does_not_read_is_held_back_and_its_connection_still_serves() {
    let line = Line::open(PipelineConfig::default()).await;
    let narrow = line.endpoint.clone().initial_stream_window_size(64 << 10);
    let mut same = client(&narrow, &line.token).await;
    let (hear, sent) = flood(same.clone(), 20_000).await;
    let before = at_rest(&sent).await;
    assert!(before < 8_000, "{before} were taken while nobody read");
    let answer = same.ingest(IngestRequest::of(vec![event(30_000)])).await;
    assert!(matches!(
        answer.expect("the connection is free").into_inner().results[0].outcome,
        Some(Outcome::Stored(_))
    ));
    drop(hear);
    line.close().await;
    let stored = stored(&line.database).await;
    assert!(stored.len() as u32 <= before + 1, "{} stored, {before} taken", stored.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_was_taken_of_a_client_that_is_gone_is_stored() {
    // Room for a few: the last message that was read still waits for room when its client goes.
    let config = PipelineConfig { patient_room_bytes: 96 << 10, patience: LIMIT, ..PipelineConfig::default() };
    let line = Line::open(config).await;
    let blocker = locked(&line.database).await;
    // A client of its own runtime, so that it can vanish with its connection and all its tasks.
    let elsewhere = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let elsewhere = elsewhere.expect("a runtime");
    let (endpoint, token) = (line.endpoint.clone(), line.token.clone());
    let flooding = elsewhere.spawn(async move { flood(client(&endpoint, &token).await, 5_000).await });
    let (hear, sent) = flooding.await.expect("no panic");
    assert!(at_rest(&sent).await < 4_000);
    elsewhere.shutdown_background();
    drop(hear);
    tokio::time::sleep(Duration::from_millis(300)).await;
    blocker.batch_execute("COMMIT").await.expect("released");
    let began = Instant::now();
    // An event weighs between 2 and 2.9 KiB, so 33 to 48 had room; and the one that waited.
    while line.database.count("SELECT count(*) FROM events").await < 32 {
        assert!(began.elapsed() < LIMIT, "{:?}", stored(&line.database).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let stored = stored(&line.database).await;
    assert!(stored.len() < 50, "nobody reads on for a client that is gone: {}", stored.len());
    assert_eq!(stored, (1..=u32::try_from(stored.len()).expect("few")).collect(), "the first ones, none missing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn asked_to_stop_in_the_middle_it_acknowledges_what_it_took_and_says_that_it_stops() {
    let database = database().await;
    database.site("shop").await;
    let token = database.token(&Scope::ALL, None).await;
    let mut server = Server::start(&database.url).await;
    let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    let mut talk = Talk::begin(client(&endpoint, &token).await).await;
    talk.say(message(1)).await;
    talk.hear().await.expect("the stream goes on").expect("an acknowledgement");
    let blocker = locked(&database).await;
    for n in 2..=60 {
        talk.say(message(n)).await;
    }
    // They have been taken for certain when the signal comes: they wait for a lock in the database.
    let blocked =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let began = Instant::now();
    while database.count(blocked).await == 0 {
        assert!(began.elapsed() < LIMIT, "nobody waits for the lock");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.program.signal(Signal::SIGTERM);
    let began = Instant::now();
    server.program.until("that it stops", |said| said.contains("taking nothing more").then_some(())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // The client goes on sending as if nothing had happened.
    let say = talk.say.clone();
    let more = tokio::spawn(async move {
        for n in 61..=100 {
            if say.send(message(n)).await.is_err() {
                return;
            }
        }
    });
    blocker.batch_execute("COMMIT").await.expect("released");
    let (heard, end) = rest(&mut talk.hear).await;
    let status = end.expect_err("the server stops");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_details_retry_info().is_some());
    let heard = numbers(&heard);
    assert!((2..=60).all(|n| heard.contains(&n)), "taken and not acknowledged: {heard:?}");
    drop(talk.say);
    drop(talk.hear);
    more.await.expect("no panic");
    assert_eq!(server.program.ended().await.code(), Some(0), "{}", server.program.said());
    assert!(began.elapsed() < Duration::from_secs(15), "stopping took {:?}", began.elapsed());
    let stored = stored(&database).await;
    assert!(heard.is_subset(&stored));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_stop_does_not_wait_for_a_database_that_does_not_answer() {
    let config = PipelineConfig { patience: LIMIT, ..PipelineConfig::default() };
    let line = Line::open(config).await;
    let mut talk = Talk::begin(line.client().await).await;
    let _blocker = locked(&line.database).await;
    // Of many visits: one that is locked and alone would be told sooner.
    for n in 1..=5 {
        let visit = format!("visit {n}");
        talk.say(StreamIngestRequest::of(format!("m{n}"), Some(Event { session_id: visit, ..event(n) }))).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    line.stop.cancel();
    let began = Instant::now();
    let (heard, end) = rest(&mut talk.hear).await;
    assert!(heard.is_empty(), "nothing was stored: {heard:?}");
    assert_eq!(end.expect_err("the server stops").code(), Code::Unavailable);
    assert!((9..14).contains(&began.elapsed().as_secs()), "ended after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn connections_that_are_cut_and_a_database_that_stays_away_cost_no_event() {
    const ALL: u32 = 4_000;
    let line = Line::open(PipelineConfig::default()).await;
    let postgres = connect(&crate::support::cluster::cluster().await.url("postgres")).await;
    let name = &line.database.name;
    let cut = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'opsmantik'"
    );
    let allow = |allowed: bool| format!("ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}");

    let mut open: BTreeSet<u32> = (1..=ALL).collect();
    let mut ends = Vec::new();
    for round in 0..20 {
        let messages = futures::stream::iter(open.clone()).map(message);
        let mut hear = line.client().await.stream_ingest(messages).await.expect("a stream").into_inner();
        let mut heard = 0;
        let end = loop {
            match tokio::time::timeout(LIMIT, hear.message()).await.expect("an answer in time") {
                Ok(Some(answer)) => {
                    let outcome = answer.result.and_then(|result| result.outcome);
                    assert!(matches!(outcome, Some(Outcome::Stored(_) | Outcome::Duplicate(_))), "{outcome:?}");
                    open.remove(&answer.message_id[1..].parse().expect("the test's own id"));
                    heard += 1;
                    if heard == 500 && round < 2 {
                        // Round 0: a cut, with a way back. Round 1: away.
                        postgres.batch_execute(&allow(round == 0)).await.expect("the superuser may");
                        postgres.batch_execute(&cut).await.expect("the superuser may");
                    }
                }
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            }
        };
        if round == 1 {
            let status = end.as_ref().expect_err("the database is away");
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
            assert!(delay.is_some_and(|delay| delay >= Duration::from_secs(1)), "{delay:?}");
            assert!(!open.is_empty(), "cut off too late to show anything");
            postgres.batch_execute(&allow(true)).await.expect("the superuser may");
            // Every acknowledged event is there.
            let there = stored(&line.database).await;
            let acknowledged: BTreeSet<u32> = (1..=ALL).filter(|n| !open.contains(n)).collect();
            assert!(acknowledged.is_subset(&there));
        }
        ends.push(end.map_err(|status| status.code()));
        if round == 0 {
            // Some more to lose, whatever the first round came to.
            open.extend(ALL / 2..=ALL);
        }
        if round > 0 && open.is_empty() {
            break;
        }
    }
    assert!(open.is_empty(), "never finished: {ends:?}");
    assert_eq!(stored(&line.database).await, (1..=ALL).collect(), "every event exactly once: {ends:?}");
}

#[tokio::test]
async fn a_site_outside_the_token_ends_the_stream_and_the_whole_call() {
    let line = Line::open(PipelineConfig::default()).await;
    let shop = line.database.rows("SELECT id FROM sites").await[0]["id"].as_str().map(str::to_owned).expect("an id");
    line.database.site("neighbour").await;
    let token = line.database.token(&[Scope::IngestWrite], Some(shop.parse().expect("an id"))).await;
    let mut own = client(&line.endpoint, &token).await;
    for foreign in ["neighbour", "nobody"] {
        let foreign = |n: u32| Event { site: foreign.to_owned(), ..event(n) };
        for odd in [foreign(10), Event { id: Some("no uuid".to_owned()), ..foreign(11) }] {
            let events = vec![event(1), odd.clone()];
            let status = own.ingest(IngestRequest::of(events)).await.expect_err("not this token's site");
            assert_eq!(status.code(), Code::PermissionDenied);
            assert_eq!(line.database.count("SELECT count(*) FROM events WHERE id::text LIKE '%01'").await, 0);

            let mut talk = Talk::begin(own.clone()).await;
            talk.say(message(2)).await;
            talk.say(StreamIngestRequest::of("odd", Some(odd))).await;
            let (heard, end) = rest(&mut talk.hear).await;
            assert_eq!(numbers(&heard), [2].into(), "what was taken is finished");
            assert_eq!(end.expect_err("not this token's site").code(), Code::PermissionDenied);
        }
    }
    let results = own.ingest(IngestRequest::of(vec![Event { site: shop, ..event(1) }])).await;
    assert_eq!(results.expect("its own").into_inner().results.len(), 1);
    assert_eq!(stored(&line.database).await, [1, 2].into());
}

#[tokio::test]
async fn a_revoked_token_ends_its_stream_within_seconds() {
    let line = Line::open(PipelineConfig::default()).await;
    let mut talk = Talk::begin(line.client().await).await;
    talk.say(message(1)).await;
    talk.hear().await.expect("the stream goes on").expect("an acknowledgement");
    line.database.admin.batch_execute("UPDATE api_tokens SET revoked_at = now()").await.expect("revoked");
    let began = Instant::now();
    let status = talk.hear().await.expect_err("nobody is welcome for ever");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(began.elapsed() < Duration::from_secs(5), "after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_revoked_token_writes_nothing_more_when_its_client_takes_up_reading_again() {
    let line = Line::open(PipelineConfig::default()).await;
    let narrow = line.endpoint.clone().initial_stream_window_size(64 << 10);
    let (mut revoked, sent) = flood(client(&narrow, &line.token).await, 20_000).await;
    assert!(at_rest(&sent).await < 8_000, "held back");
    let other = line.database.token(&[Scope::IngestWrite], None).await;
    let (mut welcome, sent) = flood(client(&narrow, &other).await, 9_000).await;
    assert!(at_rest(&sent).await < 8_000, "held back");
    let revoke =
        "UPDATE api_tokens SET revoked_at = now() WHERE id = (SELECT id FROM api_tokens ORDER BY created_at LIMIT 1)";
    line.database.admin.batch_execute(revoke).await.expect("revoked");
    tokio::time::sleep(Duration::from_secs(5)).await;

    let before = stored(&line.database).await;
    let (heard, end) = rest(&mut revoked).await;
    assert_eq!(end.expect_err("nobody is welcome for ever").code(), Code::Unauthenticated);
    assert!(numbers(&heard).is_subset(&before));
    assert_eq!(stored(&line.database).await.len(), before.len(), "written after it was revoked");

    // One that has not been revoked goes on after the same pause.
    let (heard, end) = rest(&mut welcome).await;
    end.expect("half-closed and finished");
    assert_eq!(numbers(&heard), (1..=9_000).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn those_who_wait_for_room_and_those_who_cannot_starve_nobody() {
    let database = database().await;
    let site = database.site("rooms").await.id;
    let small = 128 << 10;
    let config = PipelineConfig { room_bytes: small, patient_room_bytes: small, patience: LIMIT, ..Default::default() };
    let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), config);
    let blocker = locked(&database).await;
    let event = |id: u32| Spec::new(id, "s", Utc::now()).event(site);
    let mut patient = tokio::task::JoinSet::new();
    for id in 1..=300 {
        let (pipeline, event) = (pipeline.clone(), event(id));
        patient.spawn(async move { pipeline.take_when_room(event).await.expect("nobody stops").outcome().await });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut impatient = tokio::task::JoinSet::new();
    for id in 1001..=1100 {
        let (pipeline, event) = (pipeline.clone(), event(id));
        impatient.spawn(async move { pipeline.submit(vec![event]).await[0] });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    blocker.batch_execute("COMMIT").await.expect("released");
    let stored = |outcomes: Vec<Settled>| outcomes.iter().filter(|o| matches!(o, Settled::Stored(_))).count();
    let impatient = stored(impatient.join_all().await);
    assert!((20..60).contains(&impatient), "{impatient} found room beside 300 that waited for it");
    assert_eq!(stored(patient.join_all().await), 300, "who waits is served in the end");

    // Whoever waits when the pipeline closes is told, and not left behind.
    let blocker = locked(&database).await;
    let mut late = tokio::task::JoinSet::new();
    for id in 2001..=2100 {
        let (pipeline, event) = (pipeline.clone(), event(id));
        late.spawn(async move {
            match pipeline.take_when_room(event).await {
                Ok(taken) => matches!(taken.outcome().await, Settled::Stored(_)),
                Err(_) => false,
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let draining = tokio::spawn({
        let pipeline = pipeline.clone();
        async move { pipeline.drain().await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    blocker.batch_execute("COMMIT").await.expect("released");
    draining.await.expect("it drains");
    let taken = late.join_all().await.into_iter().filter(|stored| *stored).count();
    let there = database.count("SELECT count(*) FROM events").await;
    assert!((20..60).contains(&taken), "{taken}");
    assert_eq!(there, 300 + i64::try_from(impatient + taken).expect("few"), "stored if and only if so told");
}
