//! Seats for work that takes a connection for a while: a few for all, and for each site one after the other.
//!
//! So a flood of one site takes one seat and not all of them, nor all connections.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::domain::id::SiteId;

pub(crate) struct Seats {
    seats: Semaphore,
    /// Of each site that somebody works on or waits for.
    queues: Mutex<HashMap<SiteId, Arc<Semaphore>>>,
    /// Nobody waits longer for a seat.
    patience: Duration,
}

/// Leave to work on one site, or to wait for that.
pub(crate) struct Seat<'s> {
    seats: &'s Seats,
    site: SiteId,
    turn: Option<OwnedSemaphorePermit>,
    seat: Option<SemaphorePermit<'s>>,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        drop(self.turn.take());
        self.seats.forget(self.site);
    }
}

impl Seats {
    pub fn new(seats: usize, patience: Duration) -> Self {
        Self { seats: Semaphore::new(seats), queues: Mutex::default(), patience }
    }

    /// The site's turn first, then a seat: whoever waits for others of the same site keeps nobody else from working. None if that takes too long.
    pub async fn take(&self, site: SiteId) -> Option<Seat<'_>> {
        // Whoever gives up while they wait leaves as well.
        let mut leave = Seat { seats: self, site, turn: None, seat: None };
        let wait = async {
            let queue = self.queues().entry(site).or_insert_with(|| Arc::new(Semaphore::new(1))).clone();
            leave.turn = queue.acquire_owned().await.ok();
            leave.seat = self.seats.acquire().await.ok();
        };
        tokio::time::timeout(self.patience, wait).await.ok()?;
        (leave.turn.is_some() && leave.seat.is_some()).then_some(leave)
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<SiteId, Arc<Semaphore>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the queue of a site that nobody works on or waits for.
    fn forget(&self, site: SiteId) {
        let mut queues = self.queues();
        if queues.get(&site).is_some_and(|queue| Arc::strong_count(queue) == 1 && queue.available_permits() == 1) {
            queues.remove(&site);
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_site_has_one_seat_and_others_have_theirs() {
        let seats = Seats::new(2, Duration::from_secs(5));
        let [one, other, third] = [1, 2, 3].map(|n| SiteId::from_uuid(Uuid::from_u128(n)));
        let first = seats.take(one).await.expect("all are free");
        assert!(seats.take(one).await.is_none(), "it has its seat");
        let second = seats.take(other).await.expect("that site has none yet");
        assert!(seats.take(third).await.is_none(), "all are taken");
        drop(first);
        let first = seats.take(third).await.expect("one is free");
        let given_up = tokio::time::timeout(Duration::from_millis(1), seats.take(one)).await;
        assert!(given_up.is_err(), "all are taken");
        drop((first, second));
        assert!(seats.queues().is_empty(), "nothing is kept of who has gone");
    }
}
