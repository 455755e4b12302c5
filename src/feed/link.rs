//! A connection on which PostgreSQL sends its log.
//!
//! The pool's driver does not speak the replication protocol, and the crates that do block a thread, bring their own trust anchors, and
//! cannot name themselves to the server. So this speaks the few messages that are needed, by the driver's own codec, with the pool's
//! settings and TLS. All of it can be dropped at any time, which closes the connection; PostgreSQL then drops its temporary slot.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, ScramSha256};
use postgres_protocol::message::frontend;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::Config;
use tokio_postgres::config::{ChannelBinding, Host, SslMode};
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::store::pool::Manager;

/// How this program shows itself in `pg_stat_replication`.
const NAME: &str = "opsmantik feed";
/// A host that does not answer within this time is passed over.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Read at once.
const CHUNK: usize = 64 << 10;
/// Longer messages PostgreSQL does not make.
const LONGEST_FRAME: usize = (1 << 30) + (1 << 20);

/// Why the connection is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("{code} {message}")]
    Refused { code: String, message: String },
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(&'static str),
}

impl LinkError {
    /// PostgreSQL's SQLSTATE; empty if it is not PostgreSQL that complains.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } => code,
            _ => "",
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

pub(super) struct Link {
    stream: Box<dyn Stream>,
    read: BytesMut,
    write: BytesMut,
}

/// A message: its tag and its body.
type Frame = (u8, Bytes);
/// Rows of text.
pub(super) type Rows = Vec<Vec<Option<String>>>;

impl Link {
    /// Connects to the first host that answers, and is no standby if there are several.
    pub async fn connect(to: &Manager) -> Result<Self, LinkError> {
        let config = to.config();
        let count = config.get_hosts().len().max(config.get_hostaddrs().len());
        let mut last = LinkError::Protocol("no host is given");
        for at in 0..count {
            let opened = async {
                let mut link = Self::open(config, to.tls(), at).await?;
                if count > 1 && link.query("SELECT pg_is_in_recovery()").await? == [[Some("t".to_owned())]] {
                    return Err(LinkError::Protocol("the host is a standby"));
                }
                Ok(link)
            };
            match tokio::time::timeout(CONNECT_LIMIT, opened).await {
                Ok(Ok(link)) => return Ok(link),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::Error::from(io::ErrorKind::TimedOut).into(),
            }
        }
        Err(last)
    }

    async fn open(config: &Config, tls: Option<&MakeRustlsConnect>, at: usize) -> Result<Self, LinkError> {
        let ports = config.get_ports();
        let port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
        let stream: Box<dyn Stream> = match (config.get_hosts().get(at), config.get_hostaddrs().get(at)) {
            (Some(Host::Unix(folder)), _) => {
                Box::new(tokio::net::UnixStream::connect(folder.join(format!(".s.PGSQL.{port}"))).await?)
            }
            (host, address) => {
                let name = match (host, address) {
                    (Some(Host::Tcp(name)), _) => name.clone(),
                    (_, Some(address)) => address.to_string(),
                    _ => return Err(LinkError::Protocol("no host is given")),
                };
                let socket = match address {
                    Some(address) => TcpStream::connect((*address, port)).await?,
                    None => TcpStream::connect((name.as_str(), port)).await?,
                };
                keep_alive(&socket, config)?;
                encrypt(socket, config.get_ssl_mode(), tls, &name).await?
            }
        };
        let mut link = Self { stream, read: BytesMut::with_capacity(CHUNK), write: BytesMut::new() };
        link.log_in(config).await?;
        Ok(link)
    }

    async fn log_in(&mut self, config: &Config) -> Result<(), LinkError> {
        if config.get_channel_binding() == ChannelBinding::Require {
            return Err(LinkError::Protocol("channel_binding=require is not supported for the feed"));
        }
        let user = config.get_user().ok_or(LinkError::Protocol("no user is given"))?;
        let mut parameters = vec![
            ("user", user),
            ("database", config.get_dbname().unwrap_or(user)),
            ("replication", "database"),
            ("application_name", NAME),
            ("client_encoding", "UTF8"),
        ];
        parameters.extend(config.get_options().map(|options| ("options", options)));
        frontend::startup_message(parameters, &mut self.write)?;
        self.flush().await?;
        let password = || config.get_password().ok_or(LinkError::Protocol("a password is asked for and none is given"));
        let mut scram: Option<ScramSha256> = None;
        loop {
            let (tag, mut body) = self.frame().await?;
            match tag {
                b'E' => return Err(refused(&body)),
                b'Z' => return Ok(()),
                b'R' if body.len() < 4 => return Err(LinkError::Protocol("a broken request for a password")),
                b'R' => match (body.get_i32(), &mut scram) {
                    (0, _) => {}
                    (3, _) => frontend::password_message(password()?, &mut self.write)?,
                    (5, _) => {
                        let salt: [u8; 4] =
                            body[..].try_into().map_err(|_| LinkError::Protocol("a broken request for a password"))?;
                        let hash = md5_hash(user.as_bytes(), password()?, salt);
                        frontend::password_message(hash.as_bytes(), &mut self.write)?;
                    }
                    (10, _) => {
                        let client = ScramSha256::new(password()?, sasl::ChannelBinding::unsupported());
                        frontend::sasl_initial_response(sasl::SCRAM_SHA_256, client.message(), &mut self.write)?;
                        scram = Some(client);
                    }
                    (11, Some(client)) => {
                        client.update(&body)?;
                        frontend::sasl_response(client.message(), &mut self.write)?;
                    }
                    (12, Some(client)) => client.finish(&body)?,
                    _ => return Err(LinkError::Protocol("the database asks for a login that is not supported")),
                },
                // Parameters, the key for cancelling, notices.
                _ => {}
            }
            self.flush().await?;
        }
    }

    /// Runs a command and returns its rows.
    pub async fn query(&mut self, sql: &str) -> Result<Rows, LinkError> {
        frontend::query(sql, &mut self.write)?;
        self.flush().await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            let (tag, body) = self.frame().await?;
            match tag {
                b'D' => rows.push(row(body).ok_or(LinkError::Protocol("a broken row"))?),
                b'E' => failed = Some(refused(&body)),
                b'Z' => return failed.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Has the log sent from now on.
    pub async fn start_replication(&mut self, sql: &str) -> Result<(), LinkError> {
        frontend::query(sql, &mut self.write)?;
        self.flush().await?;
        loop {
            match self.frame().await? {
                (b'W', _) => return Ok(()),
                (b'E', body) => return Err(refused(&body)),
                (b'Z', _) => return Err(LinkError::Protocol("the log is not sent")),
                _ => {}
            }
        }
    }

    /// The next message of the log. Can be dropped and asked again.
    pub async fn next(&mut self) -> Result<Bytes, LinkError> {
        loop {
            match self.frame().await? {
                (b'd', body) => return Ok(body),
                (b'E', body) => return Err(refused(&body)),
                (b'c', _) => return Err(LinkError::Protocol("the database ends the log")),
                _ => {}
            }
        }
    }

    /// Confirms everything before a place, and asks how far the log is.
    pub async fn confirm(&mut self, lsn: u64) -> Result<(), LinkError> {
        let mut status = Vec::with_capacity(34);
        status.push(b'r');
        for place in [lsn, lsn, lsn] {
            status.extend_from_slice(&place.to_be_bytes());
        }
        // The time is for statistics alone.
        status.extend_from_slice(&0i64.to_be_bytes());
        status.push(1);
        frontend::CopyData::new(&status[..])?.write(&mut self.write);
        self.flush().await
    }

    /// Says farewell, so that the server need not find out.
    pub async fn close(mut self) {
        frontend::copy_done(&mut self.write);
        frontend::terminate(&mut self.write);
        // Whoever is gone need not be told.
        drop(self.flush().await);
        drop(self.stream.shutdown().await);
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        while self.write.has_remaining() {
            self.stream.write_buf(&mut self.write).await?;
        }
        Ok(self.stream.flush().await?)
    }

    /// Can be dropped: what was read stays.
    async fn frame(&mut self) -> Result<Frame, LinkError> {
        loop {
            if let Some(&[tag, a, b, c, d]) = self.read.first_chunk::<5>() {
                let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                if !(4..LONGEST_FRAME).contains(&length) {
                    return Err(LinkError::Protocol("a message of an impossible length"));
                }
                if self.read.len() > length {
                    let mut frame = self.read.split_to(length + 1);
                    frame.advance(5);
                    return Ok((tag, frame.freeze()));
                }
                self.read.reserve((length + 1 - self.read.len()).min(1 << 20));
            }
            self.read.reserve(CHUNK);
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }
}

fn keep_alive(socket: &TcpStream, config: &Config) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let options = SockRef::from(socket);
    if config.get_keepalives() {
        let mut keepalive = TcpKeepalive::new().with_time(config.get_keepalives_idle());
        if let Some(interval) = config.get_keepalives_interval() {
            keepalive = keepalive.with_interval(interval);
        }
        options.set_tcp_keepalive(&keepalive)?;
    }
    #[cfg(target_os = "linux")]
    options.set_tcp_user_timeout(config.get_tcp_user_timeout().copied())?;
    Ok(())
}

/// As the pool does it.
async fn encrypt(
    mut socket: TcpStream,
    mode: SslMode,
    tls: Option<&MakeRustlsConnect>,
    host: &str,
) -> Result<Box<dyn Stream>, LinkError> {
    let Some(tls) = tls else { return Ok(Box::new(socket)) };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await?;
    match socket.read_u8().await? {
        b'S' => {}
        b'N' if mode == SslMode::Prefer => return Ok(Box::new(socket)),
        _ => return Err(LinkError::Protocol("the database does not offer TLS, which sslmode asks for")),
    }
    let connect = MakeTlsConnect::<TcpStream>::make_tls_connect(&mut tls.clone(), host);
    let Ok(connect) = connect;
    Ok(Box::new(connect.connect(socket).await?))
}

fn row(mut body: Bytes) -> Option<Vec<Option<String>>> {
    let count = body.try_get_u16().ok()?;
    let mut values = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().ok()?;
        let Ok(length) = usize::try_from(length) else {
            values.push(None);
            continue;
        };
        if body.len() < length {
            return None;
        }
        values.push(Some(String::from_utf8_lossy(&body.split_to(length)).into_owned()));
    }
    Some(values)
}

fn refused(body: &[u8]) -> LinkError {
    let (mut code, mut message) = (String::new(), String::new());
    for field in body.split(|b| *b == 0).filter(|field| !field.is_empty()) {
        let text = || String::from_utf8_lossy(&field[1..]).into_owned();
        match field[0] {
            b'C' => code = text(),
            b'M' => message = text(),
            _ => {}
        }
    }
    LinkError::Refused { code, message }
}
