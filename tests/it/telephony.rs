//! Calls over the internal door of the running program: pushed in any order and any number, listed, judged, and never a caller's number in
//! clear anywhere.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::domain::access::Scope;
use opsmantik::domain::site::Site;
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::get_call_request::Call as Asked;
use opsmantik::grpc::proto::ingest_result::Outcome as Ingested;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::pushed_call::Duration as Lasted;
use opsmantik::grpc::proto::record_call_result::Outcome;
use opsmantik::grpc::proto::{
    Call, CallMatch, CallStatus, Event, GetCallRequest, IngestRequest, MatchMethod, ProviderCallKey, PushedCall,
    RecordCallRequest, RecordCallsRequest, RecordEffect, RecordedCall, RejectionReason,
};
use prost_types::Timestamp;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::calls::{BUSINESS, CALLER, KEY};
use crate::support::database::{Database, bearer, database};
use crate::support::line::Bearer;
use crate::support::process::Server;

mod judged;
mod listed;

const SECRET: &str = "a-secret-of-a-test-that-has-32-bytes-or-more";

type Client = CallsServiceClient<InterceptedService<Channel, Bearer>>;

/// A server with two sites, `shop` and `neighbour`, and a token for all sites.
struct Rig {
    database: Database,
    shop: Site,
    neighbour: Site,
    token: String,
    channel: Channel,
    server: Server,
}

impl Rig {
    async fn start() -> Self {
        let more = [("CALLER_KEY", KEY), ("SUPABASE_JWT_SECRET", SECRET), ("RUST_LOG", "opsmantik=trace,debug")];
        Self::start_with(&more).await
    }

    async fn start_with(more: &[(&str, &str)]) -> Self {
        let database = database().await;
        let (shop, neighbour) = (database.site("shop").await, database.site("neighbour").await);
        let server = Server::start_with(&database.url, more).await;
        let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let channel = endpoint.connect().await.expect("the server listens");
        let token = database.token(&Scope::ALL, None).await;
        Self { database, shop, neighbour, token, channel, server }
    }

    fn calls_as(&self, token: &str) -> Client {
        CallsServiceClient::with_interceptor(self.channel.clone(), Bearer::new(token))
    }

    fn calls(&self) -> Client {
        self.calls_as(&self.token)
    }

    async fn record(&self, call: PushedCall) -> Result<RecordedCall, Status> {
        let answer = self.calls().record_call(RecordCallRequest { call: Some(call) }).await?;
        Ok(answer.into_inner().recorded.expect("always set"))
    }

    async fn record_all(&self, calls: Vec<PushedCall>) -> Result<Vec<Outcome>, Status> {
        let results = self.calls().record_calls(RecordCallsRequest { calls }).await?.into_inner().results;
        Ok(results.into_iter().map(|result| result.outcome.expect("always set")).collect())
    }

    /// Stores a click of this visit on the business's number, and returns the session's id.
    async fn click(&self, visit: &str, at: DateTime<Utc>) -> String {
        let click = Event {
            site: "shop".to_owned(),
            url: "https://shop.example/?gclid=G".to_owned(),
            session_id: visit.to_owned(),
            category: "conversion".to_owned(),
            action: "phone_call".to_owned(),
            label: Some(format!("tel:{BUSINESS}")),
            occurred_at: Some(time(at)),
            ..Event::default()
        };
        let mut ingest = IngestServiceClient::with_interceptor(self.channel.clone(), bearer(&self.token));
        let answer = ingest.ingest(IngestRequest::of(vec![click])).await.expect("it is stored").into_inner();
        match &answer.results[0].outcome {
            Some(Ingested::Stored(placement)) => placement.session.clone().expect("always set").session_id,
            other => panic!("not stored: {other:?}"),
        }
    }

    async fn get(&self, id: &str) -> Call {
        let asked = GetCallRequest { site: "shop".to_owned(), call: Some(Asked::CallId(id.to_owned())) };
        let answer = self.calls().get_call(asked).await.expect("there is such a call");
        answer.into_inner().call.expect("always set")
    }

    async fn stored(&self) -> i64 {
        self.database.count("SELECT count(*) FROM calls").await
    }
}

fn time(at: DateTime<Utc>) -> Timestamp {
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).expect("below a second");
    Timestamp { seconds: at.timestamp(), nanos }
}

fn ago(seconds: i64) -> DateTime<Utc> {
    Utc::now() - TimeDelta::seconds(seconds)
}

fn key(id: &str) -> Option<ProviderCallKey> {
    Some(ProviderCallKey { provider: "twilio".to_owned(), provider_call_id: id.to_owned() })
}

/// A call to the shop that began at a time, from a known caller.
fn call(id: &str, at: DateTime<Utc>) -> PushedCall {
    PushedCall {
        site: "shop".to_owned(),
        key: key(id),
        dialled_number: BUSINESS.to_owned(),
        caller_number: Some(CALLER.to_owned()),
        started_at: Some(time(at)),
        ..PushedCall::default()
    }
}

fn found(call: &Call) -> &CallMatch {
    call.r#match.as_ref().expect("always set")
}

/// How the call was matched, and to which session.
fn matched(call: &Call) -> (MatchMethod, Option<&str>) {
    (found(call).method(), found(call).session.as_ref().map(|key| key.session_id.as_str()))
}

/// The code of a refusal, and the fields and reasons that it names.
fn refusal(status: &Status) -> (Code, Vec<(String, String)>) {
    let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    (status.code(), violations.into_iter().map(|violation| (violation.field, violation.reason)).collect())
}

fn invalid(field: &str, reason: RejectionReason) -> (Code, Vec<(String, String)>) {
    (Code::InvalidArgument, vec![(field.to_owned(), reason.as_str_name().to_owned())])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_finds_its_click_whichever_comes_first() {
    let rig = Rig::start().await;
    let visit = rig.click("visit", ago(100)).await;
    let began = ago(40);
    let RecordedCall { call: Some(stored), effect } = rig.record(call("after", began)).await.expect("recorded") else {
        panic!("always set")
    };
    assert_eq!((effect, matched(&stored)), (RecordEffect::Created.into(), (MatchMethod::Click, Some(visit.as_str()))));
    let how = found(&stored);
    let evidence = how.evidence.as_ref().expect("a click");
    assert_eq!((evidence.clicked_number.as_deref(), evidence.fingerprint.as_deref()), (Some(BUSINESS), None));
    assert!((59..=61).contains(&evidence.before_call.expect("always set").seconds), "{evidence:?}");
    assert_eq!(how.candidates.iter().map(|one| one.evidence.as_ref()).collect::<Vec<_>>(), [Some(evidence)]);
    assert_eq!((how.confidence, how.score_at_match.as_ref().map(|score| score.value)), (0.89, Some(50)));
    let caller = stored.caller.clone().expect("always set");
    assert_eq!((caller.anonymous, caller.number_hash.len(), caller.last_digits.as_str()), (false, 64, "87"));
    assert_eq!((stored.site_id.as_str(), stored.dialled_number.as_str()), (&*rig.shop.id.to_string(), BUSINESS));
    assert_eq!(rig.get(&stored.id).await, stored);
    let by_key = GetCallRequest { site: rig.shop.id.to_string(), call: key("after").map(Asked::Key) };
    let by_key = rig.calls().get_call(by_key).await.expect("there is such a call").into_inner();
    assert_eq!(by_key.call.as_ref(), Some(&stored));

    // The other way around: nobody has clicked yet, and an anonymous caller is nobody's click ever.
    let (began, clicked) = (ago(4000), ago(4030));
    let early = rig.record(call("before", began)).await.expect("recorded").call.expect("always set");
    let hidden = PushedCall { caller_number: Some("anonymous".to_owned()), ..call("hidden", began) };
    let hidden = rig.record(hidden).await.expect("recorded").call.expect("always set");
    assert_eq!(matched(&early), (MatchMethod::Unmatched, None));
    let visit = rig.click("another visit", clicked).await;
    assert_eq!(matched(&rig.get(&early.id).await), (MatchMethod::Click, Some(visit.as_str())));
    let hidden = rig.get(&hidden.id).await;
    assert_eq!(matched(&hidden), (MatchMethod::Unmatched, None));
    assert!(hidden.caller.is_some_and(|caller| caller.anonymous && caller.number_hash.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_call_of_a_batch_is_told_its_own_fate_and_one_that_is_not_ours_ends_it() {
    let rig = Rig::start().await;
    let spoil = "ALTER TABLE calls ADD CHECK (provider_call_id <> 'poison')";
    rig.database.admin.batch_execute(spoil).await.expect("the superuser may");
    let at = ago(60);
    let at_neighbour = |id: &str| PushedCall { site: "neighbour".to_owned(), ..call(id, at) };
    let batch = vec![
        call("one", at),
        PushedCall { dialled_number: "no number".to_owned(), ..call("bad", at) },
        at_neighbour("one"),
        PushedCall { site: "nobody".to_owned(), ..call("unknown", at) },
        call("poison", at),
        PushedCall {
            status: CallStatus::Completed.into(),
            duration: Some(Lasted::DurationSeconds(9)),
            ..call("one", at)
        },
        PushedCall { started_at: Some(time(ago(65 * 24 * 3600))), ..call("older", at) },
        PushedCall { key: None, ..call("", at) },
        PushedCall { site: " ".to_owned(), ..call("nowhere", at) },
        PushedCall { channel: 77, ..call("odd", at) },
        PushedCall { started_at: Some(Timestamp { seconds: 0, nanos: -1 }), ..call("torn", at) },
        PushedCall { recording_reference: Some("r".repeat(2049)), ..call("long", at) },
    ];
    let outcomes = rig.record_all(batch).await.expect("the request is understood");
    let told: Vec<String> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Recorded(recorded) => {
                let call = recorded.call.as_ref().expect("always set");
                format!("{:?} {:?}", recorded.effect(), call.duration_seconds)
            }
            Outcome::Rejected(rejection) => {
                assert!(!rejection.message.is_empty() && !rejection.message.contains("nobody"), "{rejection:?}");
                format!("{:?} {}", rejection.reason(), rejection.field)
            }
        })
        .collect();
    let expected = [
        "Created Some(9)",
        "Invalid dialled_number",
        "Created None",
        "UnknownSite site",
        "Unstorable ",
        "Merged Some(9)",
        "Created None",
        "Missing key",
        "Missing site",
        "Invalid channel",
        "Invalid started_at",
        "OutOfRange recording_reference",
    ];
    assert_eq!(told, expected);
    assert_eq!(rig.stored().await, 3);
    let letters =
        rig.database.rows("SELECT site_id, source, reason, payload::jsonb AS payload FROM dead_letters").await;
    let payload = serde_json::json!({"site_id": rig.shop.id, "provider": "twilio", "provider_call_id": "poison"});
    let letter = serde_json::json!({"site_id": rig.shop.id, "source": "calls", "reason": "refused_by_database", "payload": payload});
    assert_eq!(letters, [letter]);

    for (calls, reason) in
        [(vec![], RejectionReason::Missing), (vec![PushedCall::default(); 1001], RejectionReason::OutOfRange)]
    {
        let status = rig.record_all(calls).await.expect_err("none, or too many");
        assert_eq!(refusal(&status), invalid("calls", reason));
    }
    // A token for the shop says nothing of the neighbour, not even in the last of many.
    let token = rig.database.token(&[Scope::CallsWrite, Scope::CallsRead], Some(rig.shop.id)).await;
    for theirs in [rig.neighbour.public_id.clone(), rig.neighbour.id.to_string(), "nobody".to_owned()] {
        let calls = vec![call("new", at), PushedCall { site: theirs.clone(), ..call("new", at) }];
        let status = rig.calls_as(&token).record_calls(RecordCallsRequest { calls }).await.expect_err("not theirs");
        assert_eq!(status.code(), Code::PermissionDenied, "{theirs}");
        let one = RecordCallRequest { call: Some(PushedCall { site: theirs.clone(), ..call("new", at) }) };
        assert_eq!(rig.calls_as(&token).record_call(one).await.expect_err("not theirs").code(), Code::PermissionDenied);
        let asked = GetCallRequest { site: theirs, call: key("one").map(Asked::Key) };
        assert_eq!(rig.calls_as(&token).get_call(asked).await.expect_err("not theirs").code(), Code::PermissionDenied);
    }
    assert_eq!(rig.stored().await, 3);
    let id = rig
        .database
        .rows(
            "SELECT id FROM calls WHERE provider_call_id = 'one' AND site_id <> (SELECT id FROM sites \
        WHERE public_id = 'shop')",
        )
        .await[0]["id"]
        .clone();
    let asked = Asked::CallId(id.as_str().expect("a UUID").to_owned());
    let asked = GetCallRequest { site: "shop".to_owned(), call: Some(asked) };
    assert_eq!(rig.calls_as(&token).get_call(asked).await.expect_err("the neighbour's call").code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_call_that_is_refused_names_its_field_below_call() {
    let rig = Rig::start().await;
    let spoil = "ALTER TABLE calls ADD CHECK (provider_call_id <> 'poison')";
    rig.database.admin.batch_execute(spoil).await.expect("the superuser may");
    use RejectionReason::{Invalid, Missing, OutOfRange, Unstorable};
    let at = ago(60);
    for (bad, field, reason) in [
        (PushedCall { site: String::new(), ..call("c", at) }, "call.site", Missing),
        (PushedCall { key: None, ..call("c", at) }, "call.key", Missing),
        (PushedCall { key: key(&"k".repeat(257)), ..call("c", at) }, "call.key.provider_call_id", OutOfRange),
        (PushedCall { dialled_number: "112x".to_owned(), ..call("c", at) }, "call.dialled_number", Invalid),
        (PushedCall { started_at: None, ..call("c", at) }, "call.started_at", Missing),
        (PushedCall { started_at: Some(time(ago(-3600))), ..call("c", at) }, "call.started_at", OutOfRange),
        (PushedCall { status: -1, ..call("c", at) }, "call.status", Invalid),
        (
            PushedCall { duration: Some(Lasted::DurationText("soon".into())), ..call("c", at) },
            "call.duration_text",
            Invalid,
        ),
        (call("poison", at), "call", Unstorable),
    ] {
        let status = rig.record(bad).await.expect_err(field);
        assert_eq!(refusal(&status), invalid(field, reason));
        assert!(!status.message().contains("112x") && !status.message().contains("soon"), "{}", status.message());
    }
    let status = rig.calls().record_call(RecordCallRequest { call: None }).await.expect_err("no call");
    assert_eq!(refusal(&status), invalid("call", Missing));
    let unknown = PushedCall { site: "nobody".to_owned(), ..call("c", at) };
    assert_eq!(rig.record(unknown).await.expect_err("no such site").code(), Code::NotFound);
    assert_eq!(rig.stored().await, 0);

    let keyless = Rig::start_with(&[]).await;
    for status in [
        keyless.record(call("c", at)).await.expect_err("no key"),
        keyless.record_all(vec![call("c", at)]).await.expect_err("no key"),
    ] {
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("CALLER_KEY"), "{}", status.message());
    }
    assert_eq!(keyless.stored().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_at_once_in_parts_or_broken_off_are_one_call() {
    let rig = Rig::start().await;
    let began = ago(90);
    let same = futures::future::join_all((0..10).map(|_| rig.record(call("same", began)))).await;
    let mut effects: Vec<RecordEffect> =
        same.iter().map(|recorded| recorded.as_ref().expect("recorded").effect()).collect();
    effects.sort_by_key(|effect| i32::from(*effect));
    assert_eq!((effects[0], effects[1..].to_vec()), (RecordEffect::Created, vec![RecordEffect::Unchanged; 9]));

    let parts = [
        PushedCall { status: CallStatus::Ringing.into(), caller_number: None, ..call("parts", began) },
        PushedCall { status: CallStatus::InProgress.into(), ..call("parts", began + TimeDelta::seconds(1)) },
        PushedCall {
            status: CallStatus::Completed.into(),
            duration: Some(Lasted::DurationText("3:12".to_owned())),
            recording_reference: Some("rec".to_owned()),
            caller_number: Some("(202) 555-0187".to_owned()),
            ..call("parts", began)
        },
    ];
    let pushed = futures::future::join_all(parts.into_iter().map(|part| rig.record(part))).await;
    let id = pushed[0].as_ref().expect("recorded").call.as_ref().expect("always set").id.clone();
    let whole = rig.get(&id).await;
    assert_eq!((whole.status(), whole.duration_seconds), (CallStatus::Completed, Some(192)));
    assert_eq!(whole.recording_reference.as_deref(), Some("rec"));
    let read = whole.started_at.expect("always set");
    assert_eq!((read.seconds, read.nanos / 1000), (time(began).seconds, time(began).nanos / 1000), "the earlier");
    let same =
        rig.calls().get_call(GetCallRequest { site: "shop".to_owned(), call: key("same").map(Asked::Key) }).await;
    let same = same.expect("there is such a call").into_inner().call.expect("always set");
    assert_eq!(whole.caller, same.caller, "one number, however it was written");

    // Whoever hangs up leaves nothing half done: the same again is recorded, and no transaction stays open.
    for patience in 1..30 {
        let batch = (0..20).map(|n| call(&format!("cut-{patience}-{n}"), began)).collect();
        let mut request = Request::new(RecordCallsRequest { calls: batch });
        request.set_timeout(Duration::from_millis(patience));
        drop(tokio::time::timeout(Duration::from_millis(patience), rig.calls().record_calls(request)).await);
    }
    crate::support::browser::eventually("nothing is left open", async || {
        let open = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND application_name = 'opsmantik' AND state <> 'idle'";
        (rig.database.count(open).await == 0).then_some(())
    })
    .await;
    let whole = "SELECT count(*) FROM (SELECT split_part(provider_call_id, '-', 2) FROM calls \
        WHERE provider_call_id LIKE 'cut-%' GROUP BY 1 HAVING count(*) <> 20) AS broken";
    assert_eq!(rig.database.count(whole).await, 0, "a batch is recorded whole or not at all");
    let again = rig.record_all((0..20).map(|n| call(&format!("cut-1-{n}"), began)).collect()).await;
    assert_eq!(again.expect("recorded").len(), 20);
}

/// Every row of every table, as text.
async fn everything(database: &Database) -> String {
    let tables = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'";
    let mut all = String::new();
    for table in database.admin.query(tables, &[]).await.expect("the catalogue") {
        let rows = format!("SELECT to_jsonb(t)::text FROM {} AS t", table.get::<_, String>(0));
        for row in database.admin.query(&rows, &[]).await.expect("the superuser sees all") {
            all.push_str(row.get(0));
            all.push('\n');
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_callers_number_is_nowhere_in_clear() {
    let mut rig = Rig::start().await;
    let spoil = "ALTER TABLE calls ADD CHECK (provider_call_id <> 'poison')";
    rig.database.admin.batch_execute(spoil).await.expect("the superuser may");
    let at = ago(60);
    rig.click("visit", ago(90)).await;
    let written = [
        CALLER,
        "(202) 555-0187",
        "tel:+1-202-555-0187",
        "01112025550187",
        "0012025550187",
        "2025550187",
        "+1 202 555 01 87",
    ];
    for (n, number) in written.into_iter().enumerate() {
        let id = n.to_string();
        let whole = PushedCall { caller_number: Some(number.to_owned()), ..call(&id, at) };
        rig.record(whole.clone()).await.expect("recorded");
        let poison = PushedCall { key: key("poison"), ..whole.clone() };
        let bad = PushedCall { started_at: None, ..whole.clone() };
        let odd = PushedCall { status: 99, ..whole.clone() };
        let nowhere = PushedCall { site: "nobody".to_owned(), ..whole.clone() };
        rig.record_all(vec![whole, poison.clone(), bad.clone(), odd, nowhere])
            .await
            .expect("the request is understood");
        for refused in [poison, bad] {
            let status = rig.record(refused).await.expect_err("refused");
            assert!(!format!("{status:?}").contains("0187"), "{status:?}");
        }
    }
    assert_eq!(rig.stored().await, 7);
    let callers = "SELECT count(DISTINCT caller_hmac) FROM calls";
    assert_eq!(rig.database.count(callers).await, 1, "all of them are the same number");
    rig.server.program.stop(Duration::from_secs(15)).await;
    let (stored, said) = (everything(&rig.database).await, rig.server.program.said());
    assert!(stored.contains(BUSINESS) && stored.contains("poison"), "the search finds what is there");
    assert!(said.contains("a pushed call died"), "{said}");
    for digits in ["2025550187", "555-0187", "555 01 87"] {
        for (place, text) in [("the database", &stored), ("the log", &said)] {
            let at = text.find(digits).map(|at| text[at.saturating_sub(200)..].chars().take(400).collect::<String>());
            assert_eq!(at, None, "{digits} in {place}");
        }
    }
}
