//! A call: what its provider's pushes add up to.
//!
//! A provider tells of one call many times, in any order, and repeats itself. [`Told`] is the merge of those pushes:
//! commutative, associative, idempotent, so that the stored call is a function of the set of pushes. A push adds what it
//! knows and takes nothing away; where two differ, each field has a rule that does not ask which came first. Enums are
//! ordered as in the contract, texts by their bytes.

use chrono::{DateTime, Utc};

use super::id::{CallId, SiteId};
use super::push::Push;
use super::refusal::Refusal;
use super::telephone::E164;

/// Longest id that a provider may give a call, in bytes: three texts make the unique index, whose entries are bounded.
const MAX_PROVIDER_CALL_ID: usize = 256;
const MAX_PROVIDER: usize = 64;

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// All of them, ascending.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name in the tables.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($text => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

named_enum!(
    /// How a call was made.
    Channel {
        /// A telephone call; also what a call is until a push says otherwise.
        Phone = "PHONE",
        /// A WhatsApp call or chat.
        Whatsapp = "WHATSAPP",
    }
);
named_enum!(
    /// Who called whom.
    Direction {
        /// The visitor called; also what a call is until a push says otherwise.
        Inbound = "INBOUND",
        /// The business called. Never matched.
        Outbound = "OUTBOUND",
    }
);
named_enum!(
    /// How far a call has come. It only moves up; everything from `Failed` on is an end.
    Status {
        Ringing = "RINGING",
        InProgress = "IN_PROGRESS",
        Failed = "FAILED",
        Busy = "BUSY",
        NoAnswer = "NO_ANSWER",
        Voicemail = "VOICEMAIL",
        Completed = "COMPLETED",
    }
);
named_enum!(
    /// How a call found its visit.
    MatchMethod {
        /// No session fits.
        Unmatched = "UNMATCHED",
        /// Several fit too closely to choose.
        Ambiguous = "AMBIGUOUS",
        /// One clicked on the dialled number.
        Click = "CLICK",
        /// One has the fingerprint that the call brought.
        Fingerprint = "FINGERPRINT",
    }
);
named_enum!(
    /// What a person has said about a call.
    ReviewStatus {
        /// Nothing yet, or nothing any more.
        Open = "OPEN",
        /// A real lead.
        Confirmed = "CONFIRMED",
        /// Not a lead.
        Junk = "JUNK",
    }
);
named_enum!(
    /// Whose id of a click it is, by the name of the page's parameter.
    ClickIdKind {
        Gclid = "gclid",
        Wbraid = "wbraid",
        Gbraid = "gbraid",
        Gclsrc = "gclsrc",
        Dclid = "dclid",
        Fbclid = "fbclid",
        Ttclid = "ttclid",
        Msclkid = "msclkid",
    }
);

impl MatchMethod {
    /// Whether a session is credited.
    pub const fn credits(self) -> bool {
        match self {
            Self::Click | Self::Fingerprint => true,
            Self::Unmatched | Self::Ambiguous => false,
        }
    }
}

/// A call's identity: pushed once or five times, it is one call.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallKey {
    site_id: SiteId,
    provider: String,
    provider_call_id: String,
}

impl CallKey {
    /// Checks what a client sent as `key`. The provider's name is lowered; its id of the call is kept to the letter.
    pub fn new(site_id: SiteId, provider: &str, provider_call_id: &str) -> Result<Self, Refusal> {
        const PROVIDER: &str = "key.provider";
        const ID: &str = "key.provider_call_id";
        if provider.is_empty() {
            return Err(Refusal::missing(PROVIDER, "the provider's name"));
        }
        if !provider.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
            return Err(Refusal::invalid(PROVIDER, "it may have the letters a to z, digits, `-` and `_`"));
        }
        if provider.len() > MAX_PROVIDER {
            return Err(Refusal::out_of_range(PROVIDER, "it may have 64 characters"));
        }
        // A blank id is a template that was not filled in, and would make all calls one.
        if provider_call_id.trim().is_empty() {
            return Err(Refusal::missing(ID, "the provider's id of the call"));
        }
        if provider_call_id.contains('\0') {
            return Err(Refusal::invalid(ID, "it has a NUL character"));
        }
        if provider_call_id.len() > MAX_PROVIDER_CALL_ID {
            return Err(Refusal::out_of_range(ID, "it may have 256 bytes"));
        }
        let (provider, provider_call_id) = (provider.to_ascii_lowercase(), provider_call_id.to_owned());
        Ok(Self { site_id, provider, provider_call_id })
    }

    /// A key as it is stored, whoever wrote it.
    pub fn stored(site_id: SiteId, provider: String, provider_call_id: String) -> Self {
        Self { site_id, provider, provider_call_id }
    }

    pub fn site_id(&self) -> SiteId {
        self.site_id
    }

    pub fn provider(&self) -> &str {
        &self.provider
    }

    pub fn provider_call_id(&self) -> &str {
        &self.provider_call_id
    }

    /// The id that the call has, or would have.
    pub fn call_id(&self) -> CallId {
        CallId::derived(self.site_id, &self.provider, &self.provider_call_id)
    }
}

/// Who called, as far as it is kept. Ordered by the hash; equal hashes are one number and have the same digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Caller {
    /// The keyed hash of the number in E.164.
    pub hash: [u8; 32],
    /// The number's last digits.
    pub last_digits: String,
}

/// One click id with its kind. Ordered by kind, then by text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClickId {
    pub kind: ClickIdKind,
    pub value: String,
}

/// What all pushes of one call have told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The greater.
    pub channel: Channel,
    /// The greater.
    pub direction: Direction,
    /// The business's number: the smaller text.
    pub dialled: E164,
    /// The smaller hash, and its digits. None: anonymous.
    pub caller: Option<Caller>,
    /// The earlier, in whole microseconds.
    pub started_at: DateTime<Utc>,
    /// The longer, in seconds. None: not known, which is not 0.
    pub duration_sec: Option<u32>,
    /// The greater.
    pub status: Option<Status>,
    /// The smaller text.
    pub recording: Option<String>,
    /// The smaller text.
    pub fingerprint: Option<String>,
    /// The smaller kind, then the smaller text.
    pub click_id: Option<ClickId>,
}

impl Told {
    /// What a first push tells.
    pub fn begin(push: Push) -> Self {
        Self {
            channel: push.channel.unwrap_or(Channel::Phone),
            direction: push.direction.unwrap_or(Direction::Inbound),
            dialled: push.dialled,
            caller: push.caller,
            started_at: push.started_at,
            duration_sec: push.duration_sec,
            status: push.status,
            recording: push.recording,
            fingerprint: push.fingerprint,
            click_id: push.click_id,
        }
    }

    /// Adds a push of the same call. True when it told something new.
    pub fn merge(&mut self, push: Push) -> bool {
        let merged = self.clone().union(Self::begin(push));
        let changed = *self != merged;
        *self = merged;
        changed
    }

    /// What both have told.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            channel: self.channel.max(other.channel),
            direction: self.direction.max(other.direction),
            dialled: self.dialled.min(other.dialled),
            caller: smaller(self.caller, other.caller),
            started_at: self.started_at.min(other.started_at),
            duration_sec: self.duration_sec.max(other.duration_sec),
            status: self.status.max(other.status),
            recording: smaller(self.recording, other.recording),
            fingerprint: smaller(self.fingerprint, other.fingerprint),
            click_id: smaller(self.click_id, other.click_id),
        }
    }
}

/// The smaller of what is known. (`Option`'s own order puts None first.)
fn smaller<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (known, None) | (None, known) => known,
    }
}

#[cfg(test)]
#[path = "call_tests.rs"]
mod tests;
