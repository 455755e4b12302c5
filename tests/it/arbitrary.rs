//! Whatever is sent to the internal door, it answers: ten thousand arbitrary messages to every RPC of the contract.
//!
//! Messages are made from the descriptors by a seeded generator: mostly good ones with something odd in them, so that they come far, some
//! wild ones, and some bytes that are no message at all. No answer may be INTERNAL or UNKNOWN, none may be missing, nothing may be UNAVAILABLE
//! for what is in it, and the server does not panic. A failure tells the bytes that caused it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opsmantik::domain::access::Scope;
use opsmantik::grpc::proto::FILE_DESCRIPTOR_SET;
use prost_reflect::{DescriptorPool, MessageDescriptor, MethodDescriptor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::support::calls::KEY;
use crate::support::database::{Database, database};
use crate::support::process::Server;
use crate::support::raw::Raw;
use maker::{Maker, Words};

mod maker;
mod seeded;

/// Messages to each RPC.
const MESSAGES: usize = 10_000;
/// Callers at once. Each waits for its answer.
const CALLERS: usize = 64;
const CHANNELS: usize = 4;
/// Nothing that is answered takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a watch is watched for its first message.
const GLANCE: Duration = Duration::from_millis(20);

/// Both sides of a stream.
type Stream = (mpsc::Sender<Vec<u8>>, Streaming<Vec<u8>>);

/// One who calls one RPC, message after message.
struct Caller {
    rpc: MethodDescriptor,
    channel: Channel,
    tokens: [String; 2],
    maker: Maker,
    /// For an RPC that takes a stream.
    open: Option<Stream>,
}

impl Caller {
    fn request<T>(&mut self, message: T) -> Request<T> {
        // Most may do everything, some only at one site.
        let token = &self.tokens[usize::from(self.maker.rng.random_bool(0.2))];
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("visible text"));
        request
    }

    /// What the server says to these bytes.
    async fn ask(&mut self, message: Vec<u8>) -> Result<(), Status> {
        let mut client = Grpc::new(self.channel.clone());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = format!("/{}/{}", self.rpc.parent_service().full_name(), self.rpc.name());
        let path = path.parse().expect("a path");
        if self.rpc.is_client_streaming() {
            return self.stream(client, path, message).await;
        }
        let request = self.request(message);
        if self.rpc.is_server_streaming() {
            let mut watch = client.server_streaming(request, path, Raw).await?.into_inner();
            return match tokio::time::timeout(GLANCE, watch.message()).await {
                Ok(first) => first.map(drop),
                Err(_) => Ok(()),
            };
        }
        client.unary(request, path, Raw).await.map(drop)
    }

    /// Sends a message on the stream, or on a new one if that has ended, and waits for its acknowledgement.
    async fn stream(
        &mut self,
        mut client: Grpc<Channel>,
        path: http::uri::PathAndQuery,
        message: Vec<u8>,
    ) -> Result<(), Status> {
        let (sender, mut answers) = match self.open.take() {
            Some(open) => open,
            None => {
                let (sender, messages) = mpsc::channel(1);
                let request = self.request(ReceiverStream::new(messages));
                (sender, client.streaming(request, path, Raw).await?.into_inner())
            }
        };
        sender.send(message).await.map_err(|_| Status::unknown("the stream has ended unasked"))?;
        let acknowledged = answers.message().await?;
        acknowledged.ok_or_else(|| Status::unknown("the stream ended without a word"))?;
        // A stream has more than one message, and ends some time.
        if self.maker.rng.random_bool(0.9) {
            self.open = Some((sender, answers));
        }
        Ok(())
    }

    /// Sends so many messages, and counts what is answered.
    async fn send(mut self, messages: usize) -> BTreeMap<String, usize> {
        let input = self.rpc.input();
        let mut answers = BTreeMap::new();
        for _ in 0..messages {
            let message = self.maker.bytes(&input);
            let code = self.settled(message).await;
            *answers.entry(format!("{code:?}")).or_default() += 1;
        }
        answers
    }

    /// The answer to a message, which must be a sensible one.
    async fn settled(&mut self, message: Vec<u8>) -> Code {
        let mut tries = 0;
        loop {
            let answer = tokio::time::timeout(PATIENCE, self.ask(message.clone())).await;
            let status = match answer {
                Ok(Ok(())) => return Code::Ok,
                Ok(Err(status)) => status,
                Err(_) => Status::unknown("no answer at all"),
            };
            match status.code() {
                Code::InvalidArgument
                | Code::NotFound
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::Unimplemented => return status.code(),
                // The server may be busy; but not for what is in the message.
                Code::Unavailable | Code::DeadlineExceeded if tries < 5 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                _ => panic!("{}: {status:?} for {}", self.rpc.full_name(), hex(&message)),
            }
        }
    }
}

fn hex(message: &[u8]) -> String {
    message.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Siege {
    database: Database,
    server: Server,
    channels: Vec<Channel>,
    tokens: [String; 2],
    words: Arc<Words>,
}

impl Siege {
    async fn lay() -> Self {
        let database = database().await;
        let shop = database.site("shop").await;
        database.site("neighbour").await;
        let tokens = [database.token(&Scope::ALL, None).await, database.token(&Scope::ALL, Some(shop.id)).await];
        let server = Server::start_with(&database.url, &[("CALLER_KEY", KEY)]).await;
        let endpoint = Channel::from_shared(format!("http://{}", server.grpc)).expect("an address is a URI");
        let mut channels = Vec::new();
        for _ in 0..CHANNELS {
            channels.push(endpoint.connect().await.expect("the server listens"));
        }
        let words = Arc::new(seeded::words(&database, &channels[0], &tokens[0]).await);
        Self { database, server, channels, tokens, words }
    }

    /// What the RPC answers to all its messages, by code.
    async fn on(&self, rpc: &MethodDescriptor, seed: u64) -> BTreeMap<String, usize> {
        let mut callers = tokio::task::JoinSet::new();
        for n in 0..CALLERS {
            let rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003) + n as u64);
            let caller = Caller {
                rpc: rpc.clone(),
                channel: self.channels[n % CHANNELS].clone(),
                tokens: self.tokens.clone(),
                maker: Maker { rng, words: self.words.clone() },
                open: None,
            };
            callers.spawn(caller.send(MESSAGES.div_ceil(CALLERS)));
        }
        let mut sum: BTreeMap<String, usize> = BTreeMap::new();
        while let Some(answers) = callers.join_next().await {
            for (code, count) in answers.unwrap_or_else(|error| panic!("seed {seed}: {error}")) {
                *sum.entry(code).or_default() += count;
            }
        }
        sum
    }
}

fn rpcs() -> Vec<MethodDescriptor> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let ours = pool.services().filter(|service| service.full_name().starts_with("opsmantik."));
    ours.flat_map(|service| service.methods().collect::<Vec<_>>()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_arbitrary_messages_to_each_rpc_are_all_answered() {
    let mut siege = Siege::lay().await;
    let rpcs = rpcs();
    assert_eq!(rpcs.len(), 13);
    let seed = std::env::var("ARBITRARY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(2026);
    for (n, rpc) in rpcs.iter().enumerate() {
        let began = Instant::now();
        let answers = siege.on(rpc, seed + n as u64).await;
        println!("{}: {answers:?} in {:?}", rpc.name(), began.elapsed());
        let count = |code: &str| answers.get(code).copied().unwrap_or_default();
        assert!(answers.values().sum::<usize>() >= MESSAGES);
        if count("Unimplemented") == 0 {
            assert!(count("Ok") >= MESSAGES / 20, "{}: few come far: {answers:?}", rpc.name());
            assert!(count("InvalidArgument") >= MESSAGES / 20 || rpc.name() == "StreamIngest", "{answers:?}");
        }
    }
    // It still answers, and what it holds can be read.
    assert!(siege.database.count("SELECT count(*) FROM calls").await > 50);
    assert!(siege.database.count("SELECT count(*) FROM events").await > 500);
    let ready = crate::support::process::client().get(siege.server.ready_url()).send().await.expect("it answers");
    assert_eq!(ready.status(), 200);
    siege.server.program.stop(Duration::from_secs(20)).await;
    let said = siege.server.program.said();
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(siege.database.count("SELECT count(*) FROM dead_letters").await, 0, "nothing that PostgreSQL refuses");
}

#[test]
fn the_maker_makes_messages_that_can_be_read() {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("made by the build");
    let input: MessageDescriptor = pool.get_message_by_name("opsmantik.v1.RecordCallsRequest").expect("it is there");
    let mut maker = Maker { rng: StdRng::seed_from_u64(7), words: Arc::new(Words::default()) };
    let read = (0..500).filter(|_| prost_reflect::DynamicMessage::decode(input.clone(), &*maker.bytes(&input)).is_ok());
    let read = read.count();
    assert!((350..500).contains(&read), "most, and not all: {read}");
}
