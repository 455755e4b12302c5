//! QStash's door over real sockets: stored once, buried once, and told apart by status.

use std::time::{Duration, Instant};

use chrono::Utc;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig, Pressure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::app::{Answer, App, event};
use crate::support::database::connect;
use crate::support::events::Spec;

#[tokio::test]
async fn a_delivery_is_stored_once_however_often_it_comes() {
    let app = App::start(0).await;
    let site = app.database.rows("SELECT id FROM sites").await[0]["id"].as_str().and_then(|id| id.parse().ok());
    let job = Job::new(Spec::new(1, "s", Utc::now()).event(site.expect("a site"))).to_json().expect("a job");
    for (key, status) in [("sig_current", "stored"), ("sig_next", "duplicate")] {
        let answer = app.deliver(&job, key).await;
        assert_eq!((answer.status, answer.body), (200, json!({"ok": true, "status": status})));
    }
    let batch = json!({"events": [event(7), event(8)]}).to_string();
    assert_eq!(app.deliver(&batch, "sig_current").await.body["status"], "stored");
    assert_eq!(app.deliver(&batch, "sig_current").await.body["status"], "duplicate");
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 3);
    let refused = app.deliver(&job, "sig_other").await;
    assert_eq!(refused.error(), (401, "bad_signature", ""));
    assert!(refused.header("upstash-nonretryable-error").is_none());
    let get = Answer::of(app.client.get(format!("http://{}/api/sync/worker", app.public))).await;
    assert_eq!((get.status, get.header("allow")), (405, Some("POST")));
    assert_eq!(app.database.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn what_the_edge_accepts_the_worker_can_read_however_deeply_it_is_nested() {
    let app = App::start(0).await;
    let deep = format!("{}1{}", "[".repeat(120), "]".repeat(120));
    let sent = format!(
        r#"{{"id":"{}","s":"shop","u":"https://shop.example/","sid":"deep","meta":{{"a":{deep}}}}}"#,
        Uuid::from_u128(1)
    );
    assert_eq!(app.post(sent).await.status, 200);
    let site = app.database.rows("SELECT id FROM sites").await[0]["id"].as_str().and_then(|id| id.parse().ok());
    let mut event = Spec::new(2, "deep", Utc::now()).event(site.expect("a site"));
    let kept = app.database.rows("SELECT metadata FROM events").await[0]["metadata"].clone();
    event.metadata = kept.as_object().cloned().unwrap_or_default();
    let job = Job::new(event).to_json().expect("a job");
    assert_eq!(app.deliver(&job, "sig_current").await.body["status"], "stored");
}

#[tokio::test]
async fn what_can_never_be_stored_is_buried_once_and_does_not_come_again() {
    let app = App::start(0).await;
    let stranger = Spec::new(1, "s", Utc::now()).event(SiteId::from_uuid(Uuid::from_u128(99)));
    let stranger = Job::new(stranger).to_json().expect("a job");
    let mut without_id = event(1);
    without_id["id"] = Value::Null;
    let half = json!({"events": [event(5), without_id]}).to_string();
    for (body, reason) in [
        ("hello\u{0}", "malformed_job"),
        (r#"{"v":1,"event":{}}"#, "malformed_job"),
        (r#"{"v":9,"event":{}}"#, "malformed_job"),
        (&half, "malformed_job"),
        (&stranger, "unknown_site"),
    ] {
        for _ in 0..2 {
            let answer = app.deliver(body, "sig_current").await;
            assert_eq!(answer.error(), (489, reason, ""), "{body}");
            assert_eq!(answer.header("upstash-nonretryable-error"), Some("true"));
        }
    }
    let letters = app.database.rows("SELECT * FROM dead_letters ORDER BY created_at").await;
    assert_eq!(letters.len(), 5, "one letter a delivery");
    assert!(letters.iter().all(|letter| letter["source"] == "worker" && letter["tries"] == 2), "{letters:?}");
    assert_eq!(letters[3]["detail"], "`events[1].id` is required: a delivery can be repeated");
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 1, "the good half is stored");
}

#[tokio::test]
async fn a_delivery_waits_for_room_that_browsers_have_not_but_not_for_ever() {
    // Two events of deliveries have room, whatever they weigh.
    let config = PipelineConfig {
        writers: 1,
        room_bytes: 64 << 10,
        patient_room_bytes: 2 << 10,
        patience: Duration::from_secs(30),
        ..PipelineConfig::default()
    };
    let mut pipeline = None;
    let app = App::start_with(0, |state| {
        state.pipeline = Pipeline::start(state.store.clone(), Nudge::default(), config);
        pipeline = Some(state.pipeline.clone());
    });
    let (app, pipeline) = (app.await, pipeline.expect("it was adapted"));
    let mut sites = Vec::new();
    for name in ["one", "two", "three"] {
        sites.push(app.database.site(name).await.id);
    }
    // Somebody holds the table, so the writer cannot go on.
    let blocker = connect(&app.database.url).await;
    blocker.batch_execute("BEGIN; LOCK TABLE events IN SHARE MODE").await.expect("held");
    let mut flood = JoinSet::new();
    for id in 1..=300 {
        let (pipeline, event) = (pipeline.clone(), Spec::new(id, "s", Utc::now()).event(sites[id as usize % 3]));
        flood.spawn(async move { pipeline.submit(vec![event]).await });
    }
    let began = Instant::now();
    while pipeline.pressure() != Pressure::Full {
        assert!(began.elapsed() < Duration::from_secs(5), "the flood fills the room");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let job = |id| Job::new(Spec::new(id, "s", Utc::now()).event(sites[0])).to_json().expect("a job");
    let jobs = [1001, 1002, 1003].map(job);
    let deliver = async |at: usize| (at, app.deliver(&jobs[at], "sig_current").await);
    let mut answers: FuturesUnordered<_> = (0..3).map(deliver).collect();
    let began = Instant::now();
    let (late, answer) = answers.next().await.expect("an answer");
    assert_eq!((answer.error(), answer.header("retry-after")), ((503, "busy", ""), Some("15")));
    assert!(began.elapsed() > Duration::from_secs(4), "it waited, for {:?}", began.elapsed());
    blocker.batch_execute("COMMIT").await.expect("released");
    while let Some((_, answer)) = answers.next().await {
        assert_eq!((answer.status, answer.body), (200, json!({"ok": true, "status": "stored"})));
    }
    assert_eq!(app.deliver(&jobs[late], "sig_current").await.body["status"], "stored", "it comes again");
    flood.join_all().await;
}
