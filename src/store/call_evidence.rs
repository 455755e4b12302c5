//! What speaks for the match of a call: activity of its fingerprint, clicks in its window, and what of a session's score was there.
//!
//! Every statement binds the site and the months that the windows can touch. Runs with the site's gate closed, see [`super::locks`], so
//! what is read stands still.

use chrono::{DateTime, NaiveDate, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::attribution::Attribution;
use crate::domain::id::{EventId, SessionId, SessionKey, SiteId};
use crate::domain::matching::{self, Activity};
use crate::domain::month::Month;
use crate::domain::signal::SignalSet;

/// Most conversions of one window that are looked at, the latest of them. A site has a few; more is a flood.
const MOST_CONVERSIONS: i64 = 2000;
/// Most sessions with a call's fingerprint that are looked at, the latest of them: more than are ever named.
const MOST_SESSIONS: i64 = 100;

crate::statement!(
    /// For each asked (fingerprint, window): the latest event in the window of each session with that fingerprint, at most the latest $7 of them.
    ACTIVITY_OF_FINGERPRINTS,
    Months::Between(2, 3),
    [UUID, DATE, DATE, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, INT8],
    "SELECT asked.place, seen.created_month, seen.session, seen.event, seen.occurred_at \
     FROM unnest($4, $5, $6) WITH ORDINALITY AS asked (fingerprint, since, until, place) \
     CROSS JOIN LATERAL ( \
         SELECT s.created_month, s.id AS session, latest.id AS event, latest.occurred_at \
         FROM public.sessions s \
         CROSS JOIN LATERAL ( \
             SELECT e.id, e.occurred_at FROM public.events e \
             WHERE e.site_id = $1 AND e.session_month = s.created_month AND e.session_month BETWEEN $2 AND $3 \
               AND e.session_id = s.id AND e.occurred_at BETWEEN asked.since AND asked.until \
             ORDER BY e.occurred_at DESC, e.id DESC LIMIT 1) AS latest \
         WHERE s.site_id = $1 AND s.fingerprint = asked.fingerprint AND s.created_month BETWEEN $2 AND $3 \
           AND s.last_seen_at >= asked.since \
         ORDER BY latest.occurred_at DESC, latest.id DESC, s.created_month, s.id LIMIT $7) AS seen"
);

crate::statement!(
    /// For each asked window: its conversions, at most the latest $6. Which of them are clicks on the number is the domain's question. Month by
    /// month, so that the index is entered where the window begins: with the month left open it is read from the month's beginning.
    CONVERSIONS_IN_WINDOWS,
    Months::Between(2, 3),
    [UUID, DATE, DATE, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, INT8, DATE_ARRAY, DATE_ARRAY],
    "SELECT asked.place, click.session_month, click.session_id, click.id, click.occurred_at, click.event_action, click.event_label \
     FROM unnest($4, $5, $7, $8) WITH ORDINALITY AS asked (since, until, first, last, place) \
     CROSS JOIN LATERAL ( \
         SELECT of_month.* FROM generate_series(asked.first, asked.last, interval '1 month') AS near (month) \
         CROSS JOIN LATERAL ( \
             SELECT e.session_month, e.session_id, e.id, e.occurred_at, e.event_action, e.event_label FROM public.events e \
             WHERE e.site_id = $1 AND e.session_month = near.month::date AND e.session_month BETWEEN $2 AND $3 AND e.signals & 1 = 1 \
               AND e.occurred_at BETWEEN asked.since AND asked.until \
             ORDER BY e.occurred_at DESC, e.id DESC LIMIT $6) AS of_month \
         ORDER BY of_month.occurred_at DESC, of_month.id DESC LIMIT $6) AS click"
);

crate::statement!(
    /// For each credited (session, time): what of its score was there by then, and its history.
    STANDING_OF_SESSIONS,
    Months::Between(2, 3),
    [UUID, DATE, DATE, DATE_ARRAY, UUID_ARRAY, TIMESTAMPTZ_ARRAY],
    "SELECT asked.place, s.attribution, s.fingerprint, coalesce(( \
         SELECT bit_or(e.signals) FROM public.events e \
         WHERE e.site_id = $1 AND e.session_month = s.created_month AND e.session_month BETWEEN $2 AND $3 \
           AND e.session_id = s.id AND e.occurred_at <= asked.until), 0) \
     FROM unnest($4, $5, $6) WITH ORDINALITY AS asked (month, id, until, place) \
     JOIN public.sessions s ON s.site_id = $1 AND s.created_month = asked.month AND s.created_month BETWEEN $2 AND $3 \
       AND s.id = asked.id"
);

crate::statement!(
    /// Of these sessions, those that a call is credited to. Looked up one by one, or all calls of the site would be read.
    CREDITED_SESSIONS,
    Months::None,
    [UUID, DATE_ARRAY, UUID_ARRAY],
    "SELECT asked.month, asked.id FROM unnest($2, $3) AS asked (month, id) \
     CROSS JOIN LATERAL (SELECT FROM public.calls c WHERE c.site_id = $1 AND c.matched_session_month = asked.month \
                         AND c.matched_session_id = asked.id LIMIT 1) AS credited"
);

crate::statement!(
    /// Of these events, the places of those that are stored.
    EVENTS_STILL_THERE,
    Months::Between(2, 3),
    [UUID, DATE, DATE, DATE_ARRAY, UUID_ARRAY],
    "SELECT asked.place FROM unnest($4, $5) WITH ORDINALITY AS asked (month, id, place) \
     JOIN public.events e ON e.site_id = $1 AND e.session_month = asked.month AND e.session_month BETWEEN $2 AND $3 AND e.id = asked.id"
);

type Unreadable = Box<dyn std::error::Error + Send + Sync>;

/// The months that the windows can touch of calls that began then.
fn months(times: impl Iterator<Item = DateTime<Utc>> + Clone) -> Option<(NaiveDate, NaiveDate)> {
    let spans = times.map(matching::months_of_window);
    let (from, to) = (spans.clone().map(|span| span.0).min()?, spans.map(|span| span.1).max()?);
    Some((from.first_day(), to.first_day()))
}

/// Reads the place that a row belongs to, from 0.
fn place(row: &Row) -> Result<usize, Unreadable> {
    Ok(usize::try_from(row.try_get::<_, i64>(0)? - 1)?)
}

fn session_of(row: &Row, site: SiteId) -> Result<SessionKey, Unreadable> {
    Ok(SessionKey {
        site_id: site,
        month: Month::containing(row.try_get(1)?),
        id: SessionId::from_uuid(row.try_get(2)?),
    })
}

/// For each fingerprint of a call that began then: the latest event in its window of each session with that fingerprint.
pub async fn activity(
    tx: &Transaction<'_>,
    site: SiteId,
    calls: &[(&str, DateTime<Utc>)],
) -> Result<Vec<Vec<Activity>>, StoreError> {
    let mut found: Vec<Vec<Activity>> = vec![Vec::new(); calls.len()];
    let Some((from, to)) = months(calls.iter().map(|(_, at)| *at)) else { return Ok(found) };
    let fingerprints: Vec<&str> = calls.iter().map(|(fingerprint, _)| *fingerprint).collect();
    let (since, until): (Vec<_>, Vec<_>) = calls.iter().map(|(_, at)| matching::window(*at)).unzip();
    let params: [&(dyn ToSql + Sync); 7] = [&site.as_uuid(), &from, &to, &fingerprints, &since, &until, &MOST_SESSIONS];
    let rows = tx.query(&ACTIVITY_OF_FINGERPRINTS, &params).await?;
    for row in &rows {
        let read = || -> Result<(usize, Activity), Unreadable> {
            let event = EventId::from_uuid(row.try_get(3)?);
            Ok((place(row)?, Activity { session: session_of(row, site)?, event, at: row.try_get(4)? }))
        };
        let (place, activity) = read().map_err(|error| StoreError::unreadable(ACTIVITY_OF_FINGERPRINTS.name, error))?;
        if let Some(found) = found.get_mut(place) {
            found.push(activity);
        }
    }
    Ok(found)
}

/// A conversion: perhaps a click on a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversion {
    pub session: SessionKey,
    pub event: EventId,
    pub at: DateTime<Utc>,
    pub action: String,
    pub label: Option<String>,
}

/// For each call that began then: the conversions in its window.
pub async fn conversions(
    tx: &Transaction<'_>,
    site: SiteId,
    times: &[DateTime<Utc>],
) -> Result<Vec<Vec<Conversion>>, StoreError> {
    let mut found: Vec<Vec<Conversion>> = vec![Vec::new(); times.len()];
    let Some((from, to)) = months(times.iter().copied()) else { return Ok(found) };
    let (since, until): (Vec<_>, Vec<_>) = times.iter().map(|at| matching::window(*at)).unzip();
    let (first, last): (Vec<NaiveDate>, Vec<NaiveDate>) =
        times.iter().map(|at| matching::months_of_window(*at)).map(|(a, b)| (a.first_day(), b.first_day())).unzip();
    let params: [&(dyn ToSql + Sync); 8] =
        [&site.as_uuid(), &from, &to, &since, &until, &MOST_CONVERSIONS, &first, &last];
    let rows = tx.query(&CONVERSIONS_IN_WINDOWS, &params).await?;
    for row in &rows {
        let read = || -> Result<(usize, Conversion), Unreadable> {
            let conversion = Conversion {
                session: session_of(row, site)?,
                event: EventId::from_uuid(row.try_get(3)?),
                at: row.try_get(4)?,
                action: row.try_get(5)?,
                label: row.try_get(6)?,
            };
            Ok((place(row)?, conversion))
        };
        let (place, conversion) = read().map_err(|error| StoreError::unreadable(CONVERSIONS_IN_WINDOWS.name, error))?;
        if let Some(found) = found.get_mut(place) {
            found.push(conversion);
        }
    }
    Ok(found)
}

/// What of a session's score was there at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// What its events had raised by then.
    pub raised: SignalSet,
    pub attribution: Option<Attribution>,
    pub fingerprint: Option<String>,
}

/// For each session and time: what was there of its score by then. None for a session that is gone.
pub async fn standings(
    tx: &Transaction<'_>,
    site: SiteId,
    asked: &[(SessionKey, DateTime<Utc>)],
) -> Result<Vec<Option<Standing>>, StoreError> {
    let mut found = vec![None; asked.len()];
    let months = asked.iter().map(|(key, _)| key.month);
    let (Some(from), Some(to)) = (months.clone().min(), months.max()) else { return Ok(found) };
    let month: Vec<NaiveDate> = asked.iter().map(|(key, _)| key.month.first_day()).collect();
    let ids: Vec<Uuid> = asked.iter().map(|(key, _)| key.id.as_uuid()).collect();
    let until: Vec<DateTime<Utc>> = asked.iter().map(|(_, until)| *until).collect();
    let params: [&(dyn ToSql + Sync); 6] = [&site.as_uuid(), &from.first_day(), &to.first_day(), &month, &ids, &until];
    let rows = tx.query(&STANDING_OF_SESSIONS, &params).await?;
    for row in &rows {
        let read = || -> Result<(usize, Standing), Unreadable> {
            let standing = Standing {
                attribution: Attribution::from_name(row.try_get(1)?),
                fingerprint: row.try_get(2)?,
                raised: SignalSet::from_bits(row.try_get(3)?),
            };
            Ok((place(row)?, standing))
        };
        let (place, standing) = read().map_err(|error| StoreError::unreadable(STANDING_OF_SESSIONS.name, error))?;
        if let Some(found) = found.get_mut(place) {
            *found = Some(standing);
        }
    }
    Ok(found)
}

/// Of these sessions, those that a call is credited to.
pub async fn credited(tx: &Transaction<'_>, site: SiteId, keys: &[SessionKey]) -> Result<Vec<SessionKey>, StoreError> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let months: Vec<NaiveDate> = keys.iter().map(|key| key.month.first_day()).collect();
    let ids: Vec<Uuid> = keys.iter().map(|key| key.id.as_uuid()).collect();
    let rows = tx.query(&CREDITED_SESSIONS, &[&site.as_uuid(), &months, &ids]).await?;
    rows.iter()
        .map(|row| -> Result<SessionKey, tokio_postgres::Error> {
            let (month, id) = (Month::containing(row.try_get(0)?), SessionId::from_uuid(row.try_get(1)?));
            Ok(SessionKey { site_id: site, month, id })
        })
        .collect::<Result<_, _>>()
        .map_err(|error| StoreError::unreadable(CREDITED_SESSIONS.name, error))
}

/// For each of these events of the site whether it is stored. It may not be: its month was dropped.
pub async fn still_there(
    tx: &Transaction<'_>,
    site: SiteId,
    events: &[(Month, EventId)],
) -> Result<Vec<bool>, StoreError> {
    let mut there = vec![false; events.len()];
    let months = events.iter().map(|(month, _)| *month);
    let (Some(from), Some(to)) = (months.clone().min(), months.clone().max()) else { return Ok(there) };
    let month: Vec<NaiveDate> = months.map(Month::first_day).collect();
    let ids: Vec<Uuid> = events.iter().map(|(_, id)| id.as_uuid()).collect();
    let rows =
        tx.query(&EVENTS_STILL_THERE, &[&site.as_uuid(), &from.first_day(), &to.first_day(), &month, &ids]).await?;
    for row in &rows {
        let place = place(row).map_err(|error| StoreError::unreadable(EVENTS_STILL_THERE.name, error))?;
        if let Some(there) = there.get_mut(place) {
            *there = true;
        }
    }
    Ok(there)
}
