//! What sending events took, by whichever door.

use std::time::Duration;

/// Who is told that nothing can be stored now sends the same again after this. On a quiet machine nobody is.
pub const COME_BACK: Duration = Duration::from_millis(200);

/// What sending took.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    pub seconds: f64,
    /// Times that the server said that it was unavailable, and was sent the same again, as its contract has it.
    pub again: usize,
}
