//! Bodies that keep to HTTP/2 and not to gRPC: broken frames are the caller's mistake.

use std::pin::Pin;

use futures::stream::{self, Stream, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic_types::StatusExt;
use tower::{Service, ServiceExt};

use super::*;

const STREAM_INGEST: &str = "opsmantik.v1.IngestService/StreamIngest";

type Chunks = Pin<Box<dyn Stream<Item = Bytes> + Send>>;

fn chunks(these: impl IntoIterator<Item = Vec<u8>>) -> Chunks {
    Box::pin(stream::iter(these.into_iter().map(Bytes::from).collect::<Vec<_>>()))
}

fn framed(flag: u8, length: usize, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(length).expect("a test's own message").to_be_bytes();
    [&[flag][..], &length, bytes].concat()
}

impl Door {
    /// Sends a body as it is, and reads the answer to its end.
    async fn body(&self, channel: &Channel, rpc: &str, encoding: Option<&str>, body: Chunks) -> (Vec<u8>, Status) {
        let body = Body::new(StreamBody::new(body.map(|bytes| Ok::<_, Status>(hyper::body::Frame::data(bytes)))));
        let mut request = http::Request::post(format!("/{rpc}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("authorization", format!("Bearer {}", self.token));
        if let Some(encoding) = encoding {
            request = request.header("grpc-encoding", encoding);
        }
        let mut channel = channel.clone();
        let channel = channel.ready().await.expect("the connection holds");
        let answer = channel.call(request.body(body).expect("a test's own request")).await.expect("an answer");
        if let Some(status) = Status::from_header_map(answer.headers()) {
            return (Vec::new(), status);
        }
        let answer = answer.into_body().collect().await.expect("an answer in order");
        let status = answer.trailers().and_then(Status::from_header_map).expect("a status in the end");
        (answer.to_bytes().to_vec(), status)
    }
}

#[tokio::test]
async fn a_broken_frame_is_the_callers_mistake_and_no_fault_of_ours() {
    let door = Door::open().await;
    let broken = [
        ("garbage under gzip", Some("gzip"), framed(1, 5, b"xxxxx")),
        ("garbage under zstd", Some("zstd"), framed(1, 5, b"xxxxx")),
        ("compressed with nothing", None, framed(1, 5, b"xxxxx")),
        ("a flag that does not exist", None, framed(7, 5, b"xxxxx")),
        ("a message that breaks off", None, framed(0, 10, b"xxx")),
        ("a head that breaks off", None, vec![0, 0]),
        ("no message at all", None, Vec::new()),
    ];
    let count = broken.len();
    for (what, encoding, body) in broken {
        for rpc in [SCORE_SIGNALS, STREAM_INGEST] {
            let (_, status) = door.body(&door.channel, rpc, encoding, chunks([body.clone()])).await;
            if rpc == STREAM_INGEST && body.is_empty() {
                assert_eq!(status.code(), Code::Ok, "a stream may have no message");
                continue;
            }
            assert_eq!(status.code(), Code::InvalidArgument, "{what} to {rpc}: {status:?}");
            let told = status.get_details_bad_request().map(|details| details.field_violations.len());
            assert_eq!(told, Some(1), "{what} to {rpc}: {status:?}");
        }
    }
    let times = |count: usize| f64::from(u8::try_from(count).expect("a few"));
    door.ended(SCORE_SIGNALS, "invalid_argument", times(count)).await;
    door.ended(STREAM_INGEST, "invalid_argument", times(count - 1)).await;
    let said = door.server.program.said();
    assert!(!said.contains("\"ERROR\""), "nobody is to be woken: {said}");
}
