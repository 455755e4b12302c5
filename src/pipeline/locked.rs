//! Visits whose row somebody holds a lock on: a person who edits it, or another server that hangs in a transaction.
//!
//! A batch that meets one waits for nothing, and its neighbours with it. So once a visit is found its events are sent away for a while, and
//! come again by whoever keeps them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::id::{SessionId, SiteId};

/// A visit is not tried again before.
const FOR: Duration = Duration::from_secs(10);
/// Most that are remembered.
const MOST: usize = 10_000;

pub(super) type Visit = (SiteId, SessionId);

/// Visits that are not to be tried.
#[derive(Debug, Default)]
pub(super) struct LockedVisits {
    until: Mutex<HashMap<Visit, Instant>>,
}

impl LockedVisits {
    pub fn add(&self, visit: Visit) {
        let now = Instant::now();
        let mut until = self.until();
        until.retain(|_, until| *until > now);
        if until.len() < MOST {
            until.insert(visit, now + FOR);
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
