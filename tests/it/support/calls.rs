//! Calls from a few words.

use chrono::{DateTime, Utc};
use opsmantik::calls::caller_key::CallerKey;
use opsmantik::domain::call::{Direction, Status};
use opsmantik::domain::id::SiteId;
use opsmantik::domain::push::{Draft, Duration, Push};

/// The number that the tests' businesses have.
pub const BUSINESS: &str = "+12025550123";
/// The number that their callers have.
pub const CALLER: &str = "+12025550187";

/// By which the tests' servers hash callers' numbers.
pub const KEY: &str = "a key of the tests, which is long enough";

pub fn key() -> CallerKey {
    CallerKey::new(KEY).expect("long enough")
}

/// A push that tells the least: by its provider's id, at a time, from a known caller.
pub fn call(id: &str, at: DateTime<Utc>) -> Draft {
    Draft {
        provider: "twilio".to_owned(),
        provider_call_id: id.to_owned(),
        dialled_number: BUSINESS.to_owned(),
        caller_number: Some(CALLER.to_owned()),
        started_at: Some(at),
        ..Draft::default()
    }
}

pub fn with_fingerprint(call: Draft, fingerprint: &str) -> Draft {
    Draft { fingerprint: Some(fingerprint.to_owned()), ..call }
}

pub fn outbound(call: Draft) -> Draft {
    Draft { direction: Some(Direction::Outbound), ..call }
}

pub fn ended(call: Draft, status: Status, seconds: u32) -> Draft {
    Draft { status: Some(status), duration: Some(Duration::Seconds(seconds)), ..call }
}

/// As a door of site `site` would accept it at the time of the call.
pub fn push(site: SiteId, draft: Draft) -> Push {
    let at = draft.started_at.expect("a test's own call");
    Push::accept(site, draft, Some("US"), at, |number| key().hash(site, number)).expect("a whole draft")
}
