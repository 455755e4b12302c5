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

    /// Who owns an event between the edge and the tables: `inline` answers once it is committed, `qstash` once QStash has it
    #[arg(long, env = "QUEUE", value_name = "QUEUE", default_value = "inline")]
    pub queue: Queue,

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
        self.qstash(mode).map(drop)
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
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn settings(flags: &[&str]) -> Settings {
        Line::try_parse_from(["x"].iter().chain(flags)).expect("flags of a test").settings
    }

    const QSTASH: [&str; 4] =
        ["--queue=qstash", "--public-url=https://c.example/", "--qstash-token=t0p", "--qstash-current-signing-key=k3y"];

    #[test]
    fn what_is_missing_is_named() {
        let error = |flags: &[&str], mode| settings(flags).check(mode).err().map(|error| error.to_string());
        assert_eq!(error(&[], Mode::Dev), None);
        assert!(error(&["--database-url="], Mode::Serve).is_some_and(|e| e.starts_with("DATABASE_URL is not set")));
        assert_eq!(error(&QSTASH, Mode::Dev), None);
        for (left_out, name) in [(1, "PUBLIC_URL"), (2, "QSTASH_TOKEN"), (3, "QSTASH_CURRENT_SIGNING_KEY")] {
            let flags: Vec<&str> = (0..4).filter(|i| *i != left_out).map(|i| QSTASH[i]).collect();
            assert!(error(&flags, Mode::Dev).is_some_and(|e| e.starts_with(&format!("{name} is not set"))), "{name}");
        }
        let wrong = error(&["--qstash-current-signing-key=k", "--public-url=c.example"], Mode::Dev);
        assert!(wrong.is_some_and(|e| e.starts_with("PUBLIC_URL is wrong")));
        let wrong = error(&[QSTASH[0], QSTASH[1], QSTASH[3], "--qstash-token=t\u{fc}"], Mode::Dev);
        assert!(wrong.is_some_and(|e| e.starts_with("QSTASH_TOKEN is wrong") && !e.contains('\u{fc}')));
    }

    #[test]
    fn grpc_has_tls_plaintext_by_order_or_loopback_alone() {
        let protection = |flags: &[&str]| settings(flags).grpc_protection(Mode::Serve);
        let (cert, key, ca) = ("--grpc-tls-cert=/c", "--grpc-tls-key=/k", "--grpc-tls-client-ca=/a");
        assert_eq!(protection(&["--grpc-tls-cert=", "--grpc-plaintext="]), Ok(Protection::Loopback));
        assert_eq!(protection(&["--grpc-plaintext"]), Ok(Protection::Elsewhere));
        assert_eq!(protection(&["--grpc-plaintext=false"]), Ok(Protection::Loopback));
        for (flags, client_ca) in [(vec![cert, key], None), (vec![cert, key, ca], Some("/a".into()))] {
            let files = TlsFiles { cert: "/c".into(), key: "/k".into(), client_ca };
            assert_eq!(protection(&flags), Ok(Protection::Tls(files)));
            assert_eq!(settings(&flags).grpc_protection(Mode::Dev), Ok(Protection::Loopback));
        }
        for (flags, complaint) in [
            (vec![cert], "GRPC_TLS_KEY is not set"),
            (vec![key, ca], "GRPC_TLS_CERT is not set"),
            (vec![ca], "GRPC_TLS_CERT is not set"),
            (vec![cert, key, "--grpc-plaintext"], "GRPC_PLAINTEXT is wrong"),
        ] {
            let error = protection(&flags).expect_err("they do not go together").to_string();
            assert!(error.starts_with(complaint), "{flags:?}: {error}");
        }
        let typed = Line::try_parse_from(["x", "--grpc-plaintext=ture"]).expect_err("a slip").to_string();
        assert!(typed.contains("GRPC_PLAINTEXT") || typed.contains("--grpc-plaintext"), "{typed}");
    }

    #[test]
    fn the_keys_everybody_knows_are_for_developers() {
        for flag in ["current", "next"] {
            let key = format!("--qstash-{flag}-signing-key=sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r");
            let settings = settings(&["--database-url=x", "--public-url=https://c.example", &key]);
            assert!(matches!(settings.check(Mode::Serve), Err(ConfigError::DevelopmentKey(_))), "{flag}");
            assert_eq!(settings.check(Mode::Dev), Ok(()));
        }
    }

    #[test]
    fn people_are_let_in_only_by_a_long_secret_or_keys_that_nobody_can_swap() {
        let long = format!("--supabase-jwt-secret={}", "s".repeat(32));
        let users = |flag: &str| settings(&[flag]).users();
        assert!(users("--supabase-jwt-secret=").is_ok_and(|users| users.secret.is_none() && users.jwks.is_none()));
        assert!(users(&long).is_ok_and(|users| users.secret.is_some()));
        let short = settings(&[&long[..long.len() - 1]]).check(Mode::Dev).map_err(|error| error.to_string());
        assert!(short.is_err_and(|error| error.starts_with("SUPABASE_JWT_SECRET is wrong") && !error.contains("ss")));
        for good in
            ["https://x.supabase.co/auth/v1/jwks?a=1", "http://127.0.0.1:1/k", "http://[::1]/k", "http://localhost/"]
        {
            assert!(users(&format!("--supabase-jwks-url={good}")).is_ok_and(|users| users.jwks.is_some()), "{good}");
        }
        for bad in
            ["http://x.supabase.co/k", "http://127.0.0.1.x.example/", "ftp://localhost/", "x", "https://u:p@x.example/"]
        {
            let refused = users(&format!("--supabase-jwks-url={bad}")).map(drop).map_err(|error| error.to_string());
            assert!(refused.is_err_and(|error| error.starts_with("SUPABASE_JWKS_URL is wrong")), "{bad}");
        }
    }

    #[test]
    fn the_destination_has_one_slash_whatever_public_url_ends_with() {
        for public in ["https://c.example", "https://c.example/", "https://c.example//"] {
            let settings = settings(&[QSTASH[0], QSTASH[2], QSTASH[3], "--public-url", public]);
            let config = settings.qstash(Mode::Dev).ok().flatten();
            assert_eq!(config.map(|c| c.destination), Some("https://c.example/api/sync/worker".to_owned()));
        }
    }

    #[test]
    fn secrets_are_not_shown_and_proxies_are_networks() {
        let shown = format!("{:?}", settings(&QSTASH));
        assert!(!shown.contains("t0p") && !shown.contains("k3y"), "{shown}");
        let proxies = settings(&["--trusted-proxies=10.0.0.0/8, ::1"]).trusted_proxies.0;
        assert_eq!(proxies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "::1/128"]);
        let wrong = Line::try_parse_from(["x", "--trusted-proxies=all"]).expect_err("not a network").to_string();
        assert!(wrong.contains("TRUSTED_PROXIES") && wrong.contains("`all`"), "{wrong}");
    }
}
