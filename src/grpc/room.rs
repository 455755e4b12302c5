//! What messages that have not wholly come may take: room and time.
//!
//! tonic gathers a message until it is whole, and keeps that buffer for the next one of the same call. [`RoomLayer`] reads along how
//! far a body is, from the five bytes before each message alone. What a call has gathered beyond the buffer that every call has anyway is
//! taken from one room for all calls and given back when the body is read or dropped; a call that finds the room full is UNAVAILABLE.
//! A message that its sender does not finish in time ends its call with DEADLINE_EXCEEDED. Only time in which somebody waits for
//! the rest counts: a stream that is held back is not late.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::status;
use crate::domain::outcome::Unavailable;

/// The room of all calls together, KiB.
const ROOM_KIB: usize = 16 << 10;
/// tonic's buffer of every call, bytes: what fits there takes no room.
const FREE: usize = 8 << 10;
/// Nobody is waited for longer in the middle of a message ...
const PATIENCE: Duration = Duration::from_secs(15);
/// ... measured in steps of this.
const STEP: Duration = Duration::from_secs(1);
/// gRPC's head of a message: whether it is compressed, and its length.
const HEAD: usize = 5;

/// Bounds the bodies of all requests together.
#[derive(Clone)]
pub(super) struct RoomLayer {
    bounds: Bounds,
}

#[derive(Clone)]
struct Bounds {
    room: Arc<Semaphore>,
    patience: Duration,
    step: Duration,
}

impl RoomLayer {
    pub(super) fn new() -> Self {
        let room = Arc::new(Semaphore::new(ROOM_KIB));
        Self { bounds: Bounds { room, patience: PATIENCE, step: STEP } }
    }
}

impl<S> Layer<S> for RoomLayer {
    type Service = Room<S>;

    fn layer(&self, inner: S) -> Room<S> {
        Room { inner, bounds: self.bounds.clone() }
    }
}

#[derive(Clone)]
pub(super) struct Room<S> {
    inner: S,
    bounds: Bounds,
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for Room<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        let bounds = self.bounds.clone();
        self.inner.call(request.map(|inner| Body::new(Bounded::new(inner, bounds))))
    }
}

/// How far a body is.
#[derive(Clone, Copy)]
enum Place {
    /// In the head of a message, of which so many bytes have come.
    Head { bytes: [u8; HEAD], had: usize },
    /// In a message.
    Message { had: usize, left: usize },
}

impl Place {
    const BETWEEN: Self = Self::Head { bytes: [0; HEAD], had: 0 };

    /// Goes on by these bytes. Whether a message ended among them.
    fn advance(&mut self, mut data: &[u8]) -> bool {
        let mut ended = false;
        while !data.is_empty() {
            match self {
                Self::Head { bytes, had } => {
                    let (now, rest) = data.split_at(data.len().min(HEAD - *had));
                    bytes[*had..*had + now.len()].copy_from_slice(now);
                    *had += now.len();
                    data = rest;
                    if *had == HEAD {
                        let [_, length @ ..] = *bytes;
                        // A length beyond the machine's is beyond every bound, too.
                        let left = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                        *self = Self::Message { had: 0, left };
                    }
                }
                Self::Message { had, left } => {
                    let now = data.len().min(*left);
                    (*had, *left) = (*had + now, *left - now);
                    data = &data[now..];
                }
            }
            if matches!(self, Self::Message { left: 0, .. }) {
                *self = Self::BETWEEN;
                ended = true;
            }
        }
        ended
    }

    /// Bytes of a message that is not whole.
    fn gathered(self) -> usize {
        match self {
            Self::Head { had, .. } => had,
            Self::Message { had, .. } => HEAD + had,
        }
    }
}

/// The body of a request.
struct Bounded {
    inner: Body,
    bounds: Bounds,
    place: Place,
    /// For the most that was gathered at once: the buffer does not shrink.
    held: Option<OwnedSemaphorePermit>,
    /// For the rest of the message that has begun.
    waited: Duration,
    waits_since: Option<Instant>,
    step: Option<Pin<Box<Sleep>>>,
}

impl Bounded {
    fn new(inner: Body, bounds: Bounds) -> Self {
        Self { inner, bounds, place: Place::BETWEEN, held: None, waited: Duration::ZERO, waits_since: None, step: None }
    }

    fn heard(&mut self, data: &[u8]) -> Result<(), Status> {
        if self.place.advance(data) {
            self.waited = Duration::ZERO;
        }
        let gathered = self.place.gathered();
        if gathered == 0 {
            self.step = None;
        }
        let needed = gathered.saturating_sub(FREE).div_ceil(1 << 10);
        let missing = needed.saturating_sub(self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if missing == 0 {
            return Ok(());
        }
        let full = |_| {
            tracing::warn!("the room for messages that have not wholly come is full");
            status::unavailable(Unavailable::Busy)
        };
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        let more = self.bounds.room.clone().try_acquire_many_owned(missing).map_err(full)?;
        match &mut self.held {
            Some(held) => held.merge(more),
            held => *held = Some(more),
        }
        Ok(())
    }

    /// Fails when the rest of a message was waited for too long; asked while it is waited for.
    fn wait(&mut self, cx: &mut Context<'_>) -> Result<(), Status> {
        if self.waited >= self.bounds.patience {
            let patience = self.bounds.patience.as_secs();
            return Err(Status::deadline_exceeded(format!("a message was not finished within {patience} s")));
        }
        self.waits_since = Some(Instant::now());
        let length = self.bounds.step;
        let step = self.step.get_or_insert_with(|| Box::pin(tokio::time::sleep(length)));
        while step.as_mut().poll(cx).is_ready() {
            step.as_mut().reset(Instant::now() + length);
        }
        Ok(())
    }
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Some(since) = this.waits_since.take() {
            // Who waits comes by at every step. A longer time is one in which nobody asked for the rest.
            this.waited += since.elapsed().min(this.bounds.step);
        }
        let frame = Pin::new(&mut this.inner).poll_frame(cx);
        let fine = match &frame {
            Poll::Ready(Some(Ok(frame))) => frame.data_ref().map_or(Ok(()), |data| this.heard(data)),
            Poll::Pending if this.place.gathered() > 0 => this.wait(cx),
            Poll::Ready(None | Some(Err(_))) | Poll::Pending => Ok(()),
        };
        fine.map_or_else(|status| Poll::Ready(Some(Err(status))), |()| frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{Stream, StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use tonic::Code;

    fn bounds(room_kib: usize) -> Bounds {
        let step = Duration::from_millis(20);
        Bounds { room: Arc::new(Semaphore::new(room_kib)), patience: step * 10, step }
    }

    fn body(bounds: &Bounds, data: impl Stream<Item = Vec<u8>> + Send + 'static) -> Bounded {
        let frames = data.map(|data| Ok::<_, Status>(Frame::data(Bytes::from(data))));
        Bounded::new(Body::new(StreamBody::new(frames)), bounds.clone())
    }

    fn message(length: usize) -> Vec<u8> {
        [&[0][..], &u32::try_from(length).expect("a test's own").to_be_bytes(), &vec![1; length]].concat()
    }

    #[test]
    fn the_end_of_every_message_is_found_however_it_is_cut() {
        let bytes = [message(0), message(3), message(300), message(1)].concat();
        let ends = [5, 13, 318, 324];
        for size in 1..=bytes.len() {
            let (mut place, mut at) = (Place::BETWEEN, 0);
            for piece in bytes.chunks(size) {
                let before = at;
                at += piece.len();
                let ended = ends.iter().any(|end| (before + 1..=at).contains(end));
                assert_eq!(place.advance(piece), ended, "pieces of {size} at {at}");
                let begun = ends.iter().rev().find(|end| **end <= at).map_or(at, |end| at - end);
                assert_eq!(place.gathered(), begun, "pieces of {size} at {at}");
            }
        }
    }

    #[tokio::test]
    async fn only_what_a_call_gathers_takes_room_and_the_room_has_an_end() {
        let bounds = bounds(100);
        let free = |kib: usize| assert_eq!(bounds.room.available_permits(), kib);
        let whole = body(&bounds, stream::iter(vec![message(16 << 10); 50]));
        whole.collect().await.expect("whole messages");
        free(100);

        let pieces = |length: usize| message(length).chunks(16 << 10).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let mut large = body(&bounds, stream::iter(pieces(80 << 10)).chain(stream::iter(pieces(40 << 10))));
        while let Some(frame) = large.frame().await {
            frame.expect("there is room");
        }
        free(100 - 72);
        let second = body(&bounds, stream::iter(pieces(80 << 10)));
        let refused = second.collect().await.expect_err("the room is full");
        assert_eq!(refused.code(), Code::Unavailable);
        free(100 - 72);
        drop(large);
        free(100);
    }

    #[tokio::test]
    async fn who_does_not_finish_a_message_is_sent_away_and_who_is_not_asked_is_not_late() {
        let bounds = bounds(100);
        let trickle = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(15)).await;
            Some((vec![0, 0, 0, 0, 9][..1].to_vec(), ()))
        });
        // Nine bytes are announced at the fifth; what comes after is one message's head after the other.
        let endless = stream::once(async { vec![0, 0, 1, 0, 0] }).chain(trickle);
        let late = tokio::time::timeout(Duration::from_secs(20), body(&bounds, endless).collect()).await;
        assert_eq!(late.expect("in time").expect_err("unfinished").code(), Code::DeadlineExceeded);

        let mut parts = stream::iter(message(90).chunks(10).map(<[u8]>::to_vec).collect::<Vec<_>>());
        let slow = stream::poll_fn(move |cx| parts.poll_next_unpin(cx));
        let mut slow = body(&bounds, slow);
        while let Some(frame) = slow.frame().await {
            frame.expect("nobody asked in the meantime");
            tokio::time::sleep(bounds.patience / 4).await;
        }
        // Between messages there is no hurry.
        let idle = stream::once(async { message(10) }).chain(stream::pending());
        let waited = tokio::time::timeout(bounds.patience * 2, body(&bounds, idle).collect()).await;
        assert!(waited.is_err(), "an open stream may be silent");
    }
}
