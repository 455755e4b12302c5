use chrono::DateTime;
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::domain::refusal::RefusalReason;

fn site() -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(7))
}

fn arrival() -> Arrival {
    Arrival::at(DateTime::from_timestamp(1_790_000_000, 0).unwrap_or_default())
}

fn one(body: impl AsRef<[u8]>) -> WireEvent {
    match read(body.as_ref()) {
        Ok(Body::One(event)) => *event,
        other => panic!("not one event: {other:?}"),
    }
}

fn batch(body: impl AsRef<[u8]>) -> Vec<WireEvent> {
    match read(body.as_ref()) {
        Ok(Body::Batch(events)) => events,
        other => panic!("not a batch: {other:?}"),
    }
}

fn accepted(body: impl AsRef<[u8]>) -> Event {
    one(body).accept(site(), &arrival()).expect("an event that has all it needs")
}

fn refused(body: impl AsRef<[u8]>) -> (RefusalReason, String) {
    let refusal = match read(body.as_ref()) {
        Err(refusal) => refusal,
        Ok(Body::One(event)) => match event.site.clone() {
            Err(refusal) => refusal,
            Ok(_) => event.accept(site(), &arrival()).expect_err("nothing was refused"),
        },
        Ok(Body::Batch(_)) => panic!("a batch is refused event by event"),
    };
    (refusal.reason, refusal.field.into_owned())
}

#[test]
fn every_key_of_the_vocabulary_is_read() {
    let id = "0190b1c2-0000-7000-8000-00000000000a";
    let event = accepted(
        json!({"id": id, "s": "pub", "url": "https://a.example/?gclid=Z", "sid": 42, "sm": "2026-09-01", "ec": "interaction",
            "ea": "scroll_depth", "el": 50, "ev": "90", "r": "https://www.google.com/", "ts": 1_789_999_999_000_u64,
            "meta": {"fp": "F", "both": "meta"}, "both": "top", "new": [1], "gone": null})
        .to_string(),
    );
    assert_eq!(event.id.to_string(), id);
    assert_eq!((event.category.as_str(), event.action.as_str()), ("interaction", "scroll_depth"));
    assert_eq!((event.label.as_deref(), event.value), (Some("50"), Some(90.0)));
    assert_eq!(event.signals.score().get(), 45, "interaction, both scroll depths, Google");
    assert_eq!(event.occurred_at.timestamp(), 1_789_999_999);
    assert_eq!((event.fingerprint.as_deref(), event.click_ids.gclid.as_deref()), (Some("F"), Some("Z")));
    let kept = json!({"fp": "F", "both": "meta", "new": [1]});
    assert_eq!(Value::Object(event.metadata), kept, "unknown keys are kept, meta wins, null is absent");
}

#[test]
fn optional_fields_of_a_wrong_type_are_kept_but_not_used() {
    let event = accepted(
        r#"{"s":"p","u":"https://a.example/","sid":"1","el":{"a":1},"ev":"many","meta":"text","ec":null,"ts":[]}"#,
    );
    assert_eq!((event.label, event.value, event.category.as_str()), (None, None, "unknown"));
    assert_eq!(Value::Object(event.metadata), json!({"el": {"a": 1}, "ev": "many", "meta": "text", "ts": []}));
    let both = accepted(r#"{"s":"p","u":"https://a.example/1","url":"https://a.example/2","sid":"1"}"#);
    assert_eq!(both.url, "https://a.example/1");
    assert_eq!(both.metadata.get("url"), Some(&json!("https://a.example/2")));
    assert_eq!(accepted(r#"{"s":"p","u":"","url":"https://a.example/2","sid":"1"}"#).url, "https://a.example/2");
}

#[test]
fn a_refusal_names_its_reason_and_field() {
    use RefusalReason::{EventTooLarge, InvalidField, InvalidJson, MissingField};
    for (body, reason, field) in [
        ("", InvalidJson, "body"),
        ("{", InvalidJson, "body"),
        ("hello", InvalidJson, "body"),
        ("{\"s\":\"p\"} x", InvalidJson, "body"),
        ("[]", InvalidField, "body"),
        ("5", InvalidField, "body"),
        ("{}", MissingField, "s"),
        (r#"{"s":null}"#, MissingField, "s"),
        (r#"{"s":" "}"#, MissingField, "s"),
        (r#"{"s":["p"]}"#, InvalidField, "s"),
        (r#"{"s":"p","sid":"1"}"#, MissingField, "u"),
        (r#"{"s":"p","sid":"1","url":""}"#, MissingField, "url"),
        (r#"{"s":"p","sid":"1","u":{}}"#, InvalidField, "u"),
        (r#"{"s":"p","u":"https://a.example/"}"#, MissingField, "sid"),
        (r#"{"s":"p","u":"https://a.example/","sid":[]}"#, InvalidField, "sid"),
        (r#"{"events":{}}"#, InvalidField, "events"),
        (r#"{"events":[]}"#, InvalidField, "events"),
    ] {
        assert_eq!(refused(body), (reason, field.to_owned()), "{body}");
    }
    let deep =
        format!(r#"{{"s":"p","u":"https://a.example/","sid":"1","meta":{}{}}}"#, "[".repeat(999), "]".repeat(999));
    assert_eq!(refused(deep).0, InvalidJson, "nested too deeply");
    let large = json!({"s": "p", "u": "https://a.example/", "sid": "1", "el": "x".repeat(MAX_EVENT)}).to_string();
    let event = one(&large);
    assert_eq!(event.site.as_deref(), Ok("p"), "the site decides who may read it");
    assert_eq!(event.accept(site(), &arrival()).map_err(|refusal| refusal.reason), Err(EventTooLarge));
    let many = format!(r#"{{"events":[{}]}}"#, vec!["{}"; MAX_BATCH + 1].join(","));
    assert_eq!(refused(many), (InvalidField, "events".to_owned()));
}

#[test]
fn an_event_has_exactly_64_kib() {
    let sized = |size: usize| {
        let empty = r#"{"s":"p","u":"https://a.example/","sid":"1","x":""}"#;
        empty.replace(r#""x":"""#, &format!(r#""x":"{}""#, "y".repeat(size - empty.len())))
    };
    assert!(one(sized(MAX_EVENT)).accept(site(), &arrival()).is_ok());
    assert!(one(sized(MAX_EVENT + 1)).accept(site(), &arrival()).is_err());
}

#[test]
fn a_bad_event_of_a_batch_is_refused_alone_and_by_its_place() {
    let good = json!({"s": "p", "u": "https://a.example/", "sid": "1"});
    let large = json!({"id": "big", "s": "p", "el": "x".repeat(MAX_EVENT)});
    let body = json!({"events": [good, 5, {"s": "p", "id": "c", "sid": "1"}, large, {"u": "x", "sid": "1"}, good]});
    let events = batch(body.to_string());
    let named: Vec<_> = events.iter().map(|event| event.event_id(site())).collect();
    assert_eq!(named[2], Some(EventId::from_text(site(), "c")));
    assert_eq!(named[3], Some(EventId::from_text(site(), "big")), "also of one that is too large");
    assert_eq!(events[4].site.as_ref().map_err(|refusal| refusal.field.to_string()), Err("events[4].s".to_owned()));
    let fields: Vec<_> = events
        .into_iter()
        .map(|event| event.accept(site(), &arrival()).err().map(|refusal| refusal.field.into_owned()))
        .collect();
    let refused = |field: &str| Some(field.to_owned());
    assert_eq!(fields[..4], [None, refused("events[1]"), refused("events[2].u"), refused("events[3]")]);
    assert_eq!(fields[5], None);
}

#[test]
fn what_old_browsers_send_is_survived() {
    let event =
        accepted(r#"{"s":"p","u":"https://a.example/","sid":"1","el":"cut \ud83d","x\ude00":"\ud83d\ude00\\ud83d"}"#);
    assert_eq!(event.label.as_deref(), Some("cut \u{fffd}"));
    assert_eq!(event.metadata.get("x\u{fffd}"), Some(&json!("😀\\ud83d")), "whole pairs and plain text stay");
    let broken = accepted(b"\xef\xbb\xbf{\"s\":\"p\",\"u\":\"https://a.example/\",\"sid\":\"1\",\"el\":\"a\xffb\"}\n");
    assert_eq!(broken.label.as_deref(), Some("a\u{fffd}b"));
    let events = batch(r#"{"events":[{"s":"p","u":"https://a.example/","sid":"1","el":"\ud83d\u0041"}]}"#);
    let labels: Vec<_> =
        events.into_iter().map(|event| event.accept(site(), &arrival()).ok().and_then(|event| event.label)).collect();
    assert_eq!(labels, [Some("\u{fffd}A".to_owned())]);
}

#[test]
fn a_number_beyond_a_double_is_kept_as_text_and_costs_no_event() {
    let digits = "9".repeat(400);
    let event = accepted(format!(
        r#"{{"s":"p","u":"https://a.example/?n=1e999","sid":"1","el":"-1e999 \"9e999","x":1e400,"meta":{{"big":[{digits},-2.5E+400,7]}}}}"#
    ));
    assert_eq!(event.label.as_deref(), Some(r#"-1e999 "9e999"#), "text is left as it is");
    assert_eq!(event.url, "https://a.example/?n=1e999");
    assert_eq!(event.metadata["x"], json!("1e400"));
    assert_eq!(event.metadata["big"], json!([digits, "-2.5E+400", 7]));
}

proptest::proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = read(&bytes);
    }

    #[test]
    fn no_text_of_json_characters_panics(text in r#"[\[\]{}",:\\u0-9a-eds😀 ]{0,60}"#) {
        let _ = mended(&text);
        if let Ok(Body::One(event)) = read(format!(r#"{{"s":"p","u":"x","sid":"1","k":"{text}"}}"#).as_bytes()) {
            let _ = event.accept(site(), &arrival());
        }
    }
}
