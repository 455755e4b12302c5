use super::*;
use crate::domain::call::{Channel, ClickIdKind};
use crate::domain::recorded::Call;
use crate::domain::refusal::RefusalReason;
use crate::domain::telephone::E164;
use crate::grpc::proto::{
    CallChannel, CallStatus, ClickId, ConfirmCall, JunkCall, MatchMethod as WireMethod, Money as WireMoney,
    ProviderCallKey, RejectionReason, ReviewStatus as WireReview,
};

fn site(n: u128) -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(n))
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("a test's own instant")
}

fn time(text: &str) -> Option<prost_types::Timestamp> {
    Some(crate::grpc::session::timestamp(at(text)))
}

fn pushed() -> PushedCall {
    let key = ProviderCallKey { provider: "twilio".to_owned(), provider_call_id: "CA1".to_owned() };
    PushedCall { key: Some(key), started_at: time("2026-03-15T12:00:00Z"), ..PushedCall::default() }
}

#[test]
fn what_is_unspecified_is_not_known_yet_and_what_is_no_word_is_refused_by_its_field() {
    let known = PushedCall {
        channel: CallChannel::Whatsapp.into(),
        click_id: Some(ClickId { kind: 4, value: "x".to_owned() }),
        ..pushed()
    };
    let draft = draft(known).expect("all of it can be read");
    assert_eq!((draft.channel, draft.direction, draft.status), (Some(Channel::Whatsapp), None, None));
    assert_eq!(draft.click_id, Some((Some(ClickIdKind::Gclsrc), "x".to_owned())));

    let late = prost_types::Timestamp { seconds: i64::MAX, nanos: 0 };
    let torn = prost_types::Timestamp { seconds: 0, nanos: -1 };
    for (call, field) in [
        (PushedCall { channel: 3, ..pushed() }, "channel"),
        (PushedCall { direction: -1, ..pushed() }, "direction"),
        (PushedCall { status: 8, ..pushed() }, "status"),
        (PushedCall { click_id: Some(ClickId { kind: 9, value: "x".to_owned() }), ..pushed() }, "click_id.kind"),
        (PushedCall { started_at: Some(late), ..pushed() }, "started_at"),
        (PushedCall { started_at: Some(torn), ..pushed() }, "started_at"),
    ] {
        let refusal = super::draft(call).expect_err(field);
        assert_eq!((refusal.reason, &*refusal.field), (RefusalReason::InvalidField, field));
    }
    let nobody = super::draft(PushedCall { key: None, ..pushed() }).expect_err("no key");
    assert_eq!((nobody.reason, &*nobody.field), (RefusalReason::MissingField, "key"));
}

#[test]
fn one_call_is_asked_for_by_one_of_its_two_names() {
    let key = |provider: &str| ProviderCallKey { provider: provider.to_owned(), provider_call_id: "CA1".to_owned() };
    let id = site(7).as_uuid();
    assert_eq!(which(site(1), Some(Asked::CallId(format!(" {id} ")))), Ok(Which::Id(CallId::from_uuid(id))));
    let lowered = CallKey::new(site(1), "twilio", "CA1").expect("a key");
    assert_eq!(which(site(1), Some(Asked::Key(key("Twilio")))), Ok(Which::Key(lowered)));
    for (asked, field) in [
        (None, "call"),
        (Some(Asked::CallId(String::new())), "call_id"),
        (Some(Asked::CallId("CA1".to_owned())), "call_id"),
        (Some(Asked::Key(key(""))), "key.provider"),
        (Some(Asked::Key(key("a b"))), "key.provider"),
    ] {
        assert_eq!(which(site(1), asked).expect_err(field).field, field);
    }
}

#[test]
fn a_sale_is_as_fine_as_its_currency_and_only_of_a_confirmed_call() {
    let confirm = |sale: Option<WireMoney>| decision(Some(WireDecision::Confirm(ConfirmCall { sale_amount: sale })));
    let money = |currency: &str, units, nanos| WireMoney { currency_code: currency.to_owned(), units, nanos };
    let sale = Sale { amount: "12.30".to_owned(), currency: "TRY".to_owned() };
    assert_eq!(confirm(Some(money("TRY", 12, 300_000_000))), Ok(Decision::Confirm(Some(sale))));
    assert_eq!(confirm(None), Ok(Decision::Confirm(None)));
    assert_eq!(decision(Some(WireDecision::Junk(JunkCall {}))), Ok(Decision::Junk));
    for (asked, field) in [
        (confirm(Some(money("JPY", 1, 500_000_000))), "confirm.sale_amount.nanos"),
        (confirm(Some(money("TRY", -1, 0))), "confirm.sale_amount.units"),
        (confirm(Some(money("ABC", 1, 0))), "confirm.sale_amount.currency_code"),
        (decision(None), "decision"),
    ] {
        assert_eq!(asked.expect_err(field).field, field);
    }
}

fn list() -> ListCallsRequest {
    ListCallsRequest { site: "shop".to_owned(), ..ListCallsRequest::default() }
}

#[test]
fn every_fault_of_a_list_is_named() {
    let bad = ListCallsRequest {
        started_from: time("2026-03-02T00:00:00Z"),
        started_before: time("2026-03-01T00:00:00Z"),
        statuses: vec![CallStatus::Busy.into(), CallStatus::Ringing.into(), CallStatus::Unspecified.into()],
        review_statuses: vec![99],
        match_methods: vec![WireMethod::Click.into(), -1],
        page_size: 501,
        ..list()
    };
    let wrong = listing(&bad).expect_err("all of it");
    let told: Vec<_> = wrong.iter().map(|one| (one.reason(), one.field.as_str())).collect();
    use RejectionReason::{Invalid, OutOfRange};
    let fields = [(Invalid, "started_from"), (Invalid, "statuses[2]"), (Invalid, "review_statuses[0]")];
    assert_eq!(told, [&fields[..], &[(Invalid, "match_methods[1]"), (OutOfRange, "page_size")]].concat());
    let torn = ListCallsRequest { started_from: Some(prost_types::Timestamp { seconds: 0, nanos: -1 }), ..list() };
    assert_eq!(listing(&torn).expect_err("no timestamp")[0].field, "started_from");
    let flood = ListCallsRequest { statuses: vec![99; 100_000], ..list() };
    assert_eq!(listing(&flood).expect_err("no such status").len(), status::MAX_VIOLATIONS);
}

fn last(of: &str) -> Call {
    let draft = Draft { dialled_number: "+12025550123".to_owned(), ..draft(pushed()).expect("a whole call") };
    let begun = at(of);
    let hash = |_: &E164| [0; 32];
    let push =
        crate::domain::push::Push::accept(site(1), Draft { started_at: Some(begun), ..draft }, None, begun, hash);
    Call::begin(push.expect("a whole call"))
}

#[test]
fn a_token_keeps_the_range_of_its_first_page_and_belongs_to_its_site_and_filters() {
    let noon = at("2026-03-15T12:00:00.0000005Z");
    let open = listing(&list()).expect("a good list");
    let first = open.page(site(1), "", noon).unwrap_or_else(|wrong| panic!("{wrong:?}"));
    assert_eq!(first.filter.before, at("2026-03-15T12:00:00.000001Z"));
    assert_eq!(first.filter.from, at("2026-02-13T12:00:00.000001Z"));
    assert!(first.after.is_none());

    let last = last("2026-03-10T00:00:00Z");
    let token = first.next(&last);
    let later = open.page(site(1), &token, at("2027-01-01T00:00:00Z")).unwrap_or_else(|wrong| panic!("{wrong:?}"));
    assert_eq!((later.filter.from, later.filter.before), (first.filter.from, first.filter.before));
    assert_eq!(later.after, Some((last.told.started_at, last.id)));

    let sized = listing(&ListCallsRequest { page_size: 7, ..list() }).expect("a good list");
    assert!(sized.page(site(1), &token, noon).is_ok(), "a page may have another size");
    for other in [
        ListCallsRequest { review_statuses: vec![WireReview::Open.into()], ..list() },
        ListCallsRequest { statuses: vec![CallStatus::Busy.into()], ..list() },
        ListCallsRequest { match_methods: vec![WireMethod::Click.into()], ..list() },
        ListCallsRequest { started_from: time("2026-02-13T12:00:00.000001Z"), ..list() },
    ] {
        let other = listing(&other).expect("a good list");
        assert_eq!(other.page(site(1), &token, noon).err().map(|wrong| wrong.field), Some("page_token".to_owned()));
    }
    assert!(open.page(site(2), &token, noon).is_err(), "another site's");
    let forged = first.pages.seal(&Place { from: i64::MIN, before: i64::MAX, at: i64::MAX, id: Uuid::nil() });
    assert!(open.page(site(1), &forged, noon).is_err(), "no time that could be asked for");
    let order = ListCallsRequest { statuses: vec![4, 1, 4], ..list() };
    let sorted = ListCallsRequest { statuses: vec![1, 4], ..list() };
    let page =
        listing(&order).expect("a good list").page(site(1), "", noon).unwrap_or_else(|wrong| panic!("{wrong:?}"));
    assert!(listing(&sorted).expect("a good list").page(site(1), &page.next(&last), noon).is_ok(), "the same filter");
}
