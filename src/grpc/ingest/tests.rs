//! The caller's own deadline, which no database is needed for.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::transport::{Channel, Server};
use tonic::{Code, Request};
use uuid::Uuid;

use super::super::proto::ingest_service_client::IngestServiceClient;
use super::super::proto::ingest_service_server::IngestServiceServer;
use super::*;
use crate::access::Gate;
use crate::directory::Directory;
use crate::domain::access::{Caller, Reach, Scope};
use crate::domain::id::TokenId;
use crate::keeper::Nudge;
use crate::pipeline::{Pipeline, PipelineConfig};
use crate::store::Store;

#[tokio::test]
async fn a_stream_ends_with_its_callers_deadline() {
    let store = Store::new("postgres://nobody@127.0.0.1:1/none", 2).await.expect("the URL is one");
    let caller = std::sync::Arc::new(Caller::Token {
        id: TokenId::from_uuid(Uuid::from_u128(1)),
        scopes: Scope::ALL.to_vec(),
        reach: Reach::AllSites,
    });
    let state = GrpcState {
        pipeline: Pipeline::start(store.clone(), Nudge::default(), PipelineConfig::default()),
        directory: Directory::new(store.clone()),
        gate: Gate::new(store.clone()),
        calls: crate::calls::Calls::new(store.clone()),
        caller_key: None,
        store,
        stop: tokio_util::sync::CancellationToken::new(),
    };
    let service = IngestServiceServer::with_interceptor(Ingest::new(state), move |mut request: Request<()>| {
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(crate::grpc::call::Deadline(Instant::now() + Duration::from_millis(300)));
        Ok(request)
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address is a URI");
    let mut client = IngestServiceClient::new(endpoint.connect().await.expect("the server listens"));

    let began = Instant::now();
    let mut stream = client.stream_ingest(tokio_stream::pending()).await.expect("a stream").into_inner();
    let end = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("it ends");
    assert_eq!(end.expect_err("the deadline has passed").code(), Code::DeadlineExceeded);
    assert!(began.elapsed() >= Duration::from_millis(300));
}
