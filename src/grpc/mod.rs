//! The internal door: tonic services over the typed contract in `proto/`.
//!
//! One file a service; prost types stop here (`convert.rs`), one mapping makes statuses (`status.rs`), and every call has an id and
//! a deadline (`call.rs`) and is counted (`measure.rs`), and half a message takes bounded room and time (`room.rs`). Below them is a bounded
//! listener (`listen.rs`) with certificates that change while it serves (`tls.rs`); in plaintext it serves loopback only, unless the operator says so, see [`check_address`]. Health follows
//! the database, reflection is on.

use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding::{Gzip, Zstd};
use tonic::transport::Server;

use crate::access::Gate;
use crate::calls::Calls;
use crate::calls::caller_key::CallerKey;
use crate::directory::Directory;
use crate::feed::Feed;
use crate::pipeline::Pipeline;
use crate::store::Store;
use proto::calls_service_server::CallsServiceServer;
use proto::ingest_service_server::IngestServiceServer;
use proto::scoring_service_server::ScoringServiceServer;

mod access;
mod call;
mod calls;
mod codec;
mod convert;
mod health;
mod ingest;
mod listen;
mod measure;
mod misframed;
mod newcomers;
mod page;
pub mod proto;
mod room;
mod scoring;
mod session;
mod status;
#[cfg(test)]
mod tests;
mod tls;
mod watch;

pub use health::Health;
pub use listen::{ExposedAddress, Listener, Protection, check_address};
pub use tls::{Certificates, TlsError, TlsFault, TlsFiles};

/// Largest message that is taken, unpacked, and the largest that is sent. The contract of every RPC.
const MAX_MESSAGE: usize = 4 << 20;
/// Calls that one connection may have open, and run, at once: bounds what its messages can occupy.
const MAX_STREAMS: u32 = 128;
/// Bytes that a client may send ahead on one call before they are read. A connection has room for that of all its calls, so that a stream that
/// is held back holds back no other call.
const STREAM_WINDOW: u32 = 64 << 10;
/// Largest metadata of one call, bytes.
const MAX_METADATA: u32 = 16 << 10;
/// A silent connection is asked for a sign of life this often ...
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// ... and closed when none comes within this time.
const KEEP_ALIVE_PATIENCE: Duration = Duration::from_secs(10);
/// How long calls that run when the server stops may take to finish. Longer than [`call::LONGEST`], so that only a stream meets it.
const GRACE: Duration = Duration::from_secs(20);

/// What the services work with; clones share it.
#[derive(Clone)]
pub struct GrpcState {
    pub pipeline: Pipeline,
    pub directory: Directory,
    pub store: Store,
    pub gate: Gate,
    pub calls: Calls,
    /// Hashes callers' numbers. Without it no call can be recorded.
    pub caller_key: Option<CallerKey>,
    /// Tells the changes that the Watch RPCs show.
    pub feed: Feed,
    /// Cancelled when the server stops: streams end themselves.
    pub stop: CancellationToken,
}

/// What every service of the contract takes and sends: bounded messages, compressed if the caller likes.
macro_rules! within_bounds {
    ($server:expr) => {
        $server
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
            .accept_compressed(Gzip)
            .accept_compressed(Zstd)
            .send_compressed(Gzip)
            .send_compressed(Zstd)
    };
}

/// Serves until `stop`, then finishes the calls that run and returns.
pub async fn serve(
    listener: Listener,
    state: GrpcState,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the gRPC listener has no address")?;
    let health_service = health.service().await;
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_PATIENCE))
        .http2_max_header_list_size(MAX_METADATA)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW * MAX_STREAMS)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .layer(call::CallLayer)
        .layer(access::AccessLayer::new(state.gate.clone()))
        .layer(room::RoomLayer::new())
        .add_service(health_service)
        .add_service(reflection().build_v1().context("reflection")?)
        .add_service(reflection().build_v1alpha().context("reflection (v1alpha)")?)
        .add_service(within_bounds!(IngestServiceServer::new(ingest::Ingest::new(state.clone()))))
        .add_service(within_bounds!(ScoringServiceServer::new(scoring::Scoring::new(state.clone()))))
        .add_service(within_bounds!(CallsServiceServer::new(calls::Calls::new(state))));
    // However serving ends, the health task ends with it.
    let following = stop.child_token();
    let _end_with_us = following.clone().drop_guard();
    tokio::spawn(health.follow(following.clone()));

    tracing::info!(%address, tls = listener.certificates().is_some(), "serving gRPC");
    let incoming = listener.accept(following);
    tokio::select! {
        ended = router.serve_with_incoming_shutdown(incoming, stop.cancelled()) => ended.context("serving gRPC")?,
        () = grace(&stop) => tracing::warn!(grace.seconds = GRACE.as_secs(), "gRPC calls outlasted the stop and were cut off"),
    }
    Ok(())
}

async fn grace(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(GRACE).await;
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
