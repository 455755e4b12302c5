//! `ScoringService`: what signals and sessions are worth, and why.
//!
//! `ScoreSignals` is pure. What reads a site does so in one transaction under the policies of its caller, so that the parts of an answer
//! agree, and by partition key: a session cannot be asked for without its month.

use std::time::Duration;

use tonic::{Request, Response, Status};

use super::proto::scoring_service_server::ScoringService;
use super::proto::{
    GetSessionScoreRequest, GetSessionScoreResponse, ListTopSessionsRequest, ListTopSessionsResponse, Rejection,
    RejectionReason, ScoreSignalsRequest, ScoreSignalsResponse, SessionKey as WireKey, WatchSessionsRequest,
};
use super::status::{bad_request, unavailable};
use super::{GrpcState, access, convert, page, session, watch};
use crate::domain::id::{SessionId, SessionKey};
use crate::domain::month::Month;
use crate::domain::outcome::Unavailable;
use crate::domain::signal::MAX_SCORE;
use crate::domain::text::clean_some;
use crate::seats::Seats;
use crate::store::error::StoreError;
use crate::store::scoring::{self as reads, Place};
use crate::store::sessions;
use crate::store::transaction::Purpose;

mod evidence;
mod raised;

/// Longest session id of a request, bytes.
const MAX_SESSION_ID: usize = 128;

/// A page of the best sessions costs the database a walk through all sessions of the month: so many at once, and of a site one after the other ...
const LISTINGS: usize = 2;
/// ... for which nobody waits longer.
const LISTING_PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct Scoring {
    state: GrpcState,
    listings: Seats,
}

impl Scoring {
    pub(super) fn new(state: GrpcState) -> Self {
        Self { state, listings: Seats::new(LISTINGS, LISTING_PATIENCE) }
    }
}

#[tonic::async_trait]
impl ScoringService for Scoring {
    type WatchSessionsStream = watch::Answers<watch::Sessions>;

    async fn score_signals(
        &self,
        request: Request<ScoreSignalsRequest>,
    ) -> Result<Response<ScoreSignalsResponse>, Status> {
        let signals = raised::raised(&request.into_inner()).map_err(bad_request)?;
        Ok(Response::new(ScoreSignalsResponse { score: Some(convert::score(signals)) }))
    }

    async fn get_session_score(
        &self,
        request: Request<GetSessionScoreRequest>,
    ) -> Result<Response<GetSessionScoreResponse>, Status> {
        let caller = access::caller(&request)?;
        let key = request.into_inner().session.unwrap_or_default();
        let (month, id) = session_asked(&key).map_err(bad_request)?;
        let site = access::site(&self.state, &caller, "session.site_id", &key.site_id).await?;
        let key = SessionKey { site_id: site.id, month, id: SessionId::from_text(site.id, &id) };

        let tx = self.state.store.begin(Purpose::Read(access::reader(&caller, site.id))).await.map_err(unread)?;
        let answer = match sessions::find(&tx, key).await.map_err(unread)? {
            Some(session) => Some(evidence::of(&tx, &session).await.map_err(unread)?),
            None => None,
        };
        tx.commit().await.map_err(unread)?;
        let answer = answer.ok_or_else(|| Status::not_found("the site has no such session in that month"))?;
        Ok(Response::new(answer))
    }

    async fn list_top_sessions(
        &self,
        request: Request<ListTopSessionsRequest>,
    ) -> Result<Response<ListTopSessionsResponse>, Status> {
        let caller = access::caller(&request)?;
        let request = request.into_inner();
        let (month, min_score, size) = list_asked(&request).map_err(bad_request)?;
        let site = access::site(&self.state, &caller, "site", &request.site).await?;
        let pages = page::Pages::of("ListTopSessions", &(site.id, month, min_score));
        let after = pages.open(&request.page_token).map_err(|wrong| bad_request(vec![wrong]))?;

        let _seat = self.listings.take(site.id).await.ok_or_else(|| unavailable(Unavailable::Busy))?;
        let tx = self.state.store.begin(Purpose::Read(access::reader(&caller, site.id))).await.map_err(unread)?;
        // One more than the page holds tells whether there is another.
        let limit = i64::from(size) + 1;
        let found = reads::top(&tx, (site.id, month), min_score, after.unwrap_or(Place::START), limit).await;
        let found = found.map_err(unread)?;
        tx.commit().await.map_err(unread)?;
        let sessions: Vec<_> = found.iter().take(size.into()).map(|(_, found)| session::session(found)).collect();
        let sessions = page::fitting(sessions, page::MAX_ANSWER);
        let last = sessions.len().checked_sub(1).filter(|_| sessions.len() < found.len()).map(|at| &found[at]);
        let next_page_token = last.map_or_else(String::new, |(place, _)| pages.seal(place));
        Ok(Response::new(ListTopSessionsResponse { sessions, next_page_token }))
    }

    async fn watch_sessions(
        &self,
        request: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        watch::begin::<watch::Sessions, _>(&self.state, request).await
    }
}

/// A read that failed says nothing of the request: it may be sent again.
fn unread(error: StoreError) -> Status {
    tracing::warn!(%error, "cannot read sessions");
    unavailable(Unavailable::Database)
}

/// The month and the id of the session that is asked for, or all that is wrong with its key.
fn session_asked(key: &WireKey) -> Result<(Month, String), Vec<Rejection>> {
    let mut wrong = Vec::new();
    if key.site_id.trim().is_empty() {
        wrong.push(missing("session.site_id", "the site's public id or UUID"));
    }
    let month = month("session.session_month", &key.session_month).map_err(|bad| wrong.push(bad)).ok();
    let field = "session.session_id";
    // An event's session id is cleaned in the same way before it becomes a name.
    let id = match clean_some(&key.session_id, MAX_SESSION_ID) {
        _ if key.session_id.len() > MAX_SESSION_ID => {
            let message = format!("`{field}` is longer than {MAX_SESSION_ID} bytes");
            wrong.push(Rejection::of(RejectionReason::OutOfRange, field, message));
            None
        }
        None => {
            wrong.push(missing(field, "the session's id"));
            None
        }
        id => id,
    };
    month.zip(id).filter(|_| wrong.is_empty()).ok_or(wrong)
}

/// The month, the minimum score and the page size that are asked for, or all that is wrong with them.
fn list_asked(request: &ListTopSessionsRequest) -> Result<(Month, u8, u16), Vec<Rejection>> {
    let mut wrong = Vec::new();
    if request.site.trim().is_empty() {
        wrong.push(missing("site", "the site's public id or UUID"));
    }
    let month = month("session_month", &request.session_month).map_err(|bad| wrong.push(bad)).ok();
    let score = u8::try_from(request.min_score).ok().filter(|score| *score <= MAX_SCORE);
    if score.is_none() {
        let message = format!("`min_score` is more than {MAX_SCORE}");
        wrong.push(Rejection::of(RejectionReason::OutOfRange, "min_score", message));
    }
    let size = page::size(request.page_size).map_err(|bad| wrong.push(bad)).ok();
    match (month, score, size) {
        (Some(month), Some(score), Some(size)) if wrong.is_empty() => Ok((month, score, size)),
        _ => Err(wrong),
    }
}

fn missing(field: &'static str, what: &str) -> Rejection {
    Rejection::of(RejectionReason::Missing, field, format!("`{field}` is required: {what}"))
}

/// A month as the contract writes it, and in no other way.
pub(super) fn month(field: &'static str, text: &str) -> Result<Month, Rejection> {
    if text.is_empty() {
        return Err(missing(field, "the first day of the month, as YYYY-MM-01"));
    }
    let month = text.parse::<Month>().ok().filter(|month| month.to_string() == text);
    month.ok_or_else(|| {
        let message = format!("`{field}` is invalid: a month is its first day, as YYYY-MM-01");
        Rejection::of(RejectionReason::Invalid, field, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told<T>(asked: Result<T, Vec<Rejection>>) -> Vec<(RejectionReason, String)> {
        let wrong = asked.err().unwrap_or_default();
        wrong.into_iter().map(|violation| (violation.reason(), violation.field)).collect()
    }

    #[test]
    fn every_part_of_a_key_that_is_wrong_is_named() {
        let key = |site: &str, month: &str, id: &str| {
            session_asked(&WireKey { site_id: site.into(), session_month: month.into(), session_id: id.into() })
        };
        assert_eq!(key("a", "2026-11-01", " v\0_1 "), Ok(("2026-11-01".parse().expect("a month"), "v_1".into())));
        let parts = ["session.site_id", "session.session_month", "session.session_id"];
        let all = |reasons: [RejectionReason; 3]| reasons.into_iter().zip(parts.map(str::to_owned)).collect::<Vec<_>>();
        assert_eq!(told(key(" ", "", "\0 ")), all([RejectionReason::Missing; 3]));
        for bad in ["2026-11", "2026-11-02", "2026-11-01T00:00:00Z", " 2026-11-01", "2026-13-01", "soon"] {
            assert_eq!(told(key("a", bad, "v")), [(RejectionReason::Invalid, parts[1].to_owned())], "{bad}");
        }
        assert_eq!(told(key("a", "2026-11-01", &"x".repeat(128))), []);
        let long = told(key("a", "2026-11-01", &"x".repeat(129)));
        assert_eq!(long, [(RejectionReason::OutOfRange, parts[2].to_owned())]);
    }

    #[test]
    fn a_list_outside_its_bounds_is_refused() {
        let mut request = ListTopSessionsRequest {
            site: "a".to_owned(),
            session_month: "2026-11-01".to_owned(),
            min_score: 100,
            page_size: 500,
            page_token: String::new(),
        };
        assert_eq!(list_asked(&request).map(|(_, score, size)| (score, size)), Ok((100, 500)));
        (request.min_score, request.page_size) = (101, 501);
        let reason = RejectionReason::OutOfRange;
        assert_eq!(told(list_asked(&request)), [(reason, "min_score".to_owned()), (reason, "page_size".to_owned())]);
        (request.min_score, request.page_size) = (0, 0);
        assert_eq!(list_asked(&request).map(|(_, score, size)| (score, size)), Ok((0, 50)));
    }
}
