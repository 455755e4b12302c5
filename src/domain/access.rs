//! Who calls, and what they may do: scopes, and the sites that a token reaches.
//!
//! A machine comes with an API token, a person with the JWT of their sign-in. What a person may see is not decided here but by the
//! policies of the database, which know their sites.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::id::{SiteId, TokenId, UserId};

/// A right that a token carries. The names are the contract of every RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Send events.
    #[serde(rename = "ingest:write")]
    IngestWrite,
    /// Read scores and sessions.
    #[serde(rename = "scoring:read")]
    ScoringRead,
    /// Read calls.
    #[serde(rename = "calls:read")]
    CallsRead,
    /// Push and review calls.
    #[serde(rename = "calls:write")]
    CallsWrite,
    /// Read events.
    #[serde(rename = "events:read")]
    EventsRead,
}

impl Scope {
    pub const ALL: [Self; 5] =
        [Self::IngestWrite, Self::ScoringRead, Self::CallsRead, Self::CallsWrite, Self::EventsRead];

    pub const fn name(self) -> &'static str {
        match self {
            Self::IngestWrite => "ingest:write",
            Self::ScoringRead => "scoring:read",
            Self::CallsRead => "calls:read",
            Self::CallsWrite => "calls:write",
            Self::EventsRead => "events:read",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which sites a token opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// This one. Both of its names, so that asking for another needs no look-up that could tell whether that one exists.
    Site { id: SiteId, public_id: String },
    /// Every site there is.
    AllSites,
}

/// Whoever is behind a request, proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A machine with an API token.
    Token { id: TokenId, scopes: Vec<Scope>, reach: Reach },
    /// A person who signed in. They read what the policies show them, and review calls where these let them.
    User { id: UserId },
}

impl Caller {
    /// Whether the caller has the right at all; on which sites is another question.
    pub fn has(&self, scope: Scope) -> bool {
        match self {
            Self::Token { scopes, .. } => scopes.contains(&scope),
            Self::User { .. } => scope != Scope::IngestWrite,
        }
    }

    /// How they sign what they judge: `token:` or `user:` and the id.
    pub fn signature(&self) -> String {
        match self {
            Self::Token { id, .. } => format!("token:{id}"),
            Self::User { id } => format!("user:{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_scope_is_its_name_everywhere() {
        for scope in Scope::ALL {
            assert_eq!(Scope::from_name(scope.name()), Some(scope));
            assert_eq!(serde_json::to_value(scope).ok(), Some(scope.name().into()));
        }
        assert_eq!(Scope::from_name("calls:admin"), None);
    }

    #[test]
    fn nobody_has_more_than_they_were_given() {
        let reach = Reach::AllSites;
        let token = Caller::Token { id: TokenId::from_uuid(Uuid::nil()), scopes: vec![Scope::CallsRead], reach };
        assert!(token.has(Scope::CallsRead) && !token.has(Scope::CallsWrite));
        let user = Caller::User { id: UserId::from_uuid(Uuid::nil()) };
        assert!(user.has(Scope::ScoringRead) && !user.has(Scope::IngestWrite));
        assert!(user.signature().starts_with("user:") && token.signature().starts_with("token:"));
    }
}
