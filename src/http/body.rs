//! Reading a request's body: bounded in bytes and in time, and all bodies together by one room of each door.
//!
//! A body is read before anybody knows who sends it, so all bodies together need bounds of their own: how many are awaited, and how many bytes
//! have come. A body takes room as its bytes arrive (an announced length takes none: it costs a liar nothing) and gives it back when its request
//! is answered. Clients share both bounds ([`Shared`]), so that nobody fills the room with bodies that never end. Whoever finds no
//! room is told to come again.
//!
//! A body that says it is too large is refused unread, one that turns out to be is left at the limit. Either way what still comes in is swallowed
//! for a moment: a socket closed on unread bytes is reset, and the client would see a broken connection instead of its 413. Meanwhile it
//! counts among those that are awaited; for a client that has too many of these nothing is swallowed.

use std::ops::Deref;
use std::time::Duration;

use axum::body::{Body, Bytes};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::Problem;
use super::client_address::Client;
use super::share::{Part, Shared};

/// Most bytes that are swallowed after a refusal ...
const SWALLOWED: usize = 8 << 20;
/// ... and the longest time.
const SWALLOWING: Duration = Duration::from_secs(5);

/// Room is taken in pieces of this many bytes.
const PIECE: usize = 1 << 10;

/// The room of a door for all bodies that are being read or worked on.
#[derive(Debug, Clone)]
pub struct BodyRoom {
    bytes: Shared,
    awaited: Shared,
}

impl BodyRoom {
    /// Room for so many bytes, of so many bodies that have not wholly come.
    pub fn new(bytes: usize, awaited: usize) -> Self {
        Self { bytes: Shared::new(bytes, SMALL), awaited: Shared::new(awaited, 1) }
    }

    /// A place among the bodies that are awaited.
    fn enter(&self, client: Client) -> Result<Part, Problem> {
        let mut place = self.awaited.part(client);
        if place.take(1) { Ok(place) } else { Err(Problem::no_room()) }
    }
}

/// So much has whoever holds nothing yet, even where others have left little: a usual event.
const SMALL: usize = 4 << 10;

/// A body of this many bytes mostly comes along with its head: reading it costs less than refusing it unread.
const SHORT: u64 = 8 << 10;

/// A body that was read. Its room is free again when it is dropped, so it is kept until the answer is there.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    room: Part,
}

impl Held {
    /// Adds bytes if there is room for them. What is allocated is what was taken, no more.
    fn push(&mut self, data: &[u8]) -> Result<(), Problem> {
        let missing = (self.bytes.len() + data.len()).saturating_sub(self.bytes.capacity());
        if missing > 0 {
            let more = missing.next_multiple_of(PIECE);
            if !self.room.take(more) {
                return Err(Problem::no_room());
            }
            self.bytes.reserve_exact(self.bytes.capacity() + more - self.bytes.len());
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// The bytes, and the room that was taken for them: to be kept for as long as what was made of them is worked on.
    pub fn apart(self) -> (Vec<u8>, Part) {
        (self.bytes, self.room)
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads at most `limit` bytes within `patience`, as far as there is `room` for this client.
pub async fn read(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
    patience: Duration,
    room: &BodyRoom,
    client: Client,
) -> Result<Held, Problem> {
    let place = room.enter(client)?;
    if headers.get_all(CONTENT_ENCODING).iter().any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        refuse_rest(headers, body, place);
        return Err(Problem::encoded_body());
    }
    if announced(headers).is_some_and(|length| length > limit as u64) {
        refuse_rest(headers, body, place);
        return Err(Problem::body_too_large(limit));
    }
    let deadline = Instant::now() + patience;
    let mut read = Held { bytes: Vec::new(), room: room.bytes.part(client) };
    loop {
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(Problem::body_too_slow()),
            Ok(None) => return Ok(read),
            Ok(Some(Err(_))) => return Err(Problem::body_broken()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > limit {
            refuse_rest(headers, body, place);
            return Err(Problem::body_too_large(limit));
        }
        if let Err(problem) = read.push(&data) {
            refuse_rest(headers, body, place);
            return Err(problem);
        }
    }
}

/// Gives the body back if it is short; else refuses it before it is read, because nobody could store what it says.
pub fn refuse_unread(headers: &HeaderMap, body: Body, room: &BodyRoom, client: Client) -> Result<Body, Problem> {
    if announced(headers).is_some_and(|length| length <= SHORT) {
        return Ok(body);
    }
    if let Ok(place) = room.enter(client) {
        refuse_rest(headers, body, place);
    }
    Err(Problem::no_room())
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Swallows beside the answer, so that a client that waits for it before it goes on is not kept waiting.
fn refuse_rest(headers: &HeaderMap, mut body: Body, place: Part) {
    if headers.contains_key(EXPECT) {
        // The client asked first; unless it is told to go on, nothing comes.
        return;
    }
    tokio::spawn(timeout(SWALLOWING, async move {
        let (mut swallowed, _place) = (0, place);
        while let Some(Ok(frame)) = body.frame().await {
            swallowed += frame.data_ref().map_or(0, Bytes::len);
            if swallowed > SWALLOWED {
                return;
            }
        }
    }));
}
