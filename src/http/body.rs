//! Reading a request's body: bounded in bytes and in time.
//!
//! A body that says it is too large is refused unread, one that turns out to be is left at the limit. Either way what still comes in is swallowed
//! for a moment: a socket closed on unread bytes is reset, and the client would see a broken connection instead of its 413.

use std::time::Duration;

use axum::body::{Body, Bytes};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, EXPECT};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::Problem;

/// Most bytes that are swallowed after a refusal ...
const SWALLOWED: usize = 8 << 20;
/// ... and the longest time.
const SWALLOWING: Duration = Duration::from_secs(5);

/// Reads at most `limit` bytes within `patience`.
pub async fn read(headers: &HeaderMap, mut body: Body, limit: usize, patience: Duration) -> Result<Bytes, Problem> {
    if headers.get_all(CONTENT_ENCODING).iter().any(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        refuse_rest(headers, body);
        return Err(Problem::encoded_body());
    }
    let announced = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        refuse_rest(headers, body);
        return Err(Problem::body_too_large(limit));
    }
    let deadline = Instant::now() + patience;
    let mut read = Vec::new();
    loop {
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(Problem::body_too_slow()),
            Ok(None) => return Ok(read.into()),
            Ok(Some(Err(_))) => return Err(Problem::body_broken()),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > limit {
            refuse_rest(headers, body);
            return Err(Problem::body_too_large(limit));
        }
        read.extend_from_slice(&data);
    }
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
