//! Resume tokens: where in the log a client stands, and how much of the tables it has been shown.
//!
//! Opaque to clients, with a version, and bound by a digest to RPC, site and month: sent with another watch, or damaged, it is refused. It
//! is no secret and gives no access: whatever it says, rows are read under the policies of its caller.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{Datelike, NaiveDate};
use prost::Message;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::coverage::{Edge, Key};
use crate::domain::change::{Lineage, Position};
use crate::domain::month::Month;

/// Longest token that is read: what the contract says of ours.
const MAX_TOKEN: usize = 256;
const VERSION: u8 = 1;
/// Bytes of the digest in a token.
const DIGEST: usize = 16;

/// What a client has, after some message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) lineage: Lineage,
    /// All that the log tells up to here of what was shown.
    pub(super) position: Position,
    /// Of the next change the first half was told, too: the row has left its place, and is not told in its new one.
    pub(super) halved: bool,
    /// All transactions below are told, or were there before.
    pub(super) horizon: u64,
    /// The rows before this edge were shown.
    pub(super) shown: Edge,
    /// What the client has besides, from an earlier time.
    pub(super) had: Option<Had>,
}

/// The rows before an edge, as they were when all transactions below `since` and perhaps some later ones had ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Had {
    pub(super) since: u64,
    pub(super) to: Edge,
}

#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(fixed64, tag = "1")]
    system: u64,
    #[prost(uint32, tag = "2")]
    timeline: u32,
    #[prost(uint32, tag = "3")]
    database: u32,
    #[prost(uint64, tag = "4")]
    lsn: u64,
    #[prost(uint32, tag = "5")]
    seq: u32,
    #[prost(bool, tag = "6")]
    halved: bool,
    #[prost(uint64, tag = "7")]
    horizon: u64,
    /// None: the end.
    #[prost(message, optional, tag = "8")]
    shown: Option<WireKey>,
    #[prost(message, optional, tag = "9")]
    had: Option<WireHad>,
}

#[derive(Clone, PartialEq, Message)]
struct WireHad {
    #[prost(uint64, tag = "1")]
    since: u64,
    #[prost(message, optional, tag = "2")]
    to: Option<WireKey>,
}

#[derive(Clone, PartialEq, Message)]
struct WireKey {
    /// Of its first day, counted from the first of the Common Era.
    #[prost(int32, optional, tag = "1")]
    day: Option<i32>,
    #[prost(bytes = "vec", tag = "2")]
    id: Vec<u8>,
}

/// The tokens of one watch.
pub(super) struct Tokens {
    watch: Vec<u8>,
}

impl Tokens {
    pub(super) fn of(table: &'static str, site: Uuid, month: Option<Month>) -> Self {
        let month = month.map(|month| month.to_string()).unwrap_or_default();
        Self { watch: [table.as_bytes(), &[0], site.as_bytes(), month.as_bytes()].concat() }
    }

    pub(super) fn seal(&self, mark: &Mark) -> String {
        let wire = Wire {
            system: mark.lineage.system,
            timeline: mark.lineage.timeline,
            database: mark.lineage.database,
            lsn: mark.position.lsn,
            seq: mark.position.seq,
            halved: mark.halved,
            horizon: mark.horizon,
            shown: wire_edge(mark.shown),
            had: mark.had.map(|had| WireHad { since: had.since, to: wire_edge(had.to) }),
        };
        let wire = wire.encode_to_vec();
        URL_SAFE_NO_PAD.encode([&[VERSION], self.digest(&wire).as_slice(), &wire].concat())
    }

    /// What the token says; none if it is none of this watch's.
    pub(super) fn open(&self, token: &str) -> Option<Mark> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (version, rest) = bytes.split_first()?;
        let (digest, wire) = rest.split_at_checked(DIGEST)?;
        if *version != VERSION || digest != self.digest(wire) {
            return None;
        }
        let wire = Wire::decode(wire).ok()?;
        let had = match wire.had {
            Some(had) => Some(Had { since: had.since, to: edge(had.to)? }),
            None => None,
        };
        Some(Mark {
            lineage: Lineage { system: wire.system, timeline: wire.timeline, database: wire.database },
            position: Position { lsn: wire.lsn, seq: wire.seq },
            halved: wire.halved,
            horizon: wire.horizon,
            shown: edge(wire.shown)?,
            had,
        })
    }

    fn digest(&self, wire: &[u8]) -> [u8; DIGEST] {
        let whole: [u8; 32] =
            Sha256::new().chain_update(&self.watch).chain_update([0]).chain_update(wire).finalize().into();
        std::array::from_fn(|at| whole[at])
    }
}

fn wire_edge(edge: Edge) -> Option<WireKey> {
    match edge {
        Edge::End => None,
        Edge::Before(Key { month, id }) => {
            let day = month.map(|month| month.first_day().num_days_from_ce());
            Some(WireKey { day, id: id.as_bytes().to_vec() })
        }
    }
}

fn edge(wire: Option<WireKey>) -> Option<Edge> {
    let Some(WireKey { day, id }) = wire else { return Some(Edge::End) };
    let month = match day {
        Some(day) => Some(Month::containing(NaiveDate::from_num_days_from_ce_opt(day)?)),
        None => None,
    };
    Some(Edge::Before(Key { month, id: Uuid::from_slice(&id).ok()? }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens() -> Tokens {
        Tokens::of("events", Uuid::from_u128(1), None)
    }

    fn edges() -> impl Strategy<Value = Edge> {
        let month = proptest::option::of(0i32..2400)
            .prop_map(|n| n.map(|n| "1970-01-01".parse::<Month>().expect("a month").plus(n)));
        let key = (month, any::<u128>()).prop_map(|(month, id)| Edge::Before(Key { month, id: Uuid::from_u128(id) }));
        prop_oneof![Just(Edge::End), key]
    }

    fn marks() -> impl Strategy<Value = Mark> {
        let had = proptest::option::of((any::<u64>(), edges()).prop_map(|(since, to)| Had { since, to }));
        (any::<[u64; 3]>(), any::<[u32; 3]>(), any::<bool>(), edges(), had).prop_map(
            |([system, lsn, horizon], [timeline, database, seq], halved, shown, had)| Mark {
                lineage: Lineage { system, timeline, database },
                position: Position { lsn, seq },
                halved,
                horizon,
                shown,
                had,
            },
        )
    }

    proptest! {
        #[test]
        fn a_token_says_what_was_sealed_and_opens_no_other_watch(mark in marks()) {
            let token = tokens().seal(&mark);
            prop_assert!(token.len() <= MAX_TOKEN && !token.is_empty(), "{}", token.len());
            prop_assert_eq!(tokens().open(&token), Some(mark));
            let month = "2026-11-01".parse().ok();
            let others = [("calls", 1, None), ("events", 2, None), ("events", 1, month)];
            for (table, site, month) in others {
                prop_assert_eq!(Tokens::of(table, Uuid::from_u128(site), month).open(&token), None);
            }
        }

        #[test]
        fn a_damaged_token_is_refused(
            mark in marks(), at: prop::sample::Index, by in 1u8.., cut: prop::sample::Index, any in ".{0,80}"
        ) {
            let token = tokens().seal(&mark);
            let mut bytes = token.clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            let damaged = String::from_utf8_lossy(&bytes).into_owned();
            for bad in [damaged.as_str(), &token[..cut.index(token.len())], &any] {
                prop_assert_eq!(tokens().open(bad), None);
            }
        }
    }
}
