//! The server's listeners in front of a test's database, and a client that knows what an answer must look like.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::Utc;
use opsmantik::directory::Directory;
use opsmantik::http::admin::{AdminState, admin_router};
use opsmantik::http::client_address::TrustedProxies;
use opsmantik::http::limit::RateLimit;
use opsmantik::http::serve::{Limits, serve};
use opsmantik::http::signature::Verifier;
use opsmantik::http::{PublicState, body_room, delivery_room, public_router};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use opsmantik::store::Store;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::database::{Database, database};

pub const ORIGIN: &str = "https://shop.example";
pub const RECEIVER: &str = "https://collect.example/api/sync/worker";

/// The server's public and admin listener in front of a database, with one site: `shop`.
pub struct App {
    pub database: Database,
    pub public: SocketAddr,
    pub admin: SocketAddr,
    pub client: reqwest::Client,
    pub stop: CancellationToken,
    _stop: DropGuard,
}

impl App {
    pub async fn start(rate_limit: u32) -> Self {
        Self::start_with(rate_limit, |_| {}).await
    }

    pub async fn start_with(rate_limit: u32, adapt: impl FnOnce(&mut PublicState)) -> Self {
        let database = database().await;
        database.site("shop").await;
        let store = database.store.clone();
        Self::around_with(database, store, rate_limit, adapt).await
    }

    pub async fn around(database: Database, store: Store, rate_limit: u32) -> Self {
        Self::around_with(database, store, rate_limit, |_| {}).await
    }

    async fn around_with(
        database: Database,
        store: Store,
        rate_limit: u32,
        adapt: impl FnOnce(&mut PublicState),
    ) -> Self {
        let config = PipelineConfig { patience: Duration::from_secs(1), ..PipelineConfig::default() };
        let pipeline = Pipeline::start(store.clone(), Nudge::default(), config);
        let mut state = PublicState {
            directory: Directory::new(store.clone()),
            transport: Arc::new(pipeline.clone()),
            pipeline,
            store: store.clone(),
            limit: Arc::new(RateLimit::new(rate_limit)),
            proxies: Arc::new(TrustedProxies::new("127.0.0.0/8".parse().into_iter().collect())),
            verifier: Arc::new(Verifier::new(&["sig_current", "sig_next"], RECEIVER)),
            body_patience: Duration::from_secs(1),
            body_room: body_room(),
            delivery_room: delivery_room(),
        };
        adapt(&mut state);
        let stop = CancellationToken::new();
        let listen = async || TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let (public, admin) = (listen().await, listen().await);
        let addresses = [&public, &admin].map(|listener| listener.local_addr().expect("a bound socket"));
        let limits = Limits { header_patience: Duration::from_secs(1), ..Limits::default() };
        tokio::spawn(serve(public, public_router(state), limits, stop.clone()));
        tokio::spawn(serve(admin, admin_router(AdminState { store }), limits, stop.clone()));
        let [public, admin] = addresses;
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { database, public, admin, client, _stop: stop.clone().drop_guard(), stop }
    }

    pub fn sync(&self, method: Method) -> RequestBuilder {
        self.client.request(method, format!("http://{}/api/sync?v=1", self.public))
    }

    pub async fn post(&self, body: impl Into<reqwest::Body>) -> Answer {
        Answer::of(self.sync(Method::POST).header("Origin", ORIGIN).body(body)).await
    }

    pub async fn deliver(&self, body: &str, key: &str) -> Answer {
        let url = format!("http://{}/api/sync/worker", self.public);
        Answer::of(self.client.post(url).header("Upstash-Signature", signature(body, key)).body(body.to_owned())).await
    }

    pub async fn raw(&self, request: &[u8]) -> String {
        let mut socket = TcpStream::connect(self.public).await.expect("the server listens");
        socket.write_all(request).await.expect("the server reads");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(8), socket.read_to_end(&mut answer)).await;
        read.expect("the server answers or hangs up").expect("no reset");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: Value,
}

impl Answer {
    pub async fn of(request: RequestBuilder) -> Self {
        let response: Response = request.send().await.expect("the server answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.text().await.expect("a whole answer");
        Self { status, headers, body: serde_json::from_str(&body).unwrap_or(Value::Null) }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn error(&self) -> (u16, &str, &str) {
        let text = |key: &str| self.body[key].as_str().unwrap_or_default();
        assert_eq!((&self.body["ok"], &self.body["score"]), (&json!(false), &Value::Null), "{}", self.body);
        assert!(!text("message").is_empty());
        (self.status, text("error"), text("field"))
    }

    pub fn is_shown_to(&self, origin: &str) -> bool {
        assert_eq!(self.header("vary"), Some("Origin"));
        match self.header("access-control-allow-origin") {
            Some(shown) => {
                assert_eq!((shown, self.header("access-control-allow-credentials")), (origin, Some("true")));
                true
            }
            None => false,
        }
    }
}

pub fn signature(body: &str, key: &str) -> String {
    let now = Utc::now().timestamp();
    let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(body));
    let claims = json!({"iss": "Upstash", "sub": RECEIVER, "exp": now + 300, "nbf": now, "body": hash});
    let key = jsonwebtoken::EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("a test's own token")
}

pub fn event(id: u128) -> Value {
    json!({"id": Uuid::from_u128(id), "s": "shop", "u": "https://shop.example/?gclid=G", "sid": "visit",
        "ec": "interaction", "ea": "view", "meta": {"fp": "F"}})
}
