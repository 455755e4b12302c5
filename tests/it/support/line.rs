//! The internal door in this process, in front of a test's database, with a pipeline of the test's own size.

use std::time::Duration;

use opsmantik::access::Gate;
use opsmantik::calls::Calls;
use opsmantik::directory::Directory;
use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::ingest_service_client::IngestServiceClient;
use opsmantik::grpc::proto::{Event, IngestRequest, IngestResult};
use opsmantik::grpc::{GrpcState, Health, Listener, Protection, serve};
use opsmantik::keeper::Nudge;
use opsmantik::pipeline::{Pipeline, PipelineConfig};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use uuid::Uuid;

use super::database::{Database, bearer, database};

pub struct Line {
    pub database: Database,
    pub pipeline: Pipeline,
    pub endpoint: Endpoint,
    pub token: String,
    pub stop: CancellationToken,
    pub served: JoinHandle<anyhow::Result<()>>,
}

/// A client with a token.
pub type Client = IngestServiceClient<InterceptedService<Channel, Bearer>>;

#[derive(Clone)]
pub struct Bearer(String);

impl Bearer {
    pub fn new(token: &str) -> Self {
        Self(token.to_owned())
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        bearer(&self.0)(request)
    }
}

impl Line {
    /// With the site `shop`, and a token for every site.
    pub async fn open(config: PipelineConfig) -> Self {
        let database = database().await;
        database.site("shop").await;
        Self::before(database, config).await
    }

    pub async fn before(database: Database, config: PipelineConfig) -> Self {
        let token = database.token(&Scope::ALL, None).await;
        let (store, stop) = (database.store.clone(), CancellationToken::new());
        let pipeline = Pipeline::start(store.clone(), Nudge::default(), config);
        let state = GrpcState {
            feed: opsmantik::feed::Feed::unfit("no feed here"),
            pipeline: pipeline.clone(),
            directory: Directory::new(store.clone()),
            gate: Gate::new(store.clone()),
            calls: Calls::new(store.clone()),
            caller_key: Some(super::calls::key()),
            store: store.clone(),
            stop: stop.clone(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let listener = Listener::new(listener, Protection::Loopback).expect("on loopback");
        let served = tokio::spawn(serve(listener, state, Health::of(store), stop.clone()));
        let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address is a URI");
        Self { database, pipeline, endpoint, token, stop, served }
    }

    pub async fn client(&self) -> Client {
        client(&self.endpoint, &self.token).await
    }

    pub async fn ingest(&self, events: Vec<Event>) -> Result<Vec<IngestResult>, Status> {
        Ok(self.client().await.ingest(IngestRequest::of(events)).await?.into_inner().results)
    }

    /// Ends the server, and all that it took is stored.
    pub async fn close(&self) {
        self.stop.cancel();
        self.pipeline.drain().await;
    }
}

pub async fn client(endpoint: &Endpoint, token: &str) -> Client {
    let mut tries = 0;
    let channel = loop {
        match endpoint.connect().await {
            Ok(channel) => break channel,
            Err(error) => {
                tries += 1;
                assert!(tries < 50, "the server does not listen: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    IngestServiceClient::with_interceptor(channel, Bearer(token.to_owned()))
}

/// Event `n` of the shop; sixteen in a row are one visit.
pub fn event(n: u32) -> Event {
    Event {
        id: Some(Uuid::from_u128(u128::from(n)).to_string()),
        site: "shop".to_owned(),
        url: format!("https://shop.example/p{n}"),
        session_id: format!("visit-{}", n / 16),
        category: "interaction".to_owned(),
        action: "view".to_owned(),
        ..Event::default()
    }
}
