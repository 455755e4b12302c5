//! Connections on which nobody has shown a token: they may come and ask for health, and cannot keep the others out.

use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::ScoreSignalsRequest;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::scoring_service_client::ScoringServiceClient;
use tonic_health::pb::HealthCheckResponse;

use super::*;
use crate::support::database::bearer;

/// How a client begins HTTP/2, with an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// More than the door has places.
const CROWD: usize = 1100;

/// Lets this process and the server it starts have the crowd's sockets open.
fn many_files() {
    let pid = std::process::id().to_string();
    let set = std::process::Command::new("prlimit").args(["--pid", &pid, "--nofile=4096:"]).status();
    assert!(set.expect("prlimit is part of Linux").success());
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn connections_without_a_token_keep_out_nobody_who_has_one() {
    many_files();
    let database = database().await;
    let server = Server::start(&database.url).await;
    let token = database.token(&Scope::ALL, None).await;
    let old = plain(&server).connect().await.expect("it listens");
    let mut stream = IngestServiceClient::with_interceptor(old.clone(), bearer(&token))
        .stream_ingest(tokio_stream::pending())
        .await
        .expect("a good token")
        .into_inner();
    let prober = served(plain(&server)).await.expect("health needs no token");
    let watch = HealthClient::new(prober.clone()).watch(HealthCheckRequest::default()).await;
    let mut watch = watch.expect("health needs no token").into_inner();

    let mut crowd = Vec::new();
    for _ in 0..CROWD {
        let mut socket = TcpStream::connect(server.grpc).await.expect("it listens");
        socket.write_all(PREFACE).await.expect("the kernel takes it");
        crowd.push(socket);
    }
    let began = Instant::now();
    let good = plain(&server).connect().await.expect("it listens");
    let mut scoring = ScoringServiceClient::with_interceptor(good, bearer(&token));
    let ask = scoring.score_signals(ScoreSignalsRequest::default());
    let answer = tokio::time::timeout(Duration::from_secs(8), ask).await;
    answer.expect("the crowd keeps nobody out").expect("a good request");
    assert!(began.elapsed() < Duration::from_secs(3), "answered after {:?}", began.elapsed());

    let heard = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(heard.is_err(), "who showed a token stays: {heard:?}");
    // Health alone makes nobody a friend; who asks again is let in again.
    let last = tokio::time::timeout(Duration::from_secs(5), async {
        while let Ok(Some(HealthCheckResponse { .. })) = watch.message().await {}
    });
    last.await.expect("the prober was the oldest newcomer");
    ask_twice(&prober).await;
    let (mut first_said, mut last_said) = (Vec::new(), Vec::new());
    let first = crowd[0].read_to_end(&mut first_said);
    let _ = tokio::time::timeout(Duration::from_secs(5), first).await.expect("the oldest has gone");
    let last = crowd[CROWD - 1].read_to_end(&mut last_said);
    tokio::time::timeout(Duration::from_millis(300), last).await.expect_err("the youngest may stay for a while");
}

/// The first may find the connection broken off.
async fn ask_twice(channel: &Channel) {
    if ask(channel).await.is_err() {
        ask(channel).await.expect("it is let in again");
    }
}
