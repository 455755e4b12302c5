//! Serving a router on a socket: HTTP/1 and HTTP/2, bounded on every side.
//!
//! A connection that asks nothing, dawdles with its headers, stays idle or does not read its answers (`write_limit.rs`) is closed. Connections are
//! limited in number; further ones wait in the kernel's queue. On stop nothing new is taken, what was taken is answered, and who is still there
//! after the drain is cut off.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::write_limit::WriteLimit;

/// Most requests at once on a connection of HTTP/2: a page has one under way, and a delivery is one.
const STREAMS: u32 = 16;
/// What a request may send before we have read it ...
const STREAM_WINDOW: u32 = 64 << 10;
/// ... and all requests of a connection.
const CONNECTION_WINDOW: u32 = 256 << 10;

/// Bytes of answers that the kernel keeps for a client that does not read, where it would keep megabytes: hundreds of answers.
const SEND_BUFFER: usize = 64 << 10;

/// Bounds of a listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections at once.
    pub connections: usize,
    /// From the connection to the first request, and from one request to the end of the next one's headers.
    pub header_patience: Duration,
    /// A client that does not read what it asked for is waited for no longer than this.
    pub write_patience: Duration,
    /// Most bytes of a request's headers.
    pub header_bytes: u32,
    /// What is being answered on stop has this long.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            header_patience: Duration::from_secs(15),
            write_patience: Duration::from_secs(20),
            header_bytes: 32 << 10,
            drain: Duration::from_secs(10),
        }
    }
}

/// Serves until `stop`, then drains.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        // Whoever has finished is forgotten.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                connections.spawn(connection(stream, peer, permit, router.clone(), limits, graceful.watcher()));
            }
            Err(error) => {
                // Mostly too many open files: waiting is all that helps.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(limits.drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut off: the drain took too long");
    }
    connections.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, permit))
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    _permit: OwnedSemaphorePermit,
    router: Router,
    limits: Limits,
    watcher: Watcher,
) {
    // Answers are small; waiting to fill a packet only delays them.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER);
    let asked = Arc::new(AtomicBool::new(false));
    let service = service_fn({
        let asked = asked.clone();
        move |request: hyper::Request<Incoming>| {
            asked.store(true, Ordering::Relaxed);
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(peer));
            router.clone().oneshot(request)
        }
    });
    let server = builder(limits);
    let stream = WriteLimit::new(stream, limits.write_patience);
    let served = watcher.watch(server.serve_connection(TokioIo::new(stream), service).into_owned());
    let mut served = std::pin::pin!(served);
    // hyper's own timers begin with the first bytes of a known protocol; this one begins with the connection.
    tokio::select! {
        _ = &mut served => return,
        () = tokio::time::sleep(limits.header_patience) => if !asked.load(Ordering::Relaxed) { return },
    }
    // How a client's connection ends is its own affair.
    let _ = served.await;
}

fn builder(limits: Limits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_patience)
        .max_buf_size(limits.header_bytes.max(8 << 10) as usize)
        // Who closes after their last byte has asked, and is heard: else what is not read by then would be thrown away.
        .half_close(true)
        .keep_alive(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(limits.header_bytes);
    builder
}
