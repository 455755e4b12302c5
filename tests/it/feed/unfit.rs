//! A database that is not set up for logical decoding: everything works but watching, and everybody is told what to do.

use std::time::Duration;

use opsmantik::domain::access::Scope as Right;
use opsmantik::grpc::proto::{Call, Session, StoredEvent};
use serde_json::{Value, json};
use tonic::Code;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::watched::{Scope, Watched};
use crate::support::line::Bearer;
use crate::support::private::Private;
use crate::support::process::{Server, client};

async fn refused<R: Watched>(channel: InterceptedService<Channel, Bearer>, site: &str) {
    let scope = Scope { site: site.to_owned(), month: None };
    let status = match R::open(channel, &scope, None).await {
        Err(status) => status,
        Ok(mut stream) => stream.message().await.expect_err("nothing can be watched"),
    };
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    for cure in ["wal_level", "logical", "restart"] {
        assert!(status.message().contains(cure), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_logical_decoding_everything_else_works_and_whoever_watches_is_told_the_cure() {
    let private = Private::start(&[("wal_level", "replica")]).await;
    let database = private.database().await;
    let site = database.site("shop").await.id.to_string();
    let token = database.token(&Right::ALL, None).await;
    let mut server = Server::start(&private.url()).await;

    let event = json!({"id": Uuid::from_u128(1), "s": "shop", "u": "https://shop.example/", "sid": "visit", "ec": "interaction"});
    let posted = client().post(server.sync_url()).header("Origin", "https://shop.example").body(event.to_string());
    assert_eq!(posted.send().await.expect("an answer").status(), 200);
    assert_eq!(database.count("SELECT count(*) FROM events").await, 1);

    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
    let channel = InterceptedService::new(endpoint.connect().await.expect("it listens"), Bearer::new(&token));
    refused::<StoredEvent>(channel.clone(), &site).await;
    refused::<Session>(channel.clone(), &site).await;
    refused::<Call>(channel, &site).await;

    let ready = client().get(server.ready_url()).send().await.expect("an answer");
    assert_eq!(ready.status(), 200, "events are stored");
    let ready: Value = serde_json::from_str(&ready.text().await.expect("a whole answer")).expect("JSON");
    let warnings: Vec<_> = ready["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let warned = |warning: &&str| warning.starts_with("feed:") && warning.contains("wal_level");
    assert!(warnings.iter().any(warned), "{ready}");

    let logged = |line: &str| line.contains("wal_level") && line.contains("WARN");
    server.program.until("what is missing", |said| said.lines().any(logged).then_some(())).await;
    server.program.stop(Duration::from_secs(15)).await;
}
