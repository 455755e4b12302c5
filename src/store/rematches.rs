//! `opsmantik.call_rematches`: calls that have to be matched again. Noted in the transaction that touched their window, so that nothing
//! that happens to a server in between is able to forget them.

use chrono::{DateTime, NaiveDate, Utc};
use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::{Purpose, Transaction};
use crate::domain::id::{CallId, SiteId};
use crate::domain::rematch::{Dialled, Regions, Touched};

crate::statement!(
    /// Of these sites, those with a call that began at their time or later, and their regions. Far cheaper to plan than to look for the calls
    /// themselves, and most sites have none in most batches.
    SITES_WITH_CALLS_SINCE,
    Months::None,
    [UUID_ARRAY, TIMESTAMPTZ_ARRAY],
    "SELECT asked.site_id, (SELECT region FROM public.sites WHERE id = asked.site_id) FROM unnest($1, $2) AS asked (site_id, since) \
     WHERE EXISTS (SELECT FROM public.calls c WHERE c.site_id = asked.site_id AND c.started_at >= asked.since)"
);

crate::statement!(
    /// By a click in the window, of calls that a click can find (`domain::matching::needs_clicks`); by the fingerprint; by the session that is credited.
    /// Judged calls keep their match.
    NOTE_REMATCHES,
    Months::None,
    [
        UUID_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, TEXT_ARRAY, TEXT_ARRAY, UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY,
        TIMESTAMPTZ_ARRAY, UUID_ARRAY, DATE_ARRAY, UUID_ARRAY, TIMESTAMPTZ_ARRAY,
    ],
    "WITH touched AS ( \
         SELECT c.site_id, c.id FROM unnest($1, $2, $3, $4, $5) AS click (site_id, since, until, number, channel) \
         JOIN public.calls c ON c.site_id = click.site_id AND c.started_at BETWEEN click.since AND click.until \
           AND c.dialled_number = coalesce(click.number, c.dialled_number) AND c.channel = coalesce(click.channel, c.channel) \
         WHERE c.review = 'OPEN' AND c.direction = 'INBOUND' AND c.caller_hmac IS NOT NULL AND c.match_method <> 'FINGERPRINT' \
         UNION \
         SELECT c.site_id, c.id FROM unnest($6, $7, $8, $9) AS told (site_id, fingerprint, since, until) \
         JOIN public.calls c ON c.site_id = told.site_id AND c.fingerprint = told.fingerprint \
           AND c.started_at BETWEEN told.since AND told.until \
         WHERE c.review = 'OPEN' \
         UNION \
         SELECT c.site_id, c.id FROM unnest($10, $11, $12, $13) AS credited (site_id, month, id, since) \
         JOIN public.calls c ON c.site_id = credited.site_id AND c.matched_session_month = credited.month \
           AND c.matched_session_id = credited.id AND c.started_at >= credited.since \
         WHERE c.review = 'OPEN' \
     ), noted AS ( \
         INSERT INTO opsmantik.call_rematches (site_id, call_id) SELECT site_id, id FROM touched ORDER BY site_id, id \
         ON CONFLICT (site_id, call_id) DO NOTHING \
     ) \
     SELECT DISTINCT site_id FROM touched"
);

crate::statement!(
    NOTED_CALLS,
    Months::None,
    [UUID, INT8],
    "SELECT call_id FROM opsmantik.call_rematches WHERE site_id = $1 ORDER BY call_id LIMIT $2"
);

crate::statement!(
    FORGET_REMATCHES,
    Months::None,
    [UUID, UUID_ARRAY],
    "DELETE FROM opsmantik.call_rematches WHERE site_id = $1 AND call_id = ANY ($2)"
);

crate::statement!(
    SITES_WITH_REMATCHES,
    Months::None,
    [INT8],
    "SELECT DISTINCT site_id FROM opsmantik.call_rematches LIMIT $1"
);

fn ids(rows: &[tokio_postgres::Row], operation: &'static str) -> Result<Vec<Uuid>, StoreError> {
    let ids = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>();
    ids.map_err(|error| StoreError::unreadable(operation, error))
}

/// The sites of which calls may be touched.
pub async fn sites_with_calls(tx: &Transaction<'_>, touched: &Touched) -> Result<Regions, StoreError> {
    let since = touched.since();
    if since.is_empty() {
        return Ok(Regions::new());
    }
    let (sites, since): (Vec<Uuid>, Vec<DateTime<Utc>>) =
        since.iter().map(|(site, since)| (site.as_uuid(), *since)).unzip();
    let rows = tx.query(&SITES_WITH_CALLS_SINCE, &[&sites, &since]).await?;
    rows.iter()
        .map(|row| Ok((SiteId::from_uuid(row.try_get(0)?), row.try_get(1)?)))
        .collect::<Result<_, tokio_postgres::Error>>()
        .map_err(|error| StoreError::unreadable(SITES_WITH_CALLS_SINCE.name, error))
}

/// Of calls to which number; none: to any.
fn number(dialled: &Dialled) -> Option<&str> {
    match dialled {
        Dialled::Number(number) => Some(number.as_str()),
        Dialled::Any(_) | Dialled::Unread(..) => None,
    }
}

/// Of calls by which channel; none: by any.
fn channel(dialled: &Dialled) -> Option<&'static str> {
    match dialled {
        Dialled::Any(channel) => Some(channel.name()),
        Dialled::Number(_) | Dialled::Unread(..) => None,
    }
}

/// Notes the calls that were touched, of [`sites_with_calls`]; their sites. The caller has passed the gates of these.
pub async fn note(tx: &Transaction<'_>, touched: Touched) -> Result<Vec<SiteId>, StoreError> {
    if touched.is_empty() {
        return Ok(Vec::new());
    }
    fn column<'t, T, C>(of: &'t [T], pick: impl Fn(&'t T) -> C) -> Vec<C> {
        of.iter().map(pick).collect()
    }
    let (clicks, told, credited) = (&touched.clicks, &touched.fingerprints, &touched.credited);
    let since: Vec<DateTime<Utc>> = column(credited, |(_, since)| *since);
    let months: Vec<NaiveDate> = column(credited, |(key, _)| key.month.first_day());
    let rows = tx
        .query(
            &NOTE_REMATCHES,
            &[
                &column(clicks, |(site, ..)| site.as_uuid()),
                &column(clicks, |(.., span)| span.0),
                &column(clicks, |(.., span)| span.1),
                &column(clicks, |(_, dialled, _)| number(dialled)),
                &column(clicks, |(_, dialled, _)| channel(dialled)),
                &column(told, |(site, ..)| site.as_uuid()),
                &column(told, |(_, fingerprint, _)| fingerprint.as_str()),
                &column(told, |(.., span)| span.0),
                &column(told, |(.., span)| span.1),
                &column(credited, |(key, _)| key.site_id.as_uuid()),
                &months,
                &column(credited, |(key, _)| key.id.as_uuid()),
                &since,
            ],
        )
        .await?;
    Ok(ids(&rows, NOTE_REMATCHES.name)?.into_iter().map(SiteId::from_uuid).collect())
}

/// Calls of a site that wait, at most so many. The caller has closed the site's gate.
pub async fn noted(tx: &Transaction<'_>, site: SiteId, limit: i64) -> Result<Vec<CallId>, StoreError> {
    let rows = tx.query(&NOTED_CALLS, &[&site.as_uuid(), &limit]).await?;
    Ok(ids(&rows, NOTED_CALLS.name)?.into_iter().map(CallId::from_uuid).collect())
}

/// They have been matched again.
pub async fn forget(tx: &Transaction<'_>, site: SiteId, calls: &[CallId]) -> Result<(), StoreError> {
    let calls: Vec<Uuid> = calls.iter().map(CallId::as_uuid).collect();
    tx.query(&FORGET_REMATCHES, &[&site.as_uuid(), &calls]).await?;
    Ok(())
}

impl Store {
    /// Sites of which calls wait, at most so many.
    pub async fn sites_with_rematches(&self, limit: i64) -> Result<Vec<SiteId>, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&SITES_WITH_REMATCHES, &[&limit]).await?;
        tx.commit().await?;
        Ok(ids(&rows, SITES_WITH_REMATCHES.name)?.into_iter().map(SiteId::from_uuid).collect())
    }
}
