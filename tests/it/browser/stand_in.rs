//! The tracker before a stand-in for the API, which answers as it is told and remembers what it was sent.
//!
//! The real API gives none of these answers, or not so quickly; a proxy in between or another version does. Whatever is
//! said, the page does not hammer the server, and what the visitor did is kept until it is stored.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use opsmantik::domain::page::Page;
use opsmantik::http::serve::{Limits, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::browser::{Chromium, Profile, Tools, eventually};

const PAGE: &str = "<!doctype html><link rel=icon href=data:,><script src=/tracker.js data-site=demo></script>";

#[derive(Clone, Copy)]
enum Answer {
    /// Each event is stored.
    Stored,
    Says(StatusCode, &'static str),
}

struct StandIn {
    page: String,
    heard: Arc<Mutex<Heard>>,
    _stop: DropGuard,
}

struct Heard {
    answer: Answer,
    /// The events of each request since the last answer was set.
    requests: Vec<Vec<Value>>,
}

impl StandIn {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let page = format!("http://{}/", listener.local_addr().expect("a bound socket"));
        let heard = Arc::new(Mutex::new(Heard { answer: Answer::Stored, requests: Vec::new() }));
        let script = ([(header::CONTENT_TYPE, "text/javascript")], include_str!("../../../src/http/tracker.js"));
        let router = Router::new()
            .route("/", get(Html(PAGE)))
            .route("/tracker.js", get(script))
            .route("/api/sync", post(sync))
            .with_state(heard.clone());
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, router, Limits::default(), stop.clone()));
        Self { page, heard, _stop: stop.drop_guard() }
    }

    fn set(&self, answer: Answer) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Heard { answer, requests: Vec::new() };
    }

    fn requests(&self) -> Vec<Vec<Value>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).requests.clone()
    }
}

async fn sync(State(heard): State<Arc<Mutex<Heard>>>, body: String) -> Response {
    let body: Value = serde_json::from_str(&body).expect("the tracker sends JSON");
    let events = body["events"].as_array().expect("a list of events").clone();
    let results: Vec<_> = events.iter().map(|event| json!({"id": event["id"], "status": "stored"})).collect();
    let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    heard.requests.push(events);
    match heard.answer {
        Answer::Stored => axum::Json(json!({"results": results})).into_response(),
        Answer::Says(status, text) => (status, text).into_response(),
    }
}

#[tokio::test]
async fn an_answer_without_a_verdict_for_each_event_is_a_failure_to_be_tried_later() {
    let Some(tools) = Tools::find().await else { return };
    let (api, profile) = (StandIn::start().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    let short = r#"{"results":[{"status":"stored"}]}"#;
    let steps = |events: &[Value]| events.iter().filter(|event| event["ea"] == "step").count();
    // Not the end of the visit before, which may still be on its way.
    let attempts = || api.requests().iter().filter(|events| steps(events) > 0).count();
    for odd in [r#"{"ok":true}"#, r#"{"results":[]}"#, r#"{"results":[null]}"#, "null", short] {
        browser.open(&api.page).await;
        sent_all(&browser).await;
        api.set(Answer::Says(StatusCode::OK, odd));
        let began = Instant::now();
        browser.run("for (let i = 0; i < 30; i++) opsmantik.track('interaction', 'step', 's' + i)").await;
        eventually("an attempt", async || (attempts() > 0).then_some(())).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        // The pause after the n-th failure is up to 2^n seconds, so that a few attempts are many for this time.
        let (heard, elapsed) = (attempts(), began.elapsed());
        assert!(heard as u64 <= 6 + elapsed.as_secs(), "{heard} requests in {elapsed:?}: {odd}");
        // An attempt that has been heard may not have been answered yet.
        let kept = eventually("only what has its verdict goes", async || {
            let (before, kept) = (attempts(), browser.outbox().await.len());
            let done = if odd == short { before } else { 0 };
            (kept + done == 30 && attempts() == before).then_some(kept)
        })
        .await;

        api.set(Answer::Stored);
        sent_all(&browser).await;
        // Whatever was on its way when the answers became good comes once more.
        let sent = steps(&api.requests().concat());
        assert!(sent <= kept && sent + 1 >= kept, "{sent} of {kept} come again: {odd}");
    }
    drop(browser);
}

#[tokio::test]
async fn calls_that_are_refused_with_their_site_wait_until_it_is_let_in() {
    let Some(tools) = Tools::find().await else { return };
    let (api, profile) = (StandIn::start().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&api.page).await;
    sent_all(&browser).await;
    let labels: Vec<String> = (0..60).map(|n| format!("tel:{n:02}")).collect();
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND] {
        api.set(Answer::Says(status, "{}"));
        browser
            .run(&format!("{}.forEach((el) => opsmantik.track('conversion', 'phone_call', el))", json!(labels)))
            .await;
        sent_all(&browser).await;
        let held = "return Object.keys(localStorage).filter((k) => k.startsWith('om:demo:w:')).length";
        assert_eq!(browser.run(held).await, labels.len(), "all of them are kept: {status}");

        api.set(Answer::Stored);
        browser.run("opsmantik.track('interaction', 'step')").await;
        eventually("nothing held", async || (browser.run(held).await == 0).then_some(())).await;
        sent_all(&browser).await;
        let mut stored: Vec<Value> = api.requests().concat();
        stored.retain(|event| event["ea"] == "phone_call");
        let mut stored: Vec<&str> = stored.iter().filter_map(|event| event["el"].as_str()).collect();
        stored.sort_unstable();
        assert_eq!(stored, labels, "{status}");
    }

    // What is refused for itself is of no use to anybody: the last of it is kept to be looked at.
    api.set(Answer::Says(StatusCode::UNPROCESSABLE_ENTITY, "{}"));
    browser.run("for (let i = 0; i < 25; i++) opsmantik.track('interaction', 'step', 's' + i)").await;
    sent_all(&browser).await;
    let bad = "return Object.keys(localStorage).filter((k) => k.startsWith('om:demo:x:')).length";
    assert_eq!(browser.run(bad).await, 20);
    drop(browser);
}

#[tokio::test]
async fn click_ids_are_kept_as_the_server_reads_them_from_the_address() {
    let Some(tools) = Tools::find().await else { return };
    let (api, profile) = (StandIn::start().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&format!("{}?gclid=abc%2Fd%3D+%C3%BC%25&x=y&WBRAID=50%&gbraid=plain#msclkid=%41", api.page)).await;
    sent_all(&browser).await;
    let view = api.requests().concat().first().cloned().expect("the view");
    let address = view["u"].as_str().expect("an address");
    let ids = [("gclid", "abc/d= ü%"), ("wbraid", "50%"), ("gbraid", "plain"), ("msclkid", "A")];
    for (name, id) in ids {
        assert_eq!(Page::read(address).parameter(name), Some(id), "the server: {name}");
        assert_eq!(view["meta"][name], id, "the tracker: {name}");
    }
    drop(browser);
}

/// Waits until the outbox is empty, and has the tracker not wait.
async fn sent_all(browser: &Chromium) {
    eventually("an empty outbox", async || {
        browser.run("opsmantik.flush()").await;
        browser.outbox().await.is_empty().then_some(())
    })
    .await;
}
