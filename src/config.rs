//! What the operator sets, by flag or environment variable.
//!
//! An empty variable counts as unset (compose files write them). What one value says about another is checked once, before
//! anything starts, and every complaint names its variable. Secrets show themselves to nobody: not in `--help`, `Debug` or errors.

use std::net::SocketAddr;

use ipnet::IpNet;
use url::Url;

use crate::access::UserTokens;
use crate::access::jwks::JwksConfig;
use crate::calls::caller_key::CallerKey;
use crate::grpc::{Protection, TlsFiles};
use crate::http::signature::{self, Verifier};
use crate::queue::nats::{NatsConfig, Servers};
use crate::queue::qstash::QstashConfig;
use crate::secret::Secret;

/// Where QStash lives if nobody says otherwise.
const QSTASH_PUBLIC: &str = "https://qstash.upstash.io";

/// Bytes of the shortest HS256 secret that is no weaker than the hash.
const SHORTEST_JWT_SECRET: usize = 32;

/// The path of the worker below `PUBLIC_URL`.
pub const WORKER_PATH: &str = "/api/sync/worker";

/// Settings of the server.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// PostgreSQL: `postgres://user:password@host:5432/database?sslmode=require`. `dev` makes its own
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "DATABASE_URL")]
    pub database_url: Option<Secret>,

    /// The same database for the change feed behind Watch, without a pooler between; its role needs REPLICATION. DATABASE_URL if unset
    #[arg(long, env = "FEED_DATABASE_URL", hide_env_values = true, value_name = "FEED_DATABASE_URL")]
    pub feed_database_url: Option<Secret>,

    /// Public listener: /api/sync, /api/sync/worker, /tracker.js
    #[arg(long, env = "HTTP_ADDR", value_name = "HTTP_ADDR", default_value = "127.0.0.1:8080")]
    pub http_addr: SocketAddr,

    /// gRPC listener for internal services
    #[arg(long, env = "GRPC_ADDR", value_name = "GRPC_ADDR", default_value = "127.0.0.1:50051")]
    pub grpc_addr: SocketAddr,

    /// PEM file with the certificate of the gRPC listener and those that link it to its authority: serves TLS. Read again when it changes
    #[arg(long, env = "GRPC_TLS_CERT", value_name = "GRPC_TLS_CERT")]
    pub grpc_tls_cert: Option<String>,

    /// PEM file with the private key of GRPC_TLS_CERT
    #[arg(long, env = "GRPC_TLS_KEY", value_name = "GRPC_TLS_KEY")]
    pub grpc_tls_key: Option<String>,

    /// PEM file with the authorities of clients' certificates: who shows none that they signed is refused
    #[arg(long, env = "GRPC_TLS_CLIENT_CA", value_name = "GRPC_TLS_CLIENT_CA")]
    pub grpc_tls_client_ca: Option<String>,

    /// Serve gRPC in plaintext on an address that other machines reach: for a proxy or mesh in front of it that ends TLS.
    /// Tokens could be read on the way otherwise
    #[arg(
        long,
        env = "GRPC_PLAINTEXT",
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_default_value = true,
        value_parser = yes_or_no
    )]
    pub grpc_plaintext: bool,

    /// Key for the hashes of callers' numbers: 32 characters or more, the same on every server, never changed. Without it no call is taken
    #[arg(long, env = "CALLER_KEY", hide_env_values = true, value_name = "CALLER_KEY")]
    pub caller_key: Option<Secret>,

    /// Listener for the operator: /healthz, /readyz, /metrics. Keep it off the internet
    #[arg(long, env = "ADMIN_ADDR", value_name = "ADMIN_ADDR", default_value = "127.0.0.1:9090")]
    pub admin_addr: SocketAddr,

    /// Requests a minute that one client may send for one site; 0 is no limit
    #[arg(long, env = "RATE_LIMIT", value_name = "RATE_LIMIT", default_value_t = 600)]
    pub rate_limit: u32,

    /// Proxies whose X-Forwarded-For and CF-Connecting-IP are believed: addresses or CIDRs, separated by commas
    #[arg(
        long,
        env = "TRUSTED_PROXIES",
        value_name = "TRUSTED_PROXIES",
        default_value = "",
        hide_default_value = true
    )]
    pub trusted_proxies: Proxies,

    /// Who owns an event between the edge and the tables: `inline` answers once it is committed, `qstash` once QStash has it, `nats` once
    /// a JetStream stream has it
    #[arg(long, env = "QUEUE", value_name = "QUEUE", default_value = "inline")]
    pub queue: Queue,

    /// What of the server runs here: `edge` is the public listener and gRPC, `worker` stores what is in the stream and keeps the months, `all`
    /// is both. Edges and workers need QUEUE=nats between them
    #[arg(long, env = "ROLE", value_name = "ROLE", default_value = "all")]
    pub role: Role,

    /// Where the internet reaches this server, `https://collect.example.com`. QStash delivers to it and signs for it
    #[arg(long, env = "PUBLIC_URL", value_name = "PUBLIC_URL")]
    pub public_url: Option<String>,

    /// QStash's address, if it is not `https://qstash.upstash.io` (regions and the development server have their own)
    #[arg(long, env = "QSTASH_URL", value_name = "QSTASH_URL")]
    pub qstash_url: Option<String>,

    /// Token to publish with, from the QStash console
    #[arg(long, env = "QSTASH_TOKEN", hide_env_values = true, value_name = "QSTASH_TOKEN")]
    pub qstash_token: Option<Secret>,

    /// Key with which QStash signs deliveries. Without keys every delivery is refused
    #[arg(long, env = "QSTASH_CURRENT_SIGNING_KEY", hide_env_values = true, value_name = "QSTASH_CURRENT_SIGNING_KEY")]
    pub qstash_current_signing_key: Option<Secret>,

    /// Key with which QStash signs after the next rotation
    #[arg(long, env = "QSTASH_NEXT_SIGNING_KEY", hide_env_values = true, value_name = "QSTASH_NEXT_SIGNING_KEY")]
    pub qstash_next_signing_key: Option<Secret>,

    /// NATS with JetStream: `nats://user:password@host:4222` or `tls://…`, several servers of one cluster separated by commas
    #[arg(long, env = "NATS_URL", hide_env_values = true, value_name = "NATS_URL")]
    pub nats_url: Option<Secret>,

    /// Credentials file for NATS, instead of a login in NATS_URL
    #[arg(long, env = "NATS_CREDENTIALS", value_name = "NATS_CREDENTIALS")]
    pub nats_credentials: Option<String>,

    /// The stream's name, of letters, digits, `-` and `_`; its subjects are `NAME.events.SITE`. It is made if it is missing
    #[arg(long, env = "NATS_STREAM", value_name = "NATS_STREAM", default_value = "opsmantik")]
    pub nats_stream: String,

    /// Copies of the stream on as many NATS servers when it is made; at least so many when it is there already
    #[arg(long, env = "NATS_REPLICAS", value_name = "NATS_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub nats_replicas: u8,

    /// Bytes that may wait in the stream when it is made. Nothing is deleted beyond: edges then store directly, or answer 503
    #[arg(long, env = "NATS_MAX_BYTES", value_name = "NATS_MAX_BYTES", default_value_t = 1 << 30, value_parser = clap::value_parser!(i64).range(1 << 20..=1 << 50))]
    pub nats_max_bytes: i64,

    /// Secret of Supabase's HS256 JWTs, as text, at least 32 bytes. Signed-in people may then read by gRPC
    #[arg(long, env = "SUPABASE_JWT_SECRET", hide_env_values = true, value_name = "SUPABASE_JWT_SECRET")]
    pub supabase_jwt_secret: Option<Secret>,

    /// Public keys of Supabase's ES256 and RS256 JWTs, `https://PROJECT.supabase.co/auth/v1/.well-known/jwks.json`
    #[arg(long, env = "SUPABASE_JWKS_URL", value_name = "SUPABASE_JWKS_URL")]
    pub supabase_jwks_url: Option<String>,

    /// What `iss` of these JWTs must be, `https://PROJECT.supabase.co/auth/v1`; not checked if not given
    #[arg(long, env = "SUPABASE_JWT_ISSUER", value_name = "SUPABASE_JWT_ISSUER")]
    pub supabase_jwt_issuer: Option<String>,
}

/// Who owns an event between the edge and the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Queue {
    Inline,
    Qstash,
    Nats,
}

/// What of the server runs in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    All,
    Edge,
    Worker,
}

/// For whom the server runs: a few things are fine on a developer's machine only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Serve,
    Dev,
}

/// A list of CIDRs; a bare address is a network of one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies(pub Vec<IpNet>);

impl std::str::FromStr for Proxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = |part: &str| {
            let address = || part.parse::<std::net::IpAddr>().map(IpNet::from);
            part.parse::<IpNet>()
                .or_else(|_| address())
                .map_err(|_| format!("`{part}` is neither an address nor a CIDR"))
        };
        let parts = text.split([',', ' ', '\n']).map(str::trim).filter(|part| !part.is_empty());
        parts.map(network).collect::<Result<_, _>>().map(Self)
    }
}

/// A setting that is missing or wrong. No value of a secret in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{0} is not set: {1}")]
    Missing(&'static str, &'static str),
    #[error("{0} is wrong: {1}")]
    Invalid(&'static str, &'static str),
    #[error(
        "{0} holds a signing key of QStash's development server, which everybody knows: take yours from the QStash console"
    )]
    DevelopmentKey(&'static str),
}

/// A switch; empty is off, and a slip of the pen is neither on nor off.
fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" | "" => Ok(false),
        _ => Err("it is neither true nor false".to_owned()),
    }
}

fn set(value: Option<&str>) -> Option<&str> {
    value.map(str::trim).filter(|text| !text.is_empty())
}

fn revealed(secret: Option<&Secret>) -> Option<&str> {
    set(secret.map(Secret::reveal))
}

impl Settings {
    /// Checks all that can be checked before anything starts.
    pub fn check(&self, mode: Mode) -> Result<(), ConfigError> {
        if mode == Mode::Serve {
            self.database_url()?;
        }
        self.grpc_protection(mode)?;
        self.verifier(mode)?;
        self.caller_key()?;
        self.users()?;
        self.qstash(mode)?;
        self.nats()?;
        match self.role {
            Role::All => Ok(()),
            Role::Edge | Role::Worker if mode == Mode::Dev => {
                Err(ConfigError::Invalid("ROLE", "dev runs everything in one process"))
            }
            Role::Edge | Role::Worker if self.queue != Queue::Nats => {
                let why =
                    "only QUEUE=nats brings events from an edge to a worker; otherwise every server is both, ROLE=all";
                Err(ConfigError::Invalid("ROLE", why))
            }
            Role::Edge | Role::Worker => Ok(()),
        }
    }

    /// Whose JWTs are taken.
    pub fn users(&self) -> Result<UserTokens, ConfigError> {
        let secret = self.supabase_jwt_secret.clone().filter(|secret| !secret.reveal().is_empty());
        if secret.as_ref().is_some_and(|secret| secret.reveal().len() < SHORTEST_JWT_SECRET) {
            let why = "it has fewer than 32 bytes, so somebody could find it by trying and sign in as anybody";
            return Err(ConfigError::Invalid("SUPABASE_JWT_SECRET", why));
        }
        let jwks = set(self.supabase_jwks_url.as_deref()).map(jwks_url).transpose()?.map(JwksConfig::new);
        let issuer = set(self.supabase_jwt_issuer.as_deref()).map(str::to_owned);
        Ok(UserTokens { secret, jwks, issuer })
    }

    /// What protects the gRPC listener. `dev` is for one machine, so nothing has to and nothing does.
    pub fn grpc_protection(&self, mode: Mode) -> Result<Protection, ConfigError> {
        if mode == Mode::Dev {
            return Ok(Protection::Loopback);
        }
        let files = [&self.grpc_tls_cert, &self.grpc_tls_key, &self.grpc_tls_client_ca];
        let missing = |name, why| Err(ConfigError::Missing(name, why));
        match files.map(|file| set(file.as_deref())) {
            [Some(_), Some(_), _] if self.grpc_plaintext => {
                Err(ConfigError::Invalid("GRPC_PLAINTEXT", "GRPC_TLS_CERT is set, so gRPC is not served in plaintext"))
            }
            [Some(cert), Some(key), client_ca] => Ok(Protection::Tls(TlsFiles {
                cert: cert.into(),
                key: key.into(),
                client_ca: client_ca.map(Into::into),
            })),
            [Some(_), None, _] => missing("GRPC_TLS_KEY", "GRPC_TLS_CERT is, and its private key is needed"),
            [None, Some(_), _] => {
                missing("GRPC_TLS_CERT", "GRPC_TLS_KEY is, and the certificate it belongs to is needed")
            }
            [None, None, Some(_)] => {
                missing("GRPC_TLS_CERT", "GRPC_TLS_CLIENT_CA is, and clients show certificates over TLS only")
            }
            [None, None, None] if self.grpc_plaintext => Ok(Protection::Elsewhere),
            [None, None, None] => Ok(Protection::Loopback),
        }
    }

    pub fn database_url(&self) -> Result<&str, ConfigError> {
        let missing =
            ConfigError::Missing("DATABASE_URL", "the PostgreSQL database, postgres://user:password@host/name");
        revealed(self.database_url.as_ref()).ok_or(missing)
    }

    /// Where the change feed reads, if it is another address. `dev` has its own database.
    pub fn feed_database_url(&self, mode: Mode) -> Option<&str> {
        revealed(self.feed_database_url.as_ref()).filter(|_| mode == Mode::Serve)
    }

    /// What callers' numbers are hashed with; none if none is set.
    pub fn caller_key(&self) -> Result<Option<CallerKey>, ConfigError> {
        let key = revealed(self.caller_key.as_ref()).map(CallerKey::new).transpose();
        let why = "it has fewer than 32 characters; `openssl rand -hex 32` makes one";
        key.map_err(|_| ConfigError::Invalid("CALLER_KEY", why))
    }

    /// Checks the signatures of deliveries; one that refuses them all if there are no keys.
    pub fn verifier(&self, mode: Mode) -> Result<Verifier, ConfigError> {
        let keys = [
            ("QSTASH_CURRENT_SIGNING_KEY", revealed(self.qstash_current_signing_key.as_ref())),
            ("QSTASH_NEXT_SIGNING_KEY", revealed(self.qstash_next_signing_key.as_ref())),
        ];
        for (name, key) in keys {
            if mode == Mode::Serve && key.is_some_and(signature::is_development_key) {
                return Err(ConfigError::DevelopmentKey(name));
            }
        }
        let keys: Vec<&str> = keys.iter().filter_map(|(_, key)| *key).collect();
        if keys.is_empty() {
            return Ok(Verifier::without_keys());
        }
        Ok(Verifier::new(&keys, &self.worker_url()?))
    }

    /// What publishing needs; none if the queue is another one.
    pub fn qstash(&self, mode: Mode) -> Result<Option<QstashConfig>, ConfigError> {
        if self.queue != Queue::Qstash {
            return Ok(None);
        }
        let token = self.qstash_token.clone().filter(|token| set(Some(token.reveal())).is_some());
        let token = token.ok_or(ConfigError::Missing("QSTASH_TOKEN", "QUEUE is qstash, which publishes with it"))?;
        if !token.reveal().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ConfigError::Invalid("QSTASH_TOKEN", "it has characters that no token has"));
        }
        let destination = self.worker_url()?;
        self.verifier(mode)?;
        if revealed(self.qstash_current_signing_key.as_ref()).is_none() {
            let why = "QUEUE is qstash, and without the key its deliveries would all be refused";
            return Err(ConfigError::Missing("QSTASH_CURRENT_SIGNING_KEY", why));
        }
        let url = set(self.qstash_url.as_deref()).unwrap_or(QSTASH_PUBLIC);
        Ok(Some(QstashConfig { url: base_url("QSTASH_URL", url)?, token, destination }))
    }

    /// Where NATS is and how its stream is made; none if the queue is another one.
    pub fn nats(&self) -> Result<Option<NatsConfig>, ConfigError> {
        if self.queue != Queue::Nats {
            return Ok(None);
        }
        let why = "QUEUE is nats, which is found by it: nats://user:password@host:4222";
        let url = revealed(self.nats_url.as_ref()).ok_or(ConfigError::Missing("NATS_URL", why))?;
        let servers = Servers::parse(url).map_err(|why| ConfigError::Invalid("NATS_URL", why))?;
        let credentials = set(self.nats_credentials.as_deref()).map(Into::into);
        if credentials.is_some() && servers.have_login() {
            return Err(ConfigError::Invalid("NATS_CREDENTIALS", "NATS_URL has a login, and there can be one only"));
        }
        let stream = self.nats_stream.trim();
        if stream.is_empty() || !stream.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
            return Err(ConfigError::Invalid("NATS_STREAM", "a stream's name has letters, digits, - and _ only"));
        }
        let (replicas, max_bytes) = (usize::from(self.nats_replicas), self.nats_max_bytes);
        Ok(Some(NatsConfig { servers, credentials, stream: stream.to_owned(), replicas, max_bytes }))
    }

    /// Where QStash delivers to, and what it signs as the subject.
    fn worker_url(&self) -> Result<String, ConfigError> {
        let missing = ConfigError::Missing("PUBLIC_URL", "QStash delivers to it and signs for it, https://your.host");
        let url = set(self.public_url.as_deref()).ok_or(missing)?;
        Ok(format!("{}{WORKER_PATH}", base_url("PUBLIC_URL", url)?))
    }
}

/// Where keys are fetched from: whoever can answer in its place can sign in as anybody.
fn jwks_url(text: &str) -> Result<Url, ConfigError> {
    const NAME: &str = "SUPABASE_JWKS_URL";
    let url = Url::parse(text).map_err(|_| ConfigError::Invalid(NAME, "it is no URL; it begins with https://"))?;
    let here = match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    if url.scheme() != "https" && !(url.scheme() == "http" && here) {
        return Err(ConfigError::Invalid(NAME, "it is neither https nor an http address of this machine"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(ConfigError::Invalid(NAME, "it has a user name or password"));
    }
    Ok(url)
}

/// An http(s) address without the slash at its end.
fn base_url(name: &'static str, text: &str) -> Result<String, ConfigError> {
    let url = Url::parse(text).map_err(|_| ConfigError::Invalid(name, "it is no URL; it begins with https://"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(ConfigError::Invalid(name, "its scheme is neither http nor https"));
    }
    if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some() {
        return Err(ConfigError::Invalid(name, "it has more than scheme, host, port and path"));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests;
