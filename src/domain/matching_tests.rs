//! The rule by situations: each is a row of a table, in seconds from the call's beginning.
//!
//! A session is a letter, `A@2026-05-01` one of a certain month, `~A` one of another site. The result is written as
//! `METHOD credited: candidates in order`. Every row is decided again with its events shuffled and repeated.

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use super::*;

const NUMBER: &str = "tel:+902120000000";
const OTHER: &str = "tel:+902120000099";
const CHAT: &str = "https://wa.me/message/ABCDEFGH1234";
const NOON: &str = "2026-05-15T12:00:00Z";
const NEW_MONTH: &str = "2026-06-01T00:00:30Z";

#[derive(Debug, Clone, Copy)]
struct Called {
    at: &'static str,
    channel: Channel,
    direction: Direction,
    anonymous: bool,
    fingerprint: Option<&'static str>,
}

const PHONE: Called =
    Called { at: NOON, channel: Channel::Phone, direction: Direction::Inbound, anonymous: false, fingerprint: None };
const WHATSAPP: Called = Called { channel: Channel::Whatsapp, ..PHONE };
const ANONYMOUS: Called = Called { anonymous: true, ..PHONE };
const OUTBOUND: Called = Called { direction: Direction::Outbound, ..PHONE };
const KNOWN: Called = Called { fingerprint: Some("fp"), ..PHONE };
const FIRST_OF_MONTH: Called = Called { at: NEW_MONTH, ..PHONE };

type Seen = &'static [(&'static str, i64)];
type Clicked = &'static [(&'static str, i64, &'static str)];
type Situation = (&'static str, Called, Seen, Clicked, &'static str);

#[rustfmt::skip]
const SITUATIONS: &[Situation] = &[
    ("nothing at all", PHONE, &[], &[], "UNMATCHED"),
    ("a click before the call", PHONE, &[], &[("A", -120, NUMBER)], "CLICK A: A"),
    ("a click at the call's own moment", PHONE, &[], &[("A", 0, NUMBER)], "CLICK A: A"),
    ("the call first, the click a second later", PHONE, &[], &[("A", 1, NUMBER)], "CLICK A: A"),
    ("the clocks differ by 119 s", PHONE, &[], &[("A", 119, NUMBER)], "CLICK A: A"),
    ("the clocks differ by 120 s", PHONE, &[], &[("A", 120, NUMBER)], "CLICK A: A"),
    ("the clocks differ by 121 s", PHONE, &[], &[("A", 121, NUMBER)], "UNMATCHED"),
    ("a click 1799 s before", PHONE, &[], &[("A", -1799, NUMBER)], "CLICK A: A"),
    ("a click 1800 s before", PHONE, &[], &[("A", -1800, NUMBER)], "CLICK A: A"),
    ("a click 1801 s before", PHONE, &[], &[("A", -1801, NUMBER)], "UNMATCHED"),
    ("a click on another number", PHONE, &[], &[("A", -60, OTHER)], "UNMATCHED"),
    ("another number is no rival", PHONE, &[], &[("A", -10, OTHER), ("B", -20, NUMBER)], "CLICK B: B"),
    ("one session clicked on both numbers", PHONE, &[], &[("A", -10, OTHER), ("A", -20, NUMBER)], "CLICK A: A"),
    ("a national label", PHONE, &[], &[("A", -60, "tel:0212 000 00 00")], "CLICK A: A"),
    ("a label without scheme", PHONE, &[], &[("A", -60, "(0212) 000-00-00")], "CLICK A: A"),
    ("a label as dialled from abroad", PHONE, &[], &[("A", -60, "tel:0090-212-000-00-00")], "CLICK A: A"),
    ("a label that is no number", PHONE, &[], &[("A", -60, "Call us now")], "UNMATCHED"),
    ("no label", PHONE, &[], &[("A", -60, "")], "UNMATCHED"),
    ("wa.me, then a telephone call", PHONE, &[], &[("A", -60, "https://wa.me/902120000000")], "CLICK A: A"),
    ("wa.me, then a WhatsApp call", WHATSAPP, &[], &[("A", -60, "https://wa.me/902120000000?text=hi")], "CLICK A: A"),
    ("api.whatsapp.com", WHATSAPP, &[], &[("A", -60, "https://api.whatsapp.com/send?phone=%2B902120000000")], "CLICK A: A"),
    ("web.whatsapp.com", WHATSAPP, &[], &[("A", -60, "https://web.whatsapp.com/send?phone=902120000000")], "CLICK A: A"),
    ("the app's own scheme", WHATSAPP, &[], &[("A", -60, "whatsapp://send?phone=902120000000")], "CLICK A: A"),
    ("wa.me with another number", WHATSAPP, &[], &[("A", -60, "https://wa.me/902120000099")], "UNMATCHED"),
    ("a chat without number, then a telephone call", PHONE, &[], &[("A", -60, CHAT)], "UNMATCHED"),
    ("a chat without number, then a WhatsApp call", WHATSAPP, &[], &[("A", -60, CHAT)], "CLICK A: A"),
    ("a chat without number is a rival on WhatsApp", WHATSAPP, &[], &[("A", -60, CHAT), ("B", -10, NUMBER)], "AMBIGUOUS: B A"),
    ("a chat without number is no rival on the telephone", PHONE, &[], &[("A", -60, CHAT), ("B", -10, NUMBER)], "CLICK B: B"),
    ("a tel: link, then a WhatsApp call", WHATSAPP, &[], &[("A", -60, NUMBER)], "CLICK A: A"),
    ("an unreadable tel: link, then a WhatsApp call", WHATSAPP, &[], &[("A", -60, "tel:reception")], "UNMATCHED"),
    ("an anonymous caller is not matched by number", ANONYMOUS, &[], &[("A", -60, NUMBER)], "UNMATCHED"),
    ("an anonymous caller with a known browser", Called { anonymous: true, ..KNOWN }, &[("A", -60)], &[("B", -5, NUMBER)], "FINGERPRINT A: A"),
    ("an anonymous caller whose browser was away", Called { anonymous: true, ..KNOWN }, &[], &[("A", -60, NUMBER)], "UNMATCHED"),
    ("an outbound call after a click", OUTBOUND, &[], &[("A", -60, NUMBER)], "UNMATCHED"),
    ("an outbound call with a known browser", Called { direction: Direction::Outbound, ..KNOWN }, &[("A", -60)], &[], "UNMATCHED"),
    ("two sessions, 59 s apart", PHONE, &[], &[("A", -100, NUMBER), ("B", -41, NUMBER)], "AMBIGUOUS: B A"),
    ("two sessions, 60 s apart", PHONE, &[], &[("A", -101, NUMBER), ("B", -41, NUMBER)], "AMBIGUOUS: B A"),
    ("two sessions, 61 s apart", PHONE, &[], &[("A", -102, NUMBER), ("B", -41, NUMBER)], "CLICK B: B A"),
    ("a rival after the call, 60 s apart", PHONE, &[], &[("A", -10, NUMBER), ("B", 50, NUMBER)], "AMBIGUOUS: A B"),
    ("a rival after the call, 61 s apart", PHONE, &[], &[("A", -10, NUMBER), ("B", 51, NUMBER)], "CLICK A: A B"),
    ("before wins over nearer but after", PHONE, &[], &[("A", -60, NUMBER), ("B", 5, NUMBER)], "CLICK A: B A"),
    ("both after, the nearer wins", PHONE, &[], &[("A", 100, NUMBER), ("B", 10, NUMBER)], "CLICK B: B A"),
    ("both after and close", PHONE, &[], &[("A", 70, NUMBER), ("B", 10, NUMBER)], "AMBIGUOUS: B A"),
    ("equally far before and after", PHONE, &[], &[("A", 50, NUMBER), ("B", -50, NUMBER)], "CLICK B: B A"),
    ("three rivals", PHONE, &[], &[("A", -10, NUMBER), ("B", -40, NUMBER), ("C", -65, NUMBER)], "AMBIGUOUS: A B C"),
    ("rivals of each other, not of the nearest", PHONE, &[], &[("A", -10, NUMBER), ("B", -71, NUMBER), ("C", -100, NUMBER)], "CLICK A: A B C"),
    ("a rival outside the window is none", PHONE, &[], &[("A", -1790, NUMBER), ("B", -1801, NUMBER)], "CLICK A: A"),
    ("a rival beyond the skew is none", PHONE, &[], &[("A", 119, NUMBER), ("B", 121, NUMBER)], "CLICK A: A"),
    ("one session clicks many times", PHONE, &[], &[("A", -10, NUMBER), ("A", -11, NUMBER), ("A", 15, NUMBER)], "CLICK A: A"),
    ("only the nearest click of the winner counts", PHONE, &[], &[("A", -10, NUMBER), ("A", -80, NUMBER), ("B", -75, NUMBER)], "CLICK A: A B"),
    ("every click of a rival counts", PHONE, &[], &[("A", -10, NUMBER), ("B", -200, NUMBER), ("B", 30, NUMBER)], "AMBIGUOUS: A B"),
    ("two sessions at one instant", PHONE, &[], &[("B", -10, NUMBER), ("A", -10, NUMBER)], "AMBIGUOUS: B A"),
    ("another site's click", PHONE, &[], &[("~A", -10, NUMBER)], "UNMATCHED"),
    ("another site's click is no rival", PHONE, &[], &[("~A", -10, NUMBER), ("B", -15, NUMBER)], "CLICK B: B"),
    ("a session of the month before", FIRST_OF_MONTH, &[], &[("A@2026-05-01", -60, NUMBER)], "CLICK A@2026-05-01: A@2026-05-01"),
    ("one session id in two months is two sessions", FIRST_OF_MONTH, &[], &[("A@2026-05-01", -40, NUMBER), ("A", -10, NUMBER)], "AMBIGUOUS: A A@2026-05-01"),
    ("a known browser", KNOWN, &[("A", -300)], &[], "FINGERPRINT A: A"),
    ("two sessions on one fingerprint, the latest wins", KNOWN, &[("A", -600), ("B", -30)], &[], "FINGERPRINT B: B A"),
    ("two sessions on one fingerprint are not ambiguous", KNOWN, &[("A", -31), ("B", -30)], &[], "FINGERPRINT B: B A"),
    ("the latest counts, after the call as well", KNOWN, &[("A", -10), ("B", 100)], &[], "FINGERPRINT B: A B"),
    ("a session's latest event counts", KNOWN, &[("A", -900), ("A", -20), ("B", -30)], &[], "FINGERPRINT A: A B"),
    ("a tie of the clock goes to the greater event id", KNOWN, &[("B", -30), ("A", -30)], &[], "FINGERPRINT A: B A"),
    ("a known browser at the window's edges", KNOWN, &[("A", -1800), ("B", 120)], &[], "FINGERPRINT B: B A"),
    ("a known browser outside the window", KNOWN, &[("A", -1801), ("B", 121)], &[], "UNMATCHED"),
    ("an event after the window hides none in it", KNOWN, &[("A", -60), ("A", 121), ("B", 300)], &[], "FINGERPRINT A: A"),
    ("a known browser that was away, and a click", KNOWN, &[("A", -1801)], &[("B", -60, NUMBER)], "CLICK B: B"),
    ("a known browser beats a nearer click", KNOWN, &[("A", -900)], &[("B", -5, NUMBER)], "FINGERPRINT A: A"),
    ("a known browser beats ambiguity", KNOWN, &[("A", -900)], &[("B", -5, NUMBER), ("C", -6, NUMBER)], "FINGERPRINT A: A"),
    ("a known browser that clicked as well", KNOWN, &[("A", -60), ("A", -30)], &[("A", -60, NUMBER)], "FINGERPRINT A: A"),
    ("a known browser on WhatsApp", Called { channel: Channel::Whatsapp, ..KNOWN }, &[("A", -60)], &[("B", -5, CHAT)], "FINGERPRINT A: A"),
    ("another site's same fingerprint", KNOWN, &[("~A", -60)], &[], "UNMATCHED"),
    ("another site's same fingerprint is no candidate", KNOWN, &[("~A", -10), ("B", -60)], &[], "FINGERPRINT B: B"),
    ("no fingerprint, so activity says nothing", PHONE, &[("A", -60)], &[], "UNMATCHED"),
    ("a known browser at month's end", Called { at: NEW_MONTH, ..KNOWN }, &[("A@2026-05-01", -31), ("A", -1)], &[], "FINGERPRINT A: A A@2026-05-01"),
];

fn at(text: &str) -> DateTime<Utc> {
    text.parse().expect("the test writes RFC 3339")
}

fn number() -> E164 {
    "+902120000000".parse().expect("it is E.164")
}

fn site(n: u128) -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(n))
}

fn session(name: &str, call_at: &str) -> SessionKey {
    let (site, name) = name.strip_prefix('~').map_or((site(1), name), |name| (site(2), name));
    let (letter, month) = name.split_once('@').unwrap_or((name, call_at));
    let id = SessionId::from_uuid(Uuid::from_u128(letter.chars().map(u128::from).sum()));
    SessionKey { site_id: site, month: month.parse().expect("the test writes months"), id }
}

fn event(n: usize) -> EventId {
    EventId::from_uuid(Uuid::from_u128(n as u128 + 1))
}

impl Called {
    fn facts<'a>(&self, dialled: &'a E164) -> Facts<'a> {
        Facts {
            site_id: site(1),
            started_at: at(self.at),
            channel: self.channel,
            direction: self.direction,
            dialled,
            anonymous: self.anonymous,
            fingerprint: self.fingerprint,
        }
    }
}

fn inputs(call: &Called, seen: Seen, clicked: Clicked) -> (Vec<Activity>, Vec<Click>) {
    let after = |seconds: i64| at(call.at) + TimeDelta::seconds(seconds);
    let activity = seen.iter().enumerate().map(|(n, (name, seconds))| Activity {
        session: session(name, call.at),
        event: event(1000 + n),
        at: after(*seconds),
    });
    let clicks = clicked.iter().enumerate().map(|(n, (name, seconds, label))| {
        let action = if label.contains("wa.me") || label.contains("whatsapp") { "WhatsApp" } else { "phone_call" };
        let event = (event(n), after(*seconds));
        Click::read(session(name, call.at), event, (action, Some(label)), Some("TR"))
    });
    (activity.collect(), clicks.collect())
}

fn told(call: &Called, decided: &Match) -> String {
    let month = Month::of(at(call.at));
    let name = |candidate: &Candidate| {
        let letter = char::from_u32(u32::try_from(candidate.session.id.as_uuid().as_u128()).expect("one letter"));
        let letter = letter.map(String::from).unwrap_or_default();
        if candidate.session.month == month { letter } else { format!("{letter}@{}", candidate.session.month) }
    };
    let mut text = decided.method.name().to_owned();
    if let Some(credited) = &decided.credited {
        text += &format!(" {}", name(credited));
    }
    if !decided.candidates.is_empty() {
        text += &format!(": {}", decided.candidates.iter().map(name).collect::<Vec<_>>().join(" "));
    }
    text
}

/// What holds for every match.
fn assert_whole(decided: &Match) {
    assert_eq!(decided.method.credits(), decided.credited.is_some());
    assert_eq!(decided.method.credits(), decided.confidence >= 0.5);
    assert!((0.0..=1.0).contains(&decided.confidence));
    assert_eq!(decided.method == MatchMethod::Unmatched, decided.candidates.is_empty());
    assert!(decided.candidates.len() <= MAX_CANDIDATES);
    assert!(decided.credited.iter().all(|credited| decided.candidates.contains(credited)));
}

/// Some of them repeated, all of them in another order: a small generator is enough, and the same every time.
fn shuffled<T: Clone>(items: &[T], seed: &mut u64) -> Vec<T> {
    let mut next = |below: usize| {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(*seed >> 33).unwrap_or(0) % below.max(1)
    };
    let mut all = items.to_vec();
    for _ in 0..items.len() {
        let item = items[next(items.len())].clone();
        all.push(item);
    }
    for last in (1..all.len()).rev() {
        all.swap(last, next(last + 1));
    }
    all
}

#[test]
fn a_call_finds_its_visit_in_every_situation() {
    let dialled = &number();
    assert!(SITUATIONS.len() >= 45);
    let mut seed = 7;
    let mut wrong = Vec::new();
    for (name, call, seen, clicked, expected) in SITUATIONS {
        let (facts, (activity, clicks)) = (call.facts(dialled), inputs(call, seen, clicked));
        let decided = decide(&facts, &activity, &clicks);
        assert_whole(&decided);
        if told(call, &decided) != *expected {
            wrong.push(format!("{name}: {} instead of {expected}", told(call, &decided)));
        }
        for _ in 0..20 {
            let again = decide(&facts, &shuffled(&activity, &mut seed), &shuffled(&clicks, &mut seed));
            assert_eq!(again, decided, "{name}, shuffled");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_evidence_is_the_event_that_decided() {
    let dialled = number();
    let facts = PHONE.facts(&dialled);
    let click = |n, seconds| Click {
        session: session("A", NOON),
        event: event(n),
        at: at(NOON) + TimeDelta::seconds(seconds),
        number: Some(number()),
        whatsapp: false,
    };
    let decided = decide(&facts, &[], &[click(1, -30), click(3, -20), click(2, -20), click(4, 5)]);
    let expected = Candidate {
        session: session("A", NOON),
        event: event(2),
        at: at(NOON) - TimeDelta::seconds(20),
        fingerprint: None,
        clicked: Some(number()),
    };
    assert_eq!(decided.credited, Some(expected), "the nearest before the call, then the smaller id");

    let seen = |n, seconds| Activity {
        session: session("A", NOON),
        event: event(n),
        at: at(NOON) + TimeDelta::seconds(seconds),
    };
    let facts = Facts { fingerprint: Some("fp"), ..facts };
    let decided = decide(&facts, &[seen(2, 60), seen(3, 60), seen(1, 60), seen(9, -5)], &[]);
    let credited = decided.credited.expect("it was active");
    assert_eq!((credited.event, credited.clicked), (event(3), None));
    assert_eq!(credited.fingerprint.as_deref(), Some("fp"));
}

#[test]
fn confidence_falls_with_the_distance() {
    let dialled = &number();
    for (seconds, expected) in [(0, 0.90), (-45, 0.89), (-450, 0.80), (-900, 0.70), (-1800, 0.50), (120, 0.87)] {
        let (_, mut clicks) = inputs(&PHONE, &[], &[("A", 0, NUMBER)]);
        clicks[0].at += TimeDelta::seconds(seconds);
        let decided = decide(&PHONE.facts(dialled), &[], &clicks);
        assert!((decided.confidence - expected).abs() < 1e-9, "{seconds} s: {}", decided.confidence);
    }
    let (activity, _) = inputs(&KNOWN, &[("A", -1800)], &[]);
    assert!((decide(&KNOWN.facts(dialled), &activity, &[]).confidence - 0.95).abs() < 1e-9);
}

#[test]
fn edges_are_sharp_to_a_microsecond() {
    let dialled = &number();
    let method = |offsets: &[TimeDelta]| {
        let click = |(n, offset): (usize, &TimeDelta)| {
            let key = session(["A", "B"][n], NOON);
            Click::read(key, (event(n), at(NOON) + *offset), ("call", Some(NUMBER)), None)
        };
        decide(&PHONE.facts(dialled), &[], &offsets.iter().enumerate().map(click).collect::<Vec<_>>()).method
    };
    let micro = TimeDelta::microseconds(1);
    assert_eq!(method(&[-WINDOW_BEFORE]), MatchMethod::Click);
    assert_eq!(method(&[-WINDOW_BEFORE - micro]), MatchMethod::Unmatched);
    assert_eq!(method(&[WINDOW_AFTER]), MatchMethod::Click);
    assert_eq!(method(&[WINDOW_AFTER + micro]), MatchMethod::Unmatched);
    assert_eq!(method(&[-micro, -micro - RIVAL_DISTANCE]), MatchMethod::Ambiguous);
    assert_eq!(method(&[-micro, -micro * 2 - RIVAL_DISTANCE]), MatchMethod::Click);
}

#[test]
fn at_most_twenty_candidates_are_named_and_the_credited_one_is_among_them() {
    let dialled = &number();
    let key = |n: u32| SessionKey { id: SessionId::from_uuid(Uuid::from_u128(n.into())), ..session("A", NOON) };
    let click = |n: u32, offset: TimeDelta| {
        let event = (event(n as usize), at(NOON) + offset);
        Click::read(key(n), event, ("call", Some(NUMBER)), None)
    };
    // One clicked before the call, 24 shortly after it.
    let mut clicks: Vec<_> = (1..25).map(|n| click(n, TimeDelta::seconds(n.into()))).collect();
    clicks.push(click(99, TimeDelta::seconds(-90)));
    let decided = decide(&PHONE.facts(dialled), &[], &clicks);
    assert_whole(&decided);
    assert_eq!(decided.credited.as_ref().map(|credited| credited.session), Some(key(99)));
    let named: Vec<_> = decided.candidates.iter().map(|candidate| candidate.session).collect();
    assert_eq!(named, (1..20).chain([99]).map(key).collect::<Vec<_>>(), "the nearest first");

    let seen =
        |n: u32| Activity { session: key(n), event: event(n as usize), at: at(NOON) + TimeDelta::seconds(n.into()) };
    let decided = decide(&KNOWN.facts(dialled), &(1..26).map(seen).collect::<Vec<_>>(), &[]);
    assert_whole(&decided);
    let named: Vec<_> = decided.candidates.iter().map(|candidate| candidate.session).collect();
    assert_eq!(named, (1..20).chain([25]).map(key).collect::<Vec<_>>());
}

#[test]
fn the_window_and_what_it_touches_are_two_views_of_one_thing() {
    let (from, to) = window(at(NOON));
    assert_eq!((from, to), (at("2026-05-15T11:30:00Z"), at("2026-05-15T12:02:00Z")));
    assert_eq!(calls_touched_by(from).1, at(NOON));
    assert_eq!(calls_touched_by(to).0, at(NOON));
    let months = |text| {
        let (first, last) = months_of_window(at(text));
        (first.to_string(), last.to_string())
    };
    let expect = |first: &str, last: &str| (first.to_owned(), last.to_owned());
    assert_eq!(months(NOON), expect("2026-04-01", "2026-06-01"));
    assert_eq!(months("2026-06-01T00:29:59Z"), expect("2026-04-01", "2026-07-01"), "the window begins in May");
    assert_eq!(months("2026-05-30T23:58:00Z"), expect("2026-04-01", "2026-07-01"), "an event may arrive in June");
    assert_eq!(months("2026-05-30T23:57:59Z"), expect("2026-04-01", "2026-06-01"));
    for end in [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC] {
        assert!(window(end).0 <= end && window(end).1 >= end);
        let _ = (months_of_window(end), calls_touched_by(end));
    }
}

#[test]
fn a_candidate_survives_its_column_and_a_hand_written_one_is_read_as_far_as_it_goes() {
    let whole = Candidate {
        session: session("A@2026-04-01", NOON),
        event: event(1),
        at: at("2026-05-15T11:59:30.123456Z"),
        fingerprint: Some("fp".into()),
        clicked: Some(number()),
    };
    let bare = Candidate { fingerprint: None, clicked: None, ..whole.clone() };
    let column = json!([Noted::from(&whole), Noted::from(&bare)]);
    let read: Vec<_> = Noted::list(&column).into_iter().filter_map(|noted| noted.candidate(site(1))).collect();
    assert_eq!(read, [whole, bare]);
    assert_eq!(
        column[0],
        json!({
            "session_id": "00000000-0000-0000-0000-000000000041",
            "session_month": "2026-04-01",
            "event_id": "00000000-0000-0000-0000-000000000002",
            "event_at": "2026-05-15T11:59:30.123456Z",
            "fingerprint": "fp",
            "clicked_number": "+902120000000",
        })
    );
    assert_eq!(column[1].as_object().map(serde_json::Map::len), Some(4), "what is not known is not written");

    let by_hand = json!([{"session_id": 5, "event_at": "noon", "fingerprint": "fp", "note": [1]}, "x", null, {}]);
    let read = Noted::list(&by_hand);
    assert_eq!(read, [Noted { fingerprint: Some("fp".into()), ..Noted::default() }, Noted::default()]);
    assert!(read.into_iter().all(|noted| noted.candidate(site(1)).is_none()));
    assert!(Noted::list(&json!({})).is_empty() && Noted::list(&Value::Null).is_empty());
}

proptest! {
    #[test]
    fn the_match_is_a_function_of_the_set_of_events(
        sessions in prop::collection::vec((0..4usize, -2000..200i64, 0..4usize), 0..12),
        call in prop::sample::select(vec![PHONE, WHATSAPP, KNOWN, OUTBOUND, ANONYMOUS]),
        seed in any::<u64>(),
    ) {
        let dialled = number();
        let facts = call.facts(&dialled);
        let key = |n: usize| session(["A", "B", "A@2026-04-01", "~A"][n], NOON);
        let when = |seconds: i64| at(NOON) + TimeDelta::seconds(seconds);
        let activity: Vec<_> = sessions.iter().enumerate().filter(|(n, _)| n % 2 == 0)
            .map(|(n, (who, seconds, _))| Activity { session: key(*who), event: event(n), at: when(*seconds) })
            .collect();
        let clicks: Vec<_> = sessions.iter().enumerate().map(|(n, (who, seconds, label))| {
            let label = [NUMBER, OTHER, CHAT, "Call us"][*label];
            Click::read(key(*who), (event(n), when(*seconds)), ("call", Some(label)), None)
        }).collect();
        let decided = decide(&facts, &activity, &clicks);
        assert_whole(&decided);
        prop_assert!(decided.candidates.iter().all(|one| one.session.site_id == site(1)));
        prop_assert!(decided.candidates.iter().is_sorted_by_key(|one| (facts.started_at - one.at).abs()));
        if !needs_clicks(&facts, &activity) {
            prop_assert_eq!(&decide(&facts, &activity, &[]), &decided);
        }
        let mut seed = seed;
        prop_assert_eq!(decide(&facts, &shuffled(&activity, &mut seed), &shuffled(&clicks, &mut seed)), decided);
    }
}
