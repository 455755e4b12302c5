//! A NATS that has forgotten what it wrote last, as after a power cut: its stream is older than its consumer. Whatever the consumer believes, what is in
//! the stream is stored, and what comes later is not taken for what was lost.
//!
//! The stream's files are put back to an earlier state while NATS is down; that is the same, only sooner.

use std::time::{Duration, Instant};

use async_nats::jetstream::{AckKind, Message};
use futures::StreamExt;

use crate::support::app::{Answer, ORIGIN, event};
use crate::support::database::{Database, connect, database};
use crate::support::nats::NatsServer;
use crate::support::process::{Server, client};

/// NATS writes down what its consumer knows ten times a second.
const WRITTEN_DOWN: Duration = Duration::from_millis(400);

async fn shop() -> Database {
    let database = database().await;
    database.site("shop").await;
    database
}

async fn queue(edge: &Server, id: u128) {
    let request = client().post(edge.sync_url()).header("Origin", ORIGIN).body(event(id).to_string());
    let answer = Answer::of(request).await;
    assert_eq!((answer.status, answer.body["status"].as_str()), (202, Some("queued")), "event {id}: {}", answer.body);
}

/// Takes events as a worker does, and leaves them unacknowledged.
async fn take(nats: &NatsServer, events: usize) -> Vec<Message> {
    let batch = nats.consumer().await.batch().max_messages(events).expires(Duration::from_secs(5)).messages().await;
    let taken: Vec<_> = batch.expect("NATS answers").map(|message| message.expect("a message")).collect().await;
    assert_eq!(taken.len(), events);
    taken
}

async fn answer(message: &Message, kind: AckKind) {
    message.ack_with(kind).await.expect("NATS hears of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_its_consumer_has_lost_sight_of_is_handed_out_again() {
    let Some(mut nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let mut edge = nats.serve("edge", &database.url, &[]).await;
    for id in 1..=4 {
        queue(&edge, id).await;
    }
    let taken = take(&nats, 4).await;
    // Taken a second time, so that the numbers of its deliveries do not follow one another any more.
    answer(&taken[0], AckKind::Nak(None)).await;
    take(&nats, 1).await;
    let earlier = nats.files();
    queue(&edge, 5).await;
    take(&nats, 1).await;
    // Nobody has stored these: the tables will show whether they come again.
    for message in &taken[1..] {
        answer(message, AckKind::Ack).await;
    }
    tokio::time::sleep(WRITTEN_DOWN).await;
    nats.kill().await;
    nats.put_back(&earlier);
    nats.restart().await;
    // Of the four in the stream the consumer knows the first, and it waits for the fifth, which is not there any more.
    let mut worker = nats.worker(&database.url).await;
    nats.stored(&database, 4).await;
    nats.empty().await;
    for program in [&mut edge.program, &mut worker.program] {
        program.stop(Duration::from_secs(15)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_from_before_does_not_take_out_what_came_after() {
    let Some(mut nats) = NatsServer::start().await else { return };
    let database = shop().await;
    let mut edge = nats.serve("edge", &database.url, &[]).await;
    let mut worker = nats.worker(&database.url).await;
    queue(&edge, 1).await;
    nats.stored(&database, 1).await;
    nats.empty().await;
    let earlier = nats.files();
    // The worker has the second event, and cannot store it yet.
    let locked = connect(&database.url).await;
    locked.batch_execute("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE").await.expect("locked");
    queue(&edge, 2).await;
    let began = Instant::now();
    while nats.consumer().await.cached_info().num_ack_pending == 0 {
        assert!(began.elapsed() < Duration::from_secs(3), "the worker takes nothing: {}", nats.figures().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(WRITTEN_DOWN).await;
    nats.kill().await;
    nats.put_back(&earlier);
    nats.restart().await;
    // The third event gets the number that the second had. Both servers know NATS again by then.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    queue(&edge, 3).await;
    assert_eq!(nats.state().await.last_sequence, 2);
    locked.batch_execute("COMMIT").await.expect("unlocked");
    nats.stored(&database, 3).await;
    nats.empty().await;
    for program in [&mut edge.program, &mut worker.program] {
        program.stop(Duration::from_secs(15)).await;
    }
}
