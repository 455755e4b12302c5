//! Understanding requests in turn: only as many at once as there are processors.
//!
//! To read and check a batch takes a processor for a while. Were all that have arrived ready to run at once, then whoever writes to the database
//! would stand in line behind them at every step, with locks held, and the more is offered the less would be stored. So those who have to wait do
//! it here, and within a long piece of work the others get a chance now and then.

use std::num::NonZeroUsize;
use std::sync::LazyLock;
use std::thread::available_parallelism;

use tokio::sync::{Semaphore, SemaphorePermit};

static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(available_parallelism().map_or(1, NonZeroUsize::get)));

/// A turn; over when it is dropped. Nothing is waited for within it.
pub(super) async fn turn() -> Option<SemaphorePermit<'static>> {
    // Never closed.
    TURNS.acquire().await.ok()
}

/// Does a short piece of work in a turn of its own.
pub(super) async fn in_turn<T>(work: impl FnOnce() -> T) -> T {
    let _turn = turn().await;
    work()
}
