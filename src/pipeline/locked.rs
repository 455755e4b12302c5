//! Visits whose row somebody holds a lock on: a person who edits it, or another server that hangs in a transaction.
//!
//! A batch that meets one waits for nothing, and its neighbours with it. So once a visit is found its events are sent away for a while, and
//! come again by whoever keeps them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::id::{SessionId, SiteId};

/// A visit whose neighbours were stored is not tried again before.
pub(super) const WHILE_OTHERS_ARE_STORED: Duration = Duration::from_secs(10);
/// One that was alone: perhaps it is not the visit that is locked, but all of a site, or a table; then all is well as soon as that is over.
pub(super) const WHILE_ALONE: Duration = Duration::from_secs(1);
/// Most that are remembered.
const MOST: usize = 10_000;

pub(super) type Visit = (SiteId, SessionId);

/// Visits that are not to be tried.
#[derive(Debug, Default)]
pub(super) struct LockedVisits {
    until: Mutex<HashMap<Visit, Instant>>,
}

impl LockedVisits {
    pub fn add(&self, visit: Visit, away: Duration) {
        let now = Instant::now();
        let mut until = self.until();
        until.retain(|_, until| *until > now);
        if until.len() < MOST {
            until.insert(visit, now + away);
        }
    }

    pub fn contains(&self, visit: Visit) -> bool {
        let until = self.until();
        !until.is_empty() && until.get(&visit).is_some_and(|until| *until > Instant::now())
    }

    fn until(&self) -> MutexGuard<'_, HashMap<Visit, Instant>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
