//! The server as `dev` runs it, the demo page on two origins, and a gate in front of the API that can be shut.

use std::net::SocketAddr;

use axum::response::Html;
use axum::routing::get;
use clap::Parser;
use opsmantik::config::{Mode, Settings};
use opsmantik::dev::demo::Demo;
use opsmantik::http::serve::{Limits, serve};
use opsmantik::server::{Listeners, Server};
use opsmantik::store::sites::NewSite;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::browser::eventually;
use super::database::{Database, database};

/// Everything but the browser.
pub struct Stage {
    pub database: Database,
    pub gate: Gate,
    /// The page on an origin of its own; it reaches the API through the gate.
    pub page: String,
    /// The page on the API's origin.
    pub same_origin_page: String,
    server: Server,
    _stop: DropGuard,
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
}

impl Stage {
    pub async fn set() -> Self {
        let database = database().await;
        let Arguments { settings } =
            Arguments::parse_from(["it", "--queue", "inline", "--rate-limit", "600", "--trusted-proxies", ""]);
        let bind = async || TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let listeners = Listeners { http: bind().await, grpc: bind().await, admin: bind().await };
        let page_listener = bind().await;
        let address = |listener: &TcpListener| listener.local_addr().expect("a bound socket");
        let (api, page) = (address(&listeners.http), address(&page_listener));
        let gate = Gate::before(api).await;
        let new = NewSite {
            public_id: "demo".to_owned(),
            owner: None,
            name: "Demo".to_owned(),
            domain: "localhost".to_owned(),
            origins: vec![format!("http://{api}"), format!("http://{page}")],
            region: None,
        };
        let site = database.store.add_site(&new).await.expect("the database answers").expect("the public id is free");
        let demo = |api: SocketAddr| Demo {
            store: database.store.clone(),
            site_id: site.id,
            public_id: site.public_id.clone(),
            api_base: format!("http://{api}"),
        };
        let beside = demo(api).router("/demo");
        let elsewhere = get(async || Html("<!doctype html><link rel=icon href=data:,><p>Elsewhere"));
        let server = Server::start(&settings, Mode::Dev, &database.url, listeners, beside).await;
        let server = server.expect("the server starts");
        let stop = CancellationToken::new();
        let other = demo(gate.address).router("").route("/elsewhere", elsewhere);
        tokio::spawn(serve(page_listener, other, Limits::default(), stop.clone()));
        Self {
            database,
            gate,
            page: format!("http://{page}"),
            same_origin_page: format!("http://{api}/demo"),
            server,
            _stop: stop.drop_guard(),
        }
    }

    /// All events in the order in which they happened.
    pub async fn events(&self) -> Vec<Value> {
        self.database.rows("SELECT * FROM events ORDER BY occurred_at, id").await
    }

    /// Their ids, sorted.
    pub async fn event_ids(&self) -> Vec<String> {
        let rows = self.database.rows("SELECT id FROM events ORDER BY id::text").await;
        rows.iter().filter_map(|row| row["id"].as_str().map(str::to_owned)).collect()
    }

    /// Their actions, with value and label where there is one, sorted: `scroll_depth 50`, `phone_call tel:…`.
    pub async fn actions(&self) -> Vec<String> {
        let name = "concat_ws(' ', event_action, event_value, event_label)";
        let rows =
            self.database.rows(&format!("SELECT {name} AS name FROM events ORDER BY {name} COLLATE \"C\"")).await;
        rows.iter().filter_map(|row| row["name"].as_str().map(str::to_owned)).collect()
    }

    /// Waits until an event of this action is stored.
    pub async fn stored(&self, action: &str) {
        eventually(&format!("{action} is stored"), async || {
            self.events().await.iter().any(|event| event["event_action"] == action).then_some(())
        })
        .await;
    }

    /// The one session.
    pub async fn session(&self) -> Value {
        let mut sessions = self.database.rows("SELECT * FROM sessions").await;
        assert_eq!(sessions.len(), 1, "one visit is one session: {sessions:#?}");
        sessions.remove(0)
    }

    /// Nothing was refused, and the server ends in order.
    pub async fn stop(self) {
        assert_eq!(self.database.rows("SELECT * FROM dead_letters").await, Vec::<Value>::new());
        self.server.stop().await;
    }
}

/// What passes the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    Open,
    /// Requests pass, answers are kept back.
    NoAnswers,
    /// Connections are cut.
    Shut,
}

/// The way to the API.
pub struct Gate {
    pub address: SocketAddr,
    passage: watch::Sender<Passage>,
}

impl Gate {
    async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (passage, watched) = watch::channel(Passage::Open);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(pass(stream, server, watched.clone()));
            }
        });
        Self { address, passage }
    }

    pub fn set(&self, passage: Passage) {
        self.passage.send_replace(passage);
    }
}

async fn pass(mut browser: TcpStream, server: SocketAddr, passage: watch::Receiver<Passage>) {
    let mut shut = passage.clone();
    if *passage.borrow() == Passage::Shut {
        return;
    }
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let (mut from_browser, to_browser) = browser.split();
    let (from_server, mut to_server) = server.split();
    tokio::select! {
        _ = shut.wait_for(|passage| *passage == Passage::Shut) => {}
        _ = copy(&mut from_browser, &mut to_server) => {}
        () = answers(from_server, to_browser, passage) => {}
    }
}

async fn answers(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut passage: watch::Receiver<Passage>) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if passage.wait_for(|passage| *passage != Passage::NoAnswers).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
