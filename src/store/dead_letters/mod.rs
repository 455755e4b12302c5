//! `dead_letters`: what was accepted and could not be stored, why, and whether it was replayed. Nothing is dropped in silence.
//!
//! There may be a million of them, each with up to a MiB of payload: they are read by pages that end at a place ([`Place`]) in the order of their
//! burial, and counted from an index.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Purpose;
use crate::domain::id::{DeadLetterId, EventId, SiteId};
use crate::domain::outcome::DeathReason;
use crate::domain::text;

mod replay;

pub use replay::{Mark, Page};

crate::statement!(
    /// The id is derived from what died, so a message that dies again is the same letter with one try more.
    BURY,
    Months::None,
    [UUID, UUID, UUID, TEXT, TEXT, TEXT, TEXT, TIMESTAMPTZ],
    "INSERT INTO public.dead_letters (id, site_id, event_id, source, reason, detail, payload, received_at, tries) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 1) \
     ON CONFLICT (id) DO UPDATE SET tries = dead_letters.tries + 1, last_error = excluded.detail, replayed_at = NULL"
);

/// The columns of [`read`]; the payload only if parameter `$8` asks for it.
const COLUMNS: &str = "id, site_id, event_id, source, reason, detail, CASE WHEN $8 THEN payload ELSE '' END, received_at, created_at, tries, \
     last_error, replayed_at";

/// What [`Chosen`] binds.
const IS_CHOSEN: &str = "($1 IS NULL OR id = ANY ($1)) AND ($2 IS NULL OR site_id = $2) AND ($3 IS NULL OR reason = $3) \
     AND ($4 IS NULL OR source = $4) AND ($5 IS NULL OR created_at >= $5) AND ($6 IS NULL OR created_at < $6) \
     AND ($7 OR replayed_at IS NULL)";

crate::statement!(
    LIST_DEAD_LETTERS,
    Months::None,
    [UUID_ARRAY, UUID, TEXT, TEXT, TIMESTAMPTZ, TIMESTAMPTZ, BOOL, BOOL, TIMESTAMPTZ, UUID, INT8],
    format!(
        "SELECT {COLUMNS} FROM public.dead_letters WHERE {IS_CHOSEN} AND ($9 IS NULL OR (created_at, id) < ($9, $10)) \
         ORDER BY created_at DESC, id DESC LIMIT $11"
    )
);

crate::statement!(
    /// Named and typed columns only, so that an index answers.
    COUNT_DEAD_LETTERS,
    Months::None,
    [UUID_ARRAY, UUID, TEXT, TEXT, TIMESTAMPTZ, TIMESTAMPTZ, BOOL, TIMESTAMPTZ, UUID],
    format!(
        "SELECT reason, count(*), count(*) FILTER (WHERE replayed_at IS NULL), min(created_at), max(created_at) \
         FROM public.dead_letters WHERE {IS_CHOSEN} AND ($8 IS NULL OR (created_at, id) > ($8, $9)) \
         GROUP BY reason ORDER BY reason"
    )
);

/// Longest payload that is kept, in bytes: as much as the largest delivery that QStash brings.
const MAX_PAYLOAD: usize = 1 << 20;

/// Something that died.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub id: DeadLetterId,
    pub site_id: Option<SiteId>,
    pub event_id: Option<EventId>,
    /// Which door it came through: `worker`, `nats`, `pipeline`, `calls`.
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
    /// How the last try that failed, after the first one, failed.
    pub last_error: Option<String>,
    pub replayed_at: Option<DateTime<Utc>>,
}

impl BuriedLetter {
    pub fn place(&self) -> Place {
        Place { buried_at: self.created_at, id: self.id }
    }
}

/// Where a letter stands in the order of their burial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub buried_at: DateTime<Utc>,
    pub id: DeadLetterId,
}

/// Which letters are meant: those that all of this is true of.
#[derive(Debug, Clone, Default)]
pub struct Chosen {
    pub ids: Option<Vec<DeadLetterId>>,
    pub site: Option<SiteId>,
    pub reason: Option<String>,
    pub source: Option<String>,
    /// Buried at or after.
    pub since: Option<DateTime<Utc>>,
    /// Buried before.
    pub until: Option<DateTime<Utc>>,
    /// Also those that were replayed.
    pub replayed_too: bool,
}

/// The values of [`Chosen`], as statements bind them.
struct Bound {
    ids: Option<Vec<Uuid>>,
    site: Option<Uuid>,
}

impl Bound {
    fn of(chosen: &Chosen) -> Self {
        let ids = chosen.ids.as_ref().map(|ids| ids.iter().map(DeadLetterId::as_uuid).collect());
        Self { ids, site: chosen.site.map(|id| id.as_uuid()) }
    }

    fn params<'p>(&'p self, chosen: &'p Chosen) -> [&'p (dyn ToSql + Sync); 7] {
        let Chosen { ids: _, site: _, reason, source, since, until, replayed_too } = chosen;
        [&self.ids, &self.site, reason, source, since, until, replayed_too]
    }
}

/// How many letters of a reason there are.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    pub reason: String,
    pub letters: i64,
    pub not_replayed: i64,
    pub oldest: DateTime<Utc>,
    pub newest: DateTime<Utc>,
}

/// Keeps what died, wherever that is: in the table, or with somebody who has the letter already.
#[async_trait]
pub trait Undertaker: Send + Sync {
    /// Once this returns, the letter is safe.
    async fn keep(&self, letter: &DeadLetter) -> Result<(), StoreError>;
}

#[async_trait]
impl Undertaker for Store {
    /// Buries it, and says so.
    async fn keep(&self, letter: &DeadLetter) -> Result<(), StoreError> {
        self.bury(letter).await?;
        let event = letter.event_id.map(tracing::field::display);
        let site = letter.site_id.map(tracing::field::display);
        tracing::warn!(
            event.id = event,
            site.id = site,
            reason = letter.reason.code(),
            error = letter.detail,
            "an event died"
        );
        Ok(())
    }
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
            last_error: row.try_get(10)?,
            replayed_at: row.try_get(11)?,
        })
    };
    read().map_err(|error| StoreError::unreadable("read dead letter", error))
}

impl Store {
    /// Puts what died into the table. Once this returns it is durable.
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

    /// The newest of the chosen letters, or the newest of those buried before the one at `before`. Without payloads they are light.
    pub async fn list_dead_letters(
        &self,
        chosen: &Chosen,
        before: Option<Place>,
        payloads: bool,
        limit: i64,
    ) -> Result<Vec<BuriedLetter>, StoreError> {
        let (bound, before) = (Bound::of(chosen), before.map(|place| (place.buried_at, place.id.as_uuid())));
        let (buried_at, id) = before.unzip();
        let more: [&(dyn ToSql + Sync); 4] = [&payloads, &buried_at, &id, &limit];
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&LIST_DEAD_LETTERS, &[&bound.params(chosen)[..], &more].concat()).await?;
        tx.commit().await?;
        rows.iter().map(read).collect()
    }

    /// One letter, whole.
    pub async fn find_dead_letter(&self, id: DeadLetterId) -> Result<Option<BuriedLetter>, StoreError> {
        let chosen = Chosen { ids: Some(vec![id]), replayed_too: true, ..Chosen::default() };
        Ok(self.list_dead_letters(&chosen, None, true, 1).await?.pop())
    }

    /// How many letters are chosen, or how many of those buried after the one at `after`, by reason.
    pub async fn count_dead_letters(&self, chosen: &Chosen, after: Option<Place>) -> Result<Vec<Count>, StoreError> {
        let (bound, after) = (Bound::of(chosen), after.map(|place| (place.buried_at, place.id.as_uuid())));
        let (buried_at, id) = after.unzip();
        let more: [&(dyn ToSql + Sync); 2] = [&buried_at, &id];
        let tx = self.begin(Purpose::Operate).await?;
        let rows = tx.query(&COUNT_DEAD_LETTERS, &[&bound.params(chosen)[..], &more].concat()).await?;
        tx.commit().await?;
        let read = |row: &Row| -> Result<Count, tokio_postgres::Error> {
            Ok(Count {
                reason: row.try_get(0)?,
                letters: row.try_get(1)?,
                not_replayed: row.try_get(2)?,
                oldest: row.try_get(3)?,
                newest: row.try_get(4)?,
            })
        };
        let counts = rows.iter().map(read).collect::<Result<_, _>>();
        counts.map_err(|error| StoreError::unreadable(COUNT_DEAD_LETTERS.name, error))
    }
}
