//! The job: an accepted event on its way through a queue, and in a dead letter.

use serde::{Deserialize, Serialize};

use crate::domain::event::Event;

/// The form of a job. A worker that meets another one refuses it by name instead of misreading it.
pub const VERSION: u32 = 1;

/// An event with everything that was known at the edge: arrival, derived id, device, place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub v: u32,
    pub event: Event,
}

impl Job {
    pub fn new(event: Event) -> Self {
        Self { v: VERSION, event }
    }
}
