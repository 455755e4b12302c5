//! Advisory locks that make concurrent writers agree.
//!
//! Two things cannot be settled by row locks, since the rows may not be there yet: the month of a new session, and the history of a
//! fingerprint. Both are locked by name for the length of a transaction. A writer takes all its session locks first and all its fingerprint
//! locks after, each sorted, before it writes a row; so two writers cannot wait for each other in a circle.

use uuid::Uuid;

use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::id::{SessionId, SiteId};

crate::statement!(
    /// `pg_advisory_xact_lock` in the order of the array.
    LOCK_NAMES,
    Months::None,
    [INT8_ARRAY],
    "SELECT pg_advisory_xact_lock(name) FROM unnest($1) AS name"
);

/// The name of a lock. Sessions and fingerprints have halves of the number space of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

/// Takes locks until the end of the transaction.
pub async fn take(tx: &Transaction<'_>, mut names: Vec<LockName>) -> Result<(), StoreError> {
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Ok(());
    }
    let names: Vec<i64> = names.into_iter().map(|name| name.0).collect();
    tx.query(&LOCK_NAMES, &[&names]).await?;
    Ok(())
}
