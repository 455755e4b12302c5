//! What became of an event: exactly one outcome, from a closed list.

use std::time::Duration;

use super::attribution::Attribution;
use super::id::SessionKey;
use super::signal::{Score, SignalSet};

/// Where a durable event went and what its session looks like since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    pub session: SessionKey,
    /// The session's signals, not only this event's.
    pub signals: SignalSet,
    pub attribution: Attribution,
}

impl Receipt {
    /// The session's score.
    pub fn score(&self) -> Score {
        self.signals.score()
    }
}

/// Why an accepted event could not be stored. It is in `dead_letters` by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeathReason {
    /// PostgreSQL refuses the row (data exception, constraint, trigger).
    RefusedByDatabase,
    /// The site was removed between the door and the table.
    UnknownSite,
    /// A delivery that is no job: not JSON, or a required field is missing or wrong.
    MalformedJob,
}

impl DeathReason {
    pub const ALL: [Self; 3] = [Self::RefusedByDatabase, Self::UnknownSite, Self::MalformedJob];

    /// The stable code in `dead_letters.reason`, answers and metrics.
    pub const fn code(self) -> &'static str {
        match self {
            Self::RefusedByDatabase => "refused_by_database",
            Self::UnknownSite => "unknown_site",
            Self::MalformedJob => "malformed_job",
        }
    }
}

/// Why nothing can be stored right now. The caller may try again; nothing was stored that it has to fear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unavailable {
    /// The waiting room is full.
    Busy,
    /// The database is away, or did not answer within the bound.
    Database,
    /// The month's partition is not there yet; the keeper has been told.
    Partition,
    /// The server is stopping.
    Stopping,
}

impl Unavailable {
    pub const fn code(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Database => "database_unavailable",
            Self::Partition => "partition_missing",
            Self::Stopping => "stopping",
        }
    }

    /// When to try again.
    pub const fn retry_after(self) -> Duration {
        match self {
            Self::Busy | Self::Stopping => Duration::from_secs(1),
            Self::Database | Self::Partition => Duration::from_secs(5),
        }
    }
}

/// The one outcome of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Committed now.
    Stored(Receipt),
    /// Committed before; this copy changed nothing.
    Duplicate(Receipt),
    /// Can never be stored; it lies in `dead_letters`.
    Dead(DeathReason),
    /// Not stored, may be tried again.
    Unavailable(Unavailable),
}
