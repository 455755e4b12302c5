//! A call as it is stored: what its pushes told, the visit that it found, and what a person said about it.

use chrono::{DateTime, Utc};

use super::call::{CallKey, Direction, ReviewStatus, Told};
use super::id::CallId;
use super::matching::{Candidate, Match};
use super::push::Push;
use super::signal::SignalSet;

/// A stored call.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    pub id: CallId,
    pub key: CallKey,
    pub told: Told,
    pub found: Found,
    /// When the match was last decided; none before the first time.
    pub matched_at: Option<DateTime<Utc>>,
    pub review: Review,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
}

/// The match, and what was frozen with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    pub decision: Match,
    /// The signals of the credited session as far as they were there when the call came: its events by then, and its history. What the
    /// session does later is none of the call's business, and what calls raise is left out. Empty when nothing is credited.
    pub signals: SignalSet,
}

/// What a person has said about a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Review {
    pub status: ReviewStatus,
    pub sale: Option<Sale>,
    /// `user:` or `token:` and the id.
    pub by: Option<String>,
    pub at: Option<DateTime<Utc>>,
}

/// The sale that a confirmed call led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sale {
    /// Decimal text, as PostgreSQL writes a `numeric`.
    pub amount: String,
    /// ISO 4217.
    pub currency: String,
}

impl Call {
    /// A call that was not known before: nothing is matched and nobody has said anything.
    pub fn begin(push: Push) -> Self {
        let now = Utc::now();
        Self {
            id: push.key.call_id(),
            key: push.key.clone(),
            told: Told::begin(push),
            found: Found { decision: Match::NONE, signals: SignalSet::EMPTY },
            matched_at: None,
            review: Review { status: ReviewStatus::Open, sale: None, by: None, at: None },
            created_at: now,
            updated_at: now,
        }
    }

    /// Whether the match is still the rule's business: nobody has judged the call.
    pub fn is_open(&self) -> bool {
        self.review.status == ReviewStatus::Open
    }

    /// Whether it can have a visit behind it at all.
    pub fn is_inbound(&self) -> bool {
        self.told.direction == Direction::Inbound
    }

    pub fn credited(&self) -> Option<&Candidate> {
        self.found.decision.credited.as_ref()
    }
}
