//! The reads behind a score: the best sessions of a month, the paid visit behind an assisted one, and the call behind a conversion.

use chrono::{DateTime, Utc};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::error::StoreError;
use super::sessions;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::ads_history::{WINDOW, months_between};
use crate::domain::id::{CallId, SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::session::Session;

crate::statement!(
    /// A page after the place ($4, $5). For each page the site's sessions of the month are read and the first of them kept: an index by score would have
    /// to be written with most events, and cost all of them more than it spares this list.
    TOP_SESSIONS,
    Months::In(&[2]),
    [UUID, DATE, INT4, INT4, UUID, INT8],
    format!(
        "SELECT {} FROM public.sessions \
         WHERE site_id = $1 AND created_month = $2 AND lead_score >= $3 AND (lead_score < $4 OR lead_score = $4 AND id > $5) \
         ORDER BY lead_score DESC, id LIMIT $6",
        sessions::COLUMN_NAMES.join(", "),
    )
);

crate::statement!(
    /// The latest direct session of a fingerprint in the window $5 to $6 before another.
    LATEST_EARLIER_AD,
    Months::Between(1, 2),
    [DATE, DATE, UUID, TEXT, TIMESTAMPTZ, TIMESTAMPTZ],
    format!(
        "SELECT {} FROM public.sessions \
         WHERE created_month BETWEEN $1 AND $2 AND site_id = $3 AND fingerprint = $4 AND attribution = 'Direct-to-Ads' \
           AND created_at >= $5 AND created_at < $6 \
         ORDER BY created_at DESC, id LIMIT 1",
        sessions::COLUMN_NAMES.join(", "),
    )
);

crate::statement!(
    FIRST_CALL_OF_SESSION,
    Months::None,
    [UUID, DATE, UUID],
    "SELECT id, started_at FROM public.calls \
     WHERE site_id = $1 AND matched_session_month = $2 AND matched_session_id = $3 \
       AND match_method IN ('CLICK', 'FINGERPRINT') \
     ORDER BY started_at, id LIMIT 1"
);

/// A place in the list of the best sessions: what comes after it has less, or the same and a greater id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Place {
    pub lead_score: i16,
    pub id: SessionId,
}

impl Place {
    /// Before everything: no score is that high.
    pub const START: Self = Self { lead_score: i16::MAX, id: SessionId::from_uuid(Uuid::nil()) };
}

/// The best sessions of a month after a place, at most `limit`, each with its own place.
pub async fn top(
    tx: &Transaction<'_>,
    (site, month): (SiteId, Month),
    min_score: u8,
    after: Place,
    limit: i64,
) -> Result<Vec<(Place, Session)>, StoreError> {
    let (min_score, lead_score) = (i32::from(min_score), i32::from(after.lead_score));
    let params: [&(dyn ToSql + Sync); 6] =
        [&site.as_uuid(), &month.first_day(), &min_score, &lead_score, &after.id.as_uuid(), &limit];
    let rows = tx.query(&TOP_SESSIONS, &params).await?;
    rows.iter()
        .map(|row| {
            let session = sessions::read(row)?;
            // The column, by which the rows are sorted; in a row that a hand has written it may differ from the session's own sum.
            let lead_score = row.try_get("lead_score")?;
            Ok((Place { lead_score, id: session.key.id }, session))
        })
        .collect::<Result<_, Box<dyn std::error::Error + Send + Sync>>>()
        .map_err(|error| StoreError::unreadable(TOP_SESSIONS.name, error))
}

/// The paid visit that makes an assisted session assisted: the latest before it, if it is (still) stored.
pub async fn latest_earlier_ad(tx: &Transaction<'_>, session: &Session) -> Result<Option<Session>, StoreError> {
    let Some(fingerprint) = session.fingerprint() else { return Ok(None) };
    let since = session.created_at - WINDOW;
    let (from, to) = months_between(since, session.created_at);
    let (from, to) = (from.first_day(), to.first_day());
    let params: [&(dyn ToSql + Sync); 6] =
        [&from, &to, &session.key.site_id.as_uuid(), &fingerprint, &since, &session.created_at];
    let rows = tx.query(&LATEST_EARLIER_AD, &params).await?;
    let earlier = rows.first().map(sessions::read).transpose();
    earlier.map_err(|error| StoreError::unreadable(LATEST_EARLIER_AD.name, error))
}

/// A call that found its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatchedCall {
    pub id: CallId,
    pub started_at: DateTime<Utc>,
}

/// The first call that was matched to a session.
pub async fn first_call(tx: &Transaction<'_>, key: SessionKey) -> Result<Option<MatchedCall>, StoreError> {
    let params: [&(dyn ToSql + Sync); 3] = [&key.site_id.as_uuid(), &key.month.first_day(), &key.id.as_uuid()];
    let rows = tx.query(&FIRST_CALL_OF_SESSION, &params).await?;
    let read = |row: &tokio_postgres::Row| -> Result<MatchedCall, tokio_postgres::Error> {
        Ok(MatchedCall { id: CallId::from_uuid(row.try_get(0)?), started_at: row.try_get(1)? })
    };
    rows.first().map(read).transpose().map_err(|error| StoreError::unreadable(FIRST_CALL_OF_SESSION.name, error))
}
