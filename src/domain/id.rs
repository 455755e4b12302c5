//! Identifiers. Each is a type of its own with a private inside, so that a session id can never stand where a site id
//! belongs, and a session cannot be addressed without its month.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::month::Month;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            pub const fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                Uuid::try_parse(text).map(Self)
            }
        }
    };
}

uuid_id!(
    /// A tenant's site.
    SiteId
);
uuid_id!(
    /// One visit. Unique only together with its site and month, see [`SessionKey`].
    SessionId
);
uuid_id!(
    /// One event: the idempotency key. A second copy of an event with this id changes nothing.
    EventId
);
uuid_id!(
    /// A row of `dead_letters`.
    DeadLetterId
);
uuid_id!(
    /// An API token: its row, never its text.
    TokenId
);
uuid_id!(
    /// A person, as the sign-in service knows them.
    UserId
);

uuid_id!(
    /// One call. Derived from its key, so that the same pushes make the same table.
    CallId
);

impl CallId {
    /// The id of the call that `provider` knows as `provider_call_id`; a provider's name has no line break.
    pub fn derived(site: SiteId, provider: &str, provider_call_id: &str) -> Self {
        Self(Uuid::new_v5(&site.0, format!("call\n{provider}\n{provider_call_id}").as_bytes()))
    }
}

impl SessionId {
    /// A session id as a tracker sends it: a UUID is used as it is, any other text becomes a UUIDv5 of (site, text),
    /// so that the same text on two sites is two sessions.
    pub fn from_text(site: SiteId, text: &str) -> Self {
        Self(named(site, "session", text))
    }
}

impl EventId {
    /// An event id as a tracker sends it; text that is no UUID becomes a UUIDv5 of (site, text).
    pub fn from_text(site: SiteId, text: &str) -> Self {
        Self(named(site, "event", text))
    }

    /// The id of an event that came without one: derived from what it says and when it arrived, in windows of ten
    /// seconds, so that an impatient retry of an older tracker is still one event.
    pub fn derived(site: SiteId, content: &str, received_at: chrono::DateTime<chrono::Utc>) -> Self {
        let window = received_at.timestamp().div_euclid(10);
        Self(Uuid::new_v5(&site.0, format!("derived\n{window}\n{content}").as_bytes()))
    }
}

impl DeadLetterId {
    /// The id of a dead letter is derived from what died, so that a message which is delivered five times is one letter.
    pub fn derived(what: &[u8]) -> Self {
        Self(Uuid::new_v5(&Uuid::NAMESPACE_OID, what))
    }
}

fn named(site: SiteId, kind: &str, text: &str) -> Uuid {
    let text = text.trim();
    Uuid::try_parse(text).unwrap_or_else(|_| Uuid::new_v5(&site.0, format!("{kind}\n{text}").as_bytes()))
}

/// The only way to address a session or its events: without the month there is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionKey {
    pub site_id: SiteId,
    /// The month in which the session began: `sessions.created_month`, `events.session_month`.
    pub month: Month,
    pub id: SessionId,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(n: u128) -> SiteId {
        SiteId::from_uuid(Uuid::from_u128(n))
    }

    #[test]
    fn every_id_survives_text_and_json() {
        let uuid = Uuid::from_u128(0x1234_5678);
        macro_rules! round_trip {
            ($($name:ident),*) => {$(
                let id = $name::from_uuid(uuid);
                assert_eq!(id.to_string().parse::<$name>().ok(), Some(id));
                assert_eq!(serde_json::from_str::<$name>(&serde_json::json!(id).to_string()).ok(), Some(id));
                assert_eq!(id.as_uuid(), uuid);
            )*};
        }
        round_trip!(SiteId, SessionId, EventId, DeadLetterId, TokenId, UserId, CallId);
    }

    #[test]
    fn a_uuid_is_used_as_it_is_and_other_text_is_named_within_its_site() {
        let text = "0190B1C2-0000-7000-8000-00000000000A";
        assert_eq!(SessionId::from_text(site(1), text).to_string(), text.to_lowercase());
        assert_eq!(SessionId::from_text(site(1), text), SessionId::from_text(site(2), text));
        assert_eq!(SessionId::from_text(site(1), "abc"), SessionId::from_text(site(1), " abc "));
        assert_ne!(SessionId::from_text(site(1), "abc"), SessionId::from_text(site(2), "abc"));
        assert_ne!(SessionId::from_text(site(1), "abc").as_uuid(), EventId::from_text(site(1), "abc").as_uuid());
    }

    #[test]
    fn a_derived_event_id_holds_for_ten_seconds() {
        let at = |s: i64| chrono::DateTime::from_timestamp(1_780_000_000 + s, 0).unwrap_or_default();
        let id = |content, s| EventId::derived(site(1), content, at(s));
        assert_eq!(id("a", 0), id("a", 9));
        assert_ne!(id("a", 0), id("a", 10));
        assert_ne!(id("a", 0), id("b", 0));
    }
}
