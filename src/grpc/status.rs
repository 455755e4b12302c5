//! The one mapping from what went wrong to what a caller is told.
//!
//! What is wrong with an item is a [`Rejection`]; a whole request that cannot be understood is INVALID_ARGUMENT with the same words as
//! `google.rpc.BadRequest` violations; what may be tried again is UNAVAILABLE with a `google.rpc.RetryInfo`. Inner errors stay in the log.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::proto::{Rejection, RejectionReason};
use crate::domain::outcome::{DeathReason, Unavailable};
use crate::domain::refusal::{Refusal, RefusalReason};

/// Most violations that one status tells: they travel in trailers, which clients bound to a few KiB.
pub(super) const MAX_VIOLATIONS: usize = 16;

impl Rejection {
    pub(super) fn of(reason: RejectionReason, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), field: field.into(), message: message.into() }
    }

    /// The same of the message in `parent`, as a refusal of the whole request names it.
    pub(super) fn within(self, parent: &str) -> Self {
        if self.field.is_empty() {
            return Self { field: parent.to_owned(), ..self };
        }
        let field = format!("{parent}.{}", self.field);
        let message = self.message.replacen(&format!("`{}`", self.field), &format!("`{field}`"), 1);
        Self { reason: self.reason, field, message }
    }
}

impl From<Refusal> for Rejection {
    fn from(refusal: Refusal) -> Self {
        let reason = match refusal.reason {
            RefusalReason::MissingField => RejectionReason::Missing,
            RefusalReason::InvalidField | RefusalReason::InvalidJson => RejectionReason::Invalid,
            RefusalReason::OutOfRange => RejectionReason::OutOfRange,
            RefusalReason::EventTooLarge => RejectionReason::TooLarge,
            RefusalReason::UnknownSite => RejectionReason::UnknownSite,
        };
        Self::of(reason, refusal.field, refusal.message)
    }
}

impl From<DeathReason> for Rejection {
    fn from(reason: DeathReason) -> Self {
        let (field, message) = match reason {
            DeathReason::RefusedByDatabase | DeathReason::MalformedJob => {
                ("", "the database refuses it; it is kept among the dead letters")
            }
            DeathReason::UnknownSite => {
                ("site", "the site was removed while it came in; it is kept among the dead letters")
            }
        };
        Self::of(RejectionReason::Unstorable, field, message)
    }
}

/// INVALID_ARGUMENT: the request cannot be understood, for these reasons.
pub(super) fn bad_request(violations: Vec<Rejection>) -> Status {
    let summary = match violations.as_slice() {
        [only] => only.message.clone(),
        [first, rest @ ..] => format!("{} (and {} more)", first.message, rest.len()),
        [] => "the request cannot be understood".to_owned(),
    };
    let violations = violations.into_iter().take(MAX_VIOLATIONS).map(|violation| FieldViolation {
        reason: violation.reason().as_str_name().to_owned(),
        field: violation.field,
        description: violation.message,
        localized_message: None,
    });
    let details = ErrorDetails::with_bad_request(violations.collect::<Vec<_>>());
    Status::with_error_details(Code::InvalidArgument, summary, details)
}

/// A task of ours broke. Its panic is in the log, and no caller's business.
pub(super) fn broken() -> Status {
    Status::internal("something broke here; it has been logged")
}

/// UNAVAILABLE: nothing was promised; try again.
pub(super) fn unavailable(why: Unavailable) -> Status {
    let message = match why {
        Unavailable::Busy => "the server is busy; send the request again",
        Unavailable::Database => "the database is away or cannot write now; send the request again",
        Unavailable::Partition => "the month's partition is being made; send the request again",
        Unavailable::Stopping => "the server is stopping; send the request again",
    };
    Status::with_error_details(Code::Unavailable, message, ErrorDetails::with_retry_info(Some(why.retry_after())))
}
