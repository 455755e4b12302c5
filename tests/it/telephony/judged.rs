//! Judgements: who may make them, what they hold, and what opening a call again does.

use opsmantik::grpc::proto::review_call_request::Decision;
use opsmantik::grpc::proto::{ConfirmCall, JunkCall, Money, ReopenCall, Review, ReviewCallRequest, ReviewStatus};
use serde_json::json;

use super::*;

const EDITOR: Uuid = Uuid::from_u128(0xED);
const VIEWER: Uuid = Uuid::from_u128(0x1E);
const STRANGER: Uuid = Uuid::from_u128(0x57);

/// The token of a person who signed in.
fn jwt(person: Uuid) -> String {
    let claims =
        json!({"sub": person, "exp": Utc::now().timestamp() + 300, "aud": "authenticated", "role": "authenticated"});
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("a test's own token")
}

fn confirm(currency: &str, units: i64, nanos: i32) -> Decision {
    let money = Money { currency_code: currency.to_owned(), units, nanos };
    Decision::Confirm(ConfirmCall { sale_amount: Some(money) })
}

fn junk() -> Decision {
    Decision::Junk(JunkCall {})
}

fn reopen() -> Decision {
    Decision::Reopen(ReopenCall {})
}

impl Rig {
    async fn review_as(&self, token: &str, id: &str, decision: Decision) -> Result<Call, Status> {
        let request = ReviewCallRequest { site: "shop".to_owned(), call_id: id.to_owned(), decision: Some(decision) };
        Ok(self.calls_as(token).review_call(request).await?.into_inner().call.expect("always set"))
    }

    async fn review(&self, id: &str, decision: Decision) -> Result<Call, Status> {
        self.review_as(&self.token, id, decision).await
    }

    async fn people(&self) {
        for (person, role) in [(EDITOR, "editor"), (VIEWER, "viewer")] {
            let member = "INSERT INTO site_members (site_id, user_id, role) VALUES ($1, $2, $3)";
            let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&self.shop.id.as_uuid(), &person, &role];
            self.database.admin.execute(member, &params).await.expect("a new member");
        }
    }
}

fn review(call: &Call) -> &Review {
    call.review.as_ref().expect("always set")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_judged_call_keeps_its_match_and_an_opened_one_is_matched_at_once() {
    let rig = Rig::start().await;
    rig.people().await;
    let first = rig.click("first", ago(600)).await;
    let stored = rig.record(call("c", ago(60))).await.expect("recorded").call.expect("always set");
    assert_eq!((review(&stored).status(), review(&stored).reviewed_by.as_str()), (ReviewStatus::Open, ""));
    let id = stored.id;
    let judged = rig.review(&id, confirm("TRY", 12, 300_000_000)).await.expect("judged");
    let money = Money { currency_code: "TRY".to_owned(), units: 12, nanos: 300_000_000 };
    assert_eq!((review(&judged).status(), &review(&judged).sale_amount), (ReviewStatus::Confirmed, &Some(money)));
    assert!(review(&judged).reviewed_by.starts_with("token:") && review(&judged).reviewed_at.is_some());
    let second = rig.click("second", ago(120)).await;
    let told = rig.record(PushedCall { status: CallStatus::Completed.into(), ..call("c", ago(60)) }).await;
    let told = told.expect("recorded").call.expect("always set");
    assert_eq!((told.status(), matched(&told).1), (CallStatus::Completed, Some(first.as_str())));

    let opened = rig.review(&id, reopen()).await.expect("opened");
    assert_eq!((review(&opened).status(), matched(&opened).1), (ReviewStatus::Open, Some(second.as_str())));
    assert_eq!(review(&opened).sale_amount, None);

    // A person's judgement does the same, and their answer tells the match that the call has then.
    let person = jwt(EDITOR);
    let judged = rig.review_as(&person, &id, junk()).await.expect("judged");
    assert_eq!(review(&judged).reviewed_by, format!("user:{EDITOR}"));
    let third = rig.click("third", ago(61)).await;
    assert_eq!(matched(&rig.get(&id).await).1, Some(second.as_str()));
    // Rivals of one minute: the third clicked within a minute of the second or not, as the clocks say; so look at who is named.
    let opened = rig.review_as(&person, &id, reopen()).await.expect("opened");
    let named: Vec<&str> = found(&opened)
        .candidates
        .iter()
        .filter_map(|one| one.session.as_ref().map(|key| key.session_id.as_str()))
        .collect();
    assert_eq!(named[0], third, "{opened:?}");
    assert_eq!(opened, rig.get(&id).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_judge_is_the_sites_affair() {
    let rig = Rig::start().await;
    rig.people().await;
    let id = rig.record(call("c", ago(60))).await.expect("recorded").call.expect("always set").id;
    let nobody = Uuid::nil().to_string();
    let code = async |person: Uuid, id: &str| {
        let judged = rig.review_as(&jwt(person), id, junk()).await;
        judged.err().map_or(Code::Ok, |status| status.code())
    };
    assert_eq!(code(VIEWER, &id).await, Code::PermissionDenied);
    assert_eq!(code(STRANGER, &id).await, Code::PermissionDenied);
    assert_eq!(review(&rig.get(&id).await).status(), ReviewStatus::Open, "nothing has changed");
    assert_eq!(code(EDITOR, &nobody).await, Code::NotFound);
    assert_eq!(code(VIEWER, &nobody).await, Code::NotFound);
    assert_eq!(code(EDITOR, &id).await, Code::Ok);
    let reader = rig.database.token(&[Scope::CallsRead], Some(rig.shop.id)).await;
    let theirs = rig.database.token(&[Scope::CallsWrite], Some(rig.neighbour.id)).await;
    for token in [reader, theirs] {
        let status = rig.review_as(&token, &id, reopen()).await.expect_err("not theirs to judge");
        assert_eq!(status.code(), Code::PermissionDenied);
    }
    assert_eq!(rig.review(&nobody, junk()).await.expect_err("no such call").code(), Code::NotFound);
    // What a person may see they may read.
    let asked = GetCallRequest { site: "shop".to_owned(), call: Some(Asked::CallId(id.clone())) };
    let seen = rig.calls_as(&jwt(VIEWER)).get_call(asked).await.expect("it is theirs to see").into_inner().call;
    assert_eq!(seen.map(|call| review(&call).status()), Some(ReviewStatus::Junk));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_judgement_that_makes_no_sense_is_refused_by_its_field() {
    let rig = Rig::start().await;
    let id = rig.record(call("c", ago(60))).await.expect("recorded").call.expect("always set").id;
    use RejectionReason::{Invalid, Missing, OutOfRange};
    for (decision, field, reason) in [
        (confirm("JPY", 100, 500_000_000), "confirm.sale_amount.nanos", Invalid),
        (confirm("TRY", -1, 0), "confirm.sale_amount.units", OutOfRange),
        (confirm("TRY", 0, -1), "confirm.sale_amount.nanos", OutOfRange),
        (confirm("TRY", i64::MAX, 0), "confirm.sale_amount.units", OutOfRange),
        (confirm("XYZ", 1, 0), "confirm.sale_amount.currency_code", Invalid),
        (confirm("", 1, 0), "confirm.sale_amount.currency_code", Missing),
    ] {
        let status = rig.review(&id, decision).await.expect_err(field);
        assert_eq!(refusal(&status), invalid(field, reason));
    }
    for (call_id, decision, field, reason) in [
        (id.as_str(), None, "decision", Missing),
        ("", Some(junk()), "call_id", Missing),
        ("CA1", Some(junk()), "call_id", Invalid),
    ] {
        let request = ReviewCallRequest { site: "shop".to_owned(), call_id: call_id.to_owned(), decision };
        let status = rig.calls().review_call(request).await.expect_err(field);
        assert_eq!(refusal(&status), invalid(field, reason));
    }
    assert_eq!(review(&rig.get(&id).await).status(), ReviewStatus::Open);
    for (currency, units, nanos, text) in [
        ("JPY", 1200, 0, "1200"),
        ("KWD", 1, 5_000_000, "1.005"),
        ("USD", 999_999_999_999, 990_000_000, "999999999999.99"),
    ] {
        let judged = rig.review(&id, confirm(currency, units, nanos)).await.expect("judged");
        let money = Money { currency_code: currency.to_owned(), units, nanos };
        assert_eq!(review(&judged).sale_amount.as_ref(), Some(&money));
        let row = rig.database.rows("SELECT sale_amount::text AS amount FROM calls").await;
        assert_eq!(row[0]["amount"], text);
    }
    let bare = Decision::Confirm(ConfirmCall { sale_amount: None });
    assert_eq!(review(&rig.review(&id, bare).await.expect("judged")).sale_amount, None, "taken back");
}
