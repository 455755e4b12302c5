//! `events`: the action log. The primary key makes a second copy of an event change nothing.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use tokio_postgres::types::{Json, Type};
use uuid::Uuid;

use super::columns::{Columns, Unreadable};
use super::error::StoreError;
use super::rows::{Record, RowType, RowWriter, Rows};
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::event::Event;
use crate::domain::id::{EventId, SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::signal::SignalSet;
use crate::domain::stored;

static NEW_COLUMNS: [(&str, Type); 16] = [
    ("site_id", Type::UUID),
    ("session_month", Type::DATE),
    ("id", Type::UUID),
    ("session_id", Type::UUID),
    ("created_at", Type::TIMESTAMPTZ),
    ("occurred_at", Type::TIMESTAMPTZ),
    ("url", Type::TEXT),
    ("referrer", Type::TEXT),
    ("event_category", Type::TEXT),
    ("event_action", Type::TEXT),
    ("event_label", Type::TEXT),
    ("event_value", Type::FLOAT8),
    ("signals", Type::INT4),
    ("lead_score", Type::INT2),
    ("metadata", Type::JSONB),
    ("received_at", Type::TIMESTAMPTZ),
];

static EVENT_ROW: RowType = RowType { name: "opsmantik.event_row", columns: || &NEW_COLUMNS };

crate::statement!(INSERT_EVENTS, Months::Rows, [rows EVENT_ROW], {
    let columns = NEW_COLUMNS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    format!(
        "INSERT INTO public.events ({columns}) SELECT {columns} FROM unnest($1::opsmantik.event_row[]) \
         ON CONFLICT (site_id, session_month, id) DO NOTHING RETURNING site_id, session_month, id"
    )
});

crate::statement!(
    /// Looked up one by one, as `LOAD_SESSIONS`.
    SESSIONS_OF_EVENTS,
    Months::In(&[1, 2, 3]),
    [DATE, DATE, DATE, UUID_ARRAY, UUID_ARRAY],
    "SELECT e.site_id, e.session_month, e.session_id, e.id FROM unnest($4, $5) AS wanted (site_id, id) \
     CROSS JOIN (VALUES ($1), ($2), ($3)) AS near (month) \
     CROSS JOIN LATERAL (SELECT e.site_id, e.session_month, e.session_id, e.id FROM public.events e \
       WHERE e.site_id = wanted.site_id AND e.session_month = near.month AND e.id = wanted.id \
         AND e.session_month IN ($1, $2, $3) OFFSET 0) AS e"
);

crate::statement!(
    EVENTS_OF_SESSION,
    Months::In(&[2]),
    [UUID, DATE, UUID, INT8],
    "SELECT id, created_at, event_category, event_action, event_label, event_value, lead_score \
     FROM public.events WHERE site_id = $1 AND session_month = $2 AND session_id = $3 \
     ORDER BY created_at, occurred_at, id LIMIT $4"
);

/// The primary key of an event.
pub type EventKey = (SiteId, Month, EventId);

/// Inserts events, each into the month of its session, and tells which were new. `events` are sorted and distinct by [`EventKey`].
pub async fn insert(tx: &Transaction<'_>, events: &[(SessionKey, &Event)]) -> Result<HashSet<EventKey>, StoreError> {
    let rows = tx.query(&INSERT_EVENTS, &[&Rows(events)]).await?;
    rows.iter()
        .map(|row| {
            let unreadable = |error| StoreError::unreadable(INSERT_EVENTS.name, error);
            let site: Uuid = row.try_get(0).map_err(unreadable)?;
            let month = row.try_get(1).map_err(unreadable)?;
            let id: Uuid = row.try_get(2).map_err(unreadable)?;
            Ok((SiteId::from_uuid(site), Month::containing(month), EventId::from_uuid(id)))
        })
        .collect()
}

impl Record for (SessionKey, &Event) {
    fn put(&self, row: &mut RowWriter<'_>) -> Result<(), Unreadable> {
        let (key, event) = self;
        row.put(&key.site_id.as_uuid())?;
        row.put(&key.month.first_day())?;
        row.put(&event.id.as_uuid())?;
        row.put(&key.id.as_uuid())?;
        row.put(&event.received_at)?;
        row.put(&event.occurred_at)?;
        row.put(&event.url.as_str())?;
        row.put(&event.referrer)?;
        row.put(&event.category.as_str())?;
        row.put(&event.action.as_str())?;
        row.put(&event.label)?;
        row.put(&event.value)?;
        row.put(&event.signals.bits())?;
        row.put(&i16::from(event.signals.score().get()))?;
        row.put(&Json(&event.metadata))?;
        row.put(&event.imported_at)
    }
}

/// The sessions to which stored events belong, of those with these ids in any of three months. An id that lies in two of them (which only a hand can
/// have done) is told with the earlier.
pub async fn sessions_of(
    tx: &Transaction<'_>,
    months: [Month; 3],
    ids: &[(SiteId, EventId)],
) -> Result<HashMap<(SiteId, EventId), SessionKey>, StoreError> {
    let [first, second, third] = months.map(Month::first_day);
    let (sites, ids): (Vec<Uuid>, Vec<Uuid>) = ids.iter().map(|(site, id)| (site.as_uuid(), id.as_uuid())).unzip();
    let rows = tx.query(&SESSIONS_OF_EVENTS, &[&first, &second, &third, &sites, &ids]).await?;
    let mut found: HashMap<(SiteId, EventId), SessionKey> = HashMap::with_capacity(rows.len());
    for row in &rows {
        let read = || -> Result<(EventId, SessionKey), tokio_postgres::Error> {
            let session = SessionKey {
                site_id: SiteId::from_uuid(row.try_get(0)?),
                month: Month::containing(row.try_get(1)?),
                id: SessionId::from_uuid(row.try_get(2)?),
            };
            Ok((EventId::from_uuid(row.try_get(3)?), session))
        };
        let (event, session) = read().map_err(|error| StoreError::unreadable(SESSIONS_OF_EVENTS.name, error))?;
        let known = found.entry((session.site_id, event)).or_insert(session);
        *known = session.min(*known);
    }
    Ok(found)
}

/// An event as a reader of a session sees it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct StoredEvent {
    pub id: EventId,
    pub created_at: DateTime<Utc>,
    pub event_category: String,
    pub event_action: String,
    pub event_label: Option<String>,
    pub event_value: Option<f64>,
    pub lead_score: i16,
}

/// The events of a session in the order of their arrival.
pub async fn of_session(tx: &Transaction<'_>, key: SessionKey, limit: i64) -> Result<Vec<StoredEvent>, StoreError> {
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&key.site_id.as_uuid(), &key.month.first_day(), &key.id.as_uuid(), &limit];
    let rows = tx.query(&EVENTS_OF_SESSION, &params).await?;
    rows.iter()
        .map(|row| {
            Ok(StoredEvent {
                id: EventId::from_uuid(row.try_get(0)?),
                created_at: row.try_get(1)?,
                event_category: row.try_get(2)?,
                event_action: row.try_get(3)?,
                event_label: row.try_get(4)?,
                event_value: row.try_get(5)?,
                lead_score: row.try_get(6)?,
            })
        })
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|error| StoreError::unreadable(EVENTS_OF_SESSION.name, error))
}

/// The columns of [`read`].
pub(super) const COLUMNS: &str = "site_id, session_month, id, session_id, created_at, url, event_category, event_action, event_label, \
     event_value, signals, metadata, received_at";

/// A row as the event it is.
pub fn read(row: &impl Columns) -> Result<stored::Event, Unreadable> {
    let created_at = row.column("created_at")?;
    Ok(stored::Event {
        id: EventId::from_uuid(row.column("id")?),
        session: SessionKey {
            site_id: SiteId::from_uuid(row.column("site_id")?),
            month: Month::containing(row.column("session_month")?),
            id: SessionId::from_uuid(row.column("session_id")?),
        },
        created_at,
        received_at: row.column::<Option<DateTime<Utc>>>("received_at")?.unwrap_or(created_at),
        url: row.column("url")?,
        category: row.column("event_category")?,
        action: row.column("event_action")?,
        label: row.column("event_label")?,
        value: row.column("event_value")?,
        signals: SignalSet::from_bits(row.column("signals")?),
        metadata: row.column("metadata")?,
    })
}
