//! Advisory locks that make concurrent writers agree.
//!
//! Three things cannot be settled by row locks, since the rows may not be there yet: which events a call could be matched to, the month of
//! a new session, and the history of a fingerprint. All are locked by name for the length of a transaction.
//!
//! Whoever writes events passes the gate of each site with others; whoever matches calls has the gate of their one site for themselves, so
//! what they see of the site's events is whole. A writer takes gates first, then session locks, then fingerprint locks, each sorted,
//! before it writes a row; so two writers cannot wait for each other in a circle. Only a fingerprint that no event of a batch tells, but a
//! stored session of it does, is locked late. Two writers with several such might: PostgreSQL then ends one of them, and it is tried again.

use uuid::Uuid;

use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::id::{SessionId, SiteId};

crate::statement!(
    /// In the order of the array.
    LOCK_NAMES,
    Months::None,
    [INT8_ARRAY],
    "SELECT pg_advisory_xact_lock(name) FROM unnest($1) AS name"
);

crate::statement!(
    /// Gates, then names, each in the order of its array. The branches of UNION ALL run one after the other.
    PASS_GATES,
    Months::None,
    [INT4, INT4_ARRAY, INT8_ARRAY],
    "SELECT pg_advisory_xact_lock_shared($1, gate) FROM unnest($2) AS gate \
     UNION ALL SELECT pg_advisory_xact_lock(name) FROM unnest($3) AS name"
);

crate::statement!(CLOSE_GATE, Months::None, [INT4, INT4], "SELECT pg_advisory_xact_lock($1, $2)");

/// The first half of a gate's name: pairs of numbers are another space than single ones.
const GATES: i32 = 0x6f70_736d;

/// The second half. Two sites with the same one now and then wait for each other, which harms nobody.
fn gate(site: SiteId) -> i32 {
    let half = fold(site.as_uuid());
    #[allow(clippy::cast_possible_truncation)] // half of the bits are as good
    let gate = (half ^ (half >> 32)) as i32;
    gate
}

/// The name of a lock. Sessions and fingerprints have halves of the number space of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockName(i64);

impl LockName {
    pub fn session(site: SiteId, id: SessionId) -> Self {
        Self(fold(Uuid::new_v5(&site.as_uuid(), id.as_uuid().as_bytes())) & i64::MAX)
    }

    pub fn fingerprint(site: SiteId, fingerprint: &str) -> Self {
        Self(fold(Uuid::new_v5(&site.as_uuid(), fingerprint.as_bytes())) | i64::MIN)
    }
}

fn fold(uuid: Uuid) -> i64 {
    let (high, low) = uuid.as_u64_pair();
    (high ^ low).cast_signed()
}

/// The order in which locks are taken: those of sessions, which are positive, before those of fingerprints.
fn in_order(mut names: Vec<LockName>) -> Vec<i64> {
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.dedup();
    names.into_iter().map(|name| name.0).collect()
}

/// Takes locks until the end of the transaction.
pub async fn take(tx: &Transaction<'_>, names: Vec<LockName>) -> Result<(), StoreError> {
    if names.is_empty() {
        return Ok(());
    }
    let names = in_order(names);
    tx.query(&LOCK_NAMES, &[&names]).await?;
    Ok(())
}

/// Passes the gates of sites, together with others who write their events, and takes locks; until the end of the transaction.
pub async fn pass(tx: &Transaction<'_>, sites: &[SiteId], names: Vec<LockName>) -> Result<(), StoreError> {
    let mut gates: Vec<i32> = sites.iter().map(|site| gate(*site)).collect();
    gates.sort_unstable();
    gates.dedup();
    let names = in_order(names);
    tx.query(&PASS_GATES, &[&GATES, &gates, &names]).await?;
    Ok(())
}

/// Waits until nobody writes events of the site, and lets nobody begin to, until the end of the transaction.
pub async fn close(tx: &Transaction<'_>, site: SiteId) -> Result<(), StoreError> {
    tx.query(&CLOSE_GATE, &[&GATES, &gate(site)]).await?;
    Ok(())
}
