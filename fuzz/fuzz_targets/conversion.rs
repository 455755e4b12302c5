//! Messages of gRPC: any bytes into the domain, and what was accepted back out.
#![no_main]

use chrono::TimeDelta;
use libfuzzer_sys::fuzz_target;
use opsmantik::domain::event::{Event, FieldNames};
use opsmantik::domain::push::Push;
use opsmantik::grpc::fuzz;
use opsmantik::grpc::proto;
use opsmantik_fuzz::{SITE, check_event, now};
use prost::Message;

const NAMES: FieldNames = FieldNames { url: "url", session: "session_id" };

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
    let (id, site) = fuzz::envelope(bytes);
    assert!(id.is_empty() || id.parse::<uuid::Uuid>().is_ok());
    let push = fuzz::read_push(bytes, SITE, now());
    assert_eq!(push, fuzz::read_push(bytes, SITE, now()), "the same bytes, the same call");
    if let Some(Ok(push)) = push {
        check_push(&push);
    }
    let read = fuzz::read_event(bytes, now());
    let again = fuzz::read_event(bytes, now());
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
    let meta = draft.meta.clone();

    // The open part goes out as it came in, and a second way round changes nothing.
    let out = proto::Event { site, metadata: Some(fuzz::wire_object(&meta)), ..proto::Event::default() };
    let out = out.encode_to_vec();
    if out.len() <= 64 << 10 {
        let (back, _) = fuzz::read_event(&out, now()).expect("what was read can be written and read");
        assert_eq!(back.meta, meta);
    }

    let Ok(event) = Event::accept(SITE, draft, &arrival, NAMES) else { return };
    // Imported history is another moment's; all else is now's.
    if event.imported_at.is_none() {
        check_event(&event);
    }
    assert_eq!(event.defect(), None);
    let shown = fuzz::stored(&event);
    let told = proto::StoredEvent::decode(shown.encode_to_vec().as_slice()).expect("what is shown can be decoded");
    assert_eq!(told, shown);
    assert_eq!((told.id, &told.url, &told.category), (event.id.to_string(), &event.url, &event.category));
    assert_eq!((&told.action, &told.label, told.value), (&event.action, &event.label, event.value));
    let score = told.score.expect("a score");
    assert_eq!(score.value, u32::from(event.signals.score().get()));
    assert!(score.breakdown.iter().map(|line| line.points).sum::<u32>() >= score.value);
});
