//! The listener below gRPC: who may be served in plaintext, and a bounded way from a socket to a connection.
//!
//! Every handshake is a task of its own with a time-out, so one that dawdles or talks rubbish holds up nobody. Connections, those
//! that shake hands included, are bounded; further ones wait in the kernel's queue, unless one on which nobody has shown a token can
//! make room (`newcomers.rs`). A connection that sends nothing is closed, and an error of `accept` (too many open files, mostly) is
//! waited out.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::newcomers::{Newcomer, Newcomers, Welcome};
use super::tls::{Certificates, TlsFiles};
use crate::telemetry;

/// Most connections at once.
const CONNECTIONS: usize = 1024;
/// Most of them without a caller who has shown a good token.
const NEWCOMERS: usize = CONNECTIONS / 2;
/// A TLS handshake takes no longer ...
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// ... and neither do the first bytes of HTTP/2 after it.
const PREFACE_PATIENCE: Duration = Duration::from_secs(5);
/// With these a client begins HTTP/2 (RFC 9113, 3.4). From then on keep-alive finds out who is gone.
const PREFACE_BYTES: usize = 24;

/// What keeps others from reading along on the gRPC listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protection {
    /// Nothing does, so only this machine's own processes may be served.
    Loopback,
    /// Something in front of us, as the operator assures.
    Elsewhere,
    /// TLS with these files.
    Tls(TlsFiles),
}

/// The address can be reached from other machines, and whatever is said there could be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "refusing to serve gRPC in plaintext on {0}: the tokens of callers could be read on the way; set GRPC_TLS_CERT and \
     GRPC_TLS_KEY, use a loopback address such as 127.0.0.1:50051, or, if a proxy or mesh in front of it ends TLS, say \
     GRPC_PLAINTEXT=true"
)]
pub struct ExposedAddress(pub SocketAddr);

/// Whether gRPC may be served on this address.
pub fn check_address(address: SocketAddr, protection: &Protection) -> Result<(), ExposedAddress> {
    match protection {
        Protection::Loopback if !address.ip().to_canonical().is_loopback() => Err(ExposedAddress(address)),
        Protection::Loopback | Protection::Elsewhere | Protection::Tls(_) => Ok(()),
    }
}

/// A socket that may be served on, and its certificates.
pub struct Listener {
    socket: TcpListener,
    certificates: Option<Certificates>,
}

impl Listener {
    /// Fails for an address that [`check_address`] refuses and for files that cannot be used.
    pub fn new(socket: TcpListener, protection: Protection) -> anyhow::Result<Self> {
        let address = socket.local_addr().context("the gRPC listener has no address")?;
        check_address(address, &protection)?;
        let certificates = match protection {
            Protection::Tls(files) => Some(Certificates::load(files)?),
            Protection::Loopback | Protection::Elsewhere => None,
        };
        Ok(Self { socket, certificates })
    }

    /// What it shows its clients; none in plaintext.
    pub fn certificates(&self) -> Option<Certificates> {
        self.certificates.clone()
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Accepts until the stream is dropped, which closes the socket. Certificates are followed until `stop`.
    pub(super) fn accept(self, stop: CancellationToken) -> ReceiverStream<io::Result<Connection>> {
        if let Some(certificates) = self.certificates.clone() {
            tokio::spawn(certificates.follow(stop));
        }
        let (ready, connections) = mpsc::channel(1);
        tokio::spawn(accept(self, ready));
        ReceiverStream::new(connections)
    }
}

async fn accept(listener: Listener, ready: mpsc::Sender<io::Result<Connection>>) {
    let Listener { socket, certificates } = listener;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let newcomers = Newcomers::new(NEWCOMERS);
    // Ended together with this task.
    let mut opening = JoinSet::new();
    loop {
        while opening.try_join_next().is_some() {}
        let next = async {
            let stream = socket.accept().await?.0;
            if room.available_permits() == 0 {
                newcomers.close_oldest();
            }
            let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
            Ok((stream, permit))
        };
        let accepted: io::Result<_> = tokio::select! {
            () = ready.closed() => return,
            accepted = next => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (certificates, ready, newcomer) = (certificates.clone(), ready.clone(), newcomers.enter());
                opening.spawn(async move {
                    if let Some(connection) = open(stream, certificates, newcomer, permit).await {
                        // Nobody takes it when the server stops.
                        drop(ready.send(Ok(connection)).await);
                    }
                });
            }
            Err(error) if is_of_one_connection(&error) => {
                tracing::debug!(%error, "a connection was gone before it was accepted")
            }
            Err(error) => {
                // Mostly too many open files: waiting is all that helps.
                tracing::warn!(%error, "a gRPC connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The next `accept` may succeed at once.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A connection that is ready for HTTP/2, or none if its handshake came to nothing.
async fn open(
    stream: TcpStream,
    certificates: Option<Certificates>,
    mut newcomer: Newcomer,
    permit: OwnedSemaphorePermit,
) -> Option<Connection> {
    // Answers are small; waiting to fill a packet only delays them.
    let _ = stream.set_nodelay(true);
    let Some(certificates) = certificates else { return Some(Connection::new(Box::new(stream), newcomer, permit)) };
    let handshake = TlsAcceptor::from(certificates.current()).accept(stream);
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(HANDSHAKE_PATIENCE, handshake) => shaken,
        () = poll_fn(|cx| newcomer.poll_over(cx)) => return None,
    };
    let reason = match shaken {
        Ok(Ok(stream)) => return Some(Connection::new(Box::new(stream), newcomer, permit)),
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            "failed"
        }
        Err(_elapsed) => "timeout",
    };
    metrics::counter!(telemetry::GRPC_HANDSHAKE_FAILURES_TOTAL, "reason" => reason).increment(1);
    None
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<W: AsyncRead + AsyncWrite + Send + Unpin> Wire for W {}

/// An open connection, plain or encrypted, and its place among the bounded number of them.
pub(super) struct Connection {
    wire: Box<dyn Wire>,
    welcome: Welcome,
    /// Until a caller on it is known.
    newcomer: Option<Newcomer>,
    silence: Option<Silence>,
    _place: OwnedSemaphorePermit,
}

/// A connection that has not begun HTTP/2 yet.
struct Silence {
    ends: Pin<Box<Sleep>>,
    heard: usize,
}

impl Connection {
    fn new(wire: Box<dyn Wire>, newcomer: Newcomer, place: OwnedSemaphorePermit) -> Self {
        let silence = Silence { ends: Box::pin(tokio::time::sleep(PREFACE_PATIENCE)), heard: 0 };
        Self { wire, welcome: newcomer.welcome(), newcomer: Some(newcomer), silence: Some(silence), _place: place }
    }

    /// Fails when the connection has to make room. Asked wherever it may wait: who does not read what it is sent is not read from either.
    fn stays(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(newcomer) = &mut self.newcomer else { return Ok(()) };
        if newcomer.is_known() {
            self.newcomer = None;
        } else if newcomer.poll_over(cx).is_ready() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }
}

impl Connected for Connection {
    type ConnectInfo = Welcome;

    fn connect_info(&self) -> Welcome {
        self.welcome.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.stays(cx)?;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.wire).poll_read(cx, buffer);
        let Some(silence) = &mut this.silence else { return read };
        silence.heard += buffer.filled().len() - before;
        if silence.heard >= PREFACE_BYTES {
            this.silence = None;
        } else if read.is_pending() && silence.ends.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stays(cx)?;
        Pin::new(&mut self.wire).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stays(cx)?;
        Pin::new(&mut self.wire).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stays(cx)?;
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}
