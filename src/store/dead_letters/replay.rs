//! Pages of letters that are replayed, in the order of their burial.
//!
//! A page and its marks are one transaction, and one page at a time is worked on, whoever replays: a second replay waits for the page before its own and
//! then sees its marks, so that no letter is skipped because another replay had it and died. Whoever buries is never waited for and never waits:
//! the rows are not locked.

use tokio_postgres::types::ToSql;

use super::{Bound, BuriedLetter, COLUMNS, Chosen, IS_CHOSEN, Place, read};
use crate::domain::id::DeadLetterId;
use crate::domain::text;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::statement::Months;
use crate::store::transaction::{Purpose, Transaction};

crate::statement!(
    /// A pair of numbers, as the gates of sites, with a first half of its own.
    LOCK_REPLAYS,
    Months::None,
    [INT4],
    "SELECT pg_advisory_xact_lock($1, 0)"
);

crate::statement!(
    /// So many letters, and no more than so many bytes of payload, but at least one.
    NEXT_DEAD_LETTERS,
    Months::None,
    [UUID_ARRAY, UUID, TEXT, TEXT, TIMESTAMPTZ, TIMESTAMPTZ, BOOL, BOOL, TIMESTAMPTZ, UUID, INT8, INT8],
    format!(
        "WITH page AS MATERIALIZED ( \
           SELECT * FROM public.dead_letters WHERE {IS_CHOSEN} AND ($9 IS NULL OR (created_at, id) > ($9, $10)) \
           ORDER BY created_at, id LIMIT $11), \
         weighed AS ( \
           SELECT *, sum(octet_length(payload)) OVER (ORDER BY created_at, id) - octet_length(payload) AS before FROM page) \
         SELECT {COLUMNS} FROM weighed WHERE before < $12 ORDER BY created_at, id"
    )
);

crate::statement!(
    /// An error marks a try that failed; none, one that stored the letter.
    MARK_DEAD_LETTERS,
    Months::None,
    [UUID_ARRAY, TEXT_ARRAY],
    "UPDATE public.dead_letters l SET tries = l.tries + 1, last_error = coalesce(m.error, l.last_error), \
       replayed_at = CASE WHEN m.error IS NULL THEN clock_timestamp() ELSE l.replayed_at END \
     FROM unnest($1, $2) AS m (id, error) WHERE l.id = m.id"
);

const REPLAYS: i32 = 0x6f70_6c72;

/// What a replay made of a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    pub id: DeadLetterId,
    /// None: it is stored.
    pub error: Option<String>,
}

/// Letters that nobody else replays meanwhile.
pub struct Page<'s> {
    tx: Transaction<'s>,
    pub letters: Vec<BuriedLetter>,
}

impl Page<'_> {
    /// Writes what became of them, and ends the page.
    pub async fn mark(self, marks: &[Mark]) -> Result<(), StoreError> {
        if !marks.is_empty() {
            let ids: Vec<_> = marks.iter().map(|mark| mark.id.as_uuid()).collect();
            let errors: Vec<_> =
                marks.iter().map(|mark| mark.error.as_deref().map(|error| text::clean(error, 4096))).collect();
            self.tx.query(&MARK_DEAD_LETTERS, &[&ids, &errors]).await?;
        }
        self.tx.commit().await
    }
}

impl Store {
    /// The oldest of the chosen letters, or the oldest of those buried after the one at `after`: at most `limit`, and about `bytes` of payload.
    pub async fn next_dead_letters(
        &self,
        chosen: &Chosen,
        after: Option<Place>,
        limit: i64,
        bytes: i64,
    ) -> Result<Page<'_>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        tx.query(&LOCK_REPLAYS, &[&REPLAYS]).await?;
        let letters = next(&tx, chosen, after, limit, bytes).await?;
        Ok(Page { tx, letters })
    }

    /// The same to look at only: nobody waits for anybody.
    pub async fn look_at_dead_letters(
        &self,
        chosen: &Chosen,
        after: Option<Place>,
        limit: i64,
        bytes: i64,
    ) -> Result<Vec<BuriedLetter>, StoreError> {
        let tx = self.begin(Purpose::Operate).await?;
        let letters = next(&tx, chosen, after, limit, bytes).await?;
        tx.commit().await?;
        Ok(letters)
    }
}

async fn next(
    tx: &Transaction<'_>,
    chosen: &Chosen,
    after: Option<Place>,
    limit: i64,
    bytes: i64,
) -> Result<Vec<BuriedLetter>, StoreError> {
    let bound = Bound::of(chosen);
    let (buried_at, id) = after.map(|place| (place.buried_at, place.id.as_uuid())).unzip();
    let more: [&(dyn ToSql + Sync); 5] = [&true, &buried_at, &id, &limit, &bytes];
    let rows = tx.query(&NEXT_DEAD_LETTERS, &[&bound.params(chosen)[..], &more].concat()).await?;
    rows.iter().map(read).collect()
}
