//! What an event accepts, refuses, derives and survives.

use super::*;
use serde_json::json;
use uuid::Uuid;

const NAMES: FieldNames = FieldNames { url: "u", session: "sid" };

fn site() -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(7))
}

fn arrival() -> Arrival {
    Arrival::at(DateTime::from_timestamp(1_790_000_000, 123_456_789).unwrap_or_default())
}

fn draft(fill: impl FnOnce(&mut Draft)) -> Draft {
    let mut draft = Draft { url: Some("https://a.example/".into()), session: Some("s1".into()), ..Draft::default() };
    fill(&mut draft);
    draft
}

fn accept(fill: impl FnOnce(&mut Draft)) -> Event {
    Event::accept(site(), draft(fill), &arrival(), NAMES).expect("the draft has all it needs")
}

fn meta(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

#[test]
fn only_what_cannot_be_an_event_is_refused_and_the_field_is_named() {
    for (fill, field) in [
        ((|d| d.url = None) as fn(&mut Draft), "u"),
        (|d| d.url = Some(" ".into()), "u"),
        (|d| d.url = Some("\0".into()), "u"),
        (|d| d.session = None, "sid"),
        (|d| d.session = Some("\0".into()), "sid"),
    ] {
        let refused = Event::accept(site(), draft(fill), &arrival(), NAMES).expect_err("a required field is missing");
        assert_eq!(refused.field, field);
        assert!(refused.to_string().contains(&format!("`{field}`")), "{refused}");
    }
}

#[test]
fn call_actions_are_known_in_any_letter_case() {
    assert!(CONVERSION_ACTIONS.iter().all(|action| is_call_action(&action.to_uppercase())));
    assert!(!is_call_action("phone_calls") && !is_call_action(" call") && !is_call_action(""));
}

#[test]
fn oddities_are_survived() {
    let event = accept(|d| {
        d.url = Some(format!("HTTPS://A.example/{}?gclid=Z", "ü".repeat(4000)));
        d.label = Some("x\0".repeat(5000));
        d.month_hint = Some("never".into());
        d.value = Some(f64::NAN);
        d.client_time_ms = Some(f64::MAX);
        d.meta =
            meta(json!({"mem": 0.5, "fp\u{0}": 1, "fp": 42, "scroll_pct": "1e300", "duration_sec": -5, "city": ["x"]}));
    });
    assert!(event.url.len() <= MAX_URL && event.url.ends_with('ü'));
    assert_eq!(event.click_ids.gclid.as_deref(), Some("Z"), "read before the URL was cut");
    assert_eq!(event.label.as_deref().map(str::len), Some(MAX_LABEL));
    assert_eq!((event.month_hint, event.value), (None, None));
    assert_eq!(event.occurred_at, event.received_at, "a clock that runs ahead");
    assert_eq!(event.received_at.timestamp_subsec_nanos() % 1000, 0, "PostgreSQL keeps microseconds");
    assert_eq!(event.metadata.get("mem"), Some(&json!(0.5)));
    assert_eq!((event.gauges.scroll_pct, event.gauges.duration_sec), (Some(100), Some(0)));
    assert_eq!(event.geo.city, None);
}

#[test]
fn each_signal_is_raised_by_what_the_design_says() {
    let score = |fill: fn(&mut Draft)| accept(fill).signals.score().get();
    assert_eq!(score(|_| ()), 0);
    assert_eq!(score(|d| d.category = Some("conversion".into())), 50);
    assert_eq!(score(|d| d.action = Some("WhatsApp".into())), 50, "under any category");
    assert_eq!(score(|d| d.category = Some("interaction".into())), 10);
    assert_eq!(score(|d| (d.action, d.value) = (Some("scroll_depth".into()), Some(50.0))), 10);
    assert_eq!(score(|d| (d.action, d.label) = (Some("scroll_depth".into()), Some("90%".into()))), 30);
    assert_eq!(score(|d| d.value = Some(90.0)), 0, "a value is a depth only for scroll_depth");
    assert_eq!(score(|d| d.meta = meta(json!({"scroll_pct": 55, "cta_hovers": 2}))), 25);
    assert_eq!(score(|d| d.meta = meta(json!({"scroll_pct": 49.9, "cta_hovers": 0.9}))), 0, "not reached");
    assert_eq!(score(|d| d.meta = meta(json!({"scroll_pct": 89.9}))), 10);
    assert_eq!(score(|d| d.action = Some("hover_intent".into())), 15);
    assert_eq!(score(|d| d.referrer = Some("https://www.google.com.tr/search?q=x".into())), 5);
    assert_eq!(score(|d| d.referrer = Some("https://evil.example/www.google.com".into())), 0);
}

#[test]
fn only_text_that_says_something_is_a_click_id() {
    for odd in [json!(false), json!(0), json!(null), json!("undefined"), json!("null"), json!(" "), json!(["x"])] {
        let event = accept(|d| d.meta = meta(json!({"gclid": odd})));
        assert_eq!((event.click_ids.gclid, event.traffic.source.as_str()), (None, "Direct"), "{odd}");
    }
    assert_eq!(accept(|d| d.meta = meta(json!({"gclid": "Cj0"}))).click_ids.gclid.as_deref(), Some("Cj0"));
}

#[test]
fn an_event_without_id_is_one_event_for_ten_seconds_and_survives_json() {
    let (a, b) = (accept(|d| d.label = Some("x".into())), accept(|d| d.label = Some("x".into())));
    assert_eq!(a.id, b.id);
    assert_ne!(a.id, accept(|d| d.label = Some("y".into())).id);
    let json = serde_json::to_string(&a).unwrap_or_default();
    assert_eq!(serde_json::from_str::<Event>(&json).ok(), Some(a));
}

#[test]
fn imported_history_is_placed_by_when_it_happened_and_keeps_when_it_came() {
    let came = arrival().received_at.trunc_subsecs(6);
    let earliest = came - Months::new(IMPORT_MONTHS);
    let second = TimeDelta::seconds(1);
    let import = |at: DateTime<Utc>, client: Option<DateTime<Utc>>| {
        #[allow(clippy::cast_precision_loss)]
        let client_time_ms = client.map(|client| client.timestamp_millis() as f64);
        let draft = draft(|d| (d.occurred_at, d.client_time_ms) = (Some(at), client_time_ms));
        Event::accept(site(), draft, &arrival(), NAMES)
    };
    for inside in [earliest, earliest + second, came, came + TimeDelta::minutes(2)] {
        let event = import(inside, None).expect("inside of the window");
        assert_eq!((event.received_at, event.imported_at, event.occurred_at), (inside, Some(came), inside));
        assert_eq!((event.arrived_at(), event.defect()), (came, None));
    }
    for outside in [earliest - second, came + TimeDelta::minutes(2) + second, DateTime::<Utc>::MIN_UTC] {
        let refused = import(outside, None).expect_err("outside of the window");
        assert_eq!((refused.reason.code(), refused.field.as_ref()), ("out_of_range", "occurred_at"));
    }
    let day = TimeDelta::days(1);
    let event = import(came - day * 300, Some(came)).expect("inside of the window");
    assert_eq!(event.occurred_at, event.received_at, "the client's clock orders, within the day before");
    let event = import(came - day * 300, Some(came - day * 305)).expect("inside of the window");
    assert_eq!(event.occurred_at, event.received_at - day);
}

#[test]
fn an_import_without_ids_is_the_same_again_whenever_it_is_repeated() {
    let happened = arrival().received_at - TimeDelta::days(40);
    let id = |at: DateTime<Utc>, later: i64| {
        let arrival = Arrival::at(arrival().received_at + TimeDelta::seconds(later));
        Event::accept(site(), draft(|d| d.occurred_at = Some(at)), &arrival, NAMES).expect("a whole draft").id
    };
    assert_eq!(id(happened, 0), id(happened, 3600));
    assert_ne!(id(happened, 0), id(happened + TimeDelta::seconds(1), 0), "two moments are two events");
    assert_ne!(id(arrival().received_at, 0), accept(|_| {}).id);
}
