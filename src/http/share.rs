//! A room that clients share: nobody holds more of it than they leave free.
//!
//! What is counted here is taken before anybody knows who sends it and whether it is of any use, so one client must not be able to take what
//! the others need. Alone a client gets half of the room, the next one half of what is left, and so on: whoever comes next finds
//! a place, for something small even the last of it. Nothing is set aside beforehand, and nobody who is in is sent away.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::client_address::Client;

/// A room of so much; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Shared(Arc<Mutex<Room>>);

#[derive(Debug)]
struct Room {
    free: usize,
    /// Whoever holds nothing may have so much for as long as there is any.
    small: usize,
    held: HashMap<Client, usize>,
}

impl Shared {
    pub(super) fn new(all: usize, small: usize) -> Self {
        Self(Arc::new(Mutex::new(Room { free: all, small, held: HashMap::new() })))
    }

    /// A client's part, of which nothing is taken yet.
    pub(super) fn part(&self, client: Client) -> Part {
        Part { shared: self.clone(), client, taken: 0 }
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    fn admits(&self, held: usize, more: usize) -> bool {
        let left = self.free.checked_sub(more);
        left.is_some_and(|left| held + more <= left || (held == 0 && more <= self.small))
    }
}

/// What was taken for one purpose; given back when it is dropped.
#[derive(Debug)]
pub struct Part {
    shared: Shared,
    client: Client,
    taken: usize,
}

impl Part {
    /// Takes so much more, if this client may have it.
    pub(super) fn take(&mut self, more: usize) -> bool {
        let mut room = self.shared.room();
        let held = room.held.get(&self.client).copied().unwrap_or(0);
        if !room.admits(held, more) {
            return false;
        }
        room.free -= more;
        room.held.insert(self.client, held + more);
        self.taken += more;
        true
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.taken == 0 {
            return;
        }
        let mut room = self.shared.room();
        room.free += self.taken;
        if let Some(held) = room.held.get_mut(&self.client) {
            *held -= self.taken;
            if *held == 0 {
                room.held.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::IpAddr;

    fn client(n: u8) -> Client {
        Client::of(IpAddr::from([203, 0, 113, n]))
    }

    /// As much as it gets, one at a time.
    fn fill(shared: &Shared, n: u8) -> (Part, usize) {
        let mut part = shared.part(client(n));
        while part.take(1) {}
        let taken = part.taken;
        (part, taken)
    }

    #[test]
    fn one_client_gets_half_and_whoever_comes_next_half_of_what_is_left() {
        let shared = Shared::new(1024, 2);
        let held: Vec<(Part, usize)> = (0..10).map(|n| fill(&shared, n)).collect();
        assert_eq!(held.iter().map(|(_, taken)| *taken).collect::<Vec<_>>(), [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]);
        assert!(!shared.part(client(0)).take(1), "in another part it is still the same client");
        assert!(!shared.part(client(77)).take(2), "more than there is");
        assert!(shared.part(client(77)).take(1), "the last of it");
        drop(held);
        assert_eq!(fill(&shared, 77).1, 512, "all of it was given back");
    }

    proptest! {
        #[test]
        fn nothing_is_counted_twice_and_nobody_takes_what_others_need(
            steps in proptest::collection::vec((0_u8..5, 1_usize..300, any::<bool>()), 1..300),
        ) {
            let shared = Shared::new(1000, 10);
            let mut parts: Vec<Part> = Vec::new();
            for (n, amount, comes) in steps {
                let mine = |part: &Part| part.client == client(n);
                if !comes {
                    if let Some(at) = parts.iter().position(mine) {
                        parts.swap_remove(at);
                    }
                } else if let Some(part) = parts.iter_mut().find(|part| mine(part)).filter(|_| amount % 2 == 0) {
                    part.take(amount);
                } else {
                    let mut part = shared.part(client(n));
                    part.take(amount);
                    parts.push(part);
                }
                let room = shared.room();
                prop_assert_eq!(room.free + parts.iter().map(|part| part.taken).sum::<usize>(), 1000);
                let held = |n| parts.iter().filter(|part| part.client == client(n)).map(|part| part.taken).sum::<usize>();
                for n in 0..5 {
                    prop_assert_eq!(room.held.get(&client(n)).copied().unwrap_or(0), held(n));
                    prop_assert!(held(n) <= 500, "{} has more than half", n);
                }
                prop_assert!(room.held.values().all(|held| *held > 0), "whoever holds nothing is forgotten");
            }
        }
    }
}
