//! The ads history of fingerprints, read from `sessions`: which sessions follow a paid visit. The rule is [`crate::domain::ads_history`]'s.
//!
//! Every statement binds the months that the 90 days can touch. Runs under the fingerprints' locks, see [`super::locks`].

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::columns::Unreadable;
use super::error::StoreError;
use super::statement::Months;
use super::transaction::Transaction;
use crate::domain::ads_history::{Place, Reach, months_between};
use crate::domain::attribution::Attribution;
use crate::domain::id::{SessionId, SessionKey};
use crate::domain::month::Month;
use crate::domain::session::with_history;
use crate::domain::signal::SignalSet;

crate::statement!(
    /// For each asked (site, fingerprint, time): is there a direct session in the window before it? Those that the caller is about to write are
    /// left out: of them it knows better than the table. The months are told one by one: between two
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
    /// Sessions that each reach touches, direct or not and in no order, so that no more rows are read than are asked for. Looked up reach by
    /// reach, as `LOAD_SESSIONS`, and the months as in `EARLIER_ADS`.
    LATER_SESSIONS,
    Months::Of(1),
    [DATE_ARRAY, UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, TIMESTAMPTZ_ARRAY, INT8],
    "SELECT s.created_month, s.id, s.created_at, s.signals, s.attribution, reach.position \
     FROM unnest($2, $3, $4, $5) WITH ORDINALITY AS reach (site_id, fingerprint, after, until, position) \
     CROSS JOIN LATERAL ( \
       SELECT s.created_month, s.id, s.created_at, s.signals, s.attribution FROM public.sessions s \
       WHERE s.site_id = reach.site_id AND s.fingerprint = reach.fingerprint \
         AND s.created_at > reach.after AND s.created_at <= reach.until AND s.created_month = ANY ($1) LIMIT $6) AS s"
);

crate::statement!(
    /// The sessions of one reach in one month from a place on, direct or not, in the order of the index. Over several months the planner, who
    /// cannot know how many there are, would read and sort them all.
    NEXT_LATER_SESSIONS,
    Months::In(&[1]),
    [DATE, UUID, TEXT, TIMESTAMPTZ, UUID, TIMESTAMPTZ, INT8],
    "SELECT s.created_month, s.id, s.created_at, s.signals, s.attribution FROM public.sessions s \
     WHERE s.created_month = $1 AND s.site_id = $2 AND s.fingerprint = $3 \
       AND (s.created_at, s.id) >= ($4, $5) AND s.created_at <= $6 \
     ORDER BY s.created_at, s.id LIMIT $7"
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

/// What lies in reaches.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Followers {
    /// Those that are not direct themselves, of reaches that have not too many.
    pub found: Vec<Follower>,
    /// Reaches that have more than was asked for.
    pub left: Vec<Reach>,
}

/// What comes next in a reach.
#[derive(Debug, PartialEq, Eq)]
pub struct Next {
    /// Those that are not direct themselves.
    pub found: Vec<Follower>,
    /// How many were looked at.
    pub looked_at: usize,
    /// Where the next one is, if there is one.
    pub left: Option<Place>,
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

/// The stored sessions that `reaches` touch, of reaches that touch `most` or fewer. Those that are direct themselves count, and follow nobody.
pub async fn followers(tx: &Transaction<'_>, reaches: &[Reach], most: usize) -> Result<Followers, StoreError> {
    let after: Vec<_> = reaches.iter().map(|reach| reach.after).collect();
    let until: Vec<_> = reaches.iter().map(|reach| reach.until).collect();
    let Some(months) = span(after.iter().chain(&until).copied()) else { return Ok(Followers::default()) };
    let sites: Vec<_> = reaches.iter().map(|reach| reach.site_id.as_uuid()).collect();
    let fingerprints: Vec<_> = reaches.iter().map(|reach| reach.fingerprint.as_str()).collect();
    let params: [&(dyn ToSql + Sync); 6] = [&months, &sites, &fingerprints, &after, &until, &one_more_than(most)];
    let rows = tx.query(&LATER_SESSIONS, &params).await?;
    let mut by_reach: Vec<Vec<&Row>> = vec![Vec::new(); reaches.len()];
    for row in &rows {
        let position: i64 = row.try_get(5).map_err(|error| StoreError::unreadable(LATER_SESSIONS.name, error))?;
        let reach = usize::try_from(position - 1).ok().and_then(|place| by_reach.get_mut(place));
        reach.ok_or_else(|| StoreError::unreadable(LATER_SESSIONS.name, "a reach that was not asked for"))?.push(row);
    }
    let mut followers = Followers::default();
    for (reach, rows) in reaches.iter().zip(by_reach) {
        if rows.len() > most {
            followers.left.push(reach.clone());
            continue;
        }
        for row in rows {
            let read = follower(row, reach).map_err(|error| StoreError::unreadable(LATER_SESSIONS.name, error))?;
            followers.found.extend(read);
        }
    }
    Ok(followers)
}

/// The stored sessions that a reach touches in the month of a place, from there on, at most so many.
pub async fn next_followers(tx: &Transaction<'_>, reach: &Reach, from: Place, most: usize) -> Result<Next, StoreError> {
    let (month, site, id) = (from.month.first_day(), reach.site_id.as_uuid(), from.id.as_uuid());
    let params: [&(dyn ToSql + Sync); 7] =
        [&month, &site, &reach.fingerprint, &from.created_at, &id, &reach.until, &one_more_than(most)];
    let rows = tx.query(&NEXT_LATER_SESSIONS, &params).await?;
    let read = || -> Result<Next, Unreadable> {
        let (looked_at, rest) = rows.split_at(most.min(rows.len()));
        let place = |row: &Row| -> Result<Place, Unreadable> {
            Ok(Place { created_at: row.try_get(2)?, id: SessionId::from_uuid(row.try_get(1)?), ..from })
        };
        let left = rest.first().map(place).transpose()?;
        let found = looked_at.iter().filter_map(|row| follower(row, reach).transpose()).collect::<Result<_, _>>()?;
        Ok(Next { found, looked_at: looked_at.len(), left })
    };
    read().map_err(|error| StoreError::unreadable(NEXT_LATER_SESSIONS.name, error))
}

/// One more tells that there are more.
fn one_more_than(most: usize) -> i64 {
    i64::try_from(most).unwrap_or(i64::MAX).saturating_add(1)
}

/// Nothing for one that is direct itself.
fn follower(row: &Row, reach: &Reach) -> Result<Option<Follower>, Unreadable> {
    let attribution = Attribution::from_name(row.try_get(4)?).ok_or("unknown attribution")?;
    if attribution == Attribution::DirectToAds {
        return Ok(None);
    }
    let (month, id) = (Month::containing(row.try_get(0)?), SessionId::from_uuid(row.try_get(1)?));
    let key = SessionKey { site_id: reach.site_id, month, id };
    let visit = Visit { key, fingerprint: reach.fingerprint.clone(), created_at: row.try_get(2)? };
    Ok(Some(Follower { visit, signals: SignalSet::from_bits(row.try_get(3)?), attribution }))
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
