//! The ads history of fingerprints, read from `sessions`: which sessions follow a paid visit. The rule is [`crate::domain::ads_history`]'s.
//!
//! Every statement binds the months that the 90 days can touch, and leaves out the sessions that the caller is about to write: of
//! those it knows better than the table. Runs under the fingerprints' locks, see [`super::locks`].

use chrono::{DateTime, Utc};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::ads_history::{Reach, months_between};
use crate::domain::attribution::Attribution;
use crate::domain::id::{SessionId, SessionKey, SiteId};
use crate::domain::month::Month;
use crate::domain::session::with_history;
use crate::domain::signal::SignalSet;

crate::statement!(
    /// For each asked (site, fingerprint, time): is there a direct session in the window before it? The months are told one by one: between two
    /// ends the planner, who knows nothing of a new month, would as soon read all sessions of the site in the order of the primary key.
    EARLIER_ADS,
    Months::Of(1),
    [DATE_ARRAY, UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, UUID_ARRAY, DATE_ARRAY, UUID_ARRAY],
    "SELECT EXISTS ( \
         SELECT FROM public.sessions d \
         WHERE d.created_month = ANY ($1) AND d.site_id = asked.site_id AND d.fingerprint = asked.fingerprint \
           AND d.attribution = 'Direct-to-Ads' AND d.created_at >= asked.since AND d.created_at < asked.created_at \
           AND NOT EXISTS (SELECT FROM unnest($6, $7, $8) AS known (site_id, month, id) \
                           WHERE known.id = d.id AND known.month = d.created_month AND known.site_id = d.site_id)) \
     FROM unnest($2, $3, $4, $5) WITH ORDINALITY AS asked (site_id, fingerprint, since, created_at, position) \
     ORDER BY position"
);

crate::statement!(
    /// The sessions that a direct session reaches. Looked up reach by reach, as `LOAD_SESSIONS`, and the months as in `EARLIER_ADS`.
    LATER_SESSIONS,
    Months::Of(1),
    [DATE_ARRAY, UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, UUID_ARRAY, DATE_ARRAY, UUID_ARRAY],
    "SELECT DISTINCT s.site_id, s.created_month, s.id, s.fingerprint, s.created_at, s.signals, s.attribution \
     FROM unnest($2, $3, $4, $5) AS reach (site_id, fingerprint, after, until) \
     CROSS JOIN LATERAL ( \
       SELECT s.site_id, s.created_month, s.id, s.fingerprint, s.created_at, s.signals, s.attribution FROM public.sessions s \
       WHERE s.site_id = reach.site_id AND s.fingerprint = reach.fingerprint \
         AND s.created_at > reach.after AND s.created_at <= reach.until \
         AND s.created_month = ANY ($1) AND s.attribution <> 'Direct-to-Ads' OFFSET 0) AS s \
     WHERE NOT EXISTS (SELECT FROM unnest($6, $7, $8) AS known (site_id, month, id) \
                       WHERE known.id = s.id AND known.month = s.created_month AND known.site_id = s.site_id) \
     ORDER BY s.site_id, s.created_month, s.id"
);

crate::statement!(
    CORRECT_ATTRIBUTION,
    Months::Between(1, 2),
    [DATE, DATE, UUID_ARRAY, DATE_ARRAY, UUID_ARRAY, TEXT_ARRAY, INT4_ARRAY, INT2_ARRAY],
    "UPDATE public.sessions s SET attribution = fix.attribution, signals = fix.signals, lead_score = fix.lead_score \
     FROM unnest($3, $4, $5, $6, $7, $8) AS fix (site_id, month, id, attribution, signals, lead_score) \
     WHERE s.site_id = fix.site_id AND s.created_month = fix.month AND s.id = fix.id \
       AND s.created_month BETWEEN $1 AND $2"
);

/// A session as the history sees it: whose it is, and when it began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    pub key: SessionKey,
    pub fingerprint: String,
    pub created_at: DateTime<Utc>,
}

/// A stored session that a direct session reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follower {
    pub visit: Visit,
    pub signals: SignalSet,
    pub attribution: Attribution,
}

/// Keys as arrays.
struct Keys {
    sites: Vec<Uuid>,
    months: Vec<chrono::NaiveDate>,
    ids: Vec<Uuid>,
}

impl Keys {
    fn of<'k>(keys: impl Iterator<Item = &'k SessionKey>) -> Self {
        let mut columns = Self { sites: Vec::new(), months: Vec::new(), ids: Vec::new() };
        for key in keys {
            columns.sites.push(key.site_id.as_uuid());
            columns.months.push(key.month.first_day());
            columns.ids.push(key.id.as_uuid());
        }
        columns
    }
}

/// The months of all instants from the earliest to the latest; none without any.
fn span(instants: impl Iterator<Item = DateTime<Utc>> + Clone) -> Option<Vec<chrono::NaiveDate>> {
    let (first, last) = months_between(instants.clone().min()?, instants.max()?);
    Some(
        std::iter::successors(Some(first), |month| Some(month.next()))
            .take_while(|month| *month <= last)
            .map(Month::first_day)
            .collect(),
    )
}

/// For each visit: does a stored direct session, other than `known`, lie in the window before it?
pub async fn follow_an_ad(
    tx: &Transaction<'_>,
    visits: &[Visit],
    known: &[SessionKey],
) -> Result<Vec<bool>, StoreError> {
    let since: Vec<_> = visits.iter().map(|visit| visit.created_at - crate::domain::ads_history::WINDOW).collect();
    let created: Vec<_> = visits.iter().map(|visit| visit.created_at).collect();
    let Some(months) = span(since.iter().chain(&created).copied()) else { return Ok(Vec::new()) };
    let sites: Vec<_> = visits.iter().map(|visit| visit.key.site_id.as_uuid()).collect();
    let fingerprints: Vec<_> = visits.iter().map(|visit| visit.fingerprint.as_str()).collect();
    let known = Keys::of(known.iter());
    let params: [&(dyn ToSql + Sync); 8] =
        [&months, &sites, &fingerprints, &since, &created, &known.sites, &known.months, &known.ids];
    let rows = tx.query(&EARLIER_ADS, &params).await?;
    rows.iter().map(|row| row.try_get(0).map_err(|error| StoreError::unreadable(EARLIER_ADS.name, error))).collect()
}

/// The stored sessions that `reaches` touch and that are not direct themselves, except those in `known`.
pub async fn followers(
    tx: &Transaction<'_>,
    reaches: &[Reach],
    known: &[SessionKey],
) -> Result<Vec<Follower>, StoreError> {
    let after: Vec<_> = reaches.iter().map(|reach| reach.after).collect();
    let until: Vec<_> = reaches.iter().map(|reach| reach.until).collect();
    let Some(months) = span(after.iter().chain(&until).copied()) else { return Ok(Vec::new()) };
    let sites: Vec<_> = reaches.iter().map(|reach| reach.key.site_id.as_uuid()).collect();
    let fingerprints: Vec<_> = reaches.iter().map(|reach| reach.fingerprint.as_str()).collect();
    let known = Keys::of(known.iter());
    let params: [&(dyn ToSql + Sync); 8] =
        [&months, &sites, &fingerprints, &after, &until, &known.sites, &known.months, &known.ids];
    let rows = tx.query(&LATER_SESSIONS, &params).await?;
    rows.iter()
        .map(|row| -> Result<Follower, Box<dyn std::error::Error + Send + Sync>> {
            Ok(Follower {
                visit: Visit {
                    key: SessionKey {
                        site_id: SiteId::from_uuid(row.try_get(0)?),
                        month: Month::containing(row.try_get(1)?),
                        id: SessionId::from_uuid(row.try_get(2)?),
                    },
                    fingerprint: row.try_get(3)?,
                    created_at: row.try_get(4)?,
                },
                signals: SignalSet::from_bits(row.try_get(5)?),
                attribution: Attribution::from_name(row.try_get(6)?).ok_or("unknown attribution")?,
            })
        })
        .collect::<Result<_, _>>()
        .map_err(|error| StoreError::unreadable(LATER_SESSIONS.name, error))
}

/// Writes the attribution of sessions, with the signals and the score that follow from it. `fixes` are sorted by key.
pub async fn correct(tx: &Transaction<'_>, fixes: &[(Follower, Attribution)]) -> Result<(), StoreError> {
    let months = fixes.iter().map(|(follower, _)| follower.visit.key.month);
    let (Some(from), Some(to)) = (months.clone().min(), months.max()) else { return Ok(()) };
    let keys = Keys::of(fixes.iter().map(|(follower, _)| &follower.visit.key));
    let attributions: Vec<_> = fixes.iter().map(|(_, attribution)| attribution.name()).collect();
    let signals = fixes.iter().map(|(follower, attribution)| with_history(follower.signals, *attribution));
    let scores: Vec<i16> = signals.clone().map(|signals| i16::from(signals.score().get())).collect();
    let signals: Vec<i32> = signals.map(SignalSet::bits).collect();
    let (from, to) = (from.first_day(), to.first_day());
    let params: [&(dyn ToSql + Sync); 8] =
        [&from, &to, &keys.sites, &keys.months, &keys.ids, &attributions, &signals, &scores];
    tx.query(&CORRECT_ATTRIBUTION, &params).await?;
    Ok(())
}
