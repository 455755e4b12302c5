//! Whatever is sent, the public door answers it, and what it stores is whole.

use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::app::App;

/// Arbitrary JSON: every kind of value, text with NUL, controls and half the Unicode planes in it.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!("\u{0}")),
        Just(json!("x".repeat(5000))),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((any::<String>(), inner), 0..4).prop_map(Value::from_iter),
        ]
    })
}

/// An event of our site in which each key may have any value.
fn any_event() -> impl Strategy<Value = Value> {
    let keys = ["id", "s", "u", "url", "sid", "sm", "ec", "ea", "el", "ev", "r", "meta", "ts", "fp", "events", "\u{0}"];
    let odd = proptest::collection::vec((proptest::sample::select(keys.to_vec()), any_json()), 0..4);
    let metas = ["fp", "gclid", "city", "scroll_pct", "duration_sec", "exit_page", "lan", "cta_hovers"];
    let meta = proptest::collection::vec((proptest::sample::select(metas.to_vec()), any_json()), 0..4);
    (odd, meta).prop_map(|(odd, meta)| {
        let mut event = json!({"s": "shop", "u": "https://shop.example/", "sid": "visit"});
        event["meta"] = meta.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        for (key, value) in odd {
            event[key] = value;
        }
        event
    })
}

#[tokio::test]
async fn no_json_and_no_bytes_break_it_and_nothing_is_half_stored() {
    let app = App::start(0).await;
    let mut runner = TestRunner::default();
    let mut sample = || {
        let mut event = || any_event().new_tree(&mut runner).map(|tree| tree.current()).unwrap_or_default();
        match Uuid::new_v4().as_u128() % 4 {
            0 => json!({"events": [event(), event(), event()]}).to_string().into_bytes(),
            1 => {
                any_json().new_tree(&mut runner).map(|tree| tree.current()).unwrap_or_default().to_string().into_bytes()
            }
            2 => {
                let bytes = proptest::collection::vec(any::<u8>(), 0..300);
                let mut text = event().to_string().into_bytes();
                let at = text.len() / 2;
                text.splice(at..at, bytes.new_tree(&mut runner).map(|tree| tree.current()).unwrap_or_default());
                text
            }
            _ => event().to_string().into_bytes(),
        }
    };
    let mut stored = 0;
    for _ in 0..300 {
        let body = sample();
        let answer = app.post(body.clone()).await;
        assert!(
            [200, 400, 404, 413].contains(&answer.status),
            "{} for {:?}",
            answer.status,
            String::from_utf8_lossy(&body)
        );
        let results = answer.body["results"].as_array().cloned().unwrap_or_else(|| vec![answer.body.clone()]);
        stored += results.iter().filter(|result| result["status"] == "stored").count();
    }
    assert!(stored > 50, "most of it is stored: {stored}");
    assert_eq!(app.database.count("SELECT count(*) FROM events").await, i64::try_from(stored).unwrap_or_default());
    let empty = "SELECT count(*) FROM sessions s WHERE event_count <> (SELECT count(*) FROM events e \
        WHERE (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id))";
    assert_eq!(app.database.count(empty).await, 0);
    assert_eq!(app.database.count("SELECT count(*) FROM dead_letters").await, 0, "nothing that PostgreSQL refuses");
}
