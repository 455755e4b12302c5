//! What a `ScoreSignals` request raises. Pure: nothing is read and nothing is stored.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::domain::event::{Arrival, Draft, Event, FieldNames};
use crate::domain::id::SiteId;
use crate::domain::signal::{Signal, SignalSet};
use crate::grpc::convert;
use crate::grpc::proto::{
    Attribution, Rejection, RejectionReason, ScoreSignalsRequest, Signal as WireSignal, SignalFacts,
};

/// Most signals, and most facts, of one request.
const MAX_ITEMS: usize = 1000;

/// The union of everything that the request raises, or all that is wrong with it.
pub(super) fn raised(request: &ScoreSignalsRequest) -> Result<SignalSet, Vec<Rejection>> {
    let mut wrong = Vec::new();
    for (field, count) in [("signals", request.signals.len()), ("facts", request.facts.len())] {
        if count > MAX_ITEMS {
            let message = format!("`{field}` has more than {MAX_ITEMS} items");
            wrong.push(Rejection::of(RejectionReason::OutOfRange, field, message));
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }

    let mut signals = SignalSet::EMPTY;
    let invalid = |field: String, what: &str| {
        let message = format!("`{field}` is invalid: {what}");
        Rejection::of(RejectionReason::Invalid, field, message)
    };
    for (at, number) in request.signals.iter().enumerate() {
        match WireSignal::try_from(*number).ok().and_then(convert::signal) {
            Some(signal) => signals = signals.with(signal),
            None => wrong.push(invalid(format!("signals[{at}]"), "no such signal")),
        }
    }
    for (at, facts) in request.facts.iter().enumerate() {
        if facts.value.is_some_and(|value| !value.is_finite()) {
            wrong.push(invalid(format!("facts[{at}].value"), "the number is not finite"));
        } else {
            signals = signals.union(signals_of(facts));
        }
    }
    match Attribution::try_from(request.attribution) {
        Ok(Attribution::AdsAssisted) => signals = signals.with(Signal::ReturningAdsAssisted),
        Ok(Attribution::Unspecified | Attribution::OrganicReferral | Attribution::DirectToAds) => {}
        Err(_) => wrong.push(invalid("attribution".to_owned(), "no such attribution")),
    }
    if wrong.is_empty() { Ok(signals) } else { Err(wrong) }
}

/// What an event with these facts would raise: it is made and asked, so that there is one derivation.
fn signals_of(facts: &SignalFacts) -> SignalSet {
    let counts = [("scroll_pct", facts.scroll_pct), ("cta_hovers", facts.cta_hovers)];
    let meta: Map<String, Value> =
        counts.into_iter().filter_map(|(key, count)| Some((key.to_owned(), count?.into()))).collect();
    let draft = Draft {
        id: Some(Uuid::nil().to_string()),
        url: Some("https://facts.invalid/".to_owned()),
        session: Some("facts".to_owned()),
        category: Some(facts.category.clone()),
        action: Some(facts.action.clone()),
        value: facts.value,
        referrer: facts.referrer.clone(),
        meta,
        ..Draft::default()
    };
    let names = FieldNames { url: "url", session: "session_id" };
    let arrival = Arrival::at(DateTime::<Utc>::UNIX_EPOCH);
    // Only a draft without URL or session is refused, and this one has both.
    Event::accept(SiteId::from_uuid(Uuid::nil()), draft, &arrival, names)
        .map_or(SignalSet::EMPTY, |event| event.signals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn score(request: &ScoreSignalsRequest) -> (u32, Vec<(WireSignal, u32)>, bool) {
        let score = convert::score(raised(request).expect("a good request"));
        let lines = score.breakdown.iter().map(|line| (line.signal(), line.points)).collect();
        (score.value, lines, score.capped)
    }

    fn facts(fill: impl FnOnce(&mut SignalFacts)) -> ScoreSignalsRequest {
        let mut facts = SignalFacts::default();
        fill(&mut facts);
        ScoreSignalsRequest { facts: vec![facts], ..ScoreSignalsRequest::default() }
    }

    #[test]
    fn a_score_comes_with_its_breakdown() {
        assert_eq!(score(&ScoreSignalsRequest::default()), (0, vec![], false));
        let request = ScoreSignalsRequest {
            signals: vec![WireSignal::Scroll90.into(), WireSignal::Scroll90.into()],
            attribution: Attribution::AdsAssisted.into(),
            facts: facts(|f| f.category = "conversion".to_owned()).facts,
        };
        let lines = vec![
            (WireSignal::PrimaryConversion, 50),
            (WireSignal::Scroll50, 10),
            (WireSignal::Scroll90, 20),
            (WireSignal::ReturningAdsAssisted, 25),
        ];
        assert_eq!(score(&request), (100, lines, true), "105 points are capped");
    }

    #[test]
    fn facts_raise_what_an_event_would_raise() {
        let value = |fill: fn(&mut SignalFacts)| score(&facts(fill)).0;
        assert_eq!(value(|f| f.action = "whatsapp".to_owned()), 50);
        assert_eq!(value(|f| f.category = "interaction".to_owned()), 10);
        assert_eq!(value(|f| (f.action, f.value) = ("scroll_depth".to_owned(), Some(90.0))), 30);
        assert_eq!(value(|f| f.value = Some(90.0)), 0);
        assert_eq!(value(|f| (f.scroll_pct, f.cta_hovers) = (Some(u32::MAX), Some(1))), 45);
        assert_eq!(value(|f| f.referrer = Some("https://www.google.de/".to_owned())), 5);
        assert_eq!(value(|f| f.referrer = Some("https://evil.example/google.de".to_owned())), 0);
    }

    #[test]
    fn what_cannot_be_scored_is_named() {
        let fields = |request: &ScoreSignalsRequest| -> Vec<(RejectionReason, String)> {
            let wrong = raised(request).expect_err("a bad request");
            wrong.into_iter().map(|violation| (violation.reason(), violation.field)).collect()
        };
        let many = ScoreSignalsRequest { signals: vec![1; 1001], ..ScoreSignalsRequest::default() };
        assert_eq!(fields(&many), [(RejectionReason::OutOfRange, "signals".to_owned())]);
        let mut request = facts(|f| f.value = Some(f64::NAN));
        (request.signals, request.attribution) = (vec![1, 0, 99], -1);
        let named: Vec<String> = fields(&request).into_iter().map(|(_, field)| field).collect();
        assert_eq!(named, ["signals[1]", "signals[2]", "facts[0].value", "attribution"]);
    }

    proptest! {
        #[test]
        fn any_request_has_a_score_or_a_named_fault(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = ScoreSignalsRequest::decode(bytes.as_slice()) {
                match raised(&request) {
                    Ok(signals) => prop_assert!(convert::score(signals).value <= 100),
                    Err(wrong) => prop_assert!(wrong.iter().all(|violation| !violation.field.is_empty())),
                }
            }
        }
    }
}
