//! What a request about calls asks, in the domain's words, or what is wrong with it. Pure.

use std::collections::BTreeSet;

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::words::{self, Word};
use crate::calls::Decision;
use crate::domain::call::{CallKey, MatchMethod, ReviewStatus, Status};
use crate::domain::id::{CallId, SiteId};
use crate::domain::money::Money;
use crate::domain::push::{Draft, Duration};
use crate::domain::recorded::{Call, Sale};
use crate::domain::refusal::Refusal;
use crate::grpc::page::{self, Pages};
use crate::grpc::proto::get_call_request::Call as Asked;
use crate::grpc::proto::pushed_call::Duration as WireDuration;
use crate::grpc::proto::review_call_request::Decision as WireDecision;
use crate::grpc::proto::{ListCallsRequest, PushedCall, Rejection};
use crate::grpc::{convert, status};
use crate::store::calls::Filter;

/// How far back a list without a beginning goes.
const LISTED: TimeDelta = TimeDelta::days(30);

/// A pushed call in the domain's vocabulary; whether it makes sense is the domain's question.
pub(super) fn draft(call: PushedCall) -> Result<Draft, Refusal> {
    let key = call.key.ok_or_else(|| Refusal::missing("key", "the call's identity at its provider"))?;
    let click_id = match call.click_id {
        Some(id) => Some((word("click_id.kind", id.kind)?, id.value)),
        None => None,
    };
    Ok(Draft {
        provider: key.provider,
        provider_call_id: key.provider_call_id,
        channel: word("channel", call.channel)?,
        direction: word("direction", call.direction)?,
        dialled_number: call.dialled_number,
        caller_number: call.caller_number,
        started_at: instant("started_at", call.started_at)?,
        duration: call.duration.map(|duration| match duration {
            WireDuration::DurationSeconds(seconds) => Duration::Seconds(seconds),
            WireDuration::DurationText(text) => Duration::Text(text),
        }),
        status: word("status", call.status)?,
        recording_reference: call.recording_reference,
        fingerprint: call.fingerprint,
        click_id,
    })
}

fn word<W: Word>(field: &'static str, number: i32) -> Result<Option<W>, Refusal> {
    words::read(number).map_err(|_| Refusal::invalid(field, "there is no such value"))
}

fn instant(field: &'static str, time: Option<prost_types::Timestamp>) -> Result<Option<DateTime<Utc>>, Refusal> {
    time.map(|time| convert::instant(time).ok_or_else(|| Refusal::invalid(field, "it is no timestamp"))).transpose()
}

/// Which call of a site `GetCall` asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Which {
    Id(CallId),
    Key(CallKey),
}

pub(super) fn which(site: SiteId, asked: Option<Asked>) -> Result<Which, Refusal> {
    match asked {
        Some(Asked::CallId(text)) => call_id(&text).map(Which::Id),
        Some(Asked::Key(key)) => CallKey::new(site, &key.provider, &key.provider_call_id).map(Which::Key),
        None => Err(Refusal::missing("call", "`call_id` or `key`")),
    }
}

/// A call's own id.
pub(super) fn call_id(text: &str) -> Result<CallId, Refusal> {
    const FIELD: &str = "call_id";
    if text.trim().is_empty() {
        return Err(Refusal::missing(FIELD, "the server's id of the call"));
    }
    text.trim().parse().map_err(|_| Refusal::invalid(FIELD, "it is no UUID"))
}

/// What `ReviewCall` says about a call.
pub(super) fn decision(asked: Option<WireDecision>) -> Result<Decision, Refusal> {
    match asked {
        Some(WireDecision::Confirm(confirm)) => {
            let sale = confirm.sale_amount.map(|sale| {
                let money = Money::accept("confirm.sale_amount", &sale.currency_code, sale.units, sale.nanos)?;
                Ok(Sale { amount: money.as_decimal_text(), currency: money.currency().to_owned() })
            });
            Ok(Decision::Confirm(sale.transpose()?))
        }
        Some(WireDecision::Junk(_)) => Ok(Decision::Junk),
        Some(WireDecision::Reopen(_)) => Ok(Decision::Reopen),
        None => Err(Refusal::missing("decision", "`confirm`, `junk` or `reopen`")),
    }
}

/// What `ListCalls` asks for, but for the page.
#[derive(Debug)]
pub(super) struct Listing {
    /// As it was asked: what is absent stays open until the first page is read.
    from: Option<DateTime<Utc>>,
    before: Option<DateTime<Utc>>,
    statuses: BTreeSet<Status>,
    reviews: BTreeSet<ReviewStatus>,
    methods: BTreeSet<MatchMethod>,
    pub(super) size: u16,
}

/// Where a list goes on: the range of its first page, and the last call of the page before. Microseconds, as PostgreSQL keeps them.
#[derive(Serialize, Deserialize)]
struct Place {
    from: i64,
    before: i64,
    at: i64,
    id: Uuid,
}

/// A page to read.
pub(super) struct Page {
    pub(super) filter: Filter,
    /// The last call of the page before.
    pub(super) after: Option<(DateTime<Utc>, CallId)>,
    pages: Pages,
}

/// The listing that a request asks for, or all that is wrong with it.
pub(super) fn listing(request: &ListCallsRequest) -> Result<Listing, Vec<Rejection>> {
    let mut wrong: Vec<Rejection> = Vec::new();
    let mut time = |field, time| instant(field, time).map_err(|refusal| wrong.push(refusal.into())).ok().flatten();
    let from = time("started_from", request.started_from).map(whole_micros);
    let before = time("started_before", request.started_before).map(whole_micros);
    if from.zip(before).is_some_and(|(from, before)| from > before) {
        wrong.push(Refusal::invalid("started_from", "the range ends before it begins").into());
    }
    let statuses = some_of("statuses", &request.statuses, &mut wrong);
    let reviews = some_of("review_statuses", &request.review_statuses, &mut wrong);
    let methods = some_of("match_methods", &request.match_methods, &mut wrong);
    let size = page::size(request.page_size).map_err(|bad| wrong.push(bad)).unwrap_or_default();
    if wrong.is_empty() { Ok(Listing { from, before, statuses, reviews, methods, size }) } else { Err(wrong) }
}

fn some_of<W: Word + Ord>(field: &'static str, numbers: &[i32], wrong: &mut Vec<Rejection>) -> BTreeSet<W> {
    let mut words = BTreeSet::new();
    for (at, number) in numbers.iter().enumerate() {
        match words::read(*number) {
            Ok(Some(word)) => {
                words.insert(word);
            }
            // More than are told need not be kept.
            _ if wrong.len() >= status::MAX_VIOLATIONS => break,
            Ok(None) | Err(_) => {
                wrong.push(Refusal::invalid(format!("{field}[{at}]"), "there is nothing of that kind").into());
            }
        }
    }
    words
}

impl Listing {
    /// The page that `token` names of this listing of a site; the first one for the empty token.
    pub(super) fn page(&self, site: SiteId, token: &str, now: DateTime<Utc>) -> Result<Page, Rejection> {
        fn names<W: Copy>(words: &BTreeSet<W>, name: fn(W) -> &'static str) -> Vec<&'static str> {
            words.iter().copied().map(name).collect()
        }
        let asked = (
            site,
            self.from,
            self.before,
            names(&self.statuses, Status::name),
            names(&self.reviews, ReviewStatus::name),
            names(&self.methods, MatchMethod::name),
        );
        let pages = Pages::of("ListCalls", &asked);
        let place = pages.open::<Place>(token)?;
        let kept = place.as_ref().and_then(|place| Some((moment(place.from)?, moment(place.before)?)));
        let after = place.as_ref().and_then(|place| Some((moment(place.at)?, CallId::from_uuid(place.id))));
        if place.is_some() && (kept.is_none() || after.is_none()) {
            return Err(Refusal::invalid("page_token", "it is no token of this list").into());
        }
        let (from, before) = kept.unwrap_or_else(|| {
            let before = self.before.unwrap_or_else(|| whole_micros(now));
            (self.from.unwrap_or_else(|| before.checked_sub_signed(LISTED).unwrap_or(before)), before)
        });
        let filter = Filter {
            from,
            before,
            statuses: self.statuses.iter().copied().collect(),
            reviews: self.reviews.iter().copied().collect(),
            methods: self.methods.iter().copied().collect(),
        };
        Ok(Page { filter, after, pages })
    }
}

impl Page {
    /// The token of the page behind the one that ends with `last`.
    pub(super) fn next(&self, last: &Call) -> String {
        self.pages.seal(&Place {
            from: self.filter.from.timestamp_micros(),
            before: self.filter.before.timestamp_micros(),
            at: last.told.started_at.timestamp_micros(),
            id: last.id.as_uuid(),
        })
    }
}

/// The instant, or the first whole microsecond after it: what is stored is in whole ones, so both compare alike.
fn whole_micros(at: DateTime<Utc>) -> DateTime<Utc> {
    let down = at.trunc_subsecs(6);
    if down < at { down.checked_add_signed(TimeDelta::microseconds(1)).unwrap_or(down) } else { down }
}

/// An instant that PostgreSQL can be asked for.
fn moment(micros: i64) -> Option<DateTime<Utc>> {
    use chrono::Datelike;
    DateTime::from_timestamp_micros(micros).filter(|at| (0..=10_000).contains(&at.year()))
}

#[cfg(test)]
#[path = "asked_tests.rs"]
mod tests;
