//! The one mapping from what happened to what is answered, for both doors.
//!
//! The edge and the worker must not disagree about what a *duplicate* or an *unavailable* is, so status, code and body of each are chosen
//! here, side by side. An error is `{"ok":false,"score":null,"error":code,"message":sentence,"field":name?}`; the code is for programs and never
//! changes, the sentence is for people and says no more than the sender knows.

use std::borrow::Cow;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use crate::domain::id::EventId;
use crate::domain::outcome::{DeathReason, Outcome, Unavailable};
use crate::domain::refusal::{Refusal, RefusalReason};
use crate::queue::Verdict;

/// QStash stops delivering a message that is answered with this status ...
const NON_RETRYABLE: u16 = 489;
/// ... and this header.
const NON_RETRYABLE_HEADER: HeaderName = HeaderName::from_static("upstash-nonretryable-error");

/// Why a request, or one event of it, was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    message: Cow<'static, str>,
    field: Option<Cow<'static, str>>,
    retry_after: Option<Duration>,
    allow: Option<&'static str>,
    hang_up: bool,
    non_retryable: bool,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            field: None,
            retry_after: None,
            allow: None,
            hang_up: false,
            non_retryable: false,
        }
    }

    pub fn origin_required() -> Self {
        Self::new(StatusCode::FORBIDDEN, "origin_required", "the request has no Origin header")
    }

    pub fn origin_not_allowed() -> Self {
        Self::new(StatusCode::FORBIDDEN, "origin_not_allowed", "this origin may not send events for this site")
    }

    pub fn method_not_allowed(allow: &'static str) -> Self {
        let message = format!("this address takes {allow}");
        Self { allow: Some(allow), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message) }
    }

    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address")
    }

    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("the body is over {} KiB", limit / 1024);
        let field = Some("body".into());
        Self { field, hang_up: true, ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message) }
    }

    pub fn body_too_slow() -> Self {
        let message = "the body did not arrive in time";
        Self { hang_up: true, ..Self::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message) }
    }

    /// The bodies of others fill the room.
    pub fn no_room() -> Self {
        Self { hang_up: true, ..Unavailable::Busy.into() }
    }

    pub fn body_broken() -> Self {
        Self { hang_up: true, ..Self::new(StatusCode::BAD_REQUEST, "body_broken", "the body ended before its end") }
    }

    pub fn encoded_body() -> Self {
        let message = "the body is compressed; send it as it is, without Content-Encoding";
        let field = Some("Content-Encoding".into());
        Self { field, hang_up: true, ..Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoded_body", message) }
    }

    pub fn rate_limited(wait: Duration) -> Self {
        let message = "too many requests from this address for this site";
        Self { retry_after: Some(wait), ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message) }
    }

    pub fn signature() -> Self {
        let message = "the signature of this delivery is missing or wrong";
        Self::new(StatusCode::UNAUTHORIZED, "bad_signature", message)
    }

    /// Our own fault, found by the runtime.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "something broke here; it has been logged")
    }

    /// A delivery that must not come again.
    pub fn undeliverable(reason: DeathReason) -> Self {
        let status = StatusCode::from_u16(NON_RETRYABLE).unwrap_or(StatusCode::UNPROCESSABLE_ENTITY);
        Self { status, non_retryable: true, field: None, ..Self::from(reason) }
    }

    pub fn is_server_side(&self) -> bool {
        self.status.is_server_error()
    }

    pub fn code(&self) -> &'static str {
        self.code
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal.reason {
            RefusalReason::InvalidJson
            | RefusalReason::MissingField
            | RefusalReason::InvalidField
            | RefusalReason::OutOfRange => StatusCode::BAD_REQUEST,
            RefusalReason::EventTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            RefusalReason::UnknownSite => StatusCode::NOT_FOUND,
        };
        Self { field: Some(refusal.field), ..Self::new(status, refusal.reason.code(), refusal.message) }
    }
}

impl From<DeathReason> for Problem {
    fn from(reason: DeathReason) -> Self {
        let message = match reason {
            DeathReason::RefusedByDatabase => "the database refuses this event; it has been put aside",
            DeathReason::UnknownSite => "no site has this id; the event has been put aside",
            DeathReason::MalformedJob => "this is no event that can be stored; it has been put aside",
        };
        match reason {
            // As for a site that nobody ever knew; this one was removed a moment ago.
            DeathReason::UnknownSite => {
                Self { field: Some("s".into()), ..Self::new(StatusCode::NOT_FOUND, reason.code(), message) }
            }
            DeathReason::RefusedByDatabase | DeathReason::MalformedJob => {
                Self::new(StatusCode::BAD_REQUEST, reason.code(), message)
            }
        }
    }
}

impl From<Unavailable> for Problem {
    fn from(unavailable: Unavailable) -> Self {
        let message = "the event cannot be stored now; send it again after Retry-After seconds";
        let retry_after = Some(unavailable.retry_after());
        Self { retry_after, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, unavailable.code(), message) }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut body = json!({"ok": false, "score": null, "error": self.code, "message": self.message});
        if let Some(field) = self.field {
            body["field"] = json!(field);
        }
        let mut response = json_response(self.status, &body);
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.hang_up {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if self.non_retryable {
            headers.insert(NON_RETRYABLE_HEADER, HeaderValue::from_static("true"));
        }
        response
    }
}

/// What is said of one event, at either door.
struct Said {
    status: StatusCode,
    name: &'static str,
    score: Option<u8>,
}

fn said(verdict: Verdict) -> Result<Said, Problem> {
    match verdict {
        Verdict::Final(Outcome::Stored(receipt)) => {
            Ok(Said { status: StatusCode::OK, name: "stored", score: Some(receipt.score().get()) })
        }
        Verdict::Final(Outcome::Duplicate(receipt)) => {
            Ok(Said { status: StatusCode::OK, name: "duplicate", score: Some(receipt.score().get()) })
        }
        Verdict::Queued => Ok(Said { status: StatusCode::ACCEPTED, name: "queued", score: None }),
        Verdict::Final(Outcome::Dead(reason)) => Err(reason.into()),
        Verdict::Final(Outcome::Unavailable(unavailable)) => Err(unavailable.into()),
    }
}

/// The edge's answer to a single event.
pub fn to_one(id: EventId, verdict: Verdict) -> Result<Response, Problem> {
    let said = said(verdict)?;
    Ok(json_response(said.status, &json!({"ok": true, "status": said.name, "score": said.score, "id": id})))
}

/// What became of one event of a batch.
#[derive(Debug)]
pub enum Fate {
    /// It was not accepted; the id is the sender's own, if there was one.
    Refused(Option<EventId>, Refusal),
    /// It was handed over.
    HandedOver(EventId, Verdict),
}

/// The edge's answer to a batch. If one event cannot be stored now, the whole batch is to be sent again: a second copy of the others
/// changes nothing.
pub fn to_batch(fates: Vec<Fate>) -> Result<Response, Problem> {
    let mut status = StatusCode::OK;
    let mut results = Vec::with_capacity(fates.len());
    for fate in fates {
        let (id, said) = match fate {
            Fate::Refused(id, refusal) => (id, Err(Problem::from(refusal))),
            Fate::HandedOver(id, verdict) => (Some(id), said(verdict)),
        };
        results.push(match said {
            Ok(said) => {
                status = status.max(said.status);
                json!({"id": id, "status": said.name, "score": said.score})
            }
            Err(problem) if problem.is_server_side() => return Err(problem),
            Err(Problem { code, message, .. }) => {
                json!({"id": id, "status": "rejected", "error": code, "message": message})
            }
        });
    }
    Ok(json_response(status, &json!({"ok": true, "results": results})))
}

/// The worker's answer to a delivery, which may hold several events: 503 if one has to come again, 489 if one never can be stored.
pub fn to_delivery(outcomes: &[Outcome]) -> Result<Response, Problem> {
    let mut dead = None;
    let mut status = "duplicate";
    for outcome in outcomes {
        match *outcome {
            Outcome::Dead(reason) => dead = Some(reason),
            outcome => {
                if said(Verdict::Final(outcome))?.name == "stored" {
                    status = "stored";
                }
            }
        }
    }
    match dead {
        Some(reason) => Err(Problem::undeliverable(reason)),
        None => Ok(json_response(StatusCode::OK, &json!({"ok": true, "status": status}))),
    }
}

/// JSON that nobody keeps.
pub fn json_response(status: StatusCode, body: &(impl Serialize + ?Sized)) -> Response {
    let text = serde_json::to_string(body).unwrap_or_else(|_| Value::Null.to_string());
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (status, headers, text).into_response()
}
