//! A way to a server that can be made slow, silent, or shut; and that knows how many are on it at once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How it goes on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Open,
    /// Each answer comes so much later.
    Slow(Duration),
    /// Connections stand, new ones too, and nothing comes through: packets are lost.
    Silent,
    /// Connections are cut, and new ones as soon as they are made.
    Shut,
}

pub struct Proxy {
    pub address: SocketAddr,
    way: watch::Sender<Way>,
    at_once: Arc<AtLeast>,
    _stop: DropGuard,
}

/// How many there are, and how many there were at most.
#[derive(Default)]
struct AtLeast {
    now: AtomicUsize,
    most: AtomicUsize,
}

struct Passing(Arc<AtLeast>);

impl Passing {
    fn begin(count: &Arc<AtLeast>) -> Self {
        let now = count.now.fetch_add(1, Ordering::Relaxed) + 1;
        count.most.fetch_max(now, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Proxy {
    pub async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (way, watched) = watch::channel(Way::Open);
        let at_once = Arc::<AtLeast>::default();
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned({
            let at_once = at_once.clone();
            async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let (watched, passing) = (watched.clone(), Passing::begin(&at_once));
                    tokio::spawn(async move {
                        pass(stream, server, watched).await;
                        drop(passing);
                    });
                }
            }
        }));
        Self { address, way, at_once, _stop: stop.drop_guard() }
    }

    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Most connections at once so far.
    pub fn most_at_once(&self) -> usize {
        self.at_once.most.load(Ordering::Relaxed)
    }

    /// The URL of a database by this way.
    pub fn url(&self, url: &str) -> String {
        let mut url: url::Url = url.parse().expect("a URL");
        url.set_port(Some(self.address.port())).expect("it has a port");
        url.into()
    }
}

/// The address in a database's URL.
pub fn address_of(url: &str) -> SocketAddr {
    let url: url::Url = url.parse().expect("a URL");
    let port = url.port().expect("it has a port");
    SocketAddr::from(([127, 0, 0, 1], port))
}

async fn pass(client: TcpStream, server: SocketAddr, way: watch::Receiver<Way>) {
    let mut shut = way.clone();
    let (from_client, to_client) = client.into_split();
    let both = async {
        // Who cannot get through does not reach the server either.
        open(&mut way.clone()).await;
        let Ok(stream) = TcpStream::connect(server).await else { return };
        let _ = stream.set_nodelay(true);
        let (from_server, to_server) = stream.into_split();
        tokio::select! {
            () = pump(from_client, to_server, way.clone(), false) => {}
            () = pump(from_server, to_client, way, true) => {}
        }
    };
    tokio::select! {
        _ = shut.wait_for(|way| *way == Way::Shut) => {}
        () = both => {}
    }
}

async fn open(way: &mut watch::Receiver<Way>) -> Option<Way> {
    way.wait_for(|way| *way != Way::Silent).await.ok().map(|way| *way)
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut way: watch::Receiver<Way>,
    answers: bool,
) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let Some(now) = open(&mut way).await else { return };
        if let (Way::Slow(delay), true) = (now, answers) {
            // What is slow is slow until it is not any more.
            let _ = tokio::time::timeout(delay, way.wait_for(|way| *way == Way::Open)).await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
