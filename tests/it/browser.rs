//! From a real page to its rows: headless Chromium on the demo page, and what PostgreSQL has in the end.
//!
//! The page is on another origin than the API, as on a customer's site. Whatever happens on the way — answers that never
//! come, a network that goes away, a browser that is killed — each event is stored, and stored once.

mod stand_in;

use std::collections::BTreeSet;
use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use fantoccini::Locator;
use serde_json::{Value, json};

use crate::support::browser::{Chromium, Profile, TIME_ZONE, Tools, eventually};
use crate::support::stage::{Passage, Stage};

const CALL: &str = "phone_call tel:+12025550123";
const WHATSAPP: &str = "whatsapp whatsapp:12025550123";

#[tokio::test]
async fn a_call_that_leaves_the_page_while_requests_are_in_flight_is_stored_with_the_whole_visit() {
    let Some(tools) = Tools::find().await else { return };
    let (stage, profile) = (Stage::set().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    let entry = format!(
        "{}/?gclid=Test-Click_1&utm_source=google&utm_medium=cpc&utm_campaign=locks&utm_term=locked%20out\
         &utm_content=blue&matchtype=e&device=c&network=g#x",
        stage.page
    );
    browser.open(&entry).await;
    stage.stored("view").await;
    browser.sent_all().await;
    assert_eq!(browser.errors().await, Vec::<Value>::new());
    let told = browser.run("return window.opsmantik.session()").await;
    let traits = "const { hardwareConcurrency: con, deviceMemory: mem, language: lan, connection } = navigator;
        return { con, mem, lan, sw: screen.width, sh: screen.height, dpr: devicePixelRatio,
            con_type: connection.effectiveType, gclid: 'Test-Click_1', timezone: 'Europe/Istanbul' }";
    let traits = browser.run(traits).await;

    // From here on the page hears nothing: requests hang, so all that follows is in flight when it is left.
    stage.gate.set(Passage::NoAnswers);
    browser.scroll_to_the_end().await;
    send_the_form(&browser).await;
    browser.hover("#call").await;
    stage.stored("scroll_depth").await;
    let leave = "document.querySelector('#call').addEventListener('click', (e) => {
        e.preventDefault();
        location.href = '/elsewhere';
    })";
    browser.run(leave).await;
    browser.client.find(Locator::Css("#call")).await.expect("the link").click().await.expect("a click");
    let there = format!("{}/elsewhere", stage.page);
    eventually("the other page", async || (browser.run("return location.href").await == there).then_some(())).await;

    // That page has no tracker, so whatever arrives was sent on the way out.
    let actions = ["form_submit callback", "hover_intent tel:+12025550123", CALL, "scroll_depth 50", "scroll_depth 90"];
    let all: Vec<&str> = actions.iter().copied().chain(["session_end", "view"]).collect();
    eventually("all events of the visit", async || (stage.actions().await == all).then_some(())).await;
    let first_view = stage.events().await.iter().find(|event| event["event_action"] == "view").cloned();
    let mut ids = stage.event_ids().await;
    ids.retain(|id| first_view.as_ref().is_some_and(|view| view["id"] != *id));
    assert_eq!(browser.outbox().await, ids, "nothing was answered, so the tracker keeps all of it");
    check_events(&stage, &entry, &told, &traits).await;
    let session = stage.session().await;
    check_session(&session, &stage, &entry, &told).await;

    // Back on a page with the tracker everything is sent again, and stays what it is.
    stage.gate.set(Passage::Open);
    browser.open(&stage.page).await;
    browser.sent_all().await;
    let again: Vec<&str> = all.iter().copied().chain(["view"]).collect();
    assert_eq!(stage.actions().await, again, "only the second view is new");
    let after = stage.session().await;
    for (column, value) in [("event_count", json!(8)), ("lead_score", json!(100)), ("entry_page", json!(entry))] {
        assert_eq!(after[column], value, "{column}");
    }
    for column in ["id", "created_month", "created_at", "signals", "gclid", "attribution", "traffic_source"] {
        assert_eq!(after[column], session[column], "{column}");
    }
    panel_shows(&browser, "100 / 100", "Direct-to-Ads").await;
    drop(browser);
    stage.stop().await;
}

/// Each row of the visit, field by field.
async fn check_events(stage: &Stage, entry: &str, told: &Value, traits: &Value) {
    let rows = stage.database.rows(
        "SELECT *, id::text ~ '^[0-9a-f]{8}-[0-9a-f]{4}-7' AND session_id::text ~ '^[0-9a-f]{8}-[0-9a-f]{4}-7' AS version_7, \
         abs(('x' || left(translate(id::text, '-', ''), 12))::bit(48)::int8 - extract(epoch FROM occurred_at) * 1000) < 1000 AS made_then, created_at BETWEEN occurred_at AND now() AS timely, \
         occurred_at > now() - interval '2 minutes' AS recent FROM events",
    );
    let label = "tel:+12025550123";
    // category, action, value, label, signals, score
    let expected = [
        ("interaction", "view", Value::Null, Value::Null, 0b00010, 10),
        ("interaction", "scroll_depth", json!(50.0), Value::Null, 0b00110, 20),
        ("interaction", "scroll_depth", json!(90.0), Value::Null, 0b01110, 40),
        ("conversion", "form_submit", Value::Null, json!("callback"), 0b00001, 50),
        ("interaction", "hover_intent", Value::Null, json!(label), 0b10010, 25),
        ("conversion", "phone_call", Value::Null, json!(label), 0b00001, 50),
        ("system", "session_end", Value::Null, Value::Null, 0b11100, 45),
    ];
    let rows = rows.await;
    assert_eq!(rows.len(), expected.len());
    for (category, action, value, label, signals, score) in expected {
        let what = format!("{action} {value}");
        let row = rows
            .iter()
            .find(|row| row["event_action"] == action && row["event_value"].as_f64() == value.as_f64())
            .unwrap_or_else(|| panic!("{what} is stored"));
        for (column, value) in [
            ("session_id", told["sid"].clone()),
            ("session_month", told["sm"].clone()),
            ("url", json!(entry)),
            ("referrer", Value::Null),
            ("event_category", json!(category)),
            ("event_label", label),
            ("signals", json!(signals)),
            ("lead_score", json!(score)),
            ("version_7", json!(true)),
            ("made_then", json!(true)),
            ("timely", json!(true)),
            ("recent", json!(true)),
        ] {
            assert_eq!(row[column], value, "{what}: {column}");
        }
        for (name, value) in traits.as_object().into_iter().flatten() {
            assert_eq!(&row["metadata"][name], value, "{what}: metadata {name}");
        }
        let intent = (category == "conversion").then_some(action);
        assert_eq!(row["metadata"]["intent_action"].as_str(), intent, "{what}");
        assert!(!row.to_string().contains("Confidential"), "{what}: what was typed stays in the page");
    }
}

/// The session is the sum of its events.
async fn check_session(session: &Value, stage: &Stage, entry: &str, told: &Value) {
    for (column, value) in [
        ("id", told["sid"].clone()),
        ("created_month", told["sm"].clone()),
        ("event_count", json!(7)),
        ("signals", json!(0b11111)),
        ("lead_score", json!(100)),
        ("attribution", json!("Direct-to-Ads")),
        ("traffic_source", json!("Google Ads")),
        ("traffic_medium", json!("cpc")),
        ("gclid", json!("Test-Click_1")),
        ("wbraid", Value::Null),
        ("gbraid", Value::Null),
        ("utm_source", json!("google")),
        ("utm_medium", json!("cpc")),
        ("utm_campaign", json!("locks")),
        ("utm_term", json!("locked out")),
        ("utm_content", json!("blue")),
        ("matchtype", json!("e")),
        ("ads_device", json!("c")),
        ("ads_network", json!("g")),
        ("entry_page", json!(entry)),
        ("exit_page", json!(entry)),
        ("referrer", Value::Null),
        ("device_type", json!("desktop")),
        ("device_os", json!("Windows 10")),
        ("browser", json!("Chrome")),
        ("language", json!("en-US")),
        ("timezone", json!(TIME_ZONE)),
        ("ip_truncated", json!("127.0.0.0")),
        ("country", Value::Null),
        ("scroll_pct", json!(100)),
        ("cta_hovers", json!(1)),
    ] {
        assert_eq!(session[column], value, "{column}");
    }
    let fingerprint = session["fingerprint"].as_str().unwrap_or_default();
    assert!(fingerprint.len() >= 16 && fingerprint.chars().all(|c| c.is_ascii_alphanumeric()), "{fingerprint}");
    let events = stage.events().await;
    assert!(events.iter().all(|event| event["metadata"]["fp"] == fingerprint), "{fingerprint}");
    let odd = "SELECT count(*) FROM sessions s JOIN LATERAL (SELECT min(created_at) AS first, max(created_at) AS last, \
               bit_or(signals) AS signals, count(*) AS number FROM events e WHERE e.session_id = s.id) e ON true \
               WHERE (s.created_at, s.last_seen_at, s.signals, s.event_count) IS DISTINCT FROM (first, last, e.signals, number)";
    assert_eq!(stage.database.count(odd).await, 0, "first, last, union and count are those of its events");
}

#[tokio::test]
async fn what_is_done_offline_is_stored_once_after_coming_back() {
    let Some(tools) = Tools::find().await else { return };
    let (stage, profile) = (Stage::set().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&stage.page).await;
    stage.stored("view").await;
    browser.sent_all().await;

    browser.offline(true).await;
    click_by_script(&browser, 1).await;
    let whatsapp = "const link = document.querySelector('#whatsapp'); link.onclick = () => false; link.click()";
    browser.run(whatsapp).await;
    let kept = browser.outbox().await;
    assert_eq!(kept.len(), 2);
    // The tracker tries, and fails, before the network is back.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(stage.actions().await, ["view"], "the network is away");
    browser.offline(false).await;
    browser.sent_all().await;
    assert_eq!(stage.actions().await, [CALL, "view", WHATSAPP]);
    assert!(includes(&stage.event_ids().await, &kept), "the very same events");

    // The browser's switch does not hold back what a page sends while it goes, so the way is shut as well.
    stage.gate.set(Passage::Shut);
    browser.offline(true).await;
    click_by_script(&browser, 1).await;
    let kept = browser.outbox().await;
    assert_eq!(kept.len(), 1);
    browser.client.refresh().await.expect("a reload");
    assert_eq!(browser.run("return location.protocol").await, "chrome-error:", "the page cannot be had offline");
    assert_eq!(stage.actions().await, [CALL, "view", WHATSAPP], "nothing got through");
    stage.gate.set(Passage::Open);
    browser.offline(false).await;
    browser.open(&stage.page).await;
    browser.sent_all().await;
    assert_eq!(stage.actions().await, [CALL, CALL, "session_end", "view", "view", WHATSAPP]);
    assert!(includes(&stage.event_ids().await, &kept), "the very same event");
    assert_eq!(stage.session().await["event_count"], 6);
    drop(browser);
    stage.stop().await;
}

#[tokio::test]
async fn two_tabs_at_once_are_one_session_with_the_events_of_both() {
    let Some(tools) = Tools::find().await else { return };
    let (stage, profile) = (Stage::set().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&stage.page).await;
    let first = browser.client.window().await.expect("a window");
    let second = browser.client.new_window(true).await.expect("another tab").handle;
    browser.client.switch_to_window(second.clone()).await.expect("the other tab");
    browser.open(&stage.page).await;

    // Both begin at the same moment and take turns with the one outbox; every fourth event is a call, which waits for no turn.
    let start = eventually("a common start", async || browser.run("return Date.now() + 1500").await.as_i64()).await;
    for (tab, name) in [(&first, "a"), (&second, "b")] {
        browser.client.switch_to_window(tab.clone()).await.expect("a tab");
        let script = format!(
            "const step = (n) => {{
                if (n % 4 === 3) document.querySelector('#call').click();
                else opsmantik.track('interaction', 'step', '{name}' + n);
                if (n < 11) setTimeout(step, 20, n + 1); else document.title = 'done';
            }};
            setTimeout(step, {start} - Date.now(), 0);"
        );
        browser.run(&script).await;
    }
    let mut expected: Vec<String> = vec![CALL.to_owned(); 6];
    for tab in ["a", "b"] {
        expected.extend((0..12).filter(|n| n % 4 != 3).map(|n| format!("step {tab}{n}")));
    }
    expected.extend(["view".to_owned(), "view".to_owned()]);
    expected.sort();
    for tab in [&first, &second] {
        browser.client.switch_to_window(tab.clone()).await.expect("a tab");
        eventually("the end of the steps", async || {
            (browser.run("return document.title").await == "done").then_some(())
        })
        .await;
    }
    browser.sent_all().await;
    assert_eq!(stage.actions().await, expected);
    let session = stage.session().await;
    assert_eq!(session["event_count"], 26);
    assert_eq!(browser.run("return opsmantik.session().sid").await, session["id"]);
    drop(browser);
    stage.stop().await;
}

#[tokio::test]
async fn a_call_survives_the_death_of_the_browser() {
    let Some(tools) = Tools::find().await else { return };
    let (stage, profile) = (Stage::set().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&stage.page).await;
    stage.stored("view").await;
    browser.sent_all().await;

    stage.gate.set(Passage::Shut);
    click_by_script(&browser, 1).await;
    let kept = browser.outbox().await;
    assert_eq!(kept.len(), 1);
    eventually("the event on disk", async || profile.has_on_disk(&kept[0]).then_some(())).await;
    browser.kill();
    assert_eq!(stage.actions().await, ["view"]);

    stage.gate.set(Passage::Open);
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&stage.page).await;
    browser.sent_all().await;
    assert_eq!(stage.actions().await, [CALL, "view", "view"]);
    assert!(includes(&stage.event_ids().await, &kept), "the very same event");
    assert_eq!(stage.session().await["event_count"], 3);
    drop(browser);
    stage.stop().await;
}

#[tokio::test]
async fn the_panel_shows_the_visitor_what_is_stored_on_either_origin() {
    let Some(tools) = Tools::find().await else { return };
    let (stage, profile) = (Stage::set().await, Profile::new());
    let browser = tools.open(&profile, json!({})).await;
    for (page, query, score, attribution) in [
        (&stage.same_origin_page, "", "10 / 100", "Organic/Referral"),
        (&stage.page, "?wbraid=W", "10 / 100", "Direct-to-Ads"),
    ] {
        browser.open(&format!("{page}{query}")).await;
        panel_shows(&browser, score, attribution).await;
        click_by_script(&browser, 1).await;
        panel_shows(&browser, "60 / 100", attribution).await;
        let sid = browser.run("return opsmantik.session().sid").await;
        let shown = browser.client.find(Locator::Css("#facts dd")).await.expect("the session's id");
        assert_eq!(json!(shown.text().await.expect("its text")), sid);
        let row = browser.client.find(Locator::XPath("//tbody[@id='events']/tr[contains(., 'phone_call')]")).await;
        let row = row.expect("the call").text().await.expect("its text");
        assert!(row.contains("conversion / phone_call") && row.contains("tel:+12025550123"), "{row}");
    }
    assert_eq!(browser.errors().await, Vec::<Value>::new());
    assert_eq!(stage.database.count("SELECT count(*) FROM sessions").await, 2, "storage belongs to an origin");
    drop(browser);
    stage.stop().await;
}

#[tokio::test]
async fn without_storage_the_page_has_no_error_and_the_events_arrive() {
    let Some(tools) = Tools::find().await else { return };
    let stage = Stage::set().await;
    // A user who blocks cookies: touching localStorage throws.
    let profile = Profile::new();
    let blocked = json!({"profile.default_content_setting_values.cookies": 2});
    let browser = tools.open(&profile, blocked).await;
    let listen = "addEventListener('error', (e) => { (window.seen ||= []).push('error ' + e.message) });
        addEventListener('unhandledrejection', (e) => { (window.seen ||= []).push('rejection ' + e.reason) });";
    let on_every_page = async |browser: &Chromium| {
        browser.devtools("Page.addScriptToEvaluateOnNewDocument", json!({"source": listen})).await;
    };
    let nothing_seen = async |browser: &Chromium| {
        assert_eq!(browser.run("return window.seen || []").await, json!([]));
        assert_eq!(browser.errors().await, Vec::<Value>::new());
    };
    on_every_page(&browser).await;
    browser.open(&stage.page).await;
    let touch = "try { return localStorage.length } catch (e) { return e.name }";
    assert_eq!(browser.run(touch).await, "SecurityError", "the browser blocks it");
    click_by_script(&browser, 2).await;
    eventually("the events", async || (stage.actions().await == [CALL, CALL, "view"]).then_some(())).await;
    nothing_seen(&browser).await;
    assert_eq!(stage.session().await["event_count"], 3);
    drop(browser);

    // A storage that the page has filled to the last character.
    let profile = Profile::new();
    let browser = tools.open(&profile, json!({})).await;
    browser.open(&format!("{}/elsewhere", stage.page)).await;
    let fill = "let text = 'x'.repeat(1 << 22), n = 0;
        while (text) { try { localStorage['fill' + n++] = text } catch (e) { text = text.slice(text.length / 2 + .5) } }
        try { localStorage.more = '1' } catch (e) { return e.name }";
    assert_eq!(browser.run(fill).await, "QuotaExceededError", "it is full");
    on_every_page(&browser).await;
    browser.open(&stage.page).await;
    click_by_script(&browser, 2).await;
    let both = [CALL, CALL, CALL, CALL, "view", "view"];
    eventually("the events", async || (stage.actions().await == both).then_some(())).await;
    nothing_seen(&browser).await;
    drop(browser);
    stage.stop().await;
}

#[test]
fn the_tracker_is_small() {
    let script = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/src/http/tracker.js")).expect("the tracker");
    let packed = Command::new("gzip").args(["-9", "-n"]).stdin(Stdio::from(script)).output().expect("gzip runs");
    assert!(packed.status.success());
    assert!((1..=4096).contains(&packed.stdout.len()), "{} bytes", packed.stdout.len());
}

/// Clicks the telephone link some times without moving the mouse, which would be an intent of its own. The browser
/// complains of a call without a hand, so the page takes the click for itself.
async fn click_by_script(browser: &Chromium, times: u32) {
    let click = "const call = document.querySelector('#call'); call.onclick = () => false;";
    browser.run(&format!("{click} for (let i = 0; i < {times}; i++) call.click()")).await;
}

async fn send_the_form(browser: &Chromium) {
    let name = browser.client.find(Locator::Css("#callback input")).await.expect("a field");
    name.send_keys("Confidential").await.expect("typing");
    let button = browser.client.find(Locator::Css("#callback button")).await.expect("a button");
    button.click().await.expect("a click");
}

async fn panel_shows(browser: &Chromium, score: &str, attribution: &str) {
    let text = async |selector: &str| {
        let element = browser.client.find(Locator::Css(selector)).await.ok()?;
        element.text().await.ok()
    };
    eventually(&format!("{score}, {attribution} in the panel"), async || {
        let facts = text("#facts").await?;
        let seen = text("#score").await? == score && facts.lines().any(|line| line == attribution);
        seen.then_some(())
    })
    .await;
}

fn includes(all: &[String], some: &[String]) -> bool {
    let all: BTreeSet<_> = all.iter().collect();
    some.iter().all(|id| all.contains(id))
}
