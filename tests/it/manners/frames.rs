//! Bodies that keep to HTTP/2 and not to gRPC: broken frames are the caller's mistake, unfinished ones take bounded room and time.

use std::pin::Pin;

use futures::stream::{self, Stream, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use opsmantik::grpc::proto::{Event, IngestRequest, StreamIngestRequest, StreamIngestResponse};
use prost::Message;
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic_types::StatusExt;
use tower::{Service, ServiceExt};

use super::*;

const STREAM_INGEST: &str = "opsmantik.v1.IngestService/StreamIngest";
/// The largest message that is taken.
const LARGEST: usize = 4 << 20;

type Chunks = Pin<Box<dyn Stream<Item = Bytes> + Send>>;

fn chunks(these: impl IntoIterator<Item = Vec<u8>>) -> Chunks {
    Box::pin(stream::iter(these.into_iter().map(Bytes::from).collect::<Vec<_>>()))
}

fn framed(flag: u8, length: usize, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(length).expect("a test's own message").to_be_bytes();
    [&[flag][..], &length, bytes].concat()
}

/// A message that is short of its last bytes, and no end of the body.
fn unfinished() -> Chunks {
    let chunk = Bytes::from_static(&[0; 64 << 10]);
    let most = stream::iter(std::iter::repeat_n(chunk, LARGEST / (64 << 10) - 1));
    Box::pin(chunks([framed(0, LARGEST, b"")]).chain(most).chain(stream::pending()))
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

#[tokio::test]
async fn unfinished_messages_take_bounded_room_and_time() {
    let door = Door::open().await;
    let endpoint = Endpoint::from_shared(format!("http://{}", door.server.grpc)).expect("an address is a URI");
    let before = peak_kib(&door.server);
    let mut channels = Vec::new();
    for _ in 0..2 {
        channels.push(endpoint.connect().await.expect("it listens"));
    }
    let calls = (0..200).map(|n| door.body(&channels[n % 2], STREAM_INGEST, None, unfinished()));
    let siege = tokio::time::timeout(Duration::from_secs(60), futures::future::join_all(calls));
    let good = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut scoring = ScoringServiceClient::new(door.channel.clone());
        let began = Instant::now();
        scoring.score_signals(door.request(hover())).await.expect("a small message takes no room");
        assert!(began.elapsed() < Duration::from_secs(10), "answered after {:?}", began.elapsed());
    };
    let (ended, ()) = tokio::join!(siege, good);
    let ended: Vec<Status> = ended.expect("none is kept for ever").into_iter().map(|(_, status)| status).collect();
    let of = |code| ended.iter().filter(|status| status.code() == code).collect::<Vec<_>>();
    let (turned_away, late) = (of(Code::Unavailable), of(Code::DeadlineExceeded));
    assert_eq!(turned_away.len() + late.len(), 200, "{ended:?}");
    assert!((1..=20).contains(&late.len()), "{} were let go on", late.len());
    assert!(turned_away.iter().all(|status| status.get_details_retry_info().is_some()), "{turned_away:?}");
    let grown = peak_kib(&door.server) - before;
    assert!(grown < 250 << 10, "it took {grown} KiB");

    // The room is free again.
    let large = IngestRequest::of(vec![Event { label: Some("x".repeat(LARGEST - 64)), ..Event::default() }]);
    let large = large.encode_to_vec();
    let body = chunks([framed(0, large.len(), &large)]);
    let (_, status) = door.body(&door.channel, "opsmantik.v1.IngestService/Ingest", None, body).await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
}

#[tokio::test]
async fn a_message_that_comes_slowly_is_taken() {
    let door = Door::open().await;
    let event = Event { label: Some("x".repeat(50_000)), ..Event::default() };
    let message = StreamIngestRequest::of("slow", Some(event));
    let message = message.encode_to_vec();
    let bytes = framed(0, message.len(), &message);
    let parts: Vec<_> = bytes.chunks(bytes.len() / 6).map(Bytes::copy_from_slice).collect();
    let slowly = stream::iter(parts).then(|part| async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        part
    });
    let (answer, status) = door.body(&door.channel, STREAM_INGEST, None, Box::pin(slowly)).await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
    let answer = StreamIngestResponse::decode(&answer[5..]).expect("an acknowledgement");
    assert_eq!(answer.message_id, "slow");
}
