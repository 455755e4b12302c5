//! Connections on which nobody has shown a good token yet, so that they cannot keep out those who have one.
//!
//! A connection is a newcomer until the first call on it is let in. Newcomers live for [`LIFE`] at most, whatever they say on the way,
//! and half of the door's places are theirs at most; where one more comes, or no place is free at all, the oldest of them is closed.
//! Health needs no token and makes nobody known: who only asks for it is closed as well after a while, and connects again.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Nobody takes longer for the first call, and a prober that connects again once a minute is no burden.
const LIFE: Duration = Duration::from_secs(60);

/// All newcomers of a door; clones share them.
#[derive(Clone)]
pub(super) struct Newcomers {
    queue: Arc<Mutex<Queue>>,
    most: usize,
    life: Duration,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// In the order of their coming.
    waiting: BTreeMap<u64, CancellationToken>,
}

impl Newcomers {
    /// At most so many.
    pub(super) fn new(most: usize) -> Self {
        Self { queue: Arc::default(), most, life: LIFE }
    }

    /// One more. The oldest is closed if they are too many.
    pub(super) fn enter(&self) -> Newcomer {
        let closed = CancellationToken::new();
        let mut queue = self.queue();
        while queue.waiting.len() >= self.most && close_oldest(&mut queue) {}
        let id = queue.next;
        queue.next += 1;
        queue.waiting.insert(id, closed.clone());
        drop(queue);
        let life = self.life;
        let over = Box::pin(async move { drop(tokio::time::timeout(life, closed.cancelled()).await) });
        let welcome = Welcome(Arc::new(Entry { id, newcomers: self.clone(), known: AtomicBool::new(false) }));
        Newcomer { welcome, over, is_over: false }
    }

    /// Closes the oldest, whose place is free soon. Nothing happens where there is none.
    pub(super) fn close_oldest(&self) {
        close_oldest(&mut self.queue());
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close_oldest(queue: &mut Queue) -> bool {
    let oldest = queue.waiting.pop_first();
    if let Some((_, closed)) = &oldest {
        tracing::debug!("a gRPC connection without a good token made room for another");
        closed.cancel();
    }
    oldest.is_some()
}

struct Entry {
    id: u64,
    newcomers: Newcomers,
    known: AtomicBool,
}

/// Makes a newcomer known. Among the extensions of every request on its connection.
#[derive(Clone)]
pub(super) struct Welcome(Arc<Entry>);

impl Welcome {
    /// A call on this connection was let in: from now on it is no newcomer.
    pub(super) fn known(&self) {
        if !self.0.known.swap(true, Ordering::Relaxed) {
            self.0.newcomers.queue().waiting.remove(&self.0.id);
        }
    }
}

/// A connection's time as a newcomer.
pub(super) struct Newcomer {
    welcome: Welcome,
    over: Pin<Box<dyn Future<Output = ()> + Send>>,
    is_over: bool,
}

impl Newcomer {
    pub(super) fn welcome(&self) -> Welcome {
        self.welcome.clone()
    }

    pub(super) fn is_known(&self) -> bool {
        self.welcome.0.known.load(Ordering::Relaxed)
    }

    /// Ready when the connection has to be closed.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.is_over = self.is_over || self.over.as_mut().poll(cx).is_ready();
        if self.is_over { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.welcome.0.newcomers.queue().waiting.remove(&self.welcome.0.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    async fn is_over(newcomer: &mut Newcomer) -> bool {
        let over = poll_fn(|cx| newcomer.poll_over(cx));
        tokio::time::timeout(Duration::from_millis(50), over).await.is_ok()
    }

    #[tokio::test]
    async fn the_oldest_makes_room_and_who_is_known_stays() {
        let newcomers = Newcomers::new(2);
        let (mut friend, mut first) = (newcomers.enter(), newcomers.enter());
        friend.welcome().known();
        assert!(friend.is_known() && !first.is_known());
        let mut third = newcomers.enter();
        assert!(!is_over(&mut first).await, "there is room for two");
        let _fourth = newcomers.enter();
        assert!(is_over(&mut first).await && is_over(&mut first).await);
        assert!(!is_over(&mut third).await && !is_over(&mut friend).await);
        drop(third);
        let mut fifth = newcomers.enter();
        newcomers.close_oldest();
        assert!(!is_over(&mut fifth).await, "who has left counts no longer, and the fourth is older");
    }

    #[tokio::test]
    async fn nobody_is_a_newcomer_for_ever() {
        let newcomers = Newcomers { life: Duration::from_millis(1), ..Newcomers::new(2) };
        let mut newcomer = newcomers.enter();
        assert!(is_over(&mut newcomer).await);
    }
}
