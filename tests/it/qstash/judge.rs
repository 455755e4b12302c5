//! QStash's own npm package as the judge: of our signature check, of our publishing, and of the stand-in itself.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::Utc;
use http::HeaderMap;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use opsmantik::dev::tools::{Found, Missing, QSTASH, Tool, require, skip_or_fail};
use opsmantik::http::signature::Verifier;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::{Rig, queued};
use crate::support::app::event;
use crate::support::qstash::{CURRENT_KEY, NEXT_KEY, Seen, TOKEN, claims, sign};

const RECEIVER: &str = "https://collect.example/api/sync/worker";
const BODY: &str = r#"{"v":1,"event":{"label":"İzmir"}}"#;

/// Node and the package; none if this machine cannot have them.
async fn tools() -> Option<(Found, Found)> {
    let both = || -> Result<_, Missing> { Ok((require(Tool::Node)?, require(QSTASH)?)) };
    let found = tokio::task::spawn_blocking(both).await.expect("no panic");
    found.map_err(|missing| skip_or_fail(&missing)).ok()
}

/// What the script of `tests/judge` says to this input.
async fn judge((node, package): &(Found, Found), script: &str, mut input: Value) -> Value {
    input["package"] = json!(package.path);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/judge").join(script);
    // None of our environment: the package reads settings from it.
    let mut child = tokio::process::Command::new(&node.path)
        .arg(script)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("node starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.to_string().as_bytes()).await.expect("node reads");
    drop(stdin);
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await;
    let output = output.expect("node ends in time").expect("node runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("the script writes JSON")
}

/// A token and what is to be said of it.
struct Case {
    name: &'static str,
    token: String,
    body: &'static str,
    /// QStash's own package.
    official: bool,
    ours: bool,
}

fn changed(change: impl FnOnce(&mut Value)) -> String {
    let mut claims = claims(RECEIVER, BODY);
    change(&mut claims);
    sign(CURRENT_KEY, &claims)
}

fn without(name: &str) -> String {
    changed(|claims| _ = claims.as_object_mut().and_then(|claims| claims.remove(name)))
}

fn cases() -> Vec<Case> {
    let now = Utc::now().timestamp();
    let good = sign(CURRENT_KEY, &claims(RECEIVER, BODY));
    let parts: Vec<&str> = good.split('.').collect();
    let hash = claims(RECEIVER, BODY)["body"].clone();
    let unpadded = hash.as_str().map(|hash| hash.trim_end_matches('=').to_owned());
    let headed = |alg: &str| URL_SAFE_NO_PAD.encode(json!({"alg": alg, "typ": "JWT"}).to_string());
    let other_algorithm = {
        let key = EncodingKey::from_secret(CURRENT_KEY.as_bytes());
        jsonwebtoken::encode(&Header::new(Algorithm::HS512), &claims(RECEIVER, BODY), &key).expect("a token")
    };
    let same = |name, token: String, verdict| Case { name, token, body: BODY, official: verdict, ours: verdict };
    let stricter = |name, token: String| Case { name, token, body: BODY, official: true, ours: false };
    vec![
        same("the current key", good.clone(), true),
        same("the next key", sign(NEXT_KEY, &claims(RECEIVER, BODY)), true),
        same("a body hash without padding", changed(|c| c["body"] = json!(unpadded)), true),
        same("expired within the leeway", changed(|c| c["exp"] = json!(now - 2)), true),
        same("early within the leeway", changed(|c| c["nbf"] = json!(now + 3)), true),
        same("another key", sign("sig_other", &claims(RECEIVER, BODY)), false),
        same("expired", changed(|c| c["exp"] = json!(now - 30)), false),
        same("too early", changed(|c| c["nbf"] = json!(now + 30)), false),
        same("another issuer", changed(|c| c["iss"] = json!("upstash")), false),
        same("no issuer", without("iss"), false),
        same("another receiver", changed(|c| c["sub"] = json!("https://evil.example/api/sync/worker")), false),
        same("no receiver", without("sub"), false),
        same("no body hash", without("body"), false),
        same("claims changed after signing", format!("{}.{}A.{}", parts[0], parts[1], parts[2]), false),
        same("no signature", format!("{}.{}.", headed("none"), parts[1]), false),
        same("RS256 said, HS256 done", format!("{}.{}.{}", headed("RS256"), parts[1], parts[2]), false),
        same("no token", "rubbish".to_owned(), false),
        Case { name: "a body with one more space", body: "{\"v\": 1}", ..same("", good.clone(), false) },
        Case { name: "no body", body: "", ..same("", good, false) },
        // Deliberately: QStash signs with HS256 and sets both times, so nothing else is QStash.
        stricter("HS512 with the right key", other_algorithm),
        stricter("no expiry", without("exp")),
        stricter("no begin", without("nbf")),
    ]
}

#[tokio::test]
async fn the_official_receiver_and_ours_say_the_same_of_every_token() {
    let Some(tools) = tools().await else { return };
    let cases = cases();
    let asked: Vec<Value> =
        cases.iter().map(|case| json!({"signature": case.token, "url": RECEIVER, "body": case.body})).collect();
    let keys = json!({"current": CURRENT_KEY, "next": NEXT_KEY});
    let verdicts = judge(&tools, "receiver.mjs", json!({"keys": keys, "cases": asked})).await;
    let verifier = Verifier::new(&[CURRENT_KEY, NEXT_KEY], RECEIVER);
    for (at, case) in cases.iter().enumerate() {
        let ours = verifier.verify(Some(&case.token), case.body.as_bytes());
        assert_eq!(verdicts[at] == json!(true), case.official, "{}: the official one: {}", case.name, verdicts[at]);
        assert_eq!(ours.is_ok(), case.ours, "{}: {ours:?}", case.name);
        assert!(case.official || !case.ours, "{}: never laxer than the official one", case.name);
    }
}

type Headers = Vec<(String, String)>;

/// The headers of a request that QStash acts on. Everything else is a program's way of speaking HTTP.
fn meant(headers: &HeaderMap) -> Headers {
    let telemetry = |name: &str| name.starts_with("upstash-telemetry-");
    let spoken = ["host", "content-length", "connection", "accept", "accept-language", "accept-encoding", "user-agent"];
    let mut meant: Vec<_> = headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), value.to_str().unwrap_or_default().to_owned()))
        .filter(|(name, _)| !telemetry(name) && !spoken.contains(&name.as_str()) && name != "sec-fetch-mode")
        .collect();
    meant.sort();
    meant
}

/// The messages of a batch: destination, headers and body of each.
fn messages(seen: &Seen) -> Vec<(String, Headers, Value)> {
    let read = |message: &Value| {
        let keys: Vec<_> = message.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys.len(), 3, "{keys:?}");
        let headers = message["headers"].as_object().into_iter().flatten();
        let headers = headers.filter_map(|(name, value)| Some((name.parse().ok()?, value.as_str()?.parse().ok()?)));
        let headers: HeaderMap =
            headers.map(|(name, value): (http::HeaderName, http::HeaderValue)| (name, value)).collect();
        let body = message["body"].as_str().and_then(|body| serde_json::from_str(body).ok());
        (message["destination"].as_str().unwrap_or_default().to_owned(), meant(&headers), body.expect("a job"))
    };
    let batch: Vec<Value> = serde_json::from_str(&seen.body).expect("a batch is an array");
    batch.iter().map(read).collect()
}

#[tokio::test]
async fn we_publish_what_the_official_client_publishes() {
    let Some(tools) = tools().await else { return };
    let rig = Rig::start().await;
    assert!(queued(&rig.post(&event(1)).await));
    assert_eq!(rig.post(&json!({"events": [event(2), event(3)]})).await.status, 202);
    let (ours, kept) = (rig.qstash.seen(), rig.qstash.messages());

    let order = |at: usize, name: &str| {
        let body: Value = serde_json::from_str(&kept[at].body).expect("our own job");
        json!({"url": rig.worker(), "body": body, "retries": kept[at].retries, "deduplicationId": name})
    };
    let name = |headers: &[(String, String)]| {
        let found = headers.iter().find(|(name, _)| name == "upstash-deduplication-id");
        found.expect("every message is named").1.clone()
    };
    let many: Vec<Value> =
        messages(&ours[1]).iter().zip(1..).map(|((_, headers, _), at)| order(at, &name(headers))).collect();
    let one = order(0, &name(&meant(&ours[0].headers)));
    let input = json!({"baseUrl": rig.qstash.url, "token": TOKEN, "one": one, "many": many});
    let answers = judge(&tools, "client.mjs", input).await;
    let theirs = &rig.qstash.seen()[ours.len()..];

    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!((&ours.method, &ours.path), (&theirs.method, &theirs.path));
        assert_eq!(meant(&ours.headers), meant(&theirs.headers));
    }
    let json = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(json(&ours[0].body), json(&theirs[0].body));
    assert_eq!(messages(&ours[1]), messages(&theirs[1]));
    // And the official client understands the stand-in: the same names are the same messages.
    let known: Vec<_> = kept
        .iter()
        .map(|message| json!({"messageId": message.id, "url": rig.worker(), "deduplicated": true}))
        .collect();
    assert_eq!((&answers["published"], &answers["batch"]), (&known[0], &json!(known[1..])));
    assert_eq!(rig.qstash.messages().len(), kept.len());
    rig.server.stop().await;
}

#[tokio::test]
async fn the_official_receiver_believes_the_stand_in() {
    let Some(tools) = tools().await else { return };
    let rig = Rig::start().await;
    assert!(queued(&rig.post(&event(1)).await));
    let body = rig.qstash.messages()[0].body.clone();
    let case = |key, url: String, body: &str| json!({"signature": sign(key, &claims(&rig.worker(), &rig.qstash.messages()[0].body)), "url": url, "body": body});
    let cases = [
        case(CURRENT_KEY, rig.worker(), &body),
        case(NEXT_KEY, rig.worker(), &body),
        case("sig_other", rig.worker(), &body),
        case(CURRENT_KEY, rig.worker(), &body.replacen("\"v\":1", "\"v\": 1", 1)),
        case(CURRENT_KEY, format!("{}/", rig.worker()), &body),
    ];
    let keys = json!({"current": CURRENT_KEY, "next": NEXT_KEY});
    let verdicts = judge(&tools, "receiver.mjs", json!({"keys": keys, "cases": cases})).await;
    let believed: Vec<bool> = (0..cases.len()).map(|at| verdicts[at] == json!(true)).collect();
    assert_eq!(believed, [true, true, false, false, false], "{verdicts}");
    rig.server.stop().await;
}
