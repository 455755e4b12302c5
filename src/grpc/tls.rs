//! The certificates of the gRPC listener, and how they change while it serves.
//!
//! Two PEM files make the server's identity; a third, if given, the authorities whose clients alone may connect. They are read again when
//! one of them changes (looked at every two seconds, through symbolic links, as Kubernetes and certbot swap them) and when the operator
//! asks. What cannot be used, half-written files and certificates out of their time among them, is said in the log by name and the old
//! certificates stay; at the start one out of its time is served with a warning, for then there is no better. New connections get the
//! new ones; those that are open live on. Errors name variable and file and never show a byte of them. Nothing but a regular file is
//! read, so nothing blocks.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rustls::pki_types::pem::{self, PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use x509_cert::der::Decode;

use crate::telemetry;

/// How often the files are looked at.
const EVERY: Duration = Duration::from_secs(2);
/// Files that could not be used are tried again after this time even if they look the same: what was in the way may be gone.
const AGAIN: Duration = Duration::from_secs(60);
/// No certificate file is larger.
const MAX_FILE: u64 = 1 << 20;

const CERT: &str = "GRPC_TLS_CERT";
const KEY: &str = "GRPC_TLS_KEY";
const CLIENT_CA: &str = "GRPC_TLS_CLIENT_CA";

/// Where the PEM files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate and those that link it to its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of clients' certificates; none are asked for without.
    pub client_ca: Option<PathBuf>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {}: {fault}", path.display())]
pub struct TlsError {
    pub variable: &'static str,
    pub path: PathBuf,
    pub fault: TlsFault,
}

/// What is wrong with a file. No content of it: one of them is a private key.
#[derive(Debug, thiserror::Error)]
pub enum TlsFault {
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    #[error("is no regular file")]
    NoFile,
    #[error("is larger than any certificate")]
    TooLarge,
    #[error("is no whole PEM file")]
    Malformed,
    #[error("has no {0} in PEM form")]
    Missing(&'static str),
    #[error("holds something that is no certificate")]
    NoCertificate,
    #[error("holds a certificate that has run out on {0}")]
    RunOut(DateTime<Utc>),
    #[error("holds a certificate that is not yet valid before {0}")]
    NotYet(DateTime<Utc>),
    #[error("the key does not belong to the certificate of GRPC_TLS_CERT")]
    Mismatch,
    #[error("cannot be used: {0}")]
    Unusable(rustls::Error),
    #[error("holds no authority that can be used")]
    NoAuthority,
}

/// What one reading of the files came to.
struct Loaded {
    config: Arc<ServerConfig>,
    valid: Validity,
}

/// When the server's own certificate is good.
#[derive(Clone, Copy)]
struct Validity {
    not_before: DateTime<Utc>,
    not_after: DateTime<Utc>,
}

impl Validity {
    /// What is wrong with it now.
    fn fault(self) -> Option<TlsFault> {
        let now = Utc::now();
        if self.not_after < now {
            Some(TlsFault::RunOut(self.not_after))
        } else if now < self.not_before {
            Some(TlsFault::NotYet(self.not_before))
        } else {
            None
        }
    }
}

/// The certificates in use; clones share them.
#[derive(Clone)]
pub struct Certificates {
    inner: Arc<Inner>,
}

struct Inner {
    files: TlsFiles,
    current: RwLock<Arc<ServerConfig>>,
    read_again: Notify,
    /// What the files looked like before they were first read.
    first: Look,
}

impl Certificates {
    /// Reads the files, all of which must be usable.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let first = Look::at(&files);
        let loaded = read(&files)?;
        tell(&loaded, "serving gRPC with this certificate");
        let inner = Inner { files, current: RwLock::new(loaded.config), read_again: Notify::new(), first };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Has the files read again now, whether or not they changed.
    pub fn read_again(&self) {
        self.inner.read_again.notify_one();
    }

    /// What the next connection is served with.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.inner.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the files until `stop`.
    pub(super) async fn follow(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut used, mut seen) = (self.inner.first.clone(), self.inner.first.clone());
        let mut failed_at: Option<Instant> = None;
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return,
                () = self.inner.read_again.notified() => true,
                _ = ticks.tick() => false,
            };
            let Some(look) = self.blocking(Look::at).await else { continue };
            // Files are written one after the other: they are read when they have been still for a while.
            let still = look == seen;
            seen = look.clone();
            let changed = still && look != used;
            let again = failed_at.is_some_and(|at| at.elapsed() >= AGAIN);
            if !(asked || changed || again) {
                continue;
            }
            used = look;
            let loaded = match self.blocking(replacement).await {
                Some(Ok(loaded)) => loaded,
                Some(Err(error)) => {
                    failed_at = Some(Instant::now());
                    tracing::error!(%error, "the certificates were not replaced: the old ones stay in use");
                    metrics::counter!(telemetry::GRPC_CERTIFICATE_RELOADS_TOTAL, "outcome" => "failed").increment(1);
                    continue;
                }
                None => continue,
            };
            failed_at = None;
            tell(&loaded, "the certificates were read again; new connections get them");
            metrics::counter!(telemetry::GRPC_CERTIFICATE_RELOADS_TOTAL, "outcome" => "loaded").increment(1);
            *self.inner.current.write().unwrap_or_else(PoisonError::into_inner) = loaded.config;
        }
    }

    /// Works on the files where it may block; none only if that broke.
    async fn blocking<T: Send + 'static>(&self, work: fn(&TlsFiles) -> T) -> Option<T> {
        let inner = self.inner.clone();
        let worked = tokio::task::spawn_blocking(move || work(&inner.files)).await;
        worked.inspect_err(|error| tracing::error!(%error, "looking at the certificates broke")).ok()
    }
}

fn tell(loaded: &Loaded, what: &str) {
    let not_after = loaded.valid.not_after;
    match loaded.valid.fault() {
        None => tracing::info!(certificate.not_after = %not_after, "{what}"),
        Some(TlsFault::NotYet(_)) => tracing::warn!(certificate.not_after = %not_after, "{what}; it is not yet valid"),
        Some(_) => tracing::warn!(certificate.not_after = %not_after, "{what}; it has run out"),
    }
    // Exact until the year 285 million.
    #[allow(clippy::cast_precision_loss)]
    metrics::gauge!(telemetry::GRPC_CERTIFICATE_NOT_AFTER).set(not_after.timestamp() as f64);
}

/// What tells one state of the files from the next without reading them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Look(Vec<Option<[i128; 5]>>);

impl Look {
    fn at(files: &TlsFiles) -> Self {
        let look = |path: &PathBuf| {
            let about = fs::metadata(path).ok()?;
            // The time of the last change cannot be set back, as that of the last writing is by `cp -p`.
            let nanoseconds = |seconds: i64, part: i64| i128::from(seconds) * 1_000_000_000 + i128::from(part);
            Some([
                about.dev().into(),
                about.ino().into(),
                about.len().into(),
                nanoseconds(about.mtime(), about.mtime_nsec()),
                nanoseconds(about.ctime(), about.ctime_nsec()),
            ])
        };
        Self([&files.cert, &files.key].into_iter().chain(&files.client_ca).map(look).collect())
    }
}

/// As [`read`], to take the place of certificates in use: one that every client refuses would be worse than any of those.
fn replacement(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let loaded = read(files)?;
    match loaded.valid.fault() {
        None => Ok(loaded),
        Some(fault) => Err(TlsError { variable: CERT, path: files.cert.clone(), fault }),
    }
}

fn read(files: &TlsFiles) -> Result<Loaded, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let wrong = |variable: &'static str, path: &Path| {
        let path = path.to_owned();
        move |fault: TlsFault| TlsError { variable, path, fault }
    };
    let chain = certificates(&files.cert).map_err(wrong(CERT, &files.cert))?;
    let valid = validity(&chain).map_err(wrong(CERT, &files.cert))?;
    let key = private_key(&files.key).map_err(wrong(KEY, &files.key))?;

    let builder = ServerConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| wrong(CERT, &files.cert)(TlsFault::Unusable(error)))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = authorities(path).map_err(wrong(CLIENT_CA, path))?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            let verifier = verifier.map_err(|_| wrong(CLIENT_CA, path)(TlsFault::NoAuthority))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => wrong(KEY, &files.key)(TlsFault::Mismatch),
        rustls::Error::InvalidCertificate(_) => wrong(CERT, &files.cert)(TlsFault::NoCertificate),
        other => wrong(KEY, &files.key)(TlsFault::Unusable(other)),
    })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Loaded { config: Arc::new(config), valid })
}

fn content(path: &Path) -> Result<Vec<u8>, TlsFault> {
    // Looked at before it is opened, for opening a device may do something, and after, for it may be another by then. Opening a pipe
    // would wait for its writer otherwise.
    if !fs::metadata(path)?.is_file() {
        return Err(TlsFault::NoFile);
    }
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(TlsFault::NoFile);
    }
    let mut content = Vec::new();
    let length = file.take(MAX_FILE + 1).read_to_end(&mut content)?;
    if u64::try_from(length).is_ok_and(|length| length <= MAX_FILE) { Ok(content) } else { Err(TlsFault::TooLarge) }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    let content = content(path)?;
    // Every section, so that one that breaks off is noticed whatever it was to be.
    let sections = <(SectionKind, Vec<u8>) as PemObject>::pem_slice_iter(&content);
    let sections = sections.collect::<Result<Vec<_>, pem::Error>>().map_err(|_| TlsFault::Malformed)?;
    let certificates = sections.into_iter().filter(|(kind, _)| *kind == SectionKind::Certificate);
    let certificates: Vec<_> = certificates.map(|(_, der)| CertificateDer::from(der)).collect();
    // A client refuses a chain for any one of them, and whoever serves it does not look.
    if certificates.iter().any(|der| x509_cert::Certificate::from_der(der).is_err()) {
        return Err(TlsFault::NoCertificate);
    }
    if certificates.is_empty() { Err(TlsFault::Missing("certificate")) } else { Ok(certificates) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFault> {
    PrivateKeyDer::from_pem_slice(&content(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsFault::Missing("private key"),
        _ => TlsFault::Malformed,
    })
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsFault> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|_| TlsFault::NoCertificate)?;
    }
    Ok(roots)
}

/// Of the server's own certificate, the first of its file.
fn validity(chain: &[CertificateDer<'static>]) -> Result<Validity, TlsFault> {
    let first = chain.first().ok_or(TlsFault::Missing("certificate"))?;
    let certificate = x509_cert::Certificate::from_der(first).map_err(|_| TlsFault::NoCertificate)?;
    let valid = certificate.tbs_certificate.validity;
    let time = |time: x509_cert::time::Time| time.to_system_time().into();
    Ok(Validity { not_before: time(valid.not_before), not_after: time(valid.not_after) })
}
