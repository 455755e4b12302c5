//! What is known of every call afterwards: how many run, how each ended, and how long it took, as metrics and one line of the log.
//!
//! A call lasts from the head of its request to the end of its answer; the status of most answers is in their trailers, so the
//! answer's body is watched on its way out. Whoever hangs up before the end has `cancelled` the call, as a stream or while it waits.
//! The label `rpc` is one of the contract's or `unknown`: what a caller writes there must not become a metric of its own.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Instant;

use http::HeaderMap;
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use prost::Message;
use prost_types::FileDescriptorSet;
use tokio::time::Sleep;
use tonic::body::Body;
use tonic::{Code, Status};
use tracing::Span;

use super::call::Deadline;
use super::{misframed, proto};
use crate::telemetry;

/// What the label says of an RPC that is none of ours.
const UNKNOWN: &str = "unknown";

/// `package.Service/Method` of every RPC that this server can answer.
static RPCS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    use tonic_reflection::pb::{v1, v1alpha};
    let sets = [
        proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        v1::FILE_DESCRIPTOR_SET,
        v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let sets = sets.map(|set| FileDescriptorSet::decode(set).expect("generated code carries a descriptor set"));
    let mut rpcs = HashSet::new();
    for file in sets.iter().flat_map(|set| &set.file) {
        for service in &file.service {
            for method in &service.method {
                rpcs.insert(format!("{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    rpcs
});

/// The label of a request's path.
pub(super) fn rpc(path: &str) -> &'static str {
    path.strip_prefix('/').and_then(|name| RPCS.get(name)).map_or(UNKNOWN, String::as_str)
}

/// The label of a status code.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// A call that runs. Dropped before its end was told, it was cancelled; or it broke, if that is why it is dropped.
pub(super) struct Running {
    rpc: &'static str,
    span: Span,
    began: Instant,
    ended: bool,
    /// Set when the request broke off: the caller hung up, whatever a service makes of that.
    hung_up: Arc<AtomicBool>,
}

impl Running {
    /// `rpc` is a label, `span` has the call's name and id.
    pub(super) fn begin(rpc: &'static str, span: Span) -> Self {
        telemetry::grpc_began(rpc);
        Self { rpc, span, began: Instant::now(), ended: false, hung_up: Arc::default() }
    }

    /// Watches the request for a caller who hangs up in the middle of it.
    pub(super) fn heard(&self, request: http::Request<Body>) -> http::Request<Body> {
        let hung_up = self.hung_up.clone();
        request.map(|inner| Body::new(Heard { inner, hung_up }))
    }

    /// Watches the answer to its end.
    pub(super) fn answered(
        mut self,
        mut answer: http::Response<Body>,
        deadline: Option<Deadline>,
    ) -> http::Response<Body> {
        misframed::set_right(answer.headers_mut());
        match told(answer.headers()) {
            Some(code) => self.end(code),
            // Neither a status nor anything to come: not what a gRPC service answers.
            None if answer.body().is_end_stream() => self.end(Code::Unknown),
            None => {
                let deadline = deadline.map(|Deadline(at)| Box::pin(tokio::time::sleep_until(at)));
                return answer.map(|inner| Body::new(Watched { inner, running: self, deadline }));
            }
        }
        answer
    }

    fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let code = if self.hung_up.load(Ordering::Relaxed) { Code::Cancelled } else { code };
        let (code_name, took) = (name(code), self.began.elapsed());
        telemetry::grpc_ended(self.rpc, code_name, took);
        let _here = self.span.enter();
        let elapsed_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        match code {
            Code::Ok => tracing::debug!(grpc.status = code_name, elapsed.ms = elapsed_ms, "call ended"),
            Code::Internal | Code::Unknown | Code::DataLoss => {
                tracing::error!(grpc.status = code_name, elapsed.ms = elapsed_ms, "call ended");
            }
            _ => tracing::info!(grpc.status = code_name, elapsed.ms = elapsed_ms, "call ended"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(if std::thread::panicking() { Code::Internal } else { Code::Cancelled });
    }
}

/// The status in a head or in trailers.
fn told(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// The body of a request on its way in.
struct Heard {
    inner: Body,
    hung_up: Arc<AtomicBool>,
}

impl HttpBody for Heard {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Err(_))) = &frame {
            self.hung_up.store(true, Ordering::Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The body of an answer on its way out. Past the deadline it ends with DEADLINE_EXCEEDED, whatever was still to come.
struct Watched {
    inner: Body,
    running: Running,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.running.ended {
            return Poll::Ready(None);
        }
        let span = this.running.span.clone();
        let _here = span.enter();
        if let Poll::Ready(mut frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            match &mut frame {
                Some(Ok(frame)) => {
                    if let Some(trailers) = frame.trailers_mut() {
                        misframed::set_right(trailers);
                        this.running.end(told(trailers).unwrap_or(Code::Unknown));
                    }
                }
                Some(Err(status)) => this.running.end(status.code()),
                None => this.running.end(Code::Unknown),
            }
            return Poll::Ready(frame);
        }
        if this.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            this.running.end(Code::DeadlineExceeded);
            // What made the answer ends here; hyper keeps this body until the trailers are sent.
            this.inner = Body::empty();
            let mut trailers = HeaderMap::new();
            let status = Status::deadline_exceeded("the answer did not end within the deadline");
            return Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))));
        }
        Poll::Pending
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

    #[test]
    fn the_label_of_an_rpc_is_from_a_closed_list() {
        assert_eq!(rpc("/opsmantik.v1.IngestService/StreamIngest"), "opsmantik.v1.IngestService/StreamIngest");
        assert_eq!(rpc("/grpc.health.v1.Health/Check"), "grpc.health.v1.Health/Check");
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        assert_eq!(rpc(reflection), &reflection[1..]);
        for other in ["", "/", "opsmantik.v1.IngestService/Ingest", "/opsmantik.v1.IngestService/Other", "/x/y"] {
            assert_eq!(rpc(other), UNKNOWN, "{other}");
        }
    }
}
