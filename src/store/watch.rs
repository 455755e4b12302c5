//! What a watcher reads from the tables: a page of a site's rows together with the moment at which it was true, the months that there
//! are, and whether rows have gone that no page can tell of.
//!
//! A page is the rows between two ids of one month, so that a statement binds one partition. Where it ends is asked of the index alone;
//! the rows in between can then be only those that were written lately, however few that are.

use chrono::NaiveDate;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::error::StoreError;
use super::statement::{Months, Statement};
use super::transaction::{Purpose, Reader, Transaction};
use super::{Store, calls, events, sessions};
use crate::domain::change::{Snapshot, Table};
use crate::domain::id::SiteId;
use crate::domain::month::Month;

crate::statement!(
    /// The moment that the transaction sees, and a place in the log before which all lies that is seen.
    MOMENT,
    Months::None,
    [],
    "SELECT pg_current_snapshot()::text, (pg_current_wal_insert_lsn() - '0/0')::int8"
);
crate::statement!(
    /// Whether the reader may still see the site at this moment.
    SITE_IS_SEEN,
    Months::None,
    [UUID],
    "SELECT id FROM public.sites WHERE id = $1"
);

crate::statement!(
    PAGE_END_OF_EVENTS,
    Months::In(&[2]),
    [UUID, DATE, UUID, INT8],
    "SELECT id FROM public.events WHERE site_id = $1 AND session_month = $2 AND id >= $3 ORDER BY id OFFSET $4 LIMIT 1"
);
crate::statement!(
    PAGE_OF_EVENTS,
    Months::In(&[2]),
    [UUID, DATE, UUID, UUID],
    format!(
        "SELECT {} FROM public.events WHERE site_id = $1 AND session_month = $2 AND id >= $3 AND id <= $4 ORDER BY id",
        events::COLUMNS,
    )
);
crate::statement!(
    /// Of the page those rows whose writer is not older than the transaction $5.
    CHANGED_EVENTS,
    Months::In(&[2]),
    [UUID, DATE, UUID, UUID, TEXT],
    format!(
        "SELECT {} FROM public.events WHERE site_id = $1 AND session_month = $2 AND id >= $3 AND id <= $4 \
           AND age(xmin) <= age(CAST($5 AS xid)) ORDER BY id",
        events::COLUMNS,
    )
);

crate::statement!(
    PAGE_END_OF_SESSIONS,
    Months::In(&[2]),
    [UUID, DATE, UUID, INT8],
    "SELECT id FROM public.sessions WHERE site_id = $1 AND created_month = $2 AND id >= $3 ORDER BY id OFFSET $4 LIMIT 1"
);
crate::statement!(
    PAGE_OF_SESSIONS,
    Months::In(&[2]),
    [UUID, DATE, UUID, UUID],
    format!(
        "SELECT {} FROM public.sessions WHERE site_id = $1 AND created_month = $2 AND id >= $3 AND id <= $4 ORDER BY id",
        sessions::COLUMN_NAMES.join(", "),
    )
);
crate::statement!(
    CHANGED_SESSIONS,
    Months::In(&[2]),
    [UUID, DATE, UUID, UUID, TEXT],
    format!(
        "SELECT {} FROM public.sessions WHERE site_id = $1 AND created_month = $2 AND id >= $3 AND id <= $4 \
           AND age(xmin) <= age(CAST($5 AS xid)) ORDER BY id",
        sessions::COLUMN_NAMES.join(", "),
    )
);

crate::statement!(
    PAGE_END_OF_CALLS,
    Months::None,
    [UUID, UUID, INT8],
    "SELECT id FROM public.calls WHERE site_id = $1 AND id >= $2 ORDER BY id OFFSET $3 LIMIT 1"
);
crate::statement!(
    PAGE_OF_CALLS,
    Months::None,
    [UUID, UUID, UUID],
    format!(
        "SELECT {} FROM public.calls c WHERE c.site_id = $1 AND c.id >= $2 AND c.id <= $3 ORDER BY c.id",
        calls::COLUMNS,
    )
);
crate::statement!(
    CHANGED_CALLS,
    Months::None,
    [UUID, UUID, UUID, TEXT],
    format!(
        "SELECT {} FROM public.calls c WHERE c.site_id = $1 AND c.id >= $2 AND c.id <= $3 \
           AND age(c.xmin) <= age(CAST($4 AS xid)) ORDER BY c.id",
        calls::COLUMNS,
    )
);

crate::statement!(
    /// The first month from $2 to $3 in which the site has events, whatever the bounds of the partition that has them.
    NEXT_MONTH_OF_EVENTS,
    Months::Between(2, 3),
    [UUID, DATE, DATE],
    "SELECT session_month FROM public.events WHERE site_id = $1 AND session_month BETWEEN $2 AND $3 ORDER BY session_month LIMIT 1"
);
crate::statement!(
    NEXT_MONTH_OF_SESSIONS,
    Months::Between(2, 3),
    [UUID, DATE, DATE],
    "SELECT created_month FROM public.sessions WHERE site_id = $1 AND created_month BETWEEN $2 AND $3 ORDER BY created_month LIMIT 1"
);
crate::statement!(
    /// Whether a transaction from $4 on took rows of the site away. $3 is NULL for all months.
    VANISHED_SINCE,
    Months::None,
    [TEXT, UUID, DATE, TEXT],
    "SELECT pg_current_snapshot()::text, (pg_current_wal_insert_lsn() - '0/0')::int8, \
         EXISTS (SELECT FROM opsmantik.vanished \
                 WHERE tab = $1 AND site_id IN ($2, '00000000-0000-0000-0000-000000000000') \
                   AND ($3 IS NULL OR month IN ($3, '-infinity')) AND xid >= CAST($4 AS xid8))"
);

/// No row is earlier, and none that a month can name is later.
const FIRST_MONTH: NaiveDate = NaiveDate::from_ymd_opt(1, 1, 1).expect("a day");
const LAST_MONTH: NaiveDate = NaiveDate::from_ymd_opt(9999, 12, 1).expect("a day");

/// What was true at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen<T> {
    pub snapshot: Snapshot,
    /// A place in the log: whatever the snapshot sees has its commit before it.
    pub lsn: u64,
    pub what: T,
}

/// Which rows to read: of one month (none for calls), from one id on to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub month: Option<Month>,
    pub from: Uuid,
    pub to: Uuid,
    /// Only rows that were written by this transaction or a younger one. It must not be older than half of what 32 bits can tell apart.
    pub since: Option<u64>,
}

/// Rows, and the id up to which there are no others.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<Row>,
    pub end: Uuid,
}

/// The statements of a table: where a page ends, its rows, and those of them that were written lately.
fn statements(table: Table) -> [&'static Statement; 3] {
    match table {
        Table::Events => [&PAGE_END_OF_EVENTS, &PAGE_OF_EVENTS, &CHANGED_EVENTS],
        Table::Sessions => [&PAGE_END_OF_SESSIONS, &PAGE_OF_SESSIONS, &CHANGED_SESSIONS],
        Table::Calls => [&PAGE_END_OF_CALLS, &PAGE_OF_CALLS, &CHANGED_CALLS],
    }
}

impl Store {
    /// The first `limit` ids of the span, under the reader's policies; none if the reader sees no such site (any more).
    pub async fn watched_page(
        &self,
        reader: Reader,
        table: Table,
        site: SiteId,
        span: Span,
        limit: u32,
    ) -> Result<Option<Seen<Page>>, StoreError> {
        let Some((tx, moment)) = self.moment(reader, site).await? else { return Ok(None) };
        let page = page(&tx, table, site, span, limit).await?;
        tx.commit().await?;
        seen(MOMENT.name, &moment, |_| Ok(page)).map(Some)
    }

    /// The first month at `from` or after it in which the site has rows, under the reader's policies; none if the reader sees no such site.
    pub async fn watched_month(
        &self,
        reader: Reader,
        table: Table,
        site: SiteId,
        from: Option<Month>,
    ) -> Result<Option<Seen<Option<Month>>>, StoreError> {
        let statement: &Statement = match table {
            Table::Events => &NEXT_MONTH_OF_EVENTS,
            Table::Sessions | Table::Calls => &NEXT_MONTH_OF_SESSIONS,
        };
        let from = from.map_or(FIRST_MONTH, Month::first_day);
        let Some((tx, moment)) = self.moment(reader, site).await? else { return Ok(None) };
        let rows = tx.query(statement, &[&site.as_uuid(), &from, &LAST_MONTH]).await?;
        tx.commit().await?;
        let month = rows.first().map(|row| row.try_get::<_, NaiveDate>(0)).transpose();
        let month = month.map_err(|error| StoreError::unreadable(statement.name, error))?;
        seen(MOMENT.name, &moment, |_| Ok(month.map(Month::containing))).map(Some)
    }

    /// A reader's transaction, and the moment that it sees; none if the reader sees no such site.
    async fn moment(&self, reader: Reader, site: SiteId) -> Result<Option<(Transaction<'_>, Vec<Row>)>, StoreError> {
        let tx = self.begin(Purpose::Read(reader)).await?;
        let moment = tx.query(&MOMENT, &[]).await?;
        if tx.query(&SITE_IS_SEEN, &[&site.as_uuid()]).await?.is_empty() {
            tx.rollback().await?;
            return Ok(None);
        }
        Ok(Some((tx, moment)))
    }

    /// Whether a transaction from `since` on took rows away that could have been seen here.
    pub async fn vanished_since(
        &self,
        table: Table,
        site: SiteId,
        month: Option<Month>,
        since: u64,
    ) -> Result<Seen<bool>, StoreError> {
        self.note_leaves().await?;
        let tx = self.begin(Purpose::Serve).await?;
        let (month, since) = (month.map(Month::first_day), since.to_string());
        let params: [&(dyn ToSql + Sync); 4] = [&table.name(), &site.as_uuid(), &month, &since];
        let rows = tx.query(&VANISHED_SINCE, &params).await?;
        tx.commit().await?;
        seen(VANISHED_SINCE.name, &rows, |row| row.try_get(2))
    }
}

async fn page(tx: &Transaction<'_>, table: Table, site: SiteId, span: Span, limit: u32) -> Result<Page, StoreError> {
    let [ending, whole, changed] = statements(table);
    let (site, month) = (site.as_uuid(), span.month.map(Month::first_day));
    let offset = i64::from(limit.saturating_sub(1));
    // Of calls there are no months.
    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&site];
    params.extend(month.iter().map(|month| month as &(dyn ToSql + Sync)));
    params.push(&span.from);
    let last = tx.query(ending, &[params.as_slice(), &[&offset]].concat()).await?;
    let last = last.first().map(|row| row.try_get(0)).transpose();
    let last: Option<Uuid> = last.map_err(|error| StoreError::unreadable(ending.name, error))?;
    let end = last.map_or(span.to, |last| last.min(span.to));
    params.push(&end);
    let rows = match span.since {
        None => tx.query(whole, &params).await?,
        Some(since) => {
            // A row knows the lower half of its writer's id.
            let since = (since & u64::from(u32::MAX)).to_string();
            params.push(&since);
            tx.query(changed, &params).await?
        }
    };
    Ok(Page { rows, end })
}

/// The one row that tells a moment, and what else it tells.
fn seen<T>(
    operation: &'static str,
    rows: &[Row],
    what: impl FnOnce(&Row) -> Result<T, tokio_postgres::Error>,
) -> Result<Seen<T>, StoreError> {
    let row = rows.first().ok_or_else(|| StoreError::unreadable(operation, "no row"))?;
    let read = || Ok((row.try_get::<_, &str>(0)?, row.try_get::<_, i64>(1)?, what(row)?));
    let (snapshot, lsn, what) =
        read().map_err(|error: tokio_postgres::Error| StoreError::unreadable(operation, error))?;
    let snapshot = snapshot.parse().map_err(|error| StoreError::unreadable(operation, error))?;
    Ok(Seen { snapshot, lsn: lsn.cast_unsigned(), what })
}
