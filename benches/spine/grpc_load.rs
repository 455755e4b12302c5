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
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::sent::{COME_BACK, Sent};
use crate::workload::Beat;

/// Events of one call of `Ingest`.
pub const BATCH: usize = 100;

pub const INGEST: &str = "/opsmantik.v1.IngestService/Ingest";
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

/// A caller comes back so often, and then gives up.
const COME_BACK_TIMES: usize = 50;

/// Sends all requests, so many callers at once, each with a connection of its own.
pub async fn ingest(to: SocketAddr, token: &str, requests: &[Bytes], callers: usize) -> anyhow::Result<Sent> {
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
                let (mut client, mut again) = (Grpc::new(channel), 0);
                while let Some(message) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    loop {
                        client.ready().await?;
                        let request = with_token(message.clone(), &token)?;
                        match client.unary(request, PathAndQuery::from_static(INGEST), Raw).await {
                            Ok(_) => break,
                            Err(refused) => come_back(refused, &mut again).await?,
                        }
                    }
                }
                anyhow::Ok(again)
            })
        })
        .collect();
    let mut again = 0;
    for task in tasks {
        again += task.await?.context("Ingest")?;
    }
    Ok(Sent { seconds: began.elapsed().as_secs_f64(), again })
}

/// Waits before the same is sent again; an error if that cannot help.
async fn come_back(refused: Status, again: &mut usize) -> anyhow::Result<()> {
    *again += 1;
    if refused.code() != Code::Unavailable || *again > COME_BACK_TIMES {
        return Err(refused.into());
    }
    tokio::time::sleep(COME_BACK).await;
    Ok(())
}

/// Sends all messages over so many streams and reads all acknowledgements. A stream that the server ends is begun anew from its first message.
pub async fn stream(to: SocketAddr, token: &str, messages: &[Bytes], streams: usize) -> anyhow::Result<Sent> {
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
                let (mut client, mut again) = (Grpc::new(channel), 0);
                while let Err(refused) = stream_once(&mut client, &token, &part).await? {
                    come_back(refused, &mut again).await?;
                }
                anyhow::Ok(again)
            })
        })
        .collect();
    let mut again = 0;
    for task in tasks {
        again += task.await?.context("StreamIngest")?;
    }
    Ok(Sent { seconds: began.elapsed().as_secs_f64(), again })
}

async fn stream_once(client: &mut Grpc<Channel>, token: &str, part: &[Bytes]) -> anyhow::Result<Result<(), Status>> {
    client.ready().await?;
    let request = with_token(tokio_stream::iter(part.to_vec()), token)?;
    let mut answers = match client.streaming(request, PathAndQuery::from_static(STREAM_INGEST), Raw).await {
        Ok(answer) => answer.into_inner(),
        Err(refused) => return Ok(Err(refused)),
    };
    let mut acknowledged = 0;
    loop {
        match answers.message().await {
            Ok(Some(_)) => acknowledged += 1,
            Ok(None) => break,
            Err(refused) => return Ok(Err(refused)),
        }
    }
    ensure!(acknowledged == part.len(), "{acknowledged} of {} messages were acknowledged", part.len());
    Ok(Ok(()))
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
