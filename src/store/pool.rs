//! Connections: TLS by `sslmode`, a bound on their number, and none returned in the middle of a transaction.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_postgres::config::SslMode;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::direct::{self, Word};
use super::error::{BEGIN, StoreError};
use super::ready::{Habits, Ready};
use super::rows::{self, RowType};

/// A statement that nobody waits for any more is cancelled within this time, or left to its own bound.
const CANCEL_LIMIT: Duration = Duration::from_secs(3);

/// A connection and whether a transaction is open on it.
pub struct Connection {
    client: Client,
    in_transaction: AtomicBool,
    tls: Option<MakeRustlsConnect>,
    /// None behind a pooler.
    ready: Option<Ready>,
    /// Arrays of rows, by the names of their types; see [`Connection::learn_rows`].
    arrays: OnceLock<HashMap<&'static str, Type>>,
}

impl Connection {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// What the server keeps ready on it; none behind a pooler.
    pub(super) fn ready(&self) -> Option<&Ready> {
        self.ready.as_ref()
    }

    /// Has the session keep what serving takes, and prepares what is used often and not ready here. Between transactions only.
    pub(super) async fn make_ready(&self, opening: &str) -> Result<(), StoreError> {
        let Some(ready) = self.ready().filter(|ready| ready.lacks()) else { return Ok(()) };
        self.set_in_transaction(true);
        ready.fill(&self.client, opening).await.map_err(|error| StoreError::of(BEGIN, error))?;
        self.set_in_transaction(false);
        Ok(())
    }

    /// Asks what numbers the types of rows have in this database, once. Between transactions only.
    pub(super) async fn learn_rows(&self) -> Result<(), StoreError> {
        if self.arrays.get().is_some() {
            return Ok(());
        }
        // Whoever gives up while it waits gives up the connection.
        self.set_in_transaction(true);
        let arrays = rows::arrays(&self.client).await.map_err(|error| StoreError::of(BEGIN, error))?;
        self.set_in_transaction(false);
        if let Some(arrays) = arrays {
            let _ = self.arrays.set(arrays);
        }
        Ok(())
    }

    /// The type of an array of such rows in this database.
    pub(super) fn array_of(&self, rows: &'static RowType) -> Type {
        let known = self.arrays.get().and_then(|arrays| arrays.get(rows.name));
        known.cloned().unwrap_or_else(|| rows.array(0, 0))
    }

    pub(super) fn set_in_transaction(&self, open: bool) {
        self.in_transaction.store(open, Ordering::Relaxed);
    }

    /// Has the server stop the statement that runs here, in the background. For a connection that is given up: on one that went on, the
    /// request could come late and meet another statement.
    pub(super) fn cancel_running(&self) {
        // Without a runtime the process is about to end, and its connections with it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (token, tls) = (self.client.cancel_token(), self.tls.clone());
        runtime.spawn(async move {
            let cancel = async {
                match tls {
                    None => token.cancel_query(NoTls).await,
                    Some(tls) => token.cancel_query(tls).await,
                }
            };
            match tokio::time::timeout(CANCEL_LIMIT, cancel).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "cannot cancel a statement that nobody waits for"),
                Err(_) => tracing::debug!("no answer to the cancelling of a statement that nobody waits for"),
            }
        });
    }
}

/// Opens connections for the pool.
#[derive(Clone)]
pub struct Manager {
    config: Config,
    /// Rung whenever a connection cannot be opened, so that nobody waits for one that will not come.
    refused: Arc<tokio::sync::Notify>,
    tls: Option<MakeRustlsConnect>,
    /// Whether there is a pooler before the database, as far as we know.
    pooled: Arc<AtomicBool>,
    habits: Arc<Habits>,
}

/// The connection string cannot be used. It never repeats the string: there is a password in it.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    #[error("{0} is not a PostgreSQL connection string: {1}")]
    Syntax(&'static str, tokio_postgres::Error),
    #[error("{0}: {1}")]
    Tls(&'static str, String),
}

impl Manager {
    /// `sslmode` is one of `disable`, `prefer` (as libpq: the server decides, the certificate is not asked for), `require` (as `prefer`, but
    /// never in the clear), `verify-ca` and `verify-full` (both verify chain and name), with the system's or `SSL_CERT_FILE`'s roots.
    pub fn new(url: &str) -> Result<Self, UrlError> {
        Self::named("DATABASE_URL", url)
    }

    /// The same for another setting than `DATABASE_URL`, which a complaint names.
    pub fn named(setting: &'static str, url: &str) -> Result<Self, UrlError> {
        let (url, verify) = take_verify(url);
        let mut config = Config::from_str(&url).map_err(|error| UrlError::Syntax(setting, error))?;
        config.application_name(config.get_application_name().map_or_else(|| "opsmantik".to_owned(), str::to_owned));
        config.connect_timeout(Duration::from_secs(3));
        config.keepalives_idle(Duration::from_secs(30));
        config.tcp_user_timeout(Duration::from_secs(10));
        let tls = match config.get_ssl_mode() {
            SslMode::Disable => None,
            _ => Some(MakeRustlsConnect::new(client_tls(verify).map_err(|why| UrlError::Tls(setting, why))?)),
        };
        Ok(Self { config, refused: Arc::default(), tls, pooled: Arc::default(), habits: Arc::default() })
    }

    /// Where and as whom to connect. There is a password in it.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// What `sslmode` asks for; none in the clear.
    pub(crate) fn tls(&self) -> Option<&MakeRustlsConnect> {
        self.tls.as_ref()
    }

    /// Resolves when the next attempt to open a connection fails.
    pub(super) fn refusal(&self) -> tokio::sync::futures::Notified<'_> {
        self.refused.notified()
    }

    /// A connection outside the pool, for migrations.
    pub(super) async fn open(&self) -> Result<Client, tokio_postgres::Error> {
        self.open_by(&self.config).await
    }

    async fn open_by(&self, config: &Config) -> Result<Client, tokio_postgres::Error> {
        match &self.tls {
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                tokio::spawn(async move { log_end(connection.await) });
                Ok(client)
            }
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await?;
                tokio::spawn(async move { log_end(connection.await) });
                Ok(client)
            }
        }
    }

    /// A connection of the pool, with what can be kept ready on it.
    async fn open_ready(&self) -> Result<(Client, Option<Ready>), tokio_postgres::Error> {
        if self.pooled.load(Ordering::Relaxed) {
            return Ok((self.open().await?, None));
        }
        let word = Word::new();
        let mut config = self.config.clone();
        let options = config.get_options().into_iter().map(str::to_owned).chain([word.option()]);
        config.options(options.collect::<Vec<_>>().join(" "));
        let client = match self.open_by(&config).await {
            Ok(client) if word.comes_back(&client).await? => {
                return Ok((client, Some(Ready::new(self.habits.clone()))));
            }
            Ok(client) => client,
            Err(error) if direct::is_refusal(&error) => self.open().await?,
            Err(error) => return Err(error),
        };
        if !self.pooled.swap(true, Ordering::Relaxed) {
            tracing::info!("there is a pooler before the database: statements are not kept ready");
        }
        Ok((client, None))
    }
}

fn log_end(ended: Result<(), tokio_postgres::Error>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a database connection ended");
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Connection;
    type Error = tokio_postgres::Error;

    async fn connect(&self) -> Result<Connection, tokio_postgres::Error> {
        let opened = self.open_ready().await;
        if opened.is_err() {
            self.refused.notify_waiters();
        }
        let (client, ready) = opened?;
        let (in_transaction, tls) = (AtomicBool::new(false), self.tls.clone());
        Ok(Connection { client, in_transaction, tls, ready, arrays: OnceLock::new() })
    }

    async fn is_valid(&self, connection: &mut Connection) -> Result<(), tokio_postgres::Error> {
        connection.client.check_connection().await
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        connection.client.is_closed() || connection.in_transaction.load(Ordering::Relaxed)
    }
}

/// A pool of at most `size` connections. Opens none yet: a server starts before its database does.
pub(super) async fn pool(manager: Manager, size: u32) -> Result<bb8::Pool<Manager>, StoreError> {
    bb8::Pool::builder()
        .max_size(size)
        .min_idle(None)
        .connection_timeout(Duration::from_secs(3))
        // What was used last is used next: a few warm connections, whose statements are ready, and whose plans are in the caches.
        .queue_strategy(bb8::QueueStrategy::Lifo)
        .test_on_check_out(false)
        .retry_connection(false)
        .build(manager)
        .await
        .map_err(|error| StoreError::of(super::error::CONNECT, error))
}

/// tokio-postgres knows `disable`, `prefer` and `require`; the stricter two are `require` with verification.
fn take_verify(url: &str) -> (String, bool) {
    for strict in ["sslmode=verify-full", "sslmode=verify-ca"] {
        if url.contains(strict) {
            return (url.replace(strict, "sslmode=require"), true);
        }
    }
    (url.to_owned(), false)
}

fn client_tls(verify: bool) -> Result<rustls::ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    if verify {
        let mut roots = rustls::RootCertStore::empty();
        let (added, _ignored) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if added == 0 {
            return Err("sslmode asks for verification, but no root certificate was found".to_owned());
        }
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    } else {
        let verifier = Arc::new(unverified::Unverified(provider));
        Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
    }
}

/// `sslmode=prefer|require` encrypt without asking who answers, as libpq does.
mod unverified {
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub(super) struct Unverified(pub Arc<CryptoProvider>);

    impl ServerCertVerifier for Unverified {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}
