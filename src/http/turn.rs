//! Understanding requests in turn: only as many at once as there are processors, pages of every origin in their turn.
//!
//! To read and check a batch takes a processor for a while. Were all that have arrived ready to run at once, then whoever writes to the database
//! would stand in line behind them at every step, with locks held, and the more is offered the less would be stored. So those who have to wait do
//! it here, and within a long piece of work the others get a chance now and then. What site a request is of is not known yet; its `Origin`
//! stands for that, so that the pages of one do not wait behind those of another. Anybody can make up origins; those who wait have their turns
//! all the same ([`FairQueue`]), and whoever still waits after [`PATIENCE`] is told to come again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem;
use std::num::NonZeroUsize;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::Duration;

use http::HeaderMap;
use http::header::ORIGIN;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::domain::outcome::Unavailable;
use crate::fair_queue::FairQueue;

/// Bytes of bodies that are understood for one origin in a row, where others wait.
const QUANTUM: usize = 32 << 10;
/// A body without any bytes costs as much as so many of them, or thousands of them would be one turn.
const OVERHEAD: usize = 1 << 10;
/// Nobody waits longer for a turn. More is understood than can be stored, so who waits for seconds would mostly be refused afterwards.
const PATIENCE: Duration = Duration::from_secs(3);
/// Who gave up is looked for when so many wait; then again when they are twice as many as were left.
const FEW: usize = 512;

static TURNS: LazyLock<Mutex<Turns>> = LazyLock::new(|| {
    let free = available_parallelism().map_or(1, NonZeroUsize::get);
    Mutex::new(Turns { free, waiting: FairQueue::new(QUANTUM), sweep_at: FEW })
});

struct Turns {
    free: usize,
    waiting: FairQueue<u64, oneshot::Sender<Turn>>,
    sweep_at: usize,
}

impl Turns {
    /// A place in the queue. Those of others who gave up are taken out now and then, so that they are never the most of it for long.
    fn queue(&mut self, asking: Asking) -> oneshot::Receiver<Turn> {
        if self.waiting.ready().items >= self.sweep_at {
            self.waiting.remove_where(oneshot::Sender::is_closed);
            self.sweep_at = (2 * self.waiting.ready().items).max(FEW);
        }
        let (sender, mine) = oneshot::channel();
        self.waiting.push(asking.origin, asking.bytes + OVERHEAD, sender);
        mine
    }
}

fn turns() -> MutexGuard<'static, Turns> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who waits for a turn, and for how much work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asking {
    origin: u64,
    bytes: usize,
}

impl Asking {
    pub(super) fn of(headers: &HeaderMap, bytes: usize) -> Self {
        let mut hasher = DefaultHasher::new();
        headers.get(ORIGIN).map(|origin| origin.as_bytes()).hash(&mut hasher);
        Self { origin: hasher.finish(), bytes }
    }

    /// Waits for a turn. Within it nothing else is waited for.
    pub(super) async fn turn(self) -> Result<Turn, Unavailable> {
        self.turn_within(PATIENCE).await
    }

    async fn turn_within(self, patience: Duration) -> Result<Turn, Unavailable> {
        let mine = {
            let mut turns = turns();
            if turns.free > 0 {
                turns.free -= 1;
                return Ok(Turn(()));
            }
            turns.queue(self)
        };
        // Turns are passed on, so this one comes; the question is when.
        timeout(patience, mine).await.ok().and_then(Result::ok).ok_or(Unavailable::Busy)
    }

    /// Does a short piece of work in a turn of its own.
    pub(super) async fn in_turn<T>(self, work: impl FnOnce() -> T) -> Result<T, Unavailable> {
        let _turn = self.turn().await?;
        Ok(work())
    }
}

/// A turn; passed on when it is dropped, also by whoever was given it and does not want it any more.
#[derive(Debug)]
pub(super) struct Turn(());

impl Drop for Turn {
    fn drop(&mut self) {
        loop {
            let next = {
                let mut turns = turns();
                let next = turns.waiting.pop();
                turns.free += usize::from(next.is_none());
                next
            };
            let Some((_, next)) = next else { return };
            match next.send(Turn(())) {
                Ok(()) => return,
                // Whoever waited has gone: the same turn is offered to the next one.
                Err(unwanted) => mem::forget(unwanted),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use std::sync::Arc;
    use tokio::task::JoinSet;

    fn asking(origin: &'static str, bytes: usize) -> Asking {
        Asking::of(&HeaderMap::from_iter([(ORIGIN, HeaderValue::from_static(origin))]), bytes)
    }

    /// The turns are of the whole process, so only one test at a time has them.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    async fn take_all() -> Vec<Turn> {
        let all = turns().free;
        let held = futures::future::join_all((0..all).map(|_| asking("x", 1).turn())).await;
        held.into_iter().collect::<Result<_, _>>().expect("they are free")
    }

    #[tokio::test]
    async fn every_origin_has_its_turn_and_none_is_lost() {
        let _alone = ALONE.lock().await;
        let held = take_all().await;
        let all = held.len();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = JoinSet::new();
        for origin in [["https://loud.example"; 20].as_slice(), &["https://quiet.example"]].concat() {
            let order = order.clone();
            waiting.spawn(async move {
                let work = || order.lock().unwrap_or_else(PoisonError::into_inner).push(origin);
                asking(origin, 16 << 10).in_turn(work).await
            });
            tokio::task::yield_now().await;
        }
        // Some give up while they wait, one of them with a turn already his.
        let mut gone = Box::pin(asking("https://gone.example", 1).turn());
        assert!(futures::poll!(gone.as_mut()).is_pending());
        drop(gone);
        drop(held);
        while let Some(done) = waiting.join_next().await {
            assert_eq!(done.expect("no panic"), Ok(()));
        }
        let order = order.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert_eq!(order.len(), 21);
        assert!(order[..6].contains(&"https://quiet.example"), "{order:?}");
        assert_eq!(turns().free, all, "all turns are free again");
    }

    #[tokio::test]
    async fn nobody_waits_for_ever_and_those_who_gave_up_are_forgotten() {
        let _alone = ALONE.lock().await;
        let held = take_all().await;
        let all = held.len();
        let patience = Duration::from_millis(10);
        let waited = tokio::time::timeout(Duration::from_secs(5), asking("x", 1).turn_within(patience)).await;
        assert_eq!(waited.expect("not for ever").err(), Some(Unavailable::Busy));
        for _ in 0..10 * FEW {
            let mut gone = Box::pin(asking("https://gone.example", 1).turn());
            assert!(futures::poll!(gone.as_mut()).is_pending());
        }
        assert!(turns().waiting.ready().items <= FEW, "{:?}", turns().waiting.ready());
        drop(held);
        assert_eq!(turns().free, all, "all turns are free again");
        assert!(asking("x", 1).turn().await.is_ok());
    }
}
