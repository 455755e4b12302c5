//! The parts of the feed that need no database: what the log keeps, and what may be concluded from it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use chrono::{DateTime, Utc};
use proptest::prelude::*;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::decode::{Decoder, Said};
use super::log::Log;
use super::told::Told;
use super::{Entry, What};
use crate::domain::change::{Change, Place, Position, Snapshot, Table};
use crate::domain::id::SiteId;
use crate::store::columns::{Columns, Relation, Tuple};

fn site(number: u128) -> SiteId {
    SiteId::from_uuid(Uuid::from_u128(number))
}

fn row(of: u128) -> (Place, Tuple) {
    let relation = Arc::new(Relation { columns: Vec::new() });
    (Place { site: site(of), month: None }, Tuple { relation, values: Vec::new() })
}

/// 0: for everybody. 1 to 3: a row of that site. 12, 23, …: a row that moves from one to the other.
fn entry(kind: u128, position: Position) -> Entry {
    let what = match kind {
        0 => What::Anew { site: None, month: None },
        1..=3 => What::Row(Change::Insert { new: row(kind) }),
        moved => What::Row(Change::Update { old: row(moved / 10), new: row(moved % 10) }),
    };
    Entry { position, xid: 1, committed_at: DateTime::<Utc>::default(), what }
}

fn concerns(kind: u128, of: u128) -> bool {
    kind == 0 || kind == of || kind / 10 == of || (kind > 3 && kind % 10 == of)
}

proptest! {
    #[test]
    fn a_subscriber_is_told_all_of_its_own_in_order_or_that_it_cannot_be(
        kinds in proptest::collection::vec(prop::sample::select(vec![0u128, 1, 1, 2, 3, 12, 31]), 1..60),
        room in 1usize..40,
        begin in 0usize..60,
    ) {
        let start = Position { lsn: 100, seq: 0 };
        let at = |n: usize| Position { lsn: 101 + n as u64 / 3, seq: 1 + (n % 3) as u32 };
        let mut log = Log::new(start, room);
        for (n, kind) in kinds.iter().enumerate() {
            log.push(Table::Events, entry(*kind, at(n)), 1);
            prop_assert!(log.bytes() <= room.max(1));
            prop_assert_eq!(log.reached(), at(n));
        }
        let kept_from = kinds.len().saturating_sub(room);
        for of in 1..=3 {
            let after = if begin == 0 { start } else { at((begin - 1).min(kinds.len() - 1)) };
            let own: Vec<Position> =
                (0..kinds.len()).filter(|n| concerns(kinds[*n], of)).map(at).filter(|p| *p > after).collect();
            let lost = (0..kept_from).any(|n| concerns(kinds[n], of) && at(n) > after);
            prop_assert_eq!(log.holds(Table::Events, site(of), after), !lost);
            if !lost {
                let (mut told, mut place) = (Vec::new(), after);
                while let Some(entry) = log.first_after(Table::Events, site(of), place) {
                    place = entry.position;
                    told.push(place);
                }
                prop_assert_eq!(told, own);
            }
            prop_assert!(log.first_after(Table::Calls, site(of), start).is_none());
        }
        let before = Position { lsn: 99, seq: 9 };
        prop_assert!(!log.holds(Table::Events, site(1), before));
    }

    /// A database in little: transactions begin, are logged, and are shown some time later.
    #[test]
    fn nothing_is_concluded_that_the_database_could_prove_wrong(
        steps in proptest::collection::vec((0u8..7, any::<prop::sample::Index>()), 1..150),
    ) {
        let snapshot = |next: u64, running: &[u64], logged: &BTreeMap<u64, u64>| {
            let unseen = |xid: &u64| running.contains(xid) || logged.contains_key(xid);
            // As PostgreSQL: one beyond the last that has ended.
            let xmax = (10..next).rev().find(|xid| !unseen(xid)).map_or(10, |xid| xid + 1);
            let in_progress: Vec<u64> = (10..xmax).filter(unseen).collect();
            Snapshot { xmin: in_progress.first().copied().unwrap_or(xmax), xmax, in_progress }
        };
        let (mut next, mut lsn) = (10u64, 100u64);
        let mut running: Vec<u64> = Vec::new();
        let mut logged: BTreeMap<u64, u64> = BTreeMap::new();
        let mut commits: Vec<(u64, u64)> = Vec::new();
        let mut told = Told::new(snapshot(next, &[], &logged), lsn);
        let mut asked: Option<Snapshot> = None;
        let mut kept: Vec<Snapshot> = Vec::new();
        for (step, choice) in steps {
            match step {
                0 => {
                    running.push(next);
                    next += 1;
                }
                1 if !running.is_empty() => {
                    let xid = running.swap_remove(choice.index(running.len()));
                    lsn += 5;
                    told.tell(xid, lsn);
                    logged.insert(xid, lsn);
                    commits.push((xid, lsn));
                    lsn += 3;
                }
                2 if !logged.is_empty() => {
                    let xid = *logged.keys().nth(choice.index(logged.len())).expect("it is that long");
                    logged.remove(&xid);
                }
                3 => asked = Some(snapshot(next, &running, &logged)),
                4 => {
                    if let Some(asked) = asked.take() {
                        told.show(asked, lsn);
                    }
                }
                5 => kept.push(snapshot(next, &running, &logged)),
                _ => {
                    let position = match commits.get(choice.index(commits.len() + 1)) {
                        Some((_, lsn)) => Position { lsn: *lsn, seq: u32::from(*lsn % 2 == 0) },
                        None => Position { lsn, seq: 0 },
                    };
                    let before = |lsn: u64| Position { lsn, seq: 1 } <= position;
                    for snapshot in &kept {
                        if told.is_covered_by(snapshot, position) {
                            let unseen = commits.iter().find(|(xid, lsn)| before(*lsn) && !snapshot.sees(*xid));
                            prop_assert_eq!(unseen, None, "{} at {:?}", snapshot, position);
                        }
                    }
                    let fresh = snapshot(next, &running, &logged);
                    let all_seen = commits.iter().all(|(xid, lsn)| !before(*lsn) || fresh.sees(*xid));
                    prop_assert_eq!(told.is_covered_by(&fresh, position), all_seen);
                    let horizon = told.horizon(position);
                    prop_assert!(horizon >= 10, "the first moment holds for ever");
                    for xid in 10..horizon {
                        let commit = commits.iter().find(|(of, _)| *of == xid);
                        prop_assert!(commit.is_some_and(|(_, lsn)| *lsn <= position.lsn), "{} at {:?}", xid, position);
                    }
                }
            }
        }
    }
}

#[test]
fn what_was_forgotten_of_too_many_places_is_forgotten_of_all() {
    let start = Position { lsn: 1, seq: 0 };
    let mut log = Log::new(start, 1);
    let quiet = site(u128::MAX);
    for n in 0..20_000u64 {
        let position = Position { lsn: 2 + n, seq: 1 };
        let what = What::Anew { site: Some(site(n.into())), month: None };
        log.push(Table::Calls, Entry { position, xid: 1, committed_at: DateTime::<Utc>::default(), what }, 1);
        assert_eq!(log.holds(Table::Calls, quiet, start), n <= 10_000, "{n}");
    }
    assert!(log.holds(Table::Calls, quiet, log.reached()));
}

/// What `pgoutput` sends, in little: a table of an id, a site and a text.
struct Wire(Decoder);

impl Wire {
    fn new(schema: &str, table: &str, key: &[&str], columns: &[(&str, Type)]) -> Self {
        let mut wire = Self(Decoder::new(1000));
        let mut message = BytesMut::new();
        message.put_slice(b"R");
        message.put_u32(7);
        for name in [schema, table] {
            message.put_slice(name.as_bytes());
            message.put_u8(0);
        }
        message.put_slice(b"f");
        message.put_u16(u16::try_from(columns.len()).expect("a few"));
        for (name, kind) in columns {
            message.put_u8(key.contains(name).into());
            message.put_slice(name.as_bytes());
            message.put_u8(0);
            message.put_u32(kind.oid());
            message.put_i32(-1);
        }
        assert!(wire.say(message).is_empty());
        let mut begin = BytesMut::new();
        begin.put_slice(b"B");
        begin.put_u64(500);
        begin.put_i64(1_000_000);
        begin.put_u32(1001);
        assert!(matches!(wire.say(begin)[..], [Said::Begun { xid: 1001, lsn: 500 }]));
        wire
    }

    fn say(&mut self, message: BytesMut) -> Vec<Said> {
        let mut said = Vec::new();
        self.0.read(message.freeze(), &mut |one| said.push(one)).expect("it is well formed");
        said
    }

    fn change(&mut self, tag: u8, tuples: &[(u8, &[Value])]) -> Vec<What> {
        let mut message = BytesMut::new();
        message.put_u8(tag);
        message.put_u32(7);
        for (kind, values) in tuples {
            message.put_u8(*kind);
            message.put_u16(u16::try_from(values.len()).expect("a few"));
            for value in *values {
                match value {
                    Value::Null => message.put_u8(b'n'),
                    Value::Unchanged => message.put_u8(b'u'),
                    Value::Is(bytes) => {
                        message.put_u8(b'b');
                        message.put_u32(u32::try_from(bytes.len()).expect("short"));
                        message.put_slice(bytes);
                    }
                }
            }
        }
        let entries = self.say(message).into_iter().map(|said| match said {
            Said::Entry { entry, .. } => entry.what,
            said => panic!("{said:?}"),
        });
        entries.collect()
    }
}

#[derive(Clone)]
enum Value {
    Null,
    Unchanged,
    Is(Bytes),
}

fn id(number: u128) -> Value {
    Value::Is(Bytes::copy_from_slice(Uuid::from_u128(number).as_bytes()))
}

fn text(value: &str) -> Value {
    Value::Is(Bytes::copy_from_slice(value.as_bytes()))
}

fn calls() -> Wire {
    let columns = [("id", Type::UUID), ("site_id", Type::UUID), ("note", Type::TEXT)];
    Wire::new("public", "calls", &["id", "site_id", "note"], &columns)
}

#[test]
fn what_an_update_left_alone_is_taken_from_the_row_before() {
    let old = [id(1), id(3), text("long")];
    let new = [id(1), id(4), Value::Unchanged];
    let told = calls().change(b'U', &[(b'O', &old), (b'N', &new)]);
    let [What::Row(Change::Update { old, new })] = &told[..] else { panic!("{told:?}") };
    assert_eq!((old.0.site, new.0.site), (site(3), site(4)));
    assert_eq!(new.1.column::<&str>("note").expect("it is there"), "long");
}

#[test]
fn a_row_that_cannot_be_told_is_to_be_read_anew_and_ends_nothing() {
    let anew = |told: Vec<What>| -> Vec<Option<SiteId>> {
        let sites = told.into_iter().map(|what| match what {
            What::Anew { site, .. } => site,
            what @ What::Row(_) => panic!("{what:?}"),
        });
        sites.collect()
    };
    let whole = [id(1), id(3), text("x")];
    let mut wire = calls();
    assert_eq!(anew(wire.change(b'I', &[(b'N', &[id(1), Value::Null, text("x")])])), [None]);
    assert_eq!(anew(wire.change(b'I', &[(b'N', &[id(1), id(3)])])), [None]);
    assert_eq!(anew(wire.change(b'I', &[(b'N', &[id(1), id(3), Value::Unchanged])])), [None]);
    // The key holds the site, so the place of a row without an old value is known.
    assert_eq!(anew(wire.change(b'U', &[(b'N', &whole)])), [Some(site(3))]);
    assert_eq!(
        anew(wire.change(b'U', &[(b'K', &[id(1), id(2), Value::Null]), (b'N', &whole)])),
        [Some(site(2)), Some(site(3))]
    );
    assert_eq!(anew(wire.change(b'D', &[(b'K', &[id(1), id(2), Value::Null])])), [Some(site(2))]);
    // It does not.
    let columns = [("id", Type::UUID), ("site_id", Type::UUID), ("note", Type::TEXT)];
    let mut wire = Wire::new("public", "calls", &["id"], &columns);
    assert_eq!(anew(wire.change(b'U', &[(b'N', &whole)])), [None]);
    assert_eq!(anew(wire.change(b'D', &[(b'K', &[id(1), Value::Null, Value::Null])])), [None]);
    assert!(matches!(wire.change(b'I', &[(b'N', &whole)])[..], [What::Row(Change::Insert { .. })]), "it goes on");
}

#[test]
fn a_mark_says_whose_rows_came_or_went() {
    let columns = [
        ("tab", Type::TEXT),
        ("month", Type::DATE),
        ("site_id", Type::UUID),
        ("xid", Type::XID8),
        ("cause", Type::TEXT),
    ];
    let mut wire = Wire::new("opsmantik", "vanished", &[], &columns);
    let days = |days: i32| Value::Is(Bytes::copy_from_slice(&days.to_be_bytes()));
    let mut mark = |tab: &str, month: Value, of: u128, cause: &str| {
        let told = wire.change(b'I', &[(b'N', &[text(tab), month, id(of), Value::Null, text(cause)])]);
        let places = told.into_iter().map(|what| match what {
            What::Anew { site, month } => (site, month.map(|month| month.to_string())),
            what @ What::Row(_) => panic!("{what:?}"),
        });
        places.collect::<Vec<_>>()
    };
    assert_eq!(mark("events", days(0), 5, "detach"), [(Some(site(5)), Some("2000-01-01".to_owned()))]);
    assert_eq!(mark("sessions", days(i32::MIN), 0, "truncate"), [(None, None)]);
    assert_eq!(mark("calls", days(i32::MIN), 5, "delete"), [], "its rows are told");
    assert_eq!(mark("nonsense", days(0), 5, "attach").len(), 3, "it may be any");
}

#[test]
fn positions_count_within_a_transaction_and_memory_is_accounted_for() {
    let mut wire = calls();
    for n in 1..=3u32 {
        let mut message = BytesMut::from(&b"I\0\0\0\x07N\0\x03"[..]);
        for value in [Uuid::from_u128(1).as_bytes(), Uuid::from_u128(2).as_bytes(), &[b'x'; 9000][..]] {
            message.put_u8(b'b');
            message.put_u32(u32::try_from(value.len()).expect("short"));
            message.put_slice(value);
        }
        let said = wire.say(message);
        let [Said::Entry { table: Table::Calls, entry, bytes }] = &said[..] else { panic!("{said:?}") };
        assert_eq!((entry.position, entry.xid), (Position { lsn: 500, seq: n }, 1001));
        assert_eq!(entry.committed_at.to_rfc3339(), "2000-01-01T00:00:01+00:00");
        assert!((9032..10_000).contains(bytes), "{bytes}");
    }
}
