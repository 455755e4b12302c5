//! How fast refusals are told.
//!
//! A refusal costs little, and yet a client that asks again as soon as it hears one can have ten thousand a second, on processors that writers need.
//! Few are told at once. Where there are more, each is held back for a moment: whoever waits for an answer before asking again asks less
//! often, and whoever does not is not read from meanwhile.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// So many are told at once ...
const AT_ONCE: u32 = 20;
/// ... within this time.
const WINDOW: Duration = Duration::from_millis(100);
/// The others are held back for so long: they are to come again after a second or more, and who does not listen waits for one all the same.
const HELD_BACK: Duration = Duration::from_secs(1);

/// Of all doors together.
#[derive(Debug)]
pub(super) struct Pace(Mutex<Window>);

#[derive(Debug)]
struct Window {
    since: Instant,
    told: u32,
}

impl Pace {
    pub fn new() -> Self {
        Self(Mutex::new(Window { since: Instant::now(), told: 0 }))
    }

    /// Waits until one more refusal may be told.
    pub async fn wait(&self) {
        if !self.at_once(Instant::now()) {
            sleep(HELD_BACK).await;
        }
    }

    fn at_once(&self, now: Instant) -> bool {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(window.since) >= WINDOW {
            *window = Window { since: now, told: 0 };
        }
        window.told = window.told.saturating_add(1);
        window.told <= AT_ONCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_refusals_are_told_at_once_and_the_rest_of_a_flood_is_held_back() {
        let (pace, begin) = (Pace::new(), Instant::now());
        let told = |after: Duration, times: u32| (0..times).filter(|_| pace.at_once(begin + after)).count();
        assert_eq!(told(Duration::ZERO, 1000), AT_ONCE as usize);
        assert_eq!(told(WINDOW / 2, 10), 0, "still the same flood");
        assert_eq!(told(WINDOW * 2, 10), 10, "it is over");
    }

    #[tokio::test]
    async fn what_is_held_back_is_told_all_the_same() {
        let pace = Pace::new();
        let began = Instant::now();
        futures::future::join_all((0..AT_ONCE).map(|_| pace.wait())).await;
        assert!(began.elapsed() < HELD_BACK);
        pace.wait().await;
        assert!((HELD_BACK..Duration::from_secs(10)).contains(&began.elapsed()));
    }
}
