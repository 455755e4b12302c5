//! The windows: a watch shows what is there and then what happens, whoever writes it, and goes on where it was left.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use opsmantik::access::{Gate, UserTokens};
use opsmantik::calls::Calls;
use opsmantik::directory::Directory;
use opsmantik::domain::access::Scope;
use opsmantik::domain::change::Table;
use opsmantik::domain::id::SiteId;
use opsmantik::feed::{Feed, FeedError, FeedOptions};
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::watch_calls_response::Payload as CallPayload;
use opsmantik::grpc::proto::watch_events_response::Payload;
use opsmantik::grpc::proto::watch_sessions_response::Payload as SessionPayload;
use opsmantik::grpc::proto::{
    ChangeKind, StoredEvent, WatchCallsRequest, WatchEventsRequest, WatchEventsResponse, WatchSessionsRequest,
};
use opsmantik::grpc::{GrpcState, Health, Listener, Protection, serve};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::Store;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::access::people;
use crate::support::database::{Database, database};
use crate::support::line::Bearer;

mod changed;
mod gone;

/// Nothing that is waited for takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

type Client = IngestServiceClient<InterceptedService<Channel, Bearer>>;

/// A server of the database, with a feed.
struct Door {
    channel: Channel,
    stop: CancellationToken,
    _end: DropGuard,
}

impl Door {
    async fn open(database: &Database, options: FeedOptions) -> Self {
        let stop = CancellationToken::new();
        let store = Store::new(&database.url, 8).await.expect("a URL");
        let feed = Feed::new(store.clone(), &database.url, None, options, &stop).expect("a URL");
        // To begin it waits for writers of the whole cluster, in which other tests have transactions open.
        let late = Instant::now() + PATIENCE * 2;
        while let Err(error) = feed.subscribe(Table::Events, SiteId::from_uuid(Uuid::nil())).await {
            assert!(matches!(error, FeedError::Away | FeedError::Held) && Instant::now() < late, "{error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let users = UserTokens { secret: Some(people::SECRET.parse().expect("a secret")), ..UserTokens::default() };
        let state = GrpcState {
            feed,
            pipeline: Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default()),
            directory: Directory::new(store.clone()),
            gate: Gate::new(store.clone()).with_users(&users).expect("a secret is enough"),
            calls: Calls::new(store.clone()),
            caller_key: None,
            store: store.clone(),
            stop: stop.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let listener = Listener::new(listener, Protection::Loopback).expect("on loopback");
        tokio::spawn(serve(listener, state, Health::of(store), stop.clone()));
        let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address is a URI");
        let channel = endpoint.connect().await.expect("it listens");
        Self { channel, _end: stop.clone().drop_guard(), stop }
    }

    fn client(&self, token: &str) -> Client {
        IngestServiceClient::with_interceptor(self.channel.clone(), Bearer::new(token))
    }

    async fn events(&self, token: &str, site: &str, resume: Option<&str>) -> Result<Watch, Status> {
        let request =
            WatchEventsRequest { site: site.to_owned(), session_month: None, resume_token: resume.map(str::to_owned) };
        Ok(Watch { answers: self.client(token).watch_events(request).await?.into_inner(), token: String::new() })
    }
}

struct Watch {
    answers: Streaming<WatchEventsResponse>,
    /// The latest.
    token: String,
}

impl Watch {
    async fn next(&mut self) -> Result<Payload, Status> {
        loop {
            let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("something comes");
            let WatchEventsResponse { resume_token, payload } = answer?.expect("a watch ends with a status");
            assert!((1..=256).contains(&resume_token.len()));
            self.token = resume_token;
            match payload.expect("one is set") {
                Payload::Heartbeat(_) => {}
                payload => return Ok(payload),
            }
        }
    }

    async fn change(&mut self) -> (ChangeKind, Option<StoredEvent>, Option<StoredEvent>) {
        match self.next().await.expect("it goes on") {
            Payload::Change(change) => {
                assert_eq!(change.committed_at.is_some(), change.kind() != ChangeKind::Snapshot);
                (change.kind(), change.old, change.new)
            }
            other => panic!("no change: {other:?}"),
        }
    }

    /// The labels of the rows up to the end of the snapshot, and whether it began with a start.
    async fn snapshot(&mut self) -> (bool, Vec<String>) {
        let (mut anew, mut labels) = (false, Vec::new());
        loop {
            match self.next().await.expect("it goes on") {
                Payload::SnapshotStart(_) => {
                    anew = true;
                    labels.clear();
                }
                Payload::SnapshotEnd(_) => break,
                Payload::Change(change) => labels.push(label(change.new.as_ref())),
                Payload::Heartbeat(_) => {}
            }
        }
        labels.sort();
        (anew, labels)
    }
}

fn label(event: Option<&StoredEvent>) -> String {
    event.and_then(|event| event.label.clone()).unwrap_or_default()
}

/// A session of the site, in the month.
async fn session(database: &Database, site: &str, month: &str) {
    database.ensure_month(month).await;
    let sql = format!(
        "INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, \
         traffic_source, traffic_medium, lead_score) SELECT id, '{month}', '00000000-0000-0000-0000-000000000001', '{month}', \
         '{month}', 1, '/', 'Organic/Referral', 'Direct', 'direct', 0 FROM sites WHERE public_id = '{site}'"
    );
    database.admin.batch_execute(&sql).await.expect("a session");
}

/// Events of that session, labelled by their numbers.
fn events(site: &str, month: &str, numbers: std::ops::Range<u32>) -> String {
    format!(
        "INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, \
         event_label, event_value, signals, lead_score, metadata) \
         SELECT s.id, '{month}', md5(n::text)::uuid, '00000000-0000-0000-0000-000000000001', '{month}', '{month}', 'https://a.example/', \
         'interaction', 'view', n::text, n, 2, 10, '{{\"deep\": {{\"n\": [1, null, \"x\"]}}}}' \
         FROM sites s, generate_series({}, {} - 1) AS n WHERE s.public_id = '{site}'",
        numbers.start, numbers.end
    )
}

async fn run(database: &Database, sql: &str) {
    database.admin.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}: {sql}"));
}

const MONTH: &str = "2026-11-01";
const LATER: &str = "2026-12-01";

#[tokio::test]
async fn a_watch_shows_what_is_there_and_then_what_a_hand_does() {
    let database = database().await;
    for site in ["shop", "other"] {
        database.site(site).await;
        for month in [MONTH, LATER] {
            session(&database, site, month).await;
        }
    }
    // More than two pages, in two months.
    run(&database, &events("shop", MONTH, 0..1100)).await;
    run(&database, &events("shop", LATER, 2000..2003)).await;
    run(&database, &events("other", MONTH, 5000..5003)).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    let (anew, labels) = watch.snapshot().await;
    let mut expected: Vec<String> = (0..1100).chain(2000..2003).map(|n| n.to_string()).collect();
    expected.sort();
    assert!(anew && labels == expected, "{} rows", labels.len());
    let request = WatchEventsRequest { site: "shop".into(), session_month: Some(LATER.into()), resume_token: None };
    let answers = door.client(&token).watch_events(request).await.expect("it is served").into_inner();
    let mut december = Watch { answers, token: String::new() };
    assert_eq!(december.snapshot().await.1, ["2000", "2001", "2002"]);

    run(&database, &events("other", MONTH, 5003..5004)).await;
    run(&database, &events("shop", MONTH, 7000..7001)).await;
    let (kind, old, new) = watch.change().await;
    assert_eq!((kind, label(new.as_ref()).as_str(), old), (ChangeKind::Insert, "7000", None));
    let inserted = new.expect("the new row");
    let key = inserted.session.clone().expect("its session");
    assert_eq!(
        (key.session_month.as_str(), inserted.value, inserted.score.as_ref().map(|s| s.value)),
        (MONTH, Some(7000.0), Some(10))
    );
    assert!(
        inserted.received_at == inserted.created_at
            && inserted.metadata.as_ref().is_some_and(|meta| meta.fields.contains_key("deep"))
    );

    run(&database, "UPDATE events SET event_label = 'changed' WHERE event_label = '7000'").await;
    let (kind, old, new) = watch.change().await;
    assert_eq!((kind, old, label(new.as_ref()).as_str()), (ChangeKind::Update, Some(inserted), "changed"));
    run(&database, "DELETE FROM events WHERE event_label = 'changed'").await;
    assert_eq!(watch.change().await, (ChangeKind::Delete, new, None));

    // Out of one month and into another, where the second watch looks.
    run(&database, "UPDATE events SET session_month = '2026-12-01' WHERE event_label = '5'").await;
    let (kind, old, _) = watch.change().await;
    assert_eq!((kind, label(old.as_ref()).as_str()), (ChangeKind::Delete, "5"));
    let (kind, _, new) = watch.change().await;
    assert_eq!((kind, label(new.as_ref()).as_str()), (ChangeKind::Insert, "5"));
    let (kind, _, new) = december.change().await;
    assert_eq!((kind, label(new.as_ref()).as_str()), (ChangeKind::Insert, "5"));

    // To a neighbour, and back.
    run(
        &database,
        "UPDATE events SET site_id = (SELECT id FROM sites WHERE public_id = 'other') WHERE event_label = '7'",
    )
    .await;
    let (kind, old, new) = watch.change().await;
    assert_eq!((kind, label(old.as_ref()).as_str(), new), (ChangeKind::Delete, "7", None));
    // What cannot be shown is not there.
    run(&database, "UPDATE events SET created_at = 'infinity' WHERE event_label = '8'").await;
    let (kind, old, new) = watch.change().await;
    assert_eq!((kind, label(old.as_ref()).as_str(), new), (ChangeKind::Delete, "8", None));
    // Another key is another row.
    run(&database, "UPDATE events SET id = 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE event_label = '9'").await;
    let kinds = [watch.change().await.0, watch.change().await.0];
    assert_eq!(kinds, [ChangeKind::Delete, ChangeKind::Insert]);
}

#[tokio::test]
async fn sessions_and_calls_are_watched_alike() {
    let database = database().await;
    let site = database.site("shop").await;
    session(&database, "shop", MONTH).await;
    let call = |n: u32| {
        format!(
            "INSERT INTO calls (site_id, provider, provider_call_id, channel, direction, dialled_number, started_at, review, sale_amount, \
             sale_currency) VALUES ('{}', 'twilio', 'c{n}', 'PHONE', 'INBOUND', '+12025550123', now(), 'CONFIRMED', 12.30, 'TRY')",
            site.id
        )
    };
    run(&database, &call(1)).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let token = database.token(&[Scope::CallsRead, Scope::ScoringRead], Some(site.id)).await;
    let mut calls = CallsServiceClient::with_interceptor(door.channel.clone(), Bearer::new(&token));
    let request = WatchCallsRequest { site: "shop".into(), resume_token: None };
    let mut calls = calls.watch_calls(request).await.expect("it is served").into_inner();
    let mut told = Vec::new();
    while told.len() < 3 {
        told.push(calls.message().await.expect("it goes on").expect("no end").payload.expect("one is set"));
    }
    let CallPayload::Change(first) = &told[1] else { panic!("{told:?}") };
    let sale = first.new.as_ref().and_then(|call| call.review.as_ref()?.sale_amount.clone()).expect("a sale");
    assert_eq!((sale.units, sale.nanos, sale.currency_code.as_str()), (12, 300_000_000, "TRY"));
    assert!(matches!((&told[0], &told[2]), (CallPayload::SnapshotStart(_), CallPayload::SnapshotEnd(_))));
    run(&database, "UPDATE calls SET sale_amount = 7").await;
    let changed = loop {
        match calls.message().await.expect("it goes on").expect("no end").payload {
            Some(CallPayload::Change(changed)) => break changed,
            Some(CallPayload::Heartbeat(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((changed.kind(), &changed.old), (ChangeKind::Update, &first.new));
    let sale = changed.new.and_then(|call| call.review?.sale_amount).expect("a sale");
    assert_eq!((sale.units, sale.nanos), (7, 0));

    let mut sessions = ScoringServiceClient::with_interceptor(door.channel.clone(), Bearer::new(&token));
    let request = WatchSessionsRequest { site: "shop".into(), session_month: Some(MONTH.into()), resume_token: None };
    let mut sessions = sessions.watch_sessions(request).await.expect("it is served").into_inner();
    let mut next = async || loop {
        match sessions.message().await.expect("it goes on").expect("no end").payload {
            Some(SessionPayload::Change(changed)) => break changed,
            Some(_) => {}
            None => panic!("one is set"),
        }
    };
    let there = next().await;
    run(&database, "UPDATE sessions SET event_count = 17, gclid = 'G'").await;
    let changed = next().await;
    assert_eq!((changed.kind(), &changed.old), (ChangeKind::Update, &there.new));
    assert_eq!(changed.new.map(|session| session.event_count), Some(17));
}

#[tokio::test]
async fn a_watch_goes_on_where_it_was_left() {
    let database = database().await;
    database.site("shop").await;
    session(&database, "shop", MONTH).await;
    run(&database, &events("shop", MONTH, 0..40)).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let mut watch = door.events(&token, "shop", None).await.expect("it is served");
    watch.snapshot().await;
    run(&database, &events("shop", MONTH, 100..103)).await;
    watch.change().await;
    let left = watch.token.clone();
    drop(watch);
    run(&database, "UPDATE events SET event_label = 'x' WHERE event_label = '3'").await;
    let mut again = door.events(&token, "shop", Some(&left)).await.expect("it is served");
    let kinds = [again.change().await.0, again.change().await.0, again.change().await.0];
    assert_eq!(kinds, [ChangeKind::Insert, ChangeKind::Insert, ChangeKind::Update], "exactly what was missed");

    // Another server, whose log begins now: from the tables, and only what was written since.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    run(&database, &events("shop", MONTH, 200..201)).await;
    again.change().await;
    let left = again.token.clone();
    drop(again);
    run(&database, &events("shop", MONTH, 300..302)).await;
    let second = Door::open(&database, FeedOptions::default()).await;
    let mut watch = second.events(&token, "shop", Some(&left)).await.expect("it is served");
    let (anew, labels) = watch.snapshot().await;
    assert!(!anew && labels.len() < 10, "{labels:?}");
    assert!(["300", "301"].iter().all(|new| labels.contains(&(*new).to_owned())), "{labels:?}");
    run(&database, &events("shop", MONTH, 400..401)).await;
    assert_eq!(watch.change().await.0, ChangeKind::Insert);

    // What was deleted meanwhile is in no table.
    let left = watch.token.clone();
    drop(watch);
    run(&database, "DELETE FROM events WHERE event_label = '300'").await;
    let third = Door::open(&database, FeedOptions::default()).await;
    let mut watch = third.events(&token, "shop", Some(&left)).await.expect("it is served");
    let (anew, labels) = watch.snapshot().await;
    assert!(anew && labels.len() == 46 && !labels.contains(&"300".to_owned()), "{labels:?}");

    for (damaged, site) in [("abc", "shop"), (left.as_str(), "other")] {
        if site == "other" {
            database.site("other").await;
        }
        let refused = third.events(&token, site, Some(damaged)).await.err().expect("no token of this watch");
        let field = refused.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
        assert_eq!((refused.code(), field.as_deref()), (Code::InvalidArgument, Some("resume_token")));
    }
}

#[tokio::test]
async fn a_watch_ends_as_the_contract_says() {
    let database = database().await;
    let site = database.site("shop").await;
    session(&database, "shop", MONTH).await;
    let door = Door::open(&database, FeedOptions { log_bytes: 64 << 10, ..FeedOptions::default() }).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let unknown = door.events(&token, "nowhere", None).await.err().expect("no such site");
    assert_eq!(unknown.code(), Code::NotFound);

    // Who does not read is cut off, and goes on from the token in the status.
    let mut slow = door.events(&token, "shop", None).await.expect("it is served");
    slow.snapshot().await;
    for n in 0..60 {
        run(&database, &events("shop", MONTH, n * 100..(n + 1) * 100)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut rows = BTreeMap::new();
    let end = loop {
        match slow.next().await {
            Ok(Payload::Change(change)) => drop(rows.insert(label(change.new.as_ref()), ())),
            Ok(_) => {}
            Err(end) => break end,
        }
    };
    assert_eq!(end.code(), Code::ResourceExhausted, "{end:?}");
    let info = end.get_details_error_info().expect("why");
    assert_eq!((info.reason.as_str(), info.metadata.get("resume_token")), ("SLOW_WATCHER", Some(&slow.token)));
    let mut again = door.events(&token, "shop", Some(&slow.token)).await.expect("it is served");
    loop {
        match again.next().await {
            Ok(Payload::Change(change)) => drop(rows.insert(label(change.new.as_ref()), ())),
            Ok(Payload::SnapshotEnd(_)) => break,
            Ok(other) => panic!("it begins anew: {other:?}"),
            // On a busy machine it may be too slow once more.
            Err(end) => {
                let info = end.get_details_error_info().expect("why");
                assert_eq!(info.reason, "SLOW_WATCHER");
                let token_left = info.metadata.get("resume_token").map(String::as_str);
                again = door.events(&token, "shop", token_left).await.expect("it is served");
            }
        }
    }
    assert_eq!(rows.len(), 6000);

    // A revoked token opens nothing any more.
    let mine = database.token(&[Scope::EventsRead], Some(site.id)).await;
    let mut watch = door.events(&mine, "shop", None).await.expect("it is served");
    run(&database, "UPDATE api_tokens SET revoked_at = now() WHERE site_id IS NOT NULL").await;
    let end = loop {
        if let Err(end) = watch.next().await {
            break end;
        }
    };
    assert_eq!(end.code(), Code::Unauthenticated);

    door.stop.cancel();
    let end = again.next().await.expect_err("the server stops");
    assert_eq!(end.code(), Code::Unavailable);
    assert!(end.get_details_retry_info().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_who_begin_while_rows_are_written_end_with_the_table() {
    let database = database().await;
    database.site("shop").await;
    session(&database, "shop", MONTH).await;
    session(&database, "shop", LATER).await;
    run(&database, &events("shop", MONTH, 0..1500)).await;
    let door = Door::open(&database, FeedOptions::default()).await;
    let token = database.token(&[Scope::EventsRead], None).await;
    let url = database.url.clone();
    let writers = (1..4u32).map(|writer| {
        let url = url.clone();
        tokio::spawn(async move {
            let client = crate::support::database::connect(&url).await;
            for n in 0..120 {
                let first = writer * 100_000 + n * 10;
                let month = if n % 3 == 0 { LATER } else { MONTH };
                let insert = events("shop", month, first..first + 8);
                let change = format!("UPDATE events SET event_value = {n} WHERE event_label = '{}'", n * 7 + writer);
                let delete = format!("DELETE FROM events WHERE event_label = '{}'", first + 1);
                client
                    .batch_execute(&format!("BEGIN; {insert}; {change}; COMMIT; {delete}"))
                    .await
                    .expect("it is written");
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    // Live watchers: the last row is written when all are.
    let (live, mut ready) = tokio::sync::mpsc::channel(12);
    let watchers = (0..12u64).map(|n| {
        let (channel, token, live) = (door.channel.clone(), token.clone(), live.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(n * 90)).await;
            let mut client = IngestServiceClient::with_interceptor(channel, Bearer::new(&token));
            let request = WatchEventsRequest { site: "shop".into(), ..Default::default() };
            let answers = client.watch_events(request).await.expect("it is served").into_inner();
            let mut watch = Watch { answers, token: String::new() };
            let mut rows: BTreeMap<String, StoredEvent> = BTreeMap::new();
            loop {
                match watch.next().await.expect("it goes on") {
                    Payload::Change(change) => {
                        let (kind, old, new) = (change.kind(), change.old, change.new);
                        if let Some(old) = old {
                            assert_eq!(rows.remove(&old.id), Some(old), "the old value is the one that was told");
                        }
                        if let Some(new) = new {
                            if new.label.as_deref() == Some("999999") {
                                return rows;
                            }
                            assert_eq!(rows.insert(new.id.clone(), new), None, "{kind:?} twice");
                        }
                    }
                    Payload::SnapshotStart(_) => assert!(rows.is_empty()),
                    Payload::SnapshotEnd(_) => live.send(()).await.expect("the test waits"),
                    Payload::Heartbeat(_) => {}
                }
            }
        })
    });
    let watchers: Vec<_> = watchers.collect();
    for writer in writers {
        writer.await.expect("a writer writes");
    }
    for _ in 0..12 {
        ready.recv().await.expect("every watch comes to its end of the snapshot");
    }
    run(&database, &events("shop", MONTH, 999_999..1_000_000)).await;
    let there = database.rows("SELECT id, event_value FROM events WHERE event_label <> '999999' ORDER BY id").await;
    for watcher in watchers {
        let rows = watcher.await.expect("a watcher watches");
        let told: Vec<_> = rows.values().map(|row| (row.id.clone(), row.value)).collect();
        let there: Vec<_> = there
            .iter()
            .map(|row| (row["id"].as_str().unwrap_or_default().to_owned(), row["event_value"].as_f64()))
            .collect();
        assert_eq!(told, there);
    }
}
