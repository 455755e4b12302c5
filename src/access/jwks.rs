//! The public keys of the sign-in service, by `kid`.
//!
//! One task fetches them, so there is one fetch at a time: at once, then every ten minutes, sooner after a failure, and when somebody comes
//! with a key id that is not among them, at most once in ten seconds. A fetch is bounded in time and size. While the service is
//! away, slow or answers rubbish, the keys of the last good answer stay; a good answer replaces them all, so a key that left is refused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::Denied;
use crate::bounded;
use crate::telemetry;

/// Largest answer that is read, bytes.
const MAX_BODY: usize = 64 << 10;
/// Most keys of an answer that is believed.
const MAX_KEYS: usize = 64;
/// Longest key id.
const MAX_KID: usize = 256;
/// Bits of the weakest and of the strongest RSA key that is used: beyond, checking a signature costs too much.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Where the keys are, and how patiently they are fetched.
#[derive(Debug, Clone)]
pub struct JwksConfig {
    pub url: Url,
    /// For one fetch, from the connection to the last byte.
    pub patience: Duration,
    /// From a good answer to the next fetch.
    pub keep_for: Duration,
    /// From a failed fetch to the next.
    pub retry_after: Duration,
    /// From one fetch to the next that an unknown key id may cause.
    pub ask_gap: Duration,
}

impl JwksConfig {
    pub fn new(url: Url) -> Self {
        Self {
            url,
            patience: Duration::from_secs(3),
            keep_for: Duration::from_secs(600),
            retry_after: Duration::from_secs(15),
            ask_gap: Duration::from_secs(10),
        }
    }
}

/// A public key and the one algorithm that it is for.
pub(super) struct PublicKey {
    pub(super) name: &'static str,
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

type Keys = HashMap<String, Arc<PublicKey>>;

/// The keys as of the last good fetch, and how fetching goes.
#[derive(Clone, Default)]
struct State {
    keys: Arc<Keys>,
    /// The last fetch was a good one.
    current: bool,
    running: bool,
    began: Option<Instant>,
    /// Fetches that have ended.
    ended: u64,
}

/// The keys; fetching ends when it is dropped.
pub(super) struct KeySet {
    state: watch::Receiver<State>,
    ask: Arc<Notify>,
    config: JwksConfig,
}

impl KeySet {
    pub(super) fn start(config: JwksConfig) -> anyhow::Result<Self> {
        let mut client = reqwest::Client::builder()
            .timeout(config.patience)
            // Whoever can redirect could also name other keys, over plain http.
            .redirect(reqwest::redirect::Policy::none());
        if config.url.scheme() == "http" {
            // Plain text goes to this machine only, and a proxy is another.
            client = client.no_proxy();
        }
        let client = client.build().context("a client for the keys of the sign-in service")?;
        let (sender, state) = watch::channel(State::default());
        let ask = Arc::<Notify>::default();
        tokio::spawn(keep_fresh(client, config.clone(), sender, ask.clone()));
        Ok(Self { state, ask, config })
    }

    /// The key with this id. Nothing if there is none; an error if there may be one that cannot be fetched now.
    pub(super) async fn find(&self, kid: &str) -> Result<Option<Arc<PublicKey>>, Denied> {
        if kid.len() > MAX_KID {
            return Ok(None);
        }
        let seen = self.state.borrow().clone();
        if let Some(key) = seen.keys.get(kid) {
            return Ok(Some(key.clone()));
        }
        let due = seen.began.is_none_or(|began| began.elapsed() >= self.config.ask_gap);
        if due && !seen.running {
            self.ask.notify_one();
        }
        if due || seen.running {
            let mut state = self.state.clone();
            // Whatever comes of waiting, the state tells.
            let _ = timeout(self.config.patience * 2, state.wait_for(|now| now.ended > seen.ended)).await;
        }
        let now = self.state.borrow();
        match now.keys.get(kid) {
            None if !now.current => Err(Denied::Provider),
            found => Ok(found.cloned()),
        }
    }
}

/// Fetches now, when it is time, and when asked, until nobody holds the keys.
async fn keep_fresh(client: reqwest::Client, config: JwksConfig, state: watch::Sender<State>, ask: Arc<Notify>) {
    loop {
        let began = Instant::now();
        state.send_modify(|state| (state.running, state.began) = (true, Some(began)));
        let fetched = fetch(&client, &config.url).await;
        let (outcome, pause) = match &fetched {
            Ok(_) => ("fetched", config.keep_for),
            Err(_) => ("failed", config.retry_after),
        };
        metrics::counter!(telemetry::JWKS_FETCHES_TOTAL, "outcome" => outcome).increment(1);
        state.send_modify(|state| {
            (state.running, state.ended, state.current) = (false, state.ended + 1, fetched.is_ok());
            match fetched {
                Ok(keys) => state.keys = Arc::new(keys),
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    kept.keys = state.keys.len(),
                    "cannot fetch the keys of the sign-in service; those of the last good answer stay"
                ),
            }
        });
        let due = Instant::now() + pause;
        loop {
            tokio::select! {
                () = state.closed() => return,
                () = sleep_until(due) => break,
                () = ask.notified() => if began.elapsed() >= config.ask_gap {
                    break;
                },
            }
        }
    }
}

async fn fetch(client: &reqwest::Client, url: &Url) -> anyhow::Result<Keys> {
    let request = client.get(url.clone()).header("accept", "application/json");
    let response = request.send().await.map_err(reqwest::Error::without_url)?;
    ensure!(response.status() == 200, "the answer is {}", response.status());
    let body = bounded::body(response, MAX_BODY).await?;
    read(&body.with_context(|| format!("the answer is larger than {MAX_BODY} bytes"))?)
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

/// Of a JWK, what ES256 and RS256 need.
#[derive(Deserialize)]
struct Jwk {
    kid: String,
    kty: String,
    alg: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

/// The usable keys of an answer; the others are passed over.
fn read(body: &[u8]) -> anyhow::Result<Keys> {
    let document: Document = serde_json::from_slice(body).context("the answer is no JWK set")?;
    if document.keys.len() > MAX_KEYS {
        bail!("the answer has more than {MAX_KEYS} keys");
    }
    let mut keys = Keys::new();
    for jwk in document.keys {
        if let Some((kid, key)) = usable(jwk) {
            keys.entry(kid).or_insert(Arc::new(key));
        } else {
            tracing::debug!("passed over a key of the sign-in service that is neither for ES256 nor for RS256");
        }
    }
    Ok(keys)
}

fn usable(jwk: serde_json::Value) -> Option<(String, PublicKey)> {
    let jwk: Jwk = serde_json::from_value(jwk).ok()?;
    let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?).ok();
    let key = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("EC", Some("P-256")) => {
            let (x, y) = (bytes(&jwk.x)?, bytes(&jwk.y)?);
            if (x.len(), y.len()) != (32, 32) {
                return None;
            }
            let point = [&[4], x.as_slice(), &y].concat();
            PublicKey { name: "ES256", algorithm: Algorithm::ES256, key: DecodingKey::from_ec_der(&point) }
        }
        ("RSA", _) => {
            let (n, e) = (bytes(&jwk.n)?, bytes(&jwk.e)?);
            if !RSA_BITS.contains(&(n.len() * 8)) || e.is_empty() || e.len() > 4 {
                return None;
            }
            let key = DecodingKey::from_rsa_raw_components(&n, &e);
            PublicKey { name: "RS256", algorithm: Algorithm::RS256, key }
        }
        _ => return None,
    };
    let fits = jwk.alg.is_none_or(|alg| alg == key.name) && jwk.purpose.is_none_or(|purpose| purpose == "sig");
    (fits && (1..=MAX_KID).contains(&jwk.kid.len())).then_some((jwk.kid, key))
}
