//! Who is let in: tokens and their scopes, sites and ends, as the gate and the running program treat them.

use std::time::{Duration, Instant};

use opsmantik::access::{ApiToken, Denied, Gate};
use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::{
    FILE_DESCRIPTOR_SET, GetCallRequest, GetSessionScoreRequest, ListCallsRequest, ListTopSessionsRequest,
    ReviewCallRequest, SessionKey,
};
use opsmantik::store::transaction::{Purpose, Reader};
use opsmantik::store::{Store, sessions};
use prost::Message;
use serde_json::json;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use uuid::Uuid;

use crate::support::database::database;
use crate::support::process::Server;

mod commands;
pub mod people;
mod wall;

/// What a revoked token may still be good for, at the longest.
const REVOKED_WITHIN: Duration = Duration::from_secs(5);

/// Every RPC, its scope, and whether a person may call it, too: written down once more, so that the server's own table is judged.
const RPCS: [(&str, &str, Scope, bool); 13] = [
    ("IngestService", "Ingest", Scope::IngestWrite, false),
    ("IngestService", "StreamIngest", Scope::IngestWrite, false),
    ("IngestService", "WatchEvents", Scope::EventsRead, true),
    ("ScoringService", "ScoreSignals", Scope::ScoringRead, true),
    ("ScoringService", "GetSessionScore", Scope::ScoringRead, true),
    ("ScoringService", "ListTopSessions", Scope::ScoringRead, true),
    ("ScoringService", "WatchSessions", Scope::ScoringRead, true),
    ("CallsService", "RecordCall", Scope::CallsWrite, false),
    ("CallsService", "RecordCalls", Scope::CallsWrite, false),
    ("CallsService", "GetCall", Scope::CallsRead, true),
    ("CallsService", "ListCalls", Scope::CallsRead, true),
    ("CallsService", "ReviewCall", Scope::CallsWrite, true),
    ("CallsService", "WatchCalls", Scope::CallsRead, true),
];

/// What one message to an RPC is answered, if that is a failure.
async fn ask<M: Message + Default + 'static>(
    channel: &Channel,
    rpc: &str,
    authorization: Option<&str>,
    message: M,
) -> Result<(), Status> {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.expect("the server listens");
    let mut request = Request::new(tokio_stream::once(message));
    request.set_timeout(Duration::from_secs(8));
    if let Some(value) = authorization {
        request.metadata_mut().insert("authorization", value.parse().expect("visible text"));
    }
    let path = format!("/opsmantik.v1.{rpc}").parse().expect("a path");
    let mut answers = client.streaming(request, path, ProstCodec::<M, ()>::default()).await?.into_inner();
    // A watch that goes on has let its caller in.
    match tokio::time::timeout(Duration::from_secs(1), answers.message()).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Ok(()),
    }
}

async fn empty(channel: &Channel, rpc: &str, authorization: Option<&str>) -> Code {
    ask(channel, rpc, authorization, ()).await.err().map_or(Code::Ok, |status| status.code())
}

async fn channel(server: &Server) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    endpoint.connect().await.expect("the server listens")
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

#[test]
fn the_list_of_rpcs_is_the_contract() {
    let set = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let services = set.file.iter().filter(|file| file.package() == "opsmantik.v1").flat_map(|file| &file.service);
    let mut named: Vec<String> = services
        .flat_map(|service| service.method.iter().map(|rpc| format!("{}/{}", service.name(), rpc.name())))
        .collect();
    named.sort();
    let mut listed: Vec<String> = RPCS.iter().map(|(service, rpc, ..)| format!("{service}/{rpc}")).collect();
    listed.sort();
    assert_eq!(named, listed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rpc_opens_to_its_scope_and_to_nothing_else() {
    let database = database().await;
    let server = Server::start_with(&database.url, &[("SUPABASE_JWT_SECRET", people::SECRET)]).await;
    let channel = channel(&server).await;
    let mut tokens = Vec::new();
    for scope in Scope::ALL {
        tokens.push((scope, bearer(&database.token(&[scope], None).await)));
    }
    let person = bearer(&people::good(people::SECRET));
    let let_in = |code: Code| {
        let served = [Code::Ok, Code::Unimplemented, Code::InvalidArgument, Code::NotFound];
        // A person's own sites are none here, so a site that they name is not theirs.
        served.contains(&code)
    };
    for (service, rpc, scope, people_too) in RPCS {
        let rpc = format!("{service}/{rpc}");
        let nobody = [None, Some(""), Some("Bearer "), Some("Basic b206"), Some("Bearer om_x"), Some("om_x")];
        for authorization in nobody {
            assert_eq!(empty(&channel, &rpc, authorization).await, Code::Unauthenticated, "{rpc}: {authorization:?}");
        }
        for (held, token) in &tokens {
            let code = empty(&channel, &rpc, Some(token)).await;
            if *held == scope {
                assert!(let_in(code), "{rpc} with {held}: {code:?}");
            } else {
                assert_eq!(code, Code::PermissionDenied, "{rpc} with {held}");
            }
        }
        let code = empty(&channel, &rpc, Some(&person)).await;
        if people_too {
            assert!(let_in(code), "{rpc} by a person: {code:?}");
        } else {
            assert_eq!(code, Code::PermissionDenied, "{rpc} by a person");
        }
    }
    let every = bearer(&database.token(&Scope::ALL, None).await);
    assert_eq!(empty(&channel, "CallsService/DeleteEverything", Some(&every)).await, Code::Unimplemented);
    assert_eq!(empty(&channel, "CallsService/DeleteEverything", None).await, Code::Unauthenticated);
    // Both proofs of one request are good, and still nobody knows whose it is.
    let mut twice = Grpc::new(channel.clone());
    twice.ready().await.expect("the server listens");
    let mut request = Request::new(());
    for token in [&every, &person] {
        request.metadata_mut().append("authorization", token.parse().expect("visible text"));
    }
    let path = "/opsmantik.v1.ScoringService/ScoreSignals".parse().expect("a path");
    let status = twice.unary(request, path, ProstCodec::<(), ()>::default()).await.expect_err("two proofs");
    assert_eq!(status.code(), Code::Unauthenticated);
}

/// All that a caller sees of a refusal.
fn seen(status: &Status) -> (Code, String, Vec<u8>, Vec<String>) {
    let headers = status.metadata().clone().into_headers();
    let mut names: Vec<String> = headers
        .iter()
        .filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()))
        .map(|(name, value)| format!("{name}: {value:?}"))
        .collect();
    names.sort();
    (status.code(), status.message().to_owned(), status.details().to_vec(), names)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_that_is_not_the_tokens_is_refused_alike_whether_it_exists_or_not() {
    let database = database().await;
    let (mine, theirs) = (database.site("mine").await, database.site("theirs").await);
    let server = Server::start_with(&database.url, &[("SUPABASE_JWT_SECRET", people::SECRET)]).await;
    let channel = channel(&server).await;
    let token = bearer(&database.token(&Scope::ALL, Some(mine.id)).await);
    let person = bearer(&people::good(people::SECRET));
    let names =
        [theirs.id.to_string(), theirs.public_id.clone(), Uuid::from_u128(0xABCD).to_string(), "nobody".to_owned()];
    for authorization in [&token, &person] {
        let mut answers = Vec::new();
        for name in &names {
            let site = name.clone();
            let month = "2026-01-01".to_owned();
            let id = Uuid::nil().to_string();
            let key = SessionKey { site_id: site.clone(), session_month: month.clone(), session_id: id.clone() };
            let session = GetSessionScoreRequest { session: Some(key) };
            let top = ListTopSessionsRequest { site: site.clone(), session_month: month, ..Default::default() };
            let call = GetCallRequest { site: site.clone(), ..Default::default() };
            let calls = ListCallsRequest { site: site.clone(), ..Default::default() };
            let review = ReviewCallRequest { site, call_id: id, ..Default::default() };
            answers.push([
                ask(&channel, "ScoringService/GetSessionScore", Some(authorization), session).await,
                ask(&channel, "ScoringService/ListTopSessions", Some(authorization), top).await,
                ask(&channel, "CallsService/GetCall", Some(authorization), call).await,
                ask(&channel, "CallsService/ListCalls", Some(authorization), calls).await,
                ask(&channel, "CallsService/ReviewCall", Some(authorization), review).await,
            ]);
        }
        let answers =
            answers.iter().map(|of| of.each_ref().map(|answer| seen(answer.as_ref().expect_err("not theirs"))));
        let answers: Vec<_> = answers.collect();
        for answer in &answers {
            assert_eq!(answer, &answers[0]);
            for (code, message, ..) in answer {
                let codes = [Code::PermissionDenied, Code::InvalidArgument, Code::Unimplemented];
                assert!(codes.contains(code), "{code:?}: {message}");
                assert!(!names.iter().any(|name| message.contains(name)), "{message}");
            }
        }
    }

    let user = Reader::User(people::USER);
    let own = "UPDATE sites SET user_id = $1 WHERE public_id = 'mine'";
    database.admin.execute(own, &[&people::USER.as_uuid()]).await.expect("the superuser may");
    let find = async |reader, site: &opsmantik::domain::site::Site| {
        let by_name = database.store.find_site_as(reader, &site.public_id, None).await.expect("the database answers");
        let by_id = database.store.find_site_as(reader, "", Some(site.id)).await.expect("the database answers");
        assert_eq!(by_name, by_id);
        by_name.map(|site| site.id)
    };
    for reader in [user, Reader::Site(mine.id)] {
        assert_eq!(find(reader, &mine).await, Some(mine.id));
        assert_eq!(find(reader, &theirs).await, None);
    }
}

async fn admitted(gate: &Gate, token: &str) -> bool {
    match gate.admit(token).await {
        Ok(_) => true,
        Err(Denied::Invalid) => false,
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_revoked_token_stops_within_five_seconds_an_expired_one_at_once_and_a_stream_hears_of_it() {
    let database = database().await;
    let (gate, store) = (Gate::new(database.store.clone()), &database.store);
    let (short, long) = (ApiToken::generate().expect("bits"), ApiToken::generate().expect("bits"));
    let issue = async |token: &ApiToken, seconds: Option<i64>| {
        let end = seconds.map(|seconds| chrono::Utc::now() + chrono::TimeDelta::milliseconds(seconds));
        store.issue_token(&token.hash(), "t", &[Scope::CallsRead], None, end).await.expect("issued").id
    };
    // Unknown first: that answer must not outlive the issue by long, either.
    assert!(!admitted(&gate, long.reveal()).await);
    let id = issue(&long, None).await;
    let began = Instant::now();
    while !admitted(&gate, long.reveal()).await {
        assert!(began.elapsed() < REVOKED_WITHIN, "a token that was issued is known");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    issue(&short, Some(700)).await;
    let (short_stream, long_stream) =
        (gate.admit(short.reveal()).await.expect("good"), gate.admit(long.reveal()).await.expect("good"));
    assert!(short_stream.renew().await.is_ok() && long_stream.renew().await.is_ok());
    tokio::time::sleep(Duration::from_millis(720)).await;
    assert!(!admitted(&gate, short.reveal()).await, "its end is known, so nothing is asked");
    assert!(matches!(short_stream.renew().await, Err(Denied::Invalid)));

    assert!(admitted(&gate, long.reveal()).await);
    store.revoke_token(id).await.expect("revoked");
    let began = Instant::now();
    while long_stream.renew().await.is_ok() {
        assert!(began.elapsed() < REVOKED_WITHIN, "still good after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!admitted(&gate, long.reveal()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_unknown_tokens_takes_neither_all_connections_nor_the_place_of_those_who_are_known() {
    let database = database().await;
    let gate = Gate::new(database.store.clone());
    let known = database.token(&[Scope::CallsRead], None).await;
    assert!(admitted(&gate, &known).await);
    // That it was used is noted behind its back, and would wait for the lock as well.
    let began = Instant::now();
    while database.count("SELECT count(*) FROM api_tokens WHERE last_used_at IS NULL").await > 0 {
        assert!(began.elapsed() < Duration::from_secs(10), "its use is noted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Every look-up of a token now waits, until its limit.
    let mut locker = crate::support::database::connect(&database.url).await;
    let lock = locker.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE api_tokens IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let mut flood = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (gate, token) = (gate.clone(), ApiToken::generate().expect("bits"));
        flood.spawn(async move { gate.admit(token.reveal()).await.err() });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
        AND application_name = 'opsmantik' AND wait_event_type = 'Lock'";
    assert_eq!(database.count(waiting).await, 2, "the flood's share of the connections");
    assert_eq!(database.store.list_sites().await.expect("others go on").len(), 0);
    let began = Instant::now();
    let refused = flood.join_all().await;
    assert!(began.elapsed() < Duration::from_secs(6), "told after {:?}", began.elapsed());
    let busy = refused.iter().filter(|denied| matches!(denied, Some(Denied::Busy))).count();
    let away = refused.iter().filter(|denied| matches!(denied, Some(Denied::Database(_)))).count();
    assert_eq!((busy + away, refused.len()), (200, 200), "nobody is let in, and nobody is called unknown");
    assert!(busy >= 190, "{busy}");

    // Let go for those who are known, while strangers go on: they have a lane of their own.
    drop(lock);
    drop(locker);
    let strangers = tokio::spawn({
        let gate = gate.clone();
        async move {
            loop {
                let tokens: Vec<_> = (0..64).filter_map(|_| ApiToken::generate().ok()).collect();
                futures::future::join_all(tokens.iter().map(|token| gate.admit(token.reveal()))).await;
            }
        }
    });
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        assert!(admitted(&gate, &known).await, "known, and let in beside a flood");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    strangers.abort();
}

#[tokio::test]
async fn without_a_database_nobody_is_let_in_and_nobody_is_called_unknown() {
    let store = Store::new("postgres://nobody@127.0.0.1:1/none", 2).await.expect("a URL");
    let gate = Gate::new(store);
    let token = ApiToken::generate().expect("bits");
    assert!(matches!(gate.admit(token.reveal()).await, Err(Denied::Database(_))));
    let malformed = ["", "om_", "om_short", &token.reveal()[..45], "a.b.c", &"x".repeat(100_000)];
    for text in malformed {
        assert!(matches!(gate.admit(text).await, Err(Denied::Invalid)), "no database is needed to refuse {text:.20}");
    }
}

#[tokio::test]
async fn when_a_token_was_used_is_kept_roughly() {
    let database = database().await;
    let gate = Gate::new(database.store.clone());
    let token = database.token(&[Scope::CallsRead], None).await;
    let used = "SELECT last_used_at FROM api_tokens";
    assert_eq!(database.rows(used).await, [json!({"last_used_at": null})]);
    gate.admit(&token).await.expect("good");
    let began = Instant::now();
    let first = loop {
        let rows = database.rows(used).await;
        if !rows[0]["last_used_at"].is_null() {
            break rows;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "not noted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    gate.admit(&token).await.expect("good");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(database.rows(used).await, first, "once a minute");
}

#[tokio::test]
async fn a_statement_that_nobody_waits_for_ends_on_the_server_too() {
    let database = database().await;
    let site = database.site("shop").await;
    let mut locker = crate::support::database::connect(&database.url).await;
    let lock = locker.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
        AND application_name = 'opsmantik' AND wait_event_type = 'Lock'";
    let nothing_runs = async |since: Instant| {
        while database.count(ours).await > 0 {
            assert!(since.elapsed() < Duration::from_secs(2), "it still waits after {:?}", since.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };

    let read = async {
        let tx = database.store.begin(Purpose::Read(Reader::Site(site.id))).await?;
        let key = opsmantik::domain::id::SessionKey {
            site_id: site.id,
            month: "2026-01-01".parse().expect("a month"),
            id: opsmantik::domain::id::SessionId::from_uuid(Uuid::nil()),
        };
        sessions::find(&tx, key).await
    };
    let asked = tokio::time::timeout(Duration::from_millis(300), read).await;
    assert!(asked.is_err(), "the lock holds");
    nothing_runs(Instant::now()).await;

    // The same through the whole server: a caller whose deadline passes while their token is looked up.
    drop(lock);
    let lock = locker.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE api_tokens IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let server = Server::start(&database.url).await;
    let channel = channel(&server).await;
    let mut client = Grpc::new(channel);
    client.ready().await.expect("the server listens");
    let mut request = Request::new(());
    request.set_timeout(Duration::from_millis(300));
    let token = ApiToken::generate().expect("bits");
    request.metadata_mut().insert("authorization", bearer(token.reveal()).parse().expect("visible text"));
    let path = "/opsmantik.v1.ScoringService/ScoreSignals".parse().expect("a path");
    let status = client.unary(request, path, ProstCodec::<(), ()>::default()).await.expect_err("the lock holds");
    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "{status:?}");
    nothing_runs(Instant::now()).await;
}
