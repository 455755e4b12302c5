//! Messages of gRPC: any bytes into the domain, and what was accepted back out.
#![no_main]

use chrono::{DateTime, TimeDelta};
use libfuzzer_sys::fuzz_target;
use opsmantik_fuzz::domain::call::ClickIdKind;
use opsmantik_fuzz::domain::event::{Event, FieldNames};
use opsmantik_fuzz::domain::push::{Draft, Duration, Push};
use opsmantik_fuzz::domain::refusal::Refusal;
use opsmantik_fuzz::grpc::proto::pushed_call::Duration as WireDuration;
use opsmantik_fuzz::grpc::{self, proto};
use opsmantik_fuzz::{SITE, check_event, now};
use prost::Message;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

/// As the door reads it, but for its enums.
fn push(call: &proto::PushedCall) -> Result<Push, Refusal> {
    let key = call.key.clone().unwrap_or_default();
    let draft = Draft {
        provider: key.provider,
        provider_call_id: key.provider_call_id,
        dialled_number: call.dialled_number.clone(),
        caller_number: call.caller_number.clone(),
        started_at: call
            .started_at
            .and_then(|time| DateTime::from_timestamp(time.seconds, time.nanos.try_into().ok()?)),
        duration: call.duration.clone().map(|duration| match duration {
            WireDuration::DurationSeconds(seconds) => Duration::Seconds(seconds),
            WireDuration::DurationText(text) => Duration::Text(text),
        }),
        recording_reference: call.recording_reference.clone(),
        fingerprint: call.fingerprint.clone(),
        click_id: call.click_id.clone().map(|id| (Some(ClickIdKind::Gclid), id.value)),
        ..Draft::default()
    };
    Push::accept(SITE, draft, Some("TR"), now(), |_| [7; 32])
}

fn check_push(push: &Push) {
    assert_eq!(push.key.site_id(), SITE);
    assert!(!push.key.provider().contains(['\0', '\n']) && !push.key.provider().is_empty());
    assert!(!push.key.provider_call_id().is_empty() && !push.key.provider_call_id().contains('\0'));
    assert!(push.dialled.as_str().starts_with('+') && push.dialled.as_str().len() <= 16, "{:?}", push.dialled);
    assert!(push.duration_sec.is_none_or(|seconds| seconds <= 24 * 60 * 60));
    assert!(push.started_at <= now() + TimeDelta::minutes(2));
    let texts = [&push.fingerprint, &push.recording];
    assert!(texts.into_iter().flatten().all(|text| !text.is_empty() && text.len() <= 2048 && !text.contains('\0')));
}

fuzz_target!(|bytes: &[u8]| {
    let (id, site) = grpc::envelope(bytes);
    assert!(id.is_empty() || id.parse::<uuid::Uuid>().is_ok());
    if let Ok(call) = proto::PushedCall::decode(bytes) {
        let push = push(&call);
        assert_eq!(push, self::push(&call), "the same bytes, the same call");
        if let Ok(push) = push {
            check_push(&push);
        }
    }
    let read = grpc::read_event(bytes, now());
    let again = grpc::read_event(bytes, now());
    assert_eq!(format!("{read:?}"), format!("{again:?}"), "the same bytes, the same draft");
    let (draft, arrival) = match read {
        Ok(read) => read,
        Err(refusal) => {
            assert!(refusal.message.len() < 512, "a calm sentence: {refusal}");
            return;
        }
    };
    assert!(bytes.len() <= 64 << 10, "larger ones are refused");
    assert!(!site.is_empty() && (draft.id.clone().unwrap_or_default() == id), "what is answered is what was read");
    let Ok(event) = Event::accept(SITE, draft, &arrival, NAMES) else { return };
    // Imported history is another moment's; all else is now's.
    if event.imported_at.is_none() {
        check_event(&event);
    }
    assert_eq!(event.defect(), None);
    let shown = grpc::stored(&event);
    let told = proto::StoredEvent::decode(shown.encode_to_vec().as_slice()).expect("what is shown can be decoded");
    assert_eq!(told, shown);
    // What is open comes back as it was shown.
    let back = proto::Event { site, metadata: told.metadata.clone(), ..proto::Event::default() }.encode_to_vec();
    if back.len() <= 64 << 10 {
        let (back, _) = grpc::read_event(&back, now()).expect("what is shown can be sent and read");
        assert_eq!(back.meta, event.metadata);
    }
    assert_eq!((told.id, &told.url, &told.category), (event.id.to_string(), &event.url, &event.category));
    assert_eq!((&told.action, &told.label, told.value), (&event.action, &event.label, event.value));
    let score = told.score.expect("a score");
    assert_eq!(score.value, u32::from(event.signals.score().get()));
    assert!(score.breakdown.iter().map(|line| line.points).sum::<u32>() >= score.value);
});
