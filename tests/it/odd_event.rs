//! One odd event among good ones is that event's own affair: too deep, damaged or too large, it is refused and its neighbours are stored.

use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::ingest_result::Outcome;
use opsmantik::grpc::proto::{Event, IngestResult, Rejection, RejectionReason, StreamIngestResponse};
use opsmantik::pipeline::PipelineConfig;
use prost::Message;
use prost::bytes::{Buf, BufMut};
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::support::line::{Line, event};

/// Bytes out, messages of type `U` in: what is sent here need not be what the contract calls a message.
struct Raw<U>(std::marker::PhantomData<U>);

impl<U: Message + Default + Send + 'static> Codec for Raw<U> {
    type Encode = Vec<u8>;
    type Decode = U;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self(std::marker::PhantomData)
    }

    fn decoder(&mut self) -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<U: Message + Default + Send + 'static> Encoder for Raw<U> {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&bytes);
        Ok(())
    }
}

impl<U: Message + Default + Send + 'static> Decoder for Raw<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let length = from.remaining();
        U::decode(from.copy_to_bytes(length)).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// As a field of this tag.
fn field(tag: u32, bytes: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    prost::encoding::bytes::encode(tag, &bytes.to_vec(), &mut field);
    field
}

async fn grpc(line: &Line) -> Grpc<tonic::transport::Channel> {
    let mut client = Grpc::new(line.endpoint.connect().await.expect("it listens"));
    client.ready().await.expect("the connection holds");
    client
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("visible text"));
    request
}

async fn ingest(line: &Line, token: &str, events: &[Vec<u8>]) -> Result<Vec<IngestResult>, Status> {
    let message: Vec<u8> = events.iter().flat_map(|event| field(1, event)).collect();
    let path = "/opsmantik.v1.IngestService/Ingest".parse().expect("a path");
    let codec = Raw::<opsmantik::grpc::proto::IngestResponse>(std::marker::PhantomData);
    Ok(grpc(line).await.unary(with_token(message, token), path, codec).await?.into_inner().results)
}

/// What a stream of these events acknowledges, by its messages' names, and how it ends.
async fn stream(line: &Line, token: &str, events: &[Vec<u8>]) -> (Vec<StreamIngestResponse>, Result<(), Status>) {
    let messages: Vec<_> = (0..)
        .zip(events)
        .map(|(n, event): (u32, _)| [field(1, format!("m{n:02}").as_bytes()), field(2, event)].concat())
        .collect();
    let path = "/opsmantik.v1.IngestService/StreamIngest".parse().expect("a path");
    let codec = Raw::<StreamIngestResponse>(std::marker::PhantomData);
    let request = with_token(tokio_stream::iter(messages), token);
    let mut answers = grpc(line).await.streaming(request, path, codec).await.expect("a stream").into_inner();
    let mut heard = Vec::new();
    let end = loop {
        match answers.message().await {
            Ok(Some(answer)) => heard.push(answer),
            Ok(None) => break Ok(()),
            Err(status) => break Err(status),
        }
    };
    heard.sort_by(|one, other| one.message_id.cmp(&other.message_id));
    (heard, end)
}

/// Metadata of so many levels: objects, three messages of the wire each, or lists, two each.
fn nested(depth: usize, objects: bool) -> Option<Struct> {
    let mut value = Value { kind: Some(Kind::BoolValue(true)) };
    for _ in 1..depth {
        let kind = match objects {
            true => Kind::StructValue(Struct { fields: [("in".to_owned(), value)].into() }),
            false => Kind::ListValue(ListValue { values: vec![value] }),
        };
        value = Value { kind: Some(kind) };
    }
    Some(Struct { fields: [("deep".to_owned(), value)].into() })
}

fn deep(n: u32, depth: usize, objects: bool) -> Event {
    Event { metadata: nested(depth, objects), ..event(n) }
}

/// What each of nine events, two of them good, comes to.
fn verdicts(results: impl Iterator<Item = IngestResult>) -> Vec<(String, Option<(RejectionReason, String)>)> {
    let refused = |rejection: Rejection| {
        assert!(rejection.message.len() < 300, "{}", rejection.message);
        (rejection.reason(), rejection.field)
    };
    let verdict = |result: IngestResult| match result.outcome.expect("always set") {
        Outcome::Stored(_) | Outcome::Duplicate(_) => (result.event_id, None),
        Outcome::Rejected(rejection) => (result.event_id, Some(refused(rejection))),
    };
    results.map(verdict).collect()
}

#[tokio::test]
async fn an_event_that_cannot_be_read_is_refused_by_itself() {
    let line = Line::open(PipelineConfig::default()).await;
    // Text that is no UTF-8, a field cut short, and a field of another kind, each after the id.
    let damaged = |n: u32, damage: &[u8]| [event(n).encode_to_vec(), damage.to_vec()].concat();
    let invalid = |field: &str| Some((RejectionReason::Invalid, field.to_owned()));
    let events = [
        (event(1).encode_to_vec(), None),
        (deep(2, 32, true).encode_to_vec(), None),
        (deep(3, 33, true).encode_to_vec(), invalid("metadata")),
        (deep(4, 33, false).encode_to_vec(), invalid("metadata")),
        (deep(5, 40, true).encode_to_vec(), invalid("")),
        (deep(6, 600, true).encode_to_vec(), invalid("")),
        (damaged(7, b"\x42\x02\xff\xff"), invalid("")),
        (damaged(8, b"\x42\x09cut"), invalid("")),
        (damaged(9, b"\x40\x01"), invalid("")),
        (
            Event { label: Some("x".repeat(70_000)), ..deep(10, 600, true) }.encode_to_vec(),
            Some((RejectionReason::TooLarge, String::new())),
        ),
        (event(11).encode_to_vec(), None),
    ];
    let expected: Vec<_> = (1..)
        .zip(&events)
        .map(|(n, (_, verdict)): (u128, _)| (Uuid::from_u128(n).to_string(), verdict.clone()))
        .collect();
    let events = events.map(|(event, _)| event);

    let results = ingest(&line, &line.token, &events).await.expect("one bad event does not fail the call");
    assert_eq!(verdicts(results.into_iter()), expected);
    assert_eq!(line.database.count("SELECT count(*) FROM events").await, 3);
    let (heard, end) = stream(&line, &line.token, &events).await;
    end.expect("the stream goes on to its end");
    assert_eq!(verdicts(heard.into_iter().map(|answer| answer.result.expect("always set"))), expected);
    assert_eq!(line.database.count("SELECT count(*) FROM events").await, 3);
}

#[tokio::test]
async fn an_event_that_cannot_be_read_opens_no_site() {
    let line = Line::open(PipelineConfig::default()).await;
    let shop = line.database.rows("SELECT id FROM sites").await[0]["id"].as_str().map(str::to_owned).expect("an id");
    line.database.site("neighbour").await;
    let token = line.database.token(&[Scope::IngestWrite], Some(shop.parse().expect("an id"))).await;
    let foreign = Event { site: "neighbour".to_owned(), ..deep(2, 40, true) };
    let large = Event { label: Some("x".repeat(70_000)), ..foreign.clone() };
    for odd in [foreign.encode_to_vec(), large.encode_to_vec()] {
        let events = [event(1).encode_to_vec(), odd];
        let status = ingest(&line, &token, &events).await.expect_err("not this token's site");
        assert_eq!(status.code(), Code::PermissionDenied);
        let (_, end) = stream(&line, &token, &events[1..]).await;
        assert_eq!(end.expect_err("not this token's site").code(), Code::PermissionDenied);
    }
    assert_eq!(line.database.count("SELECT count(*) FROM events").await, 0);
}
