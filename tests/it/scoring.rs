//! What a session is worth and why, and the best sessions of a month: read over the internal door, as a tenant.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use opsmantik::domain::access::Scope;
use opsmantik::domain::client::TruncatedIp;
use opsmantik::domain::event::{Arrival, Draft, Event};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::outcome::Outcome;
use opsmantik::grpc::proto::calls_service_client::CallsServiceClient;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::signal_evidence::Cause;
use opsmantik::grpc::proto::{
    Attribution, AttributionEvidence, ClickId, ClickIdKind, ClickIdOrigin, GetSessionScoreRequest,
    GetSessionScoreResponse, ListCallsRequest, ListTopSessionsRequest, ListTopSessionsResponse, SessionKey, Signal,
};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use serde_json::json;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::database::{Database, bearer, connect, database};
use crate::support::events::{NAMES, at};
use crate::support::process::Server;

const MONTH: &str = "2026-06-01";

/// A server with two sites, `shop` and `neighbour`, and a token for the one.
struct Rig {
    database: Database,
    site: SiteId,
    neighbour: SiteId,
    token: String,
    channel: Channel,
    pipeline: Pipeline,
    _server: Server,
}

impl Rig {
    async fn start() -> Self {
        let database = database().await;
        let site = database.site("shop").await.id;
        let neighbour = database.site("neighbour").await.id;
        for month in ["2026-01-01", "2026-02-01", "2026-03-01", "2026-04-01", "2026-05-01", MONTH, "2026-07-01"] {
            database.ensure_month(month).await;
        }
        let token = database.token(&[Scope::ScoringRead], Some(site)).await;
        let server = Server::start(&database.url).await;
        let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let channel = endpoint.connect().await.expect("the server listens");
        let pipeline = Pipeline::start(database.store.clone(), Nudge::default(), PipelineConfig::default());
        Self { database, site, neighbour, token, channel, pipeline, _server: server }
    }

    async fn store(&self, events: Vec<Event>) {
        let outcomes = self.pipeline.submit(events).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Stored(_))), "{outcomes:?}");
    }

    async fn score_of(&self, key: SessionKey) -> Result<GetSessionScoreResponse, Status> {
        let mut client = ScoringServiceClient::with_interceptor(self.channel.clone(), bearer(&self.token));
        client.get_session_score(GetSessionScoreRequest { session: Some(key) }).await.map(tonic::Response::into_inner)
    }

    /// The evidence of an assisted (or direct) session.
    async fn click_behind(&self, session: &str) -> (Attribution, AttributionEvidence) {
        let answer = self.score_of(key("shop", MONTH, session)).await.expect("it is stored");
        let evidence = answer.attribution_evidence.clone().expect("an ad is behind it");
        let behind_the_signal = answer.evidence.iter().find_map(|line| match &line.cause {
            Some(Cause::Attribution(evidence)) => Some(evidence.clone()),
            _ => None,
        });
        let assisted = answer.attribution() == Attribution::AdsAssisted;
        assert_eq!(behind_the_signal, assisted.then(|| evidence.clone()), "{answer:?}");
        (answer.attribution(), evidence)
    }

    async fn top(&self, request: ListTopSessionsRequest) -> Result<ListTopSessionsResponse, Status> {
        let mut client = ScoringServiceClient::with_interceptor(self.channel.clone(), bearer(&self.token));
        client.list_top_sessions(request).await.map(tonic::Response::into_inner)
    }

    /// A row as a hand writes it: without provenance.
    async fn write_session(&self, site: SiteId, id: u128, lead_score: i16, more: serde_json::Value) {
        let mut row = json!({
            "site_id": site, "created_month": MONTH, "id": Uuid::from_u128(id), "created_at": "2026-06-10T12:00:00Z",
            "last_seen_at": "2026-06-10T12:00:00Z", "event_count": 1, "entry_page": "/", "click_ids": {}, "provenance": [],
            "attribution": "Organic/Referral", "traffic_source": "Direct", "traffic_medium": "direct", "signals": 0,
            "lead_score": lead_score,
        });
        row.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        let columns: Vec<String> = row.as_object().expect("an object").keys().cloned().collect();
        let columns = columns.join(", ");
        let insert = format!(
            "INSERT INTO sessions ({columns}) SELECT {columns} FROM jsonb_populate_record(NULL::sessions, $1::jsonb)"
        );
        self.database.admin.execute(&insert, &[&row]).await.expect("a good row");
    }
}

fn id(n: u128) -> String {
    Uuid::from_u128(n).to_string()
}

fn key(site: &str, month: &str, session: &str) -> SessionKey {
    SessionKey { site_id: site.to_owned(), session_month: month.to_owned(), session_id: session.to_owned() }
}

fn time(at: DateTime<Utc>) -> Option<prost_types::Timestamp> {
    let nanos = i32::try_from(at.timestamp_subsec_nanos()).expect("below a second");
    Some(prost_types::Timestamp { seconds: at.timestamp(), nanos })
}

/// An event of a session with the fingerprint `f`.
fn event(site: SiteId, n: u128, session: &str, when: DateTime<Utc>, fill: impl FnOnce(&mut Draft)) -> Event {
    let mut draft = Draft {
        id: Some(id(n)),
        url: Some("https://shop.example/".to_owned()),
        session: Some(session.to_owned()),
        category: Some("system".to_owned()),
        action: Some("view".to_owned()),
        ..Draft::default()
    };
    draft.meta.insert("fp".to_owned(), json!("f"));
    fill(&mut draft);
    let mut arrival = Arrival::at(when);
    arrival.ip = Some(TruncatedIp::of([203, 0, 113, 7].into()));
    Event::accept(site, draft, &arrival, NAMES).expect("a whole draft")
}

/// As an insertion of the matcher would leave it.
async fn match_call(rig: &Rig, n: u128, session: &str, started_at: DateTime<Utc>) {
    let insert = "INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, started_at, \
         match_method, match_confidence, match_evidence, matched_session_id, matched_session_month, lead_score_at_match, \
         score_breakdown_at_match) \
         VALUES ($1, $2, 'test', $1::uuid::text, 'PHONE', 'INBOUND', '+12025550123', $3, 'CLICK', 1, '{}', $4, '2026-06-01', \
         0, '[]')";
    let session: Uuid = opsmantik::domain::id::SessionId::from_text(rig.site, session).as_uuid();
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&Uuid::from_u128(n), &rig.site.as_uuid(), &started_at, &session];
    rig.database.admin.execute(insert, &params).await.expect("a matched call");
}

#[tokio::test]
async fn each_signal_is_shown_with_the_first_event_that_raised_it_and_a_call_beside_it() {
    let rig = Rig::start().await;
    let began = at("2026-06-10T12:00:00.25Z");
    let after = |seconds| began + TimeDelta::seconds(seconds);
    let events = vec![
        event(rig.site, 5, "v", after(50), |draft| {
            draft.category = Some("conversion".to_owned());
            draft.meta.extend([("exit_page".to_owned(), json!("/bye")), ("duration_sec".to_owned(), json!(61))]);
        }),
        event(rig.site, 4, "v", after(40), |draft| {
            draft.category = Some("interaction".to_owned());
            draft.meta.extend([("scroll_pct".to_owned(), json!(95)), ("cta_hovers".to_owned(), json!(2))]);
        }),
        // Of one time with the next: the smaller id is the first.
        event(rig.site, 3, "v", after(20), |draft| drop(draft.meta.insert("scroll_pct".to_owned(), json!(55)))),
        event(rig.site, 2, "v", after(20), |draft| drop(draft.meta.insert("scroll_pct".to_owned(), json!(50)))),
        event(rig.site, 1, "v", began, |draft| {
            let url = "https://shop.example/?gclid=G&msclkid=M&utm_source=s&utm_medium=cpc&utm_campaign=c&utm_term=t\
                &utm_content=x&matchtype=e&device=m&network=g&placement=p";
            draft.url = Some(url.to_owned());
            draft.referrer = Some("https://www.google.com/".to_owned());
            let meta = [("lan", "tr-TR"), ("city", "Izmir"), ("district", "Konak"), ("country", "TR")];
            draft.meta.extend(meta.map(|(key, value)| (key.to_owned(), json!(value))));
        }),
    ];
    rig.store(events).await;
    let (late, early) = (after(700), after(600));
    match_call(&rig, 71, "v", late).await;
    match_call(&rig, 72, "v", early).await;

    let answer = rig.score_of(key("shop", MONTH, "v")).await.expect("it is stored");
    let stored = key(&rig.site.to_string(), MONTH, answer.session.as_ref().map_or("", |key| key.session_id.as_str()));
    assert_eq!(answer.session.as_ref(), Some(&stored));
    let told: Vec<_> = answer
        .evidence
        .iter()
        .map(|line| match line.cause.as_ref().expect("a cause") {
            Cause::Event(event) => (line.signal(), line.points, event.event_id.clone(), event.occurred_at),
            Cause::Call(call) => (line.signal(), line.points, Some(call.call_id.clone()), call.started_at),
            Cause::Attribution(_) => panic!("no signal of this session is from its attribution"),
        })
        .collect();
    assert_eq!(
        told,
        [
            (Signal::PrimaryConversion, 50, Some(id(5)), time(after(50))),
            (Signal::PrimaryConversion, 50, Some(id(72)), time(early)),
            (Signal::Interaction, 10, Some(id(4)), time(after(40))),
            (Signal::Scroll50, 10, Some(id(2)), time(after(20))),
            (Signal::Scroll90, 20, Some(id(4)), time(after(40))),
            (Signal::HoverIntent, 15, Some(id(4)), time(after(40))),
            (Signal::GoogleReferrer, 5, Some(id(1)), time(began)),
        ]
    );
    let score = answer.score.as_ref().expect("always set");
    assert_eq!((score.value, score.capped, score.breakdown.len()), (100, true, 6));
    let evidence = answer.attribution_evidence.as_ref().expect("a click is behind it");
    let expected = AttributionEvidence {
        click_id: Some(ClickId { kind: ClickIdKind::Gclid.into(), value: "G".to_owned() }),
        origin: ClickIdOrigin::ThisSession.into(),
        session: Some(stored.clone()),
        seen_at: time(began),
        age: Some(prost_types::Duration::default()),
        event_id: Some(id(1)),
    };
    assert_eq!((answer.attribution(), evidence), (Attribution::DirectToAds, &expected));
    let source = answer.traffic_source.as_ref().expect("always set");
    assert_eq!((source.source.as_str(), source.medium.as_str()), ("Google Ads", "cpc"));

    // The same session in the list is its row, whole.
    let list = ListTopSessionsRequest { site: "shop".into(), session_month: MONTH.into(), ..Default::default() };
    let page = rig.top(list).await.expect("a page");
    let [session] = page.sessions.as_slice() else { panic!("one session: {page:?}") };
    assert_eq!((session.key.as_ref(), &session.score), (Some(&stored), &answer.score));
    assert_eq!((session.created_at, session.last_event_at, session.event_count), (time(began), time(after(50)), 5));
    assert_eq!((session.fingerprint(), session.exit_page(), session.language()), ("f", "/bye", "tr-TR"));
    assert!(session.entry_page.starts_with("https://shop.example/?gclid=G"), "{}", session.entry_page);
    assert_eq!((session.referrer(), session.ip_truncated()), ("https://www.google.com/", "203.0.113.0"));
    let clicks = session.click_ids.as_ref().expect("always set");
    assert_eq!((clicks.gclid(), clicks.wbraid.as_ref(), clicks.gbraid.as_ref()), ("G", None, None));
    assert_eq!(clicks.others, HashMap::from([("msclkid".to_owned(), "M".to_owned())]));
    let utm = session.utm.as_ref().expect("always set");
    assert_eq!([utm.source(), utm.medium(), utm.campaign(), utm.term(), utm.content()], ["s", "cpc", "c", "t", "x"]);
    let ads = session.value_track.as_ref().expect("always set");
    assert_eq!([ads.matchtype(), ads.device(), ads.network(), ads.placement()], ["e", "m", "g", "p"]);
    let geo = session.geo.as_ref().expect("always set");
    assert_eq!([geo.city(), geo.district(), geo.country(), geo.timezone()], ["Izmir", "Konak", "TR", ""]);
    let gauges = session.gauges.as_ref().expect("always set");
    assert_eq!((gauges.duration_sec, gauges.scroll_pct, gauges.cta_hovers), (Some(61), Some(95), Some(2)));
    assert_eq!((gauges.focus_dur, gauges.exit_page.as_ref()), (None, None));
    assert_eq!((session.attribution(), &session.traffic_source), (Attribution::DirectToAds, &answer.traffic_source));
}

#[tokio::test]
async fn an_assisted_session_names_the_latest_paid_visit_before_it_also_one_that_arrives_late() {
    let rig = Rig::start().await;
    let began = at("2026-06-10T12:00:00Z");
    let ago = |days| began - TimeDelta::days(days);
    let paid = |n, session: &str, when, query: &str| {
        let query = query.to_owned();
        event(rig.site, n, session, when, move |draft| draft.url = Some(format!("https://shop.example/?{query}")))
    };
    let mut neighbours = paid(9, "theirs", ago(1), "gclid=theirs");
    neighbours.site_id = rig.neighbour;
    rig.store(vec![
        event(rig.site, 1, "v", began, |_| {}),
        paid(2, "too-old", ago(91), "gclid=too-old"),
        paid(3, "old", ago(60), "wbraid=old"),
        paid(4, "later", began + TimeDelta::hours(1), "gclid=later"),
        neighbours,
    ])
    .await;
    let behind = |n: u128, kind: ClickIdKind, value: &str, days: i64| {
        let seen_at = ago(days);
        AttributionEvidence {
            click_id: Some(ClickId { kind: kind.into(), value: value.to_owned() }),
            origin: ClickIdOrigin::EarlierSession.into(),
            session: Some(SessionKey {
                site_id: rig.site.to_string(),
                session_month: seen_at.format("%Y-%m-01").to_string(),
                session_id: opsmantik::domain::id::SessionId::from_text(rig.site, value).to_string(),
            }),
            seen_at: time(seen_at),
            age: Some(prost_types::Duration { seconds: days * 86_400, nanos: 0 }),
            event_id: Some(id(n)),
        }
    };
    let assisted = |evidence| (Attribution::AdsAssisted, evidence);
    assert_eq!(rig.click_behind("v").await, assisted(behind(3, ClickIdKind::Wbraid, "old", 60)));

    rig.store(vec![paid(5, "recent", ago(10), "gbraid=recent")]).await;
    assert_eq!(rig.click_behind("v").await, assisted(behind(5, ClickIdKind::Gbraid, "recent", 10)));
    rig.store(vec![paid(6, "older", ago(20), "gclid=older")]).await;
    assert_eq!(rig.click_behind("v").await, assisted(behind(5, ClickIdKind::Gbraid, "recent", 10)), "not the latest");

    // A click of its own is stronger, and counts from the moment in which it was seen.
    rig.store(vec![paid(7, "v", began + TimeDelta::minutes(5), "gclid=own")]).await;
    let (attribution, evidence) = rig.click_behind("v").await;
    assert_eq!((attribution, evidence.origin()), (Attribution::DirectToAds, ClickIdOrigin::ThisSession));
    assert_eq!((evidence.seen_at, evidence.age), (time(began + TimeDelta::minutes(5)), Some(Default::default())));
}

#[tokio::test]
async fn a_row_that_a_hand_has_written_has_evidence_for_every_signal_too() {
    let rig = Rig::start().await;
    let began = time(at("2026-06-10T12:00:00Z"));
    rig.write_session(rig.site, 1, 100, json!({"signals": 127, "attribution": "Ads-Assisted", "fingerprint": "f"}))
        .await;
    let answer = rig.score_of(key("shop", MONTH, &id(1))).await.expect("it is stored");
    let signals: Vec<_> = answer.evidence.iter().map(|line| i32::from(line.signal())).collect();
    assert_eq!(signals, [1, 2, 3, 4, 5, 6, 7]);
    let unknown =
        AttributionEvidence { origin: ClickIdOrigin::EarlierSession.into(), ..AttributionEvidence::default() };
    for line in &answer.evidence {
        match line.cause.as_ref().expect("a cause") {
            Cause::Event(event) => assert_eq!((&event.event_id, event.occurred_at), (&None, began), "{line:?}"),
            Cause::Attribution(evidence) => {
                assert_eq!((line.signal(), evidence), (Signal::ReturningAdsAssisted, &unknown))
            }
            Cause::Call(_) => panic!("no call was matched: {line:?}"),
        }
    }
    match_call(&rig, 71, &id(1), at("2026-06-10T12:30:00Z")).await;
    let answer = rig.score_of(key("shop", MONTH, &id(1))).await.expect("it is stored");
    let causes: Vec<_> = answer.evidence.iter().filter(|line| line.signal() == Signal::PrimaryConversion).collect();
    assert!(matches!(causes.as_slice(), [line] if matches!(line.cause, Some(Cause::Call(_)))), "{causes:?}");

    rig.write_session(rig.site, 2, 0, json!({"attribution": "Direct-to-Ads", "gclid": "G"})).await;
    let evidence = rig.click_behind(&id(2)).await.1;
    let click = evidence.click_id.as_ref().map(|click| (click.kind(), click.value.as_str()));
    assert_eq!((click, evidence.seen_at, evidence.event_id), (Some((ClickIdKind::Gclid, "G")), began, None));
}

#[tokio::test]
async fn a_session_is_found_by_its_whole_key_and_by_nobody_else() {
    let rig = Rig::start().await;
    rig.store(vec![event(rig.site, 1, "v", at("2026-06-10T12:00:00Z"), |_| {})]).await;
    rig.write_session(rig.neighbour, 5, 50, json!({})).await;
    let site = rig.site.to_string();
    for named in [site.as_str(), &site.replace('-', ""), "shop"] {
        rig.score_of(key(named, MONTH, " v ")).await.expect("the same session");
    }
    let code = async |site: &str, month: &str, session: &str| {
        rig.score_of(key(site, month, session)).await.expect_err("nothing to see").code()
    };
    assert_eq!(code("shop", "2026-05-01", "v").await, Code::NotFound, "another month");
    assert_eq!(code("shop", "1999-01-01", "v").await, Code::NotFound, "a month without a partition");
    assert_eq!(code("shop", MONTH, &id(5)).await, Code::NotFound, "a session of another site");
    for other in ["neighbour", &rig.neighbour.to_string(), "nobody"] {
        assert_eq!(code(other, MONTH, &id(5)).await, Code::PermissionDenied, "{other}");
    }
    let status = rig.score_of(SessionKey::default()).await.expect_err("no key");
    let violations = status.get_details_bad_request().expect("violations").field_violations;
    let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!((status.code(), fields.len(), fields[0]), (Code::InvalidArgument, 3, "session.site_id"));
}

#[tokio::test]
async fn pages_hold_still_while_sessions_are_added() {
    let rig = Rig::start().await;
    let mut expected = Vec::new();
    for n in 1..=23u128 {
        // Many ties, across the ends of pages.
        let score = [100, 60, 60, 60, 35, 0][usize::try_from(n % 6).expect("below six")];
        rig.write_session(rig.site, n * 100, score, json!({})).await;
        expected.push((std::cmp::Reverse(score), id(n * 100)));
    }
    rig.write_session(rig.neighbour, 7, 100, json!({})).await;
    rig.write_session(rig.site, 7, 100, json!({"created_month": "2026-07-01", "created_at": "2026-07-02T00:00:00Z"}))
        .await;
    expected.sort();
    let list = |token: &str| ListTopSessionsRequest {
        site: "shop".to_owned(),
        session_month: MONTH.to_owned(),
        page_size: 5,
        page_token: token.to_owned(),
        ..ListTopSessionsRequest::default()
    };
    let ids = |page: &ListTopSessionsResponse| -> Vec<String> {
        page.sessions.iter().filter_map(|session| Some(session.key.as_ref()?.session_id.clone())).collect()
    };

    let mut page = rig.top(list("")).await.expect("the first page");
    let first_token = page.next_page_token.clone();
    let mut seen = ids(&page);
    assert_eq!(seen.len(), 5);
    for n in 1.. {
        // Above the place, at it with a smaller id, and at the very end of the tie: what is before it is not seen any more.
        for (id, score) in [(n * 100_000, 100), (n, 60)] {
            rig.write_session(rig.site, id, score, json!({})).await;
        }
        if page.next_page_token.is_empty() {
            break;
        }
        let mut next = list(&page.next_page_token);
        next.site = rig.site.to_string();
        page = rig.top(next).await.expect("the next page");
        assert!((1..=5).contains(&page.sessions.len()));
        seen.extend(ids(&page));
    }
    let (added, kept): (Vec<String>, Vec<String>) =
        seen.into_iter().partition(|id| !expected.iter().any(|(_, known)| known == id));
    assert_eq!(kept, expected.iter().map(|(_, id)| id.clone()).collect::<Vec<_>>(), "each once, in order");
    assert_eq!(added, Vec::<String>::new(), "all that came is before the places that were reached");

    let mut good = list("");
    (good.min_score, good.page_size) = (60, 0);
    let page = rig.top(good.clone()).await.expect("one page");
    let scores = rig
        .database
        .count(
            "SELECT count(*) FROM sessions s JOIN sites ON sites.id = s.site_id \
         WHERE public_id = 'shop' AND created_month = '2026-06-01' AND s.lead_score >= 60",
        )
        .await;
    assert_eq!((i64::try_from(page.sessions.len()).ok(), page.next_page_token.as_str()), (Some(scores), ""));

    let token_refused = async |request: ListTopSessionsRequest| {
        let status = rig.top(request).await.expect_err("another listing's token");
        let violations = status.get_details_bad_request().expect("violations").field_violations;
        let fields: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!((status.code(), fields), (Code::InvalidArgument, vec!["page_token"]));
    };
    token_refused(ListTopSessionsRequest { min_score: 1, ..list(&first_token) }).await;
    token_refused(ListTopSessionsRequest { session_month: "2026-07-01".to_owned(), ..list(&first_token) }).await;
    token_refused(list(&first_token[1..])).await;
    token_refused(list(&first_token.to_lowercase())).await;
    token_refused(list(&"A".repeat(100_000))).await;
    rig.top(ListTopSessionsRequest { page_size: 2, ..list(&first_token) }).await.expect("pages may change their size");

    let empty = rig.top(ListTopSessionsRequest { session_month: "1999-01-01".to_owned(), ..list("") }).await;
    assert_eq!(empty.expect("a month without sessions"), ListTopSessionsResponse::default());
    let denied = rig.top(ListTopSessionsRequest { site: "neighbour".to_owned(), ..list("") }).await;
    assert_eq!(denied.expect_err("not theirs").code(), Code::PermissionDenied);
}

/// Their statements wait here; else each would walk through a month.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_listings_of_one_site_leaves_others_their_connections() {
    let rig = Rig::start().await;
    let holder = connect(&rig.database.url).await;
    holder.batch_execute("BEGIN; LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    let list = ListTopSessionsRequest {
        site: "shop".to_owned(),
        session_month: MONTH.to_owned(),
        ..ListTopSessionsRequest::default()
    };
    let flood: Vec<_> = (0..40)
        .map(|_| {
            let mut client = ScoringServiceClient::with_interceptor(rig.channel.clone(), bearer(&rig.token));
            let list = list.clone();
            tokio::spawn(async move { client.list_top_sessions(list).await.map(drop) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let token = rig.database.token(&[Scope::CallsRead], Some(rig.neighbour)).await;
    let mut calls = CallsServiceClient::with_interceptor(rig.channel.clone(), bearer(&token));
    let began = Instant::now();
    let asked = ListCallsRequest { site: "neighbour".to_owned(), ..ListCallsRequest::default() };
    let answer = calls.list_calls(asked).await;
    assert!(answer.is_ok() && began.elapsed() < Duration::from_secs(2), "{answer:?} after {:?}", began.elapsed());
    for listing in flood {
        let status = listing.await.expect("no panic").expect_err("the table is locked");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    holder.batch_execute("ROLLBACK").await.expect("let go");
    rig.top(list).await.expect("nobody is in the way");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_ends_where_a_message_does_and_the_next_goes_on() {
    let rig = Rig::start().await;
    let long = "x".repeat(4096);
    for n in 1..=500 {
        let more = json!({"entry_page": long, "exit_page": long, "referrer": long});
        rig.write_session(rig.site, n, 50, more).await;
    }
    let mut request = ListTopSessionsRequest {
        site: "shop".to_owned(),
        session_month: MONTH.to_owned(),
        page_size: 500,
        ..ListTopSessionsRequest::default()
    };
    let mut seen = 0;
    loop {
        let page = rig.top(request.clone()).await.expect("it fits");
        seen += page.sessions.len();
        if page.next_page_token.is_empty() {
            break;
        }
        assert!(!page.sessions.is_empty());
        request.page_token = page.next_page_token;
    }
    assert_eq!(seen, 500);
}
