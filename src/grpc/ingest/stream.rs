//! `StreamIngest`: events as they come, each acknowledged once it is durable.
//!
//! The answering stream does the work itself: it reads a message only when the client takes acknowledgements, when fewer than
//! [`MAX_IN_FLIGHT`] events of this stream are on their way, and when the pipeline has had room for the last one. Otherwise nothing is
//! read, HTTP/2's window fills, and the sender waits: what is held back is the sender, in no memory of ours. What was read is handed
//! over at once, or in a task of its own, so that it is stored even if the client is gone.
//!
//! A message is read only while its sender is known to be welcome. Nobody asks while the client takes no acknowledgements, so one that takes
//! them up again waits for the answer first: a revoked token writes nothing more.
//!
//! Whatever ends a stream, what was taken is finished and acknowledged first, within [`FINISH`]. What stays without an
//! acknowledgement is the sender's to send again.

use std::future::{Future, pending, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use chrono::Utc;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, FuturesUnordered, Stream, StreamExt};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::super::call::Deadline;
use super::super::proto::{IngestResult, Rejection, RejectionReason, StreamIngestRequest, StreamIngestResponse};
use super::super::{convert, status};
use super::admission::{Admission, Refused, Sender};
use super::settled;
use crate::domain::event::Event;
use crate::domain::outcome::{Outcome, Unavailable};
use crate::domain::signal::SignalSet;
use crate::pipeline::Taken;

/// Longest message id, bytes.
const MAX_MESSAGE_ID: usize = 128;
/// Events of one stream that are on their way: enough to keep every writer busy with full batches.
pub(super) const MAX_IN_FLIGHT: usize = 1024;
/// Their bytes, roughly: one stream takes at most a part of the pipeline's room.
const MAX_BYTES: usize = 4 << 20;
/// A stream that ends waits this long for what it took. Longer than the pipeline's patience, well inside the grace of a stop.
const FINISH: Duration = Duration::from_secs(10);
/// How often a stream asks whether its sender is still welcome: a revoked token stops within five seconds.
const WELCOME_EVERY: Duration = Duration::from_secs(2);
/// Nothing is read when the last answer is older. With the two seconds for which a token is believed it stays below five.
const WELCOME_FOR: Duration = Duration::from_millis(2500);

/// The acknowledgements of what `incoming` brings, and the status in the end.
pub(super) fn acknowledge(
    sender: Sender,
    incoming: Streaming<StreamIngestRequest>,
    deadline: Option<Deadline>,
) -> impl Stream<Item = Result<StreamIngestResponse, Status>> + Send {
    let (sender, now) = (Arc::new(sender), Instant::now());
    let intake = Intake {
        welcome: now,
        check: Box::pin(check(sender.clone(), now + WELCOME_EVERY)),
        sender,
        incoming,
        deadline: deadline.map(|deadline| deadline.0),
        taking: None,
        in_flight: FuturesUnordered::new(),
        bytes: 0,
        ending: None,
        finish_by: None,
        over: false,
    };
    // What is said on the way belongs to the call, as what is said before its first answer.
    let span = tracing::Span::current();
    stream::unfold(intake, move |intake| intake.next().instrument(span.clone()))
}

/// Asks at `due` whether the sender is still welcome: when that was asked, if somebody could tell. An answer may be taken up long after it came,
/// and is as old as its question.
async fn check(sender: Arc<Sender>, due: Instant) -> Result<Option<Instant>, Status> {
    sleep_until(due).await;
    let asked = Instant::now();
    Ok(sender.still_welcome().await?.then_some(asked))
}

/// What `reading` brings, or none as soon as `late` has come; then nothing was read.
async fn before<T>(late: Instant, reading: impl Future<Output = T>) -> Option<T> {
    let (mut reading, mut late_comes) = (pin!(reading), pin!(sleep_until(late)));
    poll_fn(|context| {
        // The clock itself is asked: whoever was not polled for a while may find both ready.
        if Instant::now() >= late {
            return Poll::Ready(None);
        }
        match reading.as_mut().poll(context) {
            Poll::Ready(read) => Poll::Ready(Some(read)),
            Poll::Pending => late_comes.as_mut().poll(context).map(|()| None),
        }
    })
    .await
}

/// One stream.
struct Intake {
    sender: Arc<Sender>,
    incoming: Streaming<StreamIngestRequest>,
    /// When the sender was last known to be welcome.
    welcome: Instant,
    check: BoxFuture<'static, Result<Option<Instant>, Status>>,
    deadline: Option<Instant>,
    /// The message that was read last, until the pipeline has its event.
    taking: Option<JoinHandle<Result<Took, Status>>>,
    in_flight: FuturesUnordered<BoxFuture<'static, (Ticket, Outcome)>>,
    /// Of the events in flight.
    bytes: usize,
    /// Set when no more is read: how the stream ends when all is finished.
    ending: Option<Result<(), Status>>,
    finish_by: Option<Instant>,
    over: bool,
}

/// What is kept of a message whose event is on its way.
struct Ticket {
    message_id: String,
    event_id: String,
    signals: SignalSet,
    bytes: usize,
}

/// What became of a message that was read.
enum Took {
    Refused(StreamIngestResponse),
    Event(Ticket, Taken),
}

impl Intake {
    /// The next acknowledgement, or the end.
    async fn next(mut self) -> Option<(Result<StreamIngestResponse, Status>, Self)> {
        while !self.over {
            let idle = self.taking.is_none() && self.in_flight.is_empty();
            if let Some(ending) = self.ending.take_if(|_| idle) {
                return self.end(ending);
            }
            let open = self.ending.is_none();
            let has_room = self.taking.is_none() && self.in_flight.len() < MAX_IN_FLIGHT && self.bytes < MAX_BYTES;
            let late = self.welcome + WELCOME_FOR;
            let known = Instant::now() < late;
            tokio::select! {
                () = until(self.deadline) => {
                    return self.end(Err(Status::deadline_exceeded("the stream did not end within its deadline")));
                }
                () = until(self.finish_by) => {
                    let stopping = || Err(status::unavailable(Unavailable::Stopping));
                    let ending = self.ending.take().filter(Result::is_err).unwrap_or_else(stopping);
                    return self.end(ending);
                }
                () = self.sender.state.stop.cancelled(), if self.finish_by.is_none() => {
                    // Whoever has closed its side hears OK, if all is finished in time.
                    self.finish_by = Some(Instant::now() + FINISH);
                    self.ending.get_or_insert(Err(status::unavailable(Unavailable::Stopping)));
                }
                checked = &mut self.check, if open => match checked {
                    Ok(asked) => {
                        self.welcome = asked.unwrap_or(self.welcome);
                        let due = asked.unwrap_or_else(Instant::now) + WELCOME_EVERY;
                        self.check = Box::pin(check(self.sender.clone(), due));
                    }
                    Err(status) => self.close(status),
                },
                took = joined(&mut self.taking), if self.taking.is_some() => {
                    self.taking = None;
                    if let Some(acknowledgement) = self.took(took.unwrap_or_else(|_| Err(status::broken()))) {
                        return Some((Ok(acknowledgement), self));
                    }
                }
                Some((ticket, outcome)) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    self.bytes -= ticket.bytes;
                    match settled(ticket.event_id, ticket.signals, outcome) {
                        Ok(result) => return Some((Ok(acknowledgement(ticket.message_id, result)), self)),
                        Err(why) => self.close(status::unavailable(why)),
                    }
                }
                message = before(late, self.incoming.message()), if open && has_room && known => match message {
                    None => {}
                    Some(Ok(Some(message))) => if let Some(acknowledgement) = self.begin(message) {
                        return Some((Ok(acknowledgement), self));
                    },
                    Some(Ok(None)) => self.ending = Some(Ok(())),
                    Some(Err(status)) => self.close(status),
                },
            }
        }
        None
    }

    /// Takes a message, in a task of its own if that has to wait.
    fn begin(&mut self, message: StreamIngestRequest) -> Option<StreamIngestResponse> {
        let taking = AssertUnwindSafe(take(self.sender.clone(), message)).catch_unwind();
        let mut taking = Box::pin(taking.map(|took| {
            took.unwrap_or_else(|_| {
                tracing::error!("taking an event broke");
                Err(status::broken())
            })
        }));
        match (&mut taking).now_or_never() {
            Some(took) => self.took(took),
            None => {
                self.taking = Some(tokio::spawn(taking.in_current_span()));
                None
            }
        }
    }

    /// What was taken is on its way; what was not is told.
    fn took(&mut self, took: Result<Took, Status>) -> Option<StreamIngestResponse> {
        match took {
            Ok(Took::Refused(acknowledgement)) => return Some(acknowledgement),
            Ok(Took::Event(ticket, taken)) => {
                self.bytes += ticket.bytes;
                self.in_flight.push(Box::pin(async move { (ticket, taken.outcome().await) }));
            }
            Err(status) => self.close(status),
        }
        None
    }

    /// Reads no more, and ends with this status when all is finished. The first reason is the one that is told.
    fn close(&mut self, status: Status) {
        self.finish_by.get_or_insert_with(|| Instant::now() + FINISH);
        if !matches!(self.ending, Some(Err(_))) {
            self.ending = Some(Err(status));
        }
    }

    fn end(mut self, ending: Result<(), Status>) -> Option<(Result<StreamIngestResponse, Status>, Self)> {
        self.over = true;
        ending.err().map(|status| (Err(status), self))
    }
}

/// Checks a message and hands its event to the pipeline as soon as there is room.
async fn take(sender: Arc<Sender>, message: StreamIngestRequest) -> Result<Took, Status> {
    let StreamIngestRequest { message_id, event } = message;
    let refuse = |message_id, refused: Refused| Ok(Took::Refused(acknowledgement(message_id, refused.into())));
    let Some(event) = event else {
        let why = Rejection::of(RejectionReason::Missing, "event", "`event` is required: the event to store");
        return refuse(cut(message_id), Refused { id: String::new(), why });
    };
    // The site first: one that is not the sender's ends the stream, however long the message's id.
    let admitted = Admission::of(&sender).admit(&event, Utc::now()).await?;
    if message_id.len() > MAX_MESSAGE_ID {
        let message = format!("`message_id` is over {MAX_MESSAGE_ID} bytes");
        let why = Rejection::of(RejectionReason::TooLarge, "message_id", message);
        let id = convert::Envelope::of(&event).event_id();
        return refuse(cut(message_id), Refused { id, why });
    }
    let event: Event = match admitted {
        Ok(event) => event,
        Err(refused) => return refuse(message_id, refused),
    };
    let ticket = Ticket { message_id, event_id: event.id.to_string(), signals: event.signals, bytes: event.weight() };
    let taken = sender.state.pipeline.take_when_room(event).await.map_err(status::unavailable)?;
    Ok(Took::Event(ticket, taken))
}

fn acknowledgement(message_id: String, result: IngestResult) -> StreamIngestResponse {
    StreamIngestResponse { message_id, result: Some(result) }
}

/// At most as long as a message id may be, whole characters only.
fn cut(mut message_id: String) -> String {
    if message_id.len() > MAX_MESSAGE_ID {
        let end = (0..=MAX_MESSAGE_ID).rev().find(|at| message_id.is_char_boundary(*at)).unwrap_or(0);
        message_id.truncate(end);
    }
    message_id
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => pending().await,
    }
}

async fn joined<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match task {
        Some(task) => task.await,
        None => pending().await,
    }
}
