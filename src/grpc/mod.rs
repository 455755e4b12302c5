//! The internal door: tonic services over the typed contract in `proto/`.
//!
//! One file a service; prost types stop here (`convert.rs`), one mapping makes statuses (`status.rs`), and every call has an id and
//! a deadline (`call.rs`). Health follows the database, reflection is on. Nothing here asks who calls, so [`serve`] listens on loopback
//! only, see [`check_address`].

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::access::Gate;
use crate::directory::Directory;
use crate::pipeline::Pipeline;
use crate::store::Store;
use proto::calls_service_server::CallsServiceServer;
use proto::ingest_service_server::IngestServiceServer;
use proto::scoring_service_server::ScoringServiceServer;

mod access;
mod call;
mod calls;
mod convert;
mod health;
mod ingest;
mod page;
pub mod proto;
mod scoring;
mod session;
mod status;
#[cfg(test)]
mod tests;

pub use health::Health;

/// Largest message that is taken, and the largest that is sent. The contract of every RPC.
const MAX_MESSAGE: usize = 4 << 20;
/// Calls that one connection may have open, and run, at once: bounds what its messages can occupy.
const MAX_STREAMS: u32 = 128;
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
}

/// The address can be reached from other machines, and nothing asks who calls.
#[derive(Debug, thiserror::Error)]
#[error(
    "refusing to serve gRPC on {0}: calls are not authenticated, so whoever reaches this address could write events for \
     every site; use a loopback address such as 127.0.0.1:50051"
)]
pub struct ExposedAddress(pub SocketAddr);

/// Whether gRPC may be served on this address: only where the machine's own processes reach it.
pub fn check_address(address: SocketAddr) -> Result<(), ExposedAddress> {
    if address.ip().to_canonical().is_loopback() { Ok(()) } else { Err(ExposedAddress(address)) }
}

/// Serves until `stop`, then finishes the calls that run and returns. Fails at once for a listener that [`check_address`] refuses.
pub async fn serve(
    listener: TcpListener,
    state: GrpcState,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the gRPC listener has no address")?;
    check_address(address)?;
    let health_service = health.service().await;
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_PATIENCE))
        .http2_max_header_list_size(MAX_METADATA)
        .max_concurrent_streams(MAX_STREAMS)
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .layer(call::CallLayer)
        .layer(access::AccessLayer::new(state.gate.clone()))
        .add_service(health_service)
        .add_service(reflection().build_v1().context("reflection")?)
        .add_service(reflection().build_v1alpha().context("reflection (v1alpha)")?)
        .add_service(
            IngestServiceServer::new(ingest::Ingest::new(state.clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            ScoringServiceServer::new(scoring::Scoring::new(state))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            CallsServiceServer::new(calls::Calls)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        );
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    // However serving ends, the health task ends with it.
    let following = stop.child_token();
    let _end_with_us = following.clone().drop_guard();
    tokio::spawn(health.follow(following));

    tracing::info!(%address, "serving gRPC");
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
