//! An event as it is stored, whole. Events are written once, and never changed by us.

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::id::{EventId, SessionKey};
use super::signal::SignalSet;

/// A stored event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: EventId,
    pub session: SessionKey,
    /// Arrival at the edge; of imported history when it happened.
    pub created_at: DateTime<Utc>,
    /// Arrival at the edge, imported or not.
    pub received_at: DateTime<Utc>,
    pub url: String,
    pub category: String,
    pub action: String,
    pub label: Option<String>,
    pub value: Option<f64>,
    /// Those that this event alone raises.
    pub signals: SignalSet,
    /// An object, unless a hand has written something else.
    pub metadata: Value,
}
