//! The three tables that can be watched: how a row of each is read, wherever it comes from, and how its watch words its messages.

use chrono::{DateTime, Utc};
use prost::Message;

use super::super::{calls, convert, proto, session};
use crate::domain::change::{Change, Table};
use crate::store::columns::{Columns, Unreadable};
use crate::store::{calls as stored_calls, events as stored_events, sessions as stored_sessions};

/// A table and the messages of its watch.
pub(in crate::grpc) trait Watched: Send + Sync + 'static {
    const TABLE: Table;
    type Row: Message + Default + Clone + PartialEq + 'static;
    type Answer: Message + Default + 'static;

    fn read(row: &impl Columns) -> Result<Self::Row, Unreadable>;

    fn answer(resume_token: String, said: Said<Self::Row>) -> Self::Answer;
}

/// What one message says.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::grpc) enum Said<R> {
    Start,
    /// The row is there.
    There(R),
    End,
    Changed(Change<R>, DateTime<Utc>),
    Heartbeat,
}

macro_rules! watched {
    ($name:ident, $table:expr, $row:ty, $change:ident, $answer:ident, $payload:ident, $from:ident, $show:expr) => {
        pub(in crate::grpc) struct $name;

        impl Watched for $name {
            const TABLE: Table = $table;
            type Row = $row;
            type Answer = proto::$answer;

            fn read(row: &impl Columns) -> Result<Self::Row, Unreadable> {
                Ok($show(&$from::read(row)?))
            }

            fn answer(resume_token: String, said: Said<Self::Row>) -> Self::Answer {
                use proto::ChangeKind as Kind;
                use proto::$payload::Payload;
                let change = |kind: Kind, old, new, at: Option<DateTime<Utc>>| {
                    let committed_at = at.map(session::timestamp);
                    Payload::Change(proto::$change { kind: kind.into(), old, new, committed_at })
                };
                let payload = match said {
                    Said::Start => Payload::SnapshotStart(proto::SnapshotStart {}),
                    Said::End => Payload::SnapshotEnd(proto::SnapshotEnd {}),
                    Said::Heartbeat => Payload::Heartbeat(proto::Heartbeat {}),
                    Said::There(row) => change(Kind::Snapshot, None, Some(row), None),
                    Said::Changed(Change::Insert { new }, at) => change(Kind::Insert, None, Some(new), Some(at)),
                    Said::Changed(Change::Update { old, new }, at) => {
                        change(Kind::Update, Some(old), Some(new), Some(at))
                    }
                    Said::Changed(Change::Delete { old }, at) => change(Kind::Delete, Some(old), None, Some(at)),
                };
                proto::$answer { resume_token, payload: Some(payload) }
            }
        }
    };
}

watched!(
    Events,
    Table::Events,
    proto::StoredEvent,
    EventChange,
    WatchEventsResponse,
    watch_events_response,
    stored_events,
    convert::stored_event
);
watched!(
    Sessions,
    Table::Sessions,
    proto::Session,
    SessionChange,
    WatchSessionsResponse,
    watch_sessions_response,
    stored_sessions,
    session::session
);
watched!(
    Calls,
    Table::Calls,
    proto::Call,
    CallChange,
    WatchCallsResponse,
    watch_calls_response,
    stored_calls,
    calls::told
);
