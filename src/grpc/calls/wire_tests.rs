use uuid::Uuid;

use super::*;
use crate::domain::call::{CallKey, Channel, Direction, ReviewStatus, Told};
use crate::domain::id::{EventId, SessionId, SessionKey, SiteId};
use crate::domain::matching::Match;
use crate::domain::recorded::{Found, Sale};
use crate::domain::signal::{Signal, SignalSet};
use crate::grpc::page;

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a test's own instant")
}

fn candidate(n: u128, at_text: &str) -> Candidate {
    let site_id = SiteId::from_uuid(Uuid::from_u128(1));
    Candidate {
        session: SessionKey {
            site_id,
            month: "2026-03-01".parse().expect("a month"),
            id: SessionId::from_uuid(Uuid::from_u128(n)),
        },
        event: EventId::from_uuid(Uuid::from_u128(n + 1)),
        at: at(at_text),
        fingerprint: Some("F".to_owned()),
        clicked: "+12025550123".parse().ok(),
    }
}

fn stored(method: MatchMethod, credited: Option<Candidate>, candidates: Vec<Candidate>) -> Call {
    let key = CallKey::new(SiteId::from_uuid(Uuid::from_u128(1)), "twilio", "CA1").expect("a key");
    let noon = at("2026-03-15T12:00:00Z");
    Call {
        id: key.call_id(),
        key,
        told: Told {
            channel: Channel::Phone,
            direction: Direction::Inbound,
            dialled: "+12025550123".parse().expect("E.164"),
            caller: Some(Caller { hash: [0xAB; 32], last_digits: "87".to_owned() }),
            started_at: noon,
            duration_sec: Some(0),
            status: None,
            recording: None,
            fingerprint: None,
            click_id: None,
        },
        found: Found {
            decision: Match { method, confidence: 0.5, credited, candidates },
            signals: SignalSet::EMPTY.with(Signal::Interaction),
        },
        matched_at: Some(noon),
        review: Review { status: ReviewStatus::Open, sale: None, by: None, at: None },
        created_at: noon,
        updated_at: noon,
    }
}

#[test]
fn evidence_tells_what_the_method_rests_on_and_how_long_before_the_call() {
    let (before, after) = (candidate(10, "2026-03-15T11:58:29.500Z"), candidate(20, "2026-03-15T12:00:01.250Z"));
    let both = vec![before.clone(), after.clone()];
    let shown = |method, credited| call(&stored(method, credited, both.clone())).r#match.expect("always set");
    let clicked = shown(MatchMethod::Click, Some(before.clone()));
    let evidence = clicked.evidence.expect("somebody is credited");
    assert_eq!((evidence.fingerprint, evidence.clicked_number.as_deref()), (None, Some("+12025550123")));
    assert_eq!(evidence.before_call, Some(prost_types::Duration { seconds: 90, nanos: 500_000_000 }));
    assert_eq!(clicked.fingerprint.as_deref(), Some("F"), "the session's own");
    assert_eq!(clicked.score_at_match.map(|score| score.value), Some(10));
    let skewed = clicked.candidates[1].evidence.as_ref().and_then(|evidence| evidence.before_call);
    assert_eq!(skewed, Some(prost_types::Duration { seconds: -1, nanos: -250_000_000 }));

    let known = shown(MatchMethod::Fingerprint, Some(after)).evidence.expect("somebody is credited");
    assert_eq!((known.fingerprint.as_deref(), known.clicked_number), (Some("F"), None));
    let nobody = shown(MatchMethod::Ambiguous, None);
    assert_eq!((nobody.session, nobody.fingerprint, nobody.evidence, nobody.score_at_match), (None, None, None, None));
    let named: Vec<_> = nobody.candidates.iter().filter_map(|one| one.evidence.clone()?.clicked_number).collect();
    assert_eq!(named.len(), 2);
}

#[test]
fn a_caller_is_a_hash_and_two_digits_or_nobody() {
    let mut call = stored(MatchMethod::Unmatched, None, Vec::new());
    let known = super::call(&call);
    let caller = known.caller.expect("always set");
    assert_eq!((caller.anonymous, caller.number_hash, caller.last_digits), (false, "ab".repeat(32), "87".to_owned()));
    assert_eq!((known.duration_seconds, known.status), (Some(0), 0), "0 is known, no status is not");
    call.told.caller = None;
    let nobody = super::call(&call).caller.expect("always set");
    assert_eq!(nobody, proto::Caller { anonymous: true, ..proto::Caller::default() });
}

#[test]
fn a_sale_comes_out_as_it_went_in_and_what_is_none_is_left_out() {
    let mut call = stored(MatchMethod::Unmatched, None, Vec::new());
    for (amount, money) in [("12.30", Some((12, 300_000_000))), ("12.3000", Some((12, 300_000_000))), ("NaN", None)] {
        call.review.sale = Some(Sale { amount: amount.to_owned(), currency: "TRY".to_owned() });
        let shown = super::call(&call).review.expect("always set").sale_amount;
        assert_eq!(shown.map(|money| (money.units, money.nanos)), money, "{amount}");
    }
}

#[test]
fn an_answer_stays_within_its_bound() {
    let call = call(&stored(MatchMethod::Ambiguous, None, vec![candidate(10, "2026-03-15T11:58:29.500Z"); 20]));
    let size = prost::Message::encoded_len(&call);
    assert_eq!(page::fitting(vec![call.clone(); 10], 4 * (size + 16)).len(), 4);
    assert_eq!(page::fitting(vec![call.clone(); 3], 4 * (size + 16)).len(), 3);
    let result = proto::RecordCallResult {
        outcome: Some(proto::record_call_result::Outcome::Recorded(proto::RecordedCall {
            call: Some(call),
            effect: 1,
        })),
    };
    let few = proto::RecordCallsResponse { results: vec![result.clone(); 10] };
    assert_eq!(super::super::bounded(few.clone()), few);
    let many = super::super::bounded(proto::RecordCallsResponse { results: vec![result; 1000] });
    assert!(prost::Message::encoded_len(&many) < page::MAX_ANSWER && many.results.len() == 1000);
}
