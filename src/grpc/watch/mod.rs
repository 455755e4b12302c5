//! The Watch RPCs: what a site has, and then what happens to it.
//!
//! One watch for all three tables ([`rows`]): [`watcher`] tells, from the pages of the tables and from the log ([`sources`]), what
//! [`coverage`] calls news, and [`token`] says where a client stands after each message. A watch runs in a task of its own, which a client
//! that does not read holds up, and which costs no more than the messages on their way and one page of rows.
//!
//! Here is what surrounds it: who may watch, and for how long, and how a watch ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tracing::Instrument;

use super::call::Deadline;
use super::proto::{Rejection, RejectionReason, WatchCallsRequest, WatchEventsRequest, WatchSessionsRequest};
use super::{GrpcState, access, status};
use crate::access::{Admission, Denied};
use crate::domain::access::Caller;
use crate::domain::month::Month;
use crate::domain::outcome::Unavailable;
use crate::domain::site::Site;
use crate::feed::FeedError;
pub(super) use rows::{Calls, Events, Sessions, Watched};
use sources::{Stored, Unread};
use token::Tokens;
use watcher::{End, Scope, Watcher};

mod coverage;
mod rows;
mod sources;
#[cfg(test)]
mod tests;
mod token;
mod watcher;

/// Messages that wait for the client to take them.
const WAITING: usize = 4;
/// How often a watch asks whether its caller is still welcome.
const WELCOME_EVERY: Duration = Duration::from_secs(2);
/// Every so many of these times it asks as well whether the site is still theirs.
const SITE_EVERY: u32 = 2;
/// So many questions in a row may stay without an answer.
const UNCHECKED: u32 = 3;
/// The log is not waited for any longer. Shorter than a call's bound.
const SUBSCRIBE: Duration = Duration::from_secs(12);
/// When to come back after a watch has ended for no fault of the client's.
const RETRY: Duration = Duration::from_secs(1);
/// `reason` and `domain` of the `google.rpc.ErrorInfo` for a client that was cut off.
const SLOW_WATCHER: &str = "SLOW_WATCHER";
const ERROR_DOMAIN: &str = "opsmantik";

/// The messages of a watch, and the status that ends it.
pub(super) type Answers<W> = BoxStream<'static, Result<<W as Watched>::Answer, Status>>;

/// What a request asks to watch.
pub(super) struct Asked {
    pub(super) site: String,
    pub(super) session_month: Option<String>,
    pub(super) resume_token: Option<String>,
}

/// Who watches, and until when.
struct Watching {
    state: GrpcState,
    caller: Arc<Caller>,
    proof: Admission,
    deadline: Option<Instant>,
    site: Arc<Site>,
}

/// Begins a watch.
pub(super) async fn begin<W: Watched, M: Into<Asked>>(
    state: &GrpcState,
    request: Request<M>,
) -> Result<Response<Answers<W>>, Status> {
    let (caller, proof) = (access::caller(&request)?, access::admission(&request)?);
    let deadline = request.extensions().get::<Deadline>().map(|deadline| deadline.0);
    let asked: Asked = request.into_inner().into();
    let month = asked.session_month.as_deref().map(|text| super::scoring::month("session_month", text));
    let month: Option<Month> = month.transpose().map_err(|wrong| status::bad_request(vec![wrong]))?;
    let site = access::site(state, &caller, "site", &asked.site).await?;
    // A client's own way to say that it has none.
    let token = asked.resume_token.filter(|token| !token.is_empty());
    let resume = match token {
        None => None,
        Some(token) => {
            let mark = Tokens::of(W::TABLE.name(), site.id.as_uuid(), month).open(&token);
            Some((mark.ok_or_else(damaged)?, token))
        }
    };
    let subscribed = timeout(SUBSCRIBE, state.feed.subscribe(W::TABLE, site.id)).await;
    let log = subscribed.unwrap_or(Err(FeedError::Away)).map_err(no_feed)?;

    let (out, answers) = mpsc::channel(WAITING);
    let tables = Stored { store: state.store.clone(), reader: access::reader(&caller, site.id), site: site.id };
    let scope = Scope { site: site.id, month };
    let watcher = Watcher::<W, _, _>::new(scope, log, tables, out.clone());
    let watching = Watching { state: state.clone(), caller, proof, deadline, site };
    let (ending, ended) = oneshot::channel();
    let task = async move {
        let status = tokio::select! {
            end = watcher.run(resume) => ended_by(end),
            status = watching.ends() => Some(status),
            () = out.closed() => None,
        };
        if let Some(status) = status {
            // Nobody hears it who has hung up.
            let _ = ending.send(status);
        }
    };
    tokio::spawn(task.in_current_span());
    Ok(Response::new(told(answers, ended)))
}

/// What the task of a watch says, and in the end how it ended.
fn told<A: Send + 'static>(
    answers: mpsc::Receiver<A>,
    ended: oneshot::Receiver<Status>,
) -> BoxStream<'static, Result<A, Status>> {
    let answers = stream::unfold(answers, |mut answers| async move { Some((Ok(answers.recv().await?), answers)) });
    let end = stream::once(ended).filter_map(async |status| {
        // A task that ends without a word has broken.
        Some(Err(status.unwrap_or_else(|_| status::broken())))
    });
    answers.chain(end).boxed()
}

impl Watching {
    /// Resolves when the watch has to end, whatever it tells.
    async fn ends(self) -> Status {
        tokio::select! {
            () = until(self.deadline) => Status::deadline_exceeded("the watch did not end within its deadline"),
            () = self.state.stop.cancelled() => status::unavailable(Unavailable::Stopping),
            status = self.unwelcome() => status,
        }
    }

    /// Resolves when the caller is no longer welcome.
    async fn unwelcome(&self) -> Status {
        let mut unchecked = 0;
        for round in 1u32.. {
            sleep(WELCOME_EVERY).await;
            match self.check(round % SITE_EVERY == 0).await {
                Ok(()) => unchecked = 0,
                Err(status) if status.code() != Code::Unavailable => return status,
                // Nobody can tell now; but not for long.
                Err(status) => {
                    unchecked += 1;
                    if unchecked >= UNCHECKED {
                        return status;
                    }
                }
            }
        }
        status::unavailable(Unavailable::Stopping)
    }

    async fn check(&self, site_too: bool) -> Result<(), Status> {
        self.proof.renew().await.map_err(|denied: Denied| access::denied(denied))?;
        match *self.caller {
            Caller::User { .. } if site_too => {
                access::site(&self.state, &self.caller, "site", &self.site.id.to_string()).await.map(drop)
            }
            Caller::User { .. } | Caller::Token { .. } => Ok(()),
        }
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

fn damaged() -> Status {
    let message = "`resume_token` is invalid: send the latest token of a watch of the same RPC, site and month";
    status::bad_request(vec![Rejection::of(RejectionReason::Invalid, "resume_token", message)])
}

fn come_back(message: &str) -> Status {
    Status::with_error_details(Code::Unavailable, message, ErrorDetails::with_retry_info(Some(RETRY)))
}

fn no_feed(error: FeedError) -> Status {
    match error {
        FeedError::Unfit(why) => Status::failed_precondition(why),
        FeedError::Held => come_back(
            "transactions that write, or that are prepared, hold up the reading of the change log; begin the watch again",
        ),
        FeedError::Away => come_back("the change log of the database cannot be read now; begin the watch again"),
        FeedError::Full => come_back("as many watch as this server has room for; begin the watch again"),
    }
}

/// What a client hears of an end; nothing if it is gone.
fn ended_by(end: End) -> Option<Status> {
    match end {
        End::Slow { token } => {
            let metadata = HashMap::from([("resume_token".to_owned(), token)]);
            let details = ErrorDetails::with_error_info(SLOW_WATCHER, ERROR_DOMAIN, metadata);
            let message = "the watch is read too slowly and was cut off; resume from the last token received";
            Some(Status::with_error_details(Code::ResourceExhausted, message, details))
        }
        End::Away => Some(come_back("the change log of the database broke off; resume from the last token received")),
        End::Unread(Unread::Database) => {
            Some(come_back("the database does not answer; resume from the last token received"))
        }
        End::Unread(Unread::NotYours) => Some(access::not_yours()),
        End::Gone => None,
    }
}

impl From<WatchEventsRequest> for Asked {
    fn from(WatchEventsRequest { site, session_month, resume_token }: WatchEventsRequest) -> Self {
        Self { site, session_month, resume_token }
    }
}

impl From<WatchSessionsRequest> for Asked {
    fn from(WatchSessionsRequest { site, session_month, resume_token }: WatchSessionsRequest) -> Self {
        Self { site, session_month, resume_token }
    }
}

impl From<WatchCallsRequest> for Asked {
    fn from(WatchCallsRequest { site, resume_token }: WatchCallsRequest) -> Self {
        Self { site, session_month: None, resume_token }
    }
}
