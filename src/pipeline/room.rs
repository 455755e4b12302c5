//! How much of the waiting room a site may have: bytes counted by site, and one rule of admission.
//!
//! *Space.* A site may hold [`GREED`] times what it leaves free. Alone it gets most of the room; of several that want all they can get each
//! ends with the same, and whoever comes next always finds a place, because nobody can take the last of it. Nothing is counted out or set
//! aside beforehand, nobody who is in is sent away.
//!
//! *Time.* The same rule holds once more with a smaller room, the *window*: what the writers get done within [`TARGET`]. So who is admitted is
//! written soon, and who would wait for long hears so at once. It binds only those who have something waiting already.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

/// A site may hold so many times what it leaves free.
const GREED: usize = 3;
/// What is waiting should be written within this time.
const TARGET: Duration = Duration::from_secs(1);
/// However slow the writers are, the window is this part of the room ...
const SMALLEST_WINDOW: usize = 32;
/// ... and a site may hold this part of it whatever others have waiting.
const MODEST: usize = 64;
/// A first event may take the last of the space if it is no larger, bytes.
const SMALL: usize = 16 << 10;
/// Weight of the newest measurement in the writers' pace: four batches tell it anew.
const NEWEST: f64 = 0.25;

/// Bytes that wait or are being written.
#[derive(Debug)]
pub(super) struct Room<K> {
    all: usize,
    used: usize,
    held: HashMap<K, usize>,
    /// What the writers do in a second, bytes. Unknown, and so no bound, until they had enough to do.
    pace: Option<f64>,
}

impl<K: Copy + Eq + Hash> Room<K> {
    pub fn of(bytes: usize) -> Self {
        Self { all: bytes.max(1), used: 0, held: HashMap::new(), pace: None }
    }

    /// What is counted for something of this weight. Half of the room at most, else what is larger would never get in.
    pub fn counted(&self, weight: usize) -> usize {
        weight.min(self.all / 2)
    }

    /// Whether there is space at all.
    pub fn fits(&self, counted: usize) -> bool {
        counted <= self.all.saturating_sub(self.used)
    }

    /// Whether this one may have it.
    pub fn admits(&self, key: K, counted: usize) -> bool {
        let held = self.held.get(&key).copied().unwrap_or(0);
        let within = |room: usize| held + counted <= GREED * room.saturating_sub(self.used + counted);
        let first = held == 0;
        let has_space = within(self.all) || (first && counted <= SMALL);
        let has_time = first || held + counted <= self.all / MODEST || within(self.window());
        self.fits(counted) && has_space && has_time
    }

    /// Not even a small first event would be admitted.
    pub fn is_full(&self) -> bool {
        !self.fits(SMALL.min(self.all / 4))
    }

    /// So much is taken that it is worth asking [`Room::admits`] before anything else is done.
    pub fn is_pressed(&self) -> bool {
        self.used > self.window() / 4
    }

    pub fn enter(&mut self, key: K, counted: usize) {
        self.used += counted;
        *self.held.entry(key).or_default() += counted;
    }

    pub fn leave(&mut self, key: K, counted: usize) {
        debug_assert!(self.held.get(&key).is_some_and(|held| *held >= counted), "nobody leaves who did not enter");
        self.used = self.used.saturating_sub(counted);
        if let Some(held) = self.held.get_mut(&key) {
            *held = held.saturating_sub(counted);
            if *held == 0 {
                self.held.remove(&key);
            }
        }
    }

    /// Learns how fast the writers are, from what one of `writers` did. A batch that was not `full` tells only that they are no slower.
    pub fn wrote(&mut self, bytes: usize, took: Duration, writers: usize, full: bool) {
        #[allow(clippy::cast_precision_loss)] // an estimate
        let measured = bytes as f64 * writers as f64 / took.as_secs_f64().max(1e-6);
        match &mut self.pace {
            Some(pace) if full || measured > *pace => *pace += (measured - *pace) * NEWEST,
            None if full => self.pace = Some(measured),
            Some(_) | None => {}
        }
    }

    fn window(&self) -> usize {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is clamped
        let within_target = self.pace.map_or(self.all, |pace| (pace * TARGET.as_secs_f64()) as usize);
        within_target.clamp(self.all / SMALLEST_WINDOW, self.all)
    }
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;
