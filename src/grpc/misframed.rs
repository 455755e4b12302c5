//! Frames that are none are the caller's mistake: INVALID_ARGUMENT, where tonic says INTERNAL.
//!
//! tonic finds them before any of our code sees the message, and has no other mark for them than its words. They are known here by
//! their beginnings; a test with a real broken frame for each notices when tonic changes them.

use http::HeaderMap;
use tonic::{Code, Status};

use super::proto::{Rejection, RejectionReason};
use super::status::bad_request;

/// How tonic's words begin, and ours.
const MISTAKES: [(&str, &str); 5] = [
    ("Error decompressing: ", "a message cannot be unpacked as `grpc-encoding` says"),
    (
        "protocol error: received message with compressed-flag",
        "a message is compressed, and no `grpc-encoding` says how",
    ),
    ("protocol error: received message with invalid compression flag", "a message is neither compressed nor plain"),
    ("Unexpected EOF decoding stream", "the request ends in the middle of a message"),
    ("Missing request message", "the request has no message"),
];

/// Puts the right status in the place of tonic's, in an answer's head or trailers.
pub(super) fn set_right(headers: &mut HeaderMap) {
    let Some(code) = headers.get(Status::GRPC_STATUS) else { return };
    if Code::from_bytes(code.as_bytes()) != Code::Internal {
        return;
    }
    let Some(told) = Status::from_header_map(headers) else { return };
    let Some((_, ours)) = MISTAKES.iter().find(|(theirs, _)| told.message().starts_with(theirs)) else { return };
    let status = bad_request(vec![Rejection::of(RejectionReason::Invalid, "", *ours)]);
    if let Err(error) = status.add_header(headers) {
        tracing::error!(%error, "a status of our own cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_frames_are_the_callers_mistake() {
        let after = |status: Status| {
            let mut headers = HeaderMap::new();
            status.add_header(&mut headers).expect("a test's own");
            set_right(&mut headers);
            Status::from_header_map(&headers).map(|status| (status.code(), status.message().to_owned()))
        };
        for (theirs, ours) in MISTAKES {
            let told = after(Status::internal(format!("{theirs} and more")));
            assert_eq!(told, Some((Code::InvalidArgument, ours.to_owned())));
        }
        for other in [Status::internal("something broke here"), Status::unknown(MISTAKES[0].0), Status::ok("")] {
            assert_eq!(after(other.clone()), Some((other.code(), other.message().to_owned())));
        }
    }
}
