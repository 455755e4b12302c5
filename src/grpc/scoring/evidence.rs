//! What a session's score and attribution rest on: for each signal the first event, the first matched call, or the paid visit before.
//!
//! The events are in the session's own row, so a score is shown without reading a single event. A row that was written by hand may not
//! tell which event it was; each signal has its evidence all the same, with what is known.

use crate::domain::attribution::Attribution;
use crate::domain::evidence::{PaidClick, age, event_of, paid_click};
use crate::domain::session::{Session, Stamp};
use crate::domain::signal::Signal;
use crate::grpc::proto::signal_evidence::Cause;
use crate::grpc::proto::{
    AttributionEvidence, CallCause, ClickId, ClickIdKind, ClickIdOrigin, EventCause, GetSessionScoreResponse,
    SignalEvidence,
};
use crate::grpc::{convert, session as wire};
use crate::store::error::StoreError;
use crate::store::scoring::{self as reads, MatchedCall};
use crate::store::transaction::Transaction;

/// A session's score with its evidence.
pub(super) async fn of(tx: &Transaction<'_>, session: &Session) -> Result<GetSessionScoreResponse, StoreError> {
    let attribution = session.attribution();
    let attribution_evidence = match attribution {
        Attribution::OrganicReferral => None,
        Attribution::DirectToAds => Some(click(session, session, ClickIdOrigin::ThisSession)),
        Attribution::AdsAssisted => {
            let earlier = reads::latest_earlier_ad(tx, session).await?;
            let origin = ClickIdOrigin::EarlierSession;
            let unknown = || AttributionEvidence { origin: origin.into(), ..AttributionEvidence::default() };
            Some(earlier.map_or_else(unknown, |earlier| click(session, &earlier, origin)))
        }
    };
    let call = reads::first_call(tx, session.key).await?;
    Ok(GetSessionScoreResponse {
        session: Some(wire::key(session.key)),
        score: Some(convert::score(session.signals())),
        evidence: signals(session, call, attribution_evidence.as_ref()),
        attribution: wire::attribution(attribution).into(),
        attribution_evidence,
        traffic_source: Some(wire::traffic_source(session)),
    })
}

/// At least one cause for every signal of the breakdown.
fn signals(
    session: &Session,
    call: Option<MatchedCall>,
    attribution: Option<&AttributionEvidence>,
) -> Vec<SignalEvidence> {
    let mut evidence = Vec::new();
    for signal in session.signals().iter() {
        let mut causes: Vec<Cause> = Vec::new();
        let told = session.raised.get(&signal);
        causes.extend(told.filter(|stamp| event_of(**stamp).is_some()).map(|stamp| event(*stamp)));
        match signal {
            Signal::PrimaryConversion => causes.extend(call.map(|call| {
                Cause::Call(CallCause {
                    call_id: call.id.to_string(),
                    started_at: Some(wire::timestamp(call.started_at)),
                })
            })),
            Signal::ReturningAdsAssisted => causes.extend(attribution.cloned().map(Cause::Attribution)),
            Signal::Interaction
            | Signal::Scroll50
            | Signal::Scroll90
            | Signal::HoverIntent
            | Signal::GoogleReferrer => {}
        }
        if causes.is_empty() {
            // Some event, then; which one the row does not say.
            let at = told.map_or(session.created_at, |stamp| stamp.at);
            causes.push(Cause::Event(EventCause { event_id: None, occurred_at: Some(wire::timestamp(at)) }));
        }
        evidence.extend(causes.into_iter().map(|cause| SignalEvidence {
            signal: convert::wire_signal(signal).into(),
            points: signal.points().into(),
            cause: Some(cause),
        }));
    }
    evidence
}

fn event(stamp: Stamp) -> Cause {
    let event_id = event_of(stamp).map(|id| id.to_string());
    Cause::Event(EventCause { event_id, occurred_at: Some(wire::timestamp(stamp.at)) })
}

/// The paid click of the visit `from`, as `session` sees it.
fn click(session: &Session, from: &Session, origin: ClickIdOrigin) -> AttributionEvidence {
    let paid = paid_click(from);
    let seen_at = paid.map_or(from.created_at, |(_, click)| click.stamp.at);
    AttributionEvidence {
        click_id: paid.map(|(paid, click)| ClickId { kind: kind(paid).into(), value: click.value.clone() }),
        origin: origin.into(),
        session: Some(wire::key(from.key)),
        seen_at: Some(wire::timestamp(seen_at)),
        age: duration(age(session.created_at, seen_at)),
        event_id: paid.and_then(|(_, click)| event_of(click.stamp)).map(|id| id.to_string()),
    }
}

fn duration(age: chrono::TimeDelta) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: age.num_seconds(), nanos: age.subsec_nanos() })
}

fn kind(paid: PaidClick) -> ClickIdKind {
    match paid {
        PaidClick::Gclid => ClickIdKind::Gclid,
        PaidClick::Wbraid => ClickIdKind::Wbraid,
        PaidClick::Gbraid => ClickIdKind::Gbraid,
    }
}
