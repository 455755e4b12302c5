//! `CallsService`: calls in, matches and reviews out.
//!
//! What a request asks is read in `asked.rs`, what it is answered is written in `wire.rs`, `words.rs` has the enums of both. Pushes go
//! through `record.rs` to [`crate::calls`], which matches them. Reads and people's judgements happen under the policies of their caller.

use chrono::Utc;
use prost::Message;
use tonic::{Request, Response, Status};

use super::proto::calls_service_server::CallsService;
use super::proto::record_call_result::Outcome;
use super::proto::{
    self, GetCallRequest, GetCallResponse, ListCallsRequest, ListCallsResponse, RecordCallRequest, RecordCallResponse,
    RecordCallResult, RecordCallsRequest, RecordCallsResponse, Rejection, RejectionReason, ReviewCallRequest,
    ReviewCallResponse, WatchCallsRequest,
};
use super::status::{bad_request, unavailable};
use super::{GrpcState, access, page, watch};
use crate::calls::caller_key::CallerKey;
use crate::calls::{Decision, Failed};
use crate::domain::access::Caller;
use crate::domain::id::{CallId, SiteId};
use crate::domain::outcome::Unavailable;
use crate::domain::recorded::Call;
use crate::domain::refusal::Refusal;
use crate::store::calls as stored;
use crate::store::error::StoreError;
use crate::store::transaction::{Purpose, Transaction};
use asked::Which;
use record::Recorder;

mod asked;
mod record;
mod wire;
mod words;

/// Most calls of one request.
const MAX_CALLS: usize = 1000;

pub(super) struct Calls {
    state: GrpcState,
}

impl Calls {
    pub(super) fn new(state: GrpcState) -> Self {
        Self { state }
    }

    fn caller_key(&self) -> Result<&CallerKey, Status> {
        self.state.caller_key.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "calls cannot be recorded: the server was started without CALLER_KEY, by which callers' numbers are hashed",
            )
        })
    }

    /// A transaction that sees what the caller may see of a site.
    async fn read(&self, caller: &Caller, site: SiteId) -> Result<Transaction<'_>, Status> {
        self.state.store.begin(Purpose::Read(access::reader(caller, site))).await.map_err(unread)
    }

    async fn find(&self, caller: &Caller, site: SiteId, which: &Which) -> Result<Option<Call>, Status> {
        let tx = self.read(caller, site).await?;
        let found = match which {
            Which::Id(id) => stored::find(&tx, site, *id).await,
            Which::Key(key) => stored::find_by_key(&tx, key).await,
        };
        let found = found.map_err(unread)?;
        tx.commit().await.map_err(unread)?;
        Ok(found)
    }

    async fn judge(&self, caller: &Caller, site: SiteId, id: CallId, decision: &Decision) -> Result<Call, Status> {
        let (calls, signature) = (&self.state.calls, caller.signature());
        let user = match caller {
            Caller::Token { .. } => {
                let judged = calls.review(site, id, decision, &signature).await.map_err(unjudged)?;
                return judged.ok_or_else(no_such_call);
            }
            Caller::User { id } => *id,
        };
        let judged = calls.review_as(user, site, id, decision, &signature).await.map_err(unjudged)?;
        let Some(judged) = judged else {
            // Whoever sees the call hears that it is not theirs to judge; for all others there is none.
            let seen = self.find(caller, site, &Which::Id(id)).await?;
            let refusal = Status::permission_denied("your role on this site does not let you review calls");
            return Err(seen.map_or_else(no_such_call, |_| refusal));
        };
        match decision {
            Decision::Confirm(_) | Decision::Junk => Ok(judged),
            // It was matched again after the judgement was written. The judgement stands, whether that can be read now or not.
            Decision::Reopen => Ok(self.find(caller, site, &Which::Id(id)).await.ok().flatten().unwrap_or(judged)),
        }
    }
}

#[tonic::async_trait]
impl CallsService for Calls {
    type WatchCallsStream = watch::Answers<watch::Calls>;

    async fn record_call(&self, request: Request<RecordCallRequest>) -> Result<Response<RecordCallResponse>, Status> {
        let caller = access::caller(&request)?;
        let Some(call) = request.into_inner().call else {
            return Err(invalid(Refusal::missing("call", "the call to record")));
        };
        let recorder = Recorder { state: &self.state, key: self.caller_key()?, received_at: Utc::now() };
        let site = access::site(&self.state, &caller, "call.site", &call.site).await?;
        let refused = |rejection: Rejection| bad_request(vec![rejection.within("call")]);
        let push = recorder.read(&site, call).map_err(refused)?;
        let results = recorder.record(vec![Ok(push)]).await.map_err(unavailable)?;
        let result = results.into_iter().next().ok_or_else(|| unavailable(Unavailable::Database))?;
        let recorded = wire::recorded(&result.map_err(refused)?);
        Ok(Response::new(RecordCallResponse { recorded: Some(recorded) }))
    }

    async fn record_calls(
        &self,
        request: Request<RecordCallsRequest>,
    ) -> Result<Response<RecordCallsResponse>, Status> {
        let caller = access::caller(&request)?;
        let calls = request.into_inner().calls;
        let violation = match calls.len() {
            0 => Some((RejectionReason::Missing, "`calls` is required: at least one call".to_owned())),
            1..=MAX_CALLS => None,
            _ => Some((RejectionReason::OutOfRange, format!("`calls` has more than {MAX_CALLS} items"))),
        };
        if let Some((reason, message)) = violation {
            return Err(bad_request(vec![Rejection::of(reason, "calls", message)]));
        }
        let recorder = Recorder { state: &self.state, key: self.caller_key()?, received_at: Utc::now() };
        let admitted = recorder.admit(&caller, calls).await?;
        let results = recorder.record(admitted).await.map_err(unavailable)?;
        let outcomes = results.into_iter().map(|result| match result {
            Ok(recorded) => Outcome::Recorded(wire::recorded(&recorded)),
            Err(rejection) => Outcome::Rejected(rejection),
        });
        let results = outcomes.map(|outcome| RecordCallResult { outcome: Some(outcome) }).collect();
        Ok(Response::new(bounded(RecordCallsResponse { results })))
    }

    async fn get_call(&self, request: Request<GetCallRequest>) -> Result<Response<GetCallResponse>, Status> {
        let caller = access::caller(&request)?;
        let request = request.into_inner();
        let site = access::site(&self.state, &caller, "site", &request.site).await?;
        let which = asked::which(site.id, request.call).map_err(invalid)?;
        let found = self.find(&caller, site.id, &which).await?.ok_or_else(no_such_call)?;
        Ok(Response::new(GetCallResponse { call: Some(wire::call(&found)) }))
    }

    async fn list_calls(&self, request: Request<ListCallsRequest>) -> Result<Response<ListCallsResponse>, Status> {
        let caller = access::caller(&request)?;
        let request = request.into_inner();
        let site = access::site(&self.state, &caller, "site", &request.site).await?;
        let listing = asked::listing(&request).map_err(bad_request)?;
        let page = listing.page(site.id, &request.page_token, Utc::now()).map_err(|wrong| bad_request(vec![wrong]))?;

        let tx = self.read(&caller, site.id).await?;
        // One more than the page holds tells whether there is another.
        let limit = i64::from(listing.size) + 1;
        let found = stored::list(&tx, site.id, &page.filter, page.after, limit).await.map_err(unread)?;
        tx.commit().await.map_err(unread)?;
        let calls: Vec<proto::Call> = found.iter().take(listing.size.into()).map(wire::call).collect();
        let calls = page::fitting(calls, page::MAX_ANSWER);
        let last = if calls.len() < found.len() { calls.len().checked_sub(1).map(|at| &found[at]) } else { None };
        let next_page_token = last.map_or_else(String::new, |last| page.next(last));
        Ok(Response::new(ListCallsResponse { calls, next_page_token }))
    }

    async fn review_call(&self, request: Request<ReviewCallRequest>) -> Result<Response<ReviewCallResponse>, Status> {
        let caller = access::caller(&request)?;
        let request = request.into_inner();
        let site = access::site(&self.state, &caller, "site", &request.site).await?;
        let id = asked::call_id(&request.call_id).map_err(invalid)?;
        let decision = asked::decision(request.decision).map_err(invalid)?;
        let judged = self.judge(&caller, site.id, id, &decision).await?;
        Ok(Response::new(ReviewCallResponse { call: Some(wire::call(&judged)) }))
    }

    async fn watch_calls(
        &self,
        request: Request<WatchCallsRequest>,
    ) -> Result<Response<Self::WatchCallsStream>, Status> {
        watch::begin::<watch::Calls, _>(&self.state, request).await
    }
}

/// A call as it is stored.
pub(super) fn told(call: &Call) -> proto::Call {
    wire::call(call)
}

fn invalid(refusal: Refusal) -> Status {
    bad_request(vec![refusal.into()])
}

fn no_such_call() -> Status {
    Status::not_found("the site has no such call")
}

/// A read that failed says nothing of the request: it may be sent again.
fn unread(error: StoreError) -> Status {
    tracing::warn!(%error, "cannot read calls");
    unavailable(Unavailable::Database)
}

fn unjudged(failed: Failed) -> Status {
    match failed {
        Failed::Unavailable(why) => unavailable(why),
        Failed::Refused(error) => {
            tracing::error!(%error, "the database refuses a review");
            Status::failed_precondition("the database refuses this review")
        }
    }
}

/// An answer that may be sent: one that would be too large leaves out the candidates, which `GetCall` shows.
fn bounded(mut answer: RecordCallsResponse) -> RecordCallsResponse {
    if answer.encoded_len() <= page::MAX_ANSWER {
        return answer;
    }
    for result in &mut answer.results {
        if let Some(Outcome::Recorded(recorded)) = &mut result.outcome
            && let Some(found) = recorded.call.as_mut().and_then(|call| call.r#match.as_mut())
        {
            found.candidates = Vec::new();
        }
    }
    answer
}
