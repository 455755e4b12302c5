//! Load through `IngestService`: messages encoded before the clock starts, answers counted and not decoded.
//!
//! Nothing that an answer says is believed: whoever measures counts the rows afterwards.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use opsmantik::grpc::proto::{IngestRequest, StreamIngestRequest};
use prost::Message;
use prost::bytes::{Buf, BufMut, Bytes};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::workload::Beat;

/// Events of one call of `Ingest`.
pub const BATCH: usize = 100;

const INGEST: &str = "/opsmantik.v1.IngestService/Ingest";
pub const STREAM_INGEST: &str = "/opsmantik.v1.IngestService/StreamIngest";

/// Requests of `Ingest`, a hundred events each.
pub fn batches(beats: &[Beat]) -> Vec<Bytes> {
    let request = |beats: &[Beat]| IngestRequest::of(beats.iter().map(Beat::to_proto).collect());
    beats.chunks(BATCH).map(|beats| request(beats).encode_to_vec().into()).collect()
}

/// Messages of `StreamIngest`.
pub fn messages(beats: &[Beat]) -> Vec<Bytes> {
    beats.iter().map(message).collect()
}

pub fn message(beat: &Beat) -> Bytes {
    StreamIngestRequest::of(beat.id.to_string(), Some(beat.to_proto())).encode_to_vec().into()
}

pub async fn channel(to: SocketAddr) -> anyhow::Result<Channel> {
    Channel::from_shared(format!("http://{to}"))?.connect().await.context("the server listens")
}

pub fn with_token<T>(message: T, token: &str) -> anyhow::Result<Request<T>> {
    let value: MetadataValue<_> = format!("Bearer {token}").parse()?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}

/// Sends all requests, so many callers at once, each with a connection of its own; the seconds that it took.
pub async fn ingest(to: SocketAddr, token: &str, requests: &[Bytes], callers: usize) -> anyhow::Result<f64> {
    let requests: Arc<[Bytes]> = requests.into();
    let next = Arc::new(AtomicUsize::new(0));
    let mut channels = Vec::with_capacity(callers);
    for _ in 0..callers {
        channels.push(channel(to).await?);
    }
    let began = Instant::now();
    let tasks: Vec<_> = channels
        .into_iter()
        .map(|channel| {
            let (requests, next, token) = (requests.clone(), next.clone(), token.to_owned());
            tokio::spawn(async move {
                let mut client = tonic::client::Grpc::new(channel);
                while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    client.ready().await?;
                    let request = with_token(request.clone(), &token)?;
                    client.unary(request, PathAndQuery::from_static(INGEST), Raw).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await?.context("Ingest")?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// Sends all messages over so many streams and reads all acknowledgements; the seconds that it took.
pub async fn stream(to: SocketAddr, token: &str, messages: &[Bytes], streams: usize) -> anyhow::Result<f64> {
    let mut channels = Vec::with_capacity(streams);
    for _ in 0..streams {
        channels.push(channel(to).await?);
    }
    let parts: Vec<Vec<Bytes>> =
        (0..streams).map(|first| messages.iter().skip(first).step_by(streams).cloned().collect()).collect();
    let began = Instant::now();
    let tasks: Vec<_> = channels
        .into_iter()
        .zip(parts)
        .map(|(channel, part)| {
            let token = token.to_owned();
            tokio::spawn(async move {
                let sent = part.len();
                let mut client = tonic::client::Grpc::new(channel);
                client.ready().await?;
                let request = with_token(tokio_stream::iter(part), &token)?;
                let answer = client.streaming(request, PathAndQuery::from_static(STREAM_INGEST), Raw).await?;
                let (mut answers, mut acknowledged) = (answer.into_inner(), 0);
                while answers.message().await?.is_some() {
                    acknowledged += 1;
                }
                ensure!(acknowledged == sent, "{acknowledged} of {sent} messages were acknowledged");
                Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await?.context("StreamIngest")?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// A codec that leaves messages as they are.
#[derive(Clone, Copy, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
