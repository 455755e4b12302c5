//! The public door over real sockets: every row of the status table, and what a page may read of it.

use std::time::{Duration, Instant};

use chrono::Utc;
use opsmantik::domain::id::SiteId;
use opsmantik::domain::job::Job;
use opsmantik::http::BodyRoom;
use opsmantik::store::Store;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::support::app::{Answer, App, ORIGIN, event, signature};
use crate::support::database::database;
use crate::support::events::Spec;

#[tokio::test]
async fn one_event_is_stored_once_with_all_that_the_edge_knows() {
    let app = App::start(0).await;
    let send = || {
        let agent = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36";
        let request = app.sync(Method::POST).header("Origin", ORIGIN).header("User-Agent", agent);
        let request = request.header("X-Forwarded-For", "1.1.1.1, 203.0.113.77:4711").header("CF-IPCity", "İzmir");
        Answer::of(request.header("Content-Type", "text/plain").body(event(1).to_string()))
    };
    let stored = send().await;
    let id = Uuid::from_u128(1).to_string();
    assert_eq!(stored.status, 200);
    assert_eq!(stored.body, json!({"ok": true, "status": "stored", "score": 10, "id": id}));
    assert!(stored.is_shown_to(ORIGIN));
    assert_eq!(send().await.body, json!({"ok": true, "status": "duplicate", "score": 10, "id": id}));
    let sessions = app.database.rows("SELECT * FROM sessions").await;
    assert_eq!(sessions.len(), 1);
    for (column, value) in
        [("city", "İzmir"), ("device_type", "desktop"), ("gclid", "G"), ("attribution", "Direct-to-Ads")]
    {
        assert_eq!(sessions[0][column], value, "{column}");
    }
    let ip = sessions[0]["ip_truncated"].to_string();
    assert!(ip.contains("203.0.113.0"), "{ip}");
}

#[tokio::test]
async fn a_batch_has_a_verdict_an_event_in_order() {
    let app = App::start(0).await;
    let bad = json!({"id": "odd", "s": "shop", "sid": "visit"});
    let answer = app.post(json!({"events": [event(1), bad, event(2), event(1)]}).to_string()).await;
    assert_eq!(answer.status, 200);
    let results = answer.body["results"].as_array().cloned().unwrap_or_default();
    let statuses: Vec<_> = results.iter().filter_map(|result| result["status"].as_str()).collect();
    assert_eq!(statuses, ["stored", "rejected", "stored", "duplicate"]);
    assert_eq!(results[1]["error"], "missing_field");
    assert!(results[1]["message"].as_str().is_some_and(|text| text.contains("`events[1].u`")), "{}", results[1]);
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 2);
    let mixed = json!({"events": [event(3), {"s": "other", "u": "https://shop.example/", "sid": "1"}]});
    assert_eq!(app.post(mixed.to_string()).await.error(), (400, "invalid_field", "events[1].s"));
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 2, "nothing of it");
}

#[tokio::test]
async fn every_refusal_has_its_status_and_names_its_field_to_a_page_that_may_read_it() {
    let app = App::start(0).await;
    let with = |key: &str, value: Value| {
        let mut event = event(1);
        event[key] = value;
        event.to_string()
    };
    for (body, error) in [
        ("{".to_owned(), (400, "invalid_json", "body")),
        (with("s", Value::Null), (400, "missing_field", "s")),
        (with("u", Value::Null), (400, "missing_field", "u")),
        (with("sid", Value::Null), (400, "missing_field", "sid")),
        (with("s", "nobody".into()), (404, "unknown_site", "s")),
        (with("el", "x".repeat(64 << 10).into()), (413, "event_too_large", "body")),
        (" ".repeat((512 << 10) + 1), (413, "body_too_large", "body")),
        (r#"{"events":[]}"#.to_owned(), (400, "invalid_field", "events")),
    ] {
        let answer = app.post(body).await;
        assert_eq!(answer.error(), error);
        assert!(answer.is_shown_to(ORIGIN), "{error:?}");
    }
    let encoded = app.sync(Method::POST).header("Origin", ORIGIN).header("Content-Encoding", "gzip").body("x");
    assert_eq!(Answer::of(encoded).await.error(), (415, "encoded_body", "Content-Encoding"));
    for method in [Method::GET, Method::HEAD, Method::PUT, Method::DELETE] {
        let answer = Answer::of(app.sync(method).header("Origin", ORIGIN)).await;
        assert_eq!((answer.status, answer.header("allow")), (405, Some("POST, OPTIONS")));
        assert!(answer.is_shown_to(ORIGIN));
    }
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 0);
}

#[tokio::test]
async fn a_stranger_is_refused_and_shown_nothing() {
    let app = App::start(0).await;
    for (origin, error) in [
        (None, "origin_required"),
        (Some("https://evil.example"), "origin_not_allowed"),
        (Some("https://shop.example.evil.example"), "origin_not_allowed"),
        (Some("null"), "origin_not_allowed"),
    ] {
        let request = |method, body: String| {
            let request = app.sync(method).body(body);
            Answer::of(match origin {
                Some(origin) => request.header("Origin", origin),
                None => request,
            })
        };
        let answer = request(Method::POST, event(1).to_string()).await;
        assert_eq!(answer.error(), (403, error, ""));
        assert!(!answer.is_shown_to(""));
        let preflight = request(Method::OPTIONS, String::new()).await;
        assert_eq!((preflight.status, preflight.is_shown_to("")), (403, false));
        assert!(!request(Method::POST, "{".to_owned()).await.is_shown_to(""));
    }
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, 0);
    let preflight = Answer::of(app.sync(Method::OPTIONS).header("Origin", "https://www.shop.example")).await;
    assert_eq!(preflight.status, 204);
    assert!(preflight.is_shown_to("https://www.shop.example"));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("POST, OPTIONS"));
    assert_eq!(preflight.header("access-control-allow-headers"), Some("content-type"));
    assert!(preflight.header("access-control-max-age").is_some());
}

#[tokio::test]
async fn over_the_limit_is_429_for_this_client_only() {
    let app = App::start(2).await;
    let send = |client: &'static str, id| {
        let request = app.sync(Method::POST).header("Origin", ORIGIN).header("X-Forwarded-For", client);
        Answer::of(request.body(event(id).to_string()))
    };
    assert_eq!([send("203.0.113.7", 1).await.status, send("203.0.113.7", 2).await.status], [200, 200]);
    let limited = send("203.0.113.7", 3).await;
    assert_eq!(limited.error(), (429, "rate_limited", ""));
    assert!(limited.header("retry-after").and_then(|s| s.parse::<u32>().ok()).is_some_and(|s| (1..=30).contains(&s)));
    assert!(limited.is_shown_to(ORIGIN));
    assert_eq!(send("203.0.113.8", 3).await.status, 200);
}

#[tokio::test]
async fn without_a_database_the_answer_is_503_and_the_server_not_ready() {
    let database = database().await;
    let away = Store::new("postgres://nobody@127.0.0.1:9/none", 2).await.expect("a URL");
    let app = App::around(database, away, 0).await;
    let answer = app.post(event(1).to_string()).await;
    assert_eq!(answer.error(), (503, "database_unavailable", ""));
    assert!(answer.header("retry-after").is_some());
    let job = Job::new(Spec::new(1, "s", Utc::now()).event(SiteId::from_uuid(Uuid::nil())));
    let delivery = app.deliver(&job.to_json().unwrap_or_default(), "sig_current").await;
    assert_eq!((delivery.status, delivery.header("retry-after").is_some()), (503, true));
    let malformed = app.deliver("hello", "sig_current").await;
    assert_eq!(malformed.status, 503, "what cannot be buried stays with QStash");
    let admin = |path: &str| Answer::of(app.client.get(format!("http://{}{path}", app.admin)));
    assert_eq!(admin("/healthz").await.status, 200);
    let began = Instant::now();
    let ready = admin("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.body["reasons"][0].as_str().is_some_and(|reason| reason.starts_with("database")), "{}", ready.body);
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn before_a_database_that_takes_no_writes_the_server_is_not_ready() {
    let app = App::start(0).await;
    let admin = &app.database.admin;
    let ready = || Answer::of(app.client.get(format!("http://{}/readyz", app.admin)));
    assert_eq!(ready().await.status, 200);
    let name = &app.database.name;
    let cut = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    );
    for (breaks, mends, why) in [
        (
            format!("ALTER DATABASE {name} SET default_transaction_read_only = on"),
            format!("ALTER DATABASE {name} RESET default_transaction_read_only"),
            "read-only",
        ),
        (
            "REVOKE SELECT ON sites FROM opsmantik_service".to_owned(),
            "GRANT SELECT ON sites TO opsmantik_service".to_owned(),
            "public.sites",
        ),
    ] {
        admin.batch_execute(&breaks).await.expect("broken");
        admin.batch_execute(&cut).await.expect("new connections notice");
        let mut told = ready().await;
        if told.body["reasons"].to_string().contains("database") {
            told = ready().await; // the first look met a connection that was cut
        }
        assert_eq!(told.status, 503, "{why}");
        assert!(told.body["reasons"].to_string().contains(why), "{}", told.body);
        assert!(app.database.store.ping().await.is_err(), "health follows: {why}");
        admin.batch_execute(&format!("SET default_transaction_read_only = off; {mends}")).await.expect("mended");
        admin.batch_execute(&cut).await.expect("new connections notice");
        let deadline = Instant::now() + Duration::from_secs(5);
        while ready().await.status != 200 {
            assert!(Instant::now() < deadline, "not ready again after {why}");
        }
    }
}

#[tokio::test]
async fn a_slow_sender_is_cut_off_and_a_large_one_sees_why() {
    let app = App::start(0).await;
    let head = |length: usize| {
        format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {length}\r\n\r\n")
    };
    let slow = app.raw(format!("{}{{", head(100)).as_bytes()).await;
    assert!(slow.starts_with("HTTP/1.1 408"), "{slow}");
    assert!(slow.to_ascii_lowercase().contains(&format!("access-control-allow-origin: {ORIGIN}")), "{slow}");
    let length = 6 << 20;
    let large = app.raw([head(length).as_bytes(), &vec![b'x'; length]].concat().as_slice()).await;
    assert!(large.starts_with("HTTP/1.1 413") && large.contains("body_too_large"), "{large}");
    let mut chunked =
        format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nTransfer-Encoding: chunked\r\n\r\n")
            .into_bytes();
    for _ in 0..32 {
        chunked.extend_from_slice(b"8000\r\n");
        chunked.extend_from_slice(&[b'x'; 0x8000]);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let chunked = app.raw(&chunked).await;
    assert!(chunked.starts_with("HTTP/1.1 413"), "{chunked}");
    // Headers that never end, and a connection that says nothing, or half a greeting of HTTP/2.
    for dawdler in [&b"POST /api/sync HTTP/1.1\r\nHost: x\r\n"[..], b"", b"PRI * HTT"] {
        let began = Instant::now();
        app.raw(dawdler).await;
        assert!(began.elapsed() < Duration::from_secs(4), "{dawdler:?}");
    }
}

/// An event from a client of that address.
async fn post_from(app: &App, client: &str, body: impl Into<reqwest::Body>) -> Answer {
    Answer::of(app.sync(Method::POST).header("Origin", ORIGIN).header("X-Forwarded-For", client).body(body)).await
}

/// A request with so much of its body, and no end.
async fn unfinished(app: &App, path: &str, length: usize, sent: usize) -> TcpStream {
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {length}\r\n\r\n");
    let mut socket = TcpStream::connect(app.public).await.expect("the server listens");
    socket.write_all(&[head.as_bytes(), &vec![b' '; sent]].concat()).await.expect("the server reads");
    socket
}

/// Sends events until one is refused: what others were to take is taken then.
async fn until_refused(app: &App) -> Answer {
    for id in 1..100 {
        let answer = app.post(event(id).to_string()).await;
        if answer.status != 200 {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("there is room for everything");
}

#[tokio::test]
async fn bodies_that_never_end_take_half_of_their_doors_room_and_give_it_back() {
    const ROOM: usize = 64 << 10;
    const STRANGER: &str = "203.0.113.9";
    let app = App::start_with(0, |state| {
        state.body_room = BodyRoom::new(ROOM, 100);
        state.delivery_room = BodyRoom::new(ROOM, 100);
        state.body_patience = Duration::from_secs(6);
    })
    .await;
    // Who only announces much takes no room.
    let mut liars = Vec::new();
    for _ in 0..8 {
        liars.push(unfinished(&app, "/api/sync", 512 << 10, 0).await);
    }
    assert_eq!(app.post(" ".repeat(ROOM / 2)).await.error(), (400, "invalid_json", "body"), "half is for one client");
    assert_eq!(app.post(" ".repeat(ROOM / 2 + 1)).await.error(), (503, "busy", ""), "and no more than that");
    let mut holders = Vec::new();
    for _ in 0..4 {
        holders.push(unfinished(&app, "/api/sync", ROOM / 8, ROOM / 8 - 1).await);
    }
    let refused = until_refused(&app).await;
    assert_eq!(refused.error(), (503, "busy", ""));
    assert_eq!((refused.header("retry-after"), refused.header("connection")), (Some("1"), Some("close")));
    assert!(refused.is_shown_to(ORIGIN));
    // Refused in the middle of a large body: the answer is read, not a reset.
    let length = 512 << 10;
    let head = format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {length}\r\n\r\n");
    let large = app.raw(&[head.as_bytes(), &vec![b' '; length]].concat()).await;
    assert!(large.starts_with("HTTP/1.1 503") && large.contains("busy"), "{large}");

    assert_eq!(post_from(&app, STRANGER, event(500).to_string()).await.status, 200, "others are served");
    let large = post_from(&app, STRANGER, " ".repeat(ROOM / 4)).await;
    assert_eq!(large.error(), (400, "invalid_json", "body"), "and have half of what is left");
    let job = Job::new(Spec::new(501, "s", Utc::now()).event(app.database.site("jobs").await.id)).to_json();
    let job = job.expect("a job");
    assert_eq!(app.deliver(&job, "sig_current").await.status, 200, "deliveries have a room of their own");
    for _ in 0..4 {
        holders.push(unfinished(&app, "/api/sync/worker", ROOM / 8, ROOM / 8 - 1).await);
    }
    let (url, began) = (format!("http://{}/api/sync/worker", app.public), Instant::now());
    let refused = loop {
        assert!(began.elapsed() < Duration::from_secs(3), "there is room for everything");
        let request = app.client.post(&url).header("Upstash-Signature", signature(&job, "sig_current"));
        let answer = Answer::of(request.header("Upstash-Retried", "2").body(job.clone())).await;
        if answer.status != 200 {
            break answer;
        }
    };
    assert_eq!((refused.error().1, refused.header("retry-after")), ("busy", Some("15")), "not for hours");

    for mut holder in holders {
        let mut answer = String::new();
        holder.read_to_string(&mut answer).await.expect("no reset");
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    for id in 1000..1070 {
        assert_eq!(app.post(event(id).to_string()).await.status, 200);
    }
    assert_eq!(app.post(" ".repeat(ROOM / 2)).await.error(), (400, "invalid_json", "body"), "all of it was given back");
    drop(liars);
}

#[tokio::test]
async fn requests_that_never_bring_a_body_are_refused_at_once_when_they_are_too_many() {
    let app = App::start_with(0, |state| {
        state.body_room = BodyRoom::new(1 << 20, 8);
        state.body_patience = Duration::from_secs(4);
    })
    .await;
    let mut holders = Vec::new();
    for _ in 0..4 {
        holders.push(unfinished(&app, "/api/sync", 100, 0).await);
    }
    let refused = until_refused(&app).await;
    assert_eq!((refused.error(), refused.header("retry-after")), ((503, "busy", ""), Some("1")));
    let mut more = unfinished(&app, "/api/sync", 100, 0).await;
    let mut answer = String::new();
    let read = tokio::time::timeout(Duration::from_secs(2), more.read_to_string(&mut answer));
    read.await.expect("at once").expect("no reset");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert_eq!(post_from(&app, "203.0.113.9", event(500).to_string()).await.status, 200, "others are served");
    for mut holder in holders {
        let mut answer = String::new();
        holder.read_to_string(&mut answer).await.expect("no reset");
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    assert_eq!(app.post(event(1000).to_string()).await.status, 200);
}

#[tokio::test]
async fn what_was_taken_is_finished_when_the_browser_is_gone_and_when_the_server_stops() {
    let app = App::start(0).await;
    let body = event(1).to_string();
    let request = format!(
        "POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut socket = TcpStream::connect(app.public).await.expect("the server listens");
    socket.write_all(request.as_bytes()).await.expect("the server reads");
    drop(socket);
    let mut tries = 0;
    while app.database.count("SELECT count(*) FROM events").await == 0 {
        tries += 1;
        assert!(tries < 100, "the event was lost with its connection");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // An idle connection does not hold the server up.
    assert_eq!(app.post(event(2).to_string()).await.status, 200);
    app.stop.cancel();
    let mut tries = 0;
    while TcpStream::connect(app.public).await.is_ok() {
        tries += 1;
        assert!(tries < 100, "the server still listens");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_tracker_is_served_and_kept_and_nothing_else_is_here() {
    let app = App::start(0).await;
    let url = |path: &str| format!("http://{}{path}", app.public);
    let script = app.client.get(url("/tracker.js")).send().await.expect("an answer");
    let tag = script.headers()["etag"].clone();
    assert_eq!(script.headers()["content-type"], "text/javascript; charset=utf-8");
    assert_eq!(script.headers()["x-content-type-options"], "nosniff");
    assert!(script.text().await.is_ok_and(|text| text.contains("data-site")));
    let again = app.client.get(url("/tracker.js")).header("If-None-Match", tag).send().await.expect("an answer");
    assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
    assert_eq!(Answer::of(app.client.get(url("/nothing"))).await.error(), (404, "not_found", ""));
    let ready = Answer::of(app.client.get(format!("http://{}/readyz", app.admin))).await;
    assert_eq!((ready.status, ready.body), (200, json!({"ready": true})));
    let metrics = app.client.get(format!("http://{}/metrics", app.admin)).send().await.expect("an answer");
    assert_eq!(metrics.status(), StatusCode::OK);
}

/// A click on a telephone link leaves the page, and the browser closes what it no longer needs.
#[tokio::test]
async fn who_hangs_up_right_after_their_last_byte_is_heard_all_the_same() {
    let app = App::start(0).await;
    let request = |id: u128| {
        let body = event(id).to_string();
        let head = format!("POST /api/sync HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nContent-Length: {}", body.len());
        format!("{head}\r\n\r\n{body}")
    };
    for id in 1..=40 {
        let mut socket = TcpStream::connect(app.public).await.expect("the server listens");
        socket.write_all(request(id).as_bytes()).await.expect("the server reads");
    }
    for id in 41..=50 {
        let mut socket = TcpStream::connect(app.public).await.expect("the server listens");
        socket.write_all(request(id).as_bytes()).await.expect("the server reads");
        socket.shutdown().await.expect("only this half");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.expect("no reset");
        assert!(answer.starts_with("HTTP/1.1 200"), "who still listens is answered: {answer}");
    }
    let began = Instant::now();
    while app.database.count("SELECT count(*) FROM events").await < 50 {
        assert!(began.elapsed() < Duration::from_secs(10), "some are lost");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
