//! Each field of the wire lands where it belongs, and no bytes are a reason to panic.

use proptest::prelude::*;
use prost_types::{ListValue, Struct, Timestamp};
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::domain::attribution::Attribution;
use crate::domain::event::{Event, FieldNames};
use crate::domain::id::SiteId;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_795_000_000, 0).unwrap_or_default()
}

fn whole() -> proto::Event {
    proto::Event {
        site: "demo".to_owned(),
        url: "https://a.example/".to_owned(),
        session_id: "s1".to_owned(),
        ..proto::Event::default()
    }
}

fn accept(event: proto::Event) -> Result<Event, Refusal> {
    read_and_accept(&event.encode_to_vec())
}

fn read_and_accept(event: &[u8]) -> Result<Event, Refusal> {
    let (draft, arrival) = read(event, now())?;
    Event::accept(SiteId::from_uuid(Uuid::from_u128(7)), draft, &arrival, NAMES)
}

fn accepted(fill: impl FnOnce(&mut proto::Event)) -> Event {
    let mut event = whole();
    fill(&mut event);
    accept(event).expect("the event has all it needs")
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn value(kind: Kind) -> prost_types::Value {
    prost_types::Value { kind: Some(kind) }
}

fn metadata(fields: impl IntoIterator<Item = (&'static str, Kind)>) -> Option<Struct> {
    let fields = fields.into_iter().map(|(key, kind)| (key.to_owned(), value(kind))).collect();
    Some(Struct { fields })
}

#[test]
fn every_field_lands_where_it_belongs() {
    let event = accepted(|e| {
        e.id = some("0190B1C200007000800000000000000A");
        e.session_month_hint = some("2026-11-01");
        e.category = "conversion".to_owned();
        e.action = "phone_call".to_owned();
        e.label = some("tel:+901234567");
        e.value = Some(1.5);
        e.referrer = some("https://www.google.com/");
        e.fingerprint = some("f1");
        e.intent_stamp = some("i1");
        e.intent_action = some("call");
        e.click_ids = Some(proto::ClickIds {
            gclid: some("G"),
            wbraid: some("W"),
            gbraid: some(""),
            others: [("FBCLID".to_owned(), "F".to_owned())].into(),
        });
        e.client_hints = Some(proto::ClientHints {
            language: some("tr-TR"),
            memory_gib: Some(0.5),
            processors: Some(8),
            screen_width: Some(390),
            screen_height: Some(844),
            device_pixel_ratio: Some(f64::NAN),
            gpu: some("Mali"),
            connection_type: some("4g"),
        });
        e.geo = Some(proto::Geo {
            city: some("Izmir"),
            district: some("Konak"),
            country: some("TR"),
            timezone: some("Europe/Istanbul"),
        });
        e.gauges = Some(proto::Gauges {
            duration_sec: Some(60),
            scroll_pct: Some(40),
            cta_hovers: Some(0),
            focus_dur: Some(50),
            active_sec: Some(u32::MAX),
            exit_page: some("https://a.example/bye"),
        });
        e.client_time = Some(Timestamp { seconds: 1_795_000_000 - 60, nanos: 250_000_000 });
        e.user_agent = some(
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.0 Mobile/15E148 Safari/604.1",
        );
        e.client_ip = some("203.0.113.77:443");
        e.metadata = metadata([("gclid", Kind::StringValue("old".to_owned())), ("cart", Kind::NumberValue(3.0))]);
    });

    assert_eq!(event.id.to_string(), "0190b1c2-0000-7000-8000-00000000000a");
    assert_eq!(event.month_hint.map(|month| month.to_string()).as_deref(), Some("2026-11-01"));
    assert_eq!((event.category.as_str(), event.action.as_str()), ("conversion", "phone_call"));
    assert_eq!((event.label.as_deref(), event.value), (Some("tel:+901234567"), Some(1.5)));
    assert_eq!(event.referrer.as_deref(), Some("https://www.google.com/"));
    assert_eq!(event.fingerprint.as_deref(), Some("f1"));
    assert_eq!((event.click_ids.gclid.as_deref(), event.click_ids.wbraid.as_deref()), (Some("G"), Some("W")));
    assert_eq!((event.click_ids.gbraid.as_deref(), event.click_ids.fbclid.as_deref()), (None, Some("F")));
    assert_eq!(event.language.as_deref(), Some("tr-TR"));
    assert_eq!(event.geo.city.as_deref(), Some("Izmir"));
    assert_eq!((event.gauges.duration_sec, event.gauges.scroll_pct), (Some(60), Some(40)));
    assert_eq!((event.gauges.cta_hovers, event.gauges.active_sec), (Some(0), Some(1_000_000_000)));
    assert_eq!(event.exit_page, "https://a.example/bye");
    assert_eq!((event.received_at - event.occurred_at).num_milliseconds(), 59_750);
    assert_eq!(event.device.as_ref().map(|device| device.kind.as_str()), Some("mobile"));
    assert_eq!(event.ip.as_ref().map(|ip| ip.as_str()), Some("203.0.113.0"));
    assert_eq!(event.signals.score().get(), 55, "a conversion from Google");
    assert_eq!(
        Value::Object(event.metadata),
        json!({
            "fp": "f1", "intent_stamp": "i1", "intent_action": "call", "gclid": "G", "wbraid": "W", "fbclid": "F",
            "lan": "tr-TR", "mem": 0.5, "con": 8, "sw": 390, "sh": 844, "gpu": "Mali", "con_type": "4g",
            "city": "Izmir", "district": "Konak", "country": "TR", "timezone": "Europe/Istanbul",
            "duration_sec": 60, "scroll_pct": 40, "cta_hovers": 0, "focus_dur": 50, "active_sec": u32::MAX,
            "exit_page": "https://a.example/bye", "cart": 3,
        })
    );
}

#[test]
fn metadata_becomes_the_json_that_the_other_door_would_store() {
    let list = ListValue { values: vec![value(Kind::BoolValue(true)), prost_types::Value { kind: None }] };
    let event = accepted(|e| {
        e.metadata = metadata([
            ("n", Kind::NumberValue(f64::INFINITY)),
            ("whole", Kind::NumberValue(-2.0)),
            ("part", Kind::NumberValue(2.5)),
            ("huge", Kind::NumberValue(1e300)),
            ("list", Kind::ListValue(list)),
            (
                "inner",
                Kind::StructValue(metadata([("nul\0", Kind::StringValue("a\0b".to_owned()))]).unwrap_or_default()),
            ),
        ]);
    });
    assert_eq!(
        Value::Object(event.metadata),
        json!({"n": null, "whole": -2, "part": 2.5, "huge": 1e300, "list": [true, null], "inner": {"nul": "ab"}})
    );
}

#[test]
fn other_click_ids_are_kept_and_decide_nothing() {
    let others = [("scroll_pct", "99"), ("fp", "f9"), ("affid", "a1"), ("cart", "x")];
    let others = others.map(|(name, id)| (name.to_owned(), id.to_owned())).into();
    let event = accepted(|e| {
        e.click_ids = Some(proto::ClickIds { others, ..proto::ClickIds::default() });
        e.metadata = metadata([("cart", Kind::NumberValue(3.0))]);
    });
    assert_eq!((event.signals, event.fingerprint), (SignalSet::EMPTY, None));
    assert_eq!(Value::Object(event.metadata), json!({"affid": "a1", "cart": 3}));
}

#[test]
fn what_is_absent_stays_absent() {
    let event = accepted(|e| e.client_ip = some("unknown"));
    assert_eq!((event.category.as_str(), event.action.as_str()), ("unknown", "unknown"));
    assert_eq!((event.ip, event.device, event.value, event.occurred_at), (None, None, None, event.received_at));
    assert!(event.metadata.is_empty());
    let again = accepted(|e| e.client_ip = some("unknown"));
    assert_eq!(event.id, again.id, "an event without an id has a derived one");
}

type Fill = fn(&mut proto::Event);

fn nested(depth: usize) -> Struct {
    let innermost = value(Kind::BoolValue(true));
    let wrap = |inner, _| value(Kind::ListValue(ListValue { values: vec![inner] }));
    Struct { fields: [("deep".to_owned(), (1..depth).fold(innermost, wrap))].into() }
}

#[test]
fn metadata_may_be_deep_but_not_bottomless() {
    assert!(accepted(|e| e.metadata = Some(nested(MAX_DEPTH))).metadata.contains_key("deep"));
}

#[test]
fn bytes_that_are_no_event_are_refused_and_the_envelope_is_read_up_to_the_damage() {
    let named = proto::Event { id: Some(Uuid::from_u128(7).simple().to_string()), ..whole() };
    let deep = proto::Event { metadata: metadata([("in", Kind::StructValue(nested(50)))]), ..named.clone() };
    let deep = [named.encode_to_vec(), deep.encode_to_vec()].concat();
    let damaged = [named.encode_to_vec(), b"\x42\x02\xff\xff\x12\x04late".to_vec()].concat();
    let long = [named.encode_to_vec(), vec![0; MAX_EVENT]].concat();
    for (bytes, reason, said, site) in [
        (deep, RefusalReason::InvalidField, "nested too deeply", "demo"),
        (damaged, RefusalReason::InvalidField, "Event.label", "late"),
        (long, RefusalReason::EventTooLarge, "over 64 KiB", "demo"),
    ] {
        let refusal = read_and_accept(&bytes).expect_err("it is no event");
        assert_eq!((refusal.reason, refusal.field.as_ref()), (reason, ""));
        assert!(refusal.message.contains(said), "{refusal}");
        let envelope = Envelope::of(&bytes);
        assert_eq!((envelope.event_id(), envelope.site()), (Uuid::from_u128(7).to_string(), site));
    }
}

#[test]
fn what_cannot_be_an_event_is_refused_and_the_field_is_named() {
    let refused: [(Fill, RefusalReason, &str); 12] = [
        (|e| e.id = some("order-17"), RefusalReason::InvalidField, "id"),
        (|e| e.id = some(""), RefusalReason::InvalidField, "id"),
        (|e| e.site = " ".to_owned(), RefusalReason::MissingField, "site"),
        (|e| e.url = String::new(), RefusalReason::MissingField, "url"),
        (|e| e.url = "\0".to_owned(), RefusalReason::InvalidField, "url"),
        (|e| e.session_id = String::new(), RefusalReason::MissingField, "session_id"),
        (|e| e.occurred_at = Some(Timestamp::default()), RefusalReason::OutOfRange, "occurred_at"),
        (
            |e| e.occurred_at = Some(Timestamp { seconds: 253_402_300_800, nanos: 0 }),
            RefusalReason::InvalidField,
            "occurred_at",
        ),
        (
            |e| e.occurred_at = Some(Timestamp { seconds: 1_795_000_000, nanos: -1 }),
            RefusalReason::InvalidField,
            "occurred_at",
        ),
        (
            |e| e.occurred_at = Some(Timestamp { seconds: 1_795_000_000, nanos: 1_000_000_000 }),
            RefusalReason::InvalidField,
            "occurred_at",
        ),
        (|e| e.label = Some("x".repeat(64 << 10)), RefusalReason::EventTooLarge, ""),
        (|e| e.metadata = Some(nested(MAX_DEPTH + 1)), RefusalReason::InvalidField, "metadata"),
    ];
    for (fill, reason, field) in refused {
        let mut event = whole();
        fill(&mut event);
        let refusal = accept(event).expect_err("it cannot be an event");
        assert_eq!((refusal.reason, refusal.field.as_ref()), (reason, field), "{refusal}");
    }
}

#[test]
fn the_time_of_imported_history_lands_in_the_event() {
    let seconds = now().timestamp() - 86_400 * 300;
    let event = accepted(|e| e.occurred_at = Some(Timestamp { seconds, nanos: 123_456_789 }));
    assert_eq!(event.received_at.timestamp_micros(), seconds * 1_000_000 + 123_456);
    assert_eq!(event.imported_at, Some(now()));
    let event = accepted(|e| e.metadata = metadata([("occurred_at", Kind::StringValue("2025-01-01".to_owned()))]));
    assert_eq!((event.received_at, event.imported_at), (now(), None), "only the field itself is believed");
    assert_eq!(event.metadata["occurred_at"], "2025-01-01");
}

#[test]
fn a_placement_tells_key_score_and_attribution() {
    use crate::domain::id::{SessionId, SessionKey};
    let session = SessionKey {
        site_id: SiteId::from_uuid(Uuid::from_u128(1)),
        month: "2026-11-01".parse().expect("a month"),
        id: SessionId::from_uuid(Uuid::from_u128(2)),
    };
    let own: SignalSet = [Signal::Scroll90].into_iter().collect();
    let receipt =
        Receipt { session, signals: own.with(Signal::PrimaryConversion), attribution: Attribution::AdsAssisted };
    let placement = placement(&receipt, own);
    let key = placement.session.clone().unwrap_or_default();
    assert_eq!(key.session_month, "2026-11-01");
    assert_eq!(key.site_id, "00000000-0000-0000-0000-000000000001");
    assert_eq!(key.session_id, "00000000-0000-0000-0000-000000000002");
    assert_eq!(placement.event_score.as_ref().map(|score| (score.value, score.breakdown.len())), Some((30, 2)));
    assert_eq!(placement.session_score.as_ref().map(|score| (score.value, score.breakdown.len())), Some((80, 3)));
    assert_eq!(placement.attribution(), proto::Attribution::AdsAssisted);
}

#[test]
fn every_signal_has_one_name_on_the_wire() {
    for known in Signal::ALL {
        assert_eq!(signal(wire_signal(known)), Some(known));
    }
}

/// Events made of awkward values: whatever the wire can carry, but more often whole than random bytes are.
fn awkward() -> impl Strategy<Value = proto::Event> {
    let text = || prop::option::of(".{0,40}");
    let texts = (text(), "\\PC{0,20}", ".{0,40}", ".{0,20}", text(), text(), text(), text());
    let numbers = (
        any::<Option<f64>>(),
        any::<Option<u32>>(),
        prop::option::of((any::<i64>(), any::<i32>())),
        prop::option::of((prop_oneof![0i64..80_000_000, any::<i64>()], prop_oneof![0..1_000_000_000, any::<i32>()])),
        prop::collection::vec((".{0,9}", any::<f64>()), 0..4),
    );
    (texts, numbers).prop_map(
        |((id, site, url, session_id, hint, label, agent, ip), (number, count, time, told, extra))| proto::Event {
            id,
            site,
            url,
            session_id,
            session_month_hint: hint,
            label,
            value: number,
            user_agent: agent,
            client_ip: ip,
            gauges: Some(proto::Gauges { scroll_pct: count, active_sec: count, ..proto::Gauges::default() }),
            client_hints: Some(proto::ClientHints { memory_gib: number, processors: count, ..Default::default() }),
            client_time: time.map(|(seconds, nanos)| Timestamp { seconds, nanos }),
            occurred_at: told.map(|(ago, nanos)| Timestamp { seconds: now().timestamp().saturating_sub(ago), nanos }),
            metadata: Some(Struct {
                fields: extra.into_iter().map(|(key, n)| (key, value(Kind::NumberValue(n)))).collect(),
            }),
            ..proto::Event::default()
        },
    )
}

fn holds(event: proto::Event) -> Result<(), TestCaseError> {
    let readable = event.id.as_deref().and_then(uuid);
    match accept(event) {
        Ok(event) => {
            prop_assert!(readable.is_none_or(|id| id == event.id));
            prop_assert!(event.occurred_at <= event.received_at);
            prop_assert_eq!(event.defect(), None);
            prop_assert_eq!(event.arrived_at(), now());
            let json = serde_json::to_string(&event);
            prop_assert!(json.is_ok_and(|json| !json.contains("\\u0000")));
        }
        Err(refusal) => prop_assert!(!refusal.message.is_empty()),
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_event_is_accepted_or_refused(event in awkward()) {
        holds(event)?;
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(event) = proto::Event::decode(bytes.as_slice()) {
            holds(event)?;
        }
        if let Ok(request) = proto::IngestRequest::decode(bytes.as_slice()) {
            for event in request.events {
                let _ = (Envelope::of(&event), read_and_accept(&event));
            }
        }
    }

    /// Bytes that were an event once get further into the decoder than random ones.
    #[test]
    fn damaged_events_are_survived(event in awkward(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut bytes = event.encode_to_vec();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = with;
        }
        if let Ok(event) = proto::Event::decode(bytes.as_slice()) {
            holds(event)?;
        }
    }
}
