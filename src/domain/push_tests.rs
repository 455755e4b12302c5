//! What is accepted as a push, what is refused, and by which field.

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::domain::refusal::RefusalReason::{self, InvalidField, MissingField, OutOfRange};

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("the test writes RFC 3339")
}

fn draft() -> Draft {
    Draft {
        provider: "Twilio".into(),
        provider_call_id: "CA-1".into(),
        dialled_number: "0212 000 00 00".into(),
        started_at: Some(at("2026-03-31T12:00:00.123456789Z")),
        ..Draft::default()
    }
}

fn accept(draft: Draft) -> Result<Push, Refusal> {
    let received_at = at("2026-03-31T12:01:00Z");
    Push::accept(SiteId::from_uuid(Uuid::from_u128(7)), draft, Some("TR"), received_at, |number| {
        let mut hash = [0; 32];
        hash[..number.as_str().len()].copy_from_slice(number.as_str().as_bytes());
        hash
    })
}

fn accepted(fill: impl FnOnce(&mut Draft)) -> Push {
    let mut draft = draft();
    fill(&mut draft);
    accept(draft).expect("the draft has all it needs")
}

#[test]
fn the_least_push_says_nothing_that_it_does_not_know() {
    let push = accepted(|_| {});
    let key = (push.key.provider(), push.key.provider_call_id());
    assert_eq!(key, ("twilio", "CA-1"));
    assert_eq!(push.dialled.as_str(), "+902120000000");
    assert_eq!(push.started_at, at("2026-03-31T12:00:00.123456Z"), "PostgreSQL keeps microseconds");
    assert_eq!((push.channel, push.direction, push.status), (None, None, None));
    assert_eq!((push.caller, push.duration_sec, push.recording), (None, None, None));
    assert_eq!((push.fingerprint, push.click_id), (None, None));
}

#[test]
fn a_push_that_cannot_be_read_is_refused_by_its_field() {
    type Fill = fn(&mut Draft);
    let cases: [(Fill, RefusalReason, &str); 26] = [
        (|d| d.provider = String::new(), MissingField, "key.provider"),
        (|d| d.provider = "twi lio".into(), InvalidField, "key.provider"),
        (|d| d.provider = "twïlio".into(), InvalidField, "key.provider"),
        (|d| d.provider = "x".repeat(65), OutOfRange, "key.provider"),
        (|d| d.provider_call_id = String::new(), MissingField, "key.provider_call_id"),
        (|d| d.provider_call_id = " \n".into(), MissingField, "key.provider_call_id"),
        (|d| d.provider_call_id = "a\0".into(), InvalidField, "key.provider_call_id"),
        (|d| d.provider_call_id = "x".repeat(257), OutOfRange, "key.provider_call_id"),
        (|d| d.dialled_number = " ".into(), MissingField, "dialled_number"),
        (|d| d.dialled_number = "reception".into(), InvalidField, "dialled_number"),
        (|d| d.dialled_number = "anonymous".into(), InvalidField, "dialled_number"),
        (|d| d.started_at = None, MissingField, "started_at"),
        (|d| d.started_at = Some(at("2024-03-31T12:00:59.999999999Z")), OutOfRange, "started_at"),
        (|d| d.started_at = Some(at("2026-03-31T12:03:00.000000001Z")), OutOfRange, "started_at"),
        (|d| d.started_at = Some(DateTime::<Utc>::MAX_UTC), OutOfRange, "started_at"),
        (|d| d.duration = Some(Duration::Seconds(86_401)), OutOfRange, "duration_seconds"),
        (|d| d.duration = Some(Duration::Text("24:00:01".into())), OutOfRange, "duration_text"),
        (|d| d.duration = Some(Duration::Text("three minutes".into())), InvalidField, "duration_text"),
        (|d| d.recording_reference = Some("x".repeat(2049)), OutOfRange, "recording_reference"),
        (|d| d.recording_reference = Some("https://u:p@rec.example/1".into()), InvalidField, "recording_reference"),
        (|d| d.click_id = Some((None, "x".into())), MissingField, "click_id.kind"),
        (|d| d.click_id = Some((Some(ClickIdKind::Gclid), String::new())), MissingField, "click_id.value"),
        (|d| d.click_id = Some((Some(ClickIdKind::Gclid), " \0 ".into())), MissingField, "click_id.value"),
        (|d| d.click_id = Some((Some(ClickIdKind::Gclid), "x".repeat(513))), OutOfRange, "click_id.value"),
        (|d| d.dialled_number = "+9999999999999".into(), InvalidField, "dialled_number"),
        (|d| d.dialled_number = "client:reception".into(), InvalidField, "dialled_number"),
    ];
    for (index, (fill, reason, field)) in cases.into_iter().enumerate() {
        let mut draft = draft();
        fill(&mut draft);
        let refusal = accept(draft).expect_err("the draft is bad");
        assert_eq!((refusal.reason, refusal.field.as_ref()), (reason, field), "case {index}");
        assert!(refusal.message.contains(&format!("`{field}`")) && !refusal.message.contains("reception"), "{refusal}");
    }
}

#[test]
fn bounds_are_still_inside() {
    for started_at in ["2024-03-31T12:01:00Z", "2026-03-31T12:03:00Z"] {
        assert_eq!(accepted(|d| d.started_at = Some(at(started_at))).started_at, at(started_at));
    }
    let leap = |started_at| super::started_at(Some(at(started_at)), at("2026-02-28T00:00:00Z")).is_ok();
    assert!(leap("2024-02-28T00:00:00Z") && !leap("2024-02-27T23:59:59Z"), "the same day of the month");
    assert_eq!(accepted(|d| d.duration = Some(Duration::Seconds(86_400))).duration_sec, Some(86_400));
    assert_eq!(accepted(|d| d.provider = "x".repeat(64)).key.provider().len(), 64);
    assert_eq!(accepted(|d| d.provider_call_id = "x".repeat(256)).key.provider_call_id().len(), 256);
    assert!(accepted(|d| d.recording_reference = Some("x".repeat(2048))).recording.is_some());
    let longest = Some((Some(ClickIdKind::Fbclid), "x".repeat(512)));
    assert!(accepted(|d| d.click_id = longest).click_id.is_some());
}

#[test]
fn a_duration_is_read_in_each_of_its_forms() {
    for (text, expected) in [
        ("192", Some(192)),
        ("0", Some(0)),
        (" 192s ", Some(192)),
        ("192S", Some(192)),
        ("3:12", Some(192)),
        ("03:12", Some(192)),
        ("90:00", Some(5400)),
        ("00:03:12", Some(192)),
        ("0:03:12", Some(192)),
        ("24:00:00", Some(86_400)),
        ("PT3M12S", Some(192)),
        ("pt3m12s", Some(192)),
        ("PT1H", Some(3600)),
        ("PT1H2S", Some(3602)),
        ("PT192S", Some(192)),
        ("PT0S", Some(0)),
        ("PT3M12.9S", Some(192)),
        ("", None),
        ("  ", None),
    ] {
        let read = seconds(Duration::Text(text.into())).map_err(|refusal| refusal.reason);
        assert_eq!(read, Ok(expected), "{text:?}");
    }
    for text in [
        "s", "-1", "+5", "1.5", "1e3", "3:1", "3:60", "3:012", "1:60:00", "1:2:3", "1:2:3:4", ":12", "3:", "3:12s",
        "PT", "P", "P1D", "PT1", "PTS", "PT1S2M", "PT1M1M", "PT1.5M", "PT1.S", "PT.5S", "192 s", "١٢", "٣:١٢", "ptş",
    ] {
        let read = seconds(Duration::Text(text.into())).map_err(|refusal| refusal.reason);
        assert_eq!(read, Err(InvalidField), "{text:?}");
    }
    for text in ["86401", "99999999999999999999999", "99999999999999999999:00", "PT25H", "PT99999999999999999999H"] {
        let read = seconds(Duration::Text(text.into())).map_err(|refusal| refusal.reason);
        assert_eq!(read, Err(OutOfRange), "{text:?}");
    }
}

#[test]
fn a_recording_has_no_credentials_in_it() {
    for reference in [
        "https://user:secret@rec.example/1",
        "https://user@rec.example/1",
        "https://:secret@rec.example/1",
        "HTTPS:\\\\user:secret@rec.example\\1",
        "ftp://user:secret@rec.example",
        "//user:secret@rec.example/1",
        "user:secret@rec.example/1.mp3",
        "sip:user:secret@rec.example",
        "s3://key:secret@bucket/1",
    ] {
        assert!(recording(Some(reference.into())).is_err(), "{reference}");
    }
    for reference in [
        "RE0123456789abcdef",
        "https://rec.example/1?by=a@b.example",
        "https://rec.example/a@b:c",
        "3848276298220188511@192.0.2.1",
        "s3://bucket/2026/03/1.mp3",
        "/var/rec/1.wav",
        "arn:aws:s3:::bucket/1",
    ] {
        assert_eq!(recording(Some(format!(" {reference}\0"))).ok().flatten().as_deref(), Some(reference));
    }
    assert_eq!(recording(Some(" \0".into())).ok(), Some(None));
}

#[test]
fn the_caller_is_a_hash_and_two_digits_or_nobody() {
    let of = |number: &str| accepted(|d| d.caller_number = Some(number.into())).caller;
    let caller = of("0555 000 00 42").expect("it is a number");
    assert!(caller.hash.starts_with(b"+905550000042"));
    assert_eq!(caller.last_digits, "42");
    assert_eq!(of("tel:+905550000042"), Some(caller));
    for hidden in ["", "anonymous", "Withheld", "+266696687", "client:alice", "\0"] {
        assert_eq!(of(hidden), None, "{hidden}");
    }
}

#[test]
fn the_fingerprint_is_cleaned_as_an_event_cleans_it() {
    let long = format!(" f\0p{}", "ü".repeat(300));
    let meta = serde_json::json!({ "fp": long }).as_object().cloned().unwrap_or_default();
    let event = crate::domain::event::Draft {
        url: Some("https://a.example/".into()),
        session: Some("s".into()),
        meta,
        ..Default::default()
    };
    let names = crate::domain::event::FieldNames { url: "u", session: "sid" };
    let arrival = crate::domain::event::Arrival::at(at("2026-03-31T12:00:00Z"));
    let event = crate::domain::event::Event::accept(SiteId::from_uuid(Uuid::from_u128(7)), event, &arrival, names);
    let push = accepted(|d| d.fingerprint = Some(long));
    assert_eq!(push.fingerprint, event.expect("it has all it needs").fingerprint);
    assert!(push.fingerprint.is_some());
    assert_eq!(accepted(|d| d.fingerprint = Some(" ".into())).fingerprint, None);
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>(), form in "[pPtT0-9hHmMsS:., -]{0,12}") {
        let _ = seconds(Duration::Text(text.clone()));
        let _ = seconds(Duration::Text(form));
        let mut draft = draft();
        draft.dialled_number = text.clone();
        draft.provider_call_id = text.clone();
        draft.recording_reference = Some(text.clone());
        draft.click_id = Some((Some(ClickIdKind::Dclid), text.clone()));
        draft.caller_number = Some(text);
        let _ = accept(draft);
    }
}
