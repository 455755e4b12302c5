//! A call as the wire shows it: all that is stored of it, and never a caller's number, which is not stored.

use chrono::{DateTime, Utc};

use super::words::number;
use crate::calls::{Effect, Recorded};
use crate::domain::call::{Caller, MatchMethod};
use crate::domain::matching::Candidate;
use crate::domain::money::Money;
use crate::domain::recorded::{Call, Review};
use crate::grpc::session::{self, timestamp};
use crate::grpc::{convert, proto};

pub(super) fn recorded(recorded: &Recorded) -> proto::RecordedCall {
    let effect = match recorded.effect {
        Effect::Created => proto::RecordEffect::Created,
        Effect::Merged => proto::RecordEffect::Merged,
        Effect::Unchanged => proto::RecordEffect::Unchanged,
    };
    proto::RecordedCall { call: Some(call(&recorded.call)), effect: effect.into() }
}

/// A call as it is stored.
pub(super) fn call(call: &Call) -> proto::Call {
    let told = &call.told;
    proto::Call {
        id: call.id.to_string(),
        site_id: call.key.site_id().to_string(),
        key: Some(proto::ProviderCallKey {
            provider: call.key.provider().to_owned(),
            provider_call_id: call.key.provider_call_id().to_owned(),
        }),
        channel: number(told.channel),
        direction: number(told.direction),
        dialled_number: told.dialled.as_str().to_owned(),
        caller: Some(caller(told.caller.as_ref())),
        started_at: Some(timestamp(told.started_at)),
        duration_seconds: told.duration_sec,
        status: told.status.map_or(proto::CallStatus::Unspecified.into(), number),
        recording_reference: told.recording.clone(),
        fingerprint: told.fingerprint.clone(),
        click_id: told.click_id.as_ref().map(|id| proto::ClickId { kind: number(id.kind), value: id.value.clone() }),
        r#match: Some(found(call)),
        review: Some(review(&call.review)),
        created_at: Some(timestamp(call.created_at)),
        updated_at: Some(timestamp(call.updated_at)),
    }
}

fn caller(caller: Option<&Caller>) -> proto::Caller {
    match caller {
        None => proto::Caller { anonymous: true, ..proto::Caller::default() },
        Some(Caller { hash, last_digits }) => proto::Caller {
            anonymous: false,
            number_hash: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
            last_digits: last_digits.clone(),
        },
    }
}

fn found(call: &Call) -> proto::CallMatch {
    let decision = &call.found.decision;
    let evidence = |of: &Candidate| evidence(of, decision.method, call.told.started_at);
    let credited = call.credited();
    proto::CallMatch {
        method: number(decision.method),
        confidence: decision.confidence,
        session: credited.map(|credit| session::key(credit.session)),
        fingerprint: credited.and_then(|credit| credit.fingerprint.clone()),
        evidence: credited.map(evidence),
        candidates: decision
            .candidates
            .iter()
            .map(|one| proto::MatchCandidate {
                session: Some(session::key(one.session)),
                evidence: Some(evidence(one)),
            })
            .collect(),
        score_at_match: credited.map(|_| convert::score(call.found.signals)),
        matched_at: call.matched_at.map(timestamp),
    }
}

fn evidence(of: &Candidate, method: MatchMethod, started_at: DateTime<Utc>) -> proto::MatchEvidence {
    let before_call = started_at - of.at;
    let by_fingerprint = method == MatchMethod::Fingerprint;
    proto::MatchEvidence {
        event_id: of.event.to_string(),
        event_at: Some(timestamp(of.at)),
        before_call: Some(prost_types::Duration {
            seconds: before_call.num_seconds(),
            nanos: before_call.subsec_nanos(),
        }),
        fingerprint: of.fingerprint.clone().filter(|_| by_fingerprint),
        clicked_number: of.clicked.as_ref().filter(|_| !by_fingerprint).map(|number| number.as_str().to_owned()),
    }
}

fn review(review: &Review) -> proto::Review {
    let sale = review.sale.as_ref().and_then(|sale| Money::from_decimal_text(&sale.amount, &sale.currency));
    proto::Review {
        status: number(review.status),
        sale_amount: sale.map(|money| proto::Money {
            currency_code: money.currency().to_owned(),
            units: money.units(),
            nanos: money.nanos(),
        }),
        reviewed_by: review.by.clone().unwrap_or_default(),
        reviewed_at: review.at.map(timestamp),
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
