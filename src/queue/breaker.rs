//! A circuit breaker: after a run of failures, nobody is sent into the next one for a while. Every queue has one of its own.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So many failures in a row open it ...
const FAILURES: u32 = 5;
/// ... for this long. The first failure after that opens it again.
const PAUSE: Duration = Duration::from_secs(10);

/// Open means: do not even try.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    fn state(&self) -> MutexGuard<'_, State> {
        // Two plain fields cannot be left half written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_open(&self) -> bool {
        self.state().open_until.is_some_and(|until| Instant::now() < until)
    }

    pub fn succeeded(&self) {
        *self.state() = State::default();
    }

    /// Counts a failure; whether it opened the breaker.
    pub fn failed(&self) -> bool {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        let opens = state.failures >= FAILURES;
        if opens {
            state.open_until = Some(Instant::now() + PAUSE);
        }
        opens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_opens_after_a_run_and_one_failure_after_the_pause_is_enough() {
        let breaker = Breaker::default();
        assert!((1..FAILURES).all(|_| !breaker.failed()));
        breaker.succeeded();
        assert!((1..FAILURES).all(|_| !breaker.failed()) && !breaker.is_open(), "not in a row");
        assert!(breaker.failed() && breaker.is_open());
        breaker.state().open_until = Some(Instant::now() - Duration::from_millis(1));
        assert!(!breaker.is_open(), "after the pause it is tried again");
        assert!(breaker.failed() && breaker.is_open());
        breaker.succeeded();
        assert!(!breaker.is_open());
    }
}
