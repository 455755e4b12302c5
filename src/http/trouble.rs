//! Saying that a route cannot store what it is sent: at once, and then once a second for as long as it lasts.
//!
//! Under pressure thousands of requests a second may be refused, and a line for each would be more work than the refusals. So they are counted, each
//! route and each code by itself: a burst has a line when it begins and one a second with how many came since the line before. It is over after a
//! second without any, and none of them is told later than that.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::response::{IntoResponse, Response};

use super::answer::Problem;

/// From one line of a burst to the next.
const BETWEEN: Duration = Duration::from_secs(1);

/// The answer; logged if it is the server's own fault.
pub(super) fn logged(route: &'static str, problem: Problem) -> Response {
    if problem.is_server_side() {
        let trouble = Trouble { route, code: problem.code() };
        if bursts().count(trouble) {
            trouble.tell(1);
            tokio::spawn(Burst(trouble).tell_until_over());
        }
    }
    problem.into_response()
}

/// What is counted together. Routes and codes are words of ours, so there are few.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Trouble {
    route: &'static str,
    code: &'static str,
}

impl Trouble {
    fn tell(self, requests: u64) {
        let Self { route, code } = self;
        tracing::warn!(http.route = route, error.code = code, requests, "requests could not be stored now");
    }
}

/// A burst that is under way. What was not told of it yet is told when this is dropped, also by a server that stops.
struct Burst(Trouble);

impl Burst {
    async fn tell_until_over(self) {
        loop {
            tokio::time::sleep(BETWEEN).await;
            let untold = bursts().told(self.0);
            if untold == 0 {
                return;
            }
            self.0.tell(untold);
        }
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        let untold = bursts().end(self.0);
        if untold > 0 {
            self.0.tell(untold);
        }
    }
}

/// How many requests of each burst that is under way were not told yet.
#[derive(Debug)]
struct Bursts(BTreeMap<Trouble, u64>);

static BURSTS: Mutex<Bursts> = Mutex::new(Bursts(BTreeMap::new()));

fn bursts() -> MutexGuard<'static, Bursts> {
    BURSTS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bursts {
    /// Whether a burst begins with this one, which is to be told at once. Else it is told with the next line.
    fn count(&mut self, trouble: Trouble) -> bool {
        match self.0.entry(trouble) {
            Entry::Vacant(begins) => {
                begins.insert(0);
                true
            }
            Entry::Occupied(mut untold) => {
                *untold.get_mut() += 1;
                false
            }
        }
    }

    /// How many there were since the last line.
    fn told(&mut self, trouble: Trouble) -> u64 {
        self.0.get_mut(&trouble).map_or(0, mem::take)
    }

    /// The next one begins a burst again. How many there were since the last line.
    fn end(&mut self, trouble: Trouble) -> u64 {
        self.0.remove(&trouble).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_route_and_code_is_counted_by_itself_and_none_is_forgotten_or_told_twice() {
        let trouble = |route, code| Trouble { route, code };
        let all = [trouble("/a", "busy"), trouble("/a", "stopping"), trouble("/b", "busy")];
        let mut bursts = Bursts(BTreeMap::new());
        assert_eq!(all.map(|trouble| bursts.count(trouble)), [true; 3], "each has a first line of its own");
        assert_eq!([0, 0, 2].map(|which| bursts.count(all[which])), [false; 3]);
        assert_eq!(all.map(|trouble| bursts.told(trouble)), [2, 0, 1]);
        assert!(!bursts.count(all[0]));
        assert_eq!(all.map(|trouble| bursts.end(trouble)), [1, 0, 0]);
        assert!(bursts.count(all[0]), "and the next one begins anew");
    }
}
