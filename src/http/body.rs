//! Reading a request's body: bounded in bytes and in time, and all bodies together by one room.
//!
//! A body is read before anybody knows who sends it, so the sum of all bodies needs a bound of its own. A body takes room as its bytes arrive (an
//! announced length takes none: it costs a liar nothing) and gives it back when its request is answered. Whoever finds the room full is told to
//! come again.
//!
//! A body that says it is too large is refused unread, one that turns out to be is left at the limit. Either way what still comes in is swallowed
//! for a moment: a socket closed on unread bytes is reset, and the client would see a broken connection instead of its 413.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::Problem;

/// Most bytes that are swallowed after a refusal ...
const SWALLOWED: usize = 8 << 20;
/// ... and the longest time.
const SWALLOWING: Duration = Duration::from_secs(5);

/// Room is taken in pieces of this many bytes.
const PIECE: usize = 1 << 10;

/// The room for all bodies that are being read or worked on.
#[derive(Debug, Clone)]
pub struct BodyRoom(Arc<Semaphore>);

impl BodyRoom {
    /// Room for so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new((bytes / PIECE).min(Semaphore::MAX_PERMITS))))
    }
}

/// A body of this many bytes mostly comes along with its head: reading it costs less than refusing it unread.
const SHORT: u64 = 8 << 10;

/// A body that was read. Its room is free again when it is dropped, so it is kept until the answer is there.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    taken: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Adds bytes if there is room for them. What is allocated is what was taken, no more.
    fn push(&mut self, data: &[u8], room: &BodyRoom) -> Result<(), Problem> {
        let missing = (self.bytes.len() + data.len()).saturating_sub(self.bytes.capacity());
        if missing > 0 {
            let pieces = missing.div_ceil(PIECE);
            let count = u32::try_from(pieces).map_err(|_| Problem::no_room())?;
            let permit = room.0.clone().try_acquire_many_owned(count).map_err(|_| Problem::no_room())?;
            match &mut self.taken {
                Some(taken) => taken.merge(permit),
                None => self.taken = Some(permit),
            }
            self.bytes.reserve_exact(self.bytes.capacity() + pieces * PIECE - self.bytes.len());
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }
}

impl Held {
    /// The bytes, and the room that was taken for them: to be kept for as long as what was made of them is worked on.
    pub fn apart(self) -> (Vec<u8>, Option<OwnedSemaphorePermit>) {
        (self.bytes, self.taken)
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads at most `limit` bytes within `patience`, as far as there is `room`.
pub async fn read(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
    patience: Duration,
    room: &BodyRoom,
) -> Result<Held, Problem> {
    if headers.get_all(CONTENT_ENCODING).iter().any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        refuse_rest(headers, body);
        return Err(Problem::encoded_body());
    }
    if announced(headers).is_some_and(|length| length > limit as u64) {
        refuse_rest(headers, body);
        return Err(Problem::body_too_large(limit));
    }
    let deadline = Instant::now() + patience;
    let mut read = Held { bytes: Vec::new(), taken: None };
    loop {
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(Problem::body_too_slow()),
            Ok(None) => return Ok(read),
            Ok(Some(Err(_))) => return Err(Problem::body_broken()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > limit {
            refuse_rest(headers, body);
            return Err(Problem::body_too_large(limit));
        }
        if let Err(problem) = read.push(&data, room) {
            refuse_rest(headers, body);
            return Err(problem);
        }
    }
}

/// Gives the body back if it is short; else refuses it before it is read, because nobody could store what it says.
pub fn refuse_unread(headers: &HeaderMap, body: Body) -> Result<Body, Problem> {
    if announced(headers).is_some_and(|length| length <= SHORT) {
        return Ok(body);
    }
    refuse_rest(headers, body);
    Err(Problem::no_room())
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Swallows beside the answer, so that a client that waits for it before it goes on is not kept waiting.
fn refuse_rest(headers: &HeaderMap, mut body: Body) {
    if headers.contains_key(EXPECT) {
        // The client asked first; unless it is told to go on, nothing comes.
        return;
    }
    tokio::spawn(timeout(SWALLOWING, async move {
        let mut swallowed = 0;
        while let Some(Ok(frame)) = body.frame().await {
            swallowed += frame.data_ref().map_or(0, Bytes::len);
            if swallowed > SWALLOWED {
                return;
            }
        }
    }));
}
