//! Why an event or a call is not accepted at the door: a closed list, each with the field that is wrong.

use std::borrow::Cow;
use std::fmt;

/// What is wrong with it. The reasons are the public error codes of `/api/sync` and of gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// The body is not JSON (or nested too deeply to be read).
    InvalidJson,
    /// A required field is absent, null or empty.
    MissingField,
    /// A field has the wrong type or value.
    InvalidField,
    /// A field can be read and lies outside its bound.
    OutOfRange,
    /// One event is over 64 KiB.
    EventTooLarge,
    /// No site has this id.
    UnknownSite,
}

impl RefusalReason {
    /// The stable code that clients compare.
    pub const fn code(self) -> &'static str {
        match self {
            Self::InvalidJson => "invalid_json",
            Self::MissingField => "missing_field",
            Self::InvalidField => "invalid_field",
            Self::OutOfRange => "out_of_range",
            Self::EventTooLarge => "event_too_large",
            Self::UnknownSite => "unknown_site",
        }
    }
}

/// An event or a call was not accepted; `field` names the offender in the caller's own vocabulary (`s`, `u`, `events[3].sid`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Refusal {
    pub reason: RefusalReason,
    pub field: Cow<'static, str>,
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Refusal {
    pub fn missing(field: impl Into<Cow<'static, str>>, what: &str) -> Self {
        let field = field.into();
        Self { reason: RefusalReason::MissingField, message: format!("`{field}` is required: {what}"), field }
    }

    pub fn invalid(field: impl Into<Cow<'static, str>>, what: &str) -> Self {
        let field = field.into();
        Self { reason: RefusalReason::InvalidField, message: format!("`{field}` is invalid: {what}"), field }
    }

    pub fn out_of_range(field: impl Into<Cow<'static, str>>, bound: &str) -> Self {
        let field = field.into();
        Self { reason: RefusalReason::OutOfRange, message: format!("`{field}` is out of range: {bound}"), field }
    }

    pub fn json(what: impl fmt::Display) -> Self {
        Self {
            reason: RefusalReason::InvalidJson,
            field: "body".into(),
            message: format!("the body is not JSON: {what}"),
        }
    }

    pub fn too_large(field: impl Into<Cow<'static, str>>, limit: usize) -> Self {
        let field = field.into();
        Self { reason: RefusalReason::EventTooLarge, message: format!("`{field}` is over {} KiB", limit / 1024), field }
    }

    pub fn unknown_site(field: impl Into<Cow<'static, str>>) -> Self {
        let field = field.into();
        Self { reason: RefusalReason::UnknownSite, message: format!("`{field}` names no known site"), field }
    }

    /// The same refusal of the event at `index` of a batch.
    pub fn within(self, list: &str, index: usize) -> Self {
        let field = format!("{list}[{index}].{}", self.field);
        let message = self.message.replacen(&format!("`{}`", self.field), &format!("`{field}`"), 1);
        Self { reason: self.reason, field: field.into(), message }
    }
}
