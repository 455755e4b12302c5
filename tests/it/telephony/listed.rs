//! Lists: their filters, their range, and pages that stay in place while calls are added.

use std::collections::HashSet;

use opsmantik::grpc::proto::{ListCallsRequest, ListCallsResponse, ReviewStatus};

use super::*;

fn list() -> ListCallsRequest {
    ListCallsRequest { site: "shop".to_owned(), ..ListCallsRequest::default() }
}

impl Rig {
    async fn list(&self, request: ListCallsRequest) -> Result<ListCallsResponse, Status> {
        Ok(self.calls().list_calls(request).await?.into_inner())
    }

    async fn listed(&self, request: ListCallsRequest) -> Vec<String> {
        ids(&self.list(request).await.expect("a good list"))
    }
}

/// The provider's ids, in the order of the page.
fn ids(page: &ListCallsResponse) -> Vec<String> {
    page.calls.iter().map(|call| call.key.clone().expect("always set").provider_call_id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_has_what_passes_all_filters_the_latest_first() {
    let rig = Rig::start().await;
    rig.click("visit", ago(3700)).await;
    let day = 24 * 3600;
    let calls = vec![
        PushedCall { status: CallStatus::Completed.into(), ..call("clicked", ago(3600)) },
        PushedCall { status: CallStatus::Busy.into(), ..call("busy", ago(100)) },
        call("untold", ago(50)),
        call("last-week", ago(7 * day)),
        call("last-quarter", ago(90 * day)),
        PushedCall { site: "neighbour".to_owned(), ..call("theirs", ago(10)) },
    ];
    let recorded = rig.record_all(calls).await.expect("recorded");
    assert!(recorded.iter().all(|outcome| matches!(outcome, Outcome::Recorded(_))), "{recorded:?}");
    assert_eq!(rig.listed(list()).await, ["untold", "busy", "clicked", "last-week"], "the last 30 days of the shop");
    let ends = |status: &[CallStatus]| status.iter().map(|status| i32::from(*status)).collect();
    let statuses = ListCallsRequest { statuses: ends(&[CallStatus::Busy, CallStatus::Completed]), ..list() };
    assert_eq!(rig.listed(statuses.clone()).await, ["busy", "clicked"]);
    let methods = vec![MatchMethod::Click.into()];
    assert_eq!(rig.listed(ListCallsRequest { match_methods: methods, ..statuses }).await, ["clicked"]);
    let reviews = ListCallsRequest { review_statuses: vec![ReviewStatus::Junk.into()], ..list() };
    assert_eq!(rig.listed(reviews).await, Vec::<String>::new());
    let before = ListCallsRequest { started_before: Some(time(ago(80 * day))), ..list() };
    assert_eq!(rig.listed(before).await, ["last-quarter"], "30 days before the end");
    let from = ListCallsRequest { started_from: Some(time(ago(100 * day))), ..list() };
    assert_eq!(rig.listed(from).await.len(), 5);
    let exact = rig.list(list()).await.expect("a good list").calls[1].started_at;
    let only = ListCallsRequest { started_from: exact, started_before: exact, ..list() };
    assert_eq!(rig.listed(only).await, Vec::<String>::new(), "the end is outside");

    use RejectionReason::{Invalid, OutOfRange};
    for (bad, field, reason) in [
        (
            ListCallsRequest { started_from: Some(time(ago(1))), started_before: Some(time(ago(2))), ..list() },
            "started_from",
            Invalid,
        ),
        (ListCallsRequest { statuses: vec![1, 2, 0], ..list() }, "statuses[2]", Invalid),
        (ListCallsRequest { review_statuses: vec![4], ..list() }, "review_statuses[0]", Invalid),
        (ListCallsRequest { match_methods: vec![-1], ..list() }, "match_methods[0]", Invalid),
        (ListCallsRequest { page_size: 501, ..list() }, "page_size", OutOfRange),
        (ListCallsRequest { page_token: "bad".to_owned(), ..list() }, "page_token", Invalid),
        (ListCallsRequest { site: String::new(), ..list() }, "site", RejectionReason::Missing),
    ] {
        let status = rig.list(bad).await.expect_err(field);
        assert_eq!(refusal(&status), invalid(field, reason));
    }
    let nobody = rig.list(ListCallsRequest { site: "nobody".to_owned(), ..list() }).await.expect_err("no such site");
    assert_eq!(nobody.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_stay_in_place_while_calls_are_added() {
    let rig = Rig::start().await;
    // Half of them began at the same moment: the id decides their order.
    let moment = ago(500);
    let at = |n: i64| if n % 2 == 0 { moment } else { moment - TimeDelta::seconds(n) };
    let first: Vec<PushedCall> = (0..23).map(|n| call(&format!("first-{n}"), at(n))).collect();
    rig.record_all(first).await.expect("recorded");
    let whole = rig.listed(list()).await;
    let mut request = ListCallsRequest { page_size: 5, ..list() };
    let (mut seen, mut pages) = (Vec::new(), 0);
    loop {
        let page = rig.list(request.clone()).await.expect("a good list");
        seen.extend(ids(&page));
        pages += 1;
        // Later ones, ones of the same moment, and older ones come in between.
        let more = (0..3).map(|n| call(&format!("more-{pages}-{n}"), moment + TimeDelta::seconds(100 - 100 * n)));
        rig.record_all(more.collect()).await.expect("recorded");
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
        assert!(pages < 20, "pages end");
    }
    assert!(pages >= 5, "{pages}");
    let once: HashSet<&String> = seen.iter().collect();
    assert_eq!(once.len(), seen.len(), "no call is told twice: {seen:?}");
    let of_the_first: Vec<&String> = seen.iter().filter(|id| id.starts_with("first")).collect();
    assert_eq!(of_the_first, whole.iter().collect::<Vec<_>>(), "and none is left out");

    let filtered = ListCallsRequest { statuses: vec![1], ..request.clone() };
    for other in [filtered, ListCallsRequest { site: "neighbour".to_owned(), ..request.clone() }] {
        let status = rig.list(other).await.expect_err("a token of another list");
        assert_eq!(refusal(&status), invalid("page_token", RejectionReason::Invalid));
    }
}
