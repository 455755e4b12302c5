//! TLS on the gRPC listener of the running program: who is let in, how certificates change under it, and what cannot hold it up.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;

use crate::support::database::{Database, database};
use crate::support::metrics::Metrics;
use crate::support::process::{Server, run};

mod certificates;
mod newcomers;

/// A changed file is in use by then: it is looked at every two seconds, and twice.
const NOTICED: Duration = Duration::from_secs(15);

/// An authority of the test's own.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, as PEM.
struct Pair {
    cert: String,
    key: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    fn signs(&self, usage: ExtendedKeyUsagePurpose) -> Pair {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        params.not_after = rcgen::date_time_ymd(2099, 12, 31);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.0).expect("a certificate");
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    fn server(&self) -> Pair {
        self.signs(ExtendedKeyUsagePurpose::ServerAuth)
    }

    fn client(&self) -> Identity {
        let pair = self.signs(ExtendedKeyUsagePurpose::ClientAuth);
        Identity::from_pem(pair.cert, pair.key)
    }

    /// What a client needs that trusts this authority and nobody else.
    fn trusted(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.0.pem()))
    }
}

/// A folder for certificates that is gone with its test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("opsmantik-tls-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).expect("a new folder");
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("a test's own path").to_owned()
    }

    fn write(&self, name: &str, content: &str) -> String {
        std::fs::write(self.0.join(name), content).expect("the folder is ours");
        self.path(name)
    }

    /// Points the link `name` at `folder`, in one step as Kubernetes does.
    fn point(&self, name: &str, folder: &str) {
        let new = self.0.join("new-link");
        std::os::unix::fs::symlink(Path::new(folder), &new).expect("the folder is ours");
        std::fs::rename(new, self.0.join(name)).expect("the folder is ours");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// `opsmantik serve` with this pair and authority of clients.
async fn serve(database: &Database, folder: &Folder, pair: &Pair, client_ca: Option<&Authority>) -> Server {
    let (cert, key) = (folder.write("tls.crt", &pair.cert), folder.write("tls.key", &pair.key));
    let client_ca = client_ca.map(|authority| folder.write("ca.crt", &authority.0.pem())).unwrap_or_default();
    let env = [("GRPC_TLS_CERT", &*cert), ("GRPC_TLS_KEY", &*key), ("GRPC_TLS_CLIENT_CA", &*client_ca)];
    Server::start_with(&database.url, &env).await
}

fn secure(server: &Server, tls: ClientTlsConfig) -> Endpoint {
    let endpoint = Endpoint::from_shared(format!("https://{}", server.grpc)).expect("an address is a URI");
    endpoint.tls_config(tls).expect("good certificates").timeout(Duration::from_secs(10))
}

fn plain(server: &Server) -> Endpoint {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    endpoint.timeout(Duration::from_secs(10))
}

async fn ask(channel: &Channel) -> Result<(), tonic::Status> {
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.map(drop)
}

/// A channel over which a call was answered: a client's certificate is judged after the client's part of the handshake is over.
async fn served(endpoint: Endpoint) -> Result<Channel, String> {
    let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
    ask(&channel).await.map_err(|status| format!("{status:?}"))?;
    Ok(channel)
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < NOTICED, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn over_tls_only_clients_that_speak_it_and_trust_the_certificate_are_served() {
    let (database, folder, ours, other) = (database().await, Folder::new(), Authority::new(), Authority::new());
    let mut server = serve(&database, &folder, &ours.server(), None).await;
    served(secure(&server, ours.trusted())).await.expect("the certificate is good");
    served(secure(&server, other.trusted())).await.expect_err("signed by somebody else");
    served(plain(&server)).await.expect_err("nothing is said in plaintext");
    let metrics = Metrics::of(&server).await;
    let ends = metrics.value("opsmantik_grpc_certificate_not_after_timestamp_seconds", &[]);
    assert_eq!(ends, Some(4_102_358_400.0), "2099-12-31");
    server.program.stop(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn with_an_authority_for_clients_only_those_it_signed_are_served() {
    let (database, folder, ours, other) = (database().await, Folder::new(), Authority::new(), Authority::new());
    let server = serve(&database, &folder, &ours.server(), Some(&ours)).await;
    served(secure(&server, ours.trusted().identity(ours.client()))).await.expect("it is one of ours");
    served(secure(&server, ours.trusted())).await.expect_err("it shows no certificate");
    served(secure(&server, ours.trusted().identity(other.client()))).await.expect_err("somebody else's client");
    let pair = ours.server();
    let no_client = Identity::from_pem(pair.cert, pair.key);
    served(secure(&server, ours.trusted().identity(no_client))).await.expect_err("a server's certificate");
}

#[tokio::test]
async fn certificates_change_while_it_serves_and_a_bad_one_changes_nothing() {
    let (database, folder) = (database().await, Folder::new());
    let [first, second, third] = [Authority::new(), Authority::new(), Authority::new()];
    for (name, pair) in [("v1", first.server()), ("v2", second.server())] {
        std::fs::create_dir(folder.0.join(name)).expect("the folder is ours");
        folder.write(&format!("{name}/tls.crt"), &pair.cert);
        folder.write(&format!("{name}/tls.key"), &pair.key);
    }
    folder.point("live", "v1");
    let (cert, key) = (folder.path("live/tls.crt"), folder.path("live/tls.key"));
    let env = [("GRPC_TLS_CERT", &*cert), ("GRPC_TLS_KEY", &*key)];
    let mut server = Server::start_with(&database.url, &env).await;
    let old = served(secure(&server, first.trusted())).await.expect("the first certificate");

    folder.point("live", "v2");
    eventually("the second certificate is in use", || async {
        served(secure(&server, second.trusted())).await.is_ok()
    })
    .await;
    served(secure(&server, first.trusted())).await.expect_err("new connections get the new one");
    ask(&old).await.expect("the old connection lives on");

    // Half a file, noticed by itself.
    let whole = std::fs::read_to_string(&cert).expect("it is there");
    std::fs::write(&cert, &whole[..whole.len() / 2]).expect("it is ours");
    let named = |variable: &'static str, path: String| {
        move |said: &str| {
            let mut lines = said.lines().filter(|line| line.contains("\"ERROR\""));
            lines.any(|line| line.contains(variable) && line.contains(&path)).then_some(())
        }
    };
    server.program.until("which file is bad", named("GRPC_TLS_CERT", cert.clone())).await;
    served(secure(&server, second.trusted())).await.expect("the second certificate stays");

    // A key of another certificate, at the operator's word.
    std::fs::write(&cert, &whole).expect("it is ours");
    let third_pair = third.server();
    std::fs::write(&key, &third_pair.key).expect("it is ours");
    server.program.signal(Signal::SIGHUP);
    server.program.until("which file is bad", named("GRPC_TLS_KEY", key.clone())).await;
    served(secure(&server, second.trusted())).await.expect("the second certificate stays");

    std::fs::write(&cert, &third_pair.cert).expect("it is ours");
    server.program.signal(Signal::SIGHUP);
    eventually("the third certificate is in use", || async { served(secure(&server, third.trusted())).await.is_ok() })
        .await;
    ask(&old).await.expect("the old connection still lives");

    let reloads = "opsmantik_grpc_certificate_reloads_total";
    let metrics = Metrics::of(&server).await;
    assert!(metrics.value(reloads, &[("outcome", "loaded")]).is_some_and(|times| times >= 2.0), "{metrics:?}");
    assert!(metrics.value(reloads, &[("outcome", "failed")]).is_some_and(|times| times >= 2.0), "{metrics:?}");
    assert!(!server.program.said().contains("PRIVATE"), "no byte of a key is shown");
    server.program.stop(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_hang_up_without_tls_is_noted_and_nothing_else() {
    let database = database().await;
    let mut server = Server::start(&database.url).await;
    let channel = served(plain(&server)).await.expect("it serves");
    server.program.signal(Signal::SIGHUP);
    let noted = |said: &str| said.contains("nothing to reload").then_some(());
    server.program.until("that it heard", noted).await;
    ask(&channel).await.expect("it serves on");
    server.program.stop(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn connections_that_say_nothing_or_rubbish_hold_up_nobody_and_are_closed() {
    let (database, folder, ours) = (database().await, Folder::new(), Authority::new());
    let encrypted = serve(&database, &folder, &ours.server(), None).await;
    let plaintext = Server::start(&database.url).await;
    let mut mute = Vec::new();
    for n in 0..200 {
        for server in [&encrypted, &plaintext] {
            let mut socket = TcpStream::connect(server.grpc).await.expect("it listens");
            if n % 10 == 0 {
                socket.write_all(b"GET / HTTP/1.1\r\n").await.expect("it may hang up later");
            }
            mute.push(socket);
        }
    }
    let began = Instant::now();
    served(secure(&encrypted, ours.trusted())).await.expect("it is served");
    served(plain(&plaintext)).await.expect("it is served");
    assert!(began.elapsed() < Duration::from_secs(3), "held up for {:?}", began.elapsed());

    for mut socket in mute {
        let patience = Duration::from_secs(20).saturating_sub(began.elapsed());
        let closed = tokio::time::timeout(patience, socket.read_to_end(&mut Vec::new())).await;
        // Closed or reset, as it likes.
        let _ = closed.expect("whoever says nothing is sent away");
    }
    let metrics = Metrics::of(&encrypted).await;
    let failures = |reason| metrics.value("opsmantik_grpc_handshake_failures_total", &[("reason", reason)]);
    assert_eq!((failures("timeout"), failures("failed")), (Some(180.0), Some(20.0)));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn out_of_file_descriptors_it_waits_and_serves_again() {
    let database = database().await;
    let mut server = Server::start(&database.url).await;
    let channel = served(plain(&server)).await.expect("it serves");
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.program.pid())).expect("it runs").count();
    let limit = format!("--nofile={}", open + 8);
    let pid = server.program.pid().to_string();
    let set = std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(set.expect("prlimit is part of Linux").success());

    let mut crowd = Vec::new();
    for _ in 0..30 {
        crowd.push(TcpStream::connect(server.grpc).await.expect("the kernel takes it"));
    }
    let complaint = "could not be accepted";
    let full = |said: &str| said.contains(complaint).then_some(());
    server.program.until("that it is full", full).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let times = server.program.said().matches(complaint).count();
    assert!(times < 50, "it spins: {times} complaints");
    ask(&channel).await.expect("who is in is served");
    drop(crowd);
    eventually("newcomers are served again", || async { served(plain(&server)).await.is_ok() }).await;
}

#[tokio::test]
async fn in_plaintext_it_listens_on_loopback_or_by_order() {
    let database = database().await;
    let (folder, ours) = (Folder::new(), Authority::new());
    let pair = ours.server();
    let (cert, key) = (folder.write("tls.crt", &pair.cert), folder.write("tls.key", &pair.key));
    let (other_key, absent) = (folder.write("other.key", &ours.server().key), folder.path("absent.crt"));
    let (no_key, no_pem) = (folder.write("no.key", &pair.cert), folder.write("no.crt", "nothing"));
    let everywhere = ("GRPC_ADDR", "0.0.0.0:0");

    let start = async |more: &[(&str, &str)]| {
        let mut env =
            vec![("DATABASE_URL", &*database.url), ("HTTP_ADDR", "127.0.0.1:0"), ("ADMIN_ADDR", "127.0.0.1:0")];
        env.extend(more);
        let ended = run(&["serve"], &env).await;
        ended.complaint().to_owned()
    };
    let complaint = start(&[everywhere]).await;
    assert!(complaint.contains("GRPC_ADDR") && complaint.contains("GRPC_PLAINTEXT=true"), "{complaint}");
    for (cert, key, named) in [
        (&absent, &key, ["GRPC_TLS_CERT", &*absent]),
        (&no_pem, &key, ["GRPC_TLS_CERT", &*no_pem]),
        (&cert, &other_key, ["GRPC_TLS_KEY", &*other_key]),
        (&cert, &no_key, ["GRPC_TLS_KEY", &*no_key]),
    ] {
        let complaint = start(&[("GRPC_ADDR", "127.0.0.1:0"), ("GRPC_TLS_CERT", cert), ("GRPC_TLS_KEY", key)]).await;
        assert!(named.iter().all(|name| complaint.contains(name)), "{named:?}: {complaint}");
    }
    let alone = start(&[("GRPC_ADDR", "127.0.0.1:0"), ("GRPC_TLS_CERT", &cert)]).await;
    assert!(alone.contains("GRPC_TLS_KEY is not set"), "{alone}");

    for more in [&[("GRPC_PLAINTEXT", "true")][..], &[("GRPC_TLS_CERT", &*cert), ("GRPC_TLS_KEY", &*key)]] {
        let mut server = Server::start_with(&database.url, &[&[everywhere], more].concat()).await;
        assert!(server.grpc.ip().is_unspecified());
        server.grpc.set_ip([127, 0, 0, 1].into());
        let endpoint = if more.len() == 1 { plain(&server) } else { secure(&server, ours.trusted()) };
        served(endpoint).await.expect("it serves");
    }
    let help: String = run(&["serve", "--help"], &[]).await.stdout;
    assert!(help.contains("--grpc-plaintext") && help.contains("proxy or mesh"), "{help}");
}
