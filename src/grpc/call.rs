//! What every call has, whichever service takes it: an id and a deadline.
//!
//! The id is the caller's `x-request-id`, or one made here; it is in the answer's metadata and on every log line of the call. The
//! deadline is the caller's own; when it passes the answer is, or ends with, DEADLINE_EXCEEDED. [`LONGEST`] bounds the time to the
//! answer's head besides, and who would have waited longer hears UNAVAILABLE; so a stream lives as long as its caller wants; a stream's handler finds the caller's [`Deadline`] among the
//! request's extensions, to end in order before it is cut off. Events that a call has handed to the pipeline by then are stored all
//! the same.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::Instrument;
use uuid::Uuid;

use super::measure::{self, Running};
use super::status;
use crate::domain::outcome::Unavailable;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// No call waits longer for its answer, whatever its caller asks: the pipeline's patience, and the look-ups before it.
pub(super) const LONGEST: Duration = Duration::from_secs(15);
/// Longest request id that is believed, bytes.
const MAX_REQUEST_ID: usize = 128;

/// A deadline further away than this is none, and cannot be counted to on every machine.
const FURTHEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// When the caller stops waiting. Among the extensions of a request whose caller said so.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(pub(super) Instant);

#[derive(Clone, Copy)]
pub(super) struct CallLayer;

impl<S> Layer<S> for CallLayer {
    type Service = Call<S>;

    fn layer(&self, inner: S) -> Call<S> {
        Call { inner }
    }
}

#[derive(Clone)]
pub(super) struct Call<S> {
    inner: S,
}

impl<S> Service<http::Request<Body>> for Call<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let id = request_id(request.headers());
        let rpc = measure::rpc(request.uri().path());
        let span = tracing::info_span!("grpc", rpc, request.id = id.to_str().unwrap_or_default());
        let running = Running::begin(rpc, span.clone());
        request.headers_mut().insert(REQUEST_ID, id.clone());
        let asked = asked_patience(request.headers()).filter(|asked| *asked < FURTHEST);
        let deadline = asked.map(|asked| Deadline(Instant::now() + asked));
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let patience = asked.map_or(LONGEST, |asked| asked.min(LONGEST));
        // tonic keeps the caller's deadline as well, but answers CANCELLED. This timer is made first and asked first.
        let answer = tokio::time::timeout(patience, self.inner.call(running.heard(request)));
        let answer = async move {
            let mut response = match answer.await {
                Ok(answered) => answered?,
                Err(_elapsed) => given_up(asked).into_http(),
            };
            response.headers_mut().insert(REQUEST_ID, id);
            Ok(running.answered(response, deadline))
        };
        Box::pin(answer.instrument(span))
    }
}

/// What a call hears that has no answer in time. Who would have waited for longer than we work on anything is told to come again.
fn given_up(asked: Option<Duration>) -> Status {
    match asked {
        Some(asked) if asked <= LONGEST => Status::deadline_exceeded("no answer within the deadline"),
        Some(_) | None => status::unavailable(Unavailable::Database),
    }
}

/// The caller's id if it can stand in a log line, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(&REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    });
    given.cloned().unwrap_or_else(|| {
        HeaderValue::try_from(Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("none"))
    })
}

/// `grpc-timeout`: one to eight digits and a unit. Anything else is no deadline.
fn asked_patience(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(&TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tower::ServiceExt;

    fn request(name: HeaderName, value: &str) -> http::Request<Body> {
        let mut request = http::Request::new(Body::empty());
        request.headers_mut().insert(name, HeaderValue::from_str(value).expect("a test's own header"));
        request
    }

    #[tokio::test]
    async fn a_call_that_outlasts_its_deadline_is_deadline_exceeded() {
        let never = tower::service_fn(|_: http::Request<Body>| {
            std::future::pending::<Result<http::Response<Body>, std::convert::Infallible>>()
        });
        let answer = CallLayer.layer(never).oneshot(request(TIMEOUT, "20m")).await;
        let response = answer.unwrap_or_else(|never| match never {});
        let code = Status::from_header_map(response.headers()).map(|status| status.code());
        assert_eq!(code, Some(tonic::Code::DeadlineExceeded));
        assert!(response.headers().contains_key(REQUEST_ID));
    }

    #[test]
    fn a_call_that_takes_too_long_for_us_is_to_come_again() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let codes = [None, seconds(60), Some(LONGEST), seconds(1)].map(|asked| given_up(asked).code());
        let (ours, theirs) = (tonic::Code::Unavailable, tonic::Code::DeadlineExceeded);
        assert_eq!(codes, [ours, ours, theirs, theirs]);
    }

    /// An answer that begins at once and never ends.
    async fn endless(request: http::Request<Body>) -> Result<http::Response<Body>, std::convert::Infallible> {
        assert_eq!(request.extensions().get::<Deadline>().is_some(), request.headers().contains_key(TIMEOUT));
        let frames = futures::stream::pending::<Result<hyper::body::Frame<hyper::body::Bytes>, Status>>();
        Ok(http::Response::new(Body::new(http_body_util::StreamBody::new(frames))))
    }

    #[tokio::test]
    async fn a_stream_that_outlasts_its_callers_deadline_ends_with_it() {
        use http_body_util::BodyExt;
        let call = CallLayer.layer(tower::service_fn(endless));
        let Ok(answer) = call.oneshot(request(TIMEOUT, "30m")).await;
        let body = answer.into_body().collect().await.expect("it ends in order");
        let code = body.trailers().and_then(Status::from_header_map).map(|status| status.code());
        assert_eq!(code, Some(tonic::Code::DeadlineExceeded));

        let Ok(answer) = CallLayer.layer(tower::service_fn(endless)).oneshot(request(REQUEST_ID, "1")).await;
        let body = tokio::time::timeout(Duration::from_millis(60), answer.into_body().collect()).await;
        assert!(body.is_err(), "without a deadline it goes on");
    }

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let read = |text: &str| asked_patience(request(TIMEOUT, text).headers());
        assert_eq!(read("100m"), Some(Duration::from_millis(100)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "1", "1x", "-1S", "+1S", "123456789S", "1.5S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_id_is_believed_only_if_it_can_stand_in_a_log_line() {
        let id = |text: &str| request_id(request(REQUEST_ID, text).headers());
        assert_eq!(id("order-17"), "order-17");
        for bad in ["", "two words", &"x".repeat(MAX_REQUEST_ID + 1)] {
            let made = id(bad);
            assert!(made.to_str().is_ok_and(|made| Uuid::try_parse(made).is_ok()), "{bad}");
        }
    }
}
