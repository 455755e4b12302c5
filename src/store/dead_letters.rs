//! `dead_letters`: what was accepted and could not be stored, why, and whether it was replayed. Nothing is dropped in silence.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::id::{DeadLetterId, EventId, SiteId};
use crate::domain::outcome::DeathReason;
use crate::domain::text;

crate::statement!(
    /// The id is derived from what died, so a message that dies again is the same letter with one try more.
    BURY,
    Months::None,
    [UUID, UUID, UUID, TEXT, TEXT, TEXT, TEXT, TIMESTAMPTZ],
    "INSERT INTO public.dead_letters (id, site_id, event_id, source, reason, detail, payload, received_at, tries) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 1) \
     ON CONFLICT (id) DO UPDATE SET tries = dead_letters.tries + 1, last_error = excluded.detail"
);

crate::statement!(
    LIST_DEAD_LETTERS,
    Months::None,
    [UUID, TEXT, INT8],
    "SELECT id, site_id, event_id, source, reason, detail, payload, received_at, created_at, tries, replayed_at \
     FROM public.dead_letters \
     WHERE ($1 IS NULL OR site_id = $1) AND ($2 IS NULL OR reason = $2) ORDER BY created_at DESC, id LIMIT $3"
);

crate::statement!(
    FIND_DEAD_LETTER,
    Months::None,
    [UUID],
    "SELECT id, site_id, event_id, source, reason, detail, payload, received_at, created_at, tries, replayed_at \
     FROM public.dead_letters WHERE id = $1"
);

/// Longest payload that is kept, in bytes: one more than any body that a door takes.
const MAX_PAYLOAD: usize = 1 << 20;

/// Something that died.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub id: DeadLetterId,
    pub site_id: Option<SiteId>,
    pub event_id: Option<EventId>,
    /// Which door it came through: `worker`, `pipeline`, `calls`.
    pub source: &'static str,
    pub reason: DeathReason,
    /// What exactly was wrong, for the engineer.
    pub detail: String,
    /// The job as JSON, or the body as text. Of a call its key only: numbers are not kept.
    pub payload: String,
    pub received_at: DateTime<Utc>,
}

/// A letter as it lies there.
#[derive(Debug, Clone, serde::Serialize)]
pub struct BuriedLetter {
    pub id: DeadLetterId,
    pub site_id: Option<SiteId>,
    pub event_id: Option<EventId>,
    pub source: String,
    pub reason: String,
    pub detail: String,
    pub payload: String,
    pub received_at: DateTime<Utc>,
    pub created_at: DateTime<Utc>,
    pub tries: i32,
    pub replayed_at: Option<DateTime<Utc>>,
}

fn read(row: &Row) -> Result<BuriedLetter, StoreError> {
    let read = || -> Result<BuriedLetter, tokio_postgres::Error> {
        Ok(BuriedLetter {
            id: DeadLetterId::from_uuid(row.try_get(0)?),
            site_id: row.try_get::<_, Option<Uuid>>(1)?.map(SiteId::from_uuid),
            event_id: row.try_get::<_, Option<Uuid>>(2)?.map(EventId::from_uuid),
            source: row.try_get(3)?,
            reason: row.try_get(4)?,
            detail: row.try_get(5)?,
            payload: row.try_get(6)?,
            received_at: row.try_get(7)?,
            created_at: row.try_get(8)?,
            tries: row.try_get(9)?,
            replayed_at: row.try_get(10)?,
        })
    };
    read().map_err(|error| StoreError::unreadable("read dead letter", error))
}

impl Store {
    /// Keeps what died. Once this returns it is durable.
    pub async fn bury(&self, letter: &DeadLetter) -> Result<(), StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        tx.query(
            &BURY,
            &[
                &letter.id.as_uuid(),
                &letter.site_id.map(|id| id.as_uuid()),
                &letter.event_id.map(|id| id.as_uuid()),
                &letter.source,
                &letter.reason.code(),
                &text::clean(&letter.detail, 4096),
                &text::clean(&letter.payload, MAX_PAYLOAD),
                &letter.received_at,
            ],
        )
        .await?;
        tx.commit().await
    }

    /// The newest letters, of one site or reason if given.
    pub async fn list_dead_letters(
        &self,
        site: Option<SiteId>,
        reason: Option<&str>,
        limit: i64,
    ) -> Result<Vec<BuriedLetter>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LIST_DEAD_LETTERS, &[&site.map(|id| id.as_uuid()), &reason, &limit]).await?;
        tx.commit().await?;
        rows.iter().map(read).collect()
    }

    /// One letter.
    pub async fn find_dead_letter(&self, id: DeadLetterId) -> Result<Option<BuriedLetter>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&FIND_DEAD_LETTER, &[&id.as_uuid()]).await?;
        tx.commit().await?;
        rows.first().map(read).transpose()
    }
}
