//! The internal door of the running program, in front of a real database that also goes away.

use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use opsmantik::grpc::proto::{
    Attribution, ClickIds, Event, IngestRequest, IngestResult, Placement, RejectionReason, ScoreSignalsRequest, Signal,
};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::database::{Database, bearer, connect, database};
use crate::support::process::Server;

struct Door {
    database: Database,
    site: String,
    token: String,
    channel: Channel,
    server: Server,
}

impl Door {
    async fn open() -> Self {
        let database = database().await;
        let site = database.site("shop").await.id.to_string();
        let server = Server::start(&database.url).await;
        let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let channel = endpoint.connect().await.expect("the server listens");
        let token = database.token(&Scope::ALL, None).await;
        Self { database, site, token, channel, server }
    }

    async fn ingest(&self, events: Vec<Event>) -> Result<Vec<IngestResult>, tonic::Status> {
        let answer = IngestServiceClient::with_interceptor(self.channel.clone(), bearer(&self.token))
            .ingest(IngestRequest::of(events))
            .await?;
        Ok(answer.into_inner().results)
    }

    /// Waits until health says so, as it must within seconds.
    async fn health(&self, expected: ServingStatus) {
        let mut health = HealthClient::new(self.channel.clone());
        let began = Instant::now();
        for service in ["", "opsmantik.v1.IngestService", "opsmantik.v1.ScoringService"] {
            let ask = HealthCheckRequest { service: service.to_owned() };
            while health.check(ask.clone()).await.expect("a known name").into_inner().status() != expected {
                assert!(began.elapsed() < Duration::from_secs(6), "`{service}` is not {expected:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn id(n: u128) -> String {
    Uuid::from_u128(n).to_string()
}

fn event(n: u128) -> Event {
    Event {
        id: Some(id(n)),
        site: "shop".to_owned(),
        url: "https://shop.example/".to_owned(),
        session_id: id(0xAB),
        category: "interaction".to_owned(),
        action: "view".to_owned(),
        ..Event::default()
    }
}

/// The points of a score, signal by signal.
fn points(score: Option<&opsmantik::grpc::proto::Score>) -> (u32, Vec<(Signal, u32)>) {
    let score = score.expect("always set");
    (score.value, score.breakdown.iter().map(|line| (line.signal(), line.points)).collect())
}

fn placed<'a>(outcome: Option<&'a Outcome>, expected: &str) -> &'a Placement {
    match (outcome, expected) {
        (Some(Outcome::Stored(placement)), "stored") | (Some(Outcome::Duplicate(placement)), "duplicate") => placement,
        (other, _) => panic!("not {expected}: {other:?}"),
    }
}

#[tokio::test]
async fn events_get_their_verdicts_in_order_and_a_receipt_of_what_is_stored() {
    let mut door = Door::open().await;
    let paid = ClickIds { gclid: Some("from-the-app".to_owned()), ..ClickIds::default() };
    let call = Event { category: "conversion".to_owned(), action: "phone_call".to_owned(), ..event(2) };
    let events = vec![
        event(1),
        Event { url: String::new(), ..event(3) },
        Event { click_ids: Some(paid), site: door.site.clone(), ..call },
        Event { site: "nobody".to_owned(), ..event(4) },
        event(1),
    ];
    let results = door.ingest(events).await.expect("the call is understood");
    let ids: Vec<&str> = results.iter().map(|result| result.event_id.as_str()).collect();
    assert_eq!(ids, [id(1), id(3), id(2), id(4), id(1)]);

    let month = chrono::Utc::now().format("%Y-%m-01").to_string();
    let first = placed(results[0].outcome.as_ref(), "stored");
    let second = placed(results[2].outcome.as_ref(), "stored");
    placed(results[4].outcome.as_ref(), "duplicate");
    for placement in [first, second] {
        let session = placement.session.as_ref().expect("always set");
        assert_eq!((&session.site_id, &session.session_month, &session.session_id), (&door.site, &month, &id(0xAB)));
        assert_eq!(placement.attribution(), Attribution::DirectToAds, "as of this answer");
        let breakdown = vec![(Signal::PrimaryConversion, 50), (Signal::Interaction, 10)];
        assert_eq!(points(placement.session_score.as_ref()), (60, breakdown));
    }
    assert_eq!(points(first.event_score.as_ref()), (10, vec![(Signal::Interaction, 10)]));
    assert_eq!(points(second.event_score.as_ref()), (50, vec![(Signal::PrimaryConversion, 50)]));
    for (at, reason, field) in [(1, RejectionReason::Missing, "url"), (3, RejectionReason::UnknownSite, "site")] {
        match &results[at].outcome {
            Some(Outcome::Rejected(rejection)) => {
                assert_eq!((rejection.reason(), rejection.field.as_str()), (reason, field));
                assert!(!rejection.message.is_empty());
            }
            other => panic!("not rejected: {other:?}"),
        }
    }

    let again = door.ingest(vec![event(2)]).await.expect("the call is understood");
    assert_eq!(placed(again[0].outcome.as_ref(), "duplicate").attribution(), Attribution::DirectToAds);
    let rows = door.database.rows("SELECT event_count, lead_score, gclid, attribution FROM sessions").await;
    let expected = serde_json::json!({"event_count": 2, "lead_score": 60, "gclid": "from-the-app", "attribution": "Direct-to-Ads"});
    assert_eq!(rows, [expected]);
    assert_eq!(door.database.count("SELECT count(*) FROM events").await, 2);
    door.server.program.stop(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_database_that_dies_is_unavailable_with_a_delay_and_health_goes_and_comes_with_it() {
    let door = Door::open().await;
    door.health(ServingStatus::Serving).await;
    placed(door.ingest(vec![event(1)]).await.expect("stored")[0].outcome.as_ref(), "stored");

    let name = &door.database.name;
    let postgres = connect(&crate::support::cluster::cluster().await.url("postgres")).await;
    let die = format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false");
    let cut = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND application_name = 'opsmantik'"
    );
    postgres.batch_execute(&die).await.expect("the superuser may");
    postgres.batch_execute(&cut).await.expect("the superuser may");
    let began = Instant::now();
    let status = door.ingest(vec![event(1), event(2)]).await.expect_err("there is no database");
    assert!(began.elapsed() < Duration::from_secs(3), "told after {:?}", began.elapsed());
    assert_eq!(status.code(), Code::Unavailable);
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(delay.is_some_and(|delay| delay >= Duration::from_secs(1)), "{delay:?}");
    assert!(!status.message().contains(name.as_str()), "inner errors stay inside: {}", status.message());
    door.health(ServingStatus::NotServing).await;

    let live = format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true");
    postgres.batch_execute(&live).await.expect("the superuser may");
    door.health(ServingStatus::Serving).await;
    let results = door.ingest(vec![event(1), event(2)]).await.expect("the same again");
    placed(results[0].outcome.as_ref(), "duplicate");
    placed(results[1].outcome.as_ref(), "stored");
    assert_eq!(door.database.count("SELECT event_count FROM sessions").await, 2);
}

#[tokio::test]
async fn signals_come_back_as_a_score_with_every_line_of_it() {
    let door = Door::open().await;
    let request = ScoreSignalsRequest {
        signals: vec![Signal::PrimaryConversion.into(), Signal::Scroll90.into(), Signal::Scroll90.into()],
        attribution: Attribution::AdsAssisted.into(),
        ..ScoreSignalsRequest::default()
    };
    let answer = ScoringServiceClient::with_interceptor(door.channel.clone(), bearer(&door.token))
        .score_signals(request)
        .await
        .expect("a good request");
    let score = answer.into_inner().score;
    let mut lines = points(score.as_ref()).1;
    lines.sort_by_key(|(signal, _)| i32::from(*signal));
    let expected = [
        (Signal::PrimaryConversion, 50),
        (Signal::Scroll50, 10),
        (Signal::Scroll90, 20),
        (Signal::ReturningAdsAssisted, 25),
    ];
    assert_eq!(
        (score.as_ref().map(|score| (score.value, score.capped)), lines),
        (Some((100, true)), expected.to_vec())
    );
}
