//! The laws of the merge, and the words of the tables.

use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use uuid::Uuid;

use super::*;

fn key() -> CallKey {
    CallKey::new(SiteId::from_uuid(Uuid::from_u128(7)), "twilio", "CA-1").expect("it is a key")
}

fn second(n: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_790_000_000 + n, 0).unwrap_or_default()
}

fn least() -> Push {
    Push {
        key: key(),
        channel: None,
        direction: None,
        dialled: "+902120000005".parse().expect("it is E.164"),
        caller: None,
        started_at: second(5),
        duration_sec: None,
        status: None,
        recording: None,
        fingerprint: None,
        click_id: None,
    }
}

fn push(fill: impl FnOnce(&mut Push)) -> Push {
    let mut push = least();
    fill(&mut push);
    push
}

#[test]
fn names_are_those_of_the_tables_and_their_order_is_that_of_the_contract() {
    fn names<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> Vec<&'static str> {
        all.iter().map(|one| name(*one)).collect()
    }
    assert_eq!(names(Channel::ALL, Channel::name), ["PHONE", "WHATSAPP"]);
    assert_eq!(names(Direction::ALL, Direction::name), ["INBOUND", "OUTBOUND"]);
    assert_eq!(
        names(Status::ALL, Status::name),
        ["RINGING", "IN_PROGRESS", "FAILED", "BUSY", "NO_ANSWER", "VOICEMAIL", "COMPLETED"]
    );
    assert_eq!(names(MatchMethod::ALL, MatchMethod::name), ["UNMATCHED", "AMBIGUOUS", "CLICK", "FINGERPRINT"]);
    assert_eq!(names(ReviewStatus::ALL, ReviewStatus::name), ["OPEN", "CONFIRMED", "JUNK"]);
    assert_eq!(
        names(ClickIdKind::ALL, ClickIdKind::name),
        ["gclid", "wbraid", "gbraid", "gclsrc", "dclid", "fbclid", "ttclid", "msclkid"]
    );
    assert!(Status::ALL.is_sorted() && ClickIdKind::ALL.is_sorted());
    assert!(Status::ALL.iter().all(|status| Status::from_name(status.name()) == Some(*status)));
    assert_eq!(Status::from_name("ringing"), None);
    assert!(MatchMethod::ALL.iter().map(|method| method.credits()).eq([false, false, true, true]));
}

#[test]
fn a_call_has_one_id_by_site_provider_and_provider_call_id() {
    let site = |n| SiteId::from_uuid(Uuid::from_u128(n));
    let id = |n, provider: &str, call: &str| CallKey::new(site(n), provider, call).expect("it is a key").call_id();
    assert_eq!(id(1, "Twilio", "CA"), id(1, "twilio", "CA"));
    let others = [id(2, "twilio", "CA"), id(1, "twilio2", "CA"), id(1, "twilio", "ca"), id(1, "twilio", "CA ")];
    assert!(others.iter().all(|other| *other != id(1, "twilio", "CA")));
}

#[test]
fn a_push_adds_and_takes_nothing_away() {
    let mut told = Told::begin(least());
    assert_eq!((told.channel, told.direction), (Channel::Phone, Direction::Inbound));
    assert!(!told.merge(least()), "the same again");
    assert!(!told.merge(push(|p| p.channel = Some(Channel::Phone))), "it was taken for one already");
    type Fill = fn(&mut Push);
    let rules: [(&str, Fill, Fill); 10] = [
        ("channel", |p| p.channel = Some(Channel::Phone), |p| p.channel = Some(Channel::Whatsapp)),
        ("direction", |p| p.direction = Some(Direction::Inbound), |p| p.direction = Some(Direction::Outbound)),
        (
            "dialled",
            |p| p.dialled = "+902120000006".parse().expect("E.164"),
            |p| p.dialled = "+902120000004".parse().expect("E.164"),
        ),
        (
            "caller",
            |p| p.caller = Some(Caller { hash: [2; 32], last_digits: "11".into() }),
            |p| p.caller = Some(Caller { hash: [1; 32], last_digits: "99".into() }),
        ),
        ("started_at", |p| p.started_at = second(6), |p| p.started_at = second(4)),
        ("duration", |p| p.duration_sec = Some(0), |p| p.duration_sec = Some(1)),
        ("status", |p| p.status = Some(Status::Failed), |p| p.status = Some(Status::Busy)),
        ("recording", |p| p.recording = Some("b".into()), |p| p.recording = Some("a".into())),
        ("fingerprint", |p| p.fingerprint = Some("b".into()), |p| p.fingerprint = Some("a".into())),
        (
            "click_id",
            |p| p.click_id = Some(ClickId { kind: ClickIdKind::Wbraid, value: "a".into() }),
            |p| p.click_id = Some(ClickId { kind: ClickIdKind::Gclid, value: "b".into() }),
        ),
    ];
    for (field, weaker, stronger) in rules {
        let mut told = Told::begin(push(weaker));
        assert!(told.merge(push(stronger)), "{field}: something stronger is news");
        let after = told.clone();
        assert!(!told.merge(push(weaker)), "{field}: something weaker is not");
        assert!(!told.merge(least()), "{field}: silence takes nothing away");
        assert_eq!(told, after, "{field}");
        let alone = Told::begin(push(stronger));
        assert_eq!(told, alone, "{field}: the stronger one stays as it was told");
    }
}

fn any_push() -> impl Strategy<Value = Push> {
    let small = || option::of(select(vec!["", "a", "b", "B", "ü"]).prop_map(str::to_owned));
    let kinds = || select(ClickIdKind::ALL);
    (
        (option::of(select(Channel::ALL)), option::of(select(Direction::ALL)), option::of(select(Status::ALL))),
        (0..4u8, option::of(0..4u8), 0..4i64, option::of(0..4u32)),
        (small(), small(), option::of((kinds(), select(vec!["a", "b"])))),
    )
        .prop_map(|((channel, direction, status), (dialled, caller, start, duration_sec), texts)| Push {
            key: key(),
            channel,
            direction,
            dialled: format!("+90212000000{dialled}").parse().expect("it is E.164"),
            caller: caller.map(|n| Caller { hash: [n; 32], last_digits: format!("0{}", 9 - n) }),
            started_at: second(start),
            duration_sec,
            status,
            recording: texts.0,
            fingerprint: texts.1,
            click_id: texts.2.map(|(kind, value)| ClickId { kind, value: value.to_owned() }),
        })
}

proptest! {
    #[test]
    fn the_merge_is_commutative_associative_and_idempotent(a in any_push(), b in any_push(), c in any_push()) {
        let [a, b, c] = [a, b, c].map(Told::begin);
        prop_assert_eq!(a.clone().union(b.clone()), b.clone().union(a.clone()));
        prop_assert_eq!(a.clone().union(b.clone()).union(c.clone()), a.clone().union(b.clone().union(c)));
        prop_assert_eq!(a.clone().union(a.clone()), a.clone());
        let both = a.clone().union(b);
        prop_assert_eq!(both.clone().union(a), both);
    }

    #[test]
    fn the_call_is_a_function_of_the_set_of_its_pushes(
        pushes in prop::collection::vec(any_push(), 1..8),
        order in prop::collection::vec(any::<Index>(), 0..20),
    ) {
        let fold = |pushes: Vec<Push>| {
            let mut pushes = pushes.into_iter();
            let mut told = Told::begin(pushes.next().expect("there is one"));
            for push in pushes {
                let before = told.clone();
                let news = told.merge(push);
                assert_eq!(news, told != before);
            }
            told
        };
        // Any repetitions, then all of them backwards, so that none is left out.
        let repeated = order.iter().map(|index| index.get(&pushes).clone());
        let shuffled = repeated.chain(pushes.iter().rev().cloned()).collect();
        prop_assert_eq!(fold(shuffled), fold(pushes));
    }
}
