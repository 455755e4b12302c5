//! One connection to NATS, for as long as it lasts: nothing is carried over to the next.
//!
//! An acknowledgement names an event by its number in the stream. A NATS that went away may have lost its last events when it is back, and
//! have given their numbers to others: what is acknowledged from before would be taken out of the stream and stored by nobody. The client of
//! NATS would connect again by itself and send what still waited for the connection that it lost. This one is left nowhere to go: it ends with
//! its connection, and what waited ends with it.

use std::sync::Arc;
use std::time::Duration;

use async_nats::client::SetServerPoolError;
use async_nats::connection::State;
use async_nats::jetstream::Context;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event as Happening, ServerAddr};
use tokio::sync::Notify;

use super::{ANSWER, NatsConfig, NatsSetupError};

/// A NATS that is silent for a few of these is away, even if its machine cannot say so any more.
const PING: Duration = Duration::from_secs(2);
/// Nobody can listen there.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// It is open when it is made.
pub(super) struct Connection {
    pub client: Client,
    pub jetstream: Context,
}

/// How connections are opened; the end of each is told to `ended`.
pub(super) async fn options(config: &NatsConfig, ended: Arc<Notify>) -> Result<ConnectOptions, NatsSetupError> {
    let tell = move |happening| {
        if happening == Happening::Disconnected {
            ended.notify_one();
        }
        async {}
    };
    let options = ConnectOptions::new()
        .name("opsmantik")
        .connection_timeout(ANSWER)
        .ping_interval(PING)
        .reconnect_delay_callback(|_| Duration::ZERO)
        .event_callback(tell);
    let options = config.servers.log_in(options);
    match &config.credentials {
        Some(file) => options.credentials_file(file).await.map_err(NatsSetupError::Credentials),
        None => Ok(options),
    }
}

impl Connection {
    /// Tries each of `servers` once, and at once: pauses are for who tries again.
    pub async fn open(options: &ConnectOptions, servers: Vec<ServerAddr>) -> Result<Self, ConnectError> {
        // A bound of none would be no bound, and each success begins the count anew: all that the client can be denied is where to go.
        let client = options.clone().max_reconnects(servers.len()).connect(servers).await?;
        let ended = |error: SetServerPoolError| ConnectError::with_source(ConnectErrorKind::Io, error);
        client.set_server_pool(NOWHERE).await.map_err(ended)?;
        let jetstream = ContextBuilder::new().timeout(ANSWER).build(client.clone());
        Ok(Self { client, jetstream })
    }

    pub fn lasts(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// The servers of the cluster, as the one that it leads to named them.
    pub fn cluster(&self) -> Vec<ServerAddr> {
        self.client.server_info().connect_urls.iter().filter_map(|address| address.parse().ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;

    const INFO: &str = r#"INFO {"server_id":"x","server_name":"x","version":"2.10.0","go":"x","host":"x","port":4222,"headers":true,"max_payload":1048576,"proto":1,"client_id":1,"connect_urls":["10.0.0.2:4222"]}"#;

    /// A NATS that takes everything and does nothing: its address, the connections to it, and what was published by them.
    fn nats() -> (ServerAddr, Receiver<TcpStream>, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address").to_string().parse().expect("an address");
        let (accepted, connections) = channel();
        let (published, heard) = channel();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.expect("a connection");
                accepted.send(connection.try_clone().expect("a socket")).expect("the test runs");
                let published = published.clone();
                thread::spawn(move || {
                    writeln!(connection, "{INFO}\r").expect("it is there");
                    for line in BufReader::new(connection.try_clone().expect("a socket")).lines() {
                        let Ok(line) = line else { break };
                        if line.starts_with("PING") {
                            write!(connection, "PONG\r\n").expect("it is there");
                        } else if line.starts_with("PUB") {
                            drop(published.send(line));
                        }
                    }
                });
            }
        });
        (address, connections, heard)
    }

    #[tokio::test]
    async fn what_waits_when_a_connection_ends_is_not_sent_by_the_next() {
        let (address, connections, heard) = nats();
        let open = async || Connection::open(&ConnectOptions::new(), vec![address.clone()]).await.expect("it listens");
        let first = open().await;
        connections.recv().expect("a connection").shutdown(Shutdown::Both).expect("it was open");
        // The news of it is here, and the client's task has not heard of it.
        thread::sleep(Duration::from_millis(50));
        tokio::task::yield_now().await;
        assert!(first.lasts(), "nobody can know yet");
        first.client.publish("before", "+ACK".into()).await.expect("it waits");

        let second = open().await;
        second.client.publish("after", "+ACK".into()).await.expect("it lasts");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["PUB after 4"]);
        assert!(second.lasts() && !first.lasts());
        first.client.publish("before", "+ACK".into()).await.expect_err("nobody is left to send it");
    }

    #[tokio::test]
    async fn each_server_is_tried_and_the_one_that_answers_names_the_others() {
        let (address, _connections, _heard) = nats();
        let servers = vec![NOWHERE.parse().expect("an address"), address];
        let open = Connection::open(&ConnectOptions::new(), servers).await.expect("one of them listens");
        assert_eq!(open.cluster(), ["10.0.0.2:4222".parse::<ServerAddr>().expect("an address")]);
    }
}
