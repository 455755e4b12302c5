//! `opsmantik.late_followers`: which sessions are still to be judged again, because a paid visit of their fingerprint appeared or moved and
//! has more followers than its batch corrects. Noted in the batch's own transaction, so that nothing that happens to a server in between
//! is able to forget them.
//!
//! Whoever writes a row here has locked its fingerprint.

use chrono::{DateTime, NaiveDate, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::Store;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::{Purpose, Transaction};
use crate::domain::ads_history::{Place, Reach};
use crate::domain::id::{SessionId, SiteId};
use crate::domain::month::Month;

crate::statement!(
    /// What waits already is joined to it: the span covers both, and what either has not looked at is looked at.
    NOTE_LATE_FOLLOWERS,
    Months::None,
    [UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, DATE_ARRAY, TIMESTAMPTZ_ARRAY, UUID_ARRAY],
    "INSERT INTO opsmantik.late_followers AS waiting (site_id, fingerprint, after, until, month, since, since_id) \
     SELECT site_id, fingerprint, after, until, month, since, since_id \
     FROM unnest($1, $2, $3, $4, $5, $6, $7) AS late (site_id, fingerprint, after, until, month, since, since_id) \
     ON CONFLICT (site_id, fingerprint) DO UPDATE SET \
         after = least(waiting.after, EXCLUDED.after), until = greatest(waiting.until, EXCLUDED.until), \
         (month, since, since_id) = (SELECT place.* FROM (VALUES \
                 (waiting.month, waiting.since, waiting.since_id), (EXCLUDED.month, EXCLUDED.since, EXCLUDED.since_id) \
             ) AS place (month, since, since_id) ORDER BY 1, 2, 3 LIMIT 1)"
);

crate::statement!(
    FINGERPRINTS_WITH_LATE_FOLLOWERS,
    Months::None,
    [UUID, TEXT, INT8],
    "SELECT site_id, fingerprint FROM opsmantik.late_followers WHERE (site_id, fingerprint) > ($1, $2) \
     ORDER BY site_id, fingerprint LIMIT $3"
);

crate::statement!(
    LATE_FOLLOWERS_OF,
    Months::None,
    [UUID, TEXT],
    "SELECT after, until, month, since, since_id FROM opsmantik.late_followers WHERE site_id = $1 AND fingerprint = $2"
);

crate::statement!(
    MOVE_LATE_FOLLOWERS,
    Months::None,
    [UUID, TEXT, DATE, TIMESTAMPTZ, UUID],
    "UPDATE opsmantik.late_followers SET month = $3, since = $4, since_id = $5 WHERE site_id = $1 AND fingerprint = $2"
);

crate::statement!(
    FORGET_LATE_FOLLOWERS,
    Months::None,
    [UUID, TEXT],
    "DELETE FROM opsmantik.late_followers WHERE site_id = $1 AND fingerprint = $2"
);

/// Notes reaches, one a fingerprint.
pub async fn note(tx: &Transaction<'_>, reaches: &[Reach]) -> Result<(), StoreError> {
    if reaches.is_empty() {
        return Ok(());
    }
    let sites: Vec<Uuid> = reaches.iter().map(|reach| reach.site_id.as_uuid()).collect();
    let fingerprints: Vec<&str> = reaches.iter().map(|reach| reach.fingerprint.as_str()).collect();
    let after: Vec<DateTime<Utc>> = reaches.iter().map(|reach| reach.after).collect();
    let until: Vec<DateTime<Utc>> = reaches.iter().map(|reach| reach.until).collect();
    let places = || reaches.iter().map(Reach::beginning);
    let months: Vec<NaiveDate> = places().map(|place| place.month.first_day()).collect();
    let since: Vec<DateTime<Utc>> = places().map(|place| place.created_at).collect();
    let ids: Vec<Uuid> = places().map(|place| place.id.as_uuid()).collect();
    let params: [&(dyn ToSql + Sync); 7] = [&sites, &fingerprints, &after, &until, &months, &since, &ids];
    tx.query(&NOTE_LATE_FOLLOWERS, &params).await?;
    Ok(())
}

/// What waits of a fingerprint, and how far it has been looked at.
pub async fn waiting(
    tx: &Transaction<'_>,
    site: SiteId,
    fingerprint: &str,
) -> Result<Option<(Reach, Place)>, StoreError> {
    let rows = tx.query(&LATE_FOLLOWERS_OF, &[&site.as_uuid(), &fingerprint]).await?;
    let read = |row: &Row| -> Result<_, tokio_postgres::Error> {
        let (after, until) = (row.try_get(0)?, row.try_get(1)?);
        let (month, id) = (Month::containing(row.try_get(2)?), SessionId::from_uuid(row.try_get(4)?));
        let reach = Reach { site_id: site, fingerprint: fingerprint.to_owned(), after, until };
        Ok((reach, Place { month, created_at: row.try_get(3)?, id }))
    };
    let waiting = rows.first().map(read).transpose();
    waiting.map_err(|error| StoreError::unreadable(LATE_FOLLOWERS_OF.name, error))
}

/// What comes before the place waits no more; without one, nothing of the fingerprint does.
pub async fn go_on(
    tx: &Transaction<'_>,
    site: SiteId,
    fingerprint: &str,
    from: Option<Place>,
) -> Result<(), StoreError> {
    let site = site.as_uuid();
    match from {
        Some(Place { month, created_at, id }) => {
            let params: [&(dyn ToSql + Sync); 5] =
                [&site, &fingerprint, &month.first_day(), &created_at, &id.as_uuid()];
            tx.query(&MOVE_LATE_FOLLOWERS, &params).await?;
        }
        None => {
            tx.query(&FORGET_LATE_FOLLOWERS, &[&site, &fingerprint]).await?;
        }
    }
    Ok(())
}

impl Store {
    /// Fingerprints of which sessions wait, those that come after `place` in their order, at most so many.
    pub async fn late_followers(&self, place: (SiteId, &str), limit: i64) -> Result<Vec<(SiteId, String)>, StoreError> {
        let tx = self.begin(Purpose::Serve).await?;
        let rows = tx.query(&FINGERPRINTS_WITH_LATE_FOLLOWERS, &[&place.0.as_uuid(), &place.1, &limit]).await?;
        tx.commit().await?;
        let read = |row: &Row| Ok((SiteId::from_uuid(row.try_get(0)?), row.try_get(1)?));
        let waiting = rows.iter().map(read).collect::<Result<_, tokio_postgres::Error>>();
        waiting.map_err(|error| StoreError::unreadable(FINGERPRINTS_WITH_LATE_FOLLOWERS.name, error))
    }
}
