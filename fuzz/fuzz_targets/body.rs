//! The body of `/api/sync`, and a job out of a queue: any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use opsmantik_fuzz::domain::event::Event;
use opsmantik_fuzz::domain::job::Job;
use opsmantik_fuzz::http::wire::{self, Body, MAX_BATCH, MAX_BODY};
use opsmantik_fuzz::{SITE, arrival, check_event, check_merge, now};

fn accepted(bytes: &[u8]) -> Vec<Result<Event, String>> {
    let events = match wire::read(bytes) {
        Ok(Body::One(event)) => vec![*event],
        Ok(Body::Batch(events)) => events,
        Err(refusal) => return vec![Err(format!("{} {} {refusal}", refusal.reason.code(), refusal.field))],
    };
    assert!((1..=MAX_BATCH).contains(&events.len()));
    let accept = |wire: wire::WireEvent| {
        let (id, site) = (wire.event_id(SITE), wire.site.clone());
        assert!(site.as_ref().is_ok_and(|site| !site.trim().is_empty()) || site.is_err());
        let event = wire.accept(SITE, &arrival()).map_err(|refusal| format!("{} {refusal}", refusal.reason.code()))?;
        assert!(id.is_none_or(|id| id == event.id), "its sender knows it by the id that it has");
        Ok(event)
    };
    events.into_iter().map(accept).collect()
}

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() > MAX_BODY {
        return;
    }
    let verdicts = accepted(bytes);
    assert_eq!(verdicts, accepted(bytes), "the same bytes, the same verdicts");
    for verdict in &verdicts {
        match verdict {
            Ok(event) => check_event(event),
            Err(refusal) => assert!(!refusal.is_empty() && refusal.len() < 4096, "a calm sentence"),
        }
    }
    let events: Vec<Event> = verdicts.into_iter().flatten().collect();
    check_merge(&events);

    // The same bytes as somebody's job: what is believed has no defect, and says the same once more.
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(event) = Job::event_from_json(text, now())
    {
        assert_eq!(event.defect(), None);
        let again = Job::of(&event).to_json().expect("what was read can be written");
        assert_eq!(Job::event_from_json(&again, now()).expect("and read"), event);
    }
});
